"""kl: by the divergence of the distributions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.errors import RecipeError
from onnxq.numerics import QuantType
from onnxq.observers.base import Observer, Range
from onnxq.sketch import Histogram, TensorSketch


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
