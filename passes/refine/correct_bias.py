"""correct-bias"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.biases import add_to_bias, mean_output, means_of_input
from onnxq.graph import value
from onnxq.model import Model
from onnxq.numerics import fake_quantize
from onnxq.passmanager import Pass


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
            weight, means = np.asarray(value(node.inputs[1])), means_of_input(model, node)
            if means is None or (node.op != "Conv" and weight.ndim != 2):
                model.refuse(node, "no per-channel means of its input are known")
                continue
            error = weight.astype(np.float64) - fake_quantize(weight, model.params_of(node.inputs[1].name))
            shift = mean_output(node, error, means)
            if np.any(shift):
                add_to_bias(model, node, shift)
                corrected += 1
        return corrected
