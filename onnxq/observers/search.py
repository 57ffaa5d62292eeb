"""The search for the range of least error, of whatever kind, over a histogram."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxq.numerics import QuantType
from onnxq.observers.base import Range
from onnxq.sketch import Histogram, TensorSketch

SMALLEST_SHARE = 0.02  # of the observed limit: the deepest clipping that is ever considered


Error = Callable[[Histogram, np.ndarray, np.ndarray, int], np.ndarray]  # bins, rmin (n,), rmax (n,), levels -> (n,)


def best_range(error: Error, sketch: TensorSketch, quant_type: QuantType, *, symmetric: bool) -> Range:
    """The range of least error; but for a symmetric one the lower and the upper limit are searched apart, twice in turn."""
    levels = quant_type.qmax - quant_type.qmin
    bins = above_half_step(sketch.histogram(), levels)
    if symmetric:
        reach = max(-sketch.minimum, sketch.maximum, 0.0)
        best, _ = search(lambda r: error(bins, -r, r, 2 * (levels // 2)), reach)
        return -best, best
    lo, hi = min(sketch.minimum, 0.0), max(sketch.maximum, 0.0)
    lo_reach, hi_reach = lo, hi
    for _ in range(2):
        fixed_lo = lo
        hi, _ = search(lambda r, a=fixed_lo: error(bins, np.full_like(r, a), r, levels), hi_reach)
        fixed_hi = hi
        lo, _ = search(lambda r, b=fixed_hi: error(bins, r, np.full_like(r, b), levels), lo_reach)
    return lo, hi


def above_half_step(bins: Histogram, levels: int) -> Histogram:
    """The bins whose error depends on the range: all but those that every candidate of `search` rounds to 0."""
    reach = max(0.0, bins.upper.max(initial=0.0)) - min(0.0, bins.lower.min(initial=0.0))
    keep = np.maximum(np.abs(bins.lower), np.abs(bins.upper)) >= SMALLEST_SHARE * reach / levels / 2
    return Histogram(bins.lower[keep], bins.upper[keep], bins.count[keep])


def search(error: Callable[[np.ndarray], np.ndarray], reach: float) -> tuple[float, float]:
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
