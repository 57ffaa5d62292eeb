"""repair-bias-scales"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from onnxq.graph import input_at, value
from onnxq.model import Model, Observed
from onnxq.numerics import Array, PerAxis, QuantParams
from onnxq.passmanager import Pass

LARGEST_CODE = 2**30  # half of int32, so that the accumulator has room too


@dataclass(frozen=True)
class RepairBiasScales(Pass):
    """Give a dead or nearly dead channel a weight scale at which its bias, in int32 of input scale x weight scale, is right.

    Given:   params: scale of W for channel c so small that |B[c]| / (x_scale * W_scale[c]) > 2^30;  or W[c] all 0
    Result:  the graph unchanged; W_scale[c] = |B[c]| / (x_scale * 2^30)
    Refused: the bias fits, and the channel is alive; the parameters of W are given.

    Folding a batch norm leaves tiny weights with a large bias behind, pruning zeros; the bias of zeros would be rounded to
    the input's scale, as any weight scale is theirs.
    """

    name: ClassVar[str] = "repair-bias-scales"

    def apply(self, model: Model) -> int:
        repaired = 0
        for node in model.compute_nodes():
            where, name = model.bias_of(node), model.root(node.inputs[1].name)
            if where is None or not isinstance(model.specs.get(name), Observed):
                continue
            bias = np.abs(np.asarray(value(input_at(*where)), np.float64))
            activation, weight = model.params_of(node.inputs[0].name), model.params_of(name)
            needed = bias / (float(activation.scale) * LARGEST_CODE)
            dead = _dead_channels(np.asarray(value(node.inputs[1])), weight)
            if weight.scale.ndim == 0:
                needed = needed.max()
            needed = needed.astype(np.float32)
            chosen = dead & (needed > np.finfo(np.float32).tiny)
            scale = np.where(chosen, needed, np.maximum(weight.scale, needed))
            if np.any(scale != weight.scale):
                model.params[name] = replace(weight, scale=np.asarray(scale, np.float32))
                repaired += 1
        return repaired


def _dead_channels(weight: Array, params: QuantParams) -> Array:
    """Which channels of a weight have no code but 0, in the shape of its scale."""
    if isinstance(params.granularity, PerAxis):
        return np.asarray(~weight.any(tuple(a for a in range(weight.ndim) if a != params.granularity.axis)))
    return ~np.asarray(weight.any())
