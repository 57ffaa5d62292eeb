"""Rounding: integer codes of weights for which a layer's outputs are nearest, and not each weight by itself.

A layer gives W x. With codes that stand for V its outputs are off by (W - V) x, of squared length tr (W - V) C (W - V)^T
where C = E[x x^T] over what the layer reads. Weights that read alike inputs can make up for each other's rounding errors:
those of a kernel that looks for edges read nearly the same values, and their errors must cancel as the weights do.

The codes are improved one at a time, each to the best there is with all others fixed, over and over: cyclic coordinate
descent (K. Behdin et al., "QuantEase: Optimization-based Quantization for Language Models", 2023, section 3), started from
rounding to nearest and never further than a step in a sweep, so that the error falls with every change.

Everything is by group, as a grouped Conv has it: weights (G, M, K), rows (G, R, K), moments (G, K, K).
"""

from __future__ import annotations

import numpy as np

from onnxq import kernels
from onnxq.numerics import Array

SWEEPS = 4
LEAST_SHARE, ALIKE = 0.05, 4  # see shrunk
BLOCK = 128  # columns that are improved before the others hear of it; even, for pairs to stay together


def moments(x: Array, *, centred: bool) -> Array:
    """C of rows x (G, R, K): (G, K, K) float32. `centred` leaves the mean out, where a bias takes in what it makes."""
    x = np.asarray(x, np.float32)
    if centred:
        x = x - x.mean(1, keepdims=True)
    return x.transpose(0, 2, 1) @ x / np.float32(max(1, x.shape[1]))


def shrunk(moments: Array, rows: int) -> Array:
    """The moments that so many rows told, mixed with those of inputs that are all alike and independent.

    These are K / (K + rows / 4) of the mixture, for rows of one sample tell nearly the same, and never less than a
    twentieth: inputs that were quiet in calibration may be heard later.
    """
    width = moments.shape[1]
    share, diagonal = np.float32(max(LEAST_SHARE, width / (width + rows / ALIKE))), np.arange(width)
    found = moments * (1 - share)
    found[:, diagonal, diagonal] += share * moments[:, diagonal, diagonal].mean(1, keepdims=True)
    return np.ascontiguousarray(found)


def improve(
    weight: Array, codes: Array, scale: Array, zero: Array, limits: tuple[int, int], moments: Array, *, pair_limit: int = 0
) -> Array:
    """Codes (G, M, K) int32 of no larger error than the given ones, for weight (G, M, K), scale and zero point (G, M).

    `limits` are the least and the largest code; `pair_limit` bounds the sums of neighbours (2j, 2j + 1), about the zero
    point, or leaves them where they are beyond it.
    """
    scale, zero = np.array(scale, np.float32, order="C"), np.asarray(zero, np.int32)
    shifted = np.asarray(codes, np.int32) - zero[:, :, None]
    low, high = (np.ascontiguousarray(limit - zero, np.int32) for limit in limits)
    gradient = (shifted * scale[:, :, None] - weight).astype(np.float32) @ moments
    width = codes.shape[2]
    for _ in range(SWEEPS):
        changed = 0
        for start in range(0, width, BLOCK):
            part = slice(start, min(width, start + BLOCK))
            some, slope = shifted[:, :, part].copy(), gradient[:, :, part].copy()
            change = np.zeros(some.shape, np.float32)
            here = kernels.round_block(some, slope, moments[:, part, part].copy(), change, scale, low, high, pair_limit)
            if here:
                changed += here
                shifted[:, :, part] = some
                gradient += change @ moments[:, part]
        if not changed:
            break
    return shifted + zero[:, :, None]


def error(weight: Array, rounded: Array, moments: Array) -> float:
    """tr (W - V) C (W - V)^T over all groups: the squared error of all outputs together."""
    off = np.asarray(weight - rounded, np.float32)
    return float(np.vdot(off, (off @ moments).astype(np.float64)))
