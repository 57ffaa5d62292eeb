"""u8 x s8 kernels of x86 without VNNI: which weights can saturate them, and what that costs.

These kernels multiply pairs of neighbours along the reduction axis (vpmaddubsw) and add the two products in 16 bits, with
saturation. A pair of weights can saturate exactly if its sum lies outside [-128, 128]: 255 x 129 > 32767. Neighbours are
2j and 2j + 1 of the flattened reduction axis in the order (kernel position, input channel); depthwise kernels widen first
and never saturate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxq import kernels
from onnxq.graph import Node
from onnxq.numerics import Array

INT16 = np.iinfo(np.int16)
SAFE_SUM = 128


def rows_of_weight(node: Node, weight: Array) -> Array:
    """The weight of a Conv, MatMul or Gemm as (groups, output channels of a group, reduction), in the kernels' order."""
    if node.op == "Conv":
        groups = int(node.attrs.get("group", 1))
        last = np.moveaxis(weight, 1, -1)  # (M, kernel..., C / group)
        return last.reshape(groups, weight.shape[0] // groups, -1)
    if node.op == "Gemm" and node.attrs.get("transB", 0):
        return weight[None]
    return weight.T[None]


def is_depthwise(node: Node, weight: Array) -> bool:
    """Whether the Conv has one input and one output channel a group; any other group is a matrix product."""
    return node.op == "Conv" and weight.shape[1] == 1 and weight.shape[0] == int(node.attrs.get("group", 1))


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


def sample_rows(node: Node, x: Array, weight: Array, fill: float, count: int, rng: np.random.Generator) -> Array:
    """At most `count` rows of the matrix that the kernel multiplies: (groups, R, K), in the kernels' order.

    For a Conv a row is the patch under one output position, `fill` where it reaches into the padding.
    """
    if node.op != "Conv":
        flat = x.reshape(-1, x.shape[-1])
        chosen = rng.permutation(len(flat))[:count]
        return flat[np.sort(chosen)][None]
    groups, kernel = int(node.attrs.get("group", 1)), weight.shape[2:]
    strides, dilations, pads = geometry(node, x.shape[2:], kernel)
    rank = len(kernel)
    padded = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)], constant_values=fill)
    extents = [(padded.shape[2 + d] - dilations[d] * (kernel[d] - 1) - 1) // strides[d] + 1 for d in range(rank)]
    total = len(x) * int(np.prod(extents))
    chosen = np.sort(rng.permutation(total)[:count])
    batch, *position = np.unravel_index(chosen, (len(x), *extents))
    offsets = np.stack(np.meshgrid(*[np.arange(k) for k in kernel], indexing="ij")).reshape(rank, -1)
    places = tuple(
        position[d][:, None] * strides[d] + offsets[d][None] * dilations[d] for d in range(rank)
    )  # (R, kernel positions) each
    patches = padded[(batch[:, None], slice(None), *places)]  # (R, positions, C): advanced indices lead
    by_group = patches.reshape(len(chosen), offsets.shape[1], groups, -1)
    return by_group.transpose(2, 0, 1, 3).reshape(groups, len(chosen), -1)


def geometry(node: Node, spatial: Sequence[int], kernel: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """(strides, dilations, pads: the begins, then the ends) of a Conv, auto_pad worked out."""
    rank = len(kernel)
    strides = [int(s) for s in node.attrs.get("strides", [1] * rank)]
    dilations = [int(d) for d in node.attrs.get("dilations", [1] * rank)]
    auto = node.attrs.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        begins, ends = [], []
        for d in range(rank):
            reach = dilations[d] * (kernel[d] - 1) + 1
            total = max(0, (-(-spatial[d] // strides[d]) - 1) * strides[d] + reach - spatial[d])
            small, large = total // 2, total - total // 2
            begins.append(small if auto == "SAME_UPPER" else large)
            ends.append(large if auto == "SAME_UPPER" else small)
        return strides, dilations, [*begins, *ends]
    pads = [0] * (2 * rank) if auto == "VALID" else [int(p) for p in node.attrs.get("pads", [0] * (2 * rank))]
    return strides, dilations, pads
