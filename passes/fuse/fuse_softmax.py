"""fuse-softmax"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import is_float32
from onnxq.model import Model
from onnxq.passmanager import Pass
from onnxq.pattern import Either, Input, Match, Op, keeps_dimensions, match, reduced_axes, substitute

SOFTMAX_OPSET = 13  # the first in which it normalizes over one axis
X = Input("x")
_POWERS = Op("Exp", Either(Op("Sub", X, Op("ReduceMax", X, name="largest")), X), name="powers")  # one node at both places
_SUM = Op("ReduceSum", _POWERS, name="sum")
PATTERN = Either(Op("Div", _POWERS, _SUM), Op("Mul", _POWERS, Op("Reciprocal", _SUM)))


@dataclass(frozen=True)
class FuseSoftmax(Pass):
    """Write a softmax that is spelled out in small ops as one node.

    Given:   %e = Exp(Sub(%x, ReduceMax(%x)));  %y = Div(%e, ReduceSum(%e))                over one axis; or without the Sub
    Result:  %y = Softmax(%x) {axis}
    Refused: the opset is below 13; the axes are several or differ, or are not kept; an inner result has another reader.
    """

    name: ClassVar[str] = "fuse-softmax"

    def apply(self, model: Model) -> int:
        graph, fused = model.graph, 0
        if graph.opset < SOFTMAX_OPSET:
            return 0
        for root in graph.find("Div", "Mul"):
            found = match(graph, root, PATTERN)
            if found is None or not is_float32(found.tensors["x"]):
                continue
            axis = _axis(found)
            if axis is None:
                model.refuse(root, "it does not normalize over one axis")
            elif not found.is_closed(graph):
                model.refuse(root, "an inner result has another reader")
            else:
                substitute(graph, found, "Softmax", [found.tensors["x"]], {"axis": axis})
                fused += 1
        if fused:
            graph.cleanup()
        return fused


def _axis(found: Match) -> int | None:
    shape = found.tensors["x"].shape
    axes = set()
    for node in (n for name, n in found.nodes.items() if name != "powers"):
        reduced = reduced_axes(node)
        if reduced is None or len(reduced) != 1 or not keeps_dimensions(node):
            return None
        axis = reduced[0]
        axes.add(axis - len(shape) if axis >= 0 and shape is not None else axis)
    return axes.pop() if len(axes) == 1 else None
