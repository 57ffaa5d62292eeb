"""remove-quantize-pairs"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Constant, Graph, Node, Tensor
from onnxq.model import Model
from onnxq.numerics import PerTensor
from onnxq.passmanager import Pass
from onnxq.recovery import find, inside, kept_range, maker, params_at, same


@dataclass(frozen=True)
class RemoveQuantizePairs(Pass):
    """Take QuantizeLinear and DequantizeLinear off an activation, and remember what it was quantized with.

    Given:   %1 = QuantizeLinear(%0, s, z);  %2 = DequantizeLinear(%1, s, z);  %3 = Conv(%2, W)
    Result:  %3 = Conv(%0, W)                                                       trained: s and z of %0
             %4 = Clip(%0, 0, 255 * s);  %3 = Conv(%4, W)                           where z is the least code of its type
    Refused: the two have other parameters, or by channel, or computed ones; what comes in are integers, of which only the
             parameters are remembered.

    A QuantizeLinear that has no codes for negative numbers may stand for a Relu or Clip too, which a quantizer took away:
    its range is written out, unless nothing negative can come. A Clip of the codes between the two goes; where its bounds
    are those of a narrower type, 7 bits say, the range stays, written out, and gets all codes.
    """

    name: ClassVar[str] = "remove-quantize-pairs"

    def apply(self, model: Model) -> int:
        graph, removed, clipped = model.graph, 0, dict[tuple[Node, bytes, bytes], Tensor]()
        for node in find(graph, "DequantizeLinear"):
            params, result = params_at(node), node.outputs[0]
            if params is None or not isinstance(params.granularity, PerTensor):
                model.refuse(node, "its parameters are computed, by channel, in blocks, or of another type")
                continue
            quantizer = _quantizer(graph, node)
            if quantizer is None:
                removed += result.name not in model.trained
                model.trained.setdefault(result.name, params)
                model.refuse(node, "it reads integers that no QuantizeLinear makes")
                continue
            given = params_at(quantizer)
            if given is None or not same(given, params):
                model.refuse(node, "the QuantizeLinear before it has other parameters")
                continue
            kept = kept_range(graph, node, params)
            if kept is None:
                model.refuse(node, "a Clip before it leaves fewer codes than 4 bits have, or none for zero")
                continue
            params, is_cut = kept
            key = (quantizer, params.scale.tobytes(), params.zero_point.tobytes())  # of two readers one may have a Clip
            if key not in clipped:
                clipped[key] = inside(graph, quantizer.inputs[0], params, always=is_cut)
            source = clipped[key]
            model.trained.setdefault(source.name, params)
            if graph.is_output(result):
                model.trained.setdefault(result.name, params)
                graph.remove(node)
                graph.insert("Identity", [source], [result])
            else:
                graph.replace_uses(result, source)
            removed += 1
        graph.cleanup()
        return removed


def _quantizer(graph: Graph, node: Node) -> Node | None:
    """The QuantizeLinear of an activation that a DequantizeLinear undoes."""
    clip = maker(graph, node.inputs[0], "Clip")
    codes = node.inputs[0] if clip is None else clip.inputs[0]
    found = maker(graph, codes, "QuantizeLinear")
    return None if found is None or isinstance(found.inputs[0], Constant) else found
