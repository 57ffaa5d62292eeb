"""Channel factors that make a tensor easier to quantize, and the weights on either side of it that take them in.

A tensor has one scale; a channel of small values next to one of large values is left with few codes. Dividing channel c by
s[c] where it is made and multiplying the weights that read it by s[c] changes nothing in float and fills every channel's
range (M. Nagel et al., "Data-free quantization through weight equalization and bias correction", 2019, section 4.1; here the
ranges are those of the activations). Factors are powers of two, so that the float model stays equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxq.graph import Constant, Graph, Node, Tensor, Variable, input_at, value
from onnxq.model import EQUALIZED
from onnxq.sketch import ChannelStatistics

EXPONENTS = (0.25, 0.5, 0.75, 1.0)  # of the range, tried in turn: how much of the disparity goes into the weights
SMALLEST = 2.0**-6  # a channel that was hardly used in calibration may be used more later


def conv_readers(graph: Graph, tensor: Tensor) -> list[Node] | None:
    """The Convs that read a tensor, where only Convs of constant weights read it, as their input; else None."""
    readers = graph.readers(tensor)
    if not readers or graph.is_captured(tensor):
        return None
    nodes = []
    for node, index in readers:
        if node is None or node.op != "Conv" or node.domain or index != 0 or not isinstance(node.inputs[1], Constant):
            return None
        nodes.append(node)
    return nodes


def has_constant_parameters(node: Node) -> bool:
    bias = input_at(node, 2)
    return isinstance(node.inputs[1], Constant) and (bias is None or isinstance(bias, Constant))


def choose_factors(
    statistics: ChannelStatistics, readers: Sequence[Node], *, before: ChannelStatistics | None = None, gain: float
) -> np.ndarray | None:
    """(C,) factors to divide the channels by: those of least predicted noise in the readers' outputs; None where none of
    them comes to less than `gain` of the noise that is there now.

    `statistics` are of the tensor that the readers read, `before` of one that is scaled and quantized along with it.
    """
    parts = [statistics, *([before] if before is not None else [])]
    largest = np.max([np.maximum(np.abs(p.minimum), np.abs(p.maximum)) for p in parts], axis=0).astype(np.float64)
    if not np.isfinite(largest).all() or largest.max() <= 0:
        return None
    seen = parts[0]
    square = np.square(seen.mean) + np.square((seen.maximum.astype(np.float64) - seen.minimum) / 6)
    share = np.where(largest > 0, largest, largest.max()) / largest.max()
    best, least = None, gain * _noise(np.ones(len(share)), square, parts, readers)
    for exponent in EXPONENTS:
        factors = np.exp2(np.rint(np.log2(np.maximum(share**exponent, SMALLEST))))
        noise = _noise(factors, square, parts, readers)
        if noise < least:
            best, least = factors, noise
    return best if best is not None and np.any(best != 1) else None


def _noise(factors: np.ndarray, square: np.ndarray, parts: Sequence[ChannelStatistics], readers: Sequence[Node]) -> float:
    """Expected squared error, summed over the readers' output channels, of 8-bit activations and 8-bit weights.

    A rounding error is uniform: its variance is step^2 / 12. `square` (C,) are the mean squares of the channels that are
    read; what a channel holds is taken to spread over six sigma.
    """
    steps = [
        (max(0.0, float((p.maximum / factors).max())) - min(0.0, float((p.minimum / factors).min()))) / 255 for p in parts
    ]
    total = 0.0
    for node in readers:
        weight = _by_group(node) * _spread(factors, node)  # (G, M / G, C / G, K)
        energy = np.square(weight).sum((1, 3)).reshape(-1)  # by input channel
        total += sum(step**2 / 12 for step in steps) * float(energy.sum())
        weight_steps = np.abs(weight).max((2, 3)) / 127  # (G, M / G)
        scaled = (square / factors**2).reshape(len(weight), -1).sum(1) * weight.shape[3]
        total += float((np.square(weight_steps).sum(1) / 12 * scaled).sum())
    return total


def _by_group(node: Node) -> np.ndarray:
    """A Conv's weight as float64 (groups, output channels of a group, input channels of a group, kernel positions)."""
    weight = np.asarray(value(node.inputs[1]), np.float64)
    groups = int(node.attrs.get("group", 1))
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _spread(factors: np.ndarray, node: Node) -> np.ndarray:
    """Factors by input channel in the shape of `_by_group`."""
    return factors.reshape(int(node.attrs.get("group", 1)), 1, -1, 1)


def scale_inputs(graph: Graph, node: Node, tensor: Variable, factors: np.ndarray) -> None:
    """Let a Conv read `tensor`, which is its input divided by the factors."""
    old = np.asarray(value(node.inputs[1]))
    scaled = (_by_group(node) * _spread(factors, node)).reshape(old.shape).astype(old.dtype)
    graph.set_input(node, 0, tensor)
    graph.set_input(node, 1, graph.constant(node.inputs[1].name, scaled))


def scale_outputs(graph: Graph, node: Node, factors: np.ndarray) -> Variable:
    """Let a Conv give its output divided by the factors, as a tensor of a new name, which is returned."""
    result = node.outputs[0]
    for index in (1, 2):
        old = value(input_at(node, index))
        if old is not None:
            shape = (-1, *[1] * (old.ndim - 1))
            graph.set_input(
                node, index, graph.constant(node.inputs[index].name, (old / factors.reshape(shape)).astype(old.dtype))
            )
    scaled = graph.variable(f"{result.name}{EQUALIZED}", result.dtype, result.shape)
    graph.rewire(node, outputs=[scaled])
    return scaled
