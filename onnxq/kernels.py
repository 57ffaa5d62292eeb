"""The compiled loops. Each has a plain numpy form where it is used, which tests hold it to.

They are loaded with the first kernel that runs, see native.py. Arrays are contiguous.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxq.compiled import NO_MEMORY
from onnxq.native import loop

Array = np.ndarray


def observe(x: Array, first: int, is_new: bool, low: Array, high: Array, total: Array, *pages: Any) -> int:
    """One pass over x (blocks, n, lanes) float32, see blocks.Blocks and pages.observe_numpy for what it adds up.

    `first` is the number of its first block; low and high (C,) int32 are the least and largest elements as ordered bits,
    and begin anew if `is_new`; to total (limbs, C) int64, an ExactSum, the sums are added. `pages` are the arguments of
    `drain`, which ends it. Its tables (4, 65,536 or more) uint32 count by `bits >> 16`, so x has at most 2^30 elements;
    neighbours go to different tables, so that a run of one value does not wait for its last addition. seen (3,) int64
    tells what the tables hold: least and largest element as ordered bits, and the least magnitude but zero, less one.

    An element plus 1.5 * 2^52 units is a float64 the bits of which, as an integer, count the whole units in the element;
    such integers are added, without a rounding that depends on the order. The unit is for elements somewhat larger than
    those before; where some are larger still, the sum is taken again in a larger unit. Where the least elements have digits
    below the unit, what is below is added again in smaller units.
    """
    used = loop("observe")(x, first, is_new, low, high, total, *pages)
    if used == NO_MEMORY:
        raise MemoryError("there is no memory to count a tensor in")
    return used


def drain(tables: Array, seen: Array, slots: Array, rows: Array, used: int, sign: int) -> int:
    """Add the tables' content, times sign, to rows (pages, 128) int64 by slots (512,) of the pages, and clear them.

    Gives the number of pages that are used then, or -1 where there are too few rows for all; a second call does the rest.
    """
    return loop("drain")(tables, seen, slots, rows, used, sign)


def ends(low: Array, high: Array) -> tuple[float, float]:
    """The least and the largest of all elements, from those of each channel as ordered bits; both zeros are 0."""
    found = np.empty(2)
    loop("ends")(low, high, found)
    return found[0].item(), found[1].item()


def widen(low: Array, high: Array, minimum: Array, maximum: Array) -> None:
    """Let minimum and maximum (C,) float32 take in elements, the least and largest of which are given as ordered bits."""
    loop("widen")(low, high, minimum, maximum)


def count_input() -> int:
    """The address of a C function of (kernel, context) that counts the input of an op of onnxruntime's, see tally.py."""
    return loop("count_input").address


def ends_of(records: Array, ends: Array) -> bool:
    """Write into ends (n, 2) float64 the least and the largest element of what each of n records counted; is all finite?

    Records that counted nothing get (inf, -inf).
    """
    return bool(loop("ends_of")(records, ends))


def widen_by(records: Array) -> None:
    """Let the minimum and maximum of the channels of each record that counted something take in what it counted."""
    loop("widen_by")(records)


def carry(limbs: Array) -> None:
    """Bring fixed-point numbers, limbs (n, channels) int64 of 32 bits, into the one form that each has."""
    loop("carry")(limbs)


def excess(x: Array, codes: Array, channel: Array, pair: Array, lost: Array) -> None:
    """Add to lost (N, R) what 16-bit saturation takes from each pair: x (K, R) and codes (N, K) int32."""
    loop("excess")(x, codes, channel, pair, lost)


def squared_error(lower: Array, upper: Array, count: Array, rmin: Array, rmax: Array, levels: int) -> Array:
    """observers.squared_error over bins (B,) for candidate ranges (n,), all float64 -> (n,)."""
    found = np.empty(rmin.size)
    loop("squared_error")(lower, upper, count, rmin, rmax, levels, found)
    return found


def energies(rows: Array) -> Array:
    """The sum of squares and the largest magnitude of each row of rows (n, k) float32 -> (2, n) float64."""
    found = np.empty((2, len(rows)))
    loop("energies")(rows, found)
    return found


def rounding_errors(rows: Array, scale: Array, low: Array, high: Array, total: Array) -> None:
    """Squared error of each row of rows (C, n), rounded to scale (C,) x whole numbers of low to high (C,), to total (C,).

    All float32, but float64 for the total.
    """
    loop("rounding_errors")(rows, scale, low, high, total)


def round_block(
    codes: Array, gradient: Array, moments: Array, change: Array, scale: Array, low: Array, high: Array, pair_limit: int
) -> int:
    """One sweep over some columns of rounding.improve: how many of codes (G, M, B) int32 were changed, each by one step.

    gradient (G, M, B) is error times moments, moments (G, B, B), change (G, M, B) takes what is added to the weights, scale
    (G, M), all float32; low and high (G, M) int32 are the least and largest codes; pair_limit, if not 0, is the largest
    magnitude that the sum of codes 2j and 2j + 1 may get.
    """
    return loop("round_block")(codes, gradient, moments, change, scale, low, high, pair_limit)
