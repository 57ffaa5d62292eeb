"""equalization.py and emulation.py: what evening out gains, and that it changes nothing in float."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxq
from onnxq import kernels
from onnxq.equalization import SMALLEST, choose_factors, scale_inputs, scale_outputs
from onnxq.graph import Graph
from onnxq.recipe import Recipe
from onnxq.runtime import Session
from onnxq.sketch import TensorSketch

HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'
TEXT = """net (float[N, 3, 6, 6] x) => (float[N, 4, 6, 6] y) <float[8, 3, 1, 1] w, float[8] b, float[4, C, 1, 1] v> {
  [first] a = Conv (x, w, b)
  [act] r = ACT (a)
  [second] y = Conv <group = G> (r, v)
}"""


def network(seed: int, group: int = 1, activation: str = "Relu", spread: float = 3.0) -> onnx.ModelProto:
    """Channels of the tensor between the two Convs differ by up to 10^(2 spread)."""
    text = TEXT.replace("G>", f"{group}>").replace("ACT", activation).replace("[4, C,", f"[4, {8 // group},")
    proto, rng = onnx.parser.parse_model(HEADER + text), np.random.default_rng(seed)
    sizes = 10 ** rng.uniform(-spread, spread, 8)
    values = {
        "w": rng.standard_normal((8, 3, 1, 1)) * sizes.reshape(-1, 1, 1, 1),
        "b": rng.standard_normal(8) * sizes,
        "v": rng.standard_normal((4, 8 // group, 1, 1)) / (sizes.mean() if group > 1 else sizes.reshape(1, -1, 1, 1)),
    }
    del proto.graph.value_info[:]
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v.astype(np.float32), n) for n, v in values.items())
    return proto


def feeds(count: int = 4) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(9)
    return [{"x": rng.standard_normal((2, 3, 6, 6)).astype(np.float32)} for _ in range(count)]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    group=st.sampled_from([1, 2, 4]),
    exponents=st.lists(st.integers(-6, 3), min_size=8, max_size=8),
)
def test_scaling_by_powers_of_two_changes_no_bit(seed: int, group: int, exponents: list[int]) -> None:
    proto = network(seed, group, spread=1.0)
    graph, factors = Graph.from_proto(proto), np.exp2(exponents)
    first, act, second = graph.nodes
    scaled = scale_outputs(graph, first, factors)
    result = graph.variable("r_scaled")
    graph.rewire(act, inputs=[scaled], outputs=[result])
    scale_inputs(graph, second, result, factors)
    (feed,) = feeds(1)
    expected, got = (Session(m, threads=1).run(feed)["y"] for m in (proto, graph.to_proto()))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * float(np.abs(expected).max()))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), group=st.sampled_from([1, 2]))
def test_factors_are_powers_of_two_that_leave_the_largest_channel_alone(seed: int, group: int) -> None:
    graph, sketch = Graph.from_proto(network(seed, group)), TensorSketch(1)
    rng = np.random.default_rng(seed)
    sizes = (10 ** rng.uniform(-3, 3, 8)).reshape(1, -1, 1, 1)
    sketch.update((rng.random((2, 8, 6, 6)) * sizes).astype(np.float32))
    assert sketch.channels is not None
    factors = choose_factors([sketch.channels], [(graph.nodes[-1], sketch.channels)], gain=1.0)
    if factors is not None:
        assert np.all(np.log2(factors) == np.rint(np.log2(factors)))
        assert factors.max() == factors[int(sizes.argmax())] == 1
        assert factors.min() >= SMALLEST


@pytest.mark.parametrize("activation", ["Relu", "HardSwish"])
def test_a_tensor_of_very_different_channels_is_quantized_better(activation: str) -> None:
    proto = network(3, activation=activation, spread=1.2)
    both = []
    for left_out in (("equalize-layers", "equalize-gates", "select-layers"), ("select-layers",)):
        passes: dict[str, dict[str, Any] | bool] = dict.fromkeys(left_out, False)
        report = onnxq.quantize(proto, feeds(), recipe=Recipe(target="cpu", passes=passes))
        assert report.accuracy is not None
        both.append(report.accuracy.real.outputs["y"].sqnr)
    assert both[1] > both[0] + 3, "less than 3 dB gained"


def test_channels_that_are_alike_are_left_alone() -> None:
    graph, sketch = Graph.from_proto(network(0)), TensorSketch(1)
    sketch.update(np.random.default_rng(0).standard_normal((4, 8, 6, 6)).astype(np.float32))
    assert sketch.channels is not None
    assert choose_factors([sketch.channels], [(graph.nodes[-1], sketch.channels)], gain=0.8) is None


@given(st.integers(0, 999), st.integers(1, 40), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_the_compiled_energies_equal_numpy(seed: int, rows: int, positions: int) -> None:
    x = np.random.default_rng(seed).standard_normal((rows, positions)).astype(np.float32)
    energy, peak = kernels.energies(x)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(energy, np.square(wide).sum(1), rtol=1e-14)
    np.testing.assert_array_equal(peak, np.abs(wide).max(1))
