"""correct-bias"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Node, input_at, value
from onnxq.model import Derived, Model
from onnxq.numerics import Array, fake_quantize
from onnxq.passmanager import Pass
from onnxq.saturation import rows_of_weight


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Take the mean error that rounding the weights makes out of the bias.

    Given:   %1 = Conv(%0, W, B)       params of W; per-channel means of %0 in its sketch
    Result:  %1 = Conv(%0, W, B')      B' = B + (W - Wq) E[x], Wq the rounded weight
             (M. Nagel et al., "Data-free quantization through weight equalization and bias correction", 2019, section 4.2)
    Refused: the sketch has no per-channel means; the node's weight is not quantized; a MatMul to which no bias is added.
    """

    name: ClassVar[str] = "correct-bias"

    def apply(self, model: Model) -> int:
        corrected = 0
        for node in list(model.compute_nodes()):
            if (node.name, 1) not in model.quantized_inputs or value(node.inputs[1]) is None:
                continue
            if node.op == "MatMul" and model.bias_of(node) is None:
                model.refuse(node, "it has no bias")
                continue
            sketch = model.calibration.sketches.get(node.inputs[0].name) if model.calibration else None
            weight = np.asarray(value(node.inputs[1]))
            means = None if sketch is None else sketch.along(1 if node.op == "Conv" else -1, len(node.inputs[0].shape or ()))
            if means is None or (node.op != "Conv" and weight.ndim != 2):
                model.refuse(node, "no per-channel means of its input are known")
                continue
            error = weight.astype(np.float64) - fake_quantize(weight, model.params_of(node.inputs[1].name))
            shift = _mean_output(node, error, means.mean)
            if np.any(shift):
                _add_to_bias(model, node, shift)
                corrected += 1
        return corrected


def _mean_output(node: Node, weight: Array, mean: Array) -> Array:
    """What the layer gives, by output channel, for an input that is everywhere its channels' mean."""
    rows = rows_of_weight(node, weight)  # (groups, M / group, kernel positions x C / group)
    groups = len(rows)
    by_group = mean.reshape(groups, -1)
    positions = rows.shape[2] // by_group.shape[1]
    shift = np.einsum("gmk,gk->gm", rows, np.tile(by_group, (1, positions)))
    return shift.reshape(-1)


def _add_to_bias(model: Model, node: Node, shift: Array) -> None:
    graph = model.graph
    reader, index = model.bias_of(node) or (node, 2)
    old = input_at(reader, index)
    before = np.zeros_like(shift) if old is None else np.asarray(value(old), np.float64)
    bias = graph.constant(f"{node.name}_bias", (before + shift).astype(np.float32))
    spec = Derived(node.inputs[0].name, node.inputs[1].name) if old is None else model.specs.get(old.name)
    if old is None and "beta" in node.attrs:
        node.attrs["beta"] = 1.0  # of no effect without a bias until now
    graph.set_input(reader, index, bias)
    if old is not None and not old.outputs:
        model.specs.pop(old.name, None)
    if spec is None or model.target.float_bias:
        return
    model.specs[bias.name] = spec
    model.quantized_inputs.add((reader.name, index))
