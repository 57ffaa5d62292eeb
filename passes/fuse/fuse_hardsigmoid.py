"""fuse-hardsigmoid"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Node, clip_bounds, is_float32
from onnxq.model import Model
from onnxq.passmanager import Pass
from onnxq.pattern import Either, Input, Number, Op, match, substitute

X = Input("x")
_SHIFTED = Op("Add", X, Number("shift"))
_RATIO = Either(Op("Div", _SHIFTED, Number("steps")), Op("Mul", _SHIFTED, Number("slope")))
_SLOPED = Op("Add", Either(Op("Mul", X, Number("slope")), Op("Div", X, Number("steps"))), Number("shift"))


def _clip(name: str) -> tuple[Op, ...]:
    """A Clip of what is to be clipped, whatever bounds it has; the longer form first."""
    return Op("Clip", _SLOPED, name=name), Op("Clip", _SHIFTED, name=name)


SHIFTED_FIRST = Op("Clip", _RATIO, name="clip")
PATTERNS = (
    *(
        form
        for clip in _clip("clip")
        for form in (Op("Div", clip, Number("divisor")), Op("Mul", clip, Number("factor")), clip)
    ),
    SHIFTED_FIRST,
)


@dataclass(frozen=True)
class FuseHardsigmoid(Pass):
    """Write a hard sigmoid that is spelled out in small ops as one node.

    Given:   %y = Div(Clip(Add(%x, 3), 0, 6), 6), or Mul by 1 / 6; or Clip(Add(Mul(%x, 0.2), 0.5), 0, 1), or
             Clip(Div(Add(%x, 3), 6), 0, 1)
    Result:  %y = HardSigmoid(%x) {alpha=1/6, beta=0.5}
    Refused: the bounds are not 0 and the divisor (so that the result is not between 0 and 1); an inner result has another
             reader.
    """

    name: ClassVar[str] = "fuse-hardsigmoid"

    def apply(self, model: Model) -> int:
        graph, fused = model.graph, 0
        for root in graph.find("Div", "Mul", "Clip"):
            pattern, found = next(((p, f) for p in PATTERNS if (f := match(graph, root, p)) is not None), (None, None))
            if found is None or not is_float32(found.tensors["x"]):
                continue
            said = _slope_and_offset(found.numbers, found.nodes["clip"], shifted_first=pattern is SHIFTED_FIRST)
            if said is None:
                if root.op != "Clip":
                    model.refuse(root, "its bounds are not those of a hard sigmoid")
                continue
            if not found.is_closed(graph):
                model.refuse(root, "an inner result has another reader")
                continue
            alpha, beta = said
            substitute(graph, found, "HardSigmoid", [found.tensors["x"]], {"alpha": alpha, "beta": beta})
            fused += 1
        if fused:
            graph.cleanup()
        return fused


def _slope_and_offset(numbers: dict[str, float], clip: Node, *, shifted_first: bool) -> tuple[float, float] | None:
    """(alpha, beta) of max(0, min(1, alpha x + beta)); None where the formula is another."""
    low, high = clip_bounds(clip)
    scale = numbers.get("factor", 1 / numbers["divisor"] if numbers.get("divisor") else 1.0)
    if low != 0.0 or high is None or scale <= 0 or not np.isclose(high * scale, 1.0, rtol=1e-5):
        return None
    slope = numbers.get("slope", 1 / numbers["steps"] if numbers.get("steps") else 1.0)
    return slope * scale, numbers["shift"] * scale * (slope if shifted_first else 1.0)
