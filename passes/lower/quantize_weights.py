"""quantize-weights"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Constant
from onnxq.model import Fixed, Model, Observed
from onnxq.numerics import quantize
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Store every constant that a spec observes as integers.

    Given:   %1 = Conv(%0, W)                                            specs: W observed; params of W
    Result:  %2 = DequantizeLinear(int8 W_q, W_scale) {axis};  %1 = Conv(%0, %2)
    Refused: a constant without a spec.
    """

    name: ClassVar[str] = "quantize-weights"

    def apply(self, model: Model) -> int:
        quantized = 0
        for name, tensor in list(model.graph.tensors().items()):
            if not isinstance(tensor, Constant) or not isinstance(model.specs.get(name), (Observed, Fixed)):
                continue
            params = model.params_of(name)
            model.insert_dequantized(tensor, quantize(np.asarray(tensor.values), params), params)
            del model.specs[name]
            quantized += 1
        model.graph.cleanup()
        return quantized
