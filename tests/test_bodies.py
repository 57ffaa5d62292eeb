"""bodies.py: what If, Loop and Scan hold is quantized like any model, on what the model around it hands to it."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxq
from onnxq import runtime
from onnxq.bodies import bodies_with_layers, samples_of
from onnxq.data import Sample
from onnxq.errors import RecipeError
from onnxq.graph import Graph
from onnxq.model import State
from onnxq.recipe import Override, Recipe
from onnxq.runtime import Session, evaluate

HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'
BRANCHES = """net (float[N, 16] x, bool c) => (float[N, 8] y) <float[16, 12] w, float[12, 8] v, float[16, 8] u> {
  h = Relu (x)
  y = If (c) <then_branch = t () => (float[N, 8] a) { [t1] a0 = MatMul (h, w)  a1 = Relu (a0)  [t2] a = MatMul (a1, v) },
              else_branch = e () => (float[N, 8] b) { [e1] b0 = MatMul (h, u)  b = Tanh (b0) }> }"""
LOOP = """net (float[4, 16] x, int64 m) => (float[4, 16] y) <float[16, 20] w, float[20, 16] v, bool go = {1}> {
  y = Loop <body = step (int64 i, bool cin, float[4, 16] p) => (bool cout, float[4, 16] q) {
    cout = Identity (cin)  [l1] a = MatMul (p, w)  b = Relu (a)  [l2] c = MatMul (b, v)  d = Add (c, x)  q = Tanh (d) }>
    (m, go, x) }"""
SCAN = """net (float[T, 6] x, float[1, 10] s0) => (float[1, 10] s, float[T, 1, 10] y) <float[6, 10] w, float[10, 10] r> {
  s, y = Scan <num_scan_inputs = 1, scan_input_directions = [1], body = step (float[1, 10] p, float[6] xt)
    => (float[1, 10] n, float[1, 10] o) { ax = Constant <value_ints = [0]> ()  x2 = Unsqueeze (xt, ax)
    [mw] a = MatMul (x2, w)  [mr] b = MatMul (p, r)  t = Add (a, b)  n = Tanh (t)  o = Identity (n) }> (s0, x) }"""
NESTED = """net (float[N, 16] x, bool c, bool d) => (float[N, 8] y) <float[16, 8] w, float[16, 8] v> {
  y = If (c) <then_branch = t () => (float[N, 8] a) {
      a = If (d) <then_branch = tt () => (float[N, 8] aa) { [deep] aa = MatMul (x, w) },
                  else_branch = te () => (float[N, 8] ab) { ab0 = MatMul (x, v)  ab = Neg (ab0) }> },
    else_branch = e () => (float[N, 8] b) { [flat] b0 = MatMul (x, w)  b = Relu (b0) }> }"""


def made(text: str) -> onnx.ModelProto:
    proto, rng = onnx.parser.parse_model(HEADER + text), np.random.default_rng(0)
    have = {t.name for t in proto.graph.initializer}
    for info in proto.graph.value_info:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        if info.name not in have:
            values = rng.standard_normal(shape) / np.sqrt(shape[0])
            proto.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), info.name))
    del proto.graph.value_info[:]
    return proto


def feeds(proto: onnx.ModelProto, count: int = 8) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)

    def value(info: Any, k: int) -> np.ndarray:
        kind = info.type.tensor_type.elem_type
        if kind == onnx.TensorProto.BOOL:
            return np.array(k % 2 == 0 if info.name == "c" else k % 4 < 2)
        if kind == onnx.TensorProto.INT64:
            return np.array(3)
        sizes = [d.dim_value or 5 for d in info.type.tensor_type.shape.dim]
        return rng.standard_normal(sizes).astype(np.float32)

    return [{i.name: value(i, k) for i in proto.graph.input} for k in range(count)]


def kernels(graph: onnx.GraphProto) -> Iterator[str]:
    """The ops of bodies."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from (n.op_type for n in attribute.g.node)
                yield from kernels(attribute.g)


@pytest.mark.parametrize(
    "text, integer",
    [
        (BRANCHES, {"t1", "t2", "e1"}),
        (LOOP, {"l1", "l2"}),
        (SCAN, {"mw", "mr"}),
        (NESTED, {"deep", "flat"}),
    ],
)
def test_layers_in_bodies_run_in_integers(text: str, integer: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxq.building.LEAST_IN_LOOP", 1)
    proto = made(text)
    given = feeds(proto)
    report = onnxq.quantize(proto, given, target="cpu", threads=1, validate=False)
    onnx.checker.check_model(report.model)
    states = {name: entry.state for name, entry in report.ledger.items()}
    assert {name for name, state in states.items() if state is State.INTEGER} >= integer
    found = list(kernels(runtime.optimized(report.model).graph))
    assert len([op for op in found if op in ("QLinearMatMul", "MatMulIntegerToFloat")]) >= len(integer)
    real = Session(report.model, threads=1)
    for feed in given:
        for name, expected in evaluate(proto, feed).items():
            assert real.run(feed)[name].shape == expected.shape
            assert np.abs(real.run(feed)[name] - expected).max() < 0.1 * np.abs(expected).max()


def test_small_layers_in_a_loop_have_weights_of_8_bits_alone_where_nothing_is_measured() -> None:
    proto = made(LOOP.replace("16", "64").replace("20", "80"))
    report = onnxq.quantize(proto, feeds(proto), target="cpu", threads=1, validate=False)
    assert {report.ledger[name].state for name in ("l1", "l2")} == {State.WEIGHT_ONLY}
    assert report.quantized_bytes < 0.5 * report.float_bytes


def test_a_body_that_no_sample_runs_stays_as_it_is() -> None:
    proto = made(BRANCHES)
    only = [f for f in feeds(proto) if f["c"]]
    report = onnxq.quantize(proto, only, target="cpu", threads=1, validate=False)
    assert report.ledger["t1"].state is State.INTEGER
    assert report.ledger["e1"].reason is not None
    assert report.ledger["e1"].reason.name == "IN_BODY"


@pytest.mark.parametrize("text", [BRANCHES, LOOP, SCAN])
def test_a_body_is_fed_with_what_it_really_gets(text: str) -> None:
    """Whatever the body makes of the last step it is fed with is what the model makes."""
    proto = made(text)
    graph, feed = Graph.from_proto(proto), feeds(proto, 1)[0]
    body = next(iter(bodies_with_layers(graph, 1)))
    samples = samples_of(body, graph, [Sample(feed, None, "the sample")], 1)
    assert samples is not None
    steps = list(samples)
    last = Session(body.proto, threads=1).run(steps[-1].feed)
    expected = evaluate(proto, feed)
    if body.node.op == "If":
        np.testing.assert_allclose(last["a"], expected["y"], rtol=1e-5, atol=1e-5)
    elif body.node.op == "Loop":
        assert len(steps) == 3
        np.testing.assert_allclose(last["q"], expected["y"], rtol=1e-5, atol=1e-5)
    else:  # from the last element to the first; the fifth step is left out, so one remains
        assert [s.where for s in steps] == [f"the sample, step {k} of {body.node.name}" for k in range(4)]
        np.testing.assert_array_equal(steps[0].feed["xt"], feed["x"][-1])
        np.testing.assert_allclose(last["o"], expected["y"][3], rtol=1e-5, atol=1e-5)


ONES = """net (float[4, 16] x) => (float[4, 16] y) <float[16, 16] w, int64[1] m = {3}, bool[1] go = {1}> {
  y = Loop <body = step (int64[1] i, bool[1] cin, float[4, 16] p) => (bool[1] cout, float[4, 16] q) {
    cout = Identity (cin)  [l1] a = MatMul (p, w)  q = Tanh (a) }> (m, go, x) }"""
GROWING = """net (float[1, 16] x) => (float[A, 16] y) <float[16, 16] w, int64 m = {3}, bool go = {1}> {
  y = Loop <body = step (int64 i, bool cin, float[1, 16] p) => (bool cout, float[B, 16] q) {
    cout = Identity (cin)  [l1] a = MatMul (p, w)  q = Concat <axis = 0> (p, a) }> (m, go, x) }"""


@pytest.mark.parametrize("text", [ONES, GROWING])
def test_a_loop_that_is_declared_loosely_goes_through(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxq.building.LEAST_IN_LOOP", 1)
    proto = made(text)
    given = feeds(proto)
    report = onnxq.quantize(proto, given, target="cpu", threads=1, validate=False)
    stays = [note for note in report.notes if "stays in float" in note]
    assert report.ledger["l1"].is_integer != bool(stays)
    for name, expected in evaluate(proto, given[0]).items():
        found = Session(report.model, threads=1).run(given[0])[name]
        assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("policy", ["skip", "ignore"])
def test_what_is_done_with_nan_is_done_in_bodies(policy: str) -> None:
    proto = made(BRANCHES)
    given = feeds(proto)
    given[3]["x"][0, 0] = np.nan
    report = onnxq.quantize(proto, given, target="cpu", threads=1, on_nonfinite=policy, validate=False)  # type: ignore[arg-type]
    assert {report.ledger[n].state for n in ("t1", "t2", "e1")} == {State.INTEGER}


def test_a_weight_of_many_bodies_is_stored_once_for_each_way_in_which_it_is_rounded() -> None:
    sums = "  ".join(
        f"""y{k} = If (c) <then_branch = t{k} () => (float[N, 64] a{k}) {{ a{k} = MatMul (x, w) }},
            else_branch = e{k} () => (float[N, 64] b{k}) {{ v{k} = MatMul (x, w)  b{k} = Neg (v{k}) }}>"""
        for k in range(4)
    )
    text = f"net (float[N, 64] x, bool c) => (float[N, 64] y) <float[64, 64] w> {{ {sums}  y = Sum (y0, y1, y2, y3) }}"
    proto = made(text)
    report = onnxq.quantize(proto, feeds(proto), target="cpu", threads=1, validate=False)
    assert [e.state for e in report.ledger.values()].count(State.INTEGER) == 8
    assert len([t for t in report.model.graph.initializer if len(t.raw_data) >= 4096]) <= 2
    assert not [n for n in kernels(runtime.optimized(report.model).graph) if n == "MatMul"]


@pytest.mark.parametrize("pattern, floats", [("t1", {"t1"}), ("If", {"t1", "t2", "e1"}), ("MatMul", {"t1", "t2", "e1"})])
def test_what_is_excluded_in_a_body_stays_as_it_is(pattern: str, floats: set[str]) -> None:
    proto = made(BRANCHES.replace("16", "96").replace("12", "64"))
    report = onnxq.quantize(proto, feeds(proto), target="cpu", threads=1, exclude=pattern, validate=False)
    assert {n for n, e in report.ledger.items() if e.op == "MatMul" and e.state is State.FLOAT} == floats


def test_external_data_of_a_body_is_found(tmp_path: Any) -> None:
    proto = made(BRANCHES)
    weight = onnx.numpy_helper.from_array(np.random.default_rng(2).standard_normal((16, 8)).astype(np.float32), "inner")
    branch = next(a.g for n in proto.graph.node for a in n.attribute if a.name == "else_branch")
    branch.initializer.append(weight)
    next(n for n in branch.node if n.op_type == "MatMul").input[1] = "inner"
    external = branch.initializer[0]
    (tmp_path / "w.bin").write_bytes(weight.raw_data)
    external.ClearField("raw_data")
    external.data_location = onnx.TensorProto.EXTERNAL
    external.external_data.add(key="location", value="w.bin")
    onnx.save(proto, tmp_path / "m.onnx")
    report = onnxq.quantize(tmp_path / "m.onnx", feeds(proto), target="cpu", threads=1, validate=False)
    assert report.ledger["e1"].state is State.INTEGER


def test_what_happens_to_a_body_is_dumped_and_told(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = made(BRANCHES)
    calibration = onnxq.calibrate(proto, feeds(proto), target="cpu", threads=1)
    report = onnxq.quantize(proto, calibration=calibration, target="cpu", threads=1, validate=False, dump_dir=tmp_path)
    assert any("In the then_branch" in n and "feeds that the calibration keeps" in n for n in report.notes)
    folders = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert [name.rsplit("_", 2)[-2:] for name in folders] == [["else", "branch"], ["then", "branch"]]
    assert all(list((tmp_path / name).glob("*insert-qdq.onnx")) for name in folders)


@pytest.mark.parametrize("text, name", [(BRANCHES, "a1"), (BRANCHES, "h"), (LOOP, "b")])
def test_ranges_inside_bodies_are_written_and_taken_back(
    text: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxq.building.LEAST_IN_LOOP", 1)
    proto, path = made(text), tmp_path / "r.toml"
    given = feeds(proto)
    quantized = partial(onnxq.quantize, proto, given, target="cpu", threads=1, validate=False)
    first = quantized()
    path.write_text(first.ranges_toml, encoding="utf-8")
    again = quantized(ranges=path)
    assert [n.SerializeToString() for n in again.model.graph.node] == [n.SerializeToString() for n in first.model.graph.node]
    assert again.ranges_toml == first.ranges_toml
    said = tomllib.loads(first.ranges_toml)["ranges"]
    scoped = next(key for key in said if key.endswith(f":{name}"))
    for key in (scoped, name):  # that of one body, and those of all
        path.write_text(f'schema = 1\n[ranges."{key}"]\nmin = 0.0\nmax = {1.5 * said[scoped]["max"]}\n', encoding="utf-8")
        edited = tomllib.loads(quantized(ranges=path).ranges_toml)["ranges"]
        assert edited[scoped]["scale"] == pytest.approx(1.5 * said[scoped]["scale"])
        changed = {k for k in said if edited[k] != said[k]}
        assert changed == ({scoped} if key == scoped else {k for k in said if k.endswith(f":{name}")})


def test_ranges_of_what_the_passes_of_a_body_made_are_taken_back(tmp_path: Path) -> None:
    proto = made("""net (float[1, 8, 12, 12] x, bool c) => (float[1, 8, 12, 12] y)
      <float[16, 8, 3, 3] w, float[8, 16, 3, 3] v> {
      y = If (c) <then_branch = t () => (float[1, 8, 12, 12] d) {
          a = Conv <pads = [1, 1, 1, 1]> (x, w)  b = Relu (a)  d = Conv <pads = [1, 1, 1, 1]> (b, v) },
        else_branch = e () => (float[1, 8, 12, 12] f) { f = Relu (x) }> }""")
    uneven = np.exp2(np.arange(16) - 8).astype(np.float32).reshape(-1, 1, 1, 1) * onnx.numpy_helper.to_array(
        proto.graph.initializer[0]
    )
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(uneven, "w"))
    quantized = partial(onnxq.quantize, proto, feeds(proto), target="cpu", threads=1, validate=False)
    first, path = quantized(), tmp_path / "r.toml"
    assert "If_0.then_branch:b_equalized" in tomllib.loads(first.ranges_toml)["ranges"]
    path.write_text(first.ranges_toml, encoding="utf-8")
    assert quantized(ranges=path).ranges_toml == first.ranges_toml


def test_an_observer_is_chosen_inside_bodies_too() -> None:
    proto = made(BRANCHES)
    given = feeds(proto)
    quantized = partial(onnxq.quantize, proto, given, target="cpu", threads=1, validate=False)
    report = quantized(recipe=Recipe(override=(Override(match="a1", observer="fixed-range{lower=0,upper=9}"),)))
    assert tomllib.loads(report.ranges_toml)["ranges"]["If_1.then_branch:a1"]["max"] == pytest.approx(9)
    for wrong in ("nowhere", "If", "w", "If_1.then_branch:a0"):
        with pytest.raises(RecipeError, match=f"override {wrong} matches no quantized tensor"):
            quantized(recipe=Recipe(override=(Override(match=wrong, observer="min-max"),)))
