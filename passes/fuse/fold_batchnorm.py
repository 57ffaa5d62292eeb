"""fold-batchnorm"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import batchnorm_affine, is_float32
from onnxq.model import Model
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class FoldBatchnorm(Pass):
    """Write a BatchNormalization that nothing takes in as Mul and Add.

    Given:   (%0: float32[N, C, ...])  %1 = BatchNormalization(%0, gamma, beta, mean, var)
    Result:  %2 = Mul(%0, s);  %1 = Add(%2, beta - mean * s)        s = gamma / sqrt(var + epsilon), shaped (C, 1, ...)
    Refused: it follows a Conv, Gemm or MatMul that only it reads (another pass folds it there); it trains; a parameter is
             computed; the rank of %0 is unknown; %0 is not float32 (two roundings of float16 would show).
    """

    name: ClassVar[str] = "fold-batchnorm"

    def apply(self, model: Model) -> int:
        graph, folded = model.graph, 0
        for node in graph.find("BatchNormalization"):
            affine, shape = batchnorm_affine(node), node.inputs[0].shape
            maker = graph.producer(node.inputs[0])
            linear = maker is not None and maker.op in ("Conv", "ConvTranspose", "Gemm", "MatMul")
            if linear and graph.sole_consumer(node.inputs[0]) is node:
                continue
            if affine is None:
                model.refuse(node, "its parameters are computed, or it trains")
                continue
            if shape is None or len(shape) < 2:
                model.refuse(node, "the rank of its input is unknown")
                continue
            if not is_float32(node.inputs[0]):
                model.refuse(node, "its input is not known to be float32")
                continue
            source, result, wide = node.inputs[0], node.outputs[0], (-1, *[1] * (len(shape) - 2))
            factor = graph.constant(f"{node.name}_scale", affine[0].reshape(wide).astype(np.float32))
            shift = graph.constant(f"{node.name}_shift", affine[1].reshape(wide).astype(np.float32))
            scaled = graph.variable(f"{result.name}_scaled", result.dtype, result.shape)
            graph.remove(node)
            graph.insert("Mul", [source, factor], [scaled], name=f"{node.name}_mul")
            graph.insert("Add", [scaled, shift], [result], name=f"{node.name}_add")
            folded += 1
        if folded:
            graph.cleanup()
        return folded
