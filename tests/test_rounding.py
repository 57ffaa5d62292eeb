"""rounding.py: laws of the descent, its compiled sweep against plain numpy, and what it gains on a shipped model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxq
from onnxq.recipe import Recipe
from onnxq.rounding import SWEEPS, error, improve, moments, shrunk
from onnxq.runtime import evaluate

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 2, 9, 31, 130, 260]))


def layer(seed: int, shape: tuple[int, int, int], correlation: float = 3.0) -> tuple[np.ndarray, ...]:
    """Weight (G, M, K), codes, scale and zero point (G, M), moments (G, K, K) of inputs with a part in common."""
    rng, (groups, _, width) = np.random.default_rng(seed), shape
    weight = rng.standard_normal(shape).astype(np.float32)
    scale = (np.abs(weight).max(2) / 100).astype(np.float32)
    x = rng.standard_normal((groups, 400, width)) + correlation * rng.standard_normal((groups, 400, 1))
    codes = np.rint(weight / scale[..., None]).astype(np.int32)
    return weight, codes, scale, np.zeros(scale.shape, np.int32), shrunk(moments(x, centred=True), 400)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), shape=SHAPES, zero=st.sampled_from([0, 128]))
def test_the_error_never_grows_and_codes_stay_near(seed: int, shape: tuple[int, int, int], zero: int) -> None:
    weight, codes, scale, zeros, told = layer(seed, shape)
    better = improve(weight, codes + zero, scale, zeros + zero, (zero - 100, zero + 100), told) - zero
    assert np.abs(better - codes).max() <= SWEEPS
    assert np.abs(better).max() <= 100
    before, after = (error(weight, c * scale[..., None], told) for c in (codes, better))
    assert after <= before * (1 + 1e-4) + 1e-7


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), shape=SHAPES)
def test_no_pair_gets_beyond_the_limit(seed: int, shape: tuple[int, int, int]) -> None:
    weight, codes, scale, zeros, told = layer(seed, shape)
    better = improve(weight, codes, scale, zeros, (-127, 127), told, pair_limit=128)
    pairs = lambda c: np.abs(c[..., : c.shape[2] // 2 * 2].reshape(*c.shape[:2], -1, 2).sum(3))  # noqa: E731
    assert np.all(pairs(better) <= np.maximum(pairs(codes), 128))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 40)))
def test_the_compiled_sweep_does_what_numpy_does(seed: int, shape: tuple[int, int, int]) -> None:
    weight, codes, scale, zeros, told = layer(seed, shape)
    better, expected = improve(weight, codes, scale, zeros, (-127, 127), told), sweep(weight, codes, scale, told)
    one, other = (error(weight, c * scale[..., None], told) for c in (better, expected))
    assert one == pytest.approx(other, rel=0.05, abs=1e-9)  # an element on the edge may fall to either side
    assert (better != expected).mean() < 0.05


def sweep(weight: np.ndarray, codes: np.ndarray, scale: np.ndarray, told: np.ndarray) -> np.ndarray:
    """The same descent in float64, written as the formula says."""
    codes = codes.astype(np.int64)
    for _ in range(SWEEPS):
        for g, m, k in np.ndindex(*codes.shape):
            off = codes[g, m] * scale[g, m].astype(np.float64) - weight[g, m]
            steps = np.rint(off @ told[g, :, k] / (told[g, k, k] * scale[g, m]))
            codes[g, m, k] = np.clip(codes[g, m, k] - np.clip(steps, -1, 1), -127, 127)
    return codes


def test_inputs_that_are_alike_make_up_for_each_other() -> None:
    """On rows that were not seen, and although the descent does not trust those that were."""
    weight, codes, scale, zeros, told = layer(0, (1, 16, 36))
    better = improve(weight, codes, scale, zeros, (-127, 127), told)
    rng = np.random.default_rng(1)
    unseen = moments(rng.standard_normal((1, 400, 36)) + 3.0 * rng.standard_normal((1, 400, 1)), centred=True)
    before, after = (error(weight, c * scale[..., None], unseen) for c in (codes, better))
    assert before > 2 * after


def test_outputs_of_4_bit_weights_come_nearer(models: Path) -> None:
    sqnr = []
    choices: tuple[dict[str, dict[str, Any] | bool], ...] = ({}, {"round-weights": False})
    for passes in choices:
        recipe = Recipe(target="cpu", weight_bits=4, passes=passes)
        report = onnxq.quantize(
            models / "residual.onnx", models / "digits_calibration.npz", eval=models / "digits_evaluation.npz",
            recipe=recipe, max_samples=100,
        )  # fmt: skip
        assert report.accuracy is not None
        sqnr.append(next(iter(report.accuracy.real.outputs.values())).sqnr)
    assert sqnr[0] > sqnr[1] + 1.0, "less than 1 dB gained"


def linear(body: str, *shapes: tuple[str, tuple[int, ...], float], outputs: str = "float[B, N] y") -> onnx.ModelProto:
    """A network of seeded weights (name, shape, size)."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> net (float[B, 16] x) => ({outputs}) {{ {body} }}'
    )
    rng = np.random.default_rng(0)
    for name, shape, size in shapes:
        values = (size * rng.standard_normal(shape)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return proto


def alike(count: int = 6, size: float = 1.0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [
        {"x": (size * (rng.standard_normal((8, 16)) + 3 * rng.standard_normal((8, 1)))).astype(np.float32)}
        for _ in range(count)
    ]


def test_a_weight_that_a_body_reads_too_is_left_alone() -> None:
    body = """a = MatMul (x, w) y = Relu (a) c = Cast <to = 9> (k)
    z = If (c) < then_branch = t () => (float[16, 16] u) { u = Mul (w, s) },
      else_branch = e () => (float[16, 16] v) { v = Add (w, s) } >"""
    proto = linear(
        body, ("w", (16, 16), 1.0), ("s", (16, 16), 1.0), ("k", (), 1.0), outputs="float[B, N] y, float[16, 16] z"
    )
    feeds = alike()
    report = onnxq.quantize(proto, feeds, target="cpu", weight_bits=4, validate=False)
    expected, got = (evaluate(m, feeds[0])["z"] for m in (proto, report.model))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("columns", [1, 2])
def test_one_scale_for_a_weight_of_one_column(columns: int) -> None:
    proto = linear("y = MatMul (x, w)", ("w", (16, columns), 1.0))
    recipe = Recipe(target="cpu", passes={"annotate-compute": {"weight_granularity": "per-tensor"}})
    assert onnxq.quantize(proto, alike(), recipe=recipe, validate=False).integer_share == 1.0


@pytest.mark.parametrize("size", [1e-5, 1e21])
def test_activations_of_any_size_are_rounded_for(size: float) -> None:
    proto, feeds = linear("a = MatMul (x, w) y = Relu (a)", ("w", (16, 16), 1.0)), alike(size=size)
    report = onnxq.quantize(proto, feeds, target="cpu", validate=False)
    expected, got = (evaluate(m, feeds[0])["y"] for m in (proto, report.model))
    assert np.abs(expected - got).max() < 0.05 * np.abs(expected).max()


def test_channels_of_next_to_nothing_break_nothing() -> None:
    weight, codes, scale, zeros, told = layer(0, (1, 4, 9))
    weight[0, 1] *= np.float32(1e-34)
    scale[0, 1] *= np.float32(1e-34)
    better = improve(weight, codes, scale, zeros, (-127, 127), told * np.float32(1e-10))
    assert np.abs(better - codes).max() <= SWEEPS


def test_samples_that_are_not_finite_do_not_count() -> None:
    proto, feeds = linear("a = MatMul (x, w) y = Softmax (a)", ("w", (16, 16), 1.0)), alike(8)
    for k, feed in enumerate(feeds):
        feed["x"] *= np.float32(10.0 ** (k % 5))
        if k % 2:
            feed["x"][1, 2] = np.nan
    report = onnxq.quantize(proto, feeds, target="cpu", on_nonfinite="ignore", validate=False)
    expected, got = (evaluate(m, feeds[0])["y"] for m in (proto, report.model))
    assert np.abs(expected - got).max() < 0.1


def test_a_sample_without_rows_breaks_nothing() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> net (float[B, 3, 6, 6] x) => (float[B, 4, 6, 6] y) {
        h = Conv <pads = [1, 1, 1, 1]> (x, w)  y = Conv <pads = [1, 1, 1, 1]> (h, v) }"""
    )
    rng = np.random.default_rng(0)
    for name, shape in (("w", (4, 3, 3, 3)), ("v", (4, 4, 3, 3))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    feeds = [{"x": rng.standard_normal((batch, 3, 6, 6)).astype(np.float32)} for batch in (1, 0, 2, 1)]
    for target in ("cpu", "tensorrt"):
        assert onnxq.quantize(proto, feeds, target=target, validate=False).samples == 4
