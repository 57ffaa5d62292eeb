"""Rows: a layer as the matrix product that its kernel computes, and rows of what goes in, sampled from real activations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxq import runtime
from onnxq.graph import Node, value
from onnxq.model import Model
from onnxq.numerics import Array


def rows_of_weight(node: Node, weight: Array) -> Array:
    """The weight of a Conv, MatMul or Gemm as (groups, output channels of a group, reduction), in the kernels' order."""
    if node.op == "Conv":
        groups = int(node.attrs.get("group", 1))
        last = np.moveaxis(weight, 1, -1)  # (M, kernel..., C / group)
        return last.reshape(groups, weight.shape[0] // groups, -1)
    if node.op == "Gemm" and node.attrs.get("transB", 0):
        return weight[None]
    return weight.T[None]


def matrix_of_rows(node: Node, rows: Array, shape: Sequence[int]) -> Array:
    """A weight of this shape, the rows of which are these: the way back from `rows_of_weight`."""
    if node.op == "Conv":
        return np.moveaxis(rows.reshape(shape[0], *shape[2:], shape[1]), -1, 1)
    return rows[0] if node.op == "Gemm" and node.attrs.get("transB", 0) else rows[0].T


def is_depthwise(node: Node, weight: Array) -> bool:
    """Whether the Conv has one input and one output channel a group; any other group is a matrix product."""
    return node.op == "Conv" and weight.shape[1] == 1 and weight.shape[0] == int(node.attrs.get("group", 1))


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
    positions, channels = offsets.shape[1], weight.shape[1]  # spelled out, for there may be no rows
    by_group = patches.reshape(len(chosen), positions, groups, channels)
    return by_group.transpose(2, 0, 1, 3).reshape(groups, len(chosen), positions * channels)


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


def rows_of_inputs(model: Model, nodes: Sequence[Node], counts: Sequence[int], seed: int = 0) -> dict[str, Array]:
    """About `counts` rows of what each node reads in float, (groups, R, K) by node, as many from each probe feed."""
    assert model.calibration is not None
    rng = np.random.default_rng(seed)
    names = dict.fromkeys(n.inputs[0].name for n in nodes)
    session = runtime.Session(runtime.exposed(model.graph.to_stored_proto(), names), threads=model.threads)
    probes = model.calibration.probes
    found: dict[str, list[Array]] = {n.name: [] for n in nodes}
    for feed in probes:
        values = {**feed, **session.run(feed)}
        for node, count in zip(nodes, counts, strict=True):
            x, weight = values[node.inputs[0].name], np.asarray(value(node.inputs[1]))
            found[node.name].append(sample_rows(node, x, weight, 0.0, -(-count // len(probes)), rng))
    return {name: np.concatenate(parts, 1) for name, parts in found.items()}
