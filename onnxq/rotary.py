"""Rotary position embeddings as exporters write them out: recognised by what becomes of each column."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from onnxq.columns import Column, Columns
from onnxq.graph import ONNX_DOMAINS, Graph, Node, Tensor, Variable, is_float32

BETWEEN = ("Add", "Sub", "Mul", "Neg", "Concat", "Slice", "Gather", "Split", "Unsqueeze", "Squeeze", "Reshape", "Flatten")
OF_SHAPES = ("Shape", "Gather", "Slice", "Concat", "Unsqueeze", "Squeeze", "Cast")


@dataclass(frozen=True)
class Table:
    """The cosines or sines: columns of the last `axes` axes of a tensor, one for each pair; its rows are positions."""

    tensor: Tensor
    axes: int
    width: int  # columns in all
    columns: tuple[int, ...]  # those to read

    @property
    def lead(self) -> list[Any]:
        """Its length along each axis but the columns': batch, then heads and positions in the order of x."""
        shape = list(self.tensor.shape[: len(self.tensor.shape) - self.axes])
        return [1] * (3 - len(shape)) + shape


@dataclass(frozen=True)
class Rotation:
    """y[a] = x[a] * cos - x[b] * sin and y[b] = x[b] * cos + x[a] * sin, for pairs (a, b) of the columns of x."""

    root: Node
    x: Variable
    inner: frozenset[Node]
    interleaved: bool  # pairs (2k, 2k + 1); otherwise (k, k + h)
    cos: Table
    sin: Table

    def is_closed(self, graph: Graph) -> bool:
        """Whether nothing outside reads an inner result, but for its shape to use it inside again."""
        inner = self.inner - {self.root}
        return not any(graph.is_captured(t) or not _ends_inside(graph, t, self.inner) for n in inner for t in n.outputs)

    @property
    def length_first(self) -> bool | None:
        """Whether x is (batch, length, heads, 2h) and not (batch, heads, length, 2h); None where the tables fit neither."""
        said = {self._length_first(table) for table in (self.cos, self.sin)}
        return said.pop() if len(said) == 1 else None

    def _length_first(self, table: Table) -> bool | None:
        batch, first, second = table.lead
        own_batch, own_first, own_second = self.x.shape[:3]
        if batch not in (1, own_batch) and isinstance(batch, int) and isinstance(own_batch, int):
            return None
        if first == 1 and (second == own_second or not isinstance(second, int)):
            return False
        if second == 1 and (first == own_first or not isinstance(first, int)):
            return True
        return None


def find(graph: Graph, root: Node) -> Rotation | None:
    """The rotation of the last axis of a (batch, ., ., 2h) float32 tensor that ends in `root`."""
    y = root.outputs[0] if root.outputs else None
    if y is None or root.in_body or y.shape is None or len(y.shape) != 4 or not is_float32(y):
        return None
    width = y.shape[-1]
    if not isinstance(width, int) or width % 2 or not _turns(graph, root):
        return None
    for x in _sources(graph, root):
        if x.shape is None or len(x.shape) != 4 or x.shape[-1] != width:
            continue
        columns = Columns(graph, x)
        made = columns.of(y)
        found = None if made is None else _rotation(graph, root, columns, list(made.flat))
        if found is not None:
            return found
    return None


def _turns(graph: Graph, root: Node) -> bool:
    """A quick look: an Add of products, or the columns joined of which one is a Sub."""
    if root.op == "Add":
        return all((p := graph.producer(t)) is not None and p.op == "Mul" for t in root.inputs)
    join = root if root.op == "Concat" else graph.producer(root.inputs[0])
    if join is None or join.op != "Concat" or len(join.inputs) != 2:
        return False
    first = graph.producer(join.inputs[0])
    if first is not None and first.op == "Unsqueeze":
        first = graph.producer(first.inputs[0])
    return first is not None and first.op == "Sub"


def _sources(graph: Graph, root: Node) -> Iterator[Variable]:
    """The tensors that the root is made of by the ops that a rotation is written in, nearest first."""
    queue, seen = [root], {root}
    for node in queue:
        for tensor in node.inputs[: None if node.op in ("Add", "Sub", "Mul", "Concat") else 1]:
            if isinstance(tensor, Variable):
                yield tensor
            producer = graph.producer(tensor)
            if producer is None or producer in seen or producer.op not in BETWEEN or producer.domain not in ONNX_DOMAINS:
                continue
            seen.add(producer)
            queue.append(producer)


def _rotation(graph: Graph, root: Node, columns: Columns, made: list[Column]) -> Rotation | None:
    """The rotation that columns y[j] = x[a] * cos[a'] -+ x[b] * sin[a'] are, in pairs by halves or by neighbours."""
    width, own = len(made), columns.of_x()
    for interleaved in (False, True):
        firsts = range(0, width, 2) if interleaved else range(width // 2)
        step = 1 if interleaved else width // 2
        cos, sin = [], []
        for a in firsts:
            b = a + step
            terms = [_factors(made[a], own[a], 1), _factors(made[b], own[b], 1)]
            turns = [_factors(made[a], own[b], -1), _factors(made[b], own[a], 1)]
            if len(made[a]) != 2 or None in terms + turns or terms[0] != terms[1] or turns[0] != turns[1]:
                break
            cos.append(terms[0])
            sin.append(turns[0])
        else:
            tables = [_table(columns, factors) for factors in (cos, sin)]
            if None not in tables:
                return Rotation(root, columns.x, _between(graph, root, columns.x), interleaved, *tables)  # type: ignore[arg-type]
    return None


def _factors(column: Column, own: Any, sign: int) -> frozenset[Any] | None:
    """What x's column `own` is multiplied by in a sum, if once and with this sign."""
    found = [factors for s, factors in column if own in factors and s == sign]
    return found[0] - {own} if len(found) == 1 else None


def _table(columns: Columns, factors: list[Any]) -> Table | None:
    """The one tensor that holds these products in its columns."""
    places = [columns.made[f] for f in factors if f in columns.made]
    if len(places) != len(factors) or len({(id(p.tensor), p.axes) for p in places}) != 1:
        return None
    first = places[0]
    return Table(first.tensor, first.axes, first.columns, tuple(p.column for p in places))


def _between(graph: Graph, root: Node, x: Variable) -> frozenset[Node]:
    """The nodes on a way from x to the root."""
    on_way: dict[Node, bool] = {}

    def leads_to_x(node: Node) -> bool:
        if node not in on_way:
            on_way[node] = False
            producers = [graph.producer(t) for t in node.inputs if t is not x]
            reached = [p is not None and p.op in BETWEEN and leads_to_x(p) for p in producers]
            on_way[node] = any(t is x for t in node.inputs) or any(reached)
        return on_way[node]

    leads_to_x(root)
    return frozenset(n for n, found in on_way.items() if found)


def _ends_inside(graph: Graph, tensor: Tensor, members: frozenset[Node]) -> bool:
    """Whether all that is computed from a tensor, but for shapes that go back into the pattern, is in the pattern."""
    return not graph.is_output(tensor) and all(
        reader in members
        or (reader is not None and reader.op in OF_SHAPES and all(_ends_inside(graph, t, members) for t in reader.outputs))
        for reader, _ in graph.readers(tensor)
    )
