"""min-max and moving-average: by the extremes of the feeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.errors import RecipeError
from onnxq.numerics import QuantType
from onnxq.observers.base import Observer, Range
from onnxq.sketch import TensorSketch


@dataclass(frozen=True)
class MinMax(Observer):
    """The exact minimum and maximum: nothing is ever clipped."""

    name: ClassVar[str] = "min-max"

    def choose(self, sketch: TensorSketch, quant_type: QuantType, *, symmetric: bool = False) -> Range:
        return sketch.minimum, sketch.maximum


@dataclass(frozen=True)
class MovingAverage(Observer):
    """Exponential moving averages of the minimum and of the maximum of each feed, in the order of the feeds.

    r <- momentum * r + (1 - momentum) * r of the next feed, from that of the first (Jacob et al., Quantization and Training
    of Neural Networks for Efficient Integer-Arithmetic-Only Inference, arXiv 1712.05877, section 3.1).
    """

    name: ClassVar[str] = "moving-average"
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"moving-average needs 0 <= momentum < 1, not {self.momentum}")

    def choose(self, sketch: TensorSketch, quant_type: QuantType, *, symmetric: bool = False) -> Range:
        low, high = sketch.minimum, sketch.maximum
        seen = [extent for _, extent in sorted(sketch.series.items()) if extent[0] <= extent[1]]
        for k, (least, most) in enumerate(seen):
            low = least if k == 0 else self.momentum * low + (1 - self.momentum) * least
            high = most if k == 0 else self.momentum * high + (1 - self.momentum) * most
        return low, high
