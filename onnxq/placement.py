"""Placement: which nodes are worth having in integers, so that the graph as a whole takes the least time.

Every node takes some time in float and some in integers, and every tensor that goes from one to the other takes some, once
however many read it. The cheapest choice is a minimum cut of a graph with a node for each choice; it is found exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnxq.costs import Prices
from onnxq.graph import Graph, Node, Variable, is_float32

TOTAL = 1 << 28  # flow units for all costs together: the solver takes whole numbers of 32 bits
NEVER = 1 << 30
INTEGER, FLOAT = 0, 1  # the two ends of the cut


def cheapest(
    graph: Graph,
    planned: set[str],
    integer: Mapping[str, float],
    floats: Mapping[str, float],
    shapes: Mapping[str, tuple[int, ...]],
    prices: Prices,
    absorbed: frozenset[str],
) -> set[str]:
    """Those of the planned nodes that are to stay in integers.

    integer, floats: microseconds by node. shapes: of the tensors, for what they take to cross. absorbed: op types that
    vanish into the integer node before them.
    """
    atoms = _atoms(graph, planned, floats, absorbed)
    place = {atom: k + 2 for k, atom in enumerate(dict.fromkeys(atoms[n.name] for n in graph.nodes if n.name in planned))}
    edges: dict[tuple[int, int], float] = {}
    count = len(place) + 2

    def add(start: int, end: int, cost: float) -> None:
        if start != end and cost > 0:
            edges[start, end] = edges.get((start, end), 0.0) + cost

    for node in graph.nodes:
        at = place.get(atoms[node.name])
        if at is not None:
            add(at, FLOAT, integer.get(node.name, 0.0))
            add(INTEGER, at, floats.get(node.name, 0.0))
    for tensor in graph.tensors().values():
        if not isinstance(tensor, Variable) or not is_float32(tensor):
            continue
        maker = place.get(atoms[tensor.inputs[0].name], FLOAT) if tensor.inputs and not tensor.inputs[0].in_body else FLOAT
        readers = {FLOAT if n is None else place.get(atoms[n.name], FLOAT) for n, _ in graph.readers(tensor)} - {maker}
        shape = shapes.get(tensor.name)
        if not readers or shape is None:
            continue
        if maker != FLOAT:  # the maker in integers and some reader in float
            add(maker, count, prices.crossing(shape, into_integers=False))
            for reader in readers:
                add(count, reader, np.inf)
            count += 1
        inside = readers - {FLOAT}
        if inside:  # some reader in integers and the maker in float
            add(count, maker, prices.crossing(shape, into_integers=True))
            for reader in inside:
                add(reader, count, np.inf)
            count += 1
    kept = _source_side(edges, count)
    return {n.name for n in graph.nodes if n.name in planned and place[atoms[n.name]] in kept}


def _source_side(edges: Mapping[tuple[int, int], float], count: int) -> set[int]:
    """The nodes on the INTEGER side of a minimum cut."""
    from scipy.sparse import csr_matrix  # slow to import, and only placing on this machine needs it
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    starts, ends = np.array(list(edges)).T if edges else (np.empty(0, int), np.empty(0, int))
    costs = np.array(list(edges.values()))
    unit = max(costs[np.isfinite(costs)].sum(), 1e-9) / TOTAL
    capacity = np.where(np.isfinite(costs), np.rint(costs / unit), NEVER).astype(np.int32)
    network = csr_matrix((capacity, (starts, ends)), shape=(count, count))
    left = network - maximum_flow(network, INTEGER, FLOAT).flow
    left.data = (left.data > 0).astype(np.int32)
    left.eliminate_zeros()
    return set(breadth_first_order(left, INTEGER, return_predecessors=False).tolist())


def _atoms(graph: Graph, planned: set[str], floats: Mapping[str, float], absorbed: frozenset[str]) -> dict[str, str]:
    """Nodes that go together, by the name of one of them: what a kernel of either kind does at once."""
    group = {n.name: n.name for n in graph.nodes}

    def root(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    def tie(one: Node | None, other: Node | None) -> None:
        if one is not None and other is not None and other.name in group:
            group[root(one.name)] = root(other.name)

    for node in reversed(graph.nodes):
        maker = graph.producer(node.inputs[0]) if node.inputs else None
        if node.op in absorbed and node.name not in planned and maker is not None and maker.name in planned:
            tie(maker, node)
        if node.name in planned and node.name not in floats and node.outputs:
            tie(node, graph.sole_consumer(node.outputs[0]))  # a part of what that one's kernel does
    return {name: root(name) for name in group}
