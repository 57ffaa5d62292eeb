"""annotate-dynamic"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from onnxq.graph import Node, value
from onnxq.model import DYNAMIC_OPSET, Dynamic, Model, Observed, Reason
from onnxq.numerics import QuantType
from onnxq.passmanager import Pass

WHY = "only plain linear layers are quantized at run time, as integers cost a convolution more than they gain there"


@dataclass(frozen=True)
class AnnotateDynamic(Pass):
    """Let every MatMul and Gemm that was annotated quantize its input at every run, so that no data is needed.

    Given:   specs: %0 and W observed; %1 = MatMul(%0, W)
    Result:  specs: %0 dynamic, W observed, of uint8 where the target saturates
    Refused: a Conv, a weight of more than two dimensions, a product to which a constant of more dimensions is added: taken
             back; the target has no such kernels.
    """

    name: ClassVar[str] = "annotate-dynamic"

    def apply(self, model: Model) -> int:
        planned = [n for n in model.compute_nodes() if n.name in model.planned]
        annotated = 0
        for node in [n for n in planned if not _is_linear(model, n)]:
            _take_back(model, node)
            model.keep_float(node, Reason.SLOWER, WHY)
            model.refuse(node, WHY)
            annotated += 1
        for node in [n for n in planned if n.name in model.planned]:
            x, weight = node.inputs[0].name, node.inputs[1].name
            spec = model.specs[weight]
            if model.target.saturates and isinstance(spec, Observed) and spec.type.signed:
                model.specs[weight] = replace(spec, type=QuantType.UINT8, symmetric=True)
            if not isinstance(model.specs.get(x), Dynamic):
                model.specs[x] = Dynamic()
                annotated += 1
        return annotated


def _is_linear(model: Model, node: Node) -> bool:
    weight = value(node.inputs[1])
    can = model.target.dynamic and model.graph.opset >= DYNAMIC_OPSET and not model.gains_a_dimension(node)
    return can and node.op in ("MatMul", "Gemm") and weight is not None and weight.ndim == 2


def _take_back(model: Model, node: Node) -> None:
    """Leave the node in float, and drop the specs that nothing reads any more."""
    readers = {(node.name, k) for k in range(len(node.inputs))}
    found = model.bias_of(node)
    if found is not None:
        readers.add((found[0].name, found[1]))
    tensors = [node.inputs[k] for k in range(min(3, len(node.inputs)))]
    tensors += [] if found is None else [found[0].inputs[found[1]]]
    model.quantized_inputs -= readers
    model.planned.discard(node.name)
    for tensor in tensors:
        if not any(r in model.quantized_inputs for r in model.readers(tensor)):
            model.specs.pop(tensor.name, None)
