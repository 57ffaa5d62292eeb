"""TensorSketch: one-pass, range-free, mergeable statistics of a tensor.

Per tensor: exact count, minimum, maximum and sum, NaN and infinities counted apart, and a histogram of the float32 bit
pattern: `bits >> 16` (sign, 8 exponent and 7 mantissa bits) is the bin, so no range need be known before the data is seen
and the relative width of a bin is 2^-7. Bins are kept in pages of 128, one page for each sign and exponent; next to its
128 counts a page keeps the integer sum of the mantissas of its elements, from which the sum of all elements follows
exactly. Merging is addition of integers: for equal activations two sketches are equal bit for bit, whatever the order,
the grouping, the number of workers or the restarts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from math import isfinite

import numpy as np

from onnxq import kernels
from onnxq.errors import CalibrationError

BINS_A_PAGE = 128
PAGES = 512
NONFINITE_EXPONENT = 255
LIMBS, LIMB_BITS, LOWEST_BIT = 14, 32, -200  # a fixed-point number of 448 bits: multiples of 2^-200 up to 2^247
MOST_UNCARRIED = 4096  # additions of less than 2^50 to a limb that an int64 holds
FIRST_KEY, LAST_KEY = -(1 << 31), (1 << 31) - 1
MOST_AT_ONCE = 1 << 22  # elements whose counts fit 24 bits, and the sums of their low halves 40


State = tuple[float, float, tuple[np.ndarray, np.ndarray] | None]


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
        self.limbs = limbs  # (channels, LIMBS) int64; once carried, all but the top limb in [0, 2^32)
        self._uncarried = 0

    @classmethod
    def zeros(cls, channels: int) -> ExactSum:
        return cls(np.zeros((channels, LIMBS), np.int64))

    def add(self, values: np.ndarray) -> None:
        """Add one float64 to each channel; digits below 2^-200 are dropped."""
        kernels.exact_add(self.limbs, np.ascontiguousarray(values, np.float64), LOWEST_BIT)
        self._uncarried += 1
        if self._uncarried == MOST_UNCARRIED:
            self.carry()

    def add_numpy(self, values: np.ndarray) -> None:
        """What `add` does, in plain numpy: the oracle of the compiled kernel."""
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
        self.carry()

    def merge(self, other: ExactSum) -> None:
        other.carry()
        self.carry()
        self.limbs += other.limbs
        self.carry()

    def carry(self) -> None:
        """Bring the limbs into the one form that a number has."""
        self._uncarried = 0
        for k in range(LIMBS - 1):
            carry = self.limbs[:, k] >> LIMB_BITS
            self.limbs[:, k] -= carry << LIMB_BITS
            self.limbs[:, k + 1] += carry

    def values(self) -> np.ndarray:
        """The sums, each rounded once to float64."""
        self.carry()
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


class Pages:
    """Counts of the bins that were touched: a row of 128 counts and the mantissa sum for each page, int64."""

    def __init__(self) -> None:
        self._slots = np.full(PAGES, -1, np.int16)
        self._rows = np.zeros((8, BINS_A_PAGE + 1), np.int64)
        self._used = 0

    def items(self) -> Iterator[tuple[int, np.ndarray]]:
        """(page, its row), by page; pages of which all was taken away again are left out."""
        for page in np.flatnonzero(self._slots >= 0):
            row = self._rows[self._slots[page]]
            if row.any():
                yield int(page), row

    def add(self, page: int, row: np.ndarray) -> None:
        if self._slots[page] < 0:
            self._reserve(1)
            self._slots[page] = self._used
            self._used += 1
        self._rows[self._slots[page]] += row

    def drain(self, tables: np.ndarray, touched: np.ndarray, sign: int) -> None:
        """Add the tables of a kernel, which are zero then, or take them away."""
        while (used := kernels.drain(tables, touched, self._slots, self._rows, self._used, sign)) < 0:
            self._used = len(self._rows)
            self._reserve(1)
        self._used = used

    def count_numpy(self, bits: np.ndarray) -> None:
        """Add the elements of a float32 bit pattern, in plain numpy: the oracle of the compiled kernels."""
        counts = np.bincount(bits >> 16, minlength=PAGES * BINS_A_PAGE).astype(np.int64).reshape(PAGES, BINS_A_PAGE)
        mantissas = np.bincount(bits >> 23, weights=bits & 0x7FFFFF, minlength=PAGES).astype(np.int64)
        for page in np.flatnonzero(counts.any(1)):
            self.add(int(page), np.append(counts[page], mantissas[page]))

    def _reserve(self, more: int) -> None:
        while self._used + more > len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])


_local = threading.local()


def _scratch() -> tuple[np.ndarray, np.ndarray]:
    """The tables of this thread, which are all zero between two uses."""
    if not hasattr(_local, "tables"):
        _local.tables = np.zeros((4, PAGES * BINS_A_PAGE), np.uint64), np.zeros(PAGES, np.uint8)
    return _local.tables


@dataclass(frozen=True)
class Extent:
    """What one array adds but for its counts: least and largest elements and sums, by channel (C,); no sums without."""

    low: np.ndarray  # float32
    high: np.ndarray
    total: np.ndarray  # float64

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the largest element; one of them is not finite if any element is not."""
        return float(self.low.min()), float(self.high.max())


def observe(x: np.ndarray, axis: int | None, pages: Pages, sign: int = 1) -> Extent:
    """Add a float32 array's elements to the pages, or take them away, and see its extent along an axis, in one pass."""
    channels = 1 if axis is None else x.shape[axis]
    keys = np.empty((2, channels), np.int32)
    keys[0], keys[1] = LAST_KEY, FIRST_KEY
    total, scratch = np.zeros(0 if axis is None else channels), _scratch()
    for part, is_rows in _parts(x, axis):
        kernel = kernels.observe_rows if is_rows else kernels.observe_columns
        kernel(part, keys[0], keys[1], total, *scratch)
        pages.drain(*scratch, sign)
    low, high = _as_float(keys)
    return Extent(low, high, total)


def observe_numpy(x: np.ndarray, axis: int | None, pages: Pages) -> Extent:
    """What `observe` does, in plain numpy: the oracle of the compiled kernels, additions in their order.

    A row is summed in eight lanes, element k in lane k % 8 from the start of each block of 4,096, then the lanes by halves.
    """
    channels = 1 if axis is None else x.shape[axis]
    low, high, total = np.full(channels, np.inf, np.float32), np.full(channels, -np.inf, np.float32), np.zeros(channels)
    pages.count_numpy(x.reshape(-1).view(np.uint32))
    for part, is_rows in _parts(x, axis):
        for k, row in enumerate(part):
            c = k % channels if is_rows else slice(None)
            low[c], high[c] = (
                np.minimum(low[c], row.min() if is_rows else row),
                np.maximum(high[c], row.max() if is_rows else row),
            )
            total[c] += _sum_in_lanes(row) if is_rows else row.astype(np.float64)
    return Extent(low + np.float32(0), high + np.float32(0), total[: 0 if axis is None else channels])


def _sum_in_lanes(row: np.ndarray) -> float:
    lanes = np.zeros(8)
    for start in range(0, row.size, 4096):
        block = row[start : start + 4096].astype(np.float64)
        for k in range(0, block.size, 8):
            lanes[: len(block[k : k + 8])] += block[k : k + 8]
    halves = lanes[:4] + lanes[4:]
    return float((halves[0] + halves[2]) + (halves[1] + halves[3]))


def _parts(x: np.ndarray, axis: int | None) -> Iterator[tuple[np.ndarray, bool]]:
    """The array as matrices of at most MOST_AT_ONCE elements: rows by channel in turn (True), or columns by channel."""
    channels = 1 if axis is None else x.shape[axis]
    inner = x.size if axis is None else int(np.prod(x.shape[axis % x.ndim + 1 :]))
    if axis is not None and inner == 1:
        matrix, step = x.reshape(-1, channels), max(1, MOST_AT_ONCE // channels)
        yield from ((matrix[k : k + step], False) for k in range(0, len(matrix), step))
        return
    matrix, step = x.reshape(-1, inner), MOST_AT_ONCE // inner // channels * channels
    if step:
        yield from ((matrix[k : k + step], True) for k in range(0, len(matrix), step))
    elif axis is None:
        flat = x.reshape(-1)
        yield from ((flat[None, k : k + MOST_AT_ONCE], True) for k in range(0, flat.size, MOST_AT_ONCE))
    else:  # a block of rows of all channels is too large: channels are moved last, a slow way for rare tensors
        yield from _parts(np.ascontiguousarray(np.moveaxis(x, axis, -1)), -1)


def _as_float(keys: np.ndarray) -> np.ndarray:
    """The elements that the kernels' ordered bits stand for; both zeros as 0."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(np.float32) + np.float32(0)


@dataclass
class TensorSketch:
    """Statistics of one tensor over any number of feeds. `channel_axis` asks for per-channel statistics too."""

    channel_axis: int | None = None
    pages: Pages = field(default_factory=Pages)  # by sign and exponent
    minimum: float = np.inf
    maximum: float = -np.inf
    nan_count: int = 0
    inf_count: int = 0
    series: dict[int, tuple[float, float]] = field(default_factory=dict)  # feed index -> (min, max) of that feed
    channels: ChannelStatistics | None = None

    @property
    def count(self) -> int:
        """Finite elements seen."""
        return sum(int(row[:BINS_A_PAGE].sum()) for page, row in self.pages.items() if page % 256 != NONFINITE_EXPONENT)

    def update(self, x: np.ndarray, feed: int = 0) -> bool:
        """Add an array of any shape, seen in feed number `feed`; whether all of it is finite.

        float16 and float64 are counted as float32. NaN and infinities are counted apart and left out of all else; the
        statistics by channel then leave out the whole array.
        """
        x = np.ascontiguousarray(x, np.float32)
        if x.size == 0:
            return True
        axis = self.channel_axis if x.ndim else None
        self.check(x)
        extent = observe(x, axis, self.pages)
        low, high = extent.ends
        is_finite = isfinite(low) and isfinite(high)
        if not is_finite:
            low, high = self._count_nonfinite(x, 1)
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        before = self.series.get(feed, (np.inf, -np.inf))
        self.series[feed] = (min(before[0], low), max(before[1], high))
        if axis is not None and is_finite:
            self._update_channels(extent, x.size)
        return is_finite

    def state(self) -> State:
        """What `forget` needs to take the next array away again."""
        channels = self.channels
        extremes = None if channels is None else (channels.minimum, channels.maximum)
        return self.minimum, self.maximum, extremes

    def forget(self, x: np.ndarray, feed: int, before: State) -> None:
        """Take away an array that was added last, and alone in its feed; `before` is the state that it was added to."""
        x = np.ascontiguousarray(x, np.float32)
        if x.size == 0:
            return
        axis = self.channel_axis if x.ndim else None
        extent = observe(x, axis, self.pages, -1)
        is_finite = all(map(isfinite, extent.ends))
        if not is_finite:
            self._count_nonfinite(x, -1)
        self.minimum, self.maximum, extremes = before
        del self.series[feed]
        if axis is not None and is_finite and self.channels is not None:
            if extremes is None:
                self.channels = None
                return
            self.channels.minimum, self.channels.maximum = extremes
            self.channels.total.add(-extent.total)
            self.channels.count -= x.size // len(extent.low)

    def check(self, x: np.ndarray, where: str = "") -> None:
        """Raise CalibrationError unless x has as many channels as what was seen so far."""
        if self.channel_axis is None or self.channels is None or not x.ndim:
            return
        before, now = len(self.channels.minimum), x.shape[self.channel_axis]
        if before != now:
            raise CalibrationError(
                f"{where}the number of channels changes from {before} to {now} along axis {self.channel_axis}"
            )

    def _count_nonfinite(self, x: np.ndarray, sign: int) -> tuple[float, float]:
        """Count what is not finite; the (minimum, maximum) of the rest."""
        finite = x[np.isfinite(x)]
        infinite = int(np.isinf(x).sum())
        self.inf_count += sign * infinite
        self.nan_count += sign * (x.size - finite.size - infinite)
        return float(finite.min(initial=np.inf)), float(finite.max(initial=-np.inf))

    def _update_channels(self, extent: Extent, size: int) -> None:
        if self.channels is None:
            self.channels = ChannelStatistics(extent.low, extent.high, ExactSum.zeros(len(extent.low)))
        mine = self.channels
        mine.minimum, mine.maximum = np.minimum(mine.minimum, extent.low), np.maximum(mine.maximum, extent.high)
        mine.total.add(extent.total)
        mine.count += size // len(extent.low)

    def copy(self) -> TensorSketch:
        return TensorSketch.from_arrays(self.to_arrays())

    def merge(self, other: TensorSketch) -> None:
        """Add what another sketch of the same tensor has seen."""
        for page, row in other.pages.items():
            self.pages.add(page, row)
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
        pages = list(self.pages.items())
        feeds = sorted(self.series)
        arrays = {
            "page_ids": np.array([page for page, _ in pages], np.int64),
            "pages": np.stack([row for _, row in pages]) if pages else np.zeros((0, BINS_A_PAGE + 1), np.int64),
            "counts": np.array([self.nan_count, self.inf_count, -1 if self.channel_axis is None else 1], np.int64),
            "range": np.array([self.minimum, self.maximum], np.float64),
            "series": np.array([[k, *self.series[k]] for k in feeds], np.float64).reshape(-1, 3),
            "axis": np.array([0 if self.channel_axis is None else self.channel_axis], np.int64),
        }
        if self.channels is not None:
            arrays["channel_range"] = np.stack([self.channels.minimum, self.channels.maximum])
            self.channels.total.carry()
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
        pages = Pages()
        for page, row in zip(arrays["page_ids"], arrays["pages"], strict=True):
            pages.add(int(page), row)
        return cls(
            channel_axis=int(arrays["axis"][0]) if has_axis > 0 else None,
            pages=pages,
            minimum=float(arrays["range"][0]),
            maximum=float(arrays["range"][1]),
            nan_count=nan_count,
            inf_count=inf_count,
            series={int(k): (float(a), float(b)) for k, a, b in arrays["series"]},
            channels=channels,
        )
