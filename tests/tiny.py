"""Models that are built in milliseconds, and samples for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser

from onnxq.runtime import Session, TensorInfo

HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'
DENSE = "tiny (float[N, 4] x) => (float[N, 3] y) <float[4, 3] w> { a = MatMul (x, w)  y = Relu (a) }"
DENSE_IN_FOURS = DENSE.replace("N", "4")
TWO_INPUTS = (
    "tiny (float[N, 4] x, float[N, 4] shift) => (float[N, 3] y) <float[4, 3] w> { s = Add (x, shift)  y = MatMul (s, w) }"
)
CONV = "tiny (float[N, 3, 4, 6] x) => (float[N, 2, 2, 4] y) <float[2, 3, 3, 3] w> { y = Conv (x, w) }"
CONV_OF_GREY = "tiny (float[N, 1, 4, 6] x) => (float[N, 2, 2, 4] y) <float[2, 1, 3, 3] w> { y = Conv (x, w) }"
CONV_OF_ANY_SIZE = CONV.replace("4, 6", "H, W").replace("2, 4] y", "A, B] y")
LAST_CHANNEL = "tiny (float[N, 4, 6, 3] x) => (float[N, 4, 6, 2] y) <float[3, 2] w> { y = MatMul (x, w) }"
ROOT = "tiny (float[N, 4] x) => (float[N, 3] y) <float[4, 3] w> { root = Sqrt (x)  y = MatMul (root, w) }"
DIVISION = (
    "tiny (float[N, 4] x) => (float[N, 3] y) <float[4, 3] w, float[1] one = {1}>"
    "{ inverse = Div (one, x)  y = MatMul (inverse, w) }"
)
QUANTIZED = (
    "tiny (float[N, 4] x) => (float[N, 4] y) <float scale = {0.1}, uint8 zero = {0}>"
    "{ q = QuantizeLinear (x, scale, zero)  y = DequantizeLinear (q, scale, zero) }"
)
HALF = "tiny (float16[N, 4] x) => (float16[N, 3] y) <float16[4, 3] w> { y = MatMul (x, w) }"


def model(text: str = DENSE) -> onnx.ModelProto:
    """The model that the text spells; a weight that it declares and does not set is drawn from a seed."""
    proto = onnx.parser.parse_model(HEADER + text)
    rng = np.random.default_rng(0)
    made = {o for n in proto.graph.node for o in n.output} | {t.name for t in proto.graph.initializer}
    for info in [v for v in proto.graph.value_info if v.name not in made]:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.uniform(-1, 1, shape).astype(dtype), info.name))
        proto.graph.value_info.remove(info)
    return proto


def write(path: Path, text: str = DENSE) -> Path:
    path.write_bytes(model(text).SerializeToString())
    return path


def inputs(text: str = DENSE) -> list[TensorInfo]:
    return Session(model(text), threads=1).inputs


def rows(count: int = 8, *, seed: int = 1, shape: tuple[int, ...] = (4,)) -> np.ndarray:
    """`count` samples, stacked, positive: ROOT and DIVISION take them too."""
    return np.random.default_rng(seed).uniform(0.1, 2.0, (count, *shape)).astype(np.float32)
