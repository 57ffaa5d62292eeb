"""insert-dynamic"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx

from onnxq.graph import Constant, Node, Tensor, Variable, value
from onnxq.model import Dynamic, Model, short_name
from onnxq.numerics import quantize
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class InsertDynamic(Pass):
    """Let linear layers whose input has a dynamic spec quantize it at every run, with a range of its own.

    Given:   %1 = MatMul(%0, W);  %2 = Add(%1, B)                                      specs: %0 dynamic
    Result:  %3, s, z = DynamicQuantizeLinear(%0)                                      once for all layers that read %0
             %1 = Mul(Cast(MatMulInteger(%3, W_q, z, W_z)), s * W_scale);  %2 = Add(%1, B)             B in float
    Refused: a layer whose input has another spec.
    """

    name: ClassVar[str] = "insert-dynamic"

    def apply(self, model: Model) -> int:
        parts: dict[str, tuple[Variable, Variable, Variable]] = {}
        weights: dict[tuple[str, bool], list[Constant]] = {}
        layers = [n for n in model.compute_nodes() if (n.name, 0) in model.quantized_inputs]
        layers = [n for n in layers if isinstance(model.specs.get(n.inputs[0].name), Dynamic)]
        for node in layers:
            x = node.inputs[0]
            if x.name not in parts:
                parts[x.name] = _quantized(model, x)
            key = (node.inputs[1].name, bool(node.attrs.get("transB", 0)))
            if key not in weights:
                weights[key] = _weight(model, node)
            _lower(model, node, parts[x.name], weights[key])
        for name in parts:
            del model.specs[name]
        if layers:
            model.graph.cleanup()
        return len(layers)


def _quantized(model: Model, x: Tensor) -> tuple[Variable, Variable, Variable]:
    """Codes, scale and zero point of a tensor, computed at run time."""
    graph, base = model.graph, short_name(x.name)
    codes = graph.variable(f"{base}_q", np.uint8, x.shape)
    scale, zero_point = graph.variable(f"{base}_scale", np.float32, []), graph.variable(f"{base}_zero_point", np.uint8, [])
    graph.insert("DynamicQuantizeLinear", [x], [codes, scale, zero_point], name=f"{base}_DynamicQuantizeLinear")
    return codes, scale, zero_point


def _weight(model: Model, node: Node) -> list[Constant]:
    """Codes, columns last, scale and zero point of a layer's weight."""
    graph, name = model.graph, node.inputs[1].name
    params, base = model.params_of(name), short_name(name)
    codes = quantize(np.asarray(value(node.inputs[1])), params)
    parts = {"q": codes.T if node.attrs.get("transB", 0) else codes, "scale": params.scale, "zero_point": params.zero_point}
    return [graph.constant(f"{base}_{part}", values) for part, values in parts.items()]


def _lower(model: Model, node: Node, activation: tuple[Variable, Variable, Variable], weight: list[Constant]) -> None:
    graph, name, result = model.graph, node.name, node.outputs[0]
    codes, scale, zero_point = activation
    weight_codes, weight_scale, weight_zero_point = weight
    bias = _float_bias(model, node)
    if not [r for r in model.readers(node.inputs[1]) if r != (name, 1) and r in model.quantized_inputs]:
        model.specs.pop(node.inputs[1].name)
    model.quantized_inputs -= {(name, 0), (name, 1)}
    graph.remove(node)

    sums = graph.variable(f"{name}_sums", np.int32, result.shape)
    inputs = [codes, weight_codes, zero_point, weight_zero_point]
    graph.insert("MatMulInteger", inputs, [sums]).name = name  # the runtime's kernel will have this node's name
    as_float = graph.variable(f"{name}_float", np.float32, result.shape)
    graph.insert("Cast", [sums], [as_float], {"to": onnx.TensorProto.FLOAT})
    step = graph.variable(f"{name}_scale", np.float32, list(np.shape(weight_scale.values)))
    graph.insert("Mul", [scale, weight_scale], [step])
    if bias is None:
        graph.insert("Mul", [as_float, step], [result])
    else:
        product = graph.variable(f"{name}_product", np.float32, result.shape)
        graph.insert("Mul", [as_float, step], [product])
        graph.insert("Add", [product, bias], [result])


def _float_bias(model: Model, node: Node) -> Tensor | None:
    """Leave the layer's bias in float; the one that it reads itself is returned, to be added after it."""
    found = model.bias_of(node)
    if found is None:
        return None
    reader, index = found
    tensor = reader.inputs[index]
    model.quantized_inputs.discard((reader.name, index))
    if not any(r in model.quantized_inputs for r in model.readers(tensor)):
        model.specs.pop(tensor.name, None)
    return tensor if reader is node else None
