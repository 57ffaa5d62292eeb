"""firstlook.py: which samples are looked at first, and that what is collected does not depend on how the data comes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxq
from onnxq import firstlook, proof
from onnxq.blocks import Blocks
from onnxq.building import equalize
from onnxq.calibration import Calibration
from onnxq.collector import Collector, Part
from onnxq.data import Sample, Samples, open_samples
from onnxq.equalization import EQUALIZED, Scaled
from onnxq.exposure import OptimizedGraph
from onnxq.firstlook import FEW, FEWEST, few_of
from onnxq.passes import CollectStatistics
from onnxq.preparation import passes_of, prepare
from onnxq.recipe import load
from onnxq.runtime import Session, TensorInfo, exposed
from onnxq.source import load_any
from onnxq.stages import PLACE
from onnxq.watching import Watched

INPUTS = [TensorInfo("x", np.dtype(np.float32), (None,))]


def samples_of(arrays: list[np.ndarray]) -> Samples:
    return open_samples([{"x": array} for array in arrays], INPUTS)


def values(few: dict[int, Sample]) -> list[list[float]]:
    return sorted(sample.feed["x"].tolist() for sample in few.values())


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=100), seed=st.integers(0, 99), limit=st.integers(40, 4000))
def test_the_few_are_the_same_whatever_the_order(lengths: list[int], seed: int, limit: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = [rng.random(length, np.float32) for length in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(firstlook, "MOST_BYTES", limit)
        few = values(few_of(samples_of(arrays)))
        assert values(few_of(samples_of([arrays[k] for k in rng.permutation(len(arrays))]))) == few
    assert min(len(arrays), FEWEST) <= len(few) <= FEW
    assert len(few) <= FEWEST or 4 * sum(len(v) for v in few) <= limit
    for k, sample in few_of(samples_of(arrays)).items():
        np.testing.assert_array_equal(sample.feed["x"], arrays[k])


def test_of_samples_that_are_alike_there_is_one() -> None:
    arrays = [np.full(3, k % 5, np.float32) for k in range(200)]
    assert len(few_of(samples_of(arrays))) == 5


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 3),
    channels=st.integers(1, 19),
    side=st.integers(1, 4),
    lanes=st.sampled_from([4, 8, 16]),
    seed=st.integers(0, 9),
)
def test_blocks_are_scaled_by_channel(n: int, channels: int, side: int, lanes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    padded = -(-channels // lanes) * lanes
    blocks = Blocks.of(rng.standard_normal((n, padded, side, side)).astype(np.float32), channels, lanes)
    scaled = Scaled("x", tuple(np.exp2(rng.integers(-6, 1, channels))))
    got = scaled.value(blocks)
    assert isinstance(got, Blocks)
    expected = scaled.value(blocks.plain())
    assert isinstance(expected, np.ndarray)
    np.testing.assert_array_equal(got.plain(), expected)
    np.testing.assert_array_equal(expected, blocks.plain() * np.array(scaled.factors, np.float32).reshape(-1, 1, 1))


def feeds(models: Path, count: int = 60) -> list[dict[str, np.ndarray]]:
    return [{"image": image[None].copy()} for image in np.load(models / "digits_calibration.npz")["image"][:count]]


def test_what_is_collected_does_not_depend_on_how_the_samples_come(models: Path) -> None:
    """Twice as many as are looked at first. Only the extremes of each sample know where it stands in the data."""
    model, given_ = models / "inverted_residual.onnx", feeds(models)
    order = np.random.default_rng(0).permutation(len(given_))
    ways: list[Any] = [given_, iter(given_), lambda: iter(given_), [given_[k] for k in order]]
    found = [onnxq.calibrate(model, way, threads=1) for way in ways]
    assert any(name.endswith(EQUALIZED) for name in found[0].sketches)
    for other in found[1:]:
        assert other.cones == found[0].cones
        assert other.first_look.keys() == found[0].first_look.keys()
        for name, sketch in found[0].sketches.items():
            one, two = sketch.to_arrays(), other.sketches[name].to_arrays()
            assert all(np.array_equal(one[part], two[part]) for part in one if part != "series"), name


def runs_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The samples that the model is run on, as they come."""
    run: list[str] = []
    add = Collector.add

    def counted(self: Collector, index: int, sample: Sample, part: Part) -> None:
        run.append(sample.where)
        add(self, index, sample, part)

    monkeypatch.setattr(Collector, "add", counted)
    return run


def even_out_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for where in ("equalize_layers", "equalize_gates"):
        monkeypatch.setattr(f"onnxq.passes.equalize.{where}.choose_factors", lambda *_, **__: None)


def test_each_sample_is_run_once_and_the_few_twice(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs_of(monkeypatch)
    found = onnxq.calibrate(models / "inverted_residual.onnx", feeds(models), threads=1)
    assert any(name.endswith(EQUALIZED) for name in found.sketches)
    assert len(run) == 60 + FEW
    assert set(run[FEW:]) == {f"sample {k}" for k in range(60)}


def test_each_sample_is_run_once_where_nothing_is_evened_out(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what comes out is the same bit for bit as if all of them were run after the first look, as with a checkpoint."""
    model, given_ = models / "inverted_residual.onnx", feeds(models)
    even_out_nothing(monkeypatch)
    run = runs_of(monkeypatch)
    found = onnxq.calibrate(model, given_, threads=1)
    assert found.first_look
    assert not any(name.endswith(EQUALIZED) for name in found.sketches)
    assert sorted(run) == sorted(f"sample {k}" for k in range(60))
    run.clear()
    again = onnxq.calibrate(model, given_, threads=1, checkpoint=tmp_path)
    assert len(run) == 60 + FEW
    assert (again.feeds, again.cones, again.samples) == (found.feeds, found.cones, 60)
    assert again.sketches.keys() == found.sketches.keys()
    for name, sketch in found.sketches.items():
        one, two = sketch.to_arrays(), again.sketches[name].to_arrays()
        assert all(np.array_equal(one[part], two[part]) for part in one), name


@pytest.mark.parametrize("evens_out", [False, True])
def test_the_session_goes_on_where_nothing_is_evened_out_and_makes_room_for_the_proof(
    models: Path, monkeypatch: pytest.MonkeyPatch, evens_out: bool
) -> None:
    there: list[weakref.ref[Watched]] = []
    left_at_proof: list[int] = []
    graphs: list[OptimizedGraph] = []
    make, prove, optimize = Watched.__init__, proof._exposing, OptimizedGraph.__init__

    def made(self: Watched, *given: Any, **named: Any) -> None:
        there.append(weakref.ref(self))
        make(self, *given, **named)

    def exposing(*given: Any) -> Session:
        left_at_proof.append(sum(one() is not None for one in there))
        return prove(*given)

    def optimized(self: OptimizedGraph, *given: Any) -> None:
        graphs.append(self)
        optimize(self, *given)

    monkeypatch.setattr(Watched, "__init__", made)
    monkeypatch.setattr(OptimizedGraph, "__init__", optimized)
    monkeypatch.setattr(proof, "_exposing", exposing)
    if not evens_out:
        even_out_nothing(monkeypatch)
    found = onnxq.calibrate(models / "inverted_residual.onnx", feeds(models))
    assert len(there) == 1 + evens_out
    assert len(graphs) == 1  # made while samples are read, and the one that is asked for later
    assert not any(left_at_proof)
    assert found.samples == 60
    assert all(one() is None for one in there)


def test_samples_left_out_in_the_first_look_are_left_out_of_what_goes_on(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_ = feeds(models)
    given_[7]["image"][:] = np.nan
    given_[40]["image"][:] = np.inf
    even_out_nothing(monkeypatch)
    run = runs_of(monkeypatch)
    found = onnxq.calibrate(models / "inverted_residual.onnx", given_, on_nonfinite="skip", threads=1)
    assert sorted(run) == sorted(f"sample {k}" for k in range(60))
    assert sorted(found.skipped) == [7, 40]
    assert sorted(found.feeds) == [k for k in range(60) if k not in (7, 40)]
    assert len(found.notes) == 1
    assert found.notes[0].startswith("2 samples were left out")


class Shuffled:
    """Samples that come in another order at each reading, and only so many once it is told that they are collected."""

    def __init__(self, given_: list[dict[str, np.ndarray]], most: int) -> None:
        self._feeds, self._most, self._readings, self._is_collected = given_, most, 0, False

    def progress(self, what: str, _: int, __: int | None) -> None:
        self._is_collected |= what == "calibrating"

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        order = np.random.default_rng(self._readings).permutation(len(self._feeds))
        self._readings += 1
        return iter([self._feeds[k] for k in order][: self._most if self._is_collected else None])


@pytest.mark.parametrize("most", [60, 3])
def test_data_that_changes_after_the_first_look_is_collected_whole(
    models: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    model, given_ = models / "residual.onnx", feeds(models)
    even_out_nothing(monkeypatch)
    source = Shuffled(given_, most)
    found = onnxq.calibrate(model, source, threads=1, progress=source.progress)
    assert len(set(found.feeds.values())) == len(found.feeds) == most
    if most == 60:
        expected = onnxq.calibrate(model, given_, threads=1)
        for name, sketch in expected.sketches.items():
            one, two = sketch.to_arrays(), found.sketches[name].to_arrays()
            assert all(np.array_equal(one[part], two[part]) for part in one if part != "series"), name


def test_an_interrupt_right_after_the_first_look_leaves_what_it_saw(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(what: str, done: int, _: int | None) -> None:
        if what == "calibrating":
            assert done == FEW
            raise KeyboardInterrupt

    even_out_nothing(monkeypatch)
    with pytest.raises(KeyboardInterrupt, match="the statistics of"):
        onnxq.calibrate(models / "residual.onnx", feeds(models), output=tmp_path / "m.calib", progress=interrupt)
    assert Calibration.load(tmp_path / "m.partial.calib").samples == FEW


@pytest.mark.parametrize("target", ["cpu", "qnn-htp"])
def test_what_is_counted_of_evened_channels_is_what_the_evened_model_makes(models: Path, target: str) -> None:
    """Of tensors that are others, scaled, and on a target that has all in integers also of gates."""
    given_ = feeds(models, 12)
    recipe = load(None, target=target, mode="static")
    prepared = prepare(load_any(models / "inverted_residual.onnx"), given_, recipe, threads=1)
    evened, _ = equalize(prepared, recipe)
    prepared.manager.run(evened, passes_of([*PLACE, CollectStatistics], recipe))
    assert evened.calibration is not None
    names = [name for name in evened.calibration.sketches if name in evened.scaled or name in evened.gates]
    assert any(name in evened.scaled for name in names)
    assert any(name in evened.gates for name in names) == (target == "qnn-htp")
    session = Session(exposed(evened.graph.to_stored_proto(), names), threads=1)
    results = [session.run(feed) for feed in given_]
    for name in names:
        values, sketch = np.stack([r[name] for r in results]), evened.calibration.sketches[name]
        assert sketch.count == values.size
        close = {"rtol": 1e-4, "atol": 1e-5 * np.abs(values).max()}  # a HardSwish rounds another way than its parts
        np.testing.assert_allclose([sketch.minimum, sketch.maximum], [values.min(), values.max()], **close)
        if sketch.channels is not None:
            axes = tuple(a for a in range(values.ndim) if a != 2)  # of (feeds, N, C, H, W)
            np.testing.assert_allclose(sketch.channels.mean, values.mean(axes, np.float64), **close)
            np.testing.assert_allclose(sketch.channels.maximum, values.max(axes), **close)


def test_a_layer_that_is_evened_out_can_be_excluded_later_without_the_data(models: Path, tmp_path: Path) -> None:
    model, path = models / "inverted_residual.onnx", tmp_path / "m.calib"
    onnxq.calibrate(model, feeds(models), output=path)
    found = Calibration.load(path)
    evened = [name for name in found.sketches if name.endswith(EQUALIZED)]
    assert evened
    assert all(name.removesuffix(EQUALIZED) in found.sketches for name in evened)
    quick = "[passes]\nround-weights = false\nselect-layers = false\n"  # which ask for no statistics
    for recipe in ("", "equalize-layers = false\nequalize-gates = false\n"):
        (tmp_path / "r.toml").write_text(quick + recipe)
        for exclude in (None, evened[0].removesuffix(EQUALIZED)):
            report = onnxq.quantize(
                model, calibration=path, recipe=tmp_path / "r.toml", exclude=exclude, target="cpu", validate=False
            )
            assert report.samples == 60
            assert not any("evened out anew" in note for note in report.notes)


def test_an_interrupt_of_the_collection_leaves_what_channels_were_evened_out_by(models: Path, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, _: int | None) -> None:
        if what == "calibrating" and done == 20:
            raise KeyboardInterrupt

    model = models / "inverted_residual.onnx"
    with pytest.raises(KeyboardInterrupt, match="the statistics of"):
        onnxq.calibrate(model, feeds(models), output=tmp_path / "m.calib", progress=interrupt)
    found = Calibration.load(tmp_path / "m.partial.calib")
    assert 20 <= found.samples < 60
    assert found.first_look
    report = onnxq.quantize(model, calibration=tmp_path / "m.partial.calib", target="cpu", validate=False)
    assert not any("evened out anew" in note for note in report.notes)


def test_an_interrupt_of_the_first_look_leaves_nothing(models: Path, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, _: int | None) -> None:
        if what == "first look" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        onnxq.calibrate(models / "residual.onnx", feeds(models), output=tmp_path / "m.calib", progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_samples_that_are_left_out_do_not_hide_the_others(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that are looked at first hold NaN: nothing is evened out, and the rest is collected."""
    given_ = feeds(models, 40)
    monkeypatch.setattr(firstlook, "FEW", 4)
    for sample in few_of(open_samples(given_, [TensorInfo("image", np.dtype(np.float32), (1, 1, 32, 32))])).values():
        next(f for f in given_ if np.array_equal(f["image"], sample.feed["image"]))["image"][:] = np.nan
    bad = [k for k, f in enumerate(given_) if np.isnan(f["image"]).any()]
    monkeypatch.setattr(firstlook, "few_of", lambda samples, _: {k: s for k, s in enumerate(samples) if k in bad})
    found = onnxq.calibrate(models / "residual.onnx", given_, on_nonfinite="skip", threads=1)
    assert sorted(found.skipped) == bad
    assert found.samples == 36
    assert not found.first_look
