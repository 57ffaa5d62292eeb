"""u8 x s8 kernels of x86 without VNNI: which weights can saturate them, and what that costs.

These kernels multiply pairs of neighbours along the reduction axis (vpmaddubsw) and add the two products in 16 bits, with
saturation. A pair of weights can saturate exactly if its sum lies outside [-128, 128]: 255 x 129 > 32767. Neighbours are
2j and 2j + 1 of the flattened reduction axis in the order (kernel position, input channel); depthwise kernels widen first
and never saturate.
"""

from __future__ import annotations

import numpy as np

from onnxq import kernels
from onnxq.numerics import Array

INT16 = np.iinfo(np.int16)
SAFE_SUM = 128


def can_saturate(codes: Array) -> Array:
    """Which pairs can: codes (..., K) int8 -> (..., ceil(K / 2)) bool."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), codes.dtype)], -1)
    return np.abs(codes[..., 0::2].astype(np.int32) + codes[..., 1::2]) > SAFE_SUM


def excess(x: Array, codes: Array) -> Array:
    """What saturation takes away from each accumulator: x (R, K) uint8, codes (N, K) int8 -> (R, N) int64.

    The kernel's accumulator is the exact one minus this.
    """
    flagged = can_saturate(codes)
    if x.shape[1] % 2:
        x = np.concatenate([x, np.zeros((len(x), 1), x.dtype)], 1)
        codes = np.concatenate([codes, np.zeros((len(codes), 1), codes.dtype)], 1)
    lost = np.zeros((len(codes), len(x)), np.int64)
    channel, pair = (np.ascontiguousarray(k) for k in np.nonzero(flagged))
    kernels.excess(np.ascontiguousarray(x.T, np.int32), np.ascontiguousarray(codes, np.int32), channel, pair, lost)
    return lost.T


def excess_numpy(x: Array, codes: Array) -> Array:
    """What `excess` gives, in plain numpy over all pairs: the oracle of the compiled kernel."""
    if x.shape[1] % 2:
        x = np.concatenate([x, np.zeros((len(x), 1), x.dtype)], 1)
        codes = np.concatenate([codes, np.zeros((len(codes), 1), codes.dtype)], 1)
    wide_x, wide_w = x.astype(np.int64), codes.astype(np.int64)
    sums = wide_x[:, None, 0::2] * wide_w[None, :, 0::2] + wide_x[:, None, 1::2] * wide_w[None, :, 1::2]
    return (sums - np.clip(sums, INT16.min, INT16.max)).sum(-1)
