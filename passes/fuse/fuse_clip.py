"""fuse-clip"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import is_float32
from onnxq.model import Model
from onnxq.passmanager import Pass
from onnxq.pattern import Either, Input, Number, Op, match, substitute

CLIP_OPSET = 11  # the first in which the bounds are inputs
X = Input("x")
RELU = Op("Max", X, Number(0))
PATTERNS = (
    Op("Min", Op("Max", X, Number("low")), Number("high")),
    Op("Max", Op("Min", X, Number("high")), Number("low")),
    Either(Op("Min", Op("Relu", X), Number("high")), Op("Relu", Op("Min", X, Number("high")))),
)


@dataclass(frozen=True)
class FuseClip(Pass):
    """Write bounds that are spelled out as Min and Max as one Clip.

    Given:   %y = Min(Max(%x, 0), 6), or in the other order, or Min(Relu(%x), 6)
             %y = Max(%x, 0)
    Result:  %y = Clip(%x, 0, 6)
             %y = Relu(%x)
    Refused: an inner result has another reader; the lower bound is above the upper one.
    """

    name: ClassVar[str] = "fuse-clip"

    def apply(self, model: Model) -> int:
        graph, fused = model.graph, 0
        if graph.opset < CLIP_OPSET:
            return 0
        for root in graph.find("Min", "Max", "Relu"):
            relu = match(graph, root, RELU)
            if relu is not None and is_float32(relu.tensors["x"]):
                substitute(graph, relu, "Relu", [relu.tensors["x"]])
                fused += 1
                continue
            found = next((f for p in PATTERNS if (f := match(graph, root, p)) is not None), None)
            if found is None or not is_float32(found.tensors["x"]):
                continue
            low, high = found.numbers.get("low", 0.0), found.numbers["high"]
            if not found.is_closed(graph):
                model.refuse(root, "an inner result has another reader")
                continue
            if low > high:
                model.refuse(root, "its lower bound is above the upper one")
                continue
            bounds = [graph.constant(f"{root.name}_{n}", np.array(v, np.float32)) for n, v in (("min", low), ("max", high))]
            substitute(graph, found, "Clip", [found.tensors["x"], *bounds])
            fused += 1
        if fused:
            graph.cleanup()
        return fused
