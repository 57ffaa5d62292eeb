"""Channel factors that make a tensor easier to quantize, and the weights on either side of it that take them in.

A tensor has one scale; a channel of small values next to one of large values is left with few codes. Dividing channel c by
s[c] where it is made and multiplying the weights that read it by s[c] changes nothing in float and fills every channel's
range (M. Nagel et al., "Data-free quantization through weight equalization and bias correction", 2019, section 4.1; here the
ranges are those of the activations). Factors are powers of two, so that the float model stays equal to the last bit.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from onnxq import kernels
from onnxq.blocks import Blocks
from onnxq.graph import Constant, Graph, Node, Tensor, Variable, input_at, value
from onnxq.passmanager import Pass
from onnxq.sketch import ChannelStatistics

EXPONENTS = (0.25, 0.5, 0.75, 1.0)  # of the range, tried in turn: how much of the disparity goes into the weights
EQUALIZED = "_equalized"  # at the end of the name of a tensor with its channels evened out
FAINT = 1e-3  # of the mean signal, below which a channel counts less
SMALLEST = 2.0**-6  # a channel that was hardly used in calibration may be used more later


@dataclass(frozen=True)
class Scaled:
    """A tensor that need not be computed: it is another one, `of`, with its channels (axis 1) times `factors` (C,).

    The factors are powers of two, so it is that to the last bit.
    """

    of: str
    factors: tuple[float, ...]

    @property
    def divisors(self) -> tuple[float, ...]:
        """What the other one's channels are divided by."""
        return tuple(1 / factor for factor in self.factors)

    def value(self, other: np.ndarray | Blocks) -> np.ndarray | Blocks:
        """It, where the other one is this."""
        factors = np.array(self.factors, np.float32)
        if isinstance(other, Blocks):
            return other.times(factors)
        return other * factors.reshape(-1, *[1] * (other.ndim - 2))


@dataclass(frozen=True)
class Gate:
    """A tensor that an op makes of another one, `of`; the model as it was has no such tensor."""

    of: str
    op: str
    attrs: Mapping[str, Any]


class Equalizing(Pass):
    """A pass that evens out channels, by Model.channels.

    It tells in Model.scaled and Model.gates how the tensors that it makes are had from those that were there before.
    """

    @abstractmethod
    def looked_at(self, graph: Graph) -> set[str]:
        """The tensors whose statistics it may ask for."""


def scaled_by(tensor: Tensor, factors: np.ndarray) -> Scaled:
    """What a tensor is with its channels divided by these factors, powers of two."""
    return Scaled(tensor.name, tuple((1 / factors).tolist()))


def known_as(name: str) -> str:
    """The name by which the user knows a tensor: equalizing gives it another."""
    return name.removesuffix(EQUALIZED)


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


def choose_factors(
    parts: Sequence[ChannelStatistics], readings: Sequence[tuple[Node, ChannelStatistics]], *, gain: float
) -> np.ndarray | None:
    """(C,) factors to divide the channels by: those of least predicted noise in the readers' outputs; None where none of
    them comes to less than `gain` of the noise that is there now.

    `parts` are of the tensors that are scaled and quantized, `readings` the Convs that read one of them, and which.
    """
    extents = [np.maximum(np.abs(p.minimum), np.abs(p.maximum)).astype(np.float64) for p in parts]
    if not all(np.isfinite(e).all() and e.max() > 0 for e in extents):
        return None
    share = np.max([e / e.max() for e in extents], axis=0)  # a channel needs the most of its range in one of them
    share = np.where(share > 0, share, 1.0)
    squares = {id(s): np.square(s.mean) + np.square((s.maximum.astype(np.float64) - s.minimum) / 6) for _, s in readings}
    read = [_Reading.of(node, squares[id(s)]) for node, s in readings]
    best, least = None, gain * _noise(np.ones(len(share)), parts, read)
    for exponent in EXPONENTS:
        factors = np.exp2(np.rint(np.log2(np.maximum(share**exponent, SMALLEST))))
        noise = _noise(factors, parts, read)
        if noise < least:
            best, least = factors, noise
    return best if best is not None and np.any(best != 1) else None


@dataclass(frozen=True)
class _Reading:
    """What the noise in a Conv's outputs hangs on, its kernel positions taken together: arrays (G, M / G, C / G).

    `energy` is the sum of squares of the weights, `peak` their largest magnitude, `square` (G, 1, C / G) the mean square of
    what they are multiplied with, and `signal` (G, M / G) the expected square of the outputs.
    """

    energy: np.ndarray
    peak: np.ndarray
    square: np.ndarray
    signal: np.ndarray
    positions: int

    @classmethod
    def of(cls, node: Node, square: np.ndarray) -> _Reading:
        weight = np.ascontiguousarray(value(node.inputs[1]), np.float32)
        groups, makers, positions = int(node.attrs.get("group", 1)), weight.shape[0], prod(weight.shape[2:])
        energy, peak = kernels.energies(weight.reshape(-1, positions)).reshape(2, groups, makers // groups, -1)
        by_group = square.reshape(groups, 1, -1)
        return cls(energy, peak, by_group, (energy * by_group).sum(2), positions)


def _noise(factors: np.ndarray, parts: Sequence[ChannelStatistics], readings: Sequence[_Reading]) -> float:
    """Expected noise over signal of the readers' output channels, of 8-bit activations and 8-bit weights, on average.

    Over signal, as every channel counts: what comes after brings them to one size again. A rounding error is uniform: its
    variance is step^2 / 12. What a channel holds is taken to spread over six sigma.
    """
    steps = [
        (max(0.0, float((p.maximum / factors).max())) - min(0.0, float((p.minimum / factors).min()))) / 255 for p in parts
    ]
    variance, total = sum(step**2 / 12 for step in steps), 0.0
    for r in readings:
        by_channel = factors.reshape(r.square.shape)
        weight_variance = np.square((r.peak * by_channel).max(2) / 127) / 12
        read = (r.square / by_channel**2).sum(2) * r.positions
        noise = variance * (r.energy * by_channel**2).sum(2) + weight_variance * read
        total += float((noise / (r.signal + FAINT * r.signal.mean() + np.finfo(np.float64).tiny)).mean())
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


def scale_outputs(graph: Graph, node: Node, factors: np.ndarray, scaled: Variable | None = None) -> Variable:
    """Let a Conv give its output divided by the factors, as `scaled` or a tensor of a new name, which is returned."""
    result = node.outputs[0]
    for index in (1, 2):
        old = value(input_at(node, index))
        if old is not None:
            shape = (-1, *[1] * (old.ndim - 1))
            graph.set_input(
                node, index, graph.constant(node.inputs[index].name, (old / factors.reshape(shape)).astype(old.dtype))
            )
    if scaled is None:
        scaled = evened(graph, result)
    graph.rewire(node, outputs=[scaled])
    return scaled


def evened(graph: Graph, tensor: Tensor) -> Variable:
    """A tensor for the same with its channels evened out, under a name that tells so."""
    return graph.variable(f"{tensor.name}{EQUALIZED}", tensor.dtype, tensor.shape)
