"""mse: by the squared error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq import kernels
from onnxq.numerics import QuantType
from onnxq.observers.base import Observer, Range
from onnxq.observers.search import best_range
from onnxq.sketch import Histogram, TensorSketch


@dataclass(frozen=True)
class Mse(Observer):
    """The range of least expected squared error; the lower and the upper limit are searched apart.

    The error of a bin is integrated in closed form with its elements spread evenly over it, so a bin wider than the step
    counts as rounding noise and not by the accident of where its centre falls.
    """

    name: ClassVar[str] = "mse"

    def choose(self, sketch: TensorSketch, quant_type: QuantType, *, symmetric: bool = False) -> Range:
        return best_range(squared_error, sketch, quant_type, symmetric=symmetric)


def squared_error(bins: Histogram, rmin: np.ndarray, rmax: np.ndarray, levels: int) -> np.ndarray:
    """Sum of squared quantization errors for each candidate range: rmin, rmax (n,) float64 -> (n,)."""
    return kernels.squared_error(bins.lower, bins.upper, bins.count, rmin, rmax, levels)


def squared_error_numpy(bins: Histogram, rmin: np.ndarray, rmax: np.ndarray, levels: int) -> np.ndarray:
    """What `squared_error` gives, in plain numpy: the oracle of the compiled kernel.

    With t = x / scale, the integral of (t - round(t))^2 from 0 to T is round(T) / 12 + (T - round(T))^3 / 3; beyond the
    range it is that of (x - limit)^2.
    """
    scale = np.maximum((rmax - rmin) / levels, 1e-300)[:, None]
    zero = np.rint(-rmin[:, None] / scale)
    low, high = -zero * scale, (levels - zero) * scale
    a, b = bins.lower[None], bins.upper[None]
    inner_a, inner_b = np.clip(a, low, high) / scale, np.clip(b, low, high) / scale
    rounded_a, rounded_b = np.rint(inner_a), np.rint(inner_b)
    inside = scale**3 * ((rounded_b - rounded_a) / 12 + ((inner_b - rounded_b) ** 3 - (inner_a - rounded_a) ** 3) / 3)
    over_a, over_b = np.maximum(a - high, 0.0), np.maximum(b - high, 0.0)
    under_a, under_b = np.minimum(a - low, 0.0), np.minimum(b - low, 0.0)
    outside = (over_b**3 - over_a**3 + under_b**3 - under_a**3) / 3
    width = b - a
    point = (np.clip(a, low, high) - np.rint(np.clip(a, low, high) / scale) * scale) ** 2 + over_a**2 + under_a**2
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(width > 0, (inside + outside) / width, point)
    return (np.maximum(mean, 0.0) * bins.count[None]).sum(1)
