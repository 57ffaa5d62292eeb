"""Observers against the data that their sketches were made from."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.errors import RecipeError
from onnxq.numerics import QuantType, fake_quantize, params_of_range
from onnxq.observers import Kl, Mse, Percentile, divergence, observer, registry, squared_error, squared_error_numpy
from onnxq.sketch import TensorSketch

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
    for kind in registry():
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
    for kind in registry():
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
