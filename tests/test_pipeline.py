"""quantize and calibrate, end to end on the shipped models and on small graphs."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

import onnxq
from onnxq import audit, machine, runtime
from onnxq.data import open_samples
from onnxq.errors import CalibrationError, DataError, ModelError, OutputError, RecipeError
from onnxq.inspection import inspect
from onnxq.model import Reason, State
from onnxq.recipe import Recipe
from onnxq.runtime import Session, evaluate, exposed

CALIBRATION, EVALUATION = "digits_calibration.npz", "digits_evaluation.npz"
HEADER = '<ir_version: 9, opset_import: ["" : 17]>\n'
THREE_CONVS = """net (float[N, 8, 9, 9] x) => (float[N, 8, 9, 9] y)
<float[8, 8, 3, 3] w1, float[8, 8, 3, 3] w2, float[8, 8, 3, 3] w3> {
  [first] a = Conv <pads = [1, 1, 1, 1]> (x, w1)
  [second] b = Conv <pads = [1, 1, 1, 1]> (a, w2)
  [third] c = Conv <pads = [1, 1, 1, 1]> (b, w3)
  y = Relu (c)
}"""


def small(text: str) -> tuple[onnx.ModelProto, list[dict[str, np.ndarray]]]:
    """The model with seeded weights, and four feeds."""
    proto, rng = onnx.parser.parse_model(HEADER + text), np.random.default_rng(0)
    for info in proto.graph.value_info:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        values = rng.standard_normal(shape).astype(np.float32) / np.sqrt(np.prod(shape[1:]))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), info.name))
    del proto.graph.value_info[:]
    shapes = {i.name: [d.dim_value or 1 for d in i.type.tensor_type.shape.dim] for i in proto.graph.input}
    feeds = [{n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()} for _ in range(4)]
    return proto, feeds


FLOAT_BY_RULE = {  # of each shipped model: what stays float, and why
    "residual": set(),
    "inverted_residual": set(),
    "vision_transformer": {("MatMul", Reason.ATTENTION)},
    "recurrent": set(),
    "video": {("GRU", None)},  # its weights are of 8 bits,
}


@pytest.mark.parametrize("name", FLOAT_BY_RULE)
def test_a_shipped_model_keeps_its_accuracy_in_integer_kernels(name: str, models: Path) -> None:
    said = tomllib.loads((models / "models.toml").read_text())[name]
    data, evaluation = models / said["calibration"], models / said["evaluation"]
    report = onnxq.quantize(models / said["file"], data, eval=evaluation, target="cpu")
    accuracy = report.accuracy
    assert accuracy is not None
    assert accuracy.float.metrics["top1"] == pytest.approx(100 * said["float_top1"])
    assert accuracy.drop is not None
    assert accuracy.drop <= 0.5
    assert accuracy.emulated.outputs["logits"].sqnr > 30
    assert report.quantized_bytes < 0.6 * report.float_bytes
    found = {(e.op, e.reason) for e in report.ledger.values() if e.op in audit.COMPUTE and not e.is_integer}
    assert found == FLOAT_BY_RULE[name]
    assert not any(r.rolled_back for r in report.passes)


def test_attention_runs_in_integers_when_asked_to(models: Path) -> None:
    recipe = Recipe(target="cpu", passes={"annotate-attention": {"integers": True}})
    report = onnxq.quantize(
        models / "vision_transformer.onnx", models / CALIBRATION, eval=models / EVALUATION, recipe=recipe, max_samples=100
    )
    assert report.integer_share == 1.0
    assert report.accuracy is not None
    assert report.accuracy.real.outputs["logits"].sqnr > 25


def test_the_same_inputs_give_the_same_bytes_twice(models: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        onnxq.quantize(models / "residual.onnx", models / CALIBRATION, output=tmp_path / name, target="cpu", validate=False)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_statistics_from_a_file_give_the_same_model(models: Path, tmp_path: Path) -> None:
    direct = onnxq.quantize(models / "residual.onnx", models / CALIBRATION, target="cpu", max_samples=16, validate=False)
    onnxq.calibrate(
        models / "residual.onnx", models / CALIBRATION, output=tmp_path / "m.calib", target="cpu", max_samples=16
    )
    later = onnxq.quantize(models / "residual.onnx", calibration=tmp_path / "m.calib", target="cpu", validate=False)
    assert later.model.SerializeToString(deterministic=True) == direct.model.SerializeToString(deterministic=True)
    other = onnxq.quantize(models / "residual.onnx", calibration=tmp_path / "m.calib", observer="kl", validate=False)
    assert other.model.graph != direct.model.graph
    with pytest.raises(CalibrationError, match="another model"):
        onnxq.quantize(models / "inverted_residual.onnx", calibration=tmp_path / "m.calib", validate=False)


def test_a_proto_bytes_and_a_path_give_the_same_model(models: Path) -> None:
    path = models / "residual.onnx"
    made = [
        onnxq.quantize(m, models / CALIBRATION, target="cpu", max_samples=4, validate=False).model.SerializeToString(
            deterministic=True
        )
        for m in (path, str(path), path.read_bytes(), onnx.load(path))
    ]
    assert len(set(made)) == 1


def test_provenance_is_in_the_file(models: Path) -> None:
    report = onnxq.quantize(models / "residual.onnx", models / CALIBRATION, max_samples=4, validate=False)
    metadata = {p.key: p.value for p in report.model.metadata_props}
    assert metadata["onnxq.version"] == onnxq.__version__
    assert json.loads(metadata["onnxq.recipe"])["observer"] == "mse"
    assert len(metadata["onnxq.source_sha256"]) == 64
    ledger = json.loads(metadata["onnxq.ledger"])
    lines = [line for by_op in ledger.values() for names in by_op.values() for line in names]
    assert {line if isinstance(line, str) else line[0] for line in lines} == set(report.ledger)


@pytest.mark.parametrize("pattern", ["second", "seco*", "b"])
def test_an_excluded_layer_runs_in_float_between_integer_layers(pattern: str) -> None:
    proto, feeds = small(THREE_CONVS)
    report = onnxq.quantize(proto, feeds, target="cpu", exclude=[pattern], validate=False)
    states = {name: entry.state for name, entry in report.ledger.items()}
    assert states == {"first": State.INTEGER, "second": State.FLOAT, "third": State.INTEGER}
    kernels = {n.name: n.op_type for n in runtime.optimized(report.model).graph.node}
    assert kernels["first"] == kernels["third"] == "QLinearConv"
    assert kernels["second"] in ("Conv", "FusedConv")


def test_excluding_every_conv_leaves_a_float_model_without_qdq() -> None:
    proto, feeds = small(THREE_CONVS)
    report = onnxq.quantize(proto, feeds, target="cpu", exclude=["Conv"], validate=False)
    assert {n.op_type for n in report.model.graph.node} == {"Conv", "Relu"}
    assert any("Nothing could be quantized" in note for note in report.notes)


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    proto, feeds = small(THREE_CONVS)
    with pytest.raises(RecipeError, match=r"exclude pattern secnd matches no node .* did you mean second"):
        onnxq.quantize(proto, feeds, exclude=["secnd"], validate=False)


def test_public_names_types_and_shapes_are_kept() -> None:
    proto, feeds = small(THREE_CONVS)
    report = onnxq.quantize(proto, feeds, target="cpu", validate=False)
    assert report.model.graph.input == proto.graph.input
    assert report.model.graph.output == proto.graph.output
    Session(report.model).run({"x": np.zeros((3, 8, 9, 9), np.float32)})


def test_an_observer_for_one_tensor_changes_that_one_only(tmp_path: Path) -> None:
    proto, feeds = small(THREE_CONVS)
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[[override]]\nmatch = "a"\nobserver = "percentile{lower=20,upper=80}"\n[passes]\nselect-layers = false\n'
    )
    plain, changed = (
        {
            t.name: onnx.numpy_helper.to_array(t)
            for t in onnxq.quantize(proto, feeds, target="cpu", recipe=r, validate=False).model.graph.initializer
        }
        for r in (None, recipe)
    )
    different = [n for n in plain if n.endswith("_scale") and not np.array_equal(plain[n], changed[n])]
    assert "a_scale" in different
    assert not {"x_scale", "y_scale", "b_scale"} & set(different)


def test_a_linear_layer_whose_range_differs_from_feed_to_feed_is_quantized_at_run_time() -> None:
    text = (
        "net (float[N, 16] x) => (float[N, 16] y) <float[16, 16] w1, float[16] b1> { a = MatMul (x, w1)\n y = Add (a, b1) }"
    )
    proto, _ = small(text)
    rng = np.random.default_rng(1)
    feeds = [{"x": (rng.standard_normal((4, 16)) * 10.0**k).astype(np.float32)} for k in (-2, -1, 0, 1)]
    report = onnxq.quantize(proto, feeds, target="cpu")
    assert [(e.op, e.state) for e in report.ledger.values()] == [("Gemm", State.DYNAMIC)]
    assert "DynamicQuantizeMatMul" in inspect(report.model).kernels
    static = onnxq.quantize(proto, feeds, recipe=Recipe(target="cpu", passes={"select-dynamic": False}))
    small_feed = Session(proto).run(feeds[0])["y"]
    errors = [np.abs(Session(r.model).run(feeds[0])["y"] - small_feed).max() for r in (report, static)]
    assert errors[0] < errors[1] / 1.5


def test_an_input_of_unknown_rank_takes_any_sample() -> None:
    proto, feeds = small(THREE_CONVS)
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    report = onnxq.quantize(proto, [{"x": np.repeat(f["x"], 2, 0)} for f in feeds], target="cpu", validate=False)
    assert report.integer_share == 1.0


def test_a_normalization_behind_an_integer_layer_stays_one_kernel() -> None:
    text = """net (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y)
    <float[4, 4, 1, 1] w1, float[6] w2, float two = {2}, float eps = {0.00001}> {
      a = Conv (x, w1)
      p = Pow (a, two)
      m = ReduceMean <axes = [-1]> (p)
      e = Add (m, eps)
      s = Sqrt (e)
      d = Div (a, s)
      y = Mul (d, w2)
    }"""
    proto, feeds = small(text)
    report = onnxq.quantize(proto, feeds, target="cpu", validate=False)
    assert inspect(report.model).kernels["SimplifiedLayerNormalization"] == 1
    assert report.integer_share == 1.0


DIFFERENT_RANGES = [
    (np.random.default_rng(k + 2).standard_normal((4, 16)) * 10.0**k).astype(np.float32) for k in (-2, -1, 0, 1)
]


def test_a_float_reader_of_a_tensor_that_is_quantized_at_run_time_reads_it_in_float() -> None:
    text = """net (float[N, 16] x) => (float[N, 16] y, float[N, 16] z) <float[16, 16] w> {
      [keep] y = MatMul (x, w)
      [lin] z = MatMul (x, w)
    }"""
    proto, _ = small(text)
    report = onnxq.quantize(proto, [{"x": x} for x in DIFFERENT_RANGES], target="cpu", exclude="keep", validate=False)
    assert {n: e.state for n, e in report.ledger.items()} == {"keep": State.FLOAT, "lin": State.DYNAMIC}


def test_outputs_whose_shape_depends_on_the_data_and_sequences_pass() -> None:
    text = """net (float[N, 8, 9, 9] x) => (float[M] y, seq(float[N, 8, 9, 9]) s)
    <float[8, 8, 3, 3] w1, float low = {0.1}, int64[1] flat = {-1}> {
      a = Conv (x, w1)
      f = Reshape (a, flat)
      c = Greater (f, low)
      y = Compress (f, c)
      s = SequenceConstruct (a)
    }"""
    proto, feeds = small(text)
    report = onnxq.quantize(proto, feeds, target="cpu")
    assert report.integer_share == 1.0


def test_a_table_of_infinities_is_looked_up_in_float() -> None:
    text = "net (int64[N] i) => (float[N, 128] y) <float[128, 128] t> { y = Gather (t, i) }"
    proto = onnx.parser.parse_model(HEADER + text)
    del proto.graph.value_info[:]
    mask = np.triu(np.full((128, 128), -np.inf, np.float32), 1)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(mask, "t"))
    report = onnxq.quantize(proto, [{"i": np.arange(4)}], target="cpu", validate=False)
    np.testing.assert_array_equal(Session(report.model).run({"i": np.arange(8)})["y"], mask[:8])


def test_an_initializer_that_could_be_overridden_is_a_constant_in_the_result_and_the_report_says_so() -> None:
    proto, feeds = small(THREE_CONVS)
    for name in ("w1", "w2"):
        proto.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [8, 8, 3, 3]))
    report = onnxq.quantize(proto, [{"x": f["x"]} for f in feeds], target="cpu", validate=False)
    assert [i.name for i in report.model.graph.input] == ["x"]
    assert "2 initializers that could be given as inputs are constants in the result, the first w1." in report.notes


def test_a_layer_of_4_bit_weights_stays_as_it_is_and_its_neighbour_becomes_integer() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
    net (float[N, 32] x) => (float[N, 4] y) <float[16, 4] w2, float s = {0.1}> {
      w = DequantizeLinear (codes, s)
      [first] a = MatMul (x, w)
      r = Relu (a)
      [second] y = MatMul (r, w2)
    }"""
    proto, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    second = rng.standard_normal((16, 4)).astype(np.float32)
    codes = onnx.helper.make_tensor("codes", onnx.TensorProto.INT4, [32, 16], rng.integers(-8, 8, 512).tolist())
    proto.graph.initializer.extend([onnx.numpy_helper.from_array(second, "w2"), codes])
    for info in [i for i in proto.graph.value_info if i.name == "w2"]:
        proto.graph.value_info.remove(info)
    feeds = [{"x": rng.standard_normal((2, 32)).astype(np.float32)} for _ in range(4)]
    report = onnxq.quantize(proto, feeds, target="cpu")
    assert {n: e.state for n, e in report.ledger.items()} == {"first": State.FLOAT, "second": State.INTEGER}
    assert [t for t in report.model.graph.initializer if t.name == "codes"] == [codes]
    assert report.accuracy is not None
    assert report.accuracy.real.outputs["y"].sqnr > 30


def test_an_output_that_rounding_would_spoil_keeps_its_layers_in_float(tmp_path: Path) -> None:
    proto, feeds = small(THREE_CONVS)
    recipe = tmp_path / "r.toml"
    recipe.write_text('[[override]]\nmatch = "a"\nobserver = "percentile{lower=20,upper=80}"\n')
    report = onnxq.quantize(proto, feeds, target="cpu", recipe=recipe)
    assert report.accuracy is not None
    assert report.accuracy.real.outputs["y"].sqnr > 30
    assert {e.reason for e in report.ledger.values() if e.state is State.FLOAT} == {Reason.SENSITIVE}
    assert 0 < report.integer_share < 1


def test_a_recipe_leaves_a_pass_out_and_gives_another_its_options(tmp_path: Path) -> None:
    proto, feeds = small(THREE_CONVS)
    recipe = tmp_path / "r.toml"
    recipe.write_text('target = "cpu"\n[passes]\ncorrect-bias = false\nchoose-weight-ranges = { method = "max" }\n')
    report = onnxq.quantize(proto, feeds, recipe=recipe, validate=False)
    assert "correct-bias" not in [r.name for r in report.passes]
    scale = next(t for t in report.model.graph.initializer if t.name == "w3_scale")
    w3 = next(t for t in proto.graph.initializer if t.name == "w3")
    largest = np.abs(onnx.numpy_helper.to_array(w3)).max((1, 2, 3)) / 127
    assert (onnx.numpy_helper.to_array(scale) >= largest * 0.999).all()


def test_a_model_that_onnxruntime_loads_only_when_it_optimizes_it_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def picky(model: Any, *, optimize: bool = True, **named: Any) -> Session:
        if not optimize:
            raise ModelError("there is no kernel for what would be optimized away")
        return Session(model, **named)

    monkeypatch.setattr("onnxq.preparation.Session", picky)
    proto, feeds = small(THREE_CONVS)
    assert onnxq.calibrate(proto, feeds).samples == len(feeds)


@pytest.mark.parametrize("granularity", ["per-channel", "per-tensor"])
@pytest.mark.parametrize("symmetry", ["symmetric", "asymmetric"])
def test_weights_of_every_granularity_and_symmetry_run_in_integers(granularity: str, symmetry: str) -> None:
    proto, feeds = small(THREE_CONVS)
    options = {"weight_granularity": granularity, "weight_symmetry": symmetry}
    recipe = Recipe(target="cpu", passes={"annotate-compute": options, "repair-saturation": False})
    report = onnxq.quantize(proto, feeds, recipe=recipe)
    values = {t.name: onnx.numpy_helper.to_array(t) for t in report.model.graph.initializer}
    assert values["w1_scale"].shape == ((8,) if granularity == "per-channel" else ())
    (dequantizer,) = [n for n in report.model.graph.node if n.output[0] == "w1_dq"]
    zero_point = values[dequantizer.input[2]] if len(dequantizer.input) > 2 else np.int8(0)
    assert np.any(zero_point) == (symmetry == "asymmetric")
    assert report.integer_share == 1.0
    assert report.accuracy is not None
    saturates = machine.u8s8_saturates()  # which is not repaired here
    assert (report.accuracy.emulated if saturates else report.accuracy.real).outputs["y"].sqnr > 25


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_weights_of_fewer_bits_run_in_integer_kernels(bits: int, models: Path) -> None:
    data = models / CALIBRATION
    report = onnxq.quantize(models / "residual.onnx", data, weight_bits=bits, max_samples=64, validate=bits == 4)
    assert report.integer_share == 1.0
    codes = [t for t in report.model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    values = np.concatenate([onnx.numpy_helper.to_array(t).astype(int).reshape(-1) for t in codes])
    assert -(2 ** (bits - 1)) <= values.min() < values.max() == 2 ** (bits - 1) - 1
    if report.accuracy is not None:
        assert report.accuracy.drop is not None
        assert report.accuracy.drop <= 1.0


WIDTHS = [(3, "uint8", 7), (6, "uint8", 63), (12, "uint16", 4095), (16, "uint16", 65535)]


@pytest.mark.parametrize(("bits", "kind", "most"), WIDTHS)
def test_activations_of_other_widths_are_simulated(bits: int, kind: str, most: int, models: Path) -> None:
    data = str(models / CALIBRATION)
    report = onnxq.quantize(models / "residual.onnx", data, activation_bits=bits, max_samples=32, validate=bits == 6)
    assert {e.reason for e in report.ledger.values() if e.op == "Conv"} == {Reason.SIMULATED}
    codes = [n.output[0] for n in report.model.graph.node if n.op_type == "QuantizeLinear"]
    assert len(codes) > 5
    feed = next(iter(open_samples(data, Session(report.model).inputs))).feed
    values = evaluate(exposed(report.model, codes), feed)
    assert {str(values[c].dtype) for c in codes} == {kind}
    assert 0.9 * most <= max(int(values[c].max()) for c in codes) <= most
    if report.accuracy is not None:
        assert report.accuracy.drop is not None
        assert report.accuracy.drop <= 1.0


def test_gates_that_are_missed_are_in_the_report(models: Path) -> None:
    report = onnxq.quantize(
        models / "residual.onnx",
        models / CALIBRATION,
        eval=models / EVALUATION,
        max_samples=20,
        max_drop=-1.0,
        min_speedup=1e6,
    )
    assert len(report.missed_gates) == 2
    assert "max-drop" in report.missed_gates[0]
    assert "min-speedup" in report.missed_gates[1]


def test_a_result_without_integers_can_be_a_missed_gate() -> None:
    proto, feeds = small(THREE_CONVS)
    for exclude, missed in ((None, []), ("Conv", ["no layer is integer, and --require-int8 was given"])):
        report = onnxq.quantize(proto, feeds, target="cpu", exclude=exclude, require_int8=True, validate=False)
        assert report.missed_gates == missed
        assert onnxq.quantize(proto, feeds, target="cpu", exclude=exclude, validate=False).missed_gates == []


def test_a_user_s_metric_is_called_for_each_column(models: Path) -> None:
    calls = []

    def metric(run, samples) -> float:
        outputs = [run(feed)["logits"] for feed, _ in samples]
        calls.append(len(outputs))
        return float(np.mean(outputs))

    report = onnxq.quantize(models / "residual.onnx", models / CALIBRATION, metric=metric, max_samples=6)
    assert calls == [6, 6, 6]
    assert report.accuracy is not None
    assert report.accuracy.metric == "metric"


def test_unlabelled_data_gives_distances_instead_of_a_metric() -> None:
    proto, feeds = small(THREE_CONVS)
    report = onnxq.quantize(proto, feeds, target="cpu")
    assert report.accuracy is not None
    assert report.accuracy.drop is None
    assert report.accuracy.real.outputs["y"].sqnr > 20
    assert report.latency is not None
    assert report.latency.verdict in ("faster", "slower", "equal")
    with pytest.raises(RecipeError, match="needs a metric"):
        onnxq.quantize(proto, feeds, target="cpu", max_drop=1.0)


def test_the_report_is_json_with_a_schema_number(models: Path) -> None:
    report = onnxq.quantize(models / "residual.onnx", models / CALIBRATION, eval=models / EVALUATION, max_samples=8)
    plain = json.loads(report.to_json())
    assert plain["schema"] == 1
    assert plain["integer_share"] == 1.0
    assert plain["coverage"]["Conv"]["integer"] == 8
    assert plain["accuracy"]["metric"] == "top1"
    assert plain["latency"]["verdict"] in ("faster", "slower", "equal")
    assert {r["name"] for r in plain["passes"]} >= {"fuse-conv-batchnorm", "insert-qdq"}
    assert "model" not in plain


def test_nothing_is_written_where_something_exists(tmp_path: Path) -> None:
    proto, feeds = small(THREE_CONVS)
    source, out = tmp_path / "m.onnx", tmp_path / "q.onnx"
    onnx.save(proto, source)
    out.write_text("precious")
    with pytest.raises(OutputError, match="--force"):
        onnxq.quantize(source, feeds, output=out)
    with pytest.raises(OutputError, match="is the input model, or its data"):
        onnxq.quantize(source, feeds, output=source, force=True)
    assert out.read_text() == "precious"
    onnxq.quantize(source, feeds, output=out, force=True, validate=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "q.onnx"]


def test_dumps_hold_text_and_onnx_after_every_pass(tmp_path: Path) -> None:
    proto, feeds = small(THREE_CONVS)
    onnxq.quantize(proto, feeds, target="cpu", validate=False, dump_dir=tmp_path / "dump")
    names = sorted(p.name.split("-", 1)[1] for p in (tmp_path / "dump").iterdir())
    assert "insert-qdq.onnx" in names
    assert "insert-qdq.txt" in names


def test_without_data_it_says_what_to_give() -> None:
    proto, _ = small(THREE_CONVS)
    with pytest.raises(DataError, match="--data"):
        onnxq.quantize(proto)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("net (float[1, 4] x, float[4, 3] w) => (float[1, 3] y) { y = MatMul (x, w) }", "NO_CONSTANT_WEIGHT"),
        ("net (double[1, 4] x) => (double[1, 3] y) <double[4, 3] w> { y = MatMul (x, w) }", "NOT_FLOAT32"),
    ],
)
def test_what_stays_float_has_a_reason(text: str, why: str) -> None:
    proto, feeds = small(text)
    kinds = {i.name: onnx.helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in proto.graph.input}
    for k, tensor in enumerate(proto.graph.initializer):
        if "double" in text:
            proto.graph.initializer[k].CopyFrom(
                onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float64), tensor.name)
            )
    feeds = [{n: a.astype(kinds[n]) for n, a in f.items()} for f in feeds]
    report = onnxq.quantize(proto, feeds, target="cpu", validate=False)
    (entry,) = report.ledger.values()
    assert entry.reason is not None
    assert entry.reason.name == why


def test_what_the_runtime_does_not_fuse_is_left_in_float_and_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The audit is told that it never saw `second` in an integer kernel, as on a runtime that does not fuse it."""
    real = audit.run_in_integers
    monkeypatch.setattr(audit, "run_in_integers", lambda proto, model: real(proto, model) - {"second"})
    proto, feeds = small(THREE_CONVS)
    report = onnxq.quantize(proto, feeds, target="cpu", validate=False)
    states = {name: (entry.state, entry.reason and entry.reason.name) for name, entry in report.ledger.items()}
    assert states["second"] == (State.FLOAT, "NOT_FUSED")
    assert states["first"][0] is states["third"][0] is State.INTEGER
    assert any("did not fuse 1 nodes" in note for note in report.notes)
    assert {n.name: n.op_type for n in runtime.optimized(report.model).graph.node}["second"] in ("Conv", "FusedConv")


def test_nodes_of_bodies_and_of_local_functions_are_in_the_ledger() -> None:
    nested = """net (bool c, float[2, 4] x) => (float[2, 4] y)
    <float[4, 4] w> {
      y = If (c) <
        then_branch = outer () => (float[2, 4] t) {
          t = If (c) <
            then_branch = inner () => (float[2, 4] i) { [deep] i = MatMul (x, w) },
            else_branch = other () => (float[2, 4] o) { o = Relu (x) }
          >
        },
        else_branch = last () => (float[2, 4] e) { e = Tanh (x) }
      >
    }"""
    proto, feeds = small(nested)
    feeds = [{"c": np.array(True), "x": f["x"]} for f in feeds]
    report = onnxq.quantize(proto, feeds, target="cpu", validate=False)
    assert report.ledger["deep"].state is State.INTEGER
    function = """<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
    net (float[2, 4] x, float[4, 4] w) => (float[2, 4] y) { y = local.Linear (x, w) }
    <domain: "local", opset_import: ["" : 17]> Linear (a, b) => (c) { m = MatMul (a, b) c = Relu (m) }"""
    proto = onnx.parser.parse_model(function)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"))
    proto.graph.input.pop()
    report = onnxq.quantize(proto, [{"x": f["x"]} for f in feeds], target="cpu", validate=False)
    assert [(e.op, e.state) for e in report.ledger.values()] == [("MatMul", State.INTEGER)]


def test_options_are_put_over_a_recipe_object() -> None:
    proto, feeds = small(THREE_CONVS)
    report = onnxq.quantize(proto, feeds, recipe=Recipe(observer="kl"), target="cpu", exclude="second", validate=False)
    assert (report.target, report.observer) == ("cpu", "kl")
    assert report.ledger["second"].state is State.FLOAT
    with pytest.raises(RecipeError, match="unknown pass fuse-padd"):
        onnxq.quantize(proto, feeds, recipe=Recipe(passes={"fuse-padd": False}))


def test_a_random_model_is_recorded_as_unprovable_and_keeps_its_passes() -> None:
    proto, feeds = small(
        """net (float[2, 4] x) => (float[2, 4] y) <float[4, 4] w> {
          i = Identity (x) m = MatMul (i, w) r = RandomNormalLike (m) y = Add (m, r)
        }"""
    )
    report = onnxq.quantize(proto, feeds, target="cpu", validate=False)
    assert any("differs from itself" in note for note in report.notes)
    assert not [r for r in report.passes if r.rolled_back]


def test_a_tensor_that_is_read_along_two_axes_corrects_the_bias_of_one_reader_only() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[2, 3, 4] x) => (float[2, 4, 4] y, float[2, 3, 5] z) <float[4, 3, 1] w, float[4] b, float[4, 5] v, float[5] c>
    { y = Conv (x, w, b)  m = MatMul (x, v)  z = Add (m, c) }"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for info in proto.graph.value_info:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.uniform(-1, 1, shape).astype(np.float32), info.name))
    del proto.graph.value_info[:]
    offsets = np.array([0.0, 4.0, -8.0], np.float32)[:, None]  # of the channels as the Conv sees them
    feeds = [{"x": rng.normal(size=(2, 3, 4)).astype(np.float32) * 0.1 + offsets} for _ in range(8)]
    report = onnxq.quantize(proto, feeds, target="cpu", validate=False)
    float_session, session = Session(proto, threads=1), Session(report.model, threads=1)
    for feed in feeds:
        expected, found = float_session.run(feed), session.run(feed)
        for name in ("y", "z"):
            error = (found[name] - expected[name]).mean((0, 2 if name == "y" else 1))
            assert np.abs(error).max() < 0.1


def test_an_lstm_in_a_body_runs_in_integers() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[7, 1, 16] x, bool c) => (float[7, 1, 1, 96] y) <float[1, 384, 16] w, float[1, 384, 96] r>
    { y = If (c) <then_branch = t () => (float[7, 1, 1, 96] u) { two = Constant <value = float {2}> ()
                    w2 = Mul (w, two)  u = LSTM <hidden_size = 96> (x, w2, r) },
                  else_branch = e () => (float[7, 1, 1, 96] v) { v0 = LSTM <hidden_size = 96> (x, w, r)  v = Neg (v0) }> }"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for info in proto.graph.value_info:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(rng.uniform(-0.1, 0.1, shape).astype(np.float32), info.name)
        )
    del proto.graph.value_info[:]
    feeds = [{"x": rng.normal(size=(7, 1, 16)).astype(np.float32), "c": np.array(flag)} for flag in (True, False)]
    report = onnxq.quantize(proto, feeds, target="cpu", validate=False)
    assert [e.state for e in report.ledger.values() if e.op == "LSTM"] == [State.DYNAMIC] * 2
    assert report.quantized_bytes < 0.42 * report.float_bytes  # w is there twice: as it is, and times two
    for feed in feeds:
        expected, found = Session(proto, threads=1).run(feed)["y"], Session(report.model, threads=1).run(feed)["y"]
        assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.parametrize("name, states", [("vision_transformer", {"MatMul"}), ("recurrent", {"LSTM"})])
def test_mode_dynamic_needs_no_data(name: str, states: set[str], models: Path) -> None:
    said = tomllib.loads((models / "models.toml").read_text())[name]
    report = onnxq.quantize(models / said["file"], mode="dynamic", eval=models / said["evaluation"], target="cpu")
    dynamic = {e.op for e in report.ledger.values() if e.state is State.DYNAMIC}
    assert states <= dynamic
    assert not [n.op_type for n in report.model.graph.node if n.op_type == "QuantizeLinear"]
    assert report.accuracy is not None
    assert report.accuracy.drop is not None
    assert report.accuracy.drop <= 1.0
    assert report.latency is not None
    assert report.quantized_bytes < 0.5 * report.float_bytes


def test_mode_dynamic_leaves_convolutions_in_float_and_says_why(models: Path) -> None:
    report = onnxq.quantize(models / "residual.onnx", mode="dynamic", target="cpu", validate=False)
    assert {e.reason for e in report.ledger.values() if e.op == "Conv"} == {Reason.SLOWER}
    assert {e.state for e in report.ledger.values() if e.op == "Gemm"} == {State.DYNAMIC}


def test_mode_dynamic_takes_no_ranges(models: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="mode dynamic quantizes activations with the range of each run"):
        onnxq.quantize(models / "residual.onnx", mode="dynamic", calibration=tmp_path / "x.calib")
    with pytest.raises(DataError, match="--mode dynamic"):
        onnxq.quantize(models / "residual.onnx")


def test_a_model_that_no_made_up_input_fits_is_quantized_all_the_same() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 4] x, int64[3] shape) => (float[A, B, C] y) <float[4, 6] w>
    { m = MatMul (x, w)  y = Reshape (m, shape) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 6), np.float32), "w"))
    del proto.graph.value_info[:]
    report = onnxq.quantize(proto, mode="dynamic", target="cpu")
    assert [e.state for e in report.ledger.values()] == [State.DYNAMIC]
    assert any("does not run on made-up inputs" in note for note in report.notes)


@pytest.mark.parametrize("bias", [(1, 1, 6), (6,), (1, 6)])
def test_a_bias_of_more_dimensions_keeps_the_shape_of_the_result(bias: tuple[int, ...]) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[2, 4] x) => (float[] y) <float[4, 6] w> { m = MatMul (x, w)  y = Add (m, b) }"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in (("w", (4, 6)), ("b", bias)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    del proto.graph.value_info[:], proto.graph.output[0].type.tensor_type.shape.dim[:]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    report = onnxq.quantize(proto, mode="dynamic", target="cpu", validate=False)
    feed = {"x": rng.normal(size=(2, 4)).astype(np.float32)}
    assert Session(report.model).run(feed)["y"].shape == Session(proto).run(feed)["y"].shape


def test_an_empty_weight_stays_as_it_is() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> net (float[2, 0] x) => (float[2, 6] y) { y = MatMul (x, w) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((0, 6), np.float32), "w"))
    report = onnxq.quantize(proto, mode="dynamic", target="cpu", validate=False)
    assert [e.detail for e in report.ledger.values()] == ["its weight is empty"]
