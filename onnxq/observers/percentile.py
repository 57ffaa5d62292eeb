"""percentile: by shares of the elements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.errors import RecipeError
from onnxq.numerics import QuantType
from onnxq.observers.base import Observer, Range
from onnxq.sketch import Histogram, TensorSketch


@dataclass(frozen=True)
class Percentile(Observer):
    """Clips each tail on its own: `lower` percent of the elements below, 100 - `upper` percent above."""

    name: ClassVar[str] = "percentile"
    lower: float = 0.01
    upper: float = 99.99

    def __post_init__(self) -> None:
        if not 0 <= self.lower < self.upper <= 100:
            raise RecipeError(f"percentile needs 0 <= lower < upper <= 100, not {self.lower} and {self.upper}")

    def choose(self, sketch: TensorSketch, quant_type: QuantType, *, symmetric: bool = False) -> Range:
        bins = sketch.histogram()
        return quantile(bins, self.lower / 100), quantile(bins, self.upper / 100)


def quantile(bins: Histogram, share: float) -> float:
    """The value that a share of the elements lies below, linear inside a bin but for its ends.

    All elements of a bin may lie at one end of it: between 0.36 and 0.64 of its width, which is at most 2^-7 of its value,
    none is more than half a percent away.
    """
    if share in (0.0, 1.0):
        return float(bins.lower[0] if share == 0.0 else bins.upper[-1])
    below = np.cumsum(bins.count)
    rank = share * below[-1]
    k = min(int(np.searchsorted(below, rank)), len(below) - 1)
    inside = (rank - (below[k] - bins.count[k])) / bins.count[k]
    return float(bins.lower[k] + np.clip(inside, 0.36, 0.64) * (bins.upper[k] - bins.lower[k]))
