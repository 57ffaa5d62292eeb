"""proof.py: a rewrite that changes what a tensor holds is found, inside as well as at the outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import pytest

from onnxq import cores, proof, target
from onnxq.graph import Graph
from onnxq.model import Model
from onnxq.proof import compare, nudged, prover
from onnxq.runtime import Session

NET = """<ir_version: 9, opset_import: ["" : 17]>
net (float[2, 3] x) => (float[2, 3] y)
<float[3] w = {1, 2, 3}, float[3] v = {1, 2, 3}> {
  [mul] a = Mul (x, w)
  [div] b = Div (a, v)
  [out] y = Relu (b)
}"""
PROBES = [{"x": np.arange(6, dtype=np.float32).reshape(2, 3)}]


def model() -> Model:
    return Model(Graph.from_proto(onnx.parser.parse_model(NET)), target.load("cpu"))


def test_equal_graphs_are_equal() -> None:
    assert prover(PROBES, 1)(model(), model()) is None


def test_a_changed_output_is_found() -> None:
    changed = model()
    changed.graph.find("Relu")[0].op = "Tanh"
    assert (prover(PROBES, 1)(model(), changed) or "").startswith("tensor y differs")


def test_a_changed_inner_tensor_is_found_though_the_output_is_equal() -> None:
    changed = model()
    for node in changed.graph.find("Mul", "Div"):
        changed.graph.set_input(node, 1, changed.graph.constant("ones", np.ones(3, np.float32)))
    assert (prover(PROBES, 1)(model(), changed) or "").startswith("tensor a differs")


def test_every_probe_counts() -> None:
    """Relu and what is put in its place differ below zero, which only one of the probes reaches."""
    changed, negative = model(), [{"x": -PROBES[0]["x"]}]
    changed.graph.find("Relu")[0].op = "Identity"
    assert prover(PROBES, 1)(model(), changed) is None
    for probes in (PROBES + negative, negative + PROBES):
        assert (prover(probes, 1)(model(), changed) or "").startswith("tensor y differs")


@pytest.mark.parametrize(("asked", "usable", "each"), [(0, 6, 3), (0, 1, 1), (4, 6, 4)])
def test_probes_that_run_at_the_same_time_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, asked: int, usable: int, each: int
) -> None:
    given: list[int] = []

    def session(*args: Any, threads: int, **options: Any) -> Session:
        given.append(threads)
        return Session(*args, threads=threads, **options)

    monkeypatch.setattr(proof, "Session", session)
    monkeypatch.setattr(cores, "usable", lambda: usable)
    assert prover(2 * PROBES, asked)(model(), model()) is None
    assert given == [each, each]


def test_a_probe_that_does_not_run_is_told() -> None:
    short = {"x": np.zeros((2, 2), np.float32)}
    for probes in ([PROBES[0], short], [short, PROBES[0]]):
        assert "onnxruntime cannot run the model" in (prover(probes, 1)(model(), model()) or "")


def test_a_graph_that_does_not_run_is_found() -> None:
    broken = model()
    broken.graph.find("Relu")[0].op = "NoSuchOp"
    assert "onnxruntime cannot load" in (prover(PROBES, 1)(model(), broken) or "")


CHAOS = """<ir_version: 9, opset_import: ["" : 17]>
net (float[1, 8] x) => (float[1, 8] y) <float big = {TIMES}, float half = {HALF}> {
  [far] a = Mul (x, big)
  [round] b = Sin (a)
  [end] y = Mul (b, half)
}"""


@pytest.mark.parametrize(
    ("times", "change", "equal"), [(1e3, 1e-7, True), (1e3, 1e-4, False), (1.0, 1e-4, False), (1e6, 1e-2, False)]
)
def test_what_the_last_bit_of_the_inputs_changes_as_much_is_no_difference(times: float, change: float, equal: bool) -> None:
    """The sine of a large number hangs on its last bits. More than a thousandth of the largest element is never let pass."""
    text = CHAOS.replace("TIMES", str(times)).replace("HALF", "1.0")
    before = Model(Graph.from_proto(onnx.parser.parse_model(text)), target.load("cpu"))
    after = before.fork()
    after.graph.set_input(
        after.graph.find("Mul")[0], 1, after.graph.constant("big", np.array(times * (1 + change), np.float32))
    )
    probes = [{"x": np.linspace(0.5, 3.0, 8, dtype=np.float32)[None]}]
    after.graph.find("Mul")[0].outputs[0].name = "elsewhere"  # it holds another value, and says so
    assert (prover(probes, 1)(before, after) is None) == equal


@pytest.mark.parametrize("shape", [(), (3,), (0, 2)])
@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i8"])
def test_a_nudge_changes_floats_by_their_last_bit_and_nothing_else(shape: tuple[int, ...], kind: str) -> None:
    array = np.full(shape, 3, kind)
    found = nudged({"x": array, "parts": [array]})
    for other in (found["x"], found["parts"][0]):
        assert isinstance(other, np.ndarray)
        assert (other.dtype, other.shape) == (array.dtype, array.shape)
        off = np.abs(other - array)
        assert np.all(off == 0) if kind == "i8" else np.all((off > 0) & (off <= np.spacing(array)))


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ([1.0, 2.0], [1.0, 2.00001], None),
        (2.0, 2.00001, None),
        (2.0, 2.0001, "differs by"),
        ([], [], None),
        ([-4.0, np.inf], [-4.00003, np.inf], None),
        ([-4.0, np.inf], [-4.0003, np.inf], "differs by"),
        ([1.0, 2.0], [1.0, 2.0001], "differs by"),
        ([0.0, 0.0], [0.0, 1e-30], "differs by"),
        ([1.0, np.nan], [1.0, np.nan], None),
        ([1.0, np.nan], [1.0, 2.0], "not finite in the same places"),
        ([1.0], [1.0, 1.0], "was float32"),
    ],
)
def test_what_counts_as_equal(a: Any, b: Any, words: str | None) -> None:
    found = compare(np.array(a, np.float32), np.array(b, np.float32))
    assert found is None if words is None else words in (found or "")


def test_integers_may_differ_in_one_of_a_thousand() -> None:
    a = np.arange(1000)
    one, two = a.copy(), a.copy()
    one[3] += 1
    two[3:5] += 1
    assert compare(a, one) is None
    assert "agrees in 99.8%" in (compare(a, two) or "")
