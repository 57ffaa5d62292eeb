"""Tally: memory in which the runtime's own threads count the tensors of a model while it runs.

The op `count_input` of compiled/op.py reads a tensor as soon as it is made, while it is in the cache, and counts it
into sketches by the addresses of their arrays, which a tally holds. Nothing is kept of the tensor, and Python is not asked;
but for what is out of the ordinary: elements that are no float32, the first array of a tensor, another number of channels,
more exponents than there are pages for.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq import kernels
from onnxq.blocks import Blocks
from onnxq.capi import array_at
from onnxq.compiled.records import FAILED, FINE, GROW, HEADER, RECORD
from onnxq.equalization import Scaled
from onnxq.errors import CalibrationError
from onnxq.pages import new_scratch
from onnxq.sketch import ChannelStatistics, Look, TensorSketch

ASK = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 6)
WORD = {name: k for k, name in enumerate(RECORD.names or ())}
MOST_TAKEN = 64  # samples whose extremes are held before the sketches are told of them
Visit = Callable[[int, np.ndarray | Blocks], None]  # the number of a reading, and the tensor


@dataclass(frozen=True)
class Reading:
    """A sketch of a tensor of the model: its name, what it is scaled by, and the channels of the tensor if in blocks."""

    sketch: str
    scaled: Scaled | None
    channels: int | None


class Tally:
    """What one run of the model counts into, before it is taken into the sketches or taken away again."""

    def __init__(self, sketches: Mapping[str, TensorSketch], readings: Sequence[Reading], lanes: int) -> None:
        self.readings, self.sketches = readings, [sketches[r.sketch] for r in readings]
        self._lanes = lanes
        self._records = np.zeros(len(readings), RECORD)
        self._words = self._records.view(np.int64).reshape(len(readings), len(WORD))  # the same, for Python to write faster
        self._extents = [np.empty((2, 0), np.int32)] * len(readings)
        self._factors = [None if r.scaled is None else np.array(r.scaled.factors, np.float32) for r in readings]
        self._ends = np.empty((len(readings), 2))
        self._looks: dict[int, Look] = {}  # of arrays that Python took in, by reading
        self._taken: list[tuple[int, np.ndarray, np.ndarray]] = []  # sample number, and sizes and ends of the readings
        self._visit: Visit | None = None
        self._where = ""
        self._error: BaseException | None = None
        self.is_lost = False  # whether it is unknown what the last run counted
        self._scratch, self._ask = new_scratch(), _asking(self)
        self._header = np.zeros(1, HEADER)
        tables, seen = self._scratch
        for name, address in (
            ("records", self._records.ctypes.data), ("tables", tables.ctypes.data), ("stride", tables.shape[1]),
            ("seen", seen.ctypes.data), ("ask", ctypes.cast(self._ask, ctypes.c_void_p).value),
        ):  # fmt: skip
            self._header[name] = address
        for k, reading in enumerate(readings):
            self._foresee(self.sketches[k], reading)
            self._bind(k)

    @property
    def place(self) -> np.ndarray:
        """What the op reads as its second input, (1,) int64."""
        return np.array([self._header.ctypes.data], np.int64)

    def begin(self, where: str, visit: Visit | None = None) -> None:
        """Before a run of a sample: count what it makes, or, where a function is given, show that every array instead."""
        self._where = where
        self._header["asks_always"], self._header["failed"] = visit is not None, FINE
        self._visit, self._error = visit, None
        if visit is None:
            self._records["size"] = 0
            self._looks.clear()

    def end(self) -> None:
        """After a run. Raises what a function that was shown an array raised, and CalibrationError where counting failed."""
        for sketch, used in zip(self.sketches, self._records["used"].tolist(), strict=True):
            sketch.pages.use(used)
        if self._error is None and self._header["failed"][0] != FINE:
            self.is_lost = True
            raise CalibrationError(f"a tensor of {self._where} could not be counted, probably for lack of memory")
        if self._error is not None:
            raise self._error

    def spoilt(self) -> list[int]:
        """The readings that have elements that are not finite."""
        found = [k for k, look in self._looks.items() if not look.is_finite]
        if not kernels.ends_of(self._records, self._ends):
            counted = self._records["size"] > 0
            found += np.flatnonzero(counted & ~np.isfinite(self._ends).all(1)).tolist()
        return sorted(found)

    def counted(self) -> dict[int, tuple[float, float, int]]:
        """Least element, largest and number of elements of each reading that has any."""
        kernels.ends_of(self._records, self._ends)
        sizes = self._records["size"]
        found = {int(k): (*self._ends[k].tolist(), int(sizes[k])) for k in np.flatnonzero(sizes)}
        return {**found, **{k: (look.low, look.high, look.size) for k, look in self._looks.items() if look.size}}

    def take(self, index: int, spoilt: Collection[int]) -> None:
        """Take what was counted into the sketches, as sample number `index`, but for the spoilt readings.

        They are told of its extremes later, of those of many samples at once; see `settle`.
        """
        self._records["size"][list(spoilt)] = 0
        kernels.widen_by(self._records)
        self._taken.append((index, self._records["size"].copy(), self._ends.copy()))
        if len(self._taken) == MOST_TAKEN:
            self.settle()
        for k, look in self._looks.items():
            if k not in spoilt:
                self.sketches[k].take(look, index)

    def settle(self) -> None:
        """Tell the sketches of all that was taken; before, they lack its extremes."""
        if not self._taken:
            return
        numbers, sizes, ends = zip(*self._taken, strict=True)
        self._taken = []
        counts, extremes = np.stack(sizes, 1), np.stack(ends, 1)  # (readings, samples), with the two ends
        for sketch, count, extreme in zip(self.sketches, counts, extremes, strict=True):
            sketch.reach_each([numbers[k] for k in np.flatnonzero(count)], extreme[count > 0])
            if sketch.channel_axis is not None and sketch.channels is not None:
                sketch.channels.count += int((count // len(sketch.channels.minimum)).sum())

    @staticmethod
    def _foresee(sketch: TensorSketch, reading: Reading) -> None:
        """Make room for the channels where their number is known, so that Python is not asked for the first array."""
        if sketch.channel_axis == 1 and sketch.channels is None and reading.channels is not None:
            sketch.channels = ChannelStatistics.empty(reading.channels)

    def _bind(self, k: int) -> None:
        """Let a record hold the addresses of a sketch's arrays."""
        sketch, reading, words = self.sketches[k], self.readings[k], self._words[k]
        by_channel = sketch.channel_axis is not None
        channels, total = 1, sketch.total
        minimum = maximum = 0
        if by_channel:
            known = sketch.channels
            channels = 0 if known is None else len(known.minimum)
            if known is not None:
                total = known.total
                minimum, maximum = known.minimum.ctypes.data, known.maximum.ctypes.data
        if self._extents[k].shape[1] != channels:
            self._extents[k] = np.empty((2, channels), np.int32)
        low, high = self._extents[k]
        if reading.channels is not None and sketch.channel_axis not in (None, 1):
            channels = -1  # such an array is brought into the layout of the model first, by Python
        factors = self._factors[k]
        slots, rows, used = sketch.pages.memory()
        for name, number in (
            ("by_channel", by_channel), ("axis", sketch.channel_axis or 0), ("blocked", reading.channels or 0),
            ("channels", channels), ("low", low.ctypes.data), ("high", high.ctypes.data),
            ("minimum", minimum), ("maximum", maximum), ("total", total.memory.ctypes.data),
            ("factors", 0 if factors is None else factors.ctypes.data), ("number", 0 if factors is None else len(factors)),
            ("slots", slots.ctypes.data), ("rows", rows.ctypes.data), ("capacity", len(rows)), ("used", used),
        ):  # fmt: skip
            words[WORD[name]] = number

    def asked(self, what: int, k: int, kind: int, data: int, rank: int, dims: int) -> None:
        """Do what compiled code asks for: `what`, for reading k, of the array at an address."""
        try:
            pages = self.sketches[k].pages
            pages.use(int(self._records["used"][k]))
            if what == GROW:
                self.is_lost = True  # until it is done: what is counted already is not in the pages
                pages.grow()
                self._bind(k)
                self.is_lost = False
                return
            shape = tuple((ctypes.c_int64 * rank).from_address(dims)) if rank else ()
            found = array_at(data, kind, shape)
            if found is None or found.dtype.kind != "f":
                return
            reading = self.readings[k]
            array = found if reading.channels is None else Blocks.of(found, reading.channels, self._lanes)
            array = array if reading.scaled is None else reading.scaled.value(array)
            (self._visit or self._look)(k, self.sketches[k].countable(array))
            self._bind(k)
        except BaseException as error:  # Ctrl-C too: nothing can be raised through the runtime
            self._error = error
            self._header["failed"] = FAILED

    def _look(self, k: int, array: np.ndarray | Blocks) -> None:
        self.settle()  # what is checked hangs on what was seen before
        self.sketches[k].check(array, f"at {self._where}, tensor {self.readings[k].sketch}: ")
        self.is_lost = True  # until it is done: part of the array may be counted
        self._looks[k] = self.sketches[k].look(array)
        self.is_lost = False


def _asking(tally: Tally) -> Any:
    """The C function by which compiled code asks a tally; it does not keep it alive, as it is one of its parts."""
    known = weakref.ref(tally)

    def ask(*what: int) -> None:
        found = known()
        if found is not None:
            found.asked(*what)

    return ASK(ask)
