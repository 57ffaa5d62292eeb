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
    """Write a BatchNormalization of images that nothing takes in as a depthwise Conv, which there are integer kernels for.

    Given:   (%0: float32[N, C, H, W])  %1 = BatchNormalization(%0, gamma, beta, mean, var)
    Result:  %1 = Conv(%0, s, beta - mean * s) {group=C}       s = gamma / sqrt(var + epsilon), shaped (C, 1, 1, 1)
    Refused: it follows a Conv, Gemm or MatMul that only it reads (another pass folds it there); it trains; a parameter is
             computed; %0 is not float32 or of another rank; C is no multiple of `lanes`.

    In float, onnxruntime makes the same of it by itself where C fills its blocks of channels; where it does not, a depthwise
    Conv is slower than a BatchNormalization.
    """

    name: ClassVar[str] = "fold-batchnorm"
    lanes: int = 16

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
            if shape is None or len(shape) != 4:
                model.refuse(node, "its input is not known to be of four dimensions")
                continue
            if not is_float32(node.inputs[0]):
                model.refuse(node, "its input is not known to be float32")
                continue
            channels = len(affine[0])
            if channels % self.lanes:
                model.refuse(node, f"{channels} channels do not fill the runtime's blocks")
                continue
            source, result = node.inputs[0], node.outputs[0]
            weight = graph.constant(f"{node.name}_weight", affine[0].reshape(-1, 1, 1, 1).astype(np.float32))
            bias = graph.constant(f"{node.name}_bias", affine[1].astype(np.float32))
            name = node.name
            graph.remove(node)
            attrs = {"group": channels, "kernel_shape": [1, 1]}
            graph.insert("Conv", [source, weight, bias], [result], attrs).name = name
            folded += 1
        if folded:
            graph.cleanup()
        return folded
