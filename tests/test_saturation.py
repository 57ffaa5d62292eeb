"""saturation.py: the static condition, the emulation of 16-bit pair sums, and the kernels that really do it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import onnxq
from onnxq.graph import Graph
from onnxq.machine import u8s8_saturates
from onnxq.rows import rows_of_weight, sample_rows
from onnxq.runtime import EMULATED, Session
from onnxq.saturation import can_saturate, excess, excess_numpy

CODES = st.integers(-128, 127)


def test_a_pair_can_saturate_exactly_if_its_sum_leaves_128() -> None:
    weights = np.arange(-128, 128)
    a, b = np.meshgrid(weights, weights)
    x = np.array([0, 255])
    sums = x[:, None, None, None] * a + x[None, :, None, None] * b  # extremes lie at the corners
    truth = ((sums > 32767) | (sums < -32768)).any((0, 1))
    pairs = np.stack([a, b], -1).astype(np.int8)
    np.testing.assert_array_equal(can_saturate(pairs)[..., 0], truth)


@given(hnp.arrays(np.uint8, (5, 7)), hnp.arrays(np.int8, (3, 7), elements=CODES))
@settings(max_examples=100, deadline=None)
def test_the_compiled_excess_equals_its_numpy_form(x: np.ndarray, codes: np.ndarray) -> None:
    np.testing.assert_array_equal(excess(x, codes), excess_numpy(x, codes))


@pytest.mark.parametrize(
    ("shape", "weight", "attributes"),
    [
        ((2, 4, 9), (6, 4, 3), "pads = [1, 1], strides = [2]"),
        ((2, 4, 7, 8), (6, 4, 3, 2), "pads = [1, 0, 2, 1], dilations = [2, 1]"),
        ((1, 4, 7, 8), (6, 2, 3, 3), "group = 2, strides = [2, 1]"),
        ((1, 4, 7, 8), (6, 4, 3, 3), 'auto_pad = "SAME_UPPER", strides = [2, 2]'),
        ((1, 4, 7, 8), (6, 4, 2, 2), 'auto_pad = "SAME_LOWER"'),
        ((1, 2, 4, 5, 6), (4, 2, 2, 2, 2), "pads = [1, 1, 1, 0, 0, 0]"),
    ],
)
def test_rows_times_weight_is_the_convolution(shape: tuple, weight: tuple, attributes: str) -> None:
    dims = ", ".join(map(str, shape))
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    net (float[{dims}] x, float[{", ".join(map(str, weight))}] w) => (float[] y) {{ y = Conv <{attributes}> (x, w) }}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal(shape).astype(np.float32), rng.standard_normal(weight).astype(np.float32)
    expected = Session(proto, threads=1).run({"x": x, "w": w})["y"]
    node = Graph.from_proto(proto).nodes[0]
    rows = sample_rows(node, x, w, 0.0, 10**6, rng)  # all of them, in output order
    got = np.einsum("grk,gmk->rgm", rows, rows_of_weight(node, w)).reshape(len(rows[0]), -1)
    np.testing.assert_allclose(got, np.moveaxis(expected, 1, -1).reshape(got.shape), rtol=1e-4, atol=1e-4)


CHILD = """
import sys, numpy as np
from onnxq.machine import u8s8_saturates
from onnxq.runtime import Session
data = np.load(sys.argv[2])
run = Session(sys.argv[1], threads=1)
np.save(sys.argv[3], np.concatenate([run.run({"image": x[None]})["logits"] for x in data["image"][:20]]))
print("saturates", u8s8_saturates())
"""


def saturating_python() -> list[str]:
    """An interpreter whose CPU has u8 x s8 kernels that saturate: this one's, or an AVX2 machine that QEMU emulates."""
    if u8s8_saturates():
        return [sys.executable]
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        pytest.skip("this CPU does not saturate, and there is no qemu-x86_64 to emulate one that does")
    return [qemu, "-cpu", "max", sys.executable]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "inverted_residual"])
def test_target_cpu_keeps_its_accuracy_on_kernels_that_saturate(name: str, models: Path, tmp_path: Path) -> None:
    python, out = saturating_python(), tmp_path / "q.onnx"
    data = models / "digits_calibration.npz"
    onnxq.quantize(models / f"{name}.onnx", data, output=out, target="cpu", validate=False)
    evaluation = models / "digits_evaluation.npz"
    subprocess.run([*python, "-c", CHILD, str(out), str(evaluation), str(tmp_path / "got.npy")], check=True, timeout=300)
    images, got = np.load(evaluation)["image"][:20], np.load(tmp_path / "got.npy")

    def outputs(session: Session) -> np.ndarray:
        return np.concatenate([session.run({"image": x[None]})["logits"] for x in images])

    expected, exact = outputs(Session(models / f"{name}.onnx", threads=1)), outputs(Session(out, threads=1, config=EMULATED))
    noise, off = np.square(exact - expected).sum(), np.square(got - exact).sum()
    assert 10 * np.log10(np.square(expected).sum() / np.square(got - expected).sum()) > 30, "saturation ruins the result"
    assert off < noise / 2, "kernels differ from 32-bit sums by more than rounding does"
