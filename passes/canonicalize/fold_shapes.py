"""fold-shapes"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Constant, Graph, Node, Tensor, input_at, value
from onnxq.model import Model
from onnxq.passmanager import Pass

Dims = list[int | None]
KEEPS = ("Cast", "Identity", "Unsqueeze", "Squeeze")
ARITHMETIC = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}


@dataclass(frozen=True)
class FoldShapes(Pass):
    """Compute shape arithmetic as far as the shapes are known, dimension by dimension.

    Given:   (%0: float32[N, 3, 8, 8])  %1 = Shape(%0);  %2 = Gather(%1, 1);  %3 = Use(%2)
    Result:  %3 = Use(3)
    Given:   %4 = Concat(N, -1);  %5 = Reshape(%0, %4)                        %0 of known size but for N
    Result:  %5 = Reshape(%0, [-1, 192])
    Refused: a dimension that is needed is unknown; more than one is unknown in a Reshape.
    """

    name: ClassVar[str] = "fold-shapes"

    def apply(self, model: Model) -> int:
        graph = model.graph
        known: dict[int, Dims] = {}
        folded = 0
        for node in graph.nodes:
            dims = _evaluate(node, known)
            if dims is None:
                continue
            known[id(node.outputs[0])] = dims
            result = node.outputs[0]
            if None in dims or graph.is_output(result) or not result.outputs:
                continue
            scalar = result.shape is not None and len(result.shape) == 0
            if result.shape is None or len(result.shape) > 1 or (scalar and len(dims) != 1):
                continue
            dtype = np.int64 if result.dtype is None or isinstance(result.dtype, int) else result.dtype
            values = np.array(dims, dtype).reshape(() if scalar else (-1,))
            graph.replace_uses(result, graph.constant(result.name, values))
            folded += 1
        folded += sum(_fold_reshape(graph, node, known) for node in graph.find("Reshape"))
        if folded:
            graph.cleanup()
        return folded


def _evaluate(node: Node, known: dict[int, Dims]) -> Dims | None:
    """The dimensions that the node's output holds, None where one is unknown; None for a node that is no arithmetic."""
    if node.op == "Shape":
        shape = node.inputs[0].shape
        if shape is None:
            return None
        dims: Dims = [int(d) if isinstance(d, (int, np.integer)) and d >= 0 else None for d in shape]
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
    n = max(len(a), len(b))
    a, b = a * n if len(a) == 1 else a, b * n if len(b) == 1 else b
    return [None if x is None or y is None else int(op(x, y)) for x, y in zip(a, b, strict=True)]


def _dims(tensor: Tensor, known: dict[int, Dims]) -> Dims | None:
    if id(tensor) in known:
        return known[id(tensor)]
    if isinstance(tensor, Constant) and not isinstance(tensor.dtype, int) and np.dtype(tensor.dtype).kind == "i":
        values = np.asarray(tensor.values)
        return [int(v) for v in values.reshape(-1)] if values.ndim <= 1 and values.size <= 16 else None
    return None


def _fold_reshape(graph: Graph, node: Node, known: dict[int, Dims]) -> int:
    """A target shape with one unknown dimension: that one becomes -1, and the -1 among the others is computed."""
    target = input_at(node, 1)
    if target is None or isinstance(target, Constant) or id(target) not in known or node.attrs.get("allowzero", 0):
        return 0
    dims = list(known[id(target)])
    shape = node.inputs[0].shape
    if dims.count(None) != 1 or 0 in dims:
        return 0
    if -1 in dims:
        unknown = [d for d in shape or [None, None] if not isinstance(d, (int, np.integer))]
        if shape is None or len(unknown) != 1 or dims.index(None) != 0 or isinstance(shape[0], (int, np.integer)):
            return 0  # the unknown must be the batch, in and out, for the rest to be computed without it
        rest = int(np.prod([int(d) for d in shape if isinstance(d, (int, np.integer))]))
        others = int(np.prod([d for d in dims if d is not None and d > 0]))
        if rest % others or not _same_batch(node, target, known):
            return 0
        dims[dims.index(-1)] = rest // others
    dims[dims.index(None)] = -1
    graph.set_input(node, 1, graph.constant(target.name, np.array(dims, np.int64)))
    return 1


def _same_batch(node: Node, target: Tensor, known: dict[int, Dims]) -> bool:
    """Whether the unknown first entry of the target comes from the first dimension of some tensor of the same symbol."""
    source = target.inputs[0] if target.inputs else None
    while source is not None and source.op in ("Concat", "Cast", "Unsqueeze", "Identity", "Gather", "Slice", "Squeeze"):
        tensor = source.inputs[0]
        source = tensor.inputs[0] if tensor.inputs else None
    if source is None or source.op != "Shape":
        return False
    origin, shape = source.inputs[0].shape, node.inputs[0].shape
    return bool(origin) and bool(shape) and isinstance(origin[0], str) and origin[0] == shape[0]
