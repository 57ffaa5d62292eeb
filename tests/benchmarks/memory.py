"""Peak resident memory of a whole `onnxq quantize`, validation and all, over the bytes of the model's weights.

python -m tests.benchmarks.memory 3        a generated model of 3 GB, its weights beside it; some minutes
python -m tests.benchmarks.memory 1 --inside        the weights inside the file
python -m tests.benchmarks.memory 1 --rows 64       with enough data for round-weights, which takes minutes more
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

WIDTH = 4096  # of each layer, and of its input
RUN = """
import resource, sys
import onnxq
onnxq.quantize(sys.argv[1], sys.argv[2], output=sys.argv[3], target=sys.argv[4])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_model(path: Path, gigabytes: float) -> int:
    """A chain of linear layers, no two weights of it equal, with external data; returns the bytes of the weights."""
    each = WIDTH * WIDTH * 4
    weight = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32) / np.float32(WIDTH**0.5)
    nodes, tensors, x = [], [], "x"
    with open(path.with_suffix(".bin"), "wb") as file:
        for k in range(max(1, round(gigabytes * 1e9 / each))):
            tensor = TensorProto(name=f"w{k}", data_type=TensorProto.FLOAT, dims=weight.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, text in (("location", path.with_suffix(".bin").name), ("offset", file.tell()), ("length", each)):
                tensor.external_data.add(key=key, value=str(text))
            tensors.append(tensor)
            np.roll(weight, k, 1).tofile(file)
            nodes.append(helper.make_node("MatMul", [x, f"w{k}"], [f"m{k}"], name=f"matmul{k}"))
            nodes.append(helper.make_node("Relu" if k % 3 else "Tanh", [f"m{k}"], [f"y{k}"], name=f"act{k}"))
            x = f"y{k}"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", WIDTH]) for n in ("x", x)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return each * len(tensors)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("gigabytes", type=float)
    options.add_argument("--inside", action="store_true")
    options.add_argument("--rows", type=int, default=8, help="of a sample; with 64 the weights are rounded by their outputs")
    options.add_argument("--target", default="host")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = write_model(folder / "model.onnx", chosen.gigabytes)
        if chosen.inside:
            onnx.save(onnx.load(folder / "model.onnx"), folder / "model.onnx")
        feeds = np.random.default_rng(1).standard_normal((8, chosen.rows, WIDTH)).astype(np.float32)
        (folder / "data").mkdir()
        for k, feed in enumerate(feeds):
            np.savez(folder / "data" / f"{k}.npz", x=feed)
        arguments = [*(str(folder / part) for part in ("model.onnx", "data", "out.onnx")), chosen.target]
        found = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=True)
        peak = int(found.stdout) * (1 if sys.platform == "darwin" else 1024)  # kilobytes on Linux
        where = "inside" if chosen.inside else "beside"
        print(f"{weights / 1e9:.2f} GB of weights, {where} the file: peak {peak / weights:.2f} x")


if __name__ == "__main__":
    main()
