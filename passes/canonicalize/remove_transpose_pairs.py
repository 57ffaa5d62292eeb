"""remove-transpose-pairs"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Node
from onnxq.model import Model
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class RemoveTransposePairs(Pass):
    """Transpose once instead of twice, and not at all where the two undo each other.

    Given:   %1 = Transpose(%0) {perm=[0, 2, 3, 1]};  %2 = Transpose(%1) {perm=[0, 3, 1, 2]};  %3 = Relu(%2)
    Result:  %3 = Relu(%0)
    Refused: a perm is not written out; nothing is left of the pair and both its ends are public.
    """

    name: ClassVar[str] = "remove-transpose-pairs"

    def apply(self, model: Model) -> int:
        graph, changed = model.graph, 0
        for node in graph.find("Transpose"):
            perm = _perm(node)
            if perm is None:
                model.refuse(node, "its perm is not written out")
                continue
            first = graph.producer(node.inputs[0])
            if first is not None and first.op == "Transpose" and not first.domain and (before := _perm(first)) is not None:
                perm = [before[k] for k in perm]
                node.attrs["perm"] = perm
                graph.set_input(node, 0, first.inputs[0])
                changed += 1
            if perm != list(range(len(perm))):
                continue
            if graph.bypass(node):
                changed += 1
            else:
                model.refuse(node, "nothing is left of it and both its ends are public")
        if changed:
            graph.cleanup()
        return changed


def _perm(node: Node) -> list[int] | None:
    perm = node.attrs.get("perm")
    return None if perm is None else [int(k) for k in perm]
