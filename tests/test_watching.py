"""watching.py: tensors that are counted while the model runs count as those that are held and counted afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxq
import onnxq.collector
from onnxq import capi, watching
from onnxq.calibration import Calibration
from onnxq.collection import Collecting, collect
from onnxq.collector import Axes, Collector, Nonfinite, watched
from onnxq.data import Sample
from onnxq.equalization import Scaled
from onnxq.errors import CalibrationError, ModelError, OnnxqError
from onnxq.watching import Watched, is_possible

NET = onnx.parser.parse_model(
    """<ir_version: 9, opset_import: ["" : 17]>
    net (float[N, C, M] x) => (float[N, C, M] y) {
        a = Relu (x) b = Reciprocal (x) halves = Cast <to = 10> (x) c = Neg (halves)
        wide = Cast <to = 11> (a) d = Sqrt (wide) e = Cast <to = 1> (d)
        brain = Cast <to = 16> (x) f = Cast <to = 1> (brain) g = Shape (x)
        h = Add (b, e) y = Add (h, f) }"""
)
AXES: Axes = dict(zip("abcdefghy", [1, None, 1, -1, None, 1, None, 2, 1], strict=True)) | {
    "halves": None, "wide": 1, "brain": None, "x": 1,
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
        patch.setattr(onnxq.collection, "lanes_here", lambda *_: (1, 1))  # in their order
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


def test_what_cannot_be_taken_away_again_is_lost_with_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [Sample({"x": np.full((1, 1, 3), v, np.float32)}, None, f"sample {k}") for k, v in enumerate([1, 2, np.nan])]
    run = Watched.run

    def failing(self: Watched, feed: object, tally: object, where: str, visit: object = None) -> object:
        if visit is not None:
            raise ModelError("out of memory")
        return run(self, feed, tally, where)  # type: ignore[arg-type]

    monkeypatch.setattr(Watched, "run", failing)
    monkeypatch.setattr(onnxq.collection, "lanes_here", lambda *_: (1, 1))
    with pytest.raises(CalibrationError, match="NaN") as stop:
        collect(NET, {"a": 1, "f": None}, samples, Collecting(threads=1))
    assert stop.value.partial.feeds == {}  # type: ignore[attr-defined]
    assert stop.value.partial.sketches["a"].count == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "possible"),
    [
        ("net (float[N] x) => (float[N] y) { y = Relu (x) }", True),
        ("net (float[N] x) => (float[N] y) { r = RandomNormalLike (x) y = Add (x, r) }", False),
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
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(capi, "find_spec", lambda _: spec)
    assert capi.api.__wrapped__() is None
