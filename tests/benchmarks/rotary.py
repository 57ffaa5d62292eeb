"""A rotary embedding as exporters write it out against the one op that fuse-rotary makes of it, in one run.

    python tests/benchmarks/rotary.py

Prints ratios only: the latency of the written form over that of the op, medians of interleaved runs on one thread.
"""

from __future__ import annotations

import time

import numpy as np
import onnx.parser

from onnxq.graph import Graph
from onnxq.model import Model
from onnxq.passes import FuseRotary, InferShapes
from onnxq.runtime import Session
from onnxq.target import load

HEADS, LENGTH, HALF, RUNS = 8, 128, 32, 101
HALVES = """
net (float[1, 8, 128, 64] x) => (float[1, 8, 128, 64] y)
<int64[1] zero = {0}, int64[1] half = {32}, int64[1] end = {1000}, int64[1] last = {3}, float[128, 64] c, float[128, 64] s>
{
  a = Slice (x, zero, half, last)
  b = Slice (x, half, end, last)
  n = Neg (b)
  r = Concat <axis = -1> (n, a)
  p = Mul (x, c)
  q = Mul (r, s)
  y = Add (p, q)
}
"""
NEIGHBOURS = """
net (float[1, 128, 8, 64] x) => (float[1, 128, 8, 64] y)
<int64[5] apart = {0, 0, 0, 32, 2}, int64[4] together = {0, 0, 0, 64}, int64[1] minus = {-1}, int64 i0 = {0}, int64 i1 = {1},
 float[128, 1, 32] c, float[128, 1, 32] s>
{
  x5 = Reshape (x, apart)
  a = Gather <axis = 4> (x5, i0)
  b = Gather <axis = 4> (x5, i1)
  ac = Mul (a, c)
  bs = Mul (b, s)
  u = Sub (ac, bs)
  as = Mul (a, s)
  bc = Mul (b, c)
  v = Add (as, bc)
  u1 = Unsqueeze (u, minus)
  v1 = Unsqueeze (v, minus)
  st = Concat <axis = -1> (u1, v1)
  y = Reshape (st, together)
}
"""


def model_of(text: str) -> onnx.ModelProto:
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]>' + text)
    for info in list(proto.graph.value_info):
        if info.name in ("c", "s"):
            shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
            angles = np.outer(np.arange(LENGTH), 0.1 ** np.arange(HALF)).astype(np.float32)
            table = np.tile((np.cos if info.name == "c" else np.sin)(angles), shape[-1] // HALF).reshape(shape)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(table, info.name))
            proto.graph.value_info.remove(info)
    return proto


if __name__ == "__main__":
    for name, text in (("halves", HALVES), ("neighbours", NEIGHBOURS)):
        proto = model_of(text)
        model = Model(Graph.from_proto(proto), load("cpu"))
        InferShapes().apply(model)
        assert FuseRotary().apply(model) == 1
        sessions = [Session(proto, threads=1), Session(model.graph.to_proto(), threads=1)]
        feed = {"x": np.random.default_rng(0).standard_normal(model.graph.inputs[0].shape).astype(np.float32)}
        times: list[list[float]] = [[], []]
        for _ in range(RUNS):
            for session, taken in zip(sessions, times, strict=True):
                start = time.perf_counter()
                session.run(feed)
                taken.append(time.perf_counter() - start)
        print(f"pairs of {name}: {np.median(times[0]) / np.median(times[1]):.2f}x faster as one op")
