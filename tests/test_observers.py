"""Observers against the data that their sketches were made from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxq
from onnxq.data import open_samples
from onnxq.errors import RecipeError
from onnxq.numerics import PerAxis, QuantType, fake_quantize, params_of_range
from onnxq.observers import Auto, observer, registry
from onnxq.observers.kl import Kl, divergence
from onnxq.observers.moments import limit_of as limit
from onnxq.observers.moments import mean_and_std
from onnxq.observers.mse import Mse, squared_error, squared_error_numpy
from onnxq.observers.percentile import Percentile
from onnxq.runtime import Session, exposed
from onnxq.sketch import TensorSketch
from onnxq.weights import rounding_errors

rng = np.random.default_rng(0)
NORMAL = rng.standard_normal(100_000)
DATA = {
    "normal": NORMAL,
    "relu": np.maximum(NORMAL, 0),
    "silu": 3 * NORMAL / (1 + np.exp(-3 * NORMAL)),
    "heavy tails": rng.standard_t(3, 100_000),
    "shifted": NORMAL + 4,
    "negative": -np.abs(NORMAL),
    "one outlier": np.append(NORMAL, 1000.0),
}


FROM_DATA = [kind for kind in registry() if not kind.startswith("fixed-")]


def sketch_of(x: np.ndarray) -> TensorSketch:
    sketch = TensorSketch()
    sketch.update(x.astype(np.float32))
    return sketch


def raw_error(x: np.ndarray, rmin: float, rmax: float, symmetric: bool = False) -> float:
    x = x.astype(np.float32)
    params = params_of_range(rmin, rmax, QuantType.UINT8, symmetric=symmetric)
    return float(np.square((fake_quantize(x, params) - x).astype(np.float64)).sum())


@pytest.mark.parametrize("name", DATA)
def test_min_max_is_the_data_s(name: str) -> None:
    x = DATA[name].astype(np.float32)
    assert observer("min-max").choose(sketch_of(x), QuantType.UINT8) == (float(x.min()), float(x.max()))


@pytest.mark.parametrize("name", DATA)
def test_percentiles_are_within_half_a_percent_of_the_data_s(name: str) -> None:
    x = DATA[name]
    low, high = Percentile(lower=0.1, upper=99.5).choose(sketch_of(x), QuantType.UINT8)
    reach = np.abs(x).max() if name != "one outlier" else 5.0
    assert low == pytest.approx(np.percentile(x, 0.1), rel=5e-3, abs=5e-3 * reach)
    assert high == pytest.approx(np.percentile(x, 99.5), rel=5e-3, abs=5e-3 * reach)


@pytest.mark.parametrize("value", [1.0, 2.0, 6.0, 1.9921875, 1.99])
def test_percentiles_of_point_masses_are_within_half_a_percent(value: float) -> None:
    x = np.concatenate([np.zeros(500), np.full(9000, value), np.full(500, 4 * value)])
    for share in (10.0, 50.0, 90.0):
        _, high = Percentile(lower=0.0, upper=share).choose(sketch_of(x), QuantType.UINT8)
        assert high == pytest.approx(value, rel=5.1e-3)


@pytest.mark.parametrize("text", ["clip-std{sigmas=nan}", "fixed-range{lower=-inf,upper=inf}", "fixed-scale{scale=inf}"])
def test_options_that_are_no_numbers_are_explained(text: str) -> None:
    with pytest.raises(RecipeError, match="it takes a finite number"):
        observer(text)


@pytest.mark.parametrize(
    "text", ["fixed-range{lower=-1e300,upper=1e300}", "fixed-range{upper=1e-44}", "fixed-scale{scale=1e-45}"]
)
def test_fixed_numbers_that_float32_does_not_hold_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="needs"):
        observer(text)


def test_the_tails_of_a_percentile_are_independent() -> None:
    sketch = sketch_of(DATA["silu"])
    only_upper = Percentile(lower=0.0, upper=99.0).choose(sketch, QuantType.UINT8)
    both = Percentile(lower=1.0, upper=99.0).choose(sketch, QuantType.UINT8)
    assert only_upper[1] == both[1]
    assert only_upper[0] == pytest.approx(float(DATA["silu"].min()), rel=1e-3)
    assert both[0] > only_upper[0]


@pytest.mark.parametrize("name", DATA)
def test_mse_is_within_two_percent_of_the_best_range_on_the_data(name: str) -> None:
    x = DATA[name]
    low, high = Mse().choose(sketch_of(x), QuantType.UINT8)
    shares = np.geomspace(1.0, 0.02, 40)
    lows, highs = shares * min(x.min(), 0.0), shares * max(x.max(), 0.0)
    best = min(raw_error(x, a, high) for a in lows)
    best = min(best, *(raw_error(x, low, b) for b in highs))
    assert raw_error(x, low, high) <= 1.02 * best


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_observer_stays_inside_the_data_and_mse_is_never_worse_than_min_max(name: str, symmetric: bool) -> None:
    x, sketch = DATA[name], sketch_of(DATA[name])
    reach = np.abs(x).max()
    for kind in FROM_DATA:
        low, high = observer(kind).choose(sketch, QuantType.UINT8, symmetric=symmetric)
        assert -reach * 1.0001 <= low <= high <= reach * 1.0001
    chosen = Mse().choose(sketch, QuantType.UINT8, symmetric=symmetric)
    whole = (float(x.min()), float(x.max()))
    assert raw_error(x, *chosen, symmetric) <= raw_error(x, *whole, symmetric) * 1.001


def test_kl_clips_an_outlier_and_keeps_the_bulk() -> None:
    low, high = Kl().choose(sketch_of(np.append(DATA["normal"], 40.0)), QuantType.UINT8)
    assert 2.5 < high < 20
    assert -6 < low < -2.5


def test_kl_is_not_moved_by_exact_zeros() -> None:
    few, many = DATA["relu"], np.append(DATA["relu"], np.zeros(1_000_000))
    assert Kl().choose(sketch_of(few), QuantType.UINT8) == Kl().choose(sketch_of(many), QuantType.UINT8)


def test_divergence_of_what_is_represented_exactly_is_zero() -> None:
    assert divergence(np.repeat([1.0, 5.0, 2.0, 4.0], 8), 0, 32, 4) == pytest.approx(0.0, abs=1e-12)
    assert divergence(np.arange(1.0, 33.0), 0, 32, 4) > 0


def test_the_compiled_error_equals_its_numpy_form() -> None:
    bins = sketch_of(DATA["silu"]).histogram()
    rmin, rmax = np.linspace(-0.3, 0.0, 7), np.linspace(2.0, 12.0, 7)
    np.testing.assert_allclose(squared_error(bins, rmin, rmax, 255), squared_error_numpy(bins, rmin, rmax, 255), rtol=1e-9)


def test_a_constant_tensor_has_a_range() -> None:
    for kind in FROM_DATA:
        for value in (0.0, 2.5, -1.0):
            low, high = observer(kind).choose(sketch_of(np.full(100, value)), QuantType.UINT8)
            assert min(low, 0) <= value <= max(high, 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mes", "unknown observer mes; did you mean mse"),
        ("percentile{uper=3}", "no option uper; did you mean upper"),
        ("percentile{upper=high}", "it takes a number"),
        ("mse{bins=3}", "it has no options"),
        ("kl{bins=128}", "at least 2048 bins"),
        ("percentile{lower=60,upper=40}", "lower < upper"),
    ],
)
def test_bad_observers_are_explained(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        observer(text)


def test_a_moving_average_follows_the_feeds_in_their_order() -> None:
    sketch = TensorSketch()
    for k, top in ((1, 2.0), (0, 1.0), (2, 4.0)):  # seen in another order than that of the data
        sketch.update(np.array([-top, top], np.float32), k)
    low, high = observer("moving-average{momentum=0.5}").choose(sketch, QuantType.UINT8)
    assert high == pytest.approx(0.5 * (0.5 * 1.0 + 0.5 * 2.0) + 0.5 * 4.0)
    assert low == -high


@pytest.mark.parametrize("name", DATA)
def test_mean_and_spread_are_the_data_s(name: str) -> None:
    x = DATA[name].astype(np.float32).astype(np.float64)
    mean, std = mean_and_std(sketch_of(DATA[name]))
    assert mean == pytest.approx(x.mean(), rel=1e-9, abs=1e-12)
    assert std == pytest.approx(x.std(), rel=1e-3)
    low, high = observer("clip-std{sigmas=2}").choose(sketch_of(DATA[name]), QuantType.UINT8)
    assert high == pytest.approx(min(x.max(), mean + 2 * std), rel=1e-6)
    assert low == pytest.approx(max(x.min(), mean - 2 * std), rel=1e-6)


@pytest.mark.parametrize(("bits", "laplace", "gauss"), [(2, 2.83, 1.71), (3, 3.89, 2.15), (4, 5.03, 2.55)])
def test_the_limits_of_aciq_are_those_of_the_paper(bits: int, laplace: float, gauss: float) -> None:
    assert limit(True, 2**bits) * np.sqrt(2) == pytest.approx(laplace, abs=0.01)
    assert limit(False, 2**bits) == pytest.approx(gauss, abs=0.01)


def test_aciq_tells_a_laplace_from_a_normal_distribution() -> None:
    laplace, normal = rng.laplace(size=100_000), rng.standard_normal(100_000)
    for x, is_laplace in ((laplace, True), (normal, False), (np.abs(laplace), True), (np.abs(normal), False)):
        _, high = observer("aciq").choose(sketch_of(x), QuantType.UINT8)
        levels, std = (512, np.sqrt((x**2).mean())) if x.min() >= 0 else (256, x.std())
        assert high == pytest.approx(min(x.max(), std * limit(is_laplace, levels)), rel=0.02)


@pytest.mark.parametrize("name", DATA)
def test_cosine_is_near_the_best_on_the_data(name: str) -> None:
    x = DATA[name].astype(np.float32)

    def raw(low: float, high: float) -> float:
        q = fake_quantize(x, params_of_range(low, high, QuantType.UINT8)).astype(np.float64)
        return 1 - float((x * q).sum() / np.sqrt((x.astype(np.float64) ** 2).sum() * (q * q).sum()))

    low, high = observer("cosine").choose(sketch_of(x), QuantType.UINT8)
    shares = np.geomspace(1.0, 0.02, 40)
    best = min(min(raw(a * min(x.min(), 0.0), high), raw(low, a * max(x.max(), 0.0))) for a in shares)
    assert raw(low, high) <= 1.02 * best


def test_auto_takes_the_range_of_least_error_behind_it() -> None:
    """What reads the tensor sees only its largest elements in one case, only the others in the other."""
    x = np.append(DATA["normal"], np.full(50, 40.0)).astype(np.float32)
    auto = observer("auto")
    assert isinstance(auto, Auto)
    whole = auto.choose_for(sketch_of(x), QuantType.UINT8, [x], [lambda a: np.maximum(a - 20, 0)])
    bulk = auto.choose_for(sketch_of(x), QuantType.UINT8, [x], [lambda a: np.minimum(a, 2.0)])
    assert whole[1] == 40.0
    assert bulk[1] < 20.0


def test_what_is_fixed_is_taken_as_given() -> None:
    sketch, positive = sketch_of(DATA["normal"]), sketch_of(DATA["relu"])
    assert observer("fixed-range{lower=-2,upper=3}").choose(sketch, QuantType.UINT8) == (-2, 3)
    for text, seen, zero in (("fixed-scale{scale=0.5}", sketch, 128), ("fixed-scale{scale=0.5}", positive, 0)):
        params = params_of_range(*observer(text).choose(seen, QuantType.UINT8), QuantType.UINT8)
        assert (float(params.scale), int(params.zero_point)) == (0.5, zero)
    params = params_of_range(
        *observer("fixed-scale{scale=0.25,zero_point=7}").choose(sketch, QuantType.UINT8), QuantType.UINT8
    )
    assert (float(params.scale), int(params.zero_point)) == (0.25, 7)


@pytest.fixture(scope="module")
def activations(models: Path) -> dict[str, np.ndarray]:
    """What flows through two shipped models on 24 samples."""
    found = {}
    for name in ("inverted_residual", "vision_transformer"):
        path, data = models / f"{name}.onnx", models / "digits_calibration.npz"
        feeds = [s.feed for s in open_samples(str(data), Session(path).inputs, limit=24)]
        wanted = list(onnxq.calibrate(path, feeds[:2]).sketches)
        graph = onnx.load(path)
        present = {o for n in graph.graph.node for o in n.output}
        session = Session(exposed(graph, [w for w in wanted if w in present]), threads=1)
        runs = [session.run(feed) for feed in feeds]
        found |= {f"{name} {key}": np.concatenate([r[key].reshape(-1) for r in runs]) for key in runs[0]}
    return found


def test_on_real_activations_mse_is_within_one_percent_of_the_best(activations: dict[str, np.ndarray]) -> None:
    assert len(activations) > 15
    for name, x in activations.items():
        low, high = Mse().choose(sketch_of(x), QuantType.UINT8)
        shares = np.geomspace(1.0, 0.02, 24)
        tried = [(a * min(x.min(), 0.0), high) for a in shares] + [(low, b * max(x.max(), 0.0)) for b in shares]
        assert raw_error(x, low, high) <= 1.01 * min(raw_error(x, *t) for t in tried), name


def test_on_real_activations_kl_is_within_one_percent_of_the_best(activations: dict[str, np.ndarray]) -> None:
    """The divergence of the raw data's own histogram, at the limit that the sketch's gives and at every other."""
    for name, x in activations.items():
        if x.min() < 0:  # with one limit to choose the best is known
            continue
        high = Kl().choose(sketch_of(x), QuantType.UINT8)[1]
        counts = np.histogram(x[x != 0], 4096, (0.0, float(x.max())))[0].astype(np.float64)
        ends = np.unique(np.linspace(256, 4096, 128).astype(int))
        best = min(divergence(counts, 0, int(end), 256) for end in ends)
        chosen = divergence(counts, 0, round(high / float(x.max()) * 4096), 256)
        assert chosen <= 1.01 * best + 1e-6, name


def test_options_are_read() -> None:
    assert observer("percentile{lower=0.5, upper=99.0}") == Percentile(lower=0.5, upper=99.0)
    assert observer("kl{bins=2048}") == Kl(bins=2048)


def test_divergence_spreads_a_level_over_its_non_empty_bins_only() -> None:
    """Level {4, 0}: all of it goes to the bin that holds something, so nothing is lost by merging."""
    assert divergence(np.array([4.0, 0.0, 2.0, 2.0]), 0, 4, 2) == pytest.approx(0.0, abs=1e-12)


def test_symmetric_kl_is_the_same_for_mirrored_data() -> None:
    x = np.append(np.abs(NORMAL), 40.0)
    one, other = (Kl().choose(sketch_of(sign * x), QuantType.INT8, symmetric=True) for sign in (1, -1))
    assert one == pytest.approx(other, rel=2e-3)
    assert one[1] < 20


@given(st.integers(1, 5), st.integers(1, 3000), st.integers(0, 99), st.booleans())
@settings(deadline=None, max_examples=30)
def test_the_compiled_rounding_error_of_a_weight_is_that_of_numpy(rows: int, n: int, seed: int, symmetric: bool) -> None:
    x = np.random.default_rng(seed).standard_normal((rows, n)).astype(np.float32)
    kind = QuantType.INT8 if symmetric else QuantType.UINT8
    params = params_of_range(0.7 * x.min(1), 0.7 * x.max(1), kind, symmetric=symmetric, granularity=PerAxis(0))
    off = (fake_quantize(x, params) - x).astype(np.float64)
    np.testing.assert_allclose(rounding_errors(x, params), np.square(off).sum(1), rtol=1e-12)
