"""Pages: counts of the elements of arrays by their float32 bit pattern, and what one array adds to them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

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

    def count(self, kernel: Callable[..., int], *arguments: Any, sign: int) -> None:
        """Run a kernel that observes, and add what it counts, or take it away."""
        tables, touched = _scratch()
        used = kernel(*arguments, tables, touched, self._slots, self._rows, self._used, sign)
        while used < 0:
            self._used = len(self._rows)
            self._reserve(1)
            used = kernels.drain(tables, touched, self._slots, self._rows, self._used, sign)
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


def observe(x: np.ndarray | Blocks, axis: int | None, pages: Pages, sign: int = 1) -> Extent:
    """Add a float32 array's elements to the pages, or take them away, and see its extent along an axis, in one pass."""
    if isinstance(x, Blocks):
        return _observe_blocks(x, axis, pages, sign)
    channels = 1 if axis is None else x.shape[axis]
    keys, total = _no_keys(channels), np.zeros(0 if axis is None else channels)
    for part, is_rows in _parts(x, axis):
        kernel = kernels.observe_rows if is_rows else kernels.observe_columns
        pages.count(kernel, part, keys[0], keys[1], total, sign=sign)
    low, high = _as_float(keys)
    return Extent(low, high, total)


def _observe_blocks(x: Blocks, axis: int | None, pages: Pages, sign: int) -> Extent:
    """The extent is by channel (C,) in any case; sums only where axis is 1."""
    keys, total = _no_keys(x.shape[1]), np.zeros(0 if axis is None else x.shape[1])
    for part, first in _block_parts(x):
        pages.count(kernels.observe_blocks, part, first, keys[0], keys[1], total, sign=sign)
    low, high = _as_float(keys)
    return Extent(low, high, total)


def observe_numpy(x: np.ndarray | Blocks, axis: int | None, pages: Pages) -> Extent:
    """What `observe` does, in plain numpy: the oracle of the compiled kernels, additions in their order.

    A row is summed in eight lanes, element k in lane k % 8 from the start of each block of 4,096, then the lanes by halves.
    Of Blocks each lane is summed in 16 parts (of less than 256 rows: 8), row r in part r % 16 from the start of each 4,096
    elements, then the parts.
    """
    if isinstance(x, Blocks):
        return _observe_blocks_numpy(x, axis, pages)
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


def _observe_blocks_numpy(x: Blocks, axis: int | None, pages: Pages) -> Extent:
    plain, channels, lanes = x.plain(), x.shape[1], x.values.shape[2]
    pages.count_numpy(plain.reshape(-1).view(np.uint32))
    total, sums = np.zeros(channels), np.zeros(-(-channels // lanes) * lanes)
    for part, first in _block_parts(x):
        for k, block in enumerate(part):
            start = (first + k) % (len(sums) // lanes) * lanes
            for row in _in_parts(block, 16 if len(block) >= 256 else 8):
                sums[start : start + lanes] += row
    total += sums[:channels]
    low, high = plain.min((0, 2, 3)), plain.max((0, 2, 3))
    return Extent(low + np.float32(0), high + np.float32(0), total[: 0 if axis is None else channels])


def _in_parts(rows: np.ndarray, count: int) -> np.ndarray:
    parts = np.zeros((count, rows.shape[1]))
    for start in range(0, len(rows), 4096 // rows.shape[1]):
        for k, row in enumerate(rows[start : start + 4096 // rows.shape[1]]):
            parts[k % count] += row
    return parts


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


def _block_parts(x: Blocks) -> Iterator[tuple[np.ndarray, int]]:
    """The blocks, or parts of their rows, in pieces of at most MOST_AT_ONCE elements; and the number of the first block."""
    blocks, rows, lanes = x.values.shape
    step = MOST_AT_ONCE // (rows * lanes)
    if step:
        yield from ((x.values[k : k + step], k) for k in range(0, blocks, step))
        return
    step = max(1, MOST_AT_ONCE // lanes)
    for k in range(blocks):
        yield from ((x.values[k : k + 1, start : start + step], k) for start in range(0, rows, step))


def _no_keys(channels: int) -> np.ndarray:
    """Least and largest elements (2, channels) as ordered bits, before any element is seen."""
    keys = np.empty((2, channels), np.int32)
    keys[0], keys[1] = LAST_KEY, FIRST_KEY
    return keys


def _as_float(keys: np.ndarray) -> np.ndarray:
    """The elements that the kernels' ordered bits stand for; both zeros as 0."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(np.float32) + np.float32(0)
