"""fuse-matmul-add"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import is_float32, value
from onnxq.model import Model
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class FuseMatmulAdd(Pass):
    """Write a two-dimensional MatMul and the Add of its bias as Gemm.

    Given:   (%0: float32[N, K])  %1 = MatMul(%0, float32[K, M]);  %2 = Add(%1, float32[M])
    Result:  %2 = Gemm(%0, float32[K, M], float32[M])
    Refused: %0 is not known to be a float32 matrix; the weight or bias is computed; the bias is not one number for each
             column; %1 has another consumer or is a graph output.
    """

    name: ClassVar[str] = "fuse-matmul-add"

    def apply(self, model: Model) -> int:
        graph, fused = model.graph, 0
        for matmul in graph.find("MatMul"):
            add = graph.sole_consumer(matmul.outputs[0])
            if add is None or add.op != "Add" or add.domain:
                continue
            weight = value(matmul.inputs[1])
            other = add.inputs[1] if add.inputs[0] is matmul.outputs[0] else add.inputs[0]
            bias = value(other)
            if weight is None or weight.ndim != 2 or bias is None:
                model.refuse(matmul, "its weight or bias is computed, or its weight is no matrix")
            elif len(matmul.inputs[0].shape or ()) != 2 or not is_float32(matmul.inputs[0]):
                model.refuse(matmul, "its input is not known to be a float32 matrix")
            elif bias.size not in (1, weight.shape[1]) or bias.ndim > 2 or (bias.ndim == 2 and bias.shape[0] != 1):
                model.refuse(matmul, "what is added is not one number for each column")
            else:
                row = np.broadcast_to(bias.reshape(-1), (weight.shape[1],))
                matmul.op = "Gemm"
                result = add.outputs[0]
                graph.remove(add)
                graph.rewire(
                    matmul,
                    inputs=[*matmul.inputs[:2], graph.constant(other.name, row)],
                    outputs=[result],
                )
                fused += 1
        return fused
