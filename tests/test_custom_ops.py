"""Models with ops of other domains, which a real library has: onnxruntime-extensions."""

from __future__ import annotations

import ctypes.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

import onnxq
from onnxq import cli, executors, runtime, target
from onnxq.calibration import Calibration
from onnxq.collector import Job
from onnxq.errors import ModelError, RecipeError
from onnxq.graph import Graph
from onnxq.model import Model, Observed
from onnxq.passes import ChooseRanges
from onnxq.shards import observe_shard
from onnxq.sketch import TensorSketch

Run = Callable[..., tuple[int, str]]
extensions = pytest.importorskip("onnxruntime_extensions", reason="onnxruntime-extensions has no wheel for this platform")
LIBRARY = Path(extensions.get_library_path())
DOMAIN = "ai.onnx.contrib"
HEADER = f'<ir_version: 8, opset_import: ["" : 17, "{DOMAIN}" : 1]>\n'
LINEAR = """net (float[N, 16] x) => (float[N, 8] y) <float[16, 16] w1, float[16, 8] w2> {
  [first] a = MatMul (x, w1)
  [custom] below, above = ai.onnx.contrib.NegPos (a)
  [second] y = MatMul (above, w2)
}"""
CONVOLUTIONS = """net (float[N, 3, 8, 8] x) => (float[N, 4, 4, 4] y) <float[8, 3, 3, 3] w1, float[4, 8, 3, 3] w2> {
  [first] a = Conv (x, w1)
  [custom] below, above = ai.onnx.contrib.NegPos (a)
  [second] y = Conv (above, w2)
}"""
IN_BODY = """net (float[N, 16] x) => (float[N, 8] y) <float[16, 16] w1, float[16, 8] w2, float zero = {0}> {
  [first] a = MatMul (x, w1)
  s = ReduceSum <keepdims = 0> (a)
  c = Greater (s, zero)
  b = If (c) <
    then_branch = one () => (float[N, 16] then) { below, then = ai.onnx.contrib.NegPos (a) },
    else_branch = other () => (float[N, 16] else) { else = Abs (a) }
  >
  [second] y = MatMul (b, w2)
}"""
ON_CONSTANTS = """net (float[N, 16] x) => (float[N, 8] y) <float[16, 16] w1, float[16, 8] w2, float[8] v> {
  [first] a = MatMul (x, w1)
  [second] b = MatMul (a, w2)
  [custom] below, above = ai.onnx.contrib.NegPos (v)
  y = Add (b, above)
}"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library is registered, as in a process that starts."""
    monkeypatch.setattr(runtime, "custom_op_libraries", [])


def build(text: str, opset: int = 17) -> onnx.ModelProto:
    proto, rng = onnx.parser.parse_model(HEADER.replace("17", str(opset)) + text), np.random.default_rng(0)
    given = {t.name for t in proto.graph.initializer}
    for info in [v for v in proto.graph.value_info if v.name not in given]:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), info.name))
    del proto.graph.value_info[:]
    return proto


def samples(proto: onnx.ModelProto) -> list[dict[str, np.ndarray]]:
    shape = [d.dim_value or 1 for d in proto.graph.input[0].type.tensor_type.shape.dim]
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(20)]


def check(report: onnxq.Report) -> None:
    """Both layers are integer, the custom op is there, and the result is valid and close to the float model."""
    assert {n: e.is_integer for n, e in report.ledger.items() if n in ("first", "second")} == {"first": True, "second": True}
    onnx.checker.check_model(report.model)
    assert (DOMAIN, 1) in {(o.domain, o.version) for o in report.model.opset_import}
    assert report.accuracy is not None
    assert report.accuracy.real.outputs["y"].sqnr > 30
    assert not any(r.rolled_back for r in report.passes)


@pytest.mark.parametrize("opset", [9, 17])
@pytest.mark.parametrize("text", [LINEAR, CONVOLUTIONS])
def test_layers_on_both_sides_of_a_custom_op_are_integer(text: str, opset: int) -> None:
    proto = build(text, opset)
    report = onnxq.quantize(proto, samples(proto), target="cpu", custom_op_library=LIBRARY)
    check(report)
    assert [n.op_type for n in report.model.graph.node if n.domain == DOMAIN] == ["NegPos"]


@pytest.mark.parametrize("text", [IN_BODY, ON_CONSTANTS])
def test_custom_ops_in_bodies_and_on_constants_are_left_as_they_are(text: str) -> None:
    proto = build(text)
    report = onnxq.quantize(proto, samples(proto), target="cpu", custom_op_library=[LIBRARY, str(LIBRARY)])
    check(report)
    assert "NegPos" in str(report.model)
    assert runtime.custom_op_libraries == [str(LIBRARY.resolve())]


@pytest.mark.parametrize(("domain", "low"), [("", 0.0), (DOMAIN, -1.0)])
def test_a_custom_op_with_the_name_of_another_is_not_taken_for_it(domain: str, low: float) -> None:
    proto = build("net (float[N, 4] x) => (float[N, 4] y) { a = Relu (x)  y = Sqrt (a) }")
    proto.graph.node[0].domain = domain
    sketch = TensorSketch(None)
    sketch.update(np.array([-1, 0, 1], np.float32), 0)
    cpu = target.load("cpu")
    model = Model(Graph.from_proto(proto), cpu, {"a": Observed(cpu.activation_type)})
    model.calibration = Calibration(sketches={"a": sketch})
    ChooseRanges(observer="min-max").apply(model)
    assert model.params["a"].rmin == pytest.approx(low, abs=0.01)


def test_mode_dynamic_needs_no_data_for_it() -> None:
    report = onnxq.quantize(build(LINEAR), mode="dynamic", target="cpu", custom_op_library=LIBRARY)
    assert {n: e.is_integer for n, e in report.ledger.items()} == {"first": True, "second": True}


def test_workers_get_the_libraries(tmp_path: Path) -> None:
    proto, how = build(CONVOLUTIONS), {"threads": 1, "custom_op_library": LIBRARY}
    onnxq.calibrate(proto, samples(proto), output=tmp_path / "alone", **how)
    onnxq.calibrate(proto, samples(proto), output=tmp_path / "spread", executor=executors.processes(2), **how)
    assert (tmp_path / "alone").read_bytes() == (tmp_path / "spread").read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_workers_of_a_dask_cluster_get_them_too() -> None:
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    proto = build(LINEAR)
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
        executors.dask(cluster.scheduler_address) as pool,
    ):
        found = onnxq.calibrate(proto, samples(proto), threads=1, custom_op_library=LIBRARY, executor=pool)
    assert found.samples == 20


def test_a_worker_that_lacks_the_library_says_so(tmp_path: Path) -> None:
    job = Job("", {}, (), (), 1, "error", (str(tmp_path / "l.so"),))
    with executors.processes(1)() as pool, pytest.raises(RecipeError, match=r"^on the worker .*: there is no library of"):
        pool.submit(observe_shard, job, b"", []).result()


# ---- the command


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command in a folder with a model and its data: its exit code and what it prints; its files stay."""
    monkeypatch.chdir(tmp_path)
    proto = build(LINEAR)
    Path("m.onnx").write_bytes(proto.SerializeToString())
    np.savez("d.npz", x=np.concatenate([feed["x"] for feed in samples(proto)]))

    def run_command(line: str, *more: object) -> tuple[int, str]:
        monkeypatch.setattr(runtime, "custom_op_libraries", [])  # each command is a process
        monkeypatch.setattr(sys, "argv", ["onnxq", *line.split(), *map(str, more)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capfd.readouterr()
        assert isinstance(exit_.value.code, int)
        return exit_.value.code, out + err

    return run_command


def test_every_command_takes_the_option(run: Run) -> None:
    option = ("--custom-op-library", LIBRARY)
    calibrated = run("calibrate m.onnx -o m.calib --data d.npz --workers 2 --quiet", *option)
    assert calibrated == (0, "")
    quantized = run("quantize m.onnx -o q.onnx --calibration m.calib --eval d.npz --target cpu --quiet", *option, *option)
    assert quantized == (0, "")
    onnx.checker.check_model(onnx.load("q.onnx"))
    code, text = run("validate m.onnx q.onnx --data d.npz --json", *option)
    assert code == 0
    assert json.loads(text)["integer"] == 2
    code, text = run("inspect q.onnx --json", *option)
    assert code == 0
    found = json.loads(text)
    assert (found["integer"], found["float"], found["kernels"]["NegPos"]) == (2, 0, 1)


@pytest.mark.parametrize(
    "line",
    [
        "quantize m.onnx -o q.onnx --data d.npz",
        "calibrate m.onnx -o m.calib --data d.npz",
        "validate m.onnx m.onnx --data d.npz",
        "inspect m.onnx",
    ],
)
def test_without_the_library_the_message_says_what_is_missing(line: str, run: Run) -> None:
    code, text = run(line)
    assert code == 2
    assert f"it knows no op NegPos of domain {DOMAIN}; give --custom-op-library the library that has it" in text
    assert text.count("\n") == 1
    for path, words in (
        ("nope.so", "there is no library of custom ops at nope.so; give the path"),
        (".", "there is no library of custom ops at .; give the path"),
        ("d.npz", "d.npz cannot be loaded as a library of custom ops: "),
    ):
        code, text = run(line, "--custom-op-library", path)
        assert (code, text.count("\n")) == (2, 1)
        assert words in text
    assert not Path("q.onnx").exists()
    assert not Path("m.calib").exists()


def test_the_library_is_not_written_over(run: Run) -> None:
    code, text = run("quantize m.onnx -o l.so --force --data d.npz --custom-op-library l.so")
    assert (code, text) == (2, "onnxq: the output l.so is the --custom-op-library l.so; give another name\n")


def test_a_library_without_custom_ops() -> None:
    plain = ctypes.util.find_library("m")
    if sys.platform != "linux" or plain is None:
        pytest.skip("there is no plain library at hand")
    path = next((p for folder in ("/lib", "/usr/lib", "/lib64") for p in sorted(Path(folder).glob(f"**/{plain}"))), None)
    if path is None:
        pytest.skip("there is no plain library at hand")
    with pytest.raises(RecipeError, match="is a library without custom ops: it has no function RegisterCustomOps; give one"):
        runtime.register_custom_ops(path)
    assert runtime.custom_op_libraries == []


def test_an_op_of_the_runtime_itself_is_in_no_other_library() -> None:
    proto = build(LINEAR.replace("ai.onnx.contrib", "com.microsoft"))
    with pytest.raises(ModelError, match=r"com\.microsoft:NegPos\(-1\) is not a registered function/op$"):
        onnxq.quantize(proto, samples(proto))
