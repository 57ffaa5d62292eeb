"""fold-constants"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.errors import ModelError
from onnxq.graph import ONNX_DOMAINS, Constant, Graph, Node
from onnxq.model import Model
from onnxq.passmanager import Pass
from onnxq.runtime import evaluate

NEVER = frozenset(
    [
        "If",
        "Loop",
        "Scan",
        "SequenceMap",
        "RandomNormal",
        "RandomUniform",
        "RandomNormalLike",
        "RandomUniformLike",
        "Multinomial",
        "Bernoulli",
        "Dropout",  # remove-dropout tells whether it drops
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "Optional",
        "SequenceConstruct",
        "SequenceEmpty",
    ]
)


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute now what does not depend on the input.

    Given:   %1 = Constant() {value};  %2 = Add(%1, float32[3]);  %3 = Mul(%0, %2)
    Result:  %3 = Mul(%0, float32[3])
             in the bodies of control flow, too
    Refused: random ops, Q and DQ, control flow; the result is a graph output; the result has more than `largest` bytes
             and is larger than what it is computed from.
    """

    name: ClassVar[str] = "fold-constants"
    largest: int = 16_000_000

    def apply(self, model: Model) -> int:
        return sum(self._fold(model, graph) for graph in model.graph.scopes())

    def _fold(self, model: Model, graph: Graph) -> int:
        folded = self._constant_nodes(graph)
        known = {id(t) for t in graph.tensors().values() if isinstance(t, Constant)}
        ready: list[Node] = []
        for node in graph.nodes:
            if node.op in NEVER or node.bodies or node.domain not in ONNX_DOMAINS or not node.inputs:
                continue
            if all(t.is_empty() or id(t) in known for t in node.inputs) and not any(map(graph.is_output, node.outputs)):
                ready.append(node)
                known.update(id(t) for t in node.outputs)
        folded += self._evaluate(model, graph, ready) if ready else 0
        if folded:
            graph.cleanup()
        return folded

    def _constant_nodes(self, graph: Graph) -> int:
        folded = 0
        for node in graph.find("Constant"):
            values = _attribute_values(node)
            if values is None or graph.is_output(node.outputs[0]):
                continue
            constant = Constant(graph.fresh(node.outputs[0].name), values)
            graph.replace_uses(node.outputs[0], constant)
            graph.remove(node)
            folded += 1
        return folded

    def _evaluate(self, model: Model, graph: Graph, ready: list[Node]) -> int:
        chosen = set(ready)
        outputs = [t for n in ready for t in n.outputs if t.name]
        outputs = [t for t in outputs if any(r not in chosen for r in t.outputs) or graph.is_captured(t)]
        part = graph.extract(ready, outputs)
        try:
            values = evaluate(part)
        except ModelError as error:
            model.refusals.append((ready[0].name, str(error)))
            return 0
        spent = sum(t.nbytes for n in ready for t in n.inputs if isinstance(t, Constant))
        folded = 0
        for tensor in outputs:
            array = values[tensor.name]
            if not isinstance(array, np.ndarray) or array.dtype == object or array.nbytes > max(self.largest, spent):
                model.refusals.append((tensor.name, "the folded value is too large, or no plain tensor"))
                continue
            graph.replace_uses(tensor, graph.constant(tensor.name, array))
            folded += 1
        return folded


def _attribute_values(node: Node) -> np.ndarray | None:
    """The value of a Constant node; None for strings and sparse tensors."""
    for key, dtype in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        if key in node.attrs:
            return np.array(node.attrs[key], dtype)
    tensor = node.attrs.get("value")
    if tensor is None or isinstance(tensor.dtype, int):
        return None
    return np.asarray(tensor.values)
