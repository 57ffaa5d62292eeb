"""placement.py: the cheapest choice of what is integer; costs.py: whose kernel is whose; fastest.py: who wins."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import onnxq
from onnxq import costs, fastest, runtime, timing
from onnxq.costs import Price, Prices
from onnxq.data import open_samples
from onnxq.graph import Graph
from onnxq.model import Reason, State
from onnxq.placement import cheapest
from onnxq.timing import Kernel

PRICES = Prices(quantize=Price(3, 0.5), dequantize=Price(2, 0.25), layout=Price(1, 1))
ABSORBED = frozenset({"Relu"})
pytestmark = pytest.mark.measured


def dag(sources: Sequence[Sequence[int]]) -> Graph:
    """Sums: node k reads the tensors of these numbers, 0 being the input and k + 1 what node k makes."""
    nodes = [helper.make_node("Sum", [f"t{s}" for s in read], [f"t{k + 1}"], name=f"n{k}") for k, read in enumerate(sources)]
    x, y = (helper.make_tensor_value_info(f"t{k}", TensorProto.FLOAT, [2]) for k in (0, len(sources)))
    graph = Graph.from_proto(helper.make_model(helper.make_graph(nodes, "g", [x], [y]), ir_version=8))
    for tensor in graph.tensors().values():
        tensor.dtype = np.dtype(np.float32)
    return graph


@st.composite
def cases(draw: st.DrawFn) -> tuple[Graph, set[str], dict[str, float], dict[str, float], dict[str, tuple[int, ...]]]:
    count = draw(st.integers(1, 7))
    graph = dag([sorted(draw(st.sets(st.integers(0, k), min_size=1, max_size=3))) for k in range(count)])
    names = [n.name for n in graph.nodes]
    micros = st.integers(0, 40).map(float)
    shapes = {f"t{k}": (draw(st.integers(1, 30)),) * draw(st.sampled_from([1, 1, 4])) for k in range(count + 1)}
    planned = {n for n in names if draw(st.integers(0, 3))}
    return graph, planned, {n: draw(micros) for n in names}, {n: draw(micros) for n in names}, shapes


def total(graph: Graph, kept: set[str], integer: Any, floats: Any, shapes: Any) -> float:
    """Microseconds of everything when these nodes are integer."""
    found = sum(integer[n.name] if n.name in kept else floats[n.name] for n in graph.nodes)
    for tensor in graph.tensors().values():
        made = bool(tensor.inputs) and tensor.inputs[0].name in kept
        read = [n is not None and n.name in kept for n, _ in graph.readers(tensor)]
        if made and not all(read):
            found += PRICES.crossing(shapes[tensor.name], into_integers=False)
        if not made and any(read):
            found += PRICES.crossing(shapes[tensor.name], into_integers=True)
    return found


@given(cases())
@settings(deadline=None, max_examples=150)
def test_no_choice_is_cheaper(case: Any) -> None:
    graph, planned, integer, floats, shapes = case
    kept = cheapest(graph, planned, integer, floats, shapes, PRICES, ABSORBED)
    assert kept <= planned
    names = sorted(planned)
    least = min(
        total(graph, {n for n, one in zip(names, choice, strict=True) if one}, integer, floats, shapes)
        for choice in product([False, True], repeat=len(names))
    )
    assert total(graph, kept, integer, floats, shapes) == pytest.approx(least, abs=0.05)


def test_what_the_runtime_fuses_in_float_goes_together() -> None:
    graph = dag([[0], [1], [2]])
    shapes = {f"t{k}": (1,) for k in range(4)}
    integer, floats = {"n0": 1.0, "n1": 1.0, "n2": 900.0}, {"n1": 30.0, "n2": 1.0}  # n1's kernel does n0's work, too
    kept = cheapest(graph, {"n0", "n1", "n2"}, integer, floats, shapes, PRICES, ABSORBED)
    assert kept == {"n0", "n1"}


def test_kernels_find_their_nodes() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[1, 4] x) => (float[1, 4] last) <float[4, 4] w>
    { [layer] a = MatMul (x, w)  [layer1] image = Relu (a)  [end] last = Neg (image) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"))
    graph = Graph.from_proto(proto)
    kernels = [
        Kernel("layer", "MatMul", 3.0),
        Kernel("layer_quant", "QLinearMatMul", 2.0),
        Kernel("layer1", "Relu", 5.0),
        Kernel("fused end", "Neg", 7.0),
        Kernel("image_nchwc", "Conv", 11.0),
        Kernel("layer_DQ", "DequantizeLinear", 100.0),
        Kernel("ReorderInput_token_3", "ReorderInput", 100.0),
        Kernel("elsewhere", "Conv", 100.0),
    ]
    assert costs.by_node(kernels, graph) == {"layer": 5.0, "layer1": 16.0, "end": 7.0}


def test_kernels_are_timed_and_crossing_costs_more_for_more_elements() -> None:
    found = costs.prices(1)
    assert 0 < found.crossing((10,), into_integers=True) < found.crossing((10**6,), into_integers=True)
    assert found.crossing((1, 64, 50, 50), into_integers=False) > found.crossing((160000,), into_integers=False)


def _ranked(monkeypatch: pytest.MonkeyPatch, wins: Any) -> None:
    """Let the challenger win where `wins(holder, challenger)` says so, and nothing be slower than what came in."""
    monkeypatch.setattr(fastest, "_faster", lambda a, b, feed, threads, worth: b if wins(a, b) else a)
    monkeypatch.setattr(fastest, "_is_slower", lambda *_: False)


@pytest.fixture
def shipped(models: Path) -> tuple[Path, Path]:
    return models / "residual.onnx", models / "digits_calibration.npz"


def test_float_wins_where_integers_are_slower(shipped: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _ranked(monkeypatch, lambda a, b: not b.model.planned)
    report = onnxq.quantize(*shipped, max_samples=8, validate=False)
    assert not [n for n in report.model.graph.node if n.op_type == "QuantizeLinear"]
    assert {e.reason for e in report.ledger.values()} == {Reason.SLOWER}
    assert any("Integers are slower than float here" in note for note in report.notes)
    samples = list(open_samples(shipped[1], runtime.Session(str(shipped[0])).inputs, limit=2))
    for sample in samples:
        expected, found = (runtime.Session(m, threads=1).run(sample.feed) for m in (str(shipped[0]), report.model))
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-4)


def test_a_part_wins_where_its_kernels_are_faster(shipped: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _ranked(monkeypatch, lambda a, b: bool(b.model.planned) and len(b.model.planned) < len(a.model.planned))
    whole = onnxq.quantize(*shipped, max_samples=8, validate=False, objective="coverage")
    convs = [n for n, e in whole.ledger.items() if e.op == "Conv"]
    half = set(convs[: len(convs) // 2])

    def times(kernels: Any, graph: Graph) -> dict[str, float]:
        integers = any(k.op.startswith("QLinear") for k in kernels)
        fast = {n: 10.0 if (n in half) == integers else 900.0 for n in convs}
        return {n.name: fast.get(n.name, 0.0) for n in graph.nodes}

    monkeypatch.setattr(costs, "by_node", times)
    report = onnxq.quantize(*shipped, max_samples=8, validate=False)
    slower = {n for n, e in report.ledger.items() if e.reason is Reason.SLOWER}
    assert slower & set(convs) == set(convs) - half
    assert any("are faster in float on this machine" in note for note in report.notes)


@pytest.mark.parametrize("part_is_faster", [False, True])
def test_what_is_faster_on_one_thread_is_not_slower_than_float_on_all_cores(
    part_is_faster: bool, shipped: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = onnxq.quantize(*shipped, max_samples=8, validate=False, objective="coverage")
    convs = [n for n, e in whole.ledger.items() if e.op == "Conv"]
    half = set(convs[: len(convs) // 2])

    def is_slower(built: fastest.Built, given: Any, _: Any, threads: int) -> bool:
        assert [n.name for n in given.graph.node] == [n.name for n in onnx.load(shipped[0]).graph.node]
        kept = built.model.planned & set(convs)
        return threads == 0 and bool(kept) and not (part_is_faster and kept <= half)

    def worth(*given: Any) -> set[str]:
        return half if given[-1] == 0 else set(given[0].model.planned)

    monkeypatch.setattr(fastest.cores, "usable", lambda: 2)
    _ranked(monkeypatch, lambda *_: False)
    monkeypatch.setattr(fastest, "_is_slower", is_slower)
    monkeypatch.setattr(fastest, "_worth_it", worth)
    report = onnxq.quantize(*shipped, max_samples=8, validate=False)
    integer = {n for n, e in report.ledger.items() if e.op == "Conv" and e.is_integer}
    assert integer == (half if part_is_faster else set())
    assert any("slower on all cores" in note for note in report.notes) != part_is_faster
    alone = onnxq.quantize(*shipped, max_samples=8, validate=False, threads=1)
    assert {n for n, e in alone.ledger.items() if e.op == "Conv" and e.is_integer} == set(convs)


@pytest.mark.parametrize(("milliseconds", "sessions"), [(0.1, 3), (5.0, 1)])
def test_models_that_take_little_time_are_loaded_several_times(
    milliseconds: float, sessions: int, shipped: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def timed(runs: Any, **_: Any) -> np.ndarray:
        made.append(len(made))
        slower = 1.0 + 0.1 * len(made)
        return np.tile([milliseconds * slower, milliseconds], (20, 1))

    monkeypatch.setattr(timing, "time_paired", timed)
    ratio, low, high = fastest._ratio(shipped[0], shipped[0], {}, 1)
    assert len(made) == (3 if sessions == 3 else 2)  # the longer ones first for a part of the time
    assert (ratio, low, high) == pytest.approx((1.2, 1.1, 1.3) if sessions == 3 else (1.2, 1.2, 1.2))


def test_linear_layers_quantize_their_input_at_run_time_where_that_wins(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ranked(monkeypatch, lambda a, b: b.model.at_run_time and not a.model.at_run_time)
    report = onnxq.quantize(
        models / "vision_transformer.onnx", models / "digits_calibration.npz", max_samples=8, validate=False
    )
    assert [e.state for e in report.ledger.values()].count(State.DYNAMIC) > 10


@pytest.mark.parametrize("options", [{"objective": "coverage"}, {"objective": "size"}, {"target": "cpu"}])
def test_nothing_is_timed_where_speed_is_not_what_counts(
    options: dict[str, str], shipped: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastest, "_faster", lambda *_: pytest.fail("a placement was timed"))
    report = onnxq.quantize(*shipped, max_samples=8, validate=False, **options)  # type: ignore[arg-type]
    assert report.integer_share == 1


def test_with_real_times_a_model_computes_what_it_did(models: Path) -> None:
    model, data = models / "inverted_residual.onnx", models / "digits_calibration.npz"
    report = onnxq.quantize(model, data, max_samples=8, threads=1)
    assert report.accuracy is not None
    assert report.accuracy.real.outputs["logits"].sqnr > 20
    assert all(e.reason is not None for e in report.ledger.values() if e.state is State.FLOAT)


def test_times_of_seconds_are_compared_as_those_of_microseconds() -> None:
    graph = dag([[0], [1], [2]])
    shapes = {f"t{k}": (1,) for k in range(4)}
    names = {"n0", "n1", "n2"}
    for micros in (1.0, 1e3, 1e7):
        integer, floats = dict.fromkeys(names, 10 * micros), dict.fromkeys(names, 20 * micros)
        assert cheapest(graph, names, integer, floats, shapes, PRICES, ABSORBED) == names
        assert not cheapest(graph, names, floats, integer, shapes, PRICES, ABSORBED)


def test_a_profile_that_cannot_be_read_leaves_what_is_there(
    shipped: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(path: Path) -> list[Kernel]:
        raise FileNotFoundError(path)

    monkeypatch.setattr(timing, "_kernels", unreadable)
    report = onnxq.quantize(*shipped, max_samples=8, validate=False)
    assert report.integer_share == 1
    assert any("were not timed" in note for note in report.notes)


@pytest.mark.parametrize(
    ("ratio", "slower"),
    [((0.96, 0.95, 0.97), True), ((0.98, 0.97, 0.99), False), ((0.96, 0.94, 1.01), False), ((1.1, 1.0, 1.2), False)],
    ids=["slower", "by a little", "in doubt", "faster"],
)
def test_what_is_a_little_slower_on_all_cores_is_not_given_up(
    ratio: tuple[float, float, float], slower: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastest, "_ratio", lambda *_: ratio)
    built: Any = type("Built", (), {"proto": None})
    assert fastest._is_slower(built, "float.onnx", {}, 0) is slower
