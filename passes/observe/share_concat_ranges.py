"""share-concat-ranges"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Constant, clip_bounds
from onnxq.model import Model, Observed
from onnxq.numerics import params_of_range
from onnxq.passmanager import Pass

Range = tuple[float, float]


@dataclass(frozen=True)
class ShareConcatRanges(Pass):
    """Give what a Concat joins, and its result, one range, so that the kernel copies bytes instead of rescaling them.

    Given:   %3 = Concat(%1, %2)      params: %1 over [0, 4], %2 over [0, 5], %3 over [0, 5]
    Result:  the graph unchanged; params: %1, %2 and %3 over [0, 5]
    Refused: the common range is more than `widest` times that of a part, which would lose too much of its resolution; it
             leaves what a Relu or Clip before a part lets through, which the runtime could then not drop.
    """

    name: ClassVar[str] = "share-concat-ranges"
    widest: float = 1.5

    def apply(self, model: Model) -> int:
        groups: dict[str, set[str]] = {}
        before = {name: (float(p.rmin), float(p.rmax)) for name, p in model.params.items() if p.scale.ndim == 0}
        allowed = _let_through(model)
        shared = 0
        for node in model.graph.find("Concat"):
            if node.name not in model.planned or any(isinstance(t, Constant) for t in node.inputs):
                continue
            roots = {model.root(t.name) for t in [*node.inputs, *node.outputs]}
            members = set().union(*(groups.get(r, {r}) for r in roots))
            if not all(m in before and isinstance(model.specs[m], Observed) for m in members):
                continue
            low, high = min(before[m][0] for m in members), max(before[m][1] for m in members)
            if any(high - low > self.widest * (before[m][1] - before[m][0]) for m in members):
                model.refuse(node, f"the common range is more than {self.widest:g} times that of a part")
            elif any(low < allowed[m][0] or high > allowed[m][1] for m in members if m in allowed):
                model.refuse(node, "the common range leaves what an activation before a part lets through")
            elif _share(model, members, low, high):
                groups |= dict.fromkeys(members, members)
                shared += 1
        return shared


def _let_through(model: Model) -> dict[str, Range]:
    """The range that the Relu or Clip before a tensor lets through."""
    found: dict[str, Range] = {}
    for node in model.graph.find("Relu", "Clip"):
        low, high = (0.0, float("inf")) if node.op == "Relu" else clip_bounds(node)
        found[node.outputs[0].name] = (-float("inf") if low is None else low, float("inf") if high is None else high)
    return found


def _share(model: Model, members: set[str], low: float, high: float) -> bool:
    """Whether anything changed: all get the parameters of the member that has this range, or new ones."""
    spec = model.specs[min(members)]
    assert isinstance(spec, Observed)
    fitting = [m for m in sorted(members) if (float(model.params[m].rmin), float(model.params[m].rmax)) == (low, high)]
    params = model.params[fitting[0]] if fitting else params_of_range(low, high, spec.type, symmetric=spec.symmetric)
    changed = [m for m in members if model.params[m] is not params]
    model.params.update(dict.fromkeys(members, params))
    return bool(changed)
