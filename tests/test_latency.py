"""latency.py and batches.py, and validate on several providers, thread counts and batches."""

from __future__ import annotations

import gc
import json
import re
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxq
from onnxq import cli, latency, machine, providers, runtime, timing, validation
from onnxq.batches import batches, check_batches
from onnxq.data import Sample
from onnxq.errors import DataError, ModelError, RecipeError
from onnxq.latency import Latency, latencies
from onnxq.runtime import CPU, Session, TensorInfo
from tests import tiny

OTHER = "OtherExecutionProvider"
SCALAR = "tiny (float[N, 4] x, float gain) => (float[N, 4] y) { y = Mul (x, gain) }"
BAKED = "tiny (float[N, 4] x) => (float[A, B] y) <int64[2] shape = {2, 2}> { y = Reshape (x, shape) }"
X = tiny.rows()


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str, str]:
    """A float model, the same again, and data."""
    np.savez(tmp_path / "d.npz", x=X, label=np.arange(8) % 3)
    return str(tiny.write(tmp_path / "m.onnx")), str(tiny.write(tmp_path / "q.onnx")), str(tmp_path / "d.npz")


@pytest.fixture
def two_providers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """onnxruntime has a second provider, which is the CPU; what sessions were made of (provider, threads)."""
    made: list[tuple[str, int]] = []

    def session(model: Any, *, threads: int = 0, provider: str = CPU, **how: Any) -> Session:
        made.append((provider, threads))
        return Session(model, threads=threads, **how)

    monkeypatch.setattr(runtime.ort, "get_available_providers", lambda: [CPU, OTHER])
    monkeypatch.setattr(providers, "has_device", lambda provider: True)
    monkeypatch.setattr(validation, "Session", session)
    monkeypatch.setattr(latency, "Session", session)
    return made


def row(**changed: Any) -> Latency:
    interval = (2.0, 1.9, 2.1)
    same = (1.0, 0.99, 1.01)
    given = dict.fromkeys(
        ("float_median", "float_p90", "float_p99", "quantized_median", "quantized_p90", "quantized_p99"), 1.0
    )
    return Latency(**{"threads": 1, "rounds": 10, "speedup": interval, "control": same, **given, **changed})


def samples(*arrays: np.ndarray) -> list[Sample]:
    return [Sample({"x": array}, None, f"sample {k}") for k, array in enumerate(arrays)]


def test_each_model_runs_as_often_as_asked_before_it_is_timed() -> None:
    order: list[int] = []
    times = timing.time_paired([lambda k=k: order.append(k) for k in range(2)], seconds=0.0, warm_up=5)
    assert order[:10] == [0] * 5 + [1] * 5
    assert len(order) == 10 + times.size
    order.clear()
    shares: list[float] = []
    times = timing.time_paired([lambda: order.append(0)], seconds=0.0, warm_up=0, progress=shares.append)
    assert len(order) == len(times) == len(shares) == 10


def test_percentiles_are_those_of_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    times = np.arange(1.0, 102.0)[:, None] * [2.0, 2.0, 1.0]
    asked: dict[str, Any] = {}

    def timed(runs: Any, **how: Any) -> np.ndarray:
        asked.update(how)
        return times

    monkeypatch.setattr(timing, "time_paired", timed)
    feeds: dict[int | None, dict[str, np.ndarray]] = {2: {"x": X[:2]}}
    (found,) = latencies([tiny.model()] * 2, feeds, threads=[1], warm_up=7, seconds=0.5, seed=3)
    assert (found.float_p50, found.float_p90, found.float_p99) == pytest.approx((102.0, 182.0, 200.0))
    assert (found.quantized_p50, found.quantized_p90, found.quantized_p99) == pytest.approx((51.0, 91.0, 100.0))
    assert (found.float_median, found.quantized_median) == (found.float_p50, found.quantized_p50)
    assert found.speedup == (2.0, 2.0, 2.0)
    assert (found.provider, found.threads, found.batch, found.warm_up, found.rounds) == (CPU, 1, 2, 7, 101)
    assert (asked["warm_up"], asked["seconds"], asked["seed"]) == (7, 0.5, 3)


@pytest.mark.parametrize(("large", "each"), [(1 << 28, 3), (0, 2)])
def test_sessions_of_a_row_are_gone_before_the_next_and_large_models_are_there_once(
    monkeypatch: pytest.MonkeyPatch, large: int, each: int
) -> None:
    alive: weakref.WeakSet[Session] = weakref.WeakSet()
    most: list[int] = []

    class Counted(Session):
        def __init__(self, *given: Any, **how: Any) -> None:
            super().__init__(*given, **how)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(latency, "Session", Counted)
    monkeypatch.setattr(latency, "LARGE", large)
    gc.disable()  # nothing but the last reference lets go of a session
    try:
        found = latencies([tiny.model()] * 2, {1: {"x": X[:1]}, 8: {"x": X}}, threads=[1, 2], seconds=0.0)
    finally:
        gc.enable()
    assert [(r.threads, r.batch) for r in found] == [(1, 1), (1, 8), (2, 1), (2, 8)]
    assert most == [*range(1, each + 1)] * 4
    assert not alive


def test_progress_goes_on_from_row_to_row() -> None:
    seen: list[tuple[int, int | None]] = []
    feeds: dict[int | None, dict[str, np.ndarray]] = {None: {"x": X[:1]}}
    latencies(
        [tiny.model()] * 2, feeds, threads=[1, 2], seconds=0.0, progress=lambda _, done, total: seen.append((done, total))
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (200, 200)


def test_a_batch_is_the_first_samples_over_and_over() -> None:
    feeds = batches(samples(X[:1], X[1:2], X[2:3]), tiny.inputs(), [1, 2, 5])
    assert feeds[1]["x"].tolist() == X[:1].tolist()
    assert feeds[2]["x"].tolist() == X[:2].tolist()
    assert feeds[5]["x"].tolist() == X[[0, 1, 2, 0, 1]].tolist()
    of_batches = batches(samples(X[:3], X[3:6], X[6:]), tiny.inputs(), [4])
    assert of_batches[4]["x"].tolist() == X[:4].tolist()


def test_samples_of_another_shape_are_left_out_of_a_batch() -> None:
    feeds = batches(samples(X[:1, :2], X[1:2, :2], X[2:3], X[3:4, :2]), tiny.inputs(), [3])
    assert feeds[3]["x"].tolist() == X[[0, 1, 0], :2].tolist()


def test_inputs_of_different_lengths_make_no_batch() -> None:
    inputs = tiny.inputs(tiny.TWO_INPUTS)
    odd = [Sample({"x": X[:2], "shift": X[:1]}, None, "sample 0")]
    with pytest.raises(DataError, match="sample 0 cannot be stacked to batches: lengths along axis 0 are x 2, shift 1"):
        batches(odd, inputs, [4])


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (TensorInfo("x", np.dtype("f4"), (4, 3)), "input x has a fixed batch of 4, and --batch is 8"),
        (TensorInfo("gain", np.dtype("f4"), ()), "input gain has no axis for a batch"),
        (TensorInfo("parts", None, None), "input parts has no axis for a batch"),
    ],
)
def test_an_input_without_a_free_first_axis_is_named(info: TensorInfo, message: str) -> None:
    free = TensorInfo("free", np.dtype("f4"), (None, 4))
    unknown = TensorInfo("unknown", np.dtype("f4"), None)
    check_batches([free, unknown], [1, 8])
    check_batches([TensorInfo("x", np.dtype("f4"), (4, 3))], [4])
    with pytest.raises(DataError, match=message):
        check_batches([free, info], [4, 8])


def test_every_combination_is_a_row(pair: tuple[str, str, str], two_providers: list[tuple[str, int]]) -> None:
    found = onnxq.validate(
        *pair, provider=["cpu", "other", CPU], threads=[2, 0], batch=[1, 4], warm_up=1, seconds=0.0, max_drop=0.0
    )
    rows = [(r.provider, r.threads, r.batch, r.warm_up, r.rounds) for r in found.latencies]
    assert rows == [(p, t, b, 1, 10) for p in (CPU, OTHER) for t in (2, 0) for b in (1, 4)]
    assert found.latency is found.latencies[0]
    assert [a.provider for a in found.accuracies] == [CPU, OTHER]
    assert found.accuracy is found.accuracies[0]
    assert [a.drop for a in found.accuracies] == [0.0, 0.0]
    assert two_providers[:4] == [(CPU, 0), (CPU, 0), (CPU, 0), (OTHER, 0)]  # float, emulated and real, on all cores
    assert two_providers[4:] == [(p, t) for p in (CPU, OTHER) for t in (2, 0) for _ in range(2 * 3)]


@pytest.mark.parametrize(("threads", "of_accuracy", "of_latency"), [(0, 0, [1]), (2, 2, [2]), ([1, 2], 2, [1, 2])])
def test_thread_counts(
    pair: tuple[str, str, str], two_providers: list[tuple[str, int]], threads: Any, of_accuracy: int, of_latency: list[int]
) -> None:
    found = onnxq.validate(*pair, threads=threads, seconds=0.0)
    assert [r.threads for r in found.latencies] == of_latency
    assert [r.batch for r in found.latencies] == [None] * len(of_latency)
    assert {threads for _, threads in two_providers[:3]} == {of_accuracy}


def test_gates_look_at_the_first_row_and_at_every_provider(
    pair: tuple[str, str, str], two_providers: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    faster_first = [row(speedup=(2.0, 1.9, 2.1)), row(speedup=(0.5, 0.4, 0.6))]
    monkeypatch.setattr(validation, "latencies", lambda *_, **__: faster_first)
    assert onnxq.validate(*pair, provider=("cpu", "other"), min_speedup=1.0).missed_gates == []
    monkeypatch.setattr(validation, "latencies", lambda *_, **__: faster_first[::-1])
    assert onnxq.validate(*pair, provider=("cpu", "other"), min_speedup=1.0).missed_gates == [
        "the speedup of 0.50 is under --min-speedup 1"
    ]
    missed = onnxq.validate(*pair, provider=("cpu", "other"), max_drop=-1.0).missed_gates
    assert missed == [f"{name}: the drop of 0.00 is over --max-drop -1" for name in ("cpu", "other")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"provider": ["cpu", "nosuch"]}, "here has no provider nosuch; .*cpu"),
        ({"provider": []}, "provider is empty"),
        ({"threads": [1, 1025]}, "threads is 1025; it takes whole numbers from 0 to 1024"),
        ({"threads": 1.5}, "threads is 1.5; it takes whole numbers"),
        ({"batch": [8, 0]}, "batch is 0; it takes whole numbers from 1"),
        ({"warm_up": -1}, "warm_up is -1; it takes whole numbers from 0 on"),
        ({"seconds": float("nan")}, "seconds is nan"),
    ],
)
def test_options_are_checked_before_the_models_are_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        onnxq.validate("nowhere.onnx", "nowhere.onnx", [], **options)


def test_a_batch_that_does_not_run_is_told_before_accuracy_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("accuracy was measured")

    monkeypatch.setattr(validation, "accuracies", refused)
    proto = tiny.model(BAKED)
    with pytest.raises(ModelError, match="4 rows stacked along axis 0"):
        onnxq.validate(proto, proto, [{"x": X[:1]}], batch=4)
    fixed = tiny.model(tiny.DENSE_IN_FOURS)
    with pytest.raises(DataError, match="input x has a fixed batch of 4, and --batch is 8"):
        onnxq.validate(fixed, fixed, [{"x": X[:4]}], batch=[4, 8])
    with pytest.raises(DataError, match="input x has a fixed batch of 4, and --batch is 8"):
        onnxq.validate(tiny.model(), fixed, [{"x": X[:4]}], batch=8)
    scalar = tiny.model(SCALAR)
    with pytest.raises(DataError, match="input gain has no axis for a batch"):
        onnxq.validate(scalar, scalar, [{"x": X[:1], "gain": np.float32(2)}], batch=2)


def test_an_input_of_unknown_rank_takes_a_batch() -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(tiny.model())
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    found = onnxq.validate(proto, proto, [{"x": X[:1]}], batch=3, seconds=0.0)
    assert found.latency.batch == 3


def test_a_provider_that_does_not_load_is_an_error() -> None:
    with pytest.raises(RecipeError, match="has provider OtherExecutionProvider but cannot use it on this machine"):
        Session(tiny.model(), provider=OTHER)


def test_threads_reach_a_provider_with_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def refused(*_: Any, providers: Any, **__: Any) -> None:
        asked.append(providers)
        raise RuntimeError("not loaded")

    monkeypatch.setattr(runtime.ort, "InferenceSession", refused)
    monkeypatch.setattr(providers, "has_device", lambda provider: True)
    for provider, threads in (("OpenVINOExecutionProvider", 2), ("OpenVINOExecutionProvider", 0), (CPU, 2)):
        with pytest.raises(ModelError, match="not loaded"):
            Session(tiny.model(), provider=provider, threads=threads)
    assert asked == [
        [("OpenVINOExecutionProvider", {"num_of_threads": "2"})],
        [("OpenVINOExecutionProvider", {})],
        [(CPU, {})],
    ]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["onnxq", "validate", *arguments])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def test_the_command_prints_one_table_of_latencies(
    pair: tuple[str, str, str],
    two_providers: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    model, quantized, data = pair
    options = ("--provider", "cpu,other", "--threads", "1", "--threads", "2", "--batch", "1,8", "--seconds", "0")
    report = str(tmp_path / "r.json")
    assert run(monkeypatch, model, quantized, "--data", data, *options, "--warm-up", "1", "--report", report) == 0
    page = capsys.readouterr().out
    heads = [re.findall(r"[\w./-]+", line) for line in page.splitlines() if line.startswith(("│cpu", "│other"))]
    assert [tuple(head[:4]) for head in heads] == [
        (provider, threads, batch, "float") for provider in ("cpu", "other") for threads in "12" for batch in "18"
    ]
    assert all(head[-1] in ("faster", "slower", "equal") for head in heads)
    for word in ("p50", "p90", "p99", "cpu kernels", "other kernels", f"onnxruntime {runtime.ort.__version__}"):
        assert word in page
    plain = json.loads(Path(report).read_text())
    assert plain["latency"] == plain["latencies"][0]
    assert plain["accuracy"] == plain["accuracies"][0]
    assert [(r["provider"], r["threads"], r["batch"]) for r in plain["latencies"]] == [
        (provider, threads, batch) for provider in (CPU, OTHER) for threads in (1, 2) for batch in (1, 8)
    ]
    for name in ("float_median", "float_p50", "float_p90", "float_p99", "quantized_p99", "speedup", "control", "verdict"):
        assert name in plain["latency"]
    assert (plain["latency"]["warm_up"], plain["latency"]["rounds"]) == (1, 10)
    assert plain["machine"]["cpu"] == machine.cpu_name()
    assert plain["accuracies"][1]["metric"] == "top1"


def test_one_row_stays_in_the_one_table(
    pair: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, quantized, data = pair
    assert run(monkeypatch, model, quantized, "--data", data, "--seconds", "0") == 0
    page = capsys.readouterr().out
    for word in (
        "real kernels",
        "latency, median ms",
        "latency, p90 ms",
        "latency, p99 ms",
        "Speed: ",
        "1 thread(s).",
        "Machine: ",
    ):
        assert word in page
    assert "provider" not in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--provider", "cpu,nosuch"], "here has no provider nosuch; "),
        (["--threads", "1,x"], "--threads is 1,x; it takes whole numbers"),
        (["--batch", "0"], "batch is 0; it takes whole numbers from 1"),
        (["--warm-up", "-1"], "'--warm-up'"),
        (["--seconds", "-1"], "'--seconds'"),
    ],
)
def test_bad_options_are_one_message(
    pair: tuple[str, str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    model, quantized, data = pair
    assert run(monkeypatch, model, quantized, "--data", data, *options) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
