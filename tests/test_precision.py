"""precision.py: models of 16-bit floats compute the same in float32, between the inputs and outputs that they have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

import onnxq
from onnxq.errors import UnsupportedModelError
from onnxq.graph import Graph
from onnxq.inspection import inspect
from onnxq.precision import is_half, widen
from onnxq.runtime import Session, evaluate
from tests import tiny

IN_BODY = """tiny (float16[N, 4] x, bool c) => (float16[N, 3] y, float16[N, 4] x2) <float16[4, 3] w, float16[3] b>
{ x2 = Identity (x)
  y = If (c) <then_branch = t () => (float16[N, 3] u) { u = MatMul (x, w) },
              else_branch = e () => (float16[N, 3] v) { v0 = MatMul (x2, w)  v = Add (v0, b) }> }"""
MADE_INSIDE = """tiny (float[N, 4] x) => (float[N, 4] y)
{ h = Cast <to = 10> (x)  s = Shape (x)  one0 = ConstantOfShape (s)  one = Cast <to = 10> (one0)
  z = Add (h, one)  y = Cast <to = 1> (z) }"""


@pytest.mark.parametrize("text", [tiny.HALF, IN_BODY, MADE_INSIDE])
def test_a_widened_model_computes_the_same(text: str) -> None:
    proto = tiny.model(text)
    before = proto.SerializeToString()
    wide = Graph.from_proto(proto).to_proto()
    assert proto.SerializeToString() == before
    onnx.checker.check_model(wide, full_check=True)
    kind = np.float16 if proto.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16 else np.float32
    for flag in (True, False):
        feed = {"x": tiny.rows(3).astype(kind), "c": np.array(flag)}
        feed = {i.name: feed[i.name] for i in proto.graph.input}
        expected, found = evaluate(proto, feed), evaluate(wide, feed)
        for name, array in expected.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_allclose(found[name].astype(float), array.astype(float), rtol=5e-3, atol=5e-3)
    halves = {n.name for n in wide.graph.node if n.op_type == "Cast"}
    assert all(n.op_type == "Cast" or n.name not in halves for n in wide.graph.node)
    assert not any(t.data_type == TensorProto.FLOAT16 for t in wide.graph.initializer)


def test_bfloat16_inside_is_computed_in_float32(tmp_path: Path) -> None:
    proto = tiny.model("tiny (float[N, 4] x) => (float[N, 3] y) <float[4, 3] w> { h = MatMul (x, w) y = Relu (h) }")
    weight = numpy_helper.to_array(proto.graph.initializer[0])
    bits = (weight.view(np.uint32) >> 16).astype(np.uint16)
    proto.graph.initializer[0].CopyFrom(TensorProto(
        name="w", data_type=TensorProto.BFLOAT16, dims=weight.shape, raw_data=bits.tobytes()
    ))  # fmt: skip
    proto.graph.node[0].input[0] = "x16"
    proto.graph.node[1].input[0] = "h32"
    proto.graph.node.insert(0, onnx.helper.make_node("Cast", ["x"], ["x16"], to=TensorProto.BFLOAT16))
    proto.graph.node.insert(2, onnx.helper.make_node("Cast", ["h"], ["h32"], to=TensorProto.FLOAT))
    onnx.checker.check_model(proto, full_check=True)
    assert is_half(proto)
    report = onnxq.quantize(proto, [{"x": row[None]} for row in tiny.rows(16)], target="cpu", output=tmp_path / "q.onnx")
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    x = tiny.rows(4, seed=5)
    expected = np.maximum(x @ values, 0)
    np.testing.assert_allclose(Session(tmp_path / "q.onnx").run({"x": x})["y"], expected, atol=0.05)
    assert report.latency is not None


def test_a_model_of_float16_is_quantized_between_its_own_types(tmp_path: Path) -> None:
    samples = [{"x": row[None]} for row in tiny.rows(16)]  # float32: the data of its float32 twin will do
    report = onnxq.quantize(tiny.model(tiny.HALF), samples, target="cpu", output=tmp_path / "q.onnx")
    assert [e.is_integer for e in report.ledger.values() if e.op == "MatMul"] == [True]
    assert any("16-bit floats" in note for note in report.notes)
    session = Session(tmp_path / "q.onnx")
    assert [i.dtype for i in (*session.inputs, *session.outputs)] == [np.float16, np.float16]
    assert report.accuracy is not None


def test_a_model_of_bfloat16_is_quantized_between_its_own_types(tmp_path: Path) -> None:
    text = "tiny (bfloat16[N, 4] x, int64[N] at) => (bfloat16[N, 3] y, int64[N] a) <bfloat16[4, 3] w> "
    proto = tiny.model(text + "{ y = MatMul (x, w)  a = Identity (at) }")
    bfloat16 = onnx.helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
    rows = [row[None].astype(kind) for row, kind in zip(tiny.rows(16), [np.float32, bfloat16] * 8, strict=True)]
    samples = [{"x": row, "at": np.array([3])} for row in rows]
    report = onnxq.quantize(proto, samples, target="cpu", output=tmp_path / "q.onnx")
    assert [e.is_integer for e in report.ledger.values() if e.op == "MatMul"] == [True]
    written = onnx.load(tmp_path / "q.onnx")
    onnx.checker.check_model(written, full_check=True)
    kinds = [i.type.tensor_type.elem_type for i in (*written.graph.input, *written.graph.output)]
    assert kinds == [TensorProto.BFLOAT16, TensorProto.INT64] * 2
    assert report.accuracy is not None
    assert report.accuracy.real.outputs["y"].sqnr > 30
    weight = numpy_helper.to_array(proto.graph.initializer[0]).astype(np.float32)
    found = Session(tmp_path / "q.onnx").run(samples[1] | {"x": np.asarray(rows[0])})
    np.testing.assert_allclose(found["y"], np.asarray(rows[0]) @ weight, atol=0.05)
    np.testing.assert_array_equal(found["a"], [3])


def test_bfloat16_is_read_in_the_order_of_its_elements() -> None:
    proto = tiny.model(
        "tiny (bfloat16[2, 3, 4] x, float[2, 3] z) => (bfloat16[2, 3, 4] y, float[2, 3] a) { y = Abs (x)  a = Abs (z) }"
    )
    widen(proto)
    values = np.arange(24, dtype=np.float32).reshape(4, 3, 2).transpose(2, 1, 0)
    other = np.arange(6, dtype=np.float32).reshape(3, 2).T
    found = Session(proto, threads=1).run({"x": values, "z": other})
    np.testing.assert_array_equal(found["y"], values)
    np.testing.assert_array_equal(found["a"], other)


def test_what_is_written_of_bfloat16_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(tiny.model("tiny (bfloat16[N, 4] x) => (bfloat16[N, 3] y) <bfloat16[4, 3] w> { y = MatMul (x, w) }"), path)
    bfloat16 = onnx.helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
    rows = [{"x": row[None].astype(bfloat16)} for row in tiny.rows(8)]
    onnxq.quantize(path, iter(rows), target="cpu", output=tmp_path / "q.onnx", threads=1)  # kept in files as it is read
    report = onnxq.validate(path, tmp_path / "q.onnx", rows, threads=1)
    assert report.accuracy is not None
    assert report.accuracy.real.outputs["y"].sqnr > 30
    assert inspect(tmp_path / "q.onnx").coverage["MatMul"].integer == 1
    onnxq.quantize(tmp_path / "q.onnx", rows, target="cpu", output=tmp_path / "again.onnx", threads=1)


def test_bfloat16_beside_a_sequence_or_text_is_refused() -> None:
    for other in ("seq(float[N, 4])", "string[N]"):
        with pytest.raises(
            UnsupportedModelError, match="x is of bfloat16, which onnxruntime does not take or give beside z"
        ):
            widen(tiny.model(f"tiny (bfloat16[N, 4] x, {other} z) => (bfloat16[N, 4] y) {{ y = Abs (x) }}"))


def test_sequences_of_16_bit_floats_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="y is a sequence of 16-bit floats"):
        widen(tiny.model("tiny (float16[N, 4] x) => (seq(float16[N, 4]) y) { y = SequenceConstruct (x) }"))


@pytest.mark.parametrize(
    "text",
    [
        "tiny (float16[N, 4] x) => (float16[N, 3] y) <float16[4, 3] w, float[3] y_float32> { y = MatMul (x, w) }",
        "tiny (float16[N, 4] x, float[N] x_float32) => (float16[N, 3] y) <float16[4, 3] w> { y = MatMul (x, w) }",
        "tiny (float16[N, 4] x) => (float16[N, 3] y, float[3] y_float32) <float16[4, 3] w, float[3] y_float32>"
        "{ y = MatMul (x, w) }",
    ],
)
def test_names_that_are_taken_are_left_alone(text: str) -> None:
    wide = Graph.from_proto(tiny.model(text)).to_proto()
    feed = {i.name: np.ones([d.dim_value or 2 for d in i.type.tensor_type.shape.dim]) for i in wide.graph.input}
    feed = {k: a.astype(np.float32 if "float32" in k else np.float16) for k, a in feed.items()}
    assert Session(wide, threads=1).run(feed)["y"].dtype == np.float16
