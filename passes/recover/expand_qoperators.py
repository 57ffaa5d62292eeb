"""expand-qoperators"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Constant, Node, Tensor, input_at, value
from onnxq.model import Model
from onnxq.numerics import QuantType
from onnxq.passmanager import Pass
from onnxq.recovery import DOMAINS, MOVING, fits, floats_of, inside, maker, params_at, params_of

ONE_INPUT = {  # of com.microsoft: x, scale and zero point of x, then those of the result
    "QLinearSigmoid": "Sigmoid", "QLinearLeakyRelu": "LeakyRelu", "QLinearSoftmax": "Softmax",
    "QLinearAveragePool": "AveragePool", "QLinearGlobalAveragePool": "GlobalAveragePool",
}  # fmt: skip
TWO_INPUTS = {"QLinearAdd": "Add", "QLinearMul": "Mul", "QLinearMatMul": "MatMul"}
AXIS_ALONE = 13  # the first opset in which Softmax takes one axis alone
OWN_ATTRIBUTES = ("channels_last", "opset")  # of QLinear ops, which the float ops lack


@dataclass(frozen=True)
class ExpandQoperators(Pass):
    """Write an op on integers as the op on floats that it stands for, between DequantizeLinear and QuantizeLinear.

    Given:   %1 = QLinearConv(%0, s0, z0, W, sw, zw, s1, z1, B)
    Result:  %2 = DequantizeLinear(%0, s0, z0);  %3 = Conv(%2, W', B * s0 * sw);  %1 = QuantizeLinear(%3, s1, z1)
    Refused: its parameters are computed; it works on another layout than the float op.

    Ops that hand integers on, such as MaxPool and Reshape, change places with the QuantizeLinear before them.
    """

    name: ClassVar[str] = "expand-qoperators"

    def apply(self, model: Model) -> int:
        expanded = 0
        for node in list(model.graph.nodes):
            make = _expansion(node)
            if make is None:
                continue
            if make(model, node):
                expanded += 1
            else:
                model.refuse(node, "its parameters are computed, or it works on another layout")
        model.graph.cleanup()
        return expanded


def _expansion(node: Node) -> Callable[[Model, Node], bool] | None:
    if node.domain not in DOMAINS:
        return None
    if node.op in ONE_INPUT:
        return lambda model, n: _rewrite(model, n, ONE_INPUT[n.op], [0], 3)
    if node.op in TWO_INPUTS:
        return lambda model, n: _rewrite(model, n, TWO_INPUTS[n.op], [0, 3], 6, axis=-1)
    if node.op in MOVING and node.inputs and _is_code(node.inputs[0]):
        return _swap
    return {"QLinearConv": _conv, "QGemm": _gemm, "QLinearConcat": _concat}.get(node.op)


def _conv(model: Model, node: Node) -> bool:
    return _rewrite(model, node, "Conv", [0, 3], 6, axis=0, bias=8)


def _gemm(model: Model, node: Node) -> bool:
    if node.attrs.get("alpha", 1.0) != 1.0:
        return False
    return _rewrite(model, node, "Gemm", [0, 3], 7, axis=0 if node.attrs.get("transB", 0) else 1, bias=6)


def _concat(model: Model, node: Node) -> bool:
    return _rewrite(model, node, "Concat", list(range(2, len(node.inputs), 3)), 0)


def _rewrite(
    model: Model, node: Node, op: str, operands: list[int], result: int, *, axis: int = 0, bias: int | None = None
) -> bool:
    """`operands` and `result` are the places of a tensor, or of the result's scale, before its scale and zero point."""
    graph = model.graph
    if node.attrs.get("channels_last", 0) or (op == "Softmax" and not _is_softmax_of_this_opset(model, node)):
        return False
    floats = [_float(model, node, k, axis) for k in operands]
    if any(f is None for f in floats):
        return False
    codes = input_at(node, bias) if bias is not None else None
    if codes is not None:
        scales = [value(input_at(node, k + 1)) for k in operands]
        values = value(codes)
        numbers = [s for s in scales if s is not None]
        if values is None or len(numbers) < len(scales) or len({s.size for s in [values, *numbers]} - {1}) > 1:
            return False
        product = np.prod(np.broadcast_arrays(*[np.asarray(s, np.float32).reshape(-1) for s in numbers]), axis=0)
        floats.append(graph.constant(f"{codes.name}_bias", (values * product).astype(np.float32)))
    scale = input_at(node, result)
    quantizer = list(node.inputs[result : result + 2])
    node.op, node.domain = op, ""
    defaults = {"axis": -1} if op == "Softmax" else {}  # before opset 13 the float op's own is 1
    node.attrs = {**defaults, **{k: v for k, v in node.attrs.items() if k not in OWN_ATTRIBUTES}}
    graph.rewire(node, inputs=[f for f in floats if f is not None])
    if scale is not None:  # QGemm without a scale for its result gives floats
        _quantize_result(model, node, quantizer)
    return True


def _is_softmax_of_this_opset(model: Model, node: Node) -> bool:
    """Whether Softmax is the same op in the model's opset as in that which the node was made for.

    Before opset 13 all axes from the given one on are taken together, which is the same for the last one.
    """
    axis = int(node.attrs.get("axis", -1))
    is_last = axis == -1 or axis == len(node.inputs[0].shape or ()) - 1
    return is_last or (node.attrs.get("opset", 13) >= AXIS_ALONE) == (model.graph.opset >= AXIS_ALONE)


def _quantize_result(model: Model, node: Node, parameters: list[Tensor]) -> None:
    public = node.outputs[0]
    between = model.graph.variable(f"{public.name}_float", np.float32)
    model.graph.rewire(node, outputs=[between])
    model.graph.insert("QuantizeLinear", [between, *parameters], [public], domain=model.qdq_domain)


def _float(model: Model, node: Node, index: int, axis: int) -> Tensor | None:
    """The float tensor that an operand stands for: a constant, or behind a new DequantizeLinear."""
    graph, codes = model.graph, node.inputs[index]
    scale, zero = input_at(node, index + 1), input_at(node, index + 2)
    if isinstance(codes, Constant):
        params = params_of(scale, zero, codes.dtype, axis)
        values = None if params is None else floats_of(codes.values, params)
        if params is None or values is None:
            return None
        weight = graph.constant(f"{codes.name}_weight", values)
        fitting = fits(params, values.shape)
        if fitting is not None and params.type != QuantType.INT32:
            model.trained[weight.name] = fitting
        return weight
    scales = value(scale)
    if scale is None or scales is None or scales.size > 1:
        return None
    result = graph.variable(f"{codes.name}_float", np.float32, codes.shape)
    inputs = [codes, scale] if zero is None else [codes, scale, zero]
    graph.insert("DequantizeLinear", inputs, [result], domain=model.qdq_domain)
    return result


def _is_code(tensor: Tensor) -> bool:
    makers = tensor.inputs
    return bool(makers) and makers[0].op == "QuantizeLinear" and makers[0].domain in DOMAINS


def _swap(model: Model, node: Node) -> bool:
    graph = model.graph
    quantizer = maker(graph, node.inputs[0], "QuantizeLinear")
    params = None if quantizer is None else params_at(quantizer)
    if quantizer is None or params is None or params.scale.ndim or len([t for t in node.outputs if t.name]) > 1:
        return False
    graph.rewire(node, inputs=[inside(graph, quantizer.inputs[0], params), *node.inputs[1:]])
    _quantize_result(model, node, list(quantizer.inputs[1:]))
    return True
