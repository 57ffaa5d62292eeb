"""fold-div"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import is_float32, value
from onnxq.model import Model
from onnxq.passmanager import Pass

ROUNDING = ("Cast", "Ceil", "Floor", "Round")


@dataclass(frozen=True)
class FoldDiv(Pass):
    """Write the Div by a constant as a Mul: integer kernels multiply and do not divide.

    Given:   %1 = Div(%0, c)
    Result:  %1 = Mul(%0, 1 / c)
    Refused: the divisor is computed, or is not float32; 1 / c is not finite and normal; the quotient is rounded next, and c
             is no power of two.
    """

    name: ClassVar[str] = "fold-div"

    def apply(self, model: Model) -> int:
        graph, folded = model.graph, 0
        for node in graph.find("Div"):
            constant = value(node.inputs[1])
            if constant is None or not is_float32(node.inputs[1]):
                model.refuse(node, "what it divides by is computed, or is not float32")
                continue
            if any(reader.op == "Erf" for reader in node.outputs[0].outputs):
                model.refuse(node, "it is part of a Gelu, which the runtime knows by its Div")
                continue
            with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
                inverse = (1.0 / constant.astype(np.float64)).astype(np.float32)
            if not np.isfinite(inverse).all() or (np.abs(inverse) < np.finfo(np.float32).tiny).any():
                model.refuse(node, "the inverse of what it divides by is not finite and normal")
                continue
            exact = (np.abs(np.frexp(constant)[0]) == 0.5).all()
            if not exact and any(r.op in ROUNDING for r in node.outputs[0].outputs):
                model.refuse(node, "its result is rounded, where the last bit decides")
                continue
            graph.set_input(node, 1, graph.constant(f"{node.inputs[1].name}_inverse", inverse))
            node.op = "Mul"
            folded += 1
        return folded
