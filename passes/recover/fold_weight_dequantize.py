"""fold-weight-dequantize"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.model import Model
from onnxq.numerics import QuantType
from onnxq.passmanager import Pass
from onnxq.recovery import codes_of, find, fits, floats_of, params_at


@dataclass(frozen=True)
class FoldWeightDequantize(Pass):
    """Write a weight that is stored as integers, or rounded to them by a QuantizeLinear, as the floats that it stands for.

    Given:   %1 = DequantizeLinear(W: int8, s, z);  %2 = Conv(%0, %1)              or W float, through QuantizeLinear first
    Result:  %2 = Conv(%0, W')                      W' = (W - z) * s;  trained: s and z of W'
    Refused: its parameters are computed, in blocks, or of another type than 8, 16 and 32 bits; it is a graph output.
    """

    name: ClassVar[str] = "fold-weight-dequantize"

    def apply(self, model: Model) -> int:
        graph, folded = model.graph, 0
        for node in find(graph, "DequantizeLinear"):
            codes = codes_of(graph, node.inputs[0])
            if codes is None:
                continue
            params = params_at(node)
            values = None if params is None else floats_of(codes, params)
            if params is None or values is None:
                model.refuse(node, "its parameters are computed, in blocks, or of another type")
                continue
            result = node.outputs[0]
            if graph.is_output(result):
                model.refuse(node, "it is a graph output")
                continue
            weight = graph.constant(f"{result.name}_weight", values)
            fitting = fits(params, values.shape)
            if fitting is not None and params.type != QuantType.INT32:  # a bias follows from its layer
                model.trained[weight.name] = fitting
            graph.replace_uses(result, weight)
            folded += 1
        graph.cleanup()
        return folded
