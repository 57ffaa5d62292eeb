"""Canonical SSA text of a graph or model: the same text for the same computation, whatever its tensors are called.

    (%0: float32[1, 3, 8, 8])
      %1 = Conv(%0, float32[4, 3, 3, 3], float32[4]) {kernel_shape=[3, 3]}
    -> (%1)

Constants print as their type and shape, and with their values up to eight elements where these are integers or booleans
of rank 0 or 1. With a Model, specs, parameters and quantized readers are marked: `%1 ~uint8`, `float32[4]:int8@0`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxq.graph import Constant, Graph, Node, Tensor, Variable

MOST_VALUES = 8


def to_text(graph: Graph) -> str:
    """The graph's inputs, one line a node, and its outputs."""
    names: dict[int, str] = {}

    def name(tensor: Tensor) -> str:
        if tensor.is_empty():
            return "_"
        if isinstance(tensor, Constant):
            return constant_text(tensor)
        return names.setdefault(id(tensor), f"%{len(names)}")

    lines = ["(" + ", ".join(f"{name(t)}: {type_text(t)}" for t in graph.inputs) + ")"]
    for node in graph.nodes:
        inputs = ", ".join(name(t) for t in node.inputs)
        outputs = ", ".join(name(t) for t in node.outputs)
        op = f"{node.domain}.{node.op}" if node.domain else node.op
        lines.append(f"  {outputs} = {op}({inputs})" + attributes_text(node))
    lines.append("-> (" + ", ".join(name(t) for t in graph.outputs) + ")")
    return "\n".join(lines) + "\n"


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
    if size <= MOST_VALUES and len(tensor.shape or ()) <= 1 and not isinstance(tensor.dtype, int):
        if np.dtype(tensor.dtype).kind in "biu":
            return f"{kind}{np.asarray(tensor.values).tolist()}" if tensor.shape else f"{kind}={tensor.values.item()}"
        if not tensor.shape:
            return f"{kind}={float(tensor.values):.6g}"
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
