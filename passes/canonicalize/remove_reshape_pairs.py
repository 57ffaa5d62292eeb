"""remove-reshape-pairs"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Graph, Node, input_at, value
from onnxq.model import Model
from onnxq.passmanager import Pass

RESHAPING = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class RemoveReshapePairs(Pass):
    """Reshape once instead of twice, and not at all to the shape that the tensor has.

    Given:   %1 = Flatten(%0);  %2 = Reshape(%1, [-1, 64]);  %3 = Relu(%2)
    Result:  %2 = Reshape(%0, [-1, 64]);  %3 = Relu(%2)
    Given:   (%0: float32[1, 64])  %1 = Reshape(%0, [1, 64])
    Result:  %0
    Refused: the first one's result is used elsewhere or is a graph output; the second copies dimensions (0) of the first.
    """

    name: ClassVar[str] = "remove-reshape-pairs"

    def apply(self, model: Model) -> int:
        graph, changed = model.graph, 0
        for node in graph.find("Reshape"):
            target = value(input_at(node, 1))
            if target is None:
                continue
            if _keeps_shape(node) and graph.bypass(node):
                changed += 1
                continue
            first = graph.producer(node.inputs[0])
            if first is None or first.op not in RESHAPING or first.domain:
                continue
            if 0 in target:
                model.refuse(node, "it copies a dimension of the tensor between")
            elif graph.sole_consumer(first.outputs[0]) is not node:
                model.refuse(node, "the tensor between is used elsewhere")
            else:
                changed += _join(graph, first, node)
        if changed:
            graph.cleanup()
        return changed


def _keeps_shape(node: Node) -> bool:
    source, result = node.inputs[0].shape, node.outputs[0].shape
    if source is None or result is None or any(d is None for d in source):
        return False
    return list(source) == list(result) and sum(not isinstance(d, int) for d in source) <= 1


def _join(graph: Graph, first: Node, second: Node) -> int:
    graph.set_input(second, 0, first.inputs[0])
    return 1
