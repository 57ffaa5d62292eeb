"""fold-sub"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import is_float32, value
from onnxq.model import Model
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class FoldSub(Pass):
    """Write the Sub of a constant as an Add: integer kernels add and do not subtract.

    Given:   %1 = Sub(%0, c)
    Result:  %1 = Add(%0, -c)
    Refused: the subtrahend is computed, or is not float32.
    """

    name: ClassVar[str] = "fold-sub"

    def apply(self, model: Model) -> int:
        graph, folded = model.graph, 0
        for node in graph.find("Sub"):
            constant = value(node.inputs[1])
            if constant is None or not is_float32(node.inputs[1]):
                model.refuse(node, "what it subtracts is computed, or is not float32")
                continue
            graph.set_input(node, 1, graph.constant(f"{node.inputs[1].name}_negated", -constant))
            node.op = "Add"
            folded += 1
        return folded
