"""select-layers: how many labels are expected to change, and how many layers stay float."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnxq
from onnxq.model import State
from onnxq.passes.select.select_layers import _changed_labels
from onnxq.recipe import Recipe

RNG = np.random.default_rng(0)


def changed(exact: np.ndarray, rounded: np.ndarray) -> float:
    return _changed_labels([{"y": exact}], [{"y": rounded}], ["y"], 1.0)


@pytest.mark.parametrize("shape", [(40_000, 10), (40_000, 3, 1, 1)])
def test_it_is_about_what_really_changes(shape: tuple[int, ...]) -> None:
    exact = RNG.standard_normal(shape)
    rounded = exact + 0.3 * RNG.standard_normal(shape)
    really = float((exact.argmax(1) != rounded.argmax(1)).mean())
    assert changed(exact, rounded) == pytest.approx(really, rel=0.35)


def test_scores_without_errors_and_scores_that_tie_change_nothing() -> None:
    exact = RNG.standard_normal((5, 4))
    assert changed(exact, exact) == 0
    assert changed(np.zeros((4, 5)), np.zeros((4, 5))) == 0
    assert changed(np.zeros((4, 5)), RNG.standard_normal((4, 5))) == 0


def test_one_score_has_no_label() -> None:
    assert changed(np.ones((4, 1)), np.zeros((4, 1))) <= 0.01


def chain(layers: int) -> onnx.ModelProto:
    """Equal convolutions one after another, whose rounding errors are about as large as each other; a map comes out."""
    rng = np.random.default_rng(1)
    nodes = [helper.make_node("Conv", [f"y{k}", f"w{k}"], [f"y{k + 1}"], name=f"conv{k}") for k in range(layers)]
    turns = [np.linalg.qr(rng.standard_normal((16, 16)))[0].astype(np.float32)[:, :, None, None] for _ in range(layers)]
    weights = [numpy_helper.from_array(turn, f"w{k}") for k, turn in enumerate(turns)]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 16, 8, 8]) for name in ("y0", f"y{layers}")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def quantized(**options: float) -> onnxq.Report:
    rng = np.random.default_rng(2)
    feeds = [{"y0": rng.standard_normal((1, 16, 8, 8)).astype(np.float32)} for _ in range(4)]
    return onnxq.quantize(chain(12), feeds, recipe=Recipe(target="cpu-vnni", passes={"select-layers": options}))


def sqnr(report: onnxq.Report) -> float:
    assert report.accuracy is not None
    assert report.accuracy.emulated is not None
    return report.accuracy.emulated.outputs["y12"].sqnr


def in_float(report: onnxq.Report) -> int:
    return sum(entry.state is State.FLOAT for entry in report.ledger.values())


def test_as_many_layers_stay_float_as_it_takes() -> None:
    reached = sqnr(quantized())
    assert in_float(quantized()) == 0
    few, more = (quantized(below=reached + 2, goal=reached + wanted) for wanted in (2.0, 4.0))
    assert 1 <= in_float(few) < in_float(more) < 12
    assert reached + 1 < sqnr(few) < sqnr(more)


def test_a_network_a_little_below_what_is_borne_is_not_left_in_float_for_it() -> None:
    """Errors that many layers share: to come to the goal nearly all of them would have to be float."""
    reached = sqnr(quantized())
    near, far = (quantized(below=reached + lack, goal=reached + 15) for lack in (0.5, 4.0))
    assert 1 <= in_float(near) <= 8
    assert sqnr(near) > reached + 0.5
    assert in_float(far) == 12
