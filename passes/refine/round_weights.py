"""round-weights"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.biases import add_to_bias, mean_output, means_of_input
from onnxq.graph import Constant, Node, value
from onnxq.model import Dynamic, Model, Observed
from onnxq.numerics import Array, QuantParams, dequantize, fake_quantize, quantize
from onnxq.passmanager import Pass
from onnxq.rounding import error, improve, moments, shrunk
from onnxq.rows import is_depthwise, matrix_of_rows, rows_of_inputs, rows_of_weight
from onnxq.saturation import SAFE_SUM

HELD_OUT = 4  # one in so many rows tells whether the others told the truth
FEWEST_ROWS, ROWS_A_WEIGHT = 512, 16
LEAST_SHARE = 1 / 16  # of a weight's elements, in rows; fewer tell nothing about rows that were held out
MOST_ELEMENTS = 1 << 25  # of rows that are held at once: 128 MB
WORTH = 0.97  # of the error before, on those rows


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Round each weight so that the layer's outputs are nearest, and not each element by itself.

    Given:   %1 = Conv(%0, W, B)       params of %0 and W; rows of %0 from the probe feeds of the calibration
    Result:  %1 = Conv(%0, W', B')     W' on the grid of W's params, each element at most a few steps from W (rounding.py);
             B' = B + (W - W') E[x] where there is a bias
    Refused: a row of the weight has more than `largest` elements; on rows that were held out the outputs come no nearer;
             its parameters came with the model; several layers read the weight.

    Where kernels saturate, no pair of codes comes to a sum outside [-128, 128] that was not outside before.
    """

    name: ClassVar[str] = "round-weights"
    rows: int = 4096
    largest: int = 4608

    def apply(self, model: Model) -> int:
        if model.calibration is None or not model.calibration.probes:
            return 0
        layers = [n for n in model.compute_nodes() if self._is_for(model, n)]
        if not layers:
            return 0
        for some in _together([n for n in layers if self._key(model, n) not in model.rounded], self.rows):
            rows = rows_of_inputs(model, [n for n, _ in some], [count for _, count in some])
            for node, _ in some:
                rounded = self._round(model, node, rows.pop(node.name))
                model.rounded[self._key(model, node)] = value(node.inputs[1]), rounded
        return sum(_write(model, node, model.rounded[self._key(model, node)][1]) for node in layers)

    def _key(self, model: Model, node: Node) -> tuple[object, ...]:
        """Of what the codes depend on. Arrays are never written in place, and the table keeps those of the weights alive."""
        params, x = model.params_of(node.inputs[1].name), _input_params(model, node)
        grids = [p and (p.scale.tobytes(), p.zero_point.tobytes(), p.type) for p in (params, x)]
        return (node.name, id(value(node.inputs[1])), *grids, means_of_input(model, node) is not None)

    def _is_for(self, model: Model, node: Node) -> bool:
        weight = value(node.inputs[1])
        if (node.name, 1) not in model.quantized_inputs or weight is None or (node.op != "Conv" and weight.ndim != 2):
            return False
        if not isinstance(model.specs.get(node.inputs[1].name), Observed) or node.inputs[1].name in model.trained:
            return False
        if rows_of_weight(node, weight).shape[2] > self.largest or _is_shared(model, node):
            model.refuse(node, "its weight is too large, or others read it too")
            return False
        return True

    def _round(self, model: Model, node: Node, x: Array) -> Array | None:
        """The codes of the weight; None where that is best left to rounding to nearest."""
        weight = np.asarray(value(node.inputs[1]), np.float32)
        params, read = model.params_of(node.inputs[1].name), _input_params(model, node)
        centred = means_of_input(model, node) is not None
        if read is not None:
            x = fake_quantize(x, read)
        x = x[:, np.isfinite(x).all((0, 2))]
        largest = np.abs(x).max(initial=0.0)
        if not largest or x.shape[1] < LEAST_SHARE * x.shape[2]:
            return None
        x = x / largest  # the squares of large activations would not fit
        limit = SAFE_SUM if model.target.saturates and params.type.signed and not is_depthwise(node, weight) else 0
        matrix, codes = rows_of_weight(node, weight), rows_of_weight(node, quantize(weight, params).astype(np.int32))
        scale, zero = (_by_row(v, matrix.shape[:2]) for v in (params.scale, params.zero_point.astype(np.int32)))
        end = x.shape[1] - x.shape[1] // HELD_OUT  # rows of one feed are alike: those held out are of other feeds
        seen, unseen = x[:, :end], x[:, end:] if end < x.shape[1] else x
        told = shrunk(moments(seen, centred=centred), seen.shape[1])
        better = improve(
            matrix, codes, scale, zero, (params.type.qmin, params.type.qmax), told,
            pair_limit=limit,
        )  # fmt: skip
        check = moments(unseen, centred=centred)
        before, after = (error(matrix, (c - zero[..., None]) * scale[..., None], check) for c in (codes, better))
        if not after <= WORTH * before:  # nor where one of them is no number
            return None
        return matrix_of_rows(node, better, weight.shape).astype(params.type.dtype)


def _together(layers: Sequence[Node], most: int) -> Iterator[list[tuple[Node, int]]]:
    """The layers with the rows that each needs, as many as fit in memory at once."""
    some: list[tuple[Node, int]] = []
    size = 0
    for node in layers:
        groups, _, width = rows_of_weight(node, np.asarray(value(node.inputs[1]))).shape
        count = min(most, max(FEWEST_ROWS, ROWS_A_WEIGHT * width))
        if some and size + groups * count * width > MOST_ELEMENTS:
            yield some
            some, size = [], 0
        some.append((node, count))
        size += groups * count * width
    if some:
        yield some


def _input_params(model: Model, node: Node) -> QuantParams | None:
    """What the layer's input is rounded with; None where it is float, or has other parameters at each run."""
    name = node.inputs[0].name
    if (node.name, 0) not in model.quantized_inputs or isinstance(model.specs.get(name), Dynamic):
        return None
    return model.params_of(name)


def _is_shared(model: Model, node: Node) -> bool:
    return len(model.readers(node.inputs[1])) > 1 or model.graph.is_captured(node.inputs[1])


def _by_row(values: Array, shape: Sequence[int]) -> Array:
    return np.broadcast_to(values, int(np.prod(shape))).reshape(shape) if values.ndim == 0 else values.reshape(shape)


def _write(model: Model, node: Node, codes: Array | None) -> int:
    """Give the layer the rounded weight, and its bias what that makes of the mean of its input."""
    if codes is None:
        model.refuse(node, "on rows that were held out its outputs come no nearer, or there are too few rows to tell")
        return 0
    weight = node.inputs[1]
    assert isinstance(weight, Constant)
    rounded = dequantize(codes, model.params_of(weight.name))
    means = means_of_input(model, node)
    if means is not None:
        add_to_bias(model, node, mean_output(node, np.asarray(weight.values - rounded, np.float64), means))
    # under its name: it is read through its grid, on which the old values are these or neighbours
    weight.values = model.graph.kept(rounded)
    return 1
