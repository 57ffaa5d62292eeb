"""fuse-hardswish"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import clip_bounds, is_float32
from onnxq.model import Model
from onnxq.passmanager import Pass
from onnxq.pattern import Either, Input, Match, Number, Op, Product, match, substitute

HARDSWISH_OPSET = 14
X = Input("x")
_CLIPPED = Op("Clip", Op("Add", X, Number(3)), name="clip")
BY_CLIP = Either(
    Op("Div", Op("Mul", X, _CLIPPED), Number(6)),
    Product(X, _CLIPPED, Number(1 / 6)),
    Op("Mul", _CLIPPED, Op("Div", X, Number(6))),
    Op("Mul", X, Op("Div", _CLIPPED, Number(6))),
)
BY_HARDSIGMOID = Op("Mul", X, Op("HardSigmoid", X, name="gate"))


@dataclass(frozen=True)
class FuseHardswish(Pass):
    """Write a hard swish that is spelled out in small ops as one node.

    Given:   %y = Div(Mul(%x, Clip(Add(%x, 3), 0, 6)), 6), its factors in any order; or Mul(%x, HardSigmoid(%x))
    Result:  %y = HardSwish(%x)                        before opset 14: %y = Mul(%x, HardSigmoid(%x) {alpha=1/6, beta=0.5})
    Refused: the bounds are not 0 and 6; the slope is not 1/6 or the offset not 0.5; an inner result has another reader.

    Howard et al., Searching for MobileNetV3, arXiv 1905.02244.
    """

    name: ClassVar[str] = "fuse-hardswish"

    def apply(self, model: Model) -> int:
        graph, fused = model.graph, 0
        for root in graph.find("Div", "Mul"):
            found = match(graph, root, BY_CLIP) or match(graph, root, BY_HARDSIGMOID)
            if (
                found is None
                or not is_float32(found.tensors["x"])
                or ("gate" in found.nodes and graph.opset < HARDSWISH_OPSET)
            ):
                continue
            if not _is_hardswish(found):
                model.refuse(root, "its bounds or slope are not those of a hard swish")
                continue
            if not found.is_closed(graph):
                model.refuse(root, "an inner result has another reader")
                continue
            x = found.tensors["x"]
            if graph.opset >= HARDSWISH_OPSET:
                substitute(graph, found, "HardSwish", [x])
            else:
                gate = graph.variable(f"{x.name}_hardsigmoid", x.dtype, x.shape)
                graph.insert("HardSigmoid", [x], [gate], {"alpha": 1 / 6, "beta": 0.5})
                substitute(graph, found, "Mul", [x, gate])
            fused += 1
        if fused:
            graph.cleanup()
        return fused


def _is_hardswish(found: Match) -> bool:
    if "gate" in found.nodes:
        attrs = found.nodes["gate"].attrs
        return bool(np.isclose(attrs.get("alpha", 0.2), 1 / 6, rtol=1e-5) and attrs.get("beta", 0.5) == 0.5)
    return clip_bounds(found.nodes["clip"]) == (0.0, 6.0)
