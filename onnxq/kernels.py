"""The compiled loops. Each has a plain numpy form where it is used, which tests hold it to.

numba is imported with the first kernel that runs; what it compiles is cached on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

Array = np.ndarray


def observe_rows(x: Array, low: Array, high: Array, total: Array, tables: Array, touched: Array) -> None:
    """One pass over x (rows, n) float32, row r of which is of channel r % C: see sketch.observe_numpy for what it adds up.

    low, high (C,) int32 are least and largest elements as ordered bits, total (C,) or (0,) float64 their sums or nothing.
    tables (4, 65,536) uint64 count by `bits >> 16`: an entry holds the count above bit 40, the sum of `bits & 0xffff` below,
    so x has at most 2^22 elements; neighbours go to different tables, so that a run of one value does not wait for its own
    last addition.
    touched (512,) marks the pages of 128 bins.
    """
    _observe_rows()(x.view(np.uint32), x, low, high, total, tables, touched)


def observe_columns(x: Array, low: Array, high: Array, total: Array, tables: Array, touched: Array) -> None:
    """The same for x (n, C), each column of which is a channel."""
    _observe_columns()(x.view(np.uint32), x, low, high, total, tables, touched)


def drain(tables: Array, touched: Array, slots: Array, rows: Array, used: int, sign: int) -> int:
    """Add the tables' content, times sign, to rows (pages, 129) int64 by slots (512,) of the pages, and clear them.

    Gives the number of pages that are used then.
    """
    return int(_drain()(tables, touched, slots, rows, used, sign))


def exact_add(limbs: Array, values: Array, lowest_bit: int) -> None:
    """Add float64 values (channels,) to fixed-point numbers, limbs (channels, n) int64 of 32 bits, without carrying."""
    _exact_add()(limbs, values, lowest_bit)


def excess(x: Array, codes: Array, channel: Array, pair: Array, lost: Array) -> None:
    """Add to lost (N, R) what 16-bit saturation takes from each pair: x (K, R) and codes (N, K) int32."""
    _excess()(x, codes, channel, pair, lost)


def squared_error(lower: Array, upper: Array, count: Array, rmin: Array, rmax: Array, levels: int) -> Array:
    """observers.squared_error over bins (B,) for candidate ranges (n,), all float64 -> (n,)."""
    return _squared_error()(lower, upper, count, rmin, rmax, float(levels))


@lru_cache(maxsize=1)
def _count() -> Callable[..., Any]:
    import numba

    @numba.njit("void(uint32[::1], uint64[:,::1], uint8[::1])", cache=True, nogil=True, inline="always")
    def kernel(bits, tables, touched):  # pragma: no cover - compiled
        one, low, half, page = np.uint64(1 << 40), np.uint32(0xFFFF), np.uint32(16), np.uint32(23)
        whole = bits.size // 4 * 4
        for k in range(0, whole, 4):
            a, b, c, d = bits[k], bits[k + 1], bits[k + 2], bits[k + 3]
            tables[0, a >> half] += one + np.uint64(a & low)
            tables[1, b >> half] += one + np.uint64(b & low)
            tables[2, c >> half] += one + np.uint64(c & low)
            tables[3, d >> half] += one + np.uint64(d & low)
            touched[a >> page] = 1
            touched[b >> page] = 1
            touched[c >> page] = 1
            touched[d >> page] = 1
        for k in range(whole, bits.size):
            a = bits[k]
            tables[0, a >> half] += one + np.uint64(a & low)
            touched[a >> page] = 1

    return kernel


@lru_cache(maxsize=1)
def _observe_rows() -> Callable[..., Any]:
    import numba

    count = _count()
    signature = "void(uint32[:,::1], float32[:,::1], int32[::1], int32[::1], float64[::1], uint64[:,::1], uint8[::1])"

    @numba.njit("int32[:](uint32[::1], int32, int32, int32[:])", cache=True, nogil=True, inline="always")
    def extremes(bits, least, most, both):  # pragma: no cover - compiled
        for k in range(bits.size):
            signed = np.int32(bits[k])
            key = signed ^ ((signed >> np.int32(31)) & np.int32(0x7FFFFFFF))
            least, most = min(least, key), max(most, key)
        both[0], both[1] = least, most
        return both

    @numba.njit("void(float32[::1], float64[::1])", cache=True, nogil=True, inline="always")
    def add(x, sums):  # pragma: no cover - compiled
        whole = x.size // 8 * 8
        a, b, c, d, e, f, g, h = sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7]
        for k in range(0, whole, 8):
            a += x[k]
            b += x[k + 1]
            c += x[k + 2]
            d += x[k + 3]
            e += x[k + 4]
            f += x[k + 5]
            g += x[k + 6]
            h += x[k + 7]
        sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7] = a, b, c, d, e, f, g, h
        for k in range(whole, x.size):
            sums[k - whole] += x[k]

    @numba.njit(signature, cache=True, nogil=True)
    def kernel(bits, x, low, high, total, tables, touched):  # pragma: no cover - compiled
        n, channels, sums, both = x.shape[1], low.size, np.zeros(8), np.zeros(2, np.int32)
        for row in range(x.shape[0]):
            channel = row % channels
            sums[:] = 0.0
            for start in range(0, n, 4096):  # a block stays in the cache for the three things that are done with it
                block = bits[row, start : start + 4096]
                extremes(block, low[channel], high[channel], both)
                low[channel], high[channel] = both[0], both[1]
                if total.size:
                    add(x[row, start : start + 4096], sums)
                count(block, tables, touched)
            if total.size:
                total[channel] += ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]))

    return kernel


@lru_cache(maxsize=1)
def _observe_columns() -> Callable[..., Any]:
    import numba

    count = _count()
    signature = "void(uint32[:,::1], float32[:,::1], int32[::1], int32[::1], float64[::1], uint64[:,::1], uint8[::1])"

    @numba.njit(signature, cache=True, nogil=True)
    def kernel(bits, x, low, high, total, tables, touched):  # pragma: no cover - compiled
        for row in range(x.shape[0]):
            for c in range(low.size):
                signed = np.int32(bits[row, c])
                key = signed ^ ((signed >> np.int32(31)) & np.int32(0x7FFFFFFF))
                low[c] = min(low[c], key)
                high[c] = max(high[c], key)
            for c in range(low.size):
                total[c] += x[row, c]
            count(bits[row], tables, touched)

    return kernel


@lru_cache(maxsize=1)
def _drain() -> Callable[..., Any]:
    import numba

    signature = "int64(uint64[:,::1], uint8[::1], int16[::1], int64[:,::1], int64, int64)"

    @numba.njit(signature, cache=True, nogil=True)
    def kernel(tables, touched, slots, rows, used, sign):  # pragma: no cover - compiled
        low = np.uint64((1 << 40) - 1)
        for page in range(512):
            if not touched[page]:
                continue
            touched[page] = 0
            slot = slots[page]
            if slot < 0:
                slot = np.int16(used)
                slots[page] = slot
                used += 1
            mantissas = np.int64(0)
            for k in range(128):
                count = np.int64(0)
                for table in range(4):
                    packed = tables[table, page * 128 + k]
                    tables[table, page * 128 + k] = 0
                    count += np.int64(packed >> np.uint64(40))
                    mantissas += np.int64(packed & low)
                rows[slot, k] += sign * count
                mantissas += count * np.int64(k << 16)
            rows[slot, 128] += sign * mantissas
        return used

    return kernel


@lru_cache(maxsize=1)
def _exact_add() -> Callable[..., Any]:
    import numba

    @numba.njit("void(int64[:,::1], float64[::1], int64)", cache=True, nogil=True)
    def kernel(limbs, values, lowest_bit):  # pragma: no cover - compiled
        bits = values.view(np.int64)
        for c in range(values.size):
            exponent = (bits[c] >> 52) & 0x7FF
            digits = bits[c] & ((1 << 52) - 1)
            if exponent:
                digits |= 1 << 52
            else:
                exponent = np.int64(1)
            if bits[c] < 0:
                digits = -digits
            shift = exponent - 1075 - lowest_bit  # value = digits * 2^(exponent - 1075)
            if shift < 0:
                digits >>= min(-shift, np.int64(63))
                shift = np.int64(0)
            limb, place = shift // 32, shift % 32
            for part in range(3):  # as 18 + 18 + 17 bits, so that each fits an int64 after its shift
                piece = digits >> (18 * part)
                if part < 2:
                    piece &= 0x3FFFF
                at = place + 18 * part
                limbs[c, limb + at // 32] += piece << (at % 32)

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
