"""Networks of well-known shapes with random weights, for benchmarks: what counts is the size of what flows through."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Builder:
    """Nodes and seeded weights of one network."""

    def __init__(self, channels: int, shape: list[int]) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.shape, self.channels = shape, channels
        self.serial = 0

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        self.serial += 1
        name = f"{kind.lower()}_{self.serial}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def weight(self, *shape: int, scale: float | None = None) -> str:
        self.serial += 1
        fan = int(np.prod(shape[1:] if len(shape) > 2 else shape[:1]))
        values = self.rng.standard_normal(shape) * (scale if scale is not None else (2 / fan) ** 0.5)
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), f"w_{self.serial}"))
        return f"w_{self.serial}"

    def number(self, value: Any) -> str:
        self.serial += 1
        self.weights.append(numpy_helper.from_array(np.asarray(value), f"n_{self.serial}"))
        return f"n_{self.serial}"

    def conv(self, x: str, c: int, d: int, kernel: int, stride: int = 1, group: int = 1, act: str = "") -> str:
        pad = kernel // 2
        x = self.op(
            "Conv", x, self.weight(d, c // group, kernel, kernel), self.weight(d, scale=0.1), group=group,
            kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4,
        )  # fmt: skip
        if act == "Clip":
            return self.op("Clip", x, self.number(np.float32(0)), self.number(np.float32(6)))
        return self.op(act, x) if act else x

    def linear(self, x: str, c: int, d: int) -> str:
        x = self.op("MatMul", x, self.weight(c, d, scale=c**-0.5))
        return self.op("Add", x, self.weight(d, scale=0.1))

    def model(self, y: str) -> onnx.ModelProto:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)
        out = helper.make_tensor_value_info(y, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "g", [x], [out], self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    def head(self, x: str, c: int) -> onnx.ModelProto:
        x = self.op("Flatten", self.op("GlobalAveragePool", x))
        return self.model(self.op("Gemm", x, self.weight(c, 1000, scale=c**-0.5), self.weight(1000, scale=0.1)))


def resnet50() -> onnx.ModelProto:
    """Bottlenecks 3, 4, 6, 3 at 224 x 224 (He et al. 2015)."""
    b = Builder(3, [1, 3, 224, 224])
    x = b.op("MaxPool", b.conv("x", 3, 64, 7, 2, act="Relu"), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    c = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        mid = 64 << stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            y = b.conv(b.conv(x, c, mid, 1, act="Relu"), mid, mid, 3, stride, act="Relu")
            y = b.conv(y, mid, 4 * mid, 1)
            x = b.op("Relu", b.op("Add", y, x if block else b.conv(x, c, 4 * mid, 1, stride)))
            c = 4 * mid
    return b.head(x, c)


def inverted_residual() -> onnx.ModelProto:
    """MobileNetV2 at 224 x 224 (Sandler et al. 2018)."""
    b = Builder(3, [1, 3, 224, 224])
    x, c = b.conv("x", 3, 32, 3, 2, act="Clip"), 32
    for expand, d, blocks, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)
    ):  # fmt: skip
        for block in range(blocks):
            mid, step = c * expand, 1 if block else stride
            y = b.conv(x, c, mid, 1, act="Clip") if expand > 1 else x
            y = b.conv(b.conv(y, mid, mid, 3, step, mid, act="Clip"), mid, d, 1)
            x, c = (b.op("Add", x, y) if c == d and step == 1 else y), d
    return b.head(b.conv(x, c, 1280, 1, act="Clip"), 1280)


def transformer(layers: int = 6, width: int = 384, heads: int = 6, tokens: int = 128) -> onnx.ModelProto:
    """An encoder of pre-norm blocks with GELU, the size of a small BERT."""
    b = Builder(width, [1, tokens, width])
    x, size = "x", width // heads
    apart, together = (b.number(np.array(s, np.int64)) for s in ([1, tokens, heads, size], [1, tokens, width]))
    for _ in range(layers):
        n = b.op("LayerNormalization", x, b.weight(width), b.weight(width), axis=-1)
        q, k, v = (b.op("Reshape", b.linear(n, width, width), apart) for _ in range(3))
        q, v = (b.op("Transpose", t, perm=[0, 2, 1, 3]) for t in (q, v))
        k = b.op("Transpose", k, perm=[0, 2, 3, 1])
        p = b.op("Softmax", b.op("Mul", b.op("MatMul", q, k), b.number(np.float32(size**-0.5))), axis=-1)
        a = b.op("Reshape", b.op("Transpose", b.op("MatMul", p, v), perm=[0, 2, 1, 3]), together)
        x = b.op("Add", x, b.linear(a, width, width))
        h = b.linear(b.op("LayerNormalization", x, b.weight(width), b.weight(width), axis=-1), width, 4 * width)
        e = b.op("Erf", b.op("Div", h, b.number(np.float32(2**0.5))))
        g = b.op("Mul", b.op("Mul", h, b.op("Add", e, b.number(np.float32(1)))), b.number(np.float32(0.5)))
        x = b.op("Add", x, b.linear(g, 4 * width, width))
    return b.model(b.op("Gemm", b.op("Flatten", b.op("ReduceMean", x, axes=[1])), b.weight(width, 1000, scale=0.05)))


NETWORKS = {"resnet50": resnet50, "inverted_residual": inverted_residual, "transformer": transformer}


def feeds(model: onnx.ModelProto, count: int) -> list[dict[str, np.ndarray]]:
    info = model.graph.input[0]
    shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
    rng = np.random.default_rng(1)
    return [{info.name: rng.standard_normal(shape).astype(np.float32)} for _ in range(count)]
