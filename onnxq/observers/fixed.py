"""fixed-range and fixed-scale: given, not observed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.errors import RecipeError
from onnxq.numerics import QuantType
from onnxq.observers.base import Observer, Range
from onnxq.sketch import TensorSketch

LARGEST = float(np.finfo(np.float32).max)
SMALLEST = 65535 * float(np.finfo(np.float32).tiny)  # below, a scale would be no normal float32 number


@dataclass(frozen=True)
class FixedRange(Observer):
    """This range, whatever the data."""

    name: ClassVar[str] = "fixed-range"
    lower: float = 0.0
    upper: float = 1.0

    def __post_init__(self) -> None:
        if not -LARGEST <= self.lower < self.upper <= LARGEST or self.upper - self.lower < SMALLEST:
            raise RecipeError(f"fixed-range needs lower < upper, float32 numbers, not {self.lower} and {self.upper}")

    def choose(self, sketch: TensorSketch, quant_type: QuantType, *, symmetric: bool = False) -> Range:
        return self.lower, self.upper


@dataclass(frozen=True)
class FixedScale(Observer):
    """This scale and zero point; without the latter, the lowest code of what is never negative, or the middle."""

    name: ClassVar[str] = "fixed-scale"
    scale: float = 1.0
    zero_point: float | None = None

    def __post_init__(self) -> None:
        if not SMALLEST <= self.scale <= LARGEST / 65535:
            raise RecipeError(f"fixed-scale needs a positive scale, not {self.scale}")

    def choose(self, sketch: TensorSketch, quant_type: QuantType, *, symmetric: bool = False) -> Range:
        zero = self.zero_point
        if symmetric:
            reach = self.scale * ((quant_type.qmax - quant_type.qmin) // 2)
            return -reach, reach
        if zero is None:
            zero = quant_type.qmin if sketch.minimum >= 0 else (quant_type.qmin + quant_type.qmax + 1) // 2
        if zero != int(zero) or not quant_type.qmin <= zero <= quant_type.qmax:
            raise RecipeError(
                f"fixed-scale has zero_point {zero:g}; it takes a whole number from {quant_type.qmin} to {quant_type.qmax}"
            )
        return (quant_type.qmin - zero) * self.scale, (quant_type.qmax - zero) * self.scale
