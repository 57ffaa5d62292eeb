"""What the columns of a tensor are made of, where small ops move and multiply them: the last axes, followed symbolically.

Of y = Concat(Neg(Slice(x, 4:8)), Slice(x, 0:4)) along the last axis the columns are -x[4] ... -x[7], x[0] ... x[3], whatever
ops wrote it. The axes before the columns are the lead: an op that changes the lead makes another factor of the same column.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import numpy as np

from onnxq.graph import ONNX_DOMAINS, Constant, Graph, Node, Tensor, Variable, input_at, value

Term = tuple[int, frozenset[Hashable]]  # a sign, and factors: equal ones are equal columns
Column = tuple[Term, ...]  # a sum of terms
MOST_TERMS = 2
ELEMENTWISE = ("Cos", "Sin", "Cast")


class Place(NamedTuple):
    """One of the columns over the last `axes` axes of a tensor."""

    tensor: Tensor
    axes: int
    column: int
    columns: int  # in all


@dataclass
class Columns:
    """The columns of the tensors between x and a result, as sums of products; what these ops do not explain is a factor.

    `made` tells where a product stands among the columns of a tensor.
    """

    graph: Graph
    x: Variable
    made: dict[frozenset[Hashable], Place] = field(default_factory=dict)
    _known: dict[tuple[int, int], np.ndarray | None] = field(default_factory=dict)

    def of(self, tensor: Tensor, axes: int = 1) -> np.ndarray | None:
        """An array of Column over the tensor's last `axes` axes; None where their lengths are not known."""
        key = (id(tensor), axes)
        if key not in self._known:
            self._known[key] = self._of(tensor, axes)
            self._note(tensor, axes, self._known[key])
        return self._known[key]

    def _note(self, tensor: Tensor, axes: int, columns: np.ndarray | None) -> None:
        for k, column in enumerate(() if columns is None else columns.flat):
            if len(column) == 1 and column[0][0] > 0:
                self.made.setdefault(column[0][1], Place(tensor, axes, k, columns.size))  # type: ignore[union-attr]

    def _of(self, tensor: Tensor, axes: int) -> np.ndarray | None:
        if tensor.shape is None or len(tensor.shape) < axes:
            return None
        lead, last = _split(tensor.shape, axes)
        if isinstance(tensor, Constant):
            values = tensor.values.reshape(*lead, -1)
            return _factors(last, lambda k: (lead, values[..., k].tobytes()))
        node = None if tensor is self.x or not axes else self.graph.producer(tensor)
        plain = node is not None and not node.in_body and node.domain in ONNX_DOMAINS
        found = self._result(node, tensor, axes) if node is not None and plain else None
        if found is None and all(isinstance(d, int) for d in last):
            found = _factors(last, lambda k: (id(tensor), axes, k))
        return found

    def of_x(self) -> list[Hashable]:
        """The factors that stand for the columns of x."""
        found = self.of(self.x)
        return [] if found is None else [factor for column in found.flat for _, factors in column for factor in factors]

    def _result(self, node: Node, tensor: Tensor, axes: int) -> np.ndarray | None:
        """The columns of a node's result by those of its inputs; None where the op is none that moves or multiplies."""
        source = node.inputs[0]
        match node.op:
            case "Add" | "Sub" | "Mul":
                return self._combined(node, axes)
            case "Neg":
                return _each(self.of(source, axes), _negative)
            case "Concat":
                return self._concatenated(node, axes)
            case op if op in ELEMENTWISE:
                return _each(self.of(source, axes), lambda c: _factor(op, str(node.attrs), c))
        if source.shape is None:
            return None
        match node.op:
            case "Identity":
                return self.of(source, axes)
            case "Slice":
                return self._sliced(node, axes)
            case "Gather" | "GatherND":
                return self._gathered(node, axes)
            case "Split":
                return self._split(node, tensor, axes)
            case "Unsqueeze" | "Squeeze":
                return self._squeezed(node, axes)
            case "Reshape" | "Flatten":
                return self._reshaped(source, tensor, axes)
            case "Expand" | "Tile":
                return self._repeated(source, tensor, axes)
        return None

    def _combined(self, node: Node, axes: int) -> np.ndarray | None:
        left, right = (self.of(t, min(axes, len(t.shape or ()))) for t in node.inputs)
        if left is None or right is None:
            return None
        try:
            left, right = np.broadcast_arrays(left, right)
        except ValueError:
            return None

        def one(a: Column, b: Column) -> Column:
            if node.op == "Mul":
                return tuple((s * t, f | g) for s, f in a for t, g in b)
            return (*a, *(b if node.op == "Add" else _negative(b)))

        pairs = list(zip(left.flat, right.flat, strict=True))
        if node.op == "Mul" and any(f & g for a, b in pairs for _, f in a for _, g in b):
            return None  # a power, which a set of factors does not hold
        columns = _objects([one(a, b) for a, b in pairs], left.shape)
        return columns if all(len(c) <= MOST_TERMS for c in columns.flat) else None

    def _concatenated(self, node: Node, axes: int) -> np.ndarray | None:
        parts = [self.of(t, axes) for t in node.inputs]
        axis = _from_end(node.attrs["axis"], node.inputs[0], axes)
        if axis is None or axis >= 0 or any(p is None for p in parts):
            return None
        return np.concatenate(parts, axis)  # type: ignore[arg-type]

    def _sliced(self, node: Node, axes: int) -> np.ndarray | None:
        source, bounds = node.inputs[0], [input_at(node, k) for k in range(1, 5)]
        inner, given = self.of(source, axes), value(bounds[2])
        if inner is None or given is None or len(node.inputs) < 3:
            return None
        places = [_from_end(int(a), source, axes) for a in given]
        if all(p is not None and p >= 0 for p in places):
            return _each(inner, lambda c: _factor("Slice", tuple(_identity(t) for t in bounds), c))
        starts, ends, steps = (
            value(bounds[0]),
            value(bounds[1]),
            np.ones(len(places)) if bounds[3] is None else value(bounds[3]),
        )
        if starts is None or ends is None or steps is None or any(p is None or p >= 0 for p in places) or any(steps < 1):
            return None
        for place, start, end, step in zip(places, starts, ends, steps, strict=True):
            assert place is not None
            inner = np.take(inner, range(inner.shape[place])[int(start) : int(end) : int(step)], place)
        return inner

    def _gathered(self, node: Node, axes: int) -> np.ndarray | None:
        source, indices = node.inputs
        rank, picks = len(source.shape), value(indices)
        if node.op == "GatherND":
            rows = not node.attrs.get("batch_dims", 0) and indices.shape is not None and indices.shape[-1] == 1
            rows = rows and rank > axes
        else:
            rows = node.attrs.get("axis", 0) % rank < rank - axes and (indices.shape is not None and len(indices.shape) > 0)
        if rows:
            return _each(self.of(source, axes), lambda c: _factor(node.op, str(node.attrs), _identity(indices), c))
        if node.op == "GatherND" or picks is None:
            return None
        inner = self.of(source, axes + 1 - picks.ndim)
        axis = node.attrs.get("axis", 0) % rank - rank
        return None if inner is None or axis < -inner.ndim else np.take(inner, picks, axis)

    def _split(self, node: Node, tensor: Tensor, axes: int) -> np.ndarray | None:
        source, sizes = node.inputs[0], [t.shape for t in node.outputs]
        inner, axis = self.of(source, axes), _from_end(node.attrs.get("axis", 0), source, axes)
        if inner is None or axis is None or axis >= 0 or any(s is None or not isinstance(s[axis], int) for s in sizes):
            return None
        ends = np.cumsum([s[axis] for s in sizes])
        return np.split(inner, ends[:-1], axis)[node.outputs.index(tensor)] if ends[-1] == inner.shape[axis] else None

    def _squeezed(self, node: Node, axes: int) -> np.ndarray | None:
        """Unsqueeze and Squeeze: by which of the wider tensor's axes of length 1 are among its last ones."""
        source, adds = node.inputs[0], node.op == "Unsqueeze"
        given = value(input_at(node, 1)) if len(node.inputs) > 1 else node.attrs.get("axes")
        if given is None:
            return None
        rank = len(source.shape) + len(given) * adds
        ones = {int(a) % rank - rank for a in given}
        wide = axes  # column axes of the wider tensor
        if not adds:
            kept = [a for a in range(-1, -rank - 1, -1) if a not in ones]
            wide = -kept[axes - 1]
        inside = tuple(a for a in ones if a >= -wide)
        columns = self.of(source, wide - len(inside) if adds else wide)
        if columns is None:
            return None
        columns = np.expand_dims(columns, inside) if adds else np.squeeze(columns, inside)
        outside = tuple(sorted(ones.difference(inside)))
        return _each(columns, lambda c: _factor(node.op, outside, c)) if outside else columns

    def _reshaped(self, source: Tensor, tensor: Tensor, axes: int) -> np.ndarray | None:
        """Columns as many as before keep their order, and so does the lead."""
        lead, last = _split(tensor.shape, axes)
        if not all(isinstance(d, int) for d in last):
            return None
        for count in range(1, len(source.shape) + 1):
            before, columns = _split(source.shape, count)
            if not all(isinstance(d, int) for d in columns) or prod(columns) > prod(last):
                return None
            if prod(columns) == prod(last):
                inner = self.of(source, count)
                break
        else:
            return None
        if inner is None:
            return None
        differs = len(before) != len(lead) or any(
            isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(before, lead, strict=True)
        )
        inner = inner.reshape(last)
        return _each(inner, lambda c: _factor("Reshape", lead, c)) if differs else inner

    def _repeated(self, source: Tensor, tensor: Tensor, axes: int) -> np.ndarray | None:
        lead, last = _split(tensor.shape, axes)
        inner = self.of(source, min(axes, len(source.shape)))
        if inner is None or not all(d in (n, n) or n == 1 for d, n in zip(last[::-1], inner.shape[::-1], strict=False)):
            return None
        columns = np.broadcast_to(inner, last)
        same = _split(source.shape, axes)[0] == lead and None not in lead
        return columns if same else _each(columns, lambda c: _factor("Expand", lead, c))


def _split(shape: Any, axes: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    cut = len(shape) - axes
    return tuple(shape[:cut]), tuple(shape[cut:])


def _from_end(axis: int, tensor: Tensor, axes: int) -> int | None:
    """A column axis from the end (-1 the last); a number from 0 for one of the lead; None where the rank is unknown."""
    if tensor.shape is None:
        return axis if -axes <= axis < 0 else None
    axis %= len(tensor.shape)
    from_end = axis - len(tensor.shape)
    return from_end if from_end >= -axes else axis


def _factor(*parts: Hashable) -> Column:
    return ((1, frozenset([parts])),)


def _factors(shape: tuple[int, ...], name: Callable[[int], Hashable]) -> np.ndarray:
    return _objects([_factor(name(k)) for k in range(prod(shape))], shape)


def _negative(column: Column) -> Column:
    return tuple((-s, f) for s, f in column)


def _identity(tensor: Tensor | None) -> Hashable:
    given = value(tensor)
    return id(tensor) if given is None else given.tobytes()


def _each(columns: np.ndarray | None, change: Callable[[Column], Column]) -> np.ndarray | None:
    return None if columns is None else _objects([change(c) for c in columns.flat], columns.shape)


def _objects(items: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    made = np.empty(len(items), object)
    for k, item in enumerate(items):  # numpy would see rows in a list of tuples
        made[k] = item
    return made.reshape(shape)
