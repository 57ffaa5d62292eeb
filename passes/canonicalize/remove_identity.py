"""remove-identity"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.model import Model
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class RemoveIdentity(Pass):
    """Remove Identity.

    Given:   %1 = Identity(%0);  %2 = Relu(%1)
    Result:  %2 = Relu(%0)
    Refused: both its ends are public: a graph input, constant or graph output that becomes a graph output.
    """

    name: ClassVar[str] = "remove-identity"

    def apply(self, model: Model) -> int:
        removed = 0
        for node in model.graph.find("Identity"):
            if model.graph.bypass(node):
                removed += 1
            else:
                model.refuse(node, "both its ends are public")
        return removed
