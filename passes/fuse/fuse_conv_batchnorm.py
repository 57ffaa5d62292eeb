"""fuse-conv-batchnorm"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Node, batchnorm_affine, input_at, value
from onnxq.model import Model
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class FuseConvBatchnorm(Pass):
    """Fold BatchNormalization into the Conv or ConvTranspose before it.

    Given:   %1 = Conv(%0, W, B);  %2 = BatchNormalization(%1, gamma, beta, mean, var)
    Result:  %2 = Conv(%0, W * s, (B - mean) * s + beta)            s = gamma / sqrt(var + epsilon), by output channel
    Refused: %1 has another consumer or is a graph output; W or a parameter of the normalization is computed; it trains.
    """

    name: ClassVar[str] = "fuse-conv-batchnorm"

    def apply(self, model: Model) -> int:
        graph, fused = model.graph, 0
        for node in graph.find("BatchNormalization"):
            conv = graph.producer(node.inputs[0])
            if conv is None or conv.op not in ("Conv", "ConvTranspose") or conv.domain:
                continue
            affine = batchnorm_affine(node)
            weight, bias = value(input_at(conv, 1)), value(input_at(conv, 2))
            if graph.sole_consumer(conv.outputs[0]) is not node:
                model.refuse(node, f"the output of {conv.name} is used elsewhere")
            elif affine is None:
                model.refuse(node, "its parameters are computed, or it trains")
            elif weight is None or (bias is None and input_at(conv, 2) is not None):
                model.refuse(node, f"the weight or bias of {conv.name} is computed")
            else:
                _fold(model, conv, node, weight, bias, *affine)
                fused += 1
        return fused


def _fold(
    model: Model,
    conv: Node,
    node: Node,
    weight: np.ndarray,
    bias: np.ndarray | None,
    scale: np.ndarray,
    shift: np.ndarray,
) -> None:
    graph = model.graph
    if conv.op == "Conv":
        wide = scale.reshape(-1, *[1] * (weight.ndim - 1))
    else:  # (C, M / group, ...): output channel = group index * M / group + position on axis 1
        groups = conv.attrs.get("group", 1)
        by_group = scale.reshape(groups, 1, -1)
        wide = np.broadcast_to(by_group, (groups, weight.shape[0] // groups, weight.shape[1]))
        wide = wide.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
    new_bias = shift if bias is None else bias.astype(np.float64) * scale + shift
    model.scale_weight(conv, (weight * wide).astype(weight.dtype), scale, 0 if conv.op == "Conv" else None)
    graph.set_input(conv, 2, graph.constant(f"{conv.name}_bias", new_bias.astype(weight.dtype)))
    result = node.outputs[0]
    graph.remove(node)
    graph.rewire(conv, outputs=[result])
