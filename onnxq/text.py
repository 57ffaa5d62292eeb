"""Canonical SSA text of a graph or model: the same text for the same computation, whatever its tensors are called.

    (%0: float32[1, 3, 8, 8])
      %1 = Conv(%0, float32[4, 3, 3, 3], float32[4]) {kernel_shape=[3, 3]}
    -> (%1)

Constants print as their type and shape, and with their values up to eight elements where these are integers or booleans
of rank 0 or 1, up to four where they are floating-point numbers. Of a Model, `q(...)` marks what a node reads through Q and
DQ, and a line a tensor follows the graph:

    (%0: float32[1, 3, 8, 8])
      %1 = Conv(q(%0), q(float32[4, 3, 3, 3]: int8 by axis 0))
    -> (q(%1))
    %0: uint8
    %1: uint8, scale 0.0235, zero point 0
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from onnxq.graph import Constant, Graph, Node, Tensor, Variable
from onnxq.model import Derived, Dynamic, Fixed, Model, Observed, Shared
from onnxq.numerics import PerAxis, PerTensor, QuantParams, QuantType

MOST_VALUES = 8
MOST_FRACTIONS = 4


def to_text(subject: Graph | Model) -> str:
    """The graph's inputs, one line a node, and its outputs; for a Model, how its tensors are quantized as well."""
    graph = subject if isinstance(subject, Graph) else subject.graph
    model = None if isinstance(subject, Graph) else subject
    names: dict[int, str] = {}

    def name(tensor: Tensor) -> str:
        if tensor.is_empty():
            return "_"
        if isinstance(tensor, Constant):
            return constant_text(tensor)
        return names.setdefault(id(tensor), f"%{len(names)}")

    def read(tensor: Tensor, reader: tuple[str, int]) -> str:
        if model is None or reader not in model.quantized_inputs:
            return name(tensor)
        spec = f": {spec_text(model, tensor, name)}" if isinstance(tensor, Constant) and tensor.name in model.specs else ""
        return f"q({name(tensor)}{spec})"

    lines = ["(" + ", ".join(f"{name(t)}: {type_text(t)}" for t in graph.inputs) + ")"]
    for node in graph.nodes:
        inputs = ", ".join(read(t, (node.name, k)) for k, t in enumerate(node.inputs))
        outputs = ", ".join(name(t) for t in node.outputs)
        op = f"{node.domain}.{node.op}" if node.domain else node.op
        lines.append(f"  {outputs} = {op}({inputs})" + attributes_text(node))
    lines.append("-> (" + ", ".join(read(t, ("", k)) for k, t in enumerate(graph.outputs)) + ")")
    if model is not None:
        tensors = graph.tensors().items()
        lines += [f"{name(t)}: {spec_text(model, t, name)}" for n, t in tensors if n in model.specs and id(t) in names]
        shown = [(n, t) for n, t in tensors if n in model.trained and (id(t) in names or isinstance(t, Constant))]
        lines += [f"{name(t)}: trained {params_text(model.trained[n])}" for n, t in shown]
        lines += [f"{name(n.outputs[0])}: sensitive" for n in graph.nodes if n.name in model.sensitive]
    return "\n".join(lines) + "\n"


def spec_text(model: Model, tensor: Tensor, name: Callable[[Tensor], str]) -> str:
    """One spec: its kind, type, granularity, and the parameters once they are known."""
    spec, tensors = model.specs[tensor.name], model.graph.tensors()
    if isinstance(spec, Shared):
        return f"shared with {name(tensors[spec.tensor])}"
    if isinstance(spec, Derived):
        return f"derived from {name(tensors[spec.activation])}"
    if isinstance(spec, Dynamic):
        return "dynamic"
    params = spec.params if isinstance(spec, Fixed) else model.params.get(tensor.name)
    if params is not None:
        return params_text(params)
    kind, grain = (spec.type, spec.granularity) if isinstance(spec, Observed) else (QuantType.UINT8, PerTensor())
    return kind.value + (f" by axis {grain.axis}" if isinstance(grain, PerAxis) else "")


def params_text(params: QuantParams) -> str:
    """Type, granularity, scales and the zero points that there are."""
    grain = params.granularity
    scale, zero = np.asarray(params.scale).reshape(-1), np.asarray(params.zero_point).reshape(-1)
    numbers = ", ".join(f"{v:.3g}" for v in scale[:MOST_VALUES])
    said = params.type.value + (f" by axis {grain.axis}" if isinstance(grain, PerAxis) else "")
    return f"{said}, scale {numbers}, zero point {', '.join(str(v) for v in sorted(set(zero.tolist())))}"


def type_text(tensor: Tensor) -> str:
    if tensor.dtype is None:
        return "?"
    kind = str(tensor.dtype) if isinstance(tensor.dtype, int) else np.dtype(tensor.dtype).name
    if tensor.shape is None:
        return f"{kind}[?]"
    return f"{kind}[{', '.join('?' if d is None else str(d) for d in tensor.shape)}]"


def constant_text(tensor: Constant) -> str:
    kind = type_text(tensor)
    size = int(np.prod(tensor.shape)) if tensor.shape else 1
    if isinstance(tensor.dtype, int):
        return kind
    if np.dtype(tensor.dtype).kind in "biu" and size <= MOST_VALUES and len(tensor.shape or ()) <= 1:
        return f"{kind}{np.asarray(tensor.values).tolist()}" if tensor.shape else f"{kind}={tensor.values.item()}"
    if np.dtype(tensor.dtype).kind == "f" and size <= MOST_FRACTIONS:
        values = np.asarray(tensor.values, np.float64)
        return f"{kind}[{', '.join(f'{v:.4g}' for v in values.reshape(-1))}]" if tensor.shape else f"{kind}={values:.6g}"
    return kind


def attributes_text(node: Node) -> str:
    if not node.attrs:
        return ""
    return " {" + ", ".join(f"{k}={_value_text(node.attrs[k])}" for k in sorted(node.attrs)) + "}"


def _value_text(attribute: Any) -> str:
    if isinstance(attribute, float):
        return f"{attribute:.6g}"
    if isinstance(attribute, (list, tuple)):
        return "[" + ", ".join(_value_text(v) for v in attribute) + "]"
    if isinstance(attribute, (Constant, Variable)):
        return type_text(attribute)
    return str(attribute) if isinstance(attribute, (int, str)) else type(attribute).__name__.lower()
