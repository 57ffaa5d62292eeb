"""Pages: counts of the elements of arrays by their float32 bit pattern, and what one array adds to them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from onnxq import kernels
from onnxq.blocks import Blocks

BINS_A_PAGE = 128
PAGES = 512
FIRST_KEY, LAST_KEY = -(1 << 31), (1 << 31) - 1
MOST_AT_ONCE = 1 << 22  # elements whose counts fit 24 bits, and the sums of their low halves 40


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

    def count(self, blocks: np.ndarray, first: int, extent: Extent, sign: int) -> None:
        """Add the elements of some blocks, or take them away, and see how far they reach."""
        tables, seen = _scratch()
        reached = (extent.low, extent.high, extent.total)
        used = kernels.observe(blocks, first, *reached, tables, seen, self._slots, self._rows, self._used, sign)
        while used < 0:
            self._used = len(self._rows)
            self._reserve(1)
            used = kernels.drain(tables, seen, self._slots, self._rows, self._used, sign)
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
    """The tables of this thread, which are all zero between two uses, and how far what they hold reaches."""
    if not hasattr(_local, "tables"):
        apart = 64  # so that the same bin of two tables is not in the same set of the cache
        _local.tables = (
            np.zeros((4, PAGES * BINS_A_PAGE + apart), np.uint64),
            np.array([LAST_KEY, FIRST_KEY, (1 << 32) - 1], np.int64),
        )
    return _local.tables


@dataclass(frozen=True)
class Extent:
    """How far an array reaches, by channel (C,), and its sums (C,), or (0,) without.

    Least and largest elements are ordered bits: int32 in the order of the floats that they stand for.
    """

    low: np.ndarray
    high: np.ndarray
    total: np.ndarray  # float64

    @classmethod
    def empty(cls, channels: int, *, has_total: bool) -> Extent:
        low, high = np.full(channels, LAST_KEY, np.int32), np.full(channels, FIRST_KEY, np.int32)
        return cls(low, high, np.zeros(channels if has_total else 0))

    def ends(self) -> tuple[float, float]:
        """The least and the largest element; one of them is not finite if any element is not."""
        return kernels.ends(self.low, self.high)

    def widen(self, minimum: np.ndarray, maximum: np.ndarray) -> None:
        """Let minimum and maximum (C,) float32 take in the elements."""
        kernels.widen(self.low, self.high, minimum, maximum)


def observe(x: np.ndarray | Blocks, axis: int | None, pages: Pages, sign: int = 1) -> Extent:
    """Add a float32 array's elements to the pages, or take them away, and see its extent along an axis, in one pass.

    The extent of Blocks is by channel in any case.
    """
    blocks, channels = _in_blocks(x, axis)
    extent = Extent.empty(channels, has_total=axis is not None)
    for part, first in _parts(blocks):
        pages.count(part, first, extent, sign)
    return extent


def observe_numpy(x: np.ndarray | Blocks, axis: int | None, pages: Pages) -> Extent:
    """What `observe` does, in plain numpy: the oracle of the compiled kernel, additions in its order.

    A block is summed in tiles of a few rows, eight tiles by halves at a time; what is left over, tile by tile; at the end
    the rows of the tile, one after another.
    """
    plain = x.plain() if isinstance(x, Blocks) else x
    pages.count_numpy(plain.reshape(-1).view(np.uint32))
    blocks, channels = _in_blocks(x, axis)
    lanes = blocks.shape[2]
    apart = -(-channels // lanes)
    low, high, total = np.full((apart, lanes), LAST_KEY), np.full((apart, lanes), FIRST_KEY), np.zeros((apart, lanes))
    for part, first in _parts(blocks):
        for k, block in enumerate(part, first):
            at, keys = k % apart, _as_keys(block)
            low[at], high[at] = np.minimum(low[at], keys.min(0)), np.maximum(high[at], keys.max(0))
            for row in _in_tiles(block):
                total[at] += row
    low, high, total = (each.reshape(-1)[:channels] for each in (low, high, total))
    return Extent(low, high, total[: 0 if axis is None else channels])


def _in_tiles(block: np.ndarray) -> np.ndarray:
    """Sums of the rows of a block (n, lanes) -> (together, lanes) float64, those of a tile apart."""
    rows, lanes = block.shape
    together = max(1, (64 if rows * lanes >= 1024 else 16) // lanes)
    tile, flat = together * lanes, block.reshape(-1)
    step, sums = 8 * tile * max(1, 4096 // tile), np.zeros(tile)
    for start in range(0, flat.size, step):
        values = flat[start : start + step].astype(np.float64)
        whole = values.size // (8 * tile) * (8 * tile)
        for a, b, c, d, e, f, g, h in values[:whole].reshape(-1, 8, tile):
            sums += ((a + b) + (c + d)) + ((e + f) + (g + h))
        for k in range(whole, values.size, tile):
            sums[: len(values[k : k + tile])] += values[k : k + tile]
    return sums.reshape(together, lanes)


def _in_blocks(x: np.ndarray | Blocks, axis: int | None) -> tuple[np.ndarray, int]:
    """The array as blocks (n, rows, lanes), see Blocks, and how many channels it has; the array itself is not copied."""
    if isinstance(x, Blocks):
        return x.values, x.shape[1]
    if axis is None:
        return x.reshape(1, -1, 1), 1
    channels, inner = x.shape[axis], int(np.prod(x.shape[axis % x.ndim + 1 :]))
    return (x.reshape(1, -1, channels) if inner == 1 else x.reshape(-1, inner, 1)), channels


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
