"""fuse-rotary"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxq.graph import Constant, Graph, Tensor, Variable
from onnxq.model import Model
from onnxq.passmanager import Pass
from onnxq.rotary import Rotation, Table, find

ROTARY_OPSET = 23
CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class FuseRotary(Pass):
    """Write a rotary position embedding as one op.

    Given:   %y = Add(Mul(%x, %cos), Mul(Concat(Neg(Slice(%x, h:)), Slice(%x, :h)), %sin)), of (batch, heads, length, 2h) or
             (batch, length, heads, 2h); or any ops that turn the columns k and k + h, or 2k and 2k + 1, of %x by angles that
             do not depend on the head: followed by what becomes of each column (onnxq/columns.py), not by the ops' order
    Result:  opset 23: %y = RotaryEmbedding(%x, %cos, %sin) {interleaved}, tables (batch, length, h)
             before, where the target runs it: %y = com.microsoft.RotaryEmbedding(%x, %positions, %cos, %sin)
    Refused: an inner result has another reader; the tables differ by head; the number of heads is not known; the target
             has no operator for it.

    Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv 2104.09864.
    """

    name: ClassVar[str] = "fuse-rotary"

    def apply(self, model: Model) -> int:
        graph, fused, writer = model.graph, 0, _Writer(model.graph)
        for root in reversed(graph.find("Add", "Concat", "Reshape", "Flatten")):  # the whole before its part
            found = find(graph, root)
            if found is None:
                continue
            refusal = _refusal(model, found)
            if refusal is not None:
                model.refuse(root, refusal)
                continue
            writer.write(found)
            fused += 1
        graph.cleanup()
        return fused


def _refusal(model: Model, found: Rotation) -> str | None:
    graph = model.graph
    if graph.opset < ROTARY_OPSET and CONTRIB not in model.target.domains:
        return "the target has no operator for it"
    if not found.is_closed(graph):
        return "an inner result has another reader"
    if found.length_first is None:
        return "its tables differ by head, or have another length"
    if found.length_first and not isinstance(found.x.shape[2], int):
        return "the number of heads is not known"
    return None


class _Writer:
    """Writes the operators; tables and positions that embeddings share are made once."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.made: dict[Any, Tensor] = {}

    def write(self, found: Rotation) -> None:
        graph, x, result, standard = self.graph, found.x, found.root.outputs[0], self.graph.opset >= ROTARY_OPSET
        attrs: dict[str, Any] = {"interleaved": int(found.interleaved)}
        inputs = [self._by_sample(found.cos, x), self._by_sample(found.sin, x)] if standard else self._by_row(found)
        graph.remove(found.root)
        length_first = found.length_first
        if length_first:  # the operator takes it as (batch, length, heads * 2h)
            heads, width = x.shape[2:]
            shape = [*x.shape[:2], heads * width]
            turned = graph.variable(f"{result.name}_turned", np.float32, shape)
            x = self._op("Reshape", x, [0, 0, heads * width], shape=shape)
            graph.insert("Reshape", [turned, self._numbers([0, 0, heads, width])], [result])
            if standard:
                attrs["num_heads"] = heads
            result = turned
        domain = "" if standard else CONTRIB
        inputs = [x, *inputs]
        graph.insert("RotaryEmbedding", inputs, [result], attrs, name=f"{found.root.name}_RotaryEmbedding", domain=domain)

    def _by_row(self, found: Rotation) -> list[Tensor]:
        """Positions and tables of com.microsoft: (1,), the first of all samples, or (batch, length); (rows, h) twice."""
        if all(table.lead[0] == 1 for table in (found.cos, found.sin)):
            return [self._numbers([0]), *(self._columns(table, [-1]) for table in (found.cos, found.sin))]
        tables = [self._by_sample(table, found.x) for table in (found.cos, found.sin)]
        key = (id(tables[0]), "positions")
        if key not in self.made:
            lengths = self._op("Slice", self._op("Shape", tables[0]), [0], [2])
            count = self._op("ReduceProd", lengths, attrs={"keepdims": 0})
            zero, one = (self.graph.constant(f"rotary_{n}", np.array(n, np.int64)) for n in (0, 1))
            numbers = self._op("Range", zero, count, one)
            self.made[key] = self._op("Reshape", numbers, lengths)
        rows = [self._once("Reshape", t, [-1, len(found.cos.columns)]) for t in tables]
        return [self.made[key], *rows]

    def _by_sample(self, table: Table, x: Variable) -> Tensor:
        """(batch, length, h), repeated for the samples of x."""
        columns = self._columns(table, [1 if table.lead[0] == 1 else 0, -1])
        if isinstance(x.shape[0], int) and x.shape[0] == table.lead[0]:
            return columns
        batch = ("batch", x.shape[0] or id(x))
        if batch not in self.made:
            self.made[batch] = self._op(
                "Concat", self._op("Slice", self._op("Shape", x), [0], [1]), [1, 1], attrs={"axis": 0}
            )
        key = (id(columns), batch)
        if key not in self.made:
            self.made[key] = self._op("Expand", columns, self.made[batch])
        return self.made[key]

    def _columns(self, table: Table, lead: list[int]) -> Tensor:
        """(*lead, h)"""
        tensor, width, picks = table.tensor, table.width, table.columns
        key = (id(tensor), width, picks, tuple(lead))
        if key not in self.made:
            if isinstance(tensor, Constant):
                values = tensor.values.reshape(*(tensor.shape[0] if n == 0 else n for n in lead), width)
                self.made[key] = self.graph.constant(f"{tensor.name}_columns", values[..., list(picks)])
            else:
                flat = self._op("Reshape", tensor, [*lead, width])
                every = picks == tuple(range(width))
                self.made[key] = flat if every else self._op("Gather", flat, list(picks), attrs={"axis": len(lead)})
        return self.made[key]

    def _once(self, op: str, tensor: Tensor, numbers: Sequence[int]) -> Tensor:
        key = (op, id(tensor), tuple(numbers))
        if key not in self.made:
            self.made[key] = self._op(op, tensor, list(numbers))
        return self.made[key]

    def _op(self, op: str, *inputs: Tensor | list[int], attrs: dict[str, Any] | None = None, shape: Any = None) -> Tensor:
        """A new node's result. A list among the inputs becomes a constant."""
        given = [self._numbers(t) if isinstance(t, list) else t for t in inputs]
        base = next(t.name for t in given if isinstance(t, Variable))
        result = self.graph.variable(f"{base}_{op}", np.int64 if op == "Shape" else given[0].dtype, shape)
        self.graph.insert(op, given, [result], attrs)
        return result

    def _numbers(self, numbers: list[int]) -> Constant:
        return self.graph.constant("rotary_" + "_".join(str(abs(n)) for n in numbers[:4]), np.array(numbers, np.int64))
