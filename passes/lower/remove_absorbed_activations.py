"""remove-absorbed-activations"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Node, clip_bounds, value
from onnxq.model import Model
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class RemoveAbsorbedActivations(Pass):
    """Remove a Relu or Clip whose bounds the QuantizeLinear after it has anyway.

    Given:   %1 = Conv(%0, W);  %2 = Relu(%1);  %3 = QuantizeLinear(%2, s, z)         z the smallest code: no code is below 0
    Result:  %1 = Conv(%0, W);  %3 = QuantizeLinear(%1, s, z)
    Refused: a code dequantizes to less than the lower bound or more than the upper; %1 or %2 has another reader.
    """

    name: ClassVar[str] = "remove-absorbed-activations"

    def apply(self, model: Model) -> int:
        graph, removed = model.graph, 0
        for quantizer in [n for n in graph.nodes if n.op == "QuantizeLinear"]:
            activation = graph.producer(quantizer.inputs[0])
            if activation is None or activation.op not in ("Relu", "Clip") or activation.domain:
                continue
            source = activation.inputs[0]
            if graph.sole_consumer(source) is not activation or graph.sole_consumer(activation.outputs[0]) is not quantizer:
                model.refuse(activation, "it has another reader, or what it reads has")
                continue
            if not _within_bounds(quantizer, activation):
                model.refuse(activation, "the codes reach beyond its bounds")
                continue
            graph.set_input(quantizer, 0, source)
            graph.remove(activation)
            removed += 1
        if removed:
            graph.cleanup()
        return removed


def _within_bounds(quantizer: Node, activation: Node) -> bool:
    """Whether every code of the quantizer stands for a value between the activation's bounds."""
    scale, zero_point = value(quantizer.inputs[1]), value(quantizer.inputs[2])
    if scale is None or zero_point is None:
        return False
    low, high = (0.0, np.inf) if activation.op == "Relu" else clip_bounds(activation)
    if low is None or high is None:
        return False
    codes = np.iinfo(zero_point.dtype)
    smallest = scale * (float(codes.min) - zero_point.astype(np.float32))
    largest = scale * (float(codes.max) - zero_point.astype(np.float32))
    return bool(np.all(smallest >= low) and np.all(largest <= high))
