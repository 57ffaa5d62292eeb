"""Inputs that take sequences and Optionals: every form of data, the whole way through."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

import onnxq
from onnxq.batches import check_batches
from onnxq.calibration import Calibration
from onnxq.data import fed_back, open_samples
from onnxq.errors import DataError
from onnxq.feeds import Feed, arrays_of, flat, hash_of_feed, size_of, whole
from onnxq.inspection import inspect
from onnxq.runtime import Session
from tests import tiny

FRAMES = """tiny (seq(float[1, 3, 8, 8]) frames, optional(float[1]) bias) => (float[1, 8, 1, 1] y)
  <float[8, 3, 3, 3] w, float[8, 8, 3, 3] v, int64 first = {0}, int64 last = {-1}, float[1] zero = {0}> {
    a = SequenceAt (frames, first)  b = SequenceAt (frames, last)
    c = Conv <pads = [1, 1, 1, 1]> (a, w)  d = Relu (c)  e = Conv <pads = [1, 1, 1, 1]> (b, w)  f = Relu (e)
    s = Add (d, f)  t = Conv (s, v)  u = Relu (t)  g = GlobalAveragePool (u)
    has = OptionalHasElement (bias)
    off = If (has) <then_branch = yes () => (float[1] o) { o = OptionalGetElement (bias) },
                    else_branch = no () => (float[1] p) { p = Identity (zero) }>
    y = Add (g, off) }"""


def frames(count: int = 6) -> list[dict[str, Any]]:
    """Feeds of two to four frames, every second one with a bias."""
    rng = np.random.default_rng(1)
    feeds = []
    for k in range(count):
        feed: dict[str, Any] = {"frames": [rng.uniform(0, 2, (1, 3, 8, 8)).astype(np.float32) for _ in range(2 + k % 3)]}
        feeds.append(feed | ({"bias": np.array([k], np.float32)} if k % 2 else {}))
    return feeds


def as_folder(feeds: Iterable[Feed], folder: Path) -> str:
    folder.mkdir()
    for k, feed in enumerate(feeds):
        np.savez(folder / f"{k}.npz", **flat(feed)[0])  # type: ignore[arg-type]
    return str(folder)


def as_test_data_sets(feeds: Iterable[Feed], folder: Path) -> str:
    for k, feed in enumerate(feeds):
        place = folder / f"test_data_set_{k}"
        place.mkdir(parents=True)
        (place / "input_0.pb").write_bytes(numpy_helper.from_list(feed["frames"]).SerializeToString())
        bias = numpy_helper.from_optional(feed["bias"]) if "bias" in feed else onnx.OptionalProto()
        (place / "input_1.pb").write_bytes(bias.SerializeToString())
    return str(folder)


def with_nothing(feeds: Iterable[Feed], _: Path) -> list[Feed]:
    return [{"bias": None, **feed} for feed in feeds]


FORMS = [lambda feeds, _: feeds, lambda feeds, _: iter(feeds), with_nothing, as_folder, as_test_data_sets]


@pytest.mark.parametrize("form", FORMS, ids=["list", "iterator", "None", "folder of .npz", "test_data_set"])
def test_every_form_of_data_holds_sequences_and_optionals(form: Callable[..., Any], tmp_path: Path) -> None:
    samples = open_samples(form(frames(), tmp_path / "data"), tiny.inputs(FRAMES))
    for _ in range(2):  # an iterator is kept on disk as it is read
        assert [hash_of_feed(s.feed) for s in samples] == [hash_of_feed(feed) for feed in frames()]


def test_a_model_of_sequences_and_optionals_is_quantized_and_measured() -> None:
    report = onnxq.quantize(tiny.model(FRAMES), frames(), target="cpu", threads=1)
    assert [report.ledger[name].state.value for name in report.ledger if "Conv" in name] == ["int8"] * 3
    assert report.accuracy is not None
    assert report.accuracy.real.outputs["y"].sqnr > 30
    session = Session(report.model, threads=1)
    without, given = frames()[0], frames()[0] | {"bias": np.array([7], np.float32)}
    np.testing.assert_allclose(session.run(given)["y"], session.run(without)["y"] + 7, rtol=1e-6)


def test_a_body_that_reads_an_absent_optional_is_quantized_on_the_samples_that_have_it() -> None:
    text = """tiny (float[1, 8] x, optional(float[1, 8]) s) => (float[1, 8] y) <float[8, 8] w, float[8, 8] v> {
        h = OptionalHasElement (s)
        y = If (h) <then_branch = yes () => (float[1, 8] a) { p = OptionalGetElement (s)  a = MatMul (p, w) },
                    else_branch = no () => (float[1, 8] b) { r = Relu (x)  b = MatMul (r, v) }> }"""
    rows = tiny.rows(8, shape=(8,))
    for some in (lambda k: False, lambda k: k == 5, lambda k: k != 5):
        feeds = [{"x": row[None]} | ({"s": row[None]} if some(k) else {}) for k, row in enumerate(rows)]
        report = onnxq.quantize(tiny.model(text), feeds, target="cpu", threads=1)
        assert report.accuracy is not None
        assert report.accuracy.real.outputs["y"].sqnr > 25


@pytest.mark.parametrize("bias", [{}, {"bias": np.array([1], np.float32)}], ids=["without", "with"])
def test_placements_are_timed_on_such_feeds(bias: Feed) -> None:
    feeds = [{"frames": feed["frames"], **bias} for feed in frames()]
    report = onnxq.quantize(tiny.model(FRAMES), feeds, threads=1, validate=False)
    assert report.coverage["Conv"].integer + report.coverage["Conv"].float == 3


def test_a_calibration_keeps_such_feeds_and_is_the_same_however_it_is_made(tmp_path: Path) -> None:
    made = onnxq.calibrate(tiny.model(FRAMES), frames(), output=tmp_path / "one.calib", threads=1)
    onnxq.calibrate(tiny.model(FRAMES), frames()[::-1], output=tmp_path / "other.calib", threads=1)
    loaded = Calibration.load(tmp_path / "one.calib")
    assert loaded.kept.keys() == made.kept.keys()
    assert all(hash_of_feed(feed) == digest for digest, feed in loaded.kept.items())
    assert Calibration.load(tmp_path / "other.calib").kept.keys() == made.kept.keys()
    report = onnxq.quantize(tiny.model(FRAMES), calibration=tmp_path / "one.calib", target="cpu", threads=1)
    assert report.coverage["Conv"].integer == 3


def test_without_data_such_inputs_are_made_up() -> None:
    report = onnxq.quantize(tiny.model(FRAMES), mode="dynamic", target="cpu", threads=1)
    assert report.model.graph.input[0].type.HasField("sequence_type")
    assert inspect(tiny.model(FRAMES)).counted_for == {"frames": (1, 3, 8, 8)}


SEQUENCE, OPTIONAL = np.ones((1, 3, 8, 8), np.float32), np.ones(1, np.float32)


@pytest.mark.parametrize(
    ("feed", "said"),
    [
        ({"bias": OPTIONAL}, r"sample 0: there are no arrays frames\[0\], frames\[1\] ... for input frames"),
        ({"frames": SEQUENCE}, "sample 0: input frames takes a list of arrays and is given one array"),
        ({"frames": [SEQUENCE[0]]}, r"input frames has shape \[3, 8, 8\], the model takes \[1, 3, 8, 8\]"),
        ({"frames": [SEQUENCE.astype(int)]}, "input frames is int64, the model takes float32"),
        ({"frames": [SEQUENCE], "bias": OPTIONAL.astype(int)}, "input bias is int64, the model takes float32"),
    ],
)
def test_what_does_not_fit_is_named(feed: Feed, said: str) -> None:
    with pytest.raises(DataError, match=said):
        onnxq.quantize(tiny.model(FRAMES), [feed], target="cpu", threads=1)


def test_a_damaged_file_of_a_sequence_is_named(tmp_path: Path) -> None:
    folder = Path(as_test_data_sets(frames(1), tmp_path))
    (folder / "test_data_set_0" / "input_0.pb").write_bytes(b"\x08\x01\x12\xff")
    with pytest.raises(DataError, match=r"input_0.pb, for input frames, is no serialized value: .*onnx.SequenceProto"):
        list(open_samples(str(folder), tiny.inputs(FRAMES)))


def test_a_sequence_has_no_axis_for_a_batch() -> None:
    with pytest.raises(DataError, match="input frames has no axis for a batch"):
        check_batches(tiny.inputs(FRAMES), [2])


def test_a_state_that_is_a_sequence_starts_empty() -> None:
    text = """tiny (float[1, 4] x, seq(float[1, 4]) past) => (float[1, 3] y, seq(float[1, 4]) next)
      <float[4, 3] w, int64[1] zero = {0}> {
        next = SequenceInsert (past, x)  all = ConcatFromSequence <axis = 0> (next)
        sum = ReduceSum <keepdims = 1> (all, zero)  y = MatMul (sum, w) }"""
    session, inputs = Session(tiny.model(text), threads=1), tiny.inputs(text)
    rows = [{"x": row[None]} for row in tiny.rows(3)]
    stream = fed_back(open_samples(rows, inputs), session, {"next": "past"}, inputs)
    assert [len(s.feed["past"]) for s in stream] == [0, 1, 2]


FEEDS = st.dictionaries(
    st.sampled_from(["x", "y", "a/b", "frames"]),
    st.integers(0, 3).map(lambda n: np.arange(n)) | st.lists(st.integers(0, 3).map(lambda n: np.arange(n)), max_size=3),
)


@given(FEEDS)
@settings(deadline=None)
def test_flat_and_whole_are_inverse(feed: Feed) -> None:
    back = whole(*flat(feed))
    assert back.keys() == feed.keys()
    for name, value in feed.items():
        assert isinstance(back[name], list) == isinstance(value, list)
    for one, other in zip(arrays_of(dict(sorted(feed.items()))), arrays_of(dict(sorted(back.items()))), strict=True):
        np.testing.assert_array_equal(one, other)
    assert size_of(feed) == sum(a.nbytes for a in flat(feed)[0].values())


@given(FEEDS, FEEDS)
@settings(deadline=None)
def test_only_equal_feeds_have_one_hash(one: Feed, other: Feed) -> None:
    def said(feed: Feed) -> Any:
        return {n: [list(v) for v in value] if isinstance(value, list) else tuple(value) for n, value in feed.items()}

    assert (hash_of_feed(one) == hash_of_feed(other)) == (said(one) == said(other))
