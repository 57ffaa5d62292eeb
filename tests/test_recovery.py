"""Models that come in quantized: taken back to floats, never quantized twice, with the ranges that they came with."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper
from onnxruntime import quantization as ort_quantization
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType

import onnxq
from onnxq import target
from onnxq.graph import Graph
from onnxq.model import Model
from onnxq.numerics import PerAxis, PerTensor, QuantParams, as_type, dequantize
from onnxq.numerics import QuantType as Type
from onnxq.proof import compare
from onnxq.runtime import EMULATED, Session, evaluate
from onnxq.stages import RECOVER


class Reader(CalibrationDataReader):
    def __init__(self, images: np.ndarray) -> None:
        self._left = iter(images)

    def get_next(self) -> Any:
        image = next(self._left, None)
        return None if image is None else {"image": image[None]}


def images(models: Path, part: str = "calibration") -> np.ndarray:
    return np.load(models / f"digits_{part}.npz")["image"]


@pytest.fixture(params=["qdq", "qdq by channel", "qoperator", "dynamic"])
def quantized(request: pytest.FixtureRequest, models: Path, tmp_path: Path) -> Path:
    """The shipped residual network as onnxruntime quantizes it; kernels of this machine that saturate play no part."""
    source, path = shutil.copy(models / "residual.onnx", tmp_path), tmp_path / "given.onnx"  # it writes beside the model
    if request.param == "dynamic":
        ort_quantization.quantize_dynamic(source, path, op_types_to_quantize=["MatMul", "Gemm"])
    else:
        ort_quantization.quantize_static(
            source, path, Reader(images(models)[:32]),
            quant_format=QuantFormat.QOperator if request.param == "qoperator" else QuantFormat.QDQ,
            per_channel="by channel" in request.param, weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
        )  # fmt: skip
    return path


def recovered(path: Path) -> Model:
    model = Model(Graph.from_proto(onnx.load(path)), target.load("cpu"))
    for kind in RECOVER:
        kind().apply(model)
    return model


def test_what_comes_back_is_the_model_but_for_the_rounding_of_its_activations(quantized: Path, models: Path) -> None:
    model = recovered(quantized)
    proto = model.graph.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert not [
        n.op_type for n in proto.graph.node if "Quantize" in n.op_type or "QLinear" in n.op_type or "Integer" in n.op_type
    ]
    for image in images(models, "evaluation")[:8]:
        feed = {"image": image[None]}
        expected = evaluate(onnx.load(quantized), feed)
        for name, array in evaluate(proto, feed).items():
            assert compare(expected[name], array, 0.1) is None
    assert model.trained


def test_quantizing_it_keeps_the_ranges_and_the_accuracy(quantized: Path, models: Path, tmp_path: Path) -> None:
    trained = recovered(quantized).trained
    report = onnxq.quantize(
        quantized, models / "digits_calibration.npz", eval=models / "digits_evaluation.npz", target="cpu",
        output=tmp_path / "q.onnx", max_samples=200,
    )  # fmt: skip
    assert report.accuracy is not None
    assert report.accuracy.drop is not None
    assert report.accuracy.drop <= 1.0
    assert any("quantized already" in note for note in report.notes)
    numbers = [numpy_helper.to_array(t) for t in report.model.graph.initializer]
    scales = {float(a) for a in numbers if a.dtype == np.float32 and not a.ndim}
    # what a batch norm was folded into is gone; the last layer gives floats; a pool and a Flatten have that before them
    activations = {n: p for n, p in trained.items() if not re.search("_weight$|Conv_output|logits", n)}
    assert all(re.search("Pool|Flatten", n) or float(p.scale) in scales for n, p in activations.items()), activations.keys()
    assert all(e.is_integer for e in report.ledger.values() if e.op in ("Conv", "Gemm"))


def test_our_own_result_comes_out_as_it_went_in(models: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once.onnx", tmp_path / "twice.onnx"
    data = models / "digits_calibration.npz"
    onnxq.quantize(models / "residual.onnx", data, target="cpu", output=once, max_samples=32, validate=False)
    report = onnxq.quantize(once, data, target="cpu", output=twice, max_samples=32)
    assert report.accuracy is not None
    first, second = Session(once, threads=1), Session(twice, threads=1)
    for image in images(models, "evaluation")[:16]:
        expected, found = first.run({"image": image[None]}), second.run({"image": image[None]})
        for name, array in expected.items():
            assert compare(array, found[name], 0.05) is None

    def codes(path: Path) -> list[bytes]:
        weights = [t for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
        return sorted(numpy_helper.to_array(t).tobytes() for t in weights)

    repaired = next(r.rewrites for r in report.passes if r.name == "repair-saturation")
    assert len(set(codes(once)) - set(codes(twice))) <= repaired


def test_recalibrated_activations_have_ranges_of_their_own(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "given.onnx"
    source = shutil.copy(models / "residual.onnx", tmp_path)
    ort_quantization.quantize_static(source, path, Reader(3 * images(models)[:8]))  # far too wide
    data = models / "digits_calibration.npz"
    kept, anew = (onnxq.quantize(path, data, target="cpu", max_samples=32, recalibrate=r) for r in (False, True))
    assert kept.ranges_toml != anew.ranges_toml
    assert kept.accuracy is not None
    assert anew.accuracy is not None


@pytest.mark.parametrize("given, wanted", [(Type.UINT8, Type.INT8), (Type.INT8, Type.UINT8), (Type.UINT16, Type.INT16)])
def test_parameters_of_another_type_are_those_of_the_same_grid(given: Type, wanted: Type) -> None:
    middle = (given.qmin + given.qmax + 1) // 2
    params = QuantParams(np.asarray(0.5, np.float32), np.array(middle + 3, given.dtype), given)
    found = as_type(params, wanted, PerTensor(), None, symmetric=False)
    assert found is not None
    codes = np.array([given.qmin, middle, given.qmax], given.dtype)
    moved = (codes.astype(np.int64) + wanted.qmin - given.qmin).astype(wanted.dtype)
    np.testing.assert_array_equal(dequantize(codes, params), dequantize(moved, found))
    assert as_type(params, wanted, PerTensor(), None, symmetric=True) is None
    centred = QuantParams(np.asarray(0.5, np.float32), np.array(middle, given.dtype), given)
    by_channel = as_type(centred, wanted, PerAxis(1), (4, 3), symmetric=True)
    assert by_channel is not None
    assert by_channel.scale.tolist() == [0.5] * 3
    assert as_type(centred, Type.INT8 if given.bits == 16 else Type.INT16, PerTensor(), None, symmetric=False) is None


RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((16, 16)).astype(np.float32)
CODES = RNG.integers(-64, 65, (16, 16)).astype(np.int8)  # with which no kernel saturates
CONSTANTS: dict[str, np.ndarray] = {
    "w": WEIGHT, "wq": CODES, "ws": np.array(0.004, np.float32), "wz": np.arange(16, dtype=np.int8),
    "s": np.array(0.03, np.float32), "z": np.array(128, np.uint8), "u0": np.array(0, np.uint8),
    "ss": np.array(1 / 256, np.float32), "flat": np.array([-1, 16], np.int64), "one": np.array(1, np.float32),
}  # fmt: skip
PAIRED = "q = QuantizeLinear (t, s, u0)  d = DequantizeLinear (q, s, u0)  y = MatMul (d, w)"
DYNAMIC = (
    "q, qs, qz = DynamicQuantizeLinear (x)  i = MatMulInteger (q, wq{}) f = Cast <to = 1> (i) "
    "k = Mul (qs, ws)  y = Mul (f, k)"
)
SOFTMAX = (
    "q = QuantizeLinear (x, s, z) r = com.microsoft.QLinearSoftmax <opset = {}{}> (q, s, z, ss, u0) "
    "y = DequantizeLinear (r, ss, u0)"
)
SMALL = {
    "a relu that was taken away, and an op on codes": "c = MatMul (x, w) q = QuantizeLinear (c, s, u0) "
    "r = Reshape (q, flat) d = DequantizeLinear (r, s, u0) y = MatMul (d, w)",
    "a relu that was taken away, and an op on floats": "c = MatMul (x, w) t = Reshape (c, flat) " + PAIRED,
    "an input that is cut": "t = Identity (x) " + PAIRED,
    "a difference that is cut": "t = Sub (x, one) " + PAIRED,
    "no zero point, and a type that is told": "t = Add (x, x) q = QuantizeLinear <output_dtype = 3> (t, s) "
    "d = DequantizeLinear (q, s) y = MatMul (d, w)",
    "no zero point at all": "t = Relu (x) q = QuantizeLinear (t, s) d = DequantizeLinear (q, s) y = MatMul (d, w)",
    "products without the zero point of their input": DYNAMIC.format(""),
    "products with a zero point for each column": DYNAMIC.format(", qz, wz"),
    "a softmax of another opset": SOFTMAX.format(11, ", axis = 0"),
    "a softmax of this opset": SOFTMAX.format(13, ", axis = 0"),
    "a softmax over the last axis": SOFTMAX.format(11, ""),
}


@pytest.mark.parametrize("body", SMALL.values(), ids=SMALL.keys())
def test_small_models_compute_what_they_did(body: str) -> None:
    header = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
    proto = onnx.parser.parse_model(f"{header} net (float[4, 16] x) => (float[A, B] y) {{ {body} }}")
    read = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in CONSTANTS.items() if n in read)
    feeds = [{"x": np.random.default_rng(k).uniform(-1.5, 1.5, (4, 16)).astype(np.float32)} for k in range(4)]
    model = Model(Graph.from_proto(proto), target.load("cpu"))
    for kind in RECOVER:
        kind().apply(model)
    report = onnxq.quantize(proto, feeds, target="cpu", validate=False)
    for feed in feeds:
        expected = evaluate(proto, feed)["y"]
        assert compare(expected, evaluate(model.graph.to_proto(), feed)["y"], 0.1) is None
        assert compare(expected, evaluate(report.model, feed)["y"], 0.15) is None


@pytest.mark.parametrize(
    "zero, scale",
    [(np.full(16, 128.0), np.array(0.03)), (np.full((1, 1), 128.0), np.array([0.03])), (np.full(3, 1.0), np.full(2, 0.1))],
)
def test_odd_parameters_of_spelled_out_rounding_break_nothing(zero: np.ndarray, scale: np.ndarray) -> None:
    body = "a = Div (x, sc) b = Add (a, zp) c = Round (b) e = Clip (c, lo, hi) f = Sub (e, zp) d = Mul (f, sc)"
    header = '<ir_version: 8, opset_import: ["" : 17]>'
    proto = onnx.parser.parse_model(f"{header} net (float[4, 16] x) => (float[A, B] y) {{ {body} y = MatMul (d, w) }}")
    constants = {"sc": scale, "zp": zero, "lo": np.array(0), "hi": np.array(255), "w": WEIGHT}
    proto.graph.initializer.extend(numpy_helper.from_array(a.astype(np.float32), n) for n, a in constants.items())
    model = Model(Graph.from_proto(proto), target.load("cpu"))
    for kind in RECOVER:
        kind().apply(model)
    if zero.size != 3:
        feed = {"x": np.random.default_rng(0).uniform(-1.5, 1.5, (4, 16)).astype(np.float32)}
        assert compare(evaluate(proto, feed)["y"], evaluate(model.graph.to_proto(), feed)["y"], 0.05) is None


def test_activations_of_seven_bits_stay_cut_off_and_run_in_integers() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[1, 8, 8, 8] x) => (float[1, 8, 8, 8] y)
    <float s = {0.01}, uint8 z = {0}, uint8 low = {0}, uint8 high = {127}, float[8, 8, 1, 1] w, float[8, 8, 1, 1] v>
    {
      a = Conv (x, w) r = Relu (a) q = QuantizeLinear (r, s, z) c = Clip (q, low, high)
      d = DequantizeLinear (c, s, z) y = Conv (d, v)
    }"""
    proto, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    for name in "wv":
        values = rng.standard_normal((8, 8, 1, 1)).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    feeds = [{"x": rng.standard_normal((1, 8, 8, 8)).astype(np.float32)} for _ in range(4)]  # a reaches far beyond 1.27
    report = onnxq.quantize(proto, feeds, target="cpu", validate=False)
    assert report.integer_share == 1.0
    for feed in feeds:
        assert compare(evaluate(proto, feed)["y"], evaluate(report.model, feed)["y"], 0.05) is None


@pytest.mark.parametrize("order", [0, 1])
def test_one_reader_of_seven_bits_and_one_of_eight_keep_their_own_ranges(order: int) -> None:
    reads = [
        "c = Clip (q, low, high) d = DequantizeLinear (c, s, z) y = MatMul (d, w)",
        "e = DequantizeLinear (q, s, z) k = MatMul (e, w)",
    ]
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    net (float[4, 16] x) => (float[4, 16] y, float[4, 16] k)
    <float s = {{0.01}}, uint8 z = {{0}}, uint8 low = {{0}}, uint8 high = {{63}}, float[16, 16] w>
    {{ r = Relu (x) q = QuantizeLinear (r, s, z) {" ".join(reads[::-1] if order else reads)} }}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(numpy_helper.from_array(WEIGHT, "w"))
    feeds = [{"x": np.random.default_rng(k).uniform(-1.5, 2.4, (4, 16)).astype(np.float32)} for k in range(4)]
    report = onnxq.quantize(proto, feeds, target="cpu", validate=False)
    for feed in feeds:
        expected, got = evaluate(proto, feed), evaluate(report.model, feed)
        for name in "yk":
            assert compare(expected[name], got[name], 0.05) is None


SPELLED = """<ir_version: 8, opset_import: ["" : 17]>
net (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y)
<float[8, 8, 3, 3] w, float s = {0.05}, float z = {%s}, float low = {%s}, float high = {%s}> {
    h = Conv <pads = [1, 1, 1, 1]> (x, w)  a = Div (h, s)  b = Add (a, z)  c = Round (b)  d = Clip (c, low, high)
    e = Sub (d, z)  f = Mul (e, s)  y = Conv <pads = [1, 1, 1, 1]> (f, w) }"""
CODED = """<ir_version: 8, opset_import: ["" : 17]>
net (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y)
<float[8, 8, 3, 3] w, float s = {0.05}, %s z = {%s}, %s low = {%s}, %s high = {%s}> {
    h = Conv <pads = [1, 1, 1, 1]> (x, w)  q = QuantizeLinear (h, s, z)  c = Clip (q, low, high)
    f = DequantizeLinear (c, s, z)  y = Conv <pads = [1, 1, 1, 1]> (f, w) }"""


@pytest.mark.parametrize("spelled", [True, False])
@pytest.mark.parametrize(
    ("low", "high", "zero"),
    [
        (0, 255, 0), (1, 255, 1), (50, 255, 50), (10, 255, 10), (0, 255, 255), (0, 254, 128), (0, 127, 0),
        (3, 90, 40), (20, 21, 20),
        (-128, 127, -128), (-128, 127, 127), (-127, 127, -127), (-127, 127, 0), (-80, 127, -80), (-64, 63, 3), (-8, 7, 0),
        (-8, 7, 20), (-2, 1, 0), (-100, 100, -100), (0, 1, 0), (1, 16, 0),
    ],
)  # fmt: skip
def test_any_bounds_of_codes_leave_the_function_that_was_trained(low: int, high: int, zero: int, spelled: bool) -> None:
    kind = "int8" if low < 0 else "uint8"
    proto = onnx.parser.parse_model(SPELLED % (zero, low, high) if spelled else CODED % (kind, zero, kind, low, kind, high))
    rng = np.random.default_rng(0)
    proto.graph.initializer.append(numpy_helper.from_array((rng.standard_normal((8, 8, 3, 3)) / 8).astype(np.float32), "w"))
    del proto.graph.value_info[:]
    feeds = [{"x": rng.standard_normal((1, 8, 6, 6)).astype(np.float32)} for _ in range(8)]
    report = onnxq.quantize(proto, feeds, target="cpu", threads=1, validate=False)
    one, other = (Session(m, threads=1, config=EMULATED) for m in (proto, report.model))
    signal = off = 0.0
    for feed in feeds:
        expected, found = one.run(feed)["y"], other.run(feed)["y"]
        signal, off = signal + np.square(expected).sum(), off + np.square(found - expected).sum()
    steps = (high - low) if low <= zero <= high else 255
    assert off <= signal * 1e-3 + (0 if steps >= 60 else signal * 4 / steps**2)


def test_an_endless_clip_beside_a_round_is_no_range() -> None:
    proto = onnx.parser.parse_model(SPELLED % (0, "-inf", "inf"))
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((8, 8, 3, 3), np.float32), "w"))
    del proto.graph.value_info[:]
    report = onnxq.quantize(proto, [{"x": np.ones((1, 8, 6, 6), np.float32)}], target="cpu", threads=1, validate=False)
    assert any(n.op_type == "Round" for n in report.model.graph.node)
