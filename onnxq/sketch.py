"""TensorSketch: one-pass, range-free, mergeable statistics of a tensor.

Per tensor: exact count, minimum, maximum and sum, NaN and infinities counted apart, and a histogram of the float32 bit
pattern: `bits >> 16` (sign, 8 exponent and 7 mantissa bits) is the bin, so no range need be known before the data is seen
and the relative width of a bin is 2^-7. Bins are kept in pages of 128, one page for each sign and exponent. Sums are kept in
fixed point, see exactsum.py. Merging is addition of integers: for equal activations two sketches are equal bit for bit,
whatever the order, the grouping, the number of workers or the restarts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isfinite

import numpy as np

from onnxq.blocks import Blocks
from onnxq.errors import CalibrationError
from onnxq.exactsum import ExactSum
from onnxq.pages import BINS_A_PAGE, Extent, Pages, channels_of, observe

NONFINITE_EXPONENT = 255


@dataclass(frozen=True)
class Histogram:
    """Non-empty bins in ascending order: elements between lower[i] and upper[i], count[i] of them (float64)."""

    lower: np.ndarray
    upper: np.ndarray
    count: np.ndarray

    @property
    def centre(self) -> np.ndarray:
        return (self.lower + self.upper) / 2


@dataclass
class ChannelStatistics:
    """Minimum, maximum and exact sum of every channel along an axis: `minimum`, `maximum` (C,) float32."""

    minimum: np.ndarray
    maximum: np.ndarray
    total: ExactSum
    count: int = 0  # elements of one channel

    @classmethod
    def empty(cls, channels: int) -> ChannelStatistics:
        ends = np.full((2, channels), np.inf, np.float32)
        return cls(ends[0], -ends[1], ExactSum.zeros(channels))

    @property
    def mean(self) -> np.ndarray:
        return self.total.values() / max(1, self.count)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays that hold all of it; `from_arrays` is the way back."""
        return {
            "channel_range": np.stack([self.minimum, self.maximum]),
            "channel_totals": self.total.carried(),
            "channel_count": np.array([self.count], np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> ChannelStatistics:
        low, high = arrays["channel_range"]
        if not (low <= high).all():
            raise ValueError("channels have no range")
        return cls(low, high, ExactSum(arrays["channel_totals"].copy()), int(arrays["channel_count"][0]))

    def add(self, extent: Extent, size: int) -> None:
        """Add an array of so many elements, all of which are finite and in the total already."""
        extent.widen(self.minimum, self.maximum)
        self.count += size // len(self.minimum)


@dataclass(frozen=True)
class Look:
    """What was seen of an array when its elements were counted: least and largest, not finite if any is not."""

    extent: Extent | None  # by channel; None of an array without channels or elements
    low: float
    high: float
    size: int

    @property
    def is_finite(self) -> bool:
        return not self.size or (isfinite(self.low) and isfinite(self.high))


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
    total: ExactSum = field(default_factory=lambda: ExactSum.zeros(1))  # of finite elements that `channels` leaves out

    @property
    def count(self) -> int:
        """Finite elements seen."""
        return sum(int(row.sum()) for page, row in self.pages.items() if page % 256 != NONFINITE_EXPONENT)

    def along(self, axis: int, rank: int) -> ChannelStatistics | None:
        """The statistics by channel where the channels are those of an axis of a tensor of so many axes (0: not known)."""
        mine = self.channel_axis
        if mine is None or (mine != axis and (not rank or mine % rank != axis % rank)):
            return None
        return self.channels if self.channels is not None and self.channels.count else None  # empty after a drop

    def update(self, x: np.ndarray | Blocks, feed: int = 0) -> bool:
        """Add an array of any shape, seen in feed number `feed`; whether all of it is finite. Blocks have channel axis 1.

        float16 and float64 are counted as float32. NaN and infinities are counted apart and left out of all else; the
        statistics by channel then leave out the whole array.
        """
        x = self.countable(x)
        self.check(x)
        look = self.look(x)
        if look.is_finite:
            self.take(look, feed)
        else:
            self.take_finite(x, feed)
        return look.is_finite

    def countable(self, x: np.ndarray | Blocks) -> np.ndarray | Blocks:
        """The array as the kernels take it: in blocks of these channels, or contiguous and not marked as read-only."""
        if isinstance(x, Blocks):
            if self.channel_axis in (None, 1):
                return x
            x = x.plain()
        return np.require(x, np.float32, ["C", "W", "A"])

    def look(self, x: np.ndarray | Blocks, sign: int = 1) -> Look:
        """Count the elements of a countable array that was checked, which either is taken then, or dropped again."""
        if not x.size:
            return Look(None, np.inf, -np.inf, 0)
        extent = observe(x, self._axis_of(x), self.pages, self._total_for(x), sign)
        return Look(None if self._axis_of(x) is None else extent, *extent.ends(), x.size)

    def drop(self, x: np.ndarray | Blocks) -> Look:
        """Take away what was counted when the array was looked at, and see it again."""
        return self.look(x, -1)

    def take(self, look: Look, feed: int) -> None:
        """Add the rest that is known of an array that was looked at, all of which is finite."""
        if look.extent is not None and self.channels is not None:
            self.channels.add(look.extent, look.size)
        if look.size:
            self.reach(look.low, look.high, feed)

    def take_finite(self, x: np.ndarray | Blocks, feed: int) -> None:
        """The same of an array that has elements that are not finite: they are counted apart, and left out of all else."""
        observe(x, self._axis_of(x), Pages(), self._total_for(x), -1)
        self.reach(*self._count_nonfinite(x), feed)

    def reach(self, low: float, high: float, feed: int) -> None:
        """Take in the least and the largest finite element of an array of this feed."""
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        before = self.series.get(feed, (np.inf, -np.inf))
        self.series[feed] = (min(before[0], low), max(before[1], high))

    def reach_each(self, feeds: Sequence[int], ends: np.ndarray) -> None:
        """The same of several feeds, each of which is new to this sketch: ends (n, 2)."""
        if len(feeds):
            self.minimum, self.maximum = (
                min(self.minimum, float(ends[:, 0].min())),
                max(self.maximum, float(ends[:, 1].max())),
            )
            self.series.update(zip(feeds, map(tuple, ends.tolist()), strict=True))

    def _axis_of(self, x: np.ndarray | Blocks) -> int | None:
        return self.channel_axis if x.ndim else None

    def _total_for(self, x: np.ndarray | Blocks) -> ExactSum:
        """What the elements are added to: the sums of the channels if these are wanted, or the total."""
        if self._axis_of(x) is None:
            return self.total
        number = channels_of(x, self._axis_of(x))
        if self.channels is None or (not self.channels.count and len(self.channels.minimum) != number):
            self.channels = ChannelStatistics.empty(number)
        return self.channels.total

    def check(self, x: np.ndarray | Blocks, where: str = "") -> None:
        """Raise CalibrationError unless x has the axis of the channels, and as many of them as what was seen so far."""
        axis = self.channel_axis
        if axis is None or not x.ndim:
            return
        if not -x.ndim <= axis < x.ndim:
            raise CalibrationError(f"{where}there is no axis {axis} of channels: it is of rank {x.ndim}")
        if self.channels is None or not self.channels.count:
            return
        before, now = len(self.channels.minimum), x.shape[axis]
        if before != now:
            raise CalibrationError(f"{where}the number of channels changes from {before} to {now} along axis {axis}")

    def _count_nonfinite(self, x: np.ndarray | Blocks) -> tuple[float, float]:
        """Count what is not finite, and sum up the rest; the (minimum, maximum) of the rest."""
        plain = x.plain() if isinstance(x, Blocks) else np.asarray(x, np.float32)
        finite = plain[np.isfinite(plain)]
        infinite = int(np.isinf(plain).sum())
        self.inf_count += infinite
        self.nan_count += plain.size - finite.size - infinite
        if finite.size:
            observe(finite, None, Pages(), self.total)
        return float(finite.min(initial=np.inf)), float(finite.max(initial=-np.inf))

    def without_channels(self) -> TensorSketch:
        """The same, as if there had been no channel axis."""
        total = ExactSum(self.total.carried().copy())
        if self.channels is not None:
            total.merge(self.channels.total.of_all())
        return replace(self, channel_axis=None, channels=None, total=total)

    def copy(self) -> TensorSketch:
        return TensorSketch.from_arrays(self.to_arrays())

    def merge(self, other: TensorSketch) -> None:
        """Add what another sketch of the same tensor has seen."""
        self.pages.merge(other.pages)
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self.nan_count += other.nan_count
        self.inf_count += other.inf_count
        self.total.merge(other.total)
        for feed, (low, high) in other.series.items():
            before = self.series.get(feed, (np.inf, -np.inf))
            self.series[feed] = (min(before[0], low), max(before[1], high))
        if other.channels is not None and other.channels.count:
            if self.channels is None or not self.channels.count:
                self.channels = ChannelStatistics.empty(len(other.channels.minimum))
            mine = self.channels
            if len(mine.minimum) != len(other.channels.minimum):
                raise CalibrationError(
                    f"the number of channels changes from {len(mine.minimum)} to {len(other.channels.minimum)} along axis "
                    f"{self.channel_axis}"
                )
            mine.minimum = np.minimum(mine.minimum, other.channels.minimum)
            mine.maximum = np.maximum(mine.maximum, other.channels.maximum)
            mine.total.merge(other.channels.total)
            mine.count += other.channels.count

    def sum(self) -> float:
        """The sum of all finite elements, rounded once."""
        return float(self.without_channels().total.values()[0])

    def histogram(self) -> Histogram:
        """The finite elements as bins in ascending order, clamped to [minimum, maximum]; ±0 and subnormals are 0."""
        lowers, uppers, counts = [], [], []
        zero = 0
        for page, numbers in self.pages.items():
            exponent, negative = page % 256, page >= 256
            if exponent == NONFINITE_EXPONENT:
                continue
            if exponent == 0:
                zero += int(numbers.sum())
                continue
            used = np.flatnonzero(numbers)
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
            "pages": np.stack([row for _, row in pages]) if pages else np.zeros((0, BINS_A_PAGE), np.int64),
            "counts": np.array([self.nan_count, self.inf_count, -1 if self.channel_axis is None else 1], np.int64),
            "range": np.array([self.minimum, self.maximum], np.float64),
            "series": np.array([[k, *self.series[k]] for k in feeds], np.float64).reshape(-1, 3),
            "total": self.total.carried(),
            "axis": np.array([0 if self.channel_axis is None else self.channel_axis], np.int64),
        }
        if self.channels is not None and self.channels.count:
            arrays |= self.channels.to_arrays()
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> TensorSketch:
        channels = ChannelStatistics.from_arrays(arrays) if "channel_totals" in arrays else None
        nan_count, inf_count, has_axis = (int(v) for v in arrays["counts"])
        pages, ids, rows = Pages(), arrays["page_ids"], arrays["pages"]
        if rows.shape != (ids.size, BINS_A_PAGE) or len(np.unique(ids)) != ids.size:
            raise ValueError("the pages of a sketch are not one row each")
        low, high = (float(v) for v in arrays["range"])
        if rows.min(initial=0) < 0 or not (low <= high or (low, high) == (np.inf, -np.inf)):
            raise ValueError("a sketch has negative counts, or no range")
        pages.add(ids, rows)
        return cls(
            channel_axis=int(arrays["axis"][0]) if has_axis > 0 else None,
            pages=pages,
            minimum=low,
            maximum=high,
            nan_count=nan_count,
            inf_count=inf_count,
            series={int(k): (float(a), float(b)) for k, a, b in arrays["series"]},
            channels=channels,
            total=ExactSum(arrays["total"].copy()),
        )
