"""expand-dynamic"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Constant, Node, Tensor, input_at
from onnxq.model import Model
from onnxq.passmanager import Pass
from onnxq.recovery import codes_of, find, fits, floats_of, maker, params_of

INTEGER = {"MatMulInteger": "MatMul", "ConvInteger": "Conv"}
FUSED = {"DynamicQuantizeMatMul": (0, 1, 2, 3, 4), "MatMulIntegerToFloat": (0, 1, 3, 5, 6)}  # x, W, scale, zero, bias


@dataclass(frozen=True)
class ExpandDynamic(Pass):
    """Write a layer whose input is quantized at run time as the layer on floats that it stands for.

    Given:   %1, %2, %3 = DynamicQuantizeLinear(%0);  %4 = Cast(MatMulInteger(%1, W, %3, zw));  %5 = Mul(%4, %2 * sw)
    Result:  %5 = MatMul(%0, W')                           W' = (W - zw) * sw;  trained: sw and zw of W'
    Refused: its input comes from elsewhere; its weight or its scales are computed in another way.
    """

    name: ClassVar[str] = "expand-dynamic"

    def apply(self, model: Model) -> int:
        expanded = 0
        for node in find(model.graph, *INTEGER, *FUSED):
            done = _expand_fused(model, node) if node.op in FUSED else _expand(model, node)
            if done:
                expanded += 1
            else:
                model.refuse(node, "its input, its weight or its scales are computed in another way")
        model.graph.cleanup()
        return expanded


def _expand(model: Model, node: Node) -> bool:
    graph = model.graph
    dynamic, cast = maker(graph, node.inputs[0], "DynamicQuantizeLinear"), graph.sole_consumer(node.outputs[0])
    product = None if cast is None or cast.op != "Cast" else graph.sole_consumer(cast.outputs[0])
    if dynamic is None or cast is None or product is None or product.op != "Mul":
        return False
    if input_at(node, 2) is not dynamic.outputs[2]:
        return False
    scale = _weight_scale(model, product, cast.outputs[0], dynamic.outputs[1])
    weight = None if scale is None else _weight(model, node.inputs[1], scale, input_at(node, 3), node.op)
    if weight is None:
        return False
    result = product.outputs[0]
    graph.remove(product)
    node.op, node.domain = INTEGER[node.op], ""
    graph.rewire(node, inputs=[dynamic.inputs[0], weight], outputs=[result])
    return True


def _weight_scale(model: Model, product: Node, cast: Tensor, scale: Tensor) -> Tensor | None:
    """The constant by which, next to the scale of the input, the integers of a layer are multiplied."""
    (other,) = [t for t in product.inputs if t is not cast] or [cast]
    factors = maker(model.graph, other, "Mul")
    if factors is None or not any(t is scale for t in factors.inputs):
        return None
    (found,) = [t for t in factors.inputs if t is not scale] or [scale]
    return found if isinstance(found, Constant) else None


def _expand_fused(model: Model, node: Node) -> bool:
    graph, (x, w, s, z, b) = model.graph, FUSED[node.op]
    source, bias = node.inputs[x], input_at(node, b)
    if node.op == "MatMulIntegerToFloat":
        dynamic = maker(graph, source, "DynamicQuantizeLinear")
        if dynamic is None or input_at(node, 2) is not dynamic.outputs[1] or input_at(node, 4) is not dynamic.outputs[2]:
            return False
        source = dynamic.inputs[0]
    scale = input_at(node, s)
    weight = None if scale is None else _weight(model, node.inputs[w], scale, input_at(node, z), "MatMulInteger")
    if weight is None:
        return False
    node.op, node.domain, node.attrs = "MatMul", "", {}
    graph.rewire(node, inputs=[source, weight])
    if bias is not None:
        result = node.outputs[0]
        between = graph.variable(f"{result.name}_product", np.float32)
        graph.rewire(node, outputs=[between])
        graph.insert("Add", [between, bias], [result])
    return True


def _weight(model: Model, tensor: Tensor, scale: Tensor, zero: Tensor | None, op: str) -> Constant | None:
    codes = codes_of(model.graph, tensor)
    axis = 0 if op == "ConvInteger" else -1
    flat = scale if not isinstance(scale, Constant) else Constant(scale.name, scale.values.reshape(-1))
    params = None if codes is None else params_of(flat, zero, codes.dtype, axis)
    values = None if codes is None or params is None else floats_of(codes, params)
    fitting = None if values is None or params is None else fits(params, values.shape)
    if values is None or fitting is None:
        return None
    weight = model.graph.constant(f"{tensor.name}_weight", values)
    model.trained[weight.name] = fitting
    return weight
