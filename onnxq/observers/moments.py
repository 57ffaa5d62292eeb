"""clip-std and aciq: by mean and spread, as if the distribution were known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import erf, exp, pi, sqrt
from typing import ClassVar

import numpy as np

from onnxq.errors import RecipeError
from onnxq.numerics import QuantType
from onnxq.observers.base import Observer, Range
from onnxq.sketch import Histogram, TensorSketch

LAPLACE, GAUSS = 1 / sqrt(2), sqrt(2 / pi)  # mean absolute deviation over standard deviation


@dataclass(frozen=True)
class ClipStd(Observer):
    """The mean and `sigmas` standard deviations to either side, inside the observed range."""

    name: ClassVar[str] = "clip-std"
    sigmas: float = 3.0

    def __post_init__(self) -> None:
        if self.sigmas <= 0:
            raise RecipeError(f"clip-std needs a positive number of sigmas, not {self.sigmas}")

    def choose(self, sketch: TensorSketch, quant_type: QuantType, *, symmetric: bool = False) -> Range:
        mean, std = mean_and_std(sketch)
        return _inside(sketch, mean - self.sigmas * std, mean + self.sigmas * std)


@dataclass(frozen=True)
class Aciq(Observer):
    """The clipping of least expected squared error for a Laplace or a normal distribution, whichever is nearer.

    Nearer is told by the mean absolute deviation. What is never negative is taken as one half of a distribution about 0, so
    its one side has all levels. Banner et al., Post-training 4-bit quantization of convolution networks for
    rapid-deployment (ACIQ), arXiv 1810.05723, section 3.
    """

    name: ClassVar[str] = "aciq"

    def choose(self, sketch: TensorSketch, quant_type: QuantType, *, symmetric: bool = False) -> Range:
        levels = quant_type.qmax - quant_type.qmin + 1
        bins = sketch.histogram()
        if sketch.minimum >= 0 or sketch.maximum <= 0:
            used = (bins.lower != 0) | (bins.upper != 0)
            half = Histogram(np.abs(bins.lower[used]), np.abs(bins.upper[used]), bins.count[used])
            if not used.any():
                return sketch.minimum, sketch.maximum
            std, deviation = _root_mean_square(half), float(np.average(np.abs(half.centre), weights=half.count))
            limit = std * limit_of(_is_laplace(std, deviation), levels if symmetric else 2 * levels)
            return _inside(sketch, *((0.0, limit) if sketch.minimum >= 0 else (-limit, 0.0)))
        mean, std = mean_and_std(sketch)
        deviation = float(np.average(np.abs(bins.centre - mean), weights=bins.count))
        limit = std * limit_of(_is_laplace(std, deviation), levels)
        return _inside(sketch, mean - limit, mean + limit)


def mean_and_std(sketch: TensorSketch) -> tuple[float, float]:
    """The mean, exact, and the standard deviation, from the histogram with its elements spread evenly over each bin."""
    mean = sketch.sum() / sketch.count
    return mean, sqrt(max(0.0, _root_mean_square(sketch.histogram()) ** 2 - mean**2))


def _root_mean_square(bins: Histogram) -> float:
    squares = (bins.lower**2 + bins.lower * bins.upper + bins.upper**2) / 3
    return sqrt(float(np.average(squares, weights=bins.count)))


def _is_laplace(std: float, deviation: float) -> bool:
    return std == 0 or abs(deviation / std - LAPLACE) < abs(deviation / std - GAUSS)


@lru_cache(maxsize=64)
def limit_of(is_laplace: bool, levels: int) -> float:
    """The clipping limit in standard deviations: where the derivative of the expected squared error is 0.

    Laplace of scale b: 2 b^2 exp(-a/b) + a^2 / (3 levels^2). Normal of variance 1:
    (1 + a^2) (1 - erf(a / sqrt 2)) - sqrt(2 / pi) a exp(-a^2 / 2) + a^2 / (3 levels^2).
    """
    from scipy.optimize import brentq

    b = 1 / sqrt(2)

    def slope(a: float) -> float:
        rounding = 2 * a / (3 * levels**2)
        if is_laplace:
            return rounding - 2 * b * exp(-a / b)
        return rounding + 2 * a * (1 - erf(a / sqrt(2))) - 2 * sqrt(2 / pi) * exp(-a * a / 2)

    return brentq(slope, 1e-3, 40.0)  # pyright: ignore[reportReturnType]  full_output is off


def _inside(sketch: TensorSketch, low: float, high: float) -> Range:
    return min(max(low, sketch.minimum), sketch.maximum), max(min(high, sketch.maximum), sketch.minimum)
