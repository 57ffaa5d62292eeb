"""quantize-biases"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Constant
from onnxq.model import Derived, Model
from onnxq.numerics import PerAxis, PerTensor, QuantParams, QuantType, quantize_bias
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class QuantizeBiases(Pass):
    """Store every bias as int32 at input scale x weight scale.

    Given:   %1 = Conv(%0, W, B)                                         specs: B derived from %0 and W
    Result:  %2 = DequantizeLinear(int32 B_q, x_scale * W_scale);  %1 = Conv(%0, W, %2)
    Refused: nothing; a code that overflows is clipped.
    """

    name: ClassVar[str] = "quantize-biases"

    def apply(self, model: Model) -> int:
        graph, quantized = model.graph, 0
        for name, tensor in list(graph.tensors().items()):
            spec = model.specs.get(name)
            if not isinstance(spec, Derived) or not isinstance(tensor, Constant):
                continue
            activation, weight = model.params_of(spec.activation), model.params_of(spec.weight)
            values = np.asarray(tensor.values)
            scale = np.asarray(activation.scale * weight.scale, np.float32)
            codes = quantize_bias(values, np.broadcast_to(scale, values.shape))
            granularity = PerAxis(0) if scale.ndim else PerTensor()
            params = QuantParams(scale, np.zeros(scale.shape, np.int32), QuantType.INT32, granularity)
            model.insert_dequantized(tensor, codes, params)
            del model.specs[name]
            quantized += 1
        model.graph.cleanup()
        return quantized
