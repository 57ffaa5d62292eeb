"""fold-shapes"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import ONNX_DOMAINS, Constant, Node, Tensor, input_at, value
from onnxq.model import Model
from onnxq.passmanager import Pass

Dims = list[int | str | None]  # a number, the symbol of an unknown one, or None
KEEPS = ("Cast", "Identity", "Unsqueeze", "Squeeze")
EXACT = ("int32", "int64", "float32", "float64")  # types that hold every dimension; a boolean does not
ARITHMETIC = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}


@dataclass(frozen=True)
class FoldShapes(Pass):
    """Compute shape arithmetic as far as the shapes are known, dimension by dimension.

    Given:   (%0: float32[N, 3, 8, 8])  %1 = Shape(%0);  %2 = Gather(%1, 1);  %3 = Use(%2)
    Result:  %3 = Use(3)
    Given:   %4 = Concat(N, -1);  %5 = Reshape(%0, %4)                        %0 of known size but for N
    Result:  %5 = Reshape(%0, [-1, 192])
    Refused: a dimension that is needed is unknown; more than one is unknown in a Reshape, or the one is not the batch of
             %0 and another is -1.
    """

    name: ClassVar[str] = "fold-shapes"

    def apply(self, model: Model) -> int:
        graph = model.graph
        known: dict[int, Dims] = {}
        folded = 0
        for node in graph.nodes:
            dims, result = _evaluate(node, known), node.outputs[0] if node.outputs else None
            if dims is None or result is None or not _holds(result, len(dims)):
                continue
            known[id(result)] = dims
            if not _all_known(dims) or graph.is_output(result) or not result.outputs:
                continue
            values = np.array(dims, result.dtype).reshape(-1 if result.shape else ())
            graph.replace_uses(result, graph.constant(result.name, values))
            folded += 1
        folded += sum(_fold_reshape(model, node, known) for node in graph.find("Reshape"))
        if folded:
            graph.cleanup()
        return folded


def _all_known(dims: Dims) -> bool:
    return all(isinstance(d, int) for d in dims)


def _is_size(dim: object) -> bool:
    return isinstance(dim, (int, np.integer)) and int(dim) >= 0


def _holds(tensor: Tensor, count: int) -> bool:
    """Whether the tensor is a list of so many dimensions, or a scalar of one, of a type that holds them."""
    if tensor.shape is None or tensor.dtype is None or isinstance(tensor.dtype, int):
        return False
    fits = len(tensor.shape) == 1 or (not tensor.shape and count == 1)
    return fits and np.dtype(tensor.dtype).name in EXACT


def _evaluate(node: Node, known: dict[int, Dims]) -> Dims | None:
    """The dimensions that the node's output holds; None for a node that is no arithmetic."""
    if node.domain not in ONNX_DOMAINS:
        return None
    if node.op == "Shape":
        shape = node.inputs[0].shape
        if shape is None:
            return None
        dims: Dims = [int(d) if _is_size(d) else d if isinstance(d, str) else None for d in shape]
        return dims[node.attrs.get("start", 0) : node.attrs.get("end", len(dims))]
    operands = [_dims(t, known) for t in node.inputs]
    if not operands or operands[0] is None:
        return None
    if node.op == "Concat" and all(d is not None for d in operands):
        return [d for part in operands for d in part or []]
    if not any(id(t) in known for t in node.inputs):
        return None  # plain constants are folded by fold-constants
    first = operands[0]
    if node.op in KEEPS:
        return first
    if node.op == "Gather" and node.attrs.get("axis", 0) == 0 and (index := value(input_at(node, 1))) is not None:
        return [first[int(i)] for i in index.reshape(-1)] if index.ndim <= 1 else None
    if node.op == "Slice" and len(node.inputs) >= 3:
        return _slice(node, first)
    if node.op in ARITHMETIC and len(operands) == 2 and operands[1] is not None:
        return _combine(ARITHMETIC[node.op], first, operands[1])
    return None


def _slice(node: Node, dims: Dims) -> Dims | None:
    bounds = [value(input_at(node, k)) for k in (1, 2, 4)]
    starts, ends, steps = bounds
    if starts is None or ends is None or (len(node.inputs) > 4 and steps is None) or starts.size != 1:
        return None
    step = 1 if steps is None else int(steps.reshape(-1)[0])
    return dims[slice(int(starts.reshape(-1)[0]), int(ends.reshape(-1)[0]), step)] if step > 0 else None


def _combine(op: np.ufunc, a: Dims, b: Dims) -> Dims | None:
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        return None
    a, b = a * len(b) if len(a) == 1 else a, b * len(a) if len(b) == 1 else b
    return [int(op(x, y)) if isinstance(x, int) and isinstance(y, int) else None for x, y in zip(a, b, strict=True)]


def _dims(tensor: Tensor, known: dict[int, Dims]) -> Dims | None:
    if id(tensor) in known:
        return known[id(tensor)]
    if isinstance(tensor, Constant) and not isinstance(tensor.dtype, int) and np.dtype(tensor.dtype).kind == "i":
        values = np.asarray(tensor.values)
        return [int(v) for v in values.reshape(-1)] if values.ndim <= 1 and values.size <= 16 else None
    return None


def _fold_reshape(model: Model, node: Node, known: dict[int, Dims]) -> int:
    """A target shape with one unknown dimension: that one becomes -1, and the -1 among the others is computed."""
    target = input_at(node, 1)
    if target is None or isinstance(target, Constant) or id(target) not in known or node.attrs.get("allowzero", 0):
        return 0
    dims, shape = list(known[id(target)]), node.inputs[0].shape
    unknown = [k for k, d in enumerate(dims) if not isinstance(d, int)]
    if len(unknown) != 1 or 0 in dims:
        if unknown:
            model.refuse(node, "more than one dimension of its target is unknown, or one is copied")
        return 0
    if -1 in dims:
        batch = dims[unknown[0]]
        if not batch or shape is None or [d for d in shape if not _is_size(d)] != [batch]:
            model.refuse(node, "the unknown dimension of its target is not the one of its input, and another is -1")
            return 0
        rest = int(np.prod([d for d in shape if d != batch]))
        others = int(np.prod([d for d in dims if isinstance(d, int) and d > 0]))
        if rest % others:
            return 0
        dims[dims.index(-1)] = rest // others
    dims[unknown[0]] = -1
    graph = model.graph
    graph.set_input(node, 1, graph.constant(target.name, np.array(dims, np.int64)))
    return 1
