"""calibration.py: what is collected, what is refused, what a file holds."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

import onnxq.calibration
from onnxq import cli
from onnxq.calibration import FEWEST_PROBES, PROBES, Calibration, merged
from onnxq.collecting import Collecting
from onnxq.collection import collect
from onnxq.data import Sample, open_samples
from onnxq.errors import CalibrationError, DataError
from onnxq.feeds import hash_of_feed
from onnxq.runtime import TensorInfo

NET = """<ir_version: 9, opset_import: ["" : 17]>
net (float[N, 3] x) => (float[N, 3] y) { a = Relu (x) b = Sqrt (x) y = Add (a, b) }"""


def samples(count: int, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [Sample({"x": rng.random((2, 3), np.float32)}, None, f"file {k}") for k in range(count)]


def test_the_observed_tensors_are_sketched() -> None:
    proto, feeds = onnx.parser.parse_model(NET), samples(5)
    seen: list[tuple[str, int, int | None]] = []
    found = collect(proto, {"x": 1, "a": None}, feeds, Collecting(progress=lambda *a: seen.append(a)), total=5)
    whole = np.stack([s.feed["x"] for s in feeds])
    assert found.samples == 5
    assert found.sketches["x"].maximum == whole.max()
    assert found.sketches["a"].count == 30
    assert found.sketches["x"].channels is not None
    assert found.sketches["a"].channels is None
    assert seen[-1] == ("calibrating", 5, 5)


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinity"), (-1.0, "NaN")])
def test_nonfinite_activations_name_tensor_and_sample(value: float, word: str) -> None:
    feeds = samples(3)
    feeds[1].feed["x"][0, 0] = value  # -1 under the square root
    with pytest.raises(CalibrationError, match=rf"{word} in tensor [xb] at file 1:"):
        collect(onnx.parser.parse_model(NET), {"x": None, "b": None}, feeds)


def test_the_probes_are_the_same_whatever_the_order() -> None:
    proto, feeds = onnx.parser.parse_model(NET), samples(2 * PROBES)
    one, other = collect(proto, {"a": None}, feeds), collect(proto, {"a": None}, feeds[::-1])
    assert len(one.probes) == PROBES
    assert [hash_of_feed(p) for p in one.probes] == [hash_of_feed(p) for p in other.probes]


@pytest.mark.parametrize(("limit", "count"), [(1, FEWEST_PROBES), (10**9, PROBES)])
def test_probes_are_fewer_where_feeds_are_large(limit: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxq.calibration, "MOST_BYTES", limit)
    assert len(collect(onnx.parser.parse_model(NET), {"a": None}, samples(2 * PROBES)).probes) == count


def test_probes_of_any_size_are_the_same_whatever_the_order_and_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxq.calibration, "MOST_BYTES", 100)
    proto, rng = onnx.parser.parse_model(NET), np.random.default_rng(0)
    feeds = [Sample({"x": rng.random((k % 5 * 8 + 1, 3), np.float32)}, None, f"file {k}") for k in range(40)]
    whole = collect(proto, {"a": None}, feeds)
    for order in (feeds[::-1], [feeds[k] for k in rng.permutation(len(feeds))]):
        assert collect(proto, {"a": None}, order).probe_hashes == whole.probe_hashes
    parts = [collect(proto, {"a": None}, part) for part in (feeds[:5], feeds[5:6], feeds[6:])]
    assert merged(parts).probe_hashes == whole.probe_hashes


def test_sums_of_tensors_without_fixed_channels_are_collected() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[N, T, 6, 8] x) => (float[N, T, 6, 8] y) <float[8, 8] w, float[8, 8] u> {
      a = MatMul (x, w)
      c = Add (a, x)
      y = MatMul (c, u)
    }"""
    proto, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    for name in "wu":
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal((8, 8)).astype(np.float32), name))
    feeds = [{"x": rng.standard_normal((1, t, 6, 8)).astype(np.float32)} for t in (3, 5, 4, 7, 1)]
    assert onnxq.quantize(proto, feeds, target="cpu", validate=False).samples == 5


def test_one_buffer_that_is_filled_anew_is_counted_right() -> None:
    proto, buffer = onnx.parser.parse_model(NET), np.zeros((2, 3), np.float32)
    values = np.random.default_rng(0).random((12, 2, 3), np.float32)

    def feeds() -> Iterator[dict[str, np.ndarray]]:
        for value in values:
            buffer[:] = value
            yield {"x": buffer}

    found = collect(proto, {"x": None}, open_samples(feeds, [TensorInfo("x", np.dtype(np.float32), (None, 3))]))
    assert len(set(found.feeds.values())) == 12
    assert found.sketches["x"].maximum == values.max()


def test_statistics_along_another_axis_are_collected_again() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[1, 3, 4, 4] x) => (float[1, 8, 4, 4] y, float[1, 8, 4, 5] z)
    <float[8, 3, 1, 1] w, float[8, 8, 1, 1] v, float[4, 5] p> { h = Conv (x, w) y = Conv (h, v) z = MatMul (h, p) }"""
    proto, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    for name, shape in (("w", (8, 3, 1, 1)), ("v", (8, 8, 1, 1)), ("p", (4, 5))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    feeds = [[{"x": rng.standard_normal((1, 3, 4, 4)).astype(np.float32)} for _ in range(4)] for _ in range(2)]
    one = onnxq.calibrate(proto, feeds[0], target="cpu")
    other = onnxq.calibrate(proto, feeds[1], target="xnnpack")
    axes = [part.sketches["h"].channel_axis for part in (one, other)]
    assert axes == [-1, 1]
    assert merged([one, other]).sketches["h"].channel_axis is None
    onnxq.quantize(proto, feeds[0], calibration=one, target="xnnpack", validate=False)


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    found = collect(onnx.parser.parse_model(NET), {"x": -1, "a": None}, samples(6))
    found.source_hash, found.cones = "s", {"x": "c"}
    found.save(tmp_path / "m.calib")
    back = Calibration.load(tmp_path / "m.calib")
    assert (back.samples, back.source_hash, back.cones, back.feeds) == (6, "s", {"x": "c"}, found.feeds)
    assert list(back.sketches) == ["x", "a"]
    for name, sketch in found.sketches.items():
        one, other = sketch.to_arrays(), back.sketches[name].to_arrays()
        assert all(np.array_equal(one[k], other[k]) for k in one)
    assert [hash_of_feed(p) for p in back.probes] == [hash_of_feed(p) for p in found.probes]


def test_another_schema_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.calib", "w") as archive:
        archive.writestr("header.json", json.dumps({"schema": 99}))
    with pytest.raises(CalibrationError, match="schema 99"):
        Calibration.load(tmp_path / "m.calib")


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04broken"])
def test_garbage_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.calib").write_bytes(content)
    with pytest.raises(CalibrationError, match="no readable calibration file"):
        Calibration.load(tmp_path / "m.calib")


def rewritten(path: Path, member: str, change: Callable[[Any], Any]) -> None:
    """Change one member of a calibration file by hand: what its JSON says, the arrays in it, or all of its bytes."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    if member.endswith(".json"):
        members[member] = json.dumps(change(json.loads(members[member]))).encode()
    else:
        with np.load(io.BytesIO(members[member])) as arrays:
            made, buffer = change(dict(arrays)), io.BytesIO()
        if not isinstance(made, bytes):
            np.savez(buffer, **made)
            made = buffer.getvalue()
        members[member] = made
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("member", "change"),
    [
        ("sketches.npz", lambda _: b""),
        ("first_look.npz", lambda _: b""),
        ("feeds.npz", lambda _: b""),
        ("header.json", lambda header: {**header, "loudest": None}),
        ("header.json", lambda header: {**header, "probes": None}),
        ("header.json", lambda header: {**header, "sequences": [1]}),
        ("feeds.npz", lambda arrays: {key: array[..., :1] for key, array in arrays.items()}),
        ("feeds.npz", lambda _: {}),
        ("sketches.npz", lambda arrays: {k: -a if k.endswith("/pages") else a for k, a in arrays.items()}),
        ("sketches.npz", lambda arrays: {k: a * np.nan if k.endswith("/range") else a for k, a in arrays.items()}),
        ("sketches.npz", lambda arrays: {k: a[::-1] if k.endswith("channel_range") else a for k, a in arrays.items()}),
    ],
)
def test_files_that_were_changed_by_hand_are_refused(member: str, change: Callable[[Any], Any], tmp_path: Path) -> None:
    found = collect(onnx.parser.parse_model(NET), {"x": 1, "a": None}, samples(1))
    path = tmp_path / "x.calib"
    found.save(path)
    rewritten(path, member, lambda same: same)
    assert Calibration.load(path).samples == 1
    rewritten(path, member, change)
    with pytest.raises(CalibrationError, match=r"x\.calib is no readable calibration file: "):
        Calibration.load(path)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["onnxq", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def test_shards_are_collected_merged_and_quantized_with(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The inverted residual network is evened out: what the shards saw of that differs, and is seen on the kept feeds."""
    model, data = models / "inverted_residual.onnx", np.load(models / "digits_calibration.npz")
    monkeypatch.chdir(tmp_path)
    for k, part in enumerate((slice(0, 30), slice(30, 90))):
        np.savez(f"{k}.npz", image=data["image"][part])
        assert command(monkeypatch, "calibrate", model, "--data", f"{k}.npz", "-o", f"{k}.calib", "--threads", 1) == 0
    assert command(monkeypatch, "calibrate", "--merge", "0.calib", "1.calib", "-o", "m.calib") == 0
    evaluation = models / "digits_evaluation.npz"
    assert "90 samples of 2 files" in capsys.readouterr().out
    report = onnxq.quantize(model, calibration="m.calib", eval=evaluation, max_samples=200)
    assert report.samples == 90
    assert any("evened out anew" in note for note in report.notes)
    assert report.accuracy is not None
    assert report.accuracy.drop is not None
    assert report.accuracy.drop <= 1.0


def test_an_interrupt_leaves_a_calibration_of_what_was_seen(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models / "residual.onnx"
    images = np.load(models / "digits_calibration.npz")["image"]

    def interrupted() -> Iterator[dict[str, np.ndarray]]:
        for k, image in enumerate(images):
            if k == 25:
                raise KeyboardInterrupt
            yield {"image": image[None]}

    with pytest.raises(KeyboardInterrupt, match=r"the statistics of 25 samples are in .*m\.partial\.calib"):
        onnxq.calibrate(model, interrupted(), output=tmp_path / "m.calib")
    assert not (tmp_path / "m.calib").exists()
    report = onnxq.quantize(model, calibration=tmp_path / "m.partial.calib", eval=models / "digits_evaluation.npz")
    assert report.samples == 25
    assert report.accuracy is not None
    assert report.accuracy.drop is not None
    assert report.accuracy.drop <= 1.0


@pytest.mark.usefixtures("held")
def test_a_generator_is_read_once(models: Path) -> None:
    images, read = np.load(models / "digits_calibration.npz")["image"][:12], []

    def feeds() -> Iterator[dict[str, np.ndarray]]:
        for k, image in enumerate(images):
            read.append(k)
            yield {"image": image[None]}

    found = onnxq.calibrate(models / "residual.onnx", feeds(), memory_limit=100_000)
    assert found.samples == 12
    assert read == list(range(12))


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("name", ["residual", "inverted_residual"])
def test_a_memory_limit_changes_no_bit(models: Path, name: str) -> None:
    images = np.load(models / "digits_calibration.npz")["image"][:8]
    feeds = [{"image": image[None]} for image in images]
    whole, bounded = (onnxq.calibrate(models / f"{name}.onnx", feeds, memory_limit=m, threads=1) for m in (None, 20_000))
    assert whole.sketches.keys() == bounded.sketches.keys()
    for tensor, sketch in whole.sketches.items():
        one, other = sketch.to_arrays(), bounded.sketches[tensor].to_arrays()
        assert all(np.array_equal(one[part], other[part]) for part in one), tensor


def test_a_sample_that_does_not_fit_keeps_what_was_collected(models: Path, tmp_path: Path) -> None:
    images = np.load(models / "digits_calibration.npz")["image"]

    def feeds() -> Iterator[dict[str, np.ndarray]]:
        yield from ({"image": image[None]} for image in images[:10])
        yield {"image": images[10][None, :, :16]}

    folder = tmp_path / "progress"
    with pytest.raises(DataError, match=r"sample 10: input image has shape \[1, 1, 16, 32\]"):
        onnxq.calibrate(models / "residual.onnx", feeds(), checkpoint=folder)
    (kept,) = folder.glob("*.calib")
    assert Calibration.load(kept).samples == 10


def test_a_stream_is_calibrated_and_quantized_with_its_state_fed_back() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17]>
    net (float[1, 8] x, float[1, 8] state) => (float[1, 8] y, float[1, 8] next) <float half = {0.5}, float[8, 8] w> {
      kept = Mul (state, half)
      next = Add (kept, x)
      y = MatMul (next, w)
    }"""
    proto, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal((8, 8)).astype(np.float32), "w"))
    del proto.graph.value_info[:]
    feeds = [{"x": np.abs(rng.standard_normal((1, 8))).astype(np.float32)} for _ in range(30)]
    found = onnxq.calibrate(proto, feeds, feedback={"next": "state"})
    state = np.zeros((1, 8), np.float32)
    largest = 0.0
    for feed in feeds:
        state = 0.5 * state + feed["x"]
        largest = max(largest, float(state.max()))
    assert found.sketches["next"].maximum == pytest.approx(largest, rel=1e-6)
    report = onnxq.quantize(proto, feeds, target="cpu", feedback={"next": "state"})
    assert report.integer_share == 1.0
    assert {i.name for i in report.model.graph.input} == {"x", "state"}


def test_a_sample_that_is_left_out_is_not_compared_on(models: Path) -> None:
    data = np.load(models / "digits_calibration.npz")
    feeds = [
        ({"image": image[None].copy()}, label) for image, label in zip(data["image"][:40], data["label"][:40], strict=True)
    ]
    feeds[7][0]["image"][0, 0, 0, 0] = np.nan
    report = onnxq.quantize(models / "inverted_residual.onnx", feeds, on_nonfinite="skip")
    assert report.samples == 39
    assert any(note.startswith("1 samples were left out, the first for NaN in tensor image") for note in report.notes)
    assert report.accuracy is not None
    assert report.accuracy.samples == 39
    assert report.accuracy.real.metrics["top1"] >= 95.0
