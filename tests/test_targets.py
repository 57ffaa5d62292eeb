"""Targets: every one loads, what is placed for it obeys it, and a model that does not is told where."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from typer.testing import CliRunner

import onnxq
from onnxq import cli, machine, providers, runtime, target
from onnxq.errors import RecipeError

MODELS = tomllib.loads((Path(__file__).parent.parent / "models" / "models.toml").read_text())
PLACED = ("cpu", "cpu-vnni", "openvino", "qnn-htp", "tensorrt", "xnnpack", "directml", "weight-only", "cuda", "coreml")
BLOCK = """<ir_version: 8, opset_import: ["" : 17]>
net (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y)
<float[4, 4, 3, 3] w, float[4] b, float[4, 4, 1, 1] v, float[4] c>
{
  [first] p = Conv <pads = [1, 1, 1, 1]> (x, w, b)
  [relu] q = Relu (p)
  [second] r = Conv (q, v, c)
  [sum] s = Add (r, x)
  [gate] y = Sigmoid (s)
}
"""


def block(text: str = BLOCK) -> onnx.ModelProto:
    proto, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    for info in list(proto.graph.value_info):
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), info.name))
    del proto.graph.value_info[:]
    return proto


def feeds(*shape: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=shape or (1, 4, 8, 8)).astype(np.float32)} for _ in range(4)]


def placed(name: str, **options: object) -> onnx.ModelProto:
    return onnxq.quantize(block(), feeds(), target=name, validate=False, **options).model  # type: ignore[arg-type]


def ops(proto: onnx.ModelProto) -> Counter[str]:
    return Counter(n.op_type for n in proto.graph.node)


def constants(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}


def reads(proto: onnx.ModelProto, name: str) -> list[str]:
    """Who makes each input of a node."""
    makers = {o: n.op_type for n in proto.graph.node for o in n.output}
    node = next(n for n in proto.graph.node if n.name == name)
    return [makers.get(i, "input" if i == "x" else "constant") for i in node.input]


# ---- files


@pytest.mark.parametrize("name", target.names())
def test_every_target_loads_and_says_where_its_facts_come_from(name: str) -> None:
    found = target.load(name)
    assert found.name == name
    assert found.description
    assert found.source
    assert found.provider.endswith("ExecutionProvider")
    assert found.activation_type in found.activation_types or not found.compute
    assert found.weight_type in found.weight_types
    assert not found.simulated


def test_the_targets_are_these() -> None:
    kernels = ["cpu", "cpu-amx", "cpu-arm64", "cpu-avx2", "cpu-avx512", "cpu-vnni"]
    others = ["cuda", "directml", "host", "openvino", "qnn-htp", "tensorrt", "weight-only", "xnnpack"]
    assert target.names() == ["coreml", *kernels, *others]


@pytest.mark.parametrize(
    ("name", "saturates"),
    [("cpu-avx2", True), ("cpu-avx512", True), ("cpu-vnni", False), ("cpu-amx", False), ("cpu-arm64", False)],
)
def test_kernels_of_other_machines_are_the_cpu_target_but_for_saturation(name: str, saturates: bool) -> None:
    cpu, other = target.load("cpu"), target.load(name)
    assert other.saturates is saturates
    assert not other.measured
    same = (
        "provider",
        "domains",
        "activation_type",
        "weight_type",
        "compute",
        "region",
        "pass_through",
        "absorbed",
        "audited",
    )
    assert all(getattr(cpu, key) == getattr(other, key) for key in same)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bias = 'int8'", "bias: Input should be 'int32' or 'float'"),
        ("audit = true", "audit: Extra inputs are not permitted"),
        ("[region]\nops = []\nrule = 'nowhere'", "region.rule"),
        ("[activation]\ntype = 'int4'\nsymmetric = true", "activation.type"),
    ],
)
def test_a_target_file_with_a_mistake_is_refused(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.toml").write_text(f"extends = 'cpu'\nname = 'mine'\n{text}\n")
    paths = {**target._paths(), "mine": tmp_path / "mine.toml"}
    monkeypatch.setattr(target, "_paths", lambda: paths)
    with pytest.raises(RecipeError, match=said):
        target.load("mine")


# ---- placing


@pytest.mark.parametrize("name", PLACED)
@pytest.mark.parametrize("model", MODELS)
def test_a_shipped_model_obeys_the_target_that_it_is_placed_for(models: Path, model: str, name: str) -> None:
    said = MODELS[model]
    report = onnxq.quantize(models / said["file"], models / said["calibration"], target=name, max_samples=4, validate=False)
    assert onnxq.check(report.model, name) == []
    missing = [n for n in report.notes if n.startswith("Not run on")]
    assert len(missing) == (not runtime.has_provider(target.load(name).provider))
    if name == "cpu":
        assert onnxq.check(report.model, "tensorrt")
    if name == "tensorrt":
        assert onnxq.check(report.model, "cpu")


def test_for_tensorrt_what_a_layer_reads_is_quantized_and_a_sum_takes_only_the_other_tensor() -> None:
    proto = placed("tensorrt")
    assert reads(proto, "first") == ["DequantizeLinear", "DequantizeLinear", "constant"]
    assert reads(proto, "relu") == ["Conv"]
    assert reads(proto, "second") == ["DequantizeLinear", "DequantizeLinear", "constant"]
    assert reads(proto, "sum") == ["Conv", "DequantizeLinear"]
    assert reads(proto, "gate") == ["Add"]
    values = constants(proto)
    quantizers = [n for n in proto.graph.node if n.op_type == "QuantizeLinear"]
    assert len(quantizers) == 2
    for node in quantizers:
        assert (values[node.input[2]].dtype, values[node.input[2]]) == (np.int8, 0)
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in values:
            assert values[node.input[0]].dtype == np.int8
            assert values[node.input[1]].shape == (4,)


def test_for_qnn_every_op_is_between_q_and_dq() -> None:
    proto = placed("qnn-htp")
    assert proto.opset_import[0].version >= 21
    for node in proto.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            assert set(reads(proto, node.name)) == {"DequantizeLinear"}
    values = constants(proto)
    assert {values[n.input[2]].dtype.name for n in proto.graph.node if n.op_type == "QuantizeLinear"} == {"uint8"}
    assert ops(proto)["Relu"] == 0


def test_for_qnn_activations_may_have_16_bits_and_a_sigmoid_then_has_its_own_scale() -> None:
    report = onnxq.quantize(block(), feeds(), target="qnn-htp", activation_bits=16)
    values = constants(report.model)
    quantizers = {n.input[0]: n for n in report.model.graph.node if n.op_type == "QuantizeLinear"}
    assert {values[n.input[2]].dtype.name for n in quantizers.values()} == {"uint16"}
    gate = next(n for n in report.model.graph.node if n.name == "gate")
    last = quantizers[gate.output[0]]
    assert (values[last.input[1]], values[last.input[2]]) == (np.float32(1 / 65536), 0)
    assert onnxq.check(report.model, "qnn-htp") == []
    assert onnxq.check(report.model, "cpu")
    assert report.integer_share == 1
    values[last.input[1]] = np.array(0.5, np.float32)
    for tensor in report.model.graph.initializer:
        if tensor.name == last.input[1]:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values[tensor.name], tensor.name))
    assert any("zero point 0" in v.demanded for v in onnxq.check(report.model, "qnn-htp") if v.node == "gate")


def test_weights_alone_need_no_data_and_stay_as_exact_as_8_bits_are() -> None:
    text = BLOCK.replace("4, 4, 1, 1", "64, 4, 1, 1").replace("float[4] c", "float[64] c, float[4, 64, 5, 5] u")
    text = text.replace("[sum] s = Add (r, x)", "[sum] s = Conv <pads = [2, 2, 2, 2]> (r, u)")
    proto = block(text)
    report = onnxq.quantize(proto, target="weight-only", eval=feeds())
    assert ops(report.model)["Cast"] == 1
    assert report.quantized_bytes < 0.5 * report.float_bytes
    assert report.accuracy is not None
    assert report.accuracy.real.outputs["y"].sqnr > 20
    assert not [n for n in report.notes if n.startswith("Nothing could be")]
    assert ops(report.model)["QuantizeLinear"] == 0


def test_a_report_says_that_the_provider_is_not_here() -> None:
    report = onnxq.quantize(block(), feeds(), target="tensorrt")
    if runtime.has_provider("TensorrtExecutionProvider"):
        pytest.skip("TensorRT is here")
    assert "Not run on TensorrtExecutionProvider: it is not here, or lacks its device or libraries; " in " ".join(
        report.notes
    )
    assert report.sentences()[1].startswith("Placed in integers: 2 of 2 compute nodes")
    assert report.accuracy is not None


@pytest.mark.parametrize(("here", "notes"), [(True, 1), (False, 0)])
def test_a_report_says_that_the_kernels_meant_saturate_less_than_those_here(
    here: bool, notes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "u8s8_saturates", lambda: here)
    report = onnxq.quantize(block(), feeds(), target="cpu-vnni", validate=False)
    assert len([n for n in report.notes if n.startswith("The kernels of this machine saturate")]) == notes


def test_kernels_of_another_machine_write_the_same_bytes_twice() -> None:
    assert placed("cpu-vnni").SerializeToString() == placed("cpu-vnni").SerializeToString()


def test_a_bias_that_stays_float_is_corrected() -> None:
    values, plain = constants(placed("tensorrt")), constants(block())
    assert "first_bias" in values
    assert values["first_bias"].dtype == np.float32
    assert 0 < np.abs(values["first_bias"] - plain["b"]).max() < 0.1


# ---- checking

QDQ = """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
net (float[1, 4] x) => (float[1, 3] y)
<float s = {0.5}, uint8 z = {128}, int8[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, float[3] ws = {0.1, 0.2, 0.4},
 int8[3] wz = {0, 0, 0}, int32[3] b = {1, 2, 3}, float[3] bs = {0.05, 0.1, 0.2}>
{
  [q] xq = QuantizeLinear (x, s, z)
  [d] xd = DequantizeLinear (xq, s, z)
  [dw] wd = DequantizeLinear <axis = 1> (w, ws, wz)
  [db] bd = DequantizeLinear <axis = 0> (b, bs)
  [layer] g = Gemm (xd, wd, bd)
  [qy] yq = QuantizeLinear (g, s, z)
  [dy] y = DequantizeLinear (yq, s, z)
}
"""


def violations(changes: dict[str, str], name: str) -> list[tuple[str, str, str]]:
    text = QDQ
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return [(v.node, v.demanded, v.found) for v in onnxq.check(onnx.parser.parse_model(text), name)]


@pytest.mark.parametrize("name", ["cpu", "openvino"])
def test_a_sound_model_violates_nothing(name: str) -> None:
    assert violations({}, name) == []


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("tensorrt", {}, ("layer", "a float32 bias", "int32")),
        ("tensorrt", {}, ("q", "activations of int8", "uint8")),
        ("tensorrt", {"uint8 z = {128}": "int8 z = {3}"}, ("q", "zero point 0", "zero point 3")),
        ("cpu", {"uint8 z = {128}": "uint16 z = {128}"}, ("q", "activations of uint8", "uint16")),
        ("qnn-htp", {}, ("layer", "one scale for the weight", "3 scales, by axis 1")),
        (
            "cpu",
            {"bs = {0.05, 0.1, 0.2}": "bs = {0.05, 0.1, 0.3}"},
            ("layer", "input scale x weight scale, 0.2", "scale 0.3"),
        ),
        ("cpu", {"wz = {0, 0, 0}": "wz = {0, 1, 0}"}, ("layer", "zero point 0", "zero points 0, 1")),
        (
            "cpu",
            {"float[3] ws = {0.1, 0.2, 0.4}": "float[4] ws = {0.1, 0.2, 0.4, 0.1}", "int8[3] wz = {0, 0, 0}":
             "int8[4] wz = {0, 0, 0, 0}", "<axis = 1>": "<axis = 0>"},
            ("layer", "a scale for each output channel, by axis 1", "4 scales, by axis 0"),
        ),
        (
            "cpu",
            {"(float[1, 3] y)\n<": "(float[1, 3] y)\n<float[4] ps = {0.1, 0.2, 0.3, 0.4}, uint8[4] pz = {0, 0, 0, 0}, ",
             "QuantizeLinear (x, s, z)": "QuantizeLinear <axis = 1> (x, ps, pz)"},
            ("q", "one scale for the tensor", "4 scales, by axis 1"),
        ),
        ("weight-only", {}, ("q", "activations in float", "QuantizeLinear")),
        ("xnnpack", {"uint8 z = {128}": "int8 z = {3}"}, ("layer", "Gemm in float, without Q and DQ around it",
                                                           "DequantizeLinear and QuantizeLinear")),
        ("tensorrt", {"[qy] yq": "[gelu] h = com.microsoft.Gelu (g)\n  [qy] yq", "(g, s, z)": "(h, s, z)"},
         ("gelu", "operators of ONNX's own", "com.microsoft.Gelu")),
        ("tensorrt", {"[q] xq = QuantizeLinear (x, s, z)": "[q] xq, rs, rz = DynamicQuantizeLinear (x)",
                      "(xq, s, z)": "(xq, rs, rz)"},
         ("q", "ranges that are constants of the file", "DynamicQuantizeLinear, a range of each run")),
        ("cpu", {"int32[3] b = {1, 2, 3}": "int8[3] b = {1, 2, 3}"}, ("layer", "an int32 bias", "int8")),
        ("cpu", {"int8[4, 3] w": "int16[4, 3] w", "int8[3] wz": "int16[3] wz"},
         ("layer", "a weight of int8 or uint8", "int16")),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(name: str, changes: dict[str, str], expected: tuple[str, str, str]) -> None:
    assert expected in violations(changes, name)


def test_a_layer_without_its_q_and_a_float_weight_between_q_and_dq_are_named() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
    net (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y)
    <float s = {0.5}, uint8 z = {128}, float[4, 4, 1, 1] v, int8[4, 4, 1, 1] w = {ONES}, float ws = {0.1}>
    {
      xq = QuantizeLinear (x, s, z)
      xd = DequantizeLinear (xq, s, z)
      [float] f = Conv (xd, v)
      fq = QuantizeLinear (f, s, z)
      fd = DequantizeLinear (fq, s, z)
      wd = DequantizeLinear (w, ws)
      [open] y = Conv (fd, wd)
    }
    """
    proto = onnx.parser.parse_model(text.replace("ONES", ", ".join("1" * 16)))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 4, 1, 1), np.float32), "v"))
    del proto.graph.value_info[:]
    found = {v.node: v.demanded for v in onnxq.check(proto, "cpu")}
    assert found == {
        "float": "a weight of int8 or uint8",
        "open": "a result that is read through one QuantizeLinear alone",
    }


def test_an_op_quantized_for_nothing_and_other_parameters_behind_a_pass_through_are_named() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
    net (float[1, 4] x) => (float[1, 4] y, float[4] t)
    <float s = {0.5}, float r = {0.25}, uint8 z = {128}, int64[1] shape = {4}>
    {
      xq = QuantizeLinear (x, s, z)
      xd = DequantizeLinear (xq, s, z)
      [erf] e = Erf (xd)
      eq = QuantizeLinear (e, s, z)
      ed = DequantizeLinear (eq, s, z)
      y = Neg (ed)
      [flat] f = Reshape (xd, shape)
      fq = QuantizeLinear (f, r, z)
      t = DequantizeLinear (fq, r, z)
    }
    """
    found = {v.node: (v.demanded, v.found) for v in onnxq.check(onnx.parser.parse_model(text), "cpu")}
    assert found["erf"] == ("Erf in float, without Q and DQ around it", "DequantizeLinear and QuantizeLinear")
    assert found["flat"][1] == "scale 0.25, zero point 128"
    assert set(found) == {"erf", "flat"}


def test_a_float_model_violates_nothing() -> None:
    assert all(onnxq.check(block(), name) == [] for name in target.names())


# ---- the command line


def test_check_exits_with_1_where_there_are_violations(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(placed("cpu"), path)
    run = CliRunner()
    good = run.invoke(cli.app, ["check", str(path), "--target", "cpu"])
    assert (good.exit_code, good.output) == (0, "m.onnx obeys cpu.\n")
    bad = run.invoke(cli.app, ["check", str(path), "--target", "tensorrt"])
    assert bad.exit_code == 1
    assert "does not obey tensorrt" in bad.output
    plain = run.invoke(cli.app, ["check", str(path), "--target", "tensorrt", "--json"])
    assert plain.exit_code == 1
    rows = json.loads(plain.output)["violations"]
    assert rows[0].keys() == {"node", "op", "tensor", "demanded", "found"}


def test_targets_are_listed_and_printed_in_full() -> None:
    run = CliRunner()
    listed = run.invoke(cli.app, ["targets"], env={"COLUMNS": "160"}).output
    assert all(name in listed for name in target.names())
    assert "int8, zero point 0" in listed
    full = run.invoke(cli.app, ["targets", "qnn-htp"]).output
    assert "provider: QNNExecutionProvider" in full
    assert "Sigmoid in uint16: scale 1.52588e-05, zero point 0" in full
    assert isinstance(run.invoke(cli.app, ["targets", "qnn"]).exception, RecipeError)


def test_a_provider_of_a_package_that_is_missing_is_named_with_its_extra() -> None:
    if runtime.has_provider("QNNExecutionProvider"):
        pytest.skip("QNN is here")
    with pytest.raises(RecipeError, match=r"install onnxq\[qnn\]"):
        runtime.check_provider("qnn")


def test_a_provider_without_a_device_is_said(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is installed on a machine of another vendor."""
    monkeypatch.setattr(providers, "find_spec", lambda module: module == "onnxruntime_ep_openvino")
    monkeypatch.setattr(providers, "import_module", lambda name: None)
    monkeypatch.setattr(providers, "_devices", lambda provider, module: [])
    assert not runtime.has_provider("OpenVINOExecutionProvider")
    with pytest.raises(RecipeError, match=r"knows no device of this machine.*--provider cpu"):
        runtime.Session(models / "residual.onnx", provider=runtime.check_provider("openvino"))


def test_a_provider_whose_libraries_are_missing_is_as_one_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu on a machine without TensorRT: onnxruntime lists the provider, and runs on the CPU."""
    if runtime.has_provider("TensorrtExecutionProvider"):
        pytest.skip("TensorRT is here")
    built_in = ["TensorrtExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(providers.ort, "get_available_providers", lambda: built_in)
    assert not runtime.has_provider("TensorrtExecutionProvider")
    with pytest.raises(RecipeError, match=r"has provider TensorrtExecutionProvider but cannot use it.*--provider cpu"):
        runtime.check_provider("tensorrt")
    report = onnxq.quantize(block(), feeds(), target="tensorrt")
    assert "Not run on TensorrtExecutionProvider: it is not here, or lacks its device or libraries; " in " ".join(
        report.notes
    )
    assert report.accuracy is not None


def test_a_provider_that_one_session_does_not_get_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was there a moment ago; onnxruntime runs on the CPU, and says so in its log only."""
    monkeypatch.setattr(providers, "has_device", lambda provider: True)
    with pytest.warns(UserWarning, match="is not in available"), pytest.raises(RecipeError, match="but cannot use it"):
        runtime.Session(block(), provider="CUDAExecutionProvider")


def test_a_provider_that_cannot_be_used_is_none_of_calibrations_business(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(providers, "find_spec", lambda module: module == "onnxruntime_ep_openvino")
    monkeypatch.setattr(providers, "import_module", broken)
    assert onnxq.calibrate(block(), feeds(), target="openvino").samples == 4
    with pytest.raises(RecipeError, match=r"package onnxruntime_ep_openvino cannot be used.*install onnxq\[openvino\]"):
        runtime.check_provider("openvino")


def test_a_session_tells_whether_a_built_in_provider_is_here() -> None:
    assert providers._is_given(runtime.CPU)
    assert not providers._is_given("NoSuchExecutionProvider")


# ---- real providers


def fixed_batch(path: Path) -> onnx.ModelProto:
    """The model for one sample at a time: QNN takes no dynamic shapes, OpenVINO computes video.onnx wrongly with them."""
    proto = onnx.load(path)
    for info in proto.graph.input:
        info.type.tensor_type.shape.dim[0].dim_value = 1
    for info in proto.graph.output:
        info.type.tensor_type.shape.Clear()
        info.type.tensor_type.ClearField("shape")
    del proto.graph.value_info[:]
    return proto


@pytest.fixture
def quiet_packages() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a provider's package does when it is imported
        yield


@pytest.mark.openvino
@pytest.mark.usefixtures("quiet_packages")
@pytest.mark.skipif(
    not runtime.has_provider("OpenVINOExecutionProvider"), reason="OpenVINO, or a device for it, is not here"
)
@pytest.mark.parametrize("model", MODELS)
def test_openvino_runs_all_of_a_shipped_model(models: Path, model: str) -> None:
    said = MODELS[model]
    source = fixed_batch(models / said["file"]) if model == "video" else models / said["file"]
    report = onnxq.quantize(
        source, models / said["calibration"], eval=models / said["evaluation"], target="openvino", max_samples=250
    )
    found = runtime.on_provider(report.model, "OpenVINOExecutionProvider")
    assert found is not None
    assert found[1] == {}
    assert report.accuracy is not None
    assert report.accuracy.drop is not None
    assert report.accuracy.drop <= 1
    assert not [n for n in report.notes if n.startswith("Not run on")]


@pytest.mark.qnn
@pytest.mark.usefixtures("quiet_packages")
@pytest.mark.skipif(not find_spec("onnxruntime_qnn"), reason="onnxruntime-qnn is not installed")
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("model", ["residual", "inverted_residual", "vision_transformer"])
def test_the_htp_runs_all_of_a_shipped_model_but_its_ends(models: Path, model: str, bits: int) -> None:
    said = MODELS[model]
    report = onnxq.quantize(
        fixed_batch(models / said["file"]), models / said["calibration"], eval=models / said["evaluation"],
        target="qnn-htp", activation_bits=bits, max_samples=64,
    )  # fmt: skip
    found = runtime.on_provider(report.model, "QNNExecutionProvider")
    assert found is not None
    assert found[1] == {"QuantizeLinear": 1, "DequantizeLinear": 1}
    assert report.accuracy is not None
    assert report.accuracy.drop is not None
    assert report.accuracy.drop <= 2
    assert report.accuracy.real.outputs["logits"].sqnr > 25


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["residual", "inverted_residual", "vision_transformer"])
@pytest.mark.parametrize(
    ("target", "provider"), [("tensorrt", "TensorrtExecutionProvider"), ("cuda", "CUDAExecutionProvider")]
)
def test_a_gpu_runs_all_layers_of_a_shipped_model(models: Path, model: str, target: str, provider: str) -> None:
    if not runtime.has_provider(provider):
        pytest.skip(f"onnxruntime has no {provider} here")
    said = MODELS[model]
    report = onnxq.quantize(
        models / said["file"], models / said["calibration"], eval=models / said["evaluation"], target=target, max_samples=250
    )
    found = runtime.on_provider(report.model, provider)
    assert found is not None
    assert not found[1].keys() & {"Conv", "MatMul", "Gemm"}
    assert report.accuracy is not None
    assert report.accuracy.drop is not None
    assert report.accuracy.drop <= 1
    assert not [n for n in report.notes if n.startswith("Not run on")]
