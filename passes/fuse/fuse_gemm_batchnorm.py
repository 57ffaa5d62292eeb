"""fuse-gemm-batchnorm"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Node, batchnorm_affine, input_at, value
from onnxq.model import Model
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class FuseGemmBatchnorm(Pass):
    """Fold BatchNormalization into the Gemm or two-dimensional MatMul before it.

    Given:   %1 = Gemm(%0, W, B);  %2 = BatchNormalization(%1, gamma, beta, mean, var)
    Result:  %2 = Gemm(%0, W * s, (B - mean) * s + beta)            s = gamma / sqrt(var + epsilon), by output column
    Refused: %1 has another consumer or is a graph output; W, B or a parameter is computed; %0 is not two-dimensional.
    """

    name: ClassVar[str] = "fuse-gemm-batchnorm"

    def apply(self, model: Model) -> int:
        graph, fused = model.graph, 0
        for node in graph.find("BatchNormalization"):
            linear = graph.producer(node.inputs[0])
            if linear is None or linear.op not in ("Gemm", "MatMul") or linear.domain:
                continue
            affine = batchnorm_affine(node)
            weight, bias = value(input_at(linear, 1)), value(input_at(linear, 2))
            if graph.sole_consumer(linear.outputs[0]) is not node:
                model.refuse(node, f"the output of {linear.name} is used elsewhere")
            elif affine is None:
                model.refuse(node, "its parameters are computed, or it trains")
            elif weight is None or (bias is None and input_at(linear, 2) is not None):
                model.refuse(node, f"the weight or bias of {linear.name} is computed")
            elif weight.ndim != 2 or len(linear.inputs[0].shape or ()) != 2:
                model.refuse(node, f"{linear.name} is not known to be two-dimensional")
            else:
                _fold(model, linear, node, weight, bias, *affine)
                fused += 1
        return fused


def _fold(
    model: Model,
    linear: Node,
    node: Node,
    weight: np.ndarray,
    bias: np.ndarray | None,
    scale: np.ndarray,
    shift: np.ndarray,
) -> None:
    graph = model.graph
    wide = scale[:, None] if linear.attrs.get("transB", 0) else scale[None, :]
    old_bias = 0.0 if bias is None else linear.attrs.get("beta", 1.0) * bias.astype(np.float64)
    new_bias = old_bias * scale + shift
    axis = 0 if linear.attrs.get("transB", 0) else 1
    model.scale_weight(linear, (weight * wide).astype(weight.dtype), scale, axis)
    graph.set_input(linear, 2, graph.constant(f"{linear.name}_bias", new_bias.astype(weight.dtype)))
    linear.op = "Gemm"
    if "beta" in linear.attrs:
        linear.attrs["beta"] = 1.0
    result = node.outputs[0]
    graph.remove(node)
    graph.rewire(linear, outputs=[result])
