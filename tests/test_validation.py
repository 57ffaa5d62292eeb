"""validation.py, audit.py and the timing that they stand on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx.parser
import pytest

import onnxq
from onnxq import timing
from onnxq.audit import coverage, multiply_accumulates
from onnxq.data import Sample
from onnxq.errors import DataError, ModelError, RecipeError
from onnxq.graph import Graph
from onnxq.inspection import inspect
from onnxq.latency import Latency, ratio_interval
from onnxq.model import Entry, Reason, State
from onnxq.runtime import Session
from onnxq.validation import accuracy, missed_gates

SCALE = (
    '<ir_version: 9, opset_import: ["" : 17]>\nnet (float[N, 4] x) => (float[N, 4] y) <float[1] w = {%s}> { y = Mul (x, w) }'
)


def scaled(by: float) -> Session:
    return Session(onnx.parser.parse_model(SCALE % by), threads=1)


def labelled(count: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, 4)).astype(np.float32)
    return [Sample({"x": x[k : k + 1]}, np.array([x[k].argmax() if k % 4 else 0]), f"sample {k}") for k in range(count)]


def test_top1_is_counted_and_a_sign_flip_loses_it() -> None:
    samples = labelled(40)
    truth = 100 * np.mean([s.feed["x"].argmax() == s.label[0] for s in samples if s.label is not None])
    found = accuracy([scaled(1.0), scaled(1.0), scaled(-1.0)], samples, data="test")
    assert found.samples == 40
    assert found.float.metrics["top1"] == found.emulated.metrics["top1"] == pytest.approx(truth)
    assert found.drop is not None
    assert found.drop > 50
    assert found.half_width is not None
    assert 0 < found.half_width < 40
    assert "top5" not in found.float.metrics


def test_distances_are_what_their_formulas_say() -> None:
    found = accuracy([scaled(1.0), scaled(0.9), scaled(-2.0)], labelled(10), data="test")
    assert found.emulated.outputs["y"].sqnr == pytest.approx(20.0, abs=1e-3)  # noise is a tenth of the signal
    assert found.emulated.outputs["y"].cosine == pytest.approx(1.0)
    assert found.emulated.outputs["y"].argmax_agreement == 100.0
    assert found.real.outputs["y"].cosine == pytest.approx(-1.0)
    assert found.kernel_effect is not None
    assert "kernel effect: output y" in found.kernel_effect


def test_no_label_no_metric() -> None:
    samples = [Sample(s.feed, None, s.where) for s in labelled(5)]
    found = accuracy([scaled(1.0)] * 3, samples, data="test")
    assert found.metric is None
    assert found.drop is None
    assert found.float.outputs["y"].sqnr == float("inf")


def test_labels_that_do_not_fit_name_the_sample() -> None:
    samples = [Sample({"x": np.ones((1, 4), np.float32)}, np.arange(3), "sample 0")]
    with pytest.raises(DataError, match=r"sample 0: 3 labels do not go with scores of shape \[1, 4\]"):
        accuracy([scaled(1.0)] * 3, samples, data="test")


def test_the_interval_of_a_ratio_holds_it() -> None:
    rng = np.random.default_rng(0)
    below = rng.uniform(0.9, 1.1, 200)
    ratio, low, high = ratio_interval(2.0 * below * rng.uniform(0.98, 1.02, 200), below)
    assert low <= ratio <= high
    assert low < 2.0 < high
    assert high - low < 0.05


@pytest.mark.parametrize(
    ("speedup", "verdict"), [((1.5, 1.4, 1.6), "faster"), ((0.5, 0.4, 0.6), "slower"), ((1.0, 0.97, 1.03), "equal")]
)
def test_faster_and_slower_mean_beyond_the_control(speedup: tuple[float, float, float], verdict: str) -> None:
    assert Latency(1, 10, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, speedup, (1.0, 0.98, 1.02)).verdict == verdict


def test_runs_are_timed_interleaved() -> None:
    order: list[int] = []
    times = timing.time_paired([lambda k=k: order.append(k) for k in range(3)], seconds=0.0)
    assert times.shape == (10, 3)
    rounds = np.array(order[6:]).reshape(10, 3)
    assert (np.sort(rounds, 1) == [0, 1, 2]).all()
    assert len({tuple(r) for r in rounds.tolist()}) > 1


def test_gates() -> None:
    samples = labelled(40)
    found = accuracy([scaled(1.0), scaled(1.0), scaled(-1.0)], samples, data="test")
    assert missed_gates(found, None, 1000.0, None) == []
    assert len(missed_gates(found, None, 0.0, None)) == 1
    with pytest.raises(RecipeError, match="latency"):
        missed_gates(found, None, None, 1.0)


def test_validate_compares_any_two_files_and_refuses_what_is_no_pair(models: Path, tmp_path: Path) -> None:
    data = models / "digits_evaluation.npz"
    onnxq.quantize(models / "residual.onnx", models / "digits_calibration.npz", output=tmp_path / "q.onnx", validate=False)
    found = onnxq.validate(models / "residual.onnx", tmp_path / "q.onnx", data, max_samples=10)
    assert found.integer == 9
    assert found.float == 0
    assert found.accuracy.drop == 0.0
    other = onnx.parser.parse_model(SCALE % 1.0)
    with pytest.raises(DataError, match="not a pair"):
        onnxq.validate(models / "residual.onnx", other, data)


def test_multiply_accumulates_are_counted_from_shapes() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17]>
    net (float[N, 4, 8, 8] x) => (float[N, 3] y)
    <float[6, 2, 3, 3] w, float[3, 384] v, float[6, 6, 2, 2] t> {
      [conv] c = Conv <group = 2, pads = [1, 1, 1, 1]> (x, w)
      f = Flatten (c)
      [gemm] y = Gemm <transB = 1> (f, v)
    }"""
    proto = onnx.parser.parse_model(text)
    for info in proto.graph.value_info:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), info.name))
    del proto.graph.value_info[:]
    macs = multiply_accumulates(Graph.from_proto(proto), {"x": np.ones((2, 4, 8, 8), np.float32)})
    assert macs == {"conv": 2 * 6 * 64 * 2 * 9, "gemm": 2 * 3 * 384}


def test_coverage_counts_by_op_and_work() -> None:
    ledger = {
        "a": Entry("Conv", State.INTEGER),
        "b": Entry("Conv", State.FLOAT, Reason.EXCLUDED),
        "c": Entry("Gemm", State.INTEGER),
    }
    table = coverage(ledger, {"a": 10, "b": 5})
    assert (table["Conv"].integer, table["Conv"].float, table["Conv"].integer_macs, table["Conv"].float_macs) == (
        1,
        1,
        10,
        5,
    )
    assert table["Gemm"].integer == 1


def test_inspect_names_float_kernels_with_qdq_in_front() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17]>
    net (float[2, 4] x) => (float[2, 3] y)
    <float s = {0.1}, uint8 z = {128}, float[4, 3] w> {
      q = QuantizeLinear (x, s, z)
      d = DequantizeLinear (q, s, z)
      [left] m = MatMul (d, w)
      y = Tanh (m)
    }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 3), np.float32), "w"))
    del proto.graph.value_info[:]
    found = inspect(proto)
    assert (found.integer, found.float) == (0, 1)
    assert found.dequantized_in_front == ["left"]


def test_a_model_that_the_runtime_cannot_load_is_a_model_error() -> None:
    proto = onnx.parser.parse_model(SCALE % 1.0)
    proto.graph.node[0].op_type = "NoSuchOp"
    with pytest.raises(ModelError, match="onnxruntime cannot load the model"):
        Session(proto)


def test_the_half_width_is_that_of_the_paired_difference() -> None:
    """Four samples: the candidate loses one, gains none; the difference is 1, 0, 0, 0."""
    x = np.eye(4, dtype=np.float32)
    samples = [Sample({"x": x[k : k + 1]}, np.array([k]), f"sample {k}") for k in range(4)]
    text = SCALE.replace("float[1] w = {%s}", "float[4] w = {%s}")
    candidate = Session(onnx.parser.parse_model(text % "-1, 1, 1, 1"), threads=1)
    found = accuracy([scaled(1.0), scaled(1.0), candidate], samples, data="test")
    assert found.drop == 25.0
    assert found.half_width == pytest.approx(196.0 * np.std([1, 0, 0, 0]) / 2)
    lost_by_both = accuracy([candidate, candidate, candidate], samples, data="test")
    assert lost_by_both.half_width == 0.0


def test_transposed_operands_and_convolutions_are_counted() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17]>
    net (float[5, 2] a, float[1, 3, 4, 4] x) => (float[2, 7] y, float[] z)
    <float[5, 7] w, float[3, 6, 2, 2] v> {
      [gemm] y = Gemm <transA = 1> (a, w)
      [up] z = ConvTranspose <strides = [2, 2]> (x, v)
    }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.output[1].type.tensor_type.ClearField("shape")
    for info in proto.graph.value_info:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), info.name))
    del proto.graph.value_info[:]
    feed = {"a": np.ones((5, 2), np.float32), "x": np.ones((1, 3, 4, 4), np.float32)}
    assert multiply_accumulates(Graph.from_proto(proto), feed) == {"gemm": 2 * 7 * 5, "up": 3 * 16 * 6 * 4}
