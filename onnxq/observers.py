"""Observers: from the sketch of a tensor to the range that its integer type is to represent.

Each is a small frozen dataclass: its fields are its options, `choose` is the whole of it. They are named as in a recipe or
on the command line, with options in braces: `mse`, `percentile{upper=99.99}`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib.metadata import entry_points
from typing import ClassVar

import numpy as np

from onnxq import kernels
from onnxq.errors import RecipeError, nearest
from onnxq.numerics import QuantType
from onnxq.sketch import Histogram, TensorSketch

Range = tuple[float, float]
SMALLEST_SHARE = 0.02  # of the observed limit: the deepest clipping that is ever considered


@dataclass(frozen=True)
class Observer(ABC):
    """Chooses a range. The result always holds 0 once parameters are made of it."""

    name: ClassVar[str]

    @abstractmethod
    def choose(self, sketch: TensorSketch, quant_type: QuantType, *, symmetric: bool = False) -> Range:
        """(rmin, rmax) for a tensor with this sketch; the sketch has seen at least one finite element."""


@dataclass(frozen=True)
class MinMax(Observer):
    """The exact minimum and maximum: nothing is ever clipped."""

    name: ClassVar[str] = "min-max"

    def choose(self, sketch: TensorSketch, quant_type: QuantType, *, symmetric: bool = False) -> Range:
        return sketch.minimum, sketch.maximum


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
    """The value that a share of the elements lies below, linear inside a bin."""
    below = np.cumsum(bins.count)
    rank = share * below[-1]
    k = min(int(np.searchsorted(below, rank)), len(below) - 1)
    inside = (rank - (below[k] - bins.count[k])) / bins.count[k]
    return float(bins.lower[k] + np.clip(inside, 0.0, 1.0) * (bins.upper[k] - bins.lower[k]))


@dataclass(frozen=True)
class Mse(Observer):
    """The range of least expected squared error; the lower and the upper limit are searched apart.

    The error of a bin is integrated in closed form with its elements spread evenly over it, so a bin wider than the step
    counts as rounding noise and not by the accident of where its centre falls.
    """

    name: ClassVar[str] = "mse"

    def choose(self, sketch: TensorSketch, quant_type: QuantType, *, symmetric: bool = False) -> Range:
        levels = quant_type.qmax - quant_type.qmin
        bins = _above_half_step(sketch.histogram(), levels)
        if symmetric:
            reach = max(-sketch.minimum, sketch.maximum, 0.0)
            best, _ = _search(lambda r: squared_error(bins, -r, r, 2 * (levels // 2)), reach)
            return -best, best
        lo, hi = min(sketch.minimum, 0.0), max(sketch.maximum, 0.0)
        lo_reach, hi_reach = lo, hi
        for _ in range(2):
            fixed_lo = lo
            hi, _ = _search(lambda r, a=fixed_lo: squared_error(bins, np.full_like(r, a), r, levels), hi_reach)
            fixed_hi = hi
            lo, _ = _search(lambda r, b=fixed_hi: squared_error(bins, r, np.full_like(r, b), levels), lo_reach)
        return lo, hi


@dataclass(frozen=True)
class Kl(Observer):
    """The range whose quantized distribution has the least Kullback-Leibler divergence from the clipped original.

    P is the histogram inside the range with what lies outside counted at its edges; Q is the histogram inside, merged into
    the levels of the type and spread again over the non-empty bins of each level (S. Migacz, "8-bit inference with
    TensorRT", GTC 2017). The lower and the upper limit are searched apart; `bins` uniform bins span the observed range.
    Exact zeros are left out: every range represents them exactly, and after a ReLU they would drown the rest.
    """

    name: ClassVar[str] = "kl"
    bins: int = 4096

    def __post_init__(self) -> None:
        if self.bins < 2048:
            raise RecipeError(f"kl needs at least 2048 bins, not {self.bins}: with fewer there is nothing to choose from")

    def choose(self, sketch: TensorSketch, quant_type: QuantType, *, symmetric: bool = False) -> Range:
        lo, hi = min(sketch.minimum, 0.0), max(sketch.maximum, 0.0)
        if hi == lo:
            return lo, hi
        levels = quant_type.qmax - quant_type.qmin + 1
        bins = sketch.histogram()
        nonzero = (bins.lower != 0) | (bins.upper != 0)
        bins = Histogram(bins.lower[nonzero], bins.upper[nonzero], bins.count[nonzero])
        if symmetric:
            reach = max(-lo, hi)
            folded = uniform(bins, -reach, reach, 2 * self.bins)
            folded = folded[self.bins :] + folded[: self.bins][::-1]
            stop, _ = _least_divergence(folded, 0, self.bins, levels // 2, move_start=False)
            limit = reach * stop / self.bins
            return -limit, limit
        counts = uniform(bins, lo, hi, self.bins)
        zero = min(self.bins, max(0, round(-lo / (hi - lo) * self.bins)))
        start, stop = 0, self.bins
        for _ in range(2):
            if hi > 0:
                stop, _ = _least_divergence(counts, start, max(stop, zero + 1), levels, move_start=False, zero=zero)
            if lo < 0:
                start, _ = _least_divergence(counts, start, stop, levels, move_start=True, zero=zero)
        width = (hi - lo) / self.bins
        return lo + start * width, lo + stop * width


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


def _above_half_step(bins: Histogram, levels: int) -> Histogram:
    """The bins whose error depends on the range: all but those that every candidate of `_search` rounds to 0."""
    reach = max(0.0, bins.upper.max(initial=0.0)) - min(0.0, bins.lower.min(initial=0.0))
    keep = np.maximum(np.abs(bins.lower), np.abs(bins.upper)) >= SMALLEST_SHARE * reach / levels / 2
    return Histogram(bins.lower[keep], bins.upper[keep], bins.count[keep])


def _search(error: Callable[[np.ndarray], np.ndarray], reach: float) -> tuple[float, float]:
    """The limit between 0 and `reach` of least error: a geometric grid of 48, then two rounds around the best."""
    if reach == 0.0:
        return 0.0, 0.0
    shares, best, least = np.geomspace(1.0, SMALLEST_SHARE, 48), 1.0, np.inf
    for _ in range(3):
        errors = error(shares * reach)
        k = int(np.argmin(errors))
        best, least = float(shares[k]), float(errors[k])
        above, below = shares[max(k - 1, 0)], shares[min(k + 1, len(shares) - 1)]
        shares = np.linspace(above, below, 11)
    return best * reach, least


def uniform(bins: Histogram, lo: float, hi: float, n: int) -> np.ndarray:
    """The histogram over n even bins of [lo, hi], each bin's elements spread evenly over it."""
    edges = np.linspace(lo, hi, n + 1)
    wide = bins.upper > bins.lower
    knots_x = np.concatenate([bins.lower[wide], bins.upper[wide]])
    done = np.cumsum(bins.count * wide)
    knots_y = np.concatenate([done[wide] - bins.count[wide], done[wide]])
    order = np.lexsort((knots_y, knots_x))
    spread = np.interp(edges, knots_x[order], knots_y[order], left=0.0) if wide.any() else np.zeros(n + 1)
    counts = np.diff(spread)
    where = np.clip(((bins.lower[~wide] - lo) / (hi - lo) * n).astype(int), 0, n - 1)
    np.add.at(counts, where, bins.count[~wide])
    return np.maximum(counts, 0.0)


def _least_divergence(
    counts: np.ndarray, start: int, stop: int, levels: int, *, move_start: bool, zero: int = 0
) -> tuple[int, float]:
    """The end of the window that can be moved in, without passing `zero`, to the least divergence."""
    fewest = min(levels, stop - start)
    if move_start:
        candidates = np.unique(np.linspace(start, max(start, min(zero, stop - fewest)), 128).astype(int))
        found = [(divergence(counts, int(c), stop, levels), int(c)) for c in candidates]
    else:
        candidates = np.unique(np.linspace(min(stop, max(zero, start + fewest)), stop, 128).astype(int))[::-1]
        found = [(divergence(counts, start, int(c), levels), int(c)) for c in candidates]
    least, end = min(found, key=lambda pair: pair[0])
    return end, least


def divergence(counts: np.ndarray, start: int, stop: int, levels: int) -> float:
    """KL(P || Q) of clipping to bins [start, stop) and merging these into `levels` levels."""
    inside = counts[start:stop]
    reference = inside.copy()
    reference[0] += counts[:start].sum()
    reference[-1] += counts[stop:].sum()
    edges = np.linspace(0, len(inside), min(levels, len(inside)) + 1).astype(int)
    total = np.add.reduceat(inside, edges[:-1])
    used = np.add.reduceat((reference > 0).astype(np.float64), edges[:-1])
    share = np.divide(total, used, out=np.zeros_like(total), where=used > 0)
    candidate = np.repeat(share, np.diff(edges)) * (reference > 0)
    if not candidate.sum() or not reference.sum():
        return float("inf")
    from scipy.special import rel_entr  # slow to import, and only kl needs it

    p, q = reference / reference.sum(), candidate / candidate.sum()
    smallest = 1e-10  # an element that clipping moved into an otherwise empty level would cost infinity
    return float(rel_entr(p, np.maximum(q, smallest)).sum())


@lru_cache(maxsize=1)
def registry() -> dict[str, type[Observer]]:
    """Every observer by its name: ours and those that packages add through the entry point group onnxq.observers."""
    found: dict[str, type[Observer]] = {c.name: c for c in (MinMax, Percentile, Kl, Mse)}
    for entry in entry_points(group="onnxq.observers"):
        found[entry.name] = entry.load()
    return found


def observer(text: str) -> Observer:
    """The observer that `name` or `name{option=number,...}` spells. Raises RecipeError that names the nearest valid."""
    name, _, rest = text.partition("{")
    kinds = registry()
    if name not in kinds:
        raise RecipeError(f"unknown observer {name}; {nearest(name, kinds)}")
    if ("{" in text) != text.endswith("}") or text.count("{") > 1:
        raise RecipeError(f"observer {text} is cut short; options stand in braces: {name}{{option=number}}")
    kind, options = kinds[name], {}
    known = {f.name: f.type for f in fields(kind)}
    for part in filter(None, rest.removesuffix("}").split(",")):
        key, _, number = part.partition("=")
        if key.strip() not in known:
            hint = nearest(key.strip(), known) if known else "it has no options"
            raise RecipeError(f"observer {name} has no option {key.strip()}; {hint}")
        try:
            options[key.strip()] = int(number) if known[key.strip()] == "int" else float(number)
        except ValueError as error:
            raise RecipeError(f"option {key.strip()} of observer {name} is {number!r}; it takes a number") from error
    return kind(**options)
