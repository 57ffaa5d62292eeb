"""The search for one limit of a range, and what of a histogram matters to it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxq.sketch import Histogram

SMALLEST_SHARE = 0.02  # of the observed limit: the deepest clipping that is ever considered


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
