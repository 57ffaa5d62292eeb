"""watching.py: tensors that are counted while the model runs count as those that are held and counted afterwards."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

import onnxq
import onnxq.collector
from onnxq import capi, watching
from onnxq.calibration import Calibration
from onnxq.collecting import Collecting
from onnxq.collection import collect
from onnxq.collector import Axes, Collector, Nonfinite, watched
from onnxq.data import Sample
from onnxq.equalization import Scaled
from onnxq.errors import CalibrationError, ModelError, OnnxqError
from onnxq.pages import Pages
from onnxq.tally import Tally, Visit
from onnxq.watching import Watched, is_possible

NET = onnx.parser.parse_model(
    """<ir_version: 9, opset_import: ["" : 17]>
    net (float[N, C, M] x) => (float[N, C, M] y) {
        a = Relu (x) b = Reciprocal (x) halves = Cast <to = 10> (x) c = Neg (halves)
        wide = Cast <to = 11> (a) d = Sqrt (wide) e = Cast <to = 1> (d)
        brain = Cast <to = 16> (x) f = Cast <to = 1> (brain) g = Shape (x)
        h = Add (b, e) y = Add (h, f) }"""
)
AXES: Axes = dict(zip("xabcdefghy", [1, 1, None, 1, -1, None, 1, None, 2, 1], strict=True)) | {
    "halves": None, "wide": 1, "brain": None,
}  # fmt: skip
SCALED = {"scaled": Scaled("f", (0.5, 4.0, 1.0))}


@pytest.fixture(autouse=True)
def _library() -> None:
    if capi.api() is None:
        pytest.skip("onnxruntime's library for C is not beside its module for Python")


def counted(
    proto: onnx.ModelProto,
    axes: Axes,
    feeds: Sequence[dict[str, np.ndarray]],
    *,
    held: bool,
    scaled: dict[str, Scaled] | None = None,
    on_nonfinite: Nonfinite = "error",
) -> Calibration | str:
    """The statistics, or what is told of a failure and what is left of them then."""
    samples = [Sample(feed, None, f"sample {k}") for k, feed in enumerate(feeds)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxq.collection, "lanes_here", lambda *_, **__: (1, 1))  # in their order
        if held:
            patch.setattr(onnxq.collector, "is_possible", lambda _: False)
        try:
            return collect(proto, axes, samples, Collecting(threads=1, on_nonfinite=on_nonfinite), scaled=scaled)
        except OnnxqError as error:
            left = getattr(error, "partial", None)
            return f"{error}: {None if left is None else arrays_of(left)}"


def arrays_of(found: Calibration) -> dict[str, dict[str, list[object]]]:
    statistics = {name: {k: a.tolist() for k, a in s.to_arrays().items()} for name, s in found.sketches.items()}
    return {**statistics, "": {"feeds": sorted(found.feeds.items()), "skipped": sorted(found.skipped.items())}}  # type: ignore[dict-item]


def assert_same(one: Calibration | str, other: Calibration | str) -> None:
    if isinstance(one, str) or isinstance(other, str):
        assert one == other
        return
    assert one.sketches.keys() == other.sketches.keys()
    for name, sketch in one.sketches.items():
        mine, its = sketch.to_arrays(), other.sketches[name].to_arrays()
        assert mine.keys() == its.keys(), name
        for part in mine:
            np.testing.assert_array_equal(mine[part], its[part], f"{part} of {name}")
    assert (one.feeds, one.skipped, one.energies) == (other.feeds, other.skipped, other.energies)


@pytest.mark.parametrize("name", ["residual", "inverted_residual", "vision_transformer"])
def test_networks_count_alike(models: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.load(models / "digits_calibration.npz")["image"][:12]
    feeds = [{"image": image[None]} for image in images]
    runs: list[str] = []
    run = Watched.run
    monkeypatch.setattr(Watched, "run", lambda self, feed, tally, where: runs.append(where) or run(self, feed, tally, where))
    in_run = onnxq.calibrate(models / f"{name}.onnx", feeds, threads=1)
    assert len(runs) >= 12
    monkeypatch.setattr(onnxq.collector, "is_possible", lambda _: False)
    assert_same(in_run, onnxq.calibrate(models / f"{name}.onnx", feeds, threads=1))


SPECIAL = st.sampled_from([0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 1e-42, 3e38, 2.0**-100, -7.5])


@st.composite
def feeds_of(draw: st.DrawFn) -> list[dict[str, np.ndarray]]:
    """Feeds of one number of channels, most of the time, with values of all kinds."""
    channels, found = draw(st.integers(1, 3)), []
    for _ in range(draw(st.integers(1, 4))):
        shape = (draw(st.integers(1, 2)), draw(st.sampled_from([channels] * 7 + [4])), draw(st.integers(0, 5)))
        rng = np.random.default_rng(draw(st.integers(0, 1000)))
        x = (rng.standard_normal(shape) * 2.0 ** draw(st.integers(-20, 20))).astype(np.float32)
        if x.size and draw(st.booleans()):
            x.reshape(-1)[draw(st.integers(0, x.size - 1))] = draw(SPECIAL)
        found.append({"x": x})
    return found


@given(feeds_of(), st.sampled_from(["error", "skip", "ignore"]))
@settings(max_examples=60, deadline=None)
def test_tensors_of_every_type_and_size_count_alike(feeds: list[dict[str, np.ndarray]], on_nonfinite: Nonfinite) -> None:
    found = [counted(NET, AXES, feeds, held=held, on_nonfinite=on_nonfinite) for held in (False, True)]
    assert_same(*found)


def test_a_scaled_tensor_counts_as_if_it_was_there() -> None:
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((2, 3, 50)).astype(np.float32)} for _ in range(5)]
    axes = {"f": None, "scaled": 1}
    assert_same(*(counted(NET, axes, feeds, held=held, scaled=SCALED) for held in (False, True)))


def test_a_scaled_tensor_in_blocks_of_channels_counts_as_if_it_was_there(models: Path) -> None:
    proto = onnx.shape_inference.infer_shapes(onnx.load(models / "residual.onnx"))
    relu = next(n.output[0] for n in proto.graph.node if n.op_type == "Relu")
    channels = next(i for i in proto.graph.value_info if i.name == relu).type.tensor_type.shape.dim[1].dim_value
    scaled = {"scaled": Scaled(relu, tuple(2.0 ** (k % 5 - 2) for k in range(channels)))}
    feeds = [{"image": image[None]} for image in np.load(models / "digits_calibration.npz")["image"][:4]]
    for axes in ({"scaled": 1}, {relu: 1, "scaled": None}, {relu: None, "scaled": 1}, {relu: 3, "scaled": 2}):
        assert_same(*(counted(proto, axes, feeds, held=held, scaled=scaled) for held in (False, True)))


@pytest.mark.parametrize("size", [20, 1 << 19])
def test_more_exponents_than_there_are_pages_for_at_first(size: int) -> None:
    feeds = [{"x": (2.0 ** np.linspace(-126, 127, size) * (-1) ** k).astype(np.float32).reshape(1, 1, -1)} for k in range(3)]
    axes = {"a": 1, "f": None}
    assert_same(*(counted(NET, axes, feeds, held=held) for held in (False, True)))


STOPS = onnx.parser.parse_model(
    """<ir_version: 9, opset_import: ["" : 17]>
    net (float[N] x) => (float[2, M] y) <int64[2] shape = {2, -1}> { a = Relu (x) b = Neg (a) y = Reshape (b, shape) }"""
)


def test_a_run_that_fails_leaves_nothing() -> None:
    feeds = [{"x": np.ones(n, np.float32)} for n in (4, 6, 5)]
    axes = {"a": None, "b": None, "y": None}
    found = [counted(STOPS, axes, feeds, held=held) for held in (False, True)]
    assert_same(*found)
    assert "sample 2" in str(found[0])


def rerun(
    monkeypatch: pytest.MonkeyPatch, times: int, result: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
) -> None:
    """Let the first few second runs of samples see other feeds."""
    run, left = Watched.run, [None] * times
    monkeypatch.setattr(onnxq.collection, "lanes_here", lambda *_, **__: (1, 1))

    def other(self: Watched, feed: dict[str, np.ndarray], tally: Tally, where: str, visit: Visit | None = None) -> Any:
        if visit is not None and left:
            left.pop()
            feed = result(feed)
        return run(self, feed, tally, where, visit)

    monkeypatch.setattr(Watched, "run", other)


def failing(_: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    raise ModelError("out of memory")


def of_values(*values: float) -> list[Sample]:
    feeds = [{"x": np.array([[[v, 1, 2]]], np.float32)} for v in values]
    return [Sample(feed, None, f"sample {k}") for k, feed in enumerate(feeds)]


@pytest.mark.parametrize("result", [failing, lambda feed: {"x": feed["x"] + 1}], ids=["fails", "differs"])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("on_nonfinite", ["error", "skip"])
def test_what_cannot_be_taken_away_again_is_lost_with_its_part(
    result: Callable[..., Any], workers: int, on_nonfinite: Nonfinite, monkeypatch: pytest.MonkeyPatch
) -> None:
    rerun(monkeypatch, 1, result)
    told = "NaN" if on_nonfinite == "error" else "cannot be left out: .* other values .*, or failed; remove that sample"
    with ThreadPoolExecutor(1) as pool:
        how = Collecting(threads=1, on_nonfinite=on_nonfinite, executor=pool if workers else None)
        with pytest.raises(CalibrationError, match=told) as stop:
            collect(NET, {"a": 1, "f": None}, of_values(1, 2, np.nan, 3, np.nan), how)
    partial = stop.value.partial  # type: ignore[attr-defined]
    assert partial.feeds == {}
    assert partial.sketches["a"].count == 0


def test_a_sample_that_was_half_ignored_is_lost_with_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    rerun(monkeypatch, 1, failing)
    with pytest.raises(ModelError, match="out of memory") as stop:
        collect(NET, {"a": 1, "f": None}, of_values(1, np.nan, 2), Collecting(threads=1, on_nonfinite="ignore"))
    assert stop.value.partial.feeds == {}  # type: ignore[attr-defined]


def test_what_was_counted_when_memory_ran_out_is_lost_with_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Pages) -> None:
        raise MemoryError

    monkeypatch.setattr(onnxq.collection, "lanes_here", lambda *_, **__: (1, 1))
    feeds = [np.ones(50), 2.0 ** np.arange(-60, 60)]
    samples = [Sample({"x": x.astype(np.float32).reshape(1, 1, -1)}, None, f"sample {k}") for k, x in enumerate(feeds)]
    monkeypatch.setattr(Pages, "grow", full)
    with pytest.raises(MemoryError) as stop:
        collect(NET, {"a": 1, "f": None}, samples, Collecting(threads=1))
    assert stop.value.partial.sketches["a"].count == 0  # type: ignore[attr-defined]


def test_an_array_that_was_counted_in_part_is_lost_with_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first array of a tensor is counted by Python, and its memory may run out after some of the elements."""
    look = onnxq.collector.TensorSketch.look

    def half(self: onnxq.collector.TensorSketch, x: Any, sign: int = 1) -> Any:
        look(self, x[..., :1])
        raise MemoryError

    monkeypatch.setattr(onnxq.collection, "lanes_here", lambda *_, **__: (1, 1))
    monkeypatch.setattr(onnxq.collector.TensorSketch, "look", half)
    with pytest.raises(MemoryError) as stop:
        collect(NET, {"a": 1}, of_values(1), Collecting(threads=1))
    assert stop.value.partial.sketches["a"].count == 0  # type: ignore[attr-defined]


def test_an_exception_of_compiled_code_is_one_of_the_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no memory for it, the op is left in the middle of its work."""
    run = capi.Session.run

    def leaves(self: capi.Session, *arguments: Any) -> Any:
        found = run(self, *arguments)
        tallies[-1]._header["failed"] = 1
        return found

    tallies: list[Tally] = []
    begin = Tally.begin
    monkeypatch.setattr(Tally, "begin", lambda self, *given: tallies.append(self) or begin(self, *given))
    monkeypatch.setattr(capi.Session, "run", leaves)
    with pytest.raises(CalibrationError, match="a tensor of sample 0 could not be counted, probably for lack of memory"):
        collect(NET, {"a": 1}, of_values(1), Collecting(threads=1))


@pytest.mark.parametrize("axes", [{"b": 2}, {"a": -3}])
def test_a_rank_without_the_axis_of_channels_is_an_error(axes: Axes) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 17]> net (float[N] x, int64[M] s) => (float y) '
        "{ a = Reshape (x, s) b = Neg (a) y = ReduceSum <keepdims = 0> (b) }"
    )
    x = np.ones(6, np.float32)
    feeds = [{"x": x, "s": np.array(s)} for s in ([2, 3, 1], [3, 2])]
    found = [counted(proto, axes, feeds, held=held) for held in (False, True)]
    assert_same(*found)
    assert "there is no axis" in str(found[0])


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 300_000)])
def test_factors_that_do_not_fit_a_tensor_are_not_read_beyond_their_end(shape: tuple[int, ...]) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 17]> net (float[N] x, int64[M] s) => (float y) '
        "{ a = Reshape (x, s) y = ReduceSum <keepdims = 0> (a) }"
    )
    scaled = {"scaled": Scaled("a", (0.5, 4.0, 1.0))}
    feeds = [{"x": np.ones(prod(s), np.float32), "s": np.array(s)} for s in ((2, 3), shape)]
    for held in (False, True):
        if len(shape) == 1:
            assert counted(proto, {"scaled": None}, feeds, held=held, scaled=scaled)
        else:
            with pytest.raises(ValueError, match="broadcast"):
                counted(proto, {"scaled": None}, feeds, held=held, scaled=scaled)


def test_an_optional_without_content_is_an_output_like_others() -> None:
    kind = helper.make_tensor_type_proto(1, [2])
    nodes = [helper.make_node("Optional", [], ["o"], type=kind), helper.make_node("Relu", ["x"], ["y"])]
    outputs = [
        helper.make_value_info("o", helper.make_optional_type_proto(kind)),
        helper.make_tensor_value_info("y", 1, ["N"]),
    ]
    graph = helper.make_graph(nodes, "net", [helper.make_tensor_value_info("x", 1, ["N"])], outputs)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    found = counted(proto, {"y": None}, [{"x": np.ones(3, np.float32)}], held=False)
    assert isinstance(found, Calibration)
    assert found.sketches["y"].count == 3


def test_a_tally_goes_with_its_part() -> None:
    """At once: it is a megabyte, and the collector of garbage may be off while samples are collected."""
    session = watched(NET, ["a"], {}, (), 1)
    assert session is not None
    tally = weakref.ref(session.tally({"a": onnxq.collector.TensorSketch(1)}))
    assert tally() is None


@pytest.mark.parametrize(
    ("text", "possible"),
    [
        ("net (float[N] x) => (float[N] y) { y = Relu (x) }", True),
        ("net (float[N] x) => (float[N] y) { r = RandomNormalLike (x) y = Add (x, r) }", False),
        ("net (float[N] x, bool t) => (float[N] y) { y = Dropout (x, , t) }", False),
        ("net (float[N] x) => (float[N] y) { y = Dropout (x) }", True),
        ("net (bfloat16[N] x) => (float[N] y) { y = Cast <to = 1> (x) }", False),
        ("net (string[N] x, float[N] z) => (float[N] y) { y = Relu (z) }", False),
        ("net (seq(float[N]) x) => (float[N] y) { y = ConcatFromSequence <axis = 0> (x) }", False),
        (
            "net (float[N] x, bool c) => (float[N] y) { y = If (c) <then_branch = g () => (float[N] a) "
            "{ r = RandomNormalLike (x) a = Add (x, r) }, else_branch = h () => (float[N] b) { b = Neg (x) }> }",
            False,
        ),
    ],
)
def test_of_which_models_runs_are_watched(text: str, possible: bool) -> None:
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 17]> {text}')
    assert is_possible(proto) == possible
    names = [n.output[0] for n in proto.graph.node]
    assert (watched(proto, names, {}, (), 1) is not None) == possible


def test_random_tensors_are_held() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 17]> '
        "net (float[N] x) => (float[N] y) { r = RandomNormalLike (x) a = Add (x, r) y = Log (a) }"
    )
    feeds = [{"x": np.full(50, v, np.float32)} for v in (9, -9, 9, -9)]
    found = counted(proto, {"a": None, "y": None}, feeds, held=False, on_nonfinite="skip")
    assert isinstance(found, Calibration)
    assert (found.sketches["a"].count, found.sketches["y"].count, sorted(found.skipped)) == (100, 100, [1, 3])


def test_each_tensor_is_seen_before_the_next_is_made(models: Path) -> None:
    """In the order of the graph: the op behind a tensor reads it while it is in the cache, and it can be freed."""
    proto = onnx.shape_inference.infer_shapes(onnx.load(models / "residual.onnx"))
    names = [n.output[0] for n in proto.graph.node if n.op_type in ("Conv", "Relu", "Add")]
    session = watched(proto, names, {}, names, 1)
    assert session is not None
    sketches = {name: onnxq.collector.TensorSketch() for name in names}
    tally, seen, places = session.tally(sketches), [], []
    image = np.load(models / "digits_calibration.npz")["image"][:1]

    def visit(k: int, array: object) -> None:
        seen.append(k)
        values = getattr(array, "values", array)
        places.append(values.ctypes.data)  # type: ignore[union-attr]

    session.run({"image": image}, tally, "a sample", visit)
    assert seen == sorted(seen)
    assert len(set(places)) < len(places) / 2  # memory is used again


def test_without_the_library_tensors_are_held(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching.capi, "api", lambda: None)
    proto = onnx.load(models / "residual.onnx")
    assert not is_possible(proto)
    job = onnxq.collector.Job("", {}, (), (), 1, "error")
    assert Collector(job, proto).part().tally is None


def test_a_library_that_is_none_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime.so.1.0.0").write_bytes(b"no library")
    monkeypatch.setattr(capi.ort, "__file__", str(tmp_path / "__init__.py"))
    assert capi.api.__wrapped__() is None


def test_a_library_of_another_version_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capi.ort, "__version__", "1.2.3")
    assert capi.api.__wrapped__() is None
