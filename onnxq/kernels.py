"""The compiled loops. Each has a plain numpy form where it is used, which tests hold it to.

numba is imported with the first kernel that runs; what it compiles is cached on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

Array = np.ndarray


def fill(bits: Array, counts: Array, mantissas: Array) -> None:
    """Add to counts (65,536,) of `bits >> 16` and mantissa sums (512,) of `bits >> 23`, both int64."""
    _fill()(bits, counts, mantissas)


def excess(x: Array, codes: Array, channel: Array, pair: Array, lost: Array) -> None:
    """Add to lost (N, R) what 16-bit saturation takes from each pair: x (K, R) and codes (N, K) int32."""
    _excess()(x, codes, channel, pair, lost)


def squared_error(lower: Array, upper: Array, count: Array, rmin: Array, rmax: Array, levels: int) -> Array:
    """observers.squared_error over bins (B,) for candidate ranges (n,), all float64 -> (n,)."""
    return _squared_error()(lower, upper, count, rmin, rmax, float(levels))


@lru_cache(maxsize=1)
def _fill() -> Callable[..., Any]:
    import numba

    @numba.njit("void(uint32[::1], int64[::1], int64[::1])", cache=True, nogil=True)
    def kernel(bits, counts, mantissas):  # pragma: no cover - compiled
        for k in range(bits.size):
            counts[bits[k] >> np.uint32(16)] += 1
            mantissas[bits[k] >> np.uint32(23)] += np.int64(bits[k] & np.uint32(0x7FFFFF))

    return kernel


@lru_cache(maxsize=1)
def _excess() -> Callable[..., Any]:
    import numba

    @numba.njit("void(int32[:,::1], int32[:,::1], int64[::1], int64[::1], int64[:,::1])", cache=True, nogil=True)
    def kernel(x, codes, channel, pair, lost):  # pragma: no cover - compiled
        for k in range(channel.size):
            c, j = channel[k], 2 * pair[k]
            a, b = codes[c, j], codes[c, j + 1]
            for r in range(x.shape[1]):
                product = a * x[j, r] + b * x[j + 1, r]
                if product > 32767:
                    lost[c, r] += product - 32767
                elif product < -32768:
                    lost[c, r] += product + 32768

    return kernel


@lru_cache(maxsize=1)
def _squared_error() -> Callable[..., Any]:
    import numba

    signature = "float64[::1](float64[::1], float64[::1], float64[::1], float64[::1], float64[::1], float64)"

    @numba.njit(signature, cache=True, nogil=True)
    def kernel(lower, upper, count, rmin, rmax, levels):  # pragma: no cover - compiled
        total = np.zeros(rmin.size)
        for c in range(rmin.size):
            scale = max((rmax[c] - rmin[c]) / levels, 1e-300)
            zero = np.rint(-rmin[c] / scale)
            low, high = -zero * scale, (levels - zero) * scale
            for k in range(lower.size):
                a, b = lower[k], upper[k]
                inner_a, inner_b = min(max(a, low), high) / scale, min(max(b, low), high) / scale
                rounded_a, rounded_b = np.rint(inner_a), np.rint(inner_b)
                off_a, off_b = inner_a - rounded_a, inner_b - rounded_b
                over_a, over_b = max(a - high, 0.0), max(b - high, 0.0)
                under_a, under_b = min(a - low, 0.0), min(b - low, 0.0)
                if b > a:
                    inside = scale**3 * ((rounded_b - rounded_a) / 12 + (off_b**3 - off_a**3) / 3)
                    outside = (over_b**3 - over_a**3 + under_b**3 - under_a**3) / 3
                    mean = (inside + outside) / (b - a)
                else:
                    mean = (off_a * scale) ** 2 + over_a**2 + under_a**2
                total[c] += max(mean, 0.0) * count[k]
        return total

    return kernel
