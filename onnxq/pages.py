"""Pages: counts of the elements of arrays by their float32 bit pattern, and what one array adds to them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from onnxq import kernels
from onnxq.blocks import Blocks
from onnxq.compiled import MOST_AT_ONCE, TABLES
from onnxq.exactsum import ExactSum

BINS_A_PAGE = 128
PAGES = 512
FIRST_ROWS = 32  # of pages that there is room for; most tensors touch fewer
MOST_LANES = 1 << 16  # of an array with its channels last; wider ones are taken as blocks
FIRST_KEY, LAST_KEY = -(1 << 31), (1 << 31) - 1


class Pages:
    """Counts of the bins that were touched: a row of 128 for each page, int64."""

    def __init__(self) -> None:
        self._slots = np.full(PAGES, -1, np.int16)
        self._rows = np.zeros((FIRST_ROWS, BINS_A_PAGE), np.int64)
        self._used = 0

    def items(self) -> Iterator[tuple[int, np.ndarray]]:
        """(page, its row), by page; pages of which all was taken away again are left out."""
        for page in np.flatnonzero(self._slots >= 0):
            row = self._rows[self._slots[page]]
            if row.any():
                yield int(page), row

    def add(self, pages: np.ndarray, rows: np.ndarray) -> None:
        """Add rows (n, 128) to these pages (n,), each of which is there once."""
        new = pages[self._slots[pages] < 0]
        self._reserve(len(new))
        self._slots[new] = np.arange(self._used, self._used + len(new))
        self._used += len(new)
        self._rows[self._slots[pages]] += rows

    def merge(self, other: Pages) -> None:
        pages = np.flatnonzero(other._slots >= 0)
        self.add(pages, other._rows[other._slots[pages]])

    def count(self, blocks: np.ndarray, first: int, extent: Extent, total: np.ndarray, sign: int, *, is_new: bool) -> None:
        """Add the elements of some blocks, or take them away, and see how far they reach; `is_new` if they are the first."""
        tables, seen = _scratch()
        mine = (self._slots, self._rows, self._used)
        used = kernels.observe(blocks, first, is_new, extent.low, extent.high, total, tables, seen, *mine, sign)
        while used < 0:
            self.grow()
            used = kernels.drain(tables, seen, self._slots, self._rows, self._used, sign)
        self._used = used

    def memory(self) -> tuple[np.ndarray, np.ndarray, int]:
        """What `kernels.drain` takes: the slots of the pages, the rows, and how many of them are used."""
        return self._slots, self._rows, self._used

    def use(self, rows: int) -> None:
        """Take over what was added to the memory: so many rows are used now."""
        self._used = rows

    def grow(self) -> None:
        """All rows are used, and more are wanted."""
        self._used = len(self._rows)
        self._reserve(1)

    def count_numpy(self, bits: np.ndarray) -> None:
        """Add the elements of a float32 bit pattern, in plain numpy: the oracle of the compiled kernels."""
        counts = np.bincount(bits >> 16, minlength=PAGES * BINS_A_PAGE).astype(np.int64).reshape(PAGES, BINS_A_PAGE)
        pages = np.flatnonzero(counts.any(1))
        self.add(pages, counts[pages])

    def _reserve(self, more: int) -> None:
        while self._used + more > len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])


_local = threading.local()


def _scratch() -> tuple[np.ndarray, np.ndarray]:
    """The tables of this thread, which are all zero between two uses, and how far what they hold reaches."""
    if not hasattr(_local, "tables"):
        _local.tables = new_scratch()
    return _local.tables


def new_scratch() -> tuple[np.ndarray, np.ndarray]:
    apart = 256  # so that the same bin of two tables is not in the same set of the cache
    tables = np.zeros((TABLES, PAGES * BINS_A_PAGE + apart), np.uint32)
    return tables, np.array([LAST_KEY, FIRST_KEY, (1 << 32) - 1], np.int64)


@dataclass(frozen=True)
class Extent:
    """How far an array reaches, by channel (C,): int32 ordered bits, in the order of the floats that they stand for."""

    low: np.ndarray
    high: np.ndarray

    def ends(self) -> tuple[float, float]:
        """The least and the largest element; one of them is not finite if any element is not."""
        return kernels.ends(self.low, self.high)

    def widen(self, minimum: np.ndarray, maximum: np.ndarray) -> None:
        """Let minimum and maximum (C,) float32 take in the elements."""
        kernels.widen(self.low, self.high, minimum, maximum)


def channels_of(x: np.ndarray | Blocks, axis: int | None) -> int:
    """How many numbers `observe` gives: one for each channel of an axis, or one for all. Blocks have axis 1."""
    return 1 if axis is None else x.shape[axis]


def observe(x: np.ndarray | Blocks, axis: int | None, pages: Pages, total: ExactSum, sign: int = 1) -> Extent:
    """Add a float32 array's elements to the pages and the total, or take them away, and see its extent, in one pass.

    The total and the extent are by channel, see `channels_of`. Where an element is not finite the total is without meaning
    until the array is taken away again.
    """
    blocks, channels = _in_blocks(x, axis)
    ends = np.empty((2, channels), np.int32)
    extent, is_new = Extent(ends[0], ends[1]), True
    for part, first in _parts(blocks):
        pages.count(part, first, extent, total.open(), sign, is_new=is_new)
        is_new = False
    return extent


def observe_numpy(x: np.ndarray | Blocks, axis: int | None, pages: Pages, total: ExactSum) -> Extent:
    """What `observe` does, in plain numpy: the oracle of the compiled kernel."""
    plain = x.plain() if isinstance(x, Blocks) else x
    pages.count_numpy(plain.reshape(-1).view(np.uint32))
    rows = plain.reshape(-1, 1) if axis is None else np.moveaxis(plain, axis, -1).reshape(-1, plain.shape[axis])
    total.add_numpy(rows.astype(np.float64))
    keys = _as_keys(np.ascontiguousarray(rows))
    return Extent(keys.min(0), keys.max(0))


def _in_blocks(x: np.ndarray | Blocks, axis: int | None) -> tuple[np.ndarray, int]:
    """The array as blocks (n, rows, lanes), see Blocks, and how many channels it has; copied only if it is very wide."""
    if axis is None:
        values = x if isinstance(x, np.ndarray) else x.plain() if x.shape[1] % x.values.shape[2] else x.values
        return values.reshape(1, -1, 1), 1
    if isinstance(x, Blocks):
        return x.values, x.shape[1]
    channels, inner = x.shape[axis], int(np.prod(x.shape[axis % x.ndim + 1 :]))
    if inner > 1:
        return x.reshape(-1, inner, 1), channels
    if channels > MOST_LANES:
        wide = np.pad(x.reshape(-1, channels), [(0, 0), (0, -channels % MOST_LANES)])
        return wide.reshape(-1, 1, MOST_LANES), channels
    return x.reshape(1, -1, channels), channels


def _parts(blocks: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """The blocks, or parts of their rows, in pieces of at most MOST_AT_ONCE elements; and the number of the first block."""
    count, rows, lanes = blocks.shape
    step = MOST_AT_ONCE // (rows * lanes)
    if step:
        yield from ((blocks[k : k + step], k) for k in range(0, count, step))
        return
    step = max(1, MOST_AT_ONCE // lanes)
    for k in range(count):
        yield from ((blocks[k : k + 1, start : start + step], k) for start in range(0, rows, step))


def _as_keys(values: np.ndarray) -> np.ndarray:
    """float32 as ordered bits, integers in the order of the floats."""
    bits = values.view(np.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
