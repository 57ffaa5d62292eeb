"""Patterns of small ops: how exporters write out what the specification has one op for.

A pattern is a tree that is matched from its last node backwards. Inputs of one name must be one tensor; Add, Mul, Max and
Min take their inputs in either order, and a Product its factors in any. A match counts only when nothing outside it reads
an inner result. An input x has the rank of the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

import numpy as np

from onnxq.graph import ONNX_DOMAINS, Constant, Graph, Node, Tensor, Variable, value

COMMUTATIVE = ("Add", "Mul", "Max", "Min")
TOLERANCE = 1e-4  # relative, of the numbers in a formula: exporters round them to float32, some to five digits


@dataclass(frozen=True)
class Input:
    """Any tensor that is not constant."""

    name: str


@dataclass(frozen=True)
class Array:
    """A constant of any shape."""

    name: str


@dataclass(frozen=True)
class Number:
    """A constant of one element: a given one, or any, under a name."""

    wanted: float | str


@dataclass(frozen=True)
class Either:
    """The first of several patterns that matches."""

    choices: tuple[Pattern, ...]

    def __init__(self, *choices: Pattern) -> None:
        object.__setattr__(self, "choices", choices)


@dataclass(frozen=True)
class Op:
    """The result of a node of an ONNX op type. Inputs of the node beyond the pattern's must be constant (axes, bounds)."""

    type: str
    inputs: tuple[Pattern, ...]
    name: str = ""

    def __init__(self, type: str, *inputs: Pattern, name: str = "") -> None:  # noqa: A002
        object.__setattr__(self, "type", type)
        object.__setattr__(self, "inputs", inputs)
        object.__setattr__(self, "name", name)


@dataclass(frozen=True)
class Product:
    """The product of several factors, multiplied in whatever order by Mul nodes."""

    factors: tuple[Pattern, ...]

    def __init__(self, *factors: Pattern) -> None:
        object.__setattr__(self, "factors", factors)


Pattern = Input | Array | Number | Either | Op | Product


@dataclass(frozen=True)
class Match:
    """What a pattern's names stand for; `inner` are all nodes but the root."""

    root: Node
    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    inner: tuple[Node, ...] = ()

    def array(self, name: str) -> np.ndarray:
        return np.asarray(value(self.tensors[name]))

    def is_closed(self, graph: Graph) -> bool:
        """Whether only nodes of the match read its inner results."""
        members = {self.root, *self.inner}
        for node in self.inner:
            for tensor in node.outputs:
                if graph.is_captured(tensor) or any(reader not in members for reader, _ in graph.readers(tensor)):
                    return False
        return True


def match(graph: Graph, root: Node, pattern: Pattern) -> Match | None:
    """How the pattern matches with `root` as its last node; None where it does not."""
    if isinstance(pattern, Either):
        return next((found for c in pattern.choices if (found := match(graph, root, c)) is not None), None)
    if root.domain not in ONNX_DOMAINS or not root.outputs:
        return None
    found = next(_tensor(graph, pattern, root.outputs[0], Match(root)), None)
    x = None if found is None else found.tensors.get("x")
    if x is not None and None not in (x.shape, root.outputs[0].shape) and len(x.shape) != len(root.outputs[0].shape):
        return None  # a number of more dimensions than x
    return found and replace(found, inner=tuple(dict.fromkeys(n for n in found.inner if n is not root)))


def substitute(
    graph: Graph, found: Match, op: str, inputs: list[Tensor], attrs: dict[str, Any] | None = None, domain: str = ""
) -> Node:
    """Let one node make what the match made; what made it so far goes with the next cleanup."""
    result, name = found.root.outputs[0], found.root.name
    graph.remove(found.root)
    return graph.insert(op, inputs, [result], attrs, name=f"{name}_{op}", domain=domain)


def reduced_axes(node: Node) -> tuple[int, ...] | None:
    """The axes of a Reduce op, from its attribute or its input (opset 18; ReduceSum 13); None where not constant."""
    if len(node.inputs) > 1 and node.inputs[1].name:
        given = value(node.inputs[1])
        return None if given is None else tuple(int(a) for a in np.asarray(given).reshape(-1))
    axes = node.attrs.get("axes")
    return None if axes is None else tuple(int(a) for a in axes)


def keeps_dimensions(node: Node) -> bool:
    return bool(node.attrs.get("keepdims", 1))


def _tensor(graph: Graph, pattern: Pattern, tensor: Tensor, state: Match) -> Iterator[Match]:
    match pattern:
        case Input(name):
            if isinstance(tensor, Variable) and state.tensors.get(name, tensor) is tensor:
                yield replace(state, tensors={**state.tensors, name: tensor})
        case Array(name):
            if isinstance(tensor, Constant) and state.tensors.get(name, tensor) is tensor:
                yield replace(state, tensors={**state.tensors, name: tensor})
        case Number(wanted):
            yield from _number(wanted, tensor, state)
        case Either(choices):
            for choice in choices:
                yield from _tensor(graph, choice, tensor, state)
        case Product(factors):
            for leaves, nodes in _factorings(graph, tensor, len(factors)):
                multiplied = replace(state, inner=(*state.inner, *nodes))
                for order in permutations(leaves):
                    yield from _all(graph, factors, order, multiplied)
        case Op(type):
            node = graph.producer(tensor)
            if node is not None and not node.in_body and node.op == type and node.domain in ONNX_DOMAINS:
                yield from _node(graph, pattern, node, state)


def _number(wanted: float | str, tensor: Tensor, state: Match) -> Iterator[Match]:
    given = value(tensor)
    if given is None or given.size != 1 or given.dtype.kind not in "fi":
        return
    number = float(given.reshape(-1)[0])
    if isinstance(wanted, str):
        if state.numbers.get(wanted, number) == number:
            yield replace(state, numbers={**state.numbers, wanted: number})
    elif abs(number - wanted) <= TOLERANCE * abs(wanted):
        yield state


def _node(graph: Graph, pattern: Op, node: Node, state: Match) -> Iterator[Match]:
    extra = node.inputs[len(pattern.inputs) :]
    if len(node.inputs) < len(pattern.inputs) or any(t.name and not isinstance(t, Constant) for t in extra):
        return
    if extra and node.op in COMMUTATIVE:
        return  # Max and Min of three
    if pattern.name and state.nodes.get(pattern.name, node) is not node:
        return
    nodes = {**state.nodes, pattern.name: node} if pattern.name else state.nodes
    state = replace(state, nodes=nodes, inner=(*state.inner, node))
    given = node.inputs[: len(pattern.inputs)]
    orders = permutations(given) if node.op in COMMUTATIVE else [tuple(given)]
    for order in orders:
        yield from _all(graph, pattern.inputs, order, state)


def _all(graph: Graph, parts: Sequence[Pattern], tensors: Sequence[Tensor], state: Match) -> Iterator[Match]:
    """Every way in which each tensor matches its part."""
    if not parts:
        yield state
        return
    for after in _tensor(graph, parts[0], tensors[0], state):
        yield from _all(graph, parts[1:], tensors[1:], after)


def _factorings(graph: Graph, tensor: Tensor, count: int) -> Iterator[tuple[tuple[Tensor, ...], tuple[Node, ...]]]:
    """The ways to see a tensor as the product of `count` tensors, with the Mul nodes that multiply them."""
    if count == 1:
        yield (tensor,), ()
        return
    node = graph.producer(tensor)
    if node is None or node.in_body or node.op != "Mul" or node.domain not in ONNX_DOMAINS:
        return
    for left in range(1, count):
        for leaves, nodes in _factorings(graph, node.inputs[0], left):
            for more_leaves, more_nodes in _factorings(graph, node.inputs[1], count - left):
                yield (*leaves, *more_leaves), (node, *nodes, *more_nodes)
