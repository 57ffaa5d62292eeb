"""LSTM in float and quantized at run time: time of one over the other, and the error, by size.

python -m tests.benchmarks.lstm
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

import onnxq
from onnxq.runtime import Session
from onnxq.timing import time_paired

SIZES = ((32, 28, 1), (64, 50, 1), (128, 50, 1), (128, 50, 8), (256, 50, 1), (512, 30, 1), (512, 30, 16))


def network(units: int, steps: int, batch: int) -> onnx.ModelProto:
    """One LSTM, random weights, as many inputs as units."""
    rng = np.random.default_rng(0)
    weights = {
        name: rng.uniform(-1, 1, (1, 4 * units, units)).astype(np.float32) / np.float32(units**0.5) for name in ("w", "r")
    }
    node = helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=units)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [steps, batch, units])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [steps, 1, batch, units])
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(w, n) for n, w in weights.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def main() -> None:
    table = Table(title="float time / int8 time, 1 thread")
    for column in ("units", "steps", "batch", "--target host", "--target cpu", "largest error / largest value"):
        table.add_column(column)
    for units, steps, batch in SIZES:
        model = network(units, steps, batch)
        feed = {"x": np.random.default_rng(1).standard_normal((steps, batch, units)).astype(np.float32)}
        ratios = []
        for target in ("host", "cpu"):
            recipe = onnxq.Recipe(target=target, mode="dynamic", passes={"insert-dynamic-lstm": {"least": 1}})
            report = onnxq.quantize(model, recipe=recipe, validate=False)
            sessions = [Session(m, threads=1) for m in (model, report.model)]
            expected, found = (s.run(feed)["y"] for s in sessions)
            error = float(np.abs(found - expected).max() / np.abs(expected).max())
            times = time_paired([partial(s.run, feed) for s in sessions], seconds=1.0)
            ratios.append(float(np.median(times[:, 0] / times[:, 1])))
        table.add_row(*map(str, (units, steps, batch)), *(f"{r:.2f}" for r in ratios), f"{error:.3f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
