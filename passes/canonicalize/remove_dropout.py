"""remove-dropout"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import input_at, value
from onnxq.model import Model
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class RemoveDropout(Pass):
    """Remove Dropout of inference.

    Given:   %1 = Dropout(%0);  %2 = Relu(%1)
    Result:  %2 = Relu(%0)
    Refused: its mask is used; training_mode is set or computed; both its ends are public.
    """

    name: ClassVar[str] = "remove-dropout"

    def apply(self, model: Model) -> int:
        graph, removed = model.graph, 0
        for node in graph.find("Dropout"):
            training = input_at(node, 2)
            mask = node.outputs[1] if len(node.outputs) > 1 else None
            if training is not None and (value(training) is None or bool(value(training))):
                model.refuse(node, "it drops: training_mode is set or computed")
            elif mask is not None and (graph.readers(mask) or graph.is_captured(mask)):
                model.refuse(node, "its mask is used")
            elif graph.bypass(node):
                removed += 1
            else:
                model.refuse(node, "both its ends are public")
        return removed
