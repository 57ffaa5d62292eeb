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
    Refused: the first one's result is used elsewhere or is a graph output; the second copies dimensions (0) of the first;
             it keeps the shape and both its ends are public.
    """

    name: ClassVar[str] = "remove-reshape-pairs"

    def apply(self, model: Model) -> int:
        graph, changed = model.graph, 0
        for node in graph.find("Reshape"):
            target = value(input_at(node, 1))
            if target is None:
                continue
            if _keeps_shape(node):
                if graph.bypass(node):
                    changed += 1
                    continue
                model.refuse(node, "it keeps the shape and both its ends are public")
            while (first := _reshaping(graph, node)) is not None:
                if 0 in target:
                    model.refuse(node, "it copies a dimension of the tensor between")
                    break
                if graph.sole_consumer(first.outputs[0]) is not node:
                    model.refuse(node, "the tensor between is used elsewhere")
                    break
                source = first.inputs[0]
                graph.remove(first)
                graph.set_input(node, 0, source)
                changed += 1
        if changed:
            graph.cleanup()
        return changed


def _keeps_shape(node: Node) -> bool:
    source, result = node.inputs[0].shape, node.outputs[0].shape
    if source is None or result is None or any(d is None for d in source):
        return False
    return list(source) == list(result) and sum(not isinstance(d, int) for d in source) <= 1


def _reshaping(graph: Graph, node: Node) -> Node | None:
    """The node that makes the input, where it only gives another shape."""
    first = graph.producer(node.inputs[0])
    return first if first is not None and first.op in RESHAPING and not first.domain else None
