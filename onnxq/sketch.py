"""TensorSketch: one-pass, range-free, mergeable statistics of a tensor.

Per tensor: exact count, minimum, maximum and sum, NaN and infinities counted apart, and a histogram of the float32 bit
pattern: `bits >> 16` (sign, 8 exponent and 7 mantissa bits) is the bin, so no range need be known before the data is seen
and the relative width of a bin is 2^-7. Bins are kept in pages of 128, one page for each sign and exponent; next to its
128 counts a page keeps the integer sum of the mantissas of its elements, from which the sum of all elements follows
exactly. Merging is addition of integers: for equal activations two sketches are equal bit for bit, whatever the order,
the grouping, the number of workers or the restarts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from onnxq import kernels
from onnxq.errors import CalibrationError

BINS_A_PAGE = 128
PAGES = 512
NONFINITE_EXPONENT = 255
LIMBS, LIMB_BITS, LOWEST_BIT = 14, 32, -200  # a fixed-point number of 448 bits: multiples of 2^-200 up to 2^247


@dataclass(frozen=True)
class Histogram:
    """Non-empty bins in ascending order: elements between lower[i] and upper[i], count[i] of them (float64)."""

    lower: np.ndarray
    upper: np.ndarray
    count: np.ndarray

    @property
    def centre(self) -> np.ndarray:
        return (self.lower + self.upper) / 2


class ExactSum:
    """Sums of float64 vectors, exact, so that no order of additions changes a bit. One number for each channel."""

    def __init__(self, limbs: np.ndarray) -> None:
        self.limbs = limbs  # (channels, LIMBS) int64; all but the top limb in [0, 2^32)

    @classmethod
    def zeros(cls, channels: int) -> ExactSum:
        return cls(np.zeros((channels, LIMBS), np.int64))

    def add(self, values: np.ndarray) -> None:
        """Add one float64 to each channel; digits below 2^-200 are dropped."""
        mantissa, exponent = np.frexp(values)
        digits = np.ldexp(mantissa, 53).astype(np.int64)  # value = digits * 2^(exponent - 53)
        shift = exponent - 53 - LOWEST_BIT
        digits = np.where(shift < 0, digits >> np.minimum(-shift, 63), digits)
        shift = np.maximum(shift, 0)
        limb, bit = shift // LIMB_BITS, shift % LIMB_BITS
        rows = np.arange(len(values))
        for part in range(3):  # 53 digits as 18 + 18 + 17, so that each fits an int64 after a shift of up to 31 + 4
            piece = digits >> (18 * part) if part == 2 else (digits >> (18 * part)) & 0x3FFFF
            place = bit + 18 * part
            self.limbs[rows, limb + place // LIMB_BITS] += piece << (place % LIMB_BITS)
        self._carry()

    def merge(self, other: ExactSum) -> None:
        self.limbs += other.limbs
        self._carry()

    def _carry(self) -> None:
        for k in range(LIMBS - 1):
            carry = self.limbs[:, k] >> LIMB_BITS
            self.limbs[:, k] -= carry << LIMB_BITS
            self.limbs[:, k + 1] += carry

    def values(self) -> np.ndarray:
        """The sums, each rounded once to float64."""
        unit = Fraction(1, 2**-LOWEST_BIT)
        return np.array([float(sum(int(v) << (LIMB_BITS * k) for k, v in enumerate(row)) * unit) for row in self.limbs])


@dataclass
class ChannelStatistics:
    """Minimum, maximum and exact sum of every channel along an axis: `minimum`, `maximum` (C,) float32."""

    minimum: np.ndarray
    maximum: np.ndarray
    total: ExactSum
    count: int = 0  # elements of one channel

    @property
    def mean(self) -> np.ndarray:
        return self.total.values() / max(1, self.count)


@dataclass
class TensorSketch:
    """Statistics of one tensor over any number of feeds. `channel_axis` asks for per-channel statistics too."""

    channel_axis: int | None = None
    pages: dict[int, np.ndarray] = field(default_factory=dict)  # sign and exponent -> 128 counts and the mantissa sum
    minimum: float = np.inf
    maximum: float = -np.inf
    nan_count: int = 0
    inf_count: int = 0
    series: dict[int, tuple[float, float]] = field(default_factory=dict)  # feed index -> (min, max) of that feed
    channels: ChannelStatistics | None = None

    @property
    def count(self) -> int:
        """Finite elements seen."""
        return sum(int(p[:BINS_A_PAGE].sum()) for k, p in self.pages.items() if k % 256 != NONFINITE_EXPONENT)

    def update(self, x: np.ndarray, feed: int = 0) -> None:
        """Add an array of any shape, seen in feed number `feed`. float16 and float64 are counted as float32."""
        x = np.ascontiguousarray(x, np.float32)
        if x.size == 0:
            return
        counts, mantissas = fill(x.reshape(-1).view(np.uint32))
        bad = self._count_nonfinite(x, counts)
        low, high = (x.min(), x.max()) if not bad else (x[np.isfinite(x)].min(initial=np.inf), 0.0)
        if bad:
            high = x[np.isfinite(x)].max(initial=-np.inf)
        counts = counts.reshape(PAGES, BINS_A_PAGE)
        for page in np.flatnonzero(counts.any(1)):
            new = np.append(counts[page], mantissas[page])
            self.pages[int(page)] = self.pages[int(page)] + new if int(page) in self.pages else new
        self.minimum, self.maximum = min(self.minimum, float(low)), max(self.maximum, float(high))
        before = self.series.get(feed, (np.inf, -np.inf))
        self.series[feed] = (min(before[0], float(low)), max(before[1], float(high)))
        if self.channel_axis is not None and not bad and x.ndim > 0:
            self._update_channels(x, self.channel_axis)

    def _count_nonfinite(self, x: np.ndarray, counts: np.ndarray) -> int:
        pages = counts.reshape(PAGES, BINS_A_PAGE)
        bad = int(pages[[NONFINITE_EXPONENT, 256 + NONFINITE_EXPONENT]].sum())
        if bad:
            infinite = int(np.isinf(x).sum())
            self.inf_count += infinite
            self.nan_count += bad - infinite
        return bad

    def _update_channels(self, x: np.ndarray, axis: int) -> None:
        others = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
        low, high, total = x.min(others), x.max(others), x.sum(others, dtype=np.float64)
        if self.channels is None:
            self.channels = ChannelStatistics(low, high, ExactSum.zeros(len(low)))
        mine = self.channels
        if len(mine.minimum) != len(low):
            raise CalibrationError(
                f"the number of channels changes from {len(mine.minimum)} to {len(low)} along axis {axis}"
            )
        mine.minimum, mine.maximum = np.minimum(mine.minimum, low), np.maximum(mine.maximum, high)
        mine.total.add(np.atleast_1d(total))
        mine.count += x.size // len(low)

    def merge(self, other: TensorSketch) -> None:
        """Add what another sketch of the same tensor has seen."""
        for page, counts in other.pages.items():
            self.pages[page] = self.pages[page] + counts if page in self.pages else counts.copy()
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self.nan_count += other.nan_count
        self.inf_count += other.inf_count
        for feed, (low, high) in other.series.items():
            before = self.series.get(feed, (np.inf, -np.inf))
            self.series[feed] = (min(before[0], low), max(before[1], high))
        if other.channels is not None:
            if self.channels is None:
                zeros = ExactSum.zeros(len(other.channels.minimum))
                self.channels = ChannelStatistics(other.channels.minimum, other.channels.maximum, zeros)
            mine = self.channels
            mine.minimum = np.minimum(mine.minimum, other.channels.minimum)
            mine.maximum = np.maximum(mine.maximum, other.channels.maximum)
            mine.total.merge(other.channels.total)
            mine.count += other.channels.count

    def sum(self) -> float:
        """The sum of all finite elements, rounded once."""
        total = 0
        for page, numbers in self.pages.items():
            exponent = page % 256
            if exponent == NONFINITE_EXPONENT:
                continue
            mantissas = int(numbers[BINS_A_PAGE])
            if exponent:
                mantissas = (mantissas + (int(numbers[:BINS_A_PAGE].sum()) << 23)) << (exponent - 1)
            total += -mantissas if page >= 256 else mantissas
        return float(Fraction(total, 1 << 149))

    def histogram(self) -> Histogram:
        """The finite elements as bins in ascending order, clamped to [minimum, maximum]; ±0 and subnormals are 0."""
        lowers, uppers, counts = [], [], []
        zero = 0
        for page, numbers in self.pages.items():
            exponent, negative = page % 256, page >= 256
            if exponent == NONFINITE_EXPONENT:
                continue
            if exponent == 0:
                zero += int(numbers[:BINS_A_PAGE].sum())
                continue
            used = np.flatnonzero(numbers[:BINS_A_PAGE])
            bits = (exponent * BINS_A_PAGE + used).astype(np.uint32)
            near = (bits << 16).view(np.float32).astype(np.float64)
            far = np.ldexp(1.0 + (used + 1) / BINS_A_PAGE, exponent - 127)
            lowers.append(-far if negative else near)
            uppers.append(-near if negative else far)
            counts.append(numbers[used].astype(np.float64))
        if zero:
            lowers.append(np.zeros(1))
            uppers.append(np.zeros(1))
            counts.append(np.array([float(zero)]))
        if not lowers:
            return Histogram(np.zeros(0), np.zeros(0), np.zeros(0))
        lower, upper, count = np.concatenate(lowers), np.concatenate(uppers), np.concatenate(counts)
        order = np.argsort(lower, kind="stable")
        low, high = (0.0 if abs(end) < np.finfo(np.float32).tiny else end for end in (self.minimum, self.maximum))
        clamp = lambda edges: np.clip(edges[order], low, high)  # noqa: E731
        return Histogram(clamp(lower), clamp(upper), count[order])

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays that hold all of it; `from_arrays` is the way back."""
        ids = sorted(self.pages)
        feeds = sorted(self.series)
        arrays = {
            "page_ids": np.array(ids, np.int64),
            "pages": np.stack([self.pages[k] for k in ids]) if ids else np.zeros((0, BINS_A_PAGE + 1), np.int64),
            "counts": np.array([self.nan_count, self.inf_count, -1 if self.channel_axis is None else 1], np.int64),
            "range": np.array([self.minimum, self.maximum], np.float64),
            "series": np.array([[k, *self.series[k]] for k in feeds], np.float64).reshape(-1, 3),
            "axis": np.array([0 if self.channel_axis is None else self.channel_axis], np.int64),
        }
        if self.channels is not None:
            arrays["channel_range"] = np.stack([self.channels.minimum, self.channels.maximum])
            arrays["channel_limbs"] = self.channels.total.limbs
            arrays["channel_count"] = np.array([self.channels.count], np.int64)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> TensorSketch:
        channels = None
        if "channel_limbs" in arrays:
            low, high = arrays["channel_range"]
            total = ExactSum(arrays["channel_limbs"].copy())
            channels = ChannelStatistics(low, high, total, int(arrays["channel_count"][0]))
        nan_count, inf_count, has_axis = (int(v) for v in arrays["counts"])
        return cls(
            channel_axis=int(arrays["axis"][0]) if has_axis > 0 else None,
            pages={int(k): page.copy() for k, page in zip(arrays["page_ids"], arrays["pages"], strict=True)},
            minimum=float(arrays["range"][0]),
            maximum=float(arrays["range"][1]),
            nan_count=nan_count,
            inf_count=inf_count,
            series={int(k): (float(a), float(b)) for k, a, b in arrays["series"]},
            channels=channels,
        )


def fill(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts of `bits >> 16` (65,536,) and mantissa sums of `bits >> 23` (512,), int64, of a float32 bit pattern."""
    counts, mantissas = np.zeros(PAGES * BINS_A_PAGE, np.int64), np.zeros(PAGES, np.int64)
    kernels.fill(bits, counts, mantissas)
    return counts, mantissas


def fill_numpy(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `fill` gives, in plain numpy: the oracle of the compiled kernel."""
    counts = np.bincount(bits >> 16, minlength=PAGES * BINS_A_PAGE).astype(np.int64)
    mantissas = np.bincount(bits >> 23, weights=bits & 0x7FFFFF, minlength=PAGES).astype(np.int64)
    return counts, mantissas
