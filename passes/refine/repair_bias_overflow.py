"""repair-bias-overflow"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from onnxq.graph import input_at, value
from onnxq.model import Model, Observed
from onnxq.passmanager import Pass

LARGEST_CODE = 2**30  # half of int32, so that the accumulator has room too


@dataclass(frozen=True)
class RepairBiasOverflow(Pass):
    """Enlarge the weight scale of a channel whose bias does not fit int32 at input scale x weight scale.

    Given:   params: scale of W for channel c so small that |B[c]| / (x_scale * W_scale[c]) > 2^30
    Result:  the graph unchanged; W_scale[c] = |B[c]| / (x_scale * 2^30)
    Refused: the bias fits; the parameters of W are given.

    Such channels are nearly dead: tiny weights with a large bias, as folding a batch norm leaves behind.
    """

    name: ClassVar[str] = "repair-bias-overflow"

    def apply(self, model: Model) -> int:
        repaired = 0
        for node in model.compute_nodes():
            where, name = model.bias_of(node), model.root(node.inputs[1].name)
            if where is None or not isinstance(model.specs.get(name), Observed):
                continue
            bias = np.abs(np.asarray(value(input_at(*where)), np.float64))
            activation, weight = model.params_of(node.inputs[0].name), model.params_of(name)
            needed = bias / (float(activation.scale) * LARGEST_CODE)
            if weight.scale.ndim == 0:
                needed = needed.max()
            if np.any(needed > weight.scale):
                scale = np.maximum(weight.scale, needed.astype(np.float32))
                model.params[name] = replace(weight, scale=np.asarray(scale, np.float32))
                repaired += 1
        return repaired
