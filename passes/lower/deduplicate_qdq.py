"""deduplicate-qdq"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Node, value
from onnxq.model import Model
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class DeduplicateQdq(Pass):
    """Quantize, and dequantize, a tensor once where several nodes do it with the same parameters.

    Given:   %1 = QuantizeLinear(%0, s, z);  %2 = QuantizeLinear(%0, s, z)
    Result:  %1 = QuantizeLinear(%0, s, z)                       read by the readers of both
    Refused: the parameters differ; the second one's result is a graph output.
    """

    name: ClassVar[str] = "deduplicate-qdq"

    def apply(self, model: Model) -> int:
        graph, removed = model.graph, 0
        first: dict[tuple, Node] = {}
        for node in list(graph.nodes):
            if node.op not in ("QuantizeLinear", "DequantizeLinear"):
                continue
            key = _key(node)
            if key is None:
                continue
            twin = first.setdefault(key, node)
            if twin is node:
                continue
            if graph.is_output(node.outputs[0]):
                model.refuse(node, "its result is a graph output")
                continue
            graph.replace_uses(node.outputs[0], twin.outputs[0])
            graph.remove(node)
            removed += 1
        if removed:
            graph.cleanup()
        return removed


def _key(node: Node) -> tuple | None:
    """What two nodes that compute the same agree in; None where a parameter is computed."""
    parameters = [value(t) for t in node.inputs[1:]]
    if any(p is None for p in parameters):
        return None
    said = tuple((p.dtype.str, p.shape, p.tobytes()) for p in map(np.asarray, parameters))
    return node.op, node.domain or "", id(node.inputs[0]), said, tuple(sorted(node.attrs.items()))
