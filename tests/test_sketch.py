"""Laws of sketch.py: exact, and equal bit for bit whatever the order, the split or the merge."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import onnxq.pages
from onnxq.blocks import Blocks
from onnxq.errors import CalibrationError
from onnxq.exactsum import ExactSum
from onnxq.pages import Extent, Pages, channels_of, observe, observe_numpy
from onnxq.sketch import TensorSketch

ANY_FLOAT = st.floats(width=32, allow_nan=False, allow_infinity=False)
FEED = hnp.arrays(np.float32, (2, 3, 4), elements=ANY_FLOAT)


def equal(a: TensorSketch, b: TensorSketch) -> bool:
    one, other = a.to_arrays(), b.to_arrays()
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


@given(st.lists(FEED, min_size=1, max_size=5), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_order_and_grouping_change_nothing(feeds: list[np.ndarray], random) -> None:
    whole = TensorSketch(channel_axis=1)
    for k, x in enumerate(feeds):
        whole.update(x, k)
    order = list(enumerate(feeds))
    random.shuffle(order)
    cut = random.randint(0, len(order))
    parts = [TensorSketch(channel_axis=1), TensorSketch(channel_axis=1)]
    for part, items in zip(parts, (order[:cut], order[cut:]), strict=True):
        for k, x in items:
            part.update(x, k)
    merged = TensorSketch(channel_axis=1)
    for part in random.sample(parts, 2):
        merged.merge(part)
    assert equal(whole, merged)


@given(hnp.arrays(np.float32, st.integers(1, 200), elements=ANY_FLOAT))
@settings(max_examples=200, deadline=None)
def test_count_range_and_sum_are_exact(x: np.ndarray) -> None:
    sketch = TensorSketch()
    sketch.update(x)
    assert sketch.count == x.size
    assert (sketch.minimum, sketch.maximum) == (float(x.min()), float(x.max()))
    assert sketch.sum() == math.fsum(x.tolist())
    assert sketch.histogram().count.sum() == x.size


SHAPES = st.sampled_from([(7,), (3, 5), (2, 3, 17), (1, 2, 9, 8), (4, 3, 1)])


@given(
    SHAPES.flatmap(lambda shape: hnp.arrays(np.uint32, shape)), st.sampled_from([None, 0, -1]),
    st.integers(1, 400), st.sampled_from([2, 16]),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_the_compiled_kernels_equal_their_numpy_form(bits: np.ndarray, axis: int | None, most: int, lanes: int) -> None:
    x = bits.view(np.float32)
    x = np.where(np.isfinite(x), x, np.float32(1.5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxq.pages, "MOST_AT_ONCE", most)  # arrays of more elements are taken in parts
        patch.setattr(onnxq.pages, "MOST_LANES", lanes)  # and of more channels, if these are last, in blocks
        compiled, plain = Seen.empty(x, axis), Seen.empty(x, axis)
        one, other = compiled.observe(x, axis), plain.observe_numpy(x, axis)
    assert_same(compiled, plain)
    np.testing.assert_array_equal(one.low, other.low)
    np.testing.assert_array_equal(one.high, other.high)


@pytest.mark.parametrize(
    "shape",
    [(3, 70_000), (2, 5, 9_000), (5_000, 2, 3), (200_000, 1, 2), (700, 100), (90, 1001), (300, 24), (999, 17), (50, 2, 10)],
)
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("spread", [1, 20, 80])
def test_sums_of_large_arrays_are_exact(shape: tuple[int, ...], axis: int | None, spread: int) -> None:
    """Over several pieces and units; a spread of magnitudes of e^+-spread."""
    rng = np.random.default_rng(len(shape))
    x = (rng.standard_normal(shape) * np.exp(rng.uniform(-spread, spread, shape))).astype(np.float32)
    x[rng.random(shape) < 0.3] = 0.0
    sketch = TensorSketch(channel_axis=axis)
    sketch.update(x)
    assert sketch.sum() == math.fsum(x.reshape(-1).tolist())
    assert sketch.count == x.size
    if sketch.channels is not None:
        rows = np.moveaxis(x, axis or 0, 0).reshape(x.shape[axis or 0], -1)
        few = slice(0, None, max(1, len(rows) // 50))
        expected = [math.fsum(row.tolist()) for row in rows[few]]
        np.testing.assert_array_equal(sketch.channels.total.values()[few], expected)
    sketch.look(x)
    sketch.drop(x)
    assert sketch.sum() == math.fsum(x.reshape(-1).tolist())
    assert sketch.count == x.size


@pytest.mark.parametrize("value", [1.5, 0.0, -0.0, 1e-45])
def test_a_run_of_one_value_overflows_no_table(value: float) -> None:
    sketch = TensorSketch()
    for shape in ((1 << 20,), (1 << 19, 1, 1, 1), (1 << 18, 1, 2)):
        sketch.update(np.full(shape, value, np.float32))
    assert sketch.count == (1 << 20) + (1 << 19) + (1 << 19)
    by_channel = TensorSketch(channel_axis=1)
    by_channel.update(np.full((1 << 19, 1, 1, 3), value, np.float32))
    by_channel.update(np.full((1 << 17, 1, 3, 3), value, np.float32))
    assert by_channel.count == 3 * (1 << 19) + 9 * (1 << 17)
    assert by_channel.sum() == float(np.float32(value)) * by_channel.count


@pytest.mark.parametrize(
    "shape", [(1, 32, 40, 40), (3, 48, 7, 7), (1, 5, 61, 61), (2, 24, 33, 1), (1, 16, 100, 101), (2, 40, 70, 70)]
)
@pytest.mark.parametrize("lanes", [8, 16, None])
@pytest.mark.parametrize("axis", [1, None])
def test_zeros_are_counted_wherever_they_are(shape: tuple[int, ...], lanes: int | None, axis: int | None) -> None:
    """Many in some parts and none in others, as they are counted in another way where they are many."""
    rng = np.random.default_rng(0)
    x = np.where(rng.random(shape) < rng.random((*shape[:2], 1, 1)), 0, rng.standard_normal(shape)).astype(np.float32)
    x[:, 2] = 0
    x[:, 3] = -1
    given: np.ndarray | Blocks = x if lanes is None else in_blocks(x, lanes, 0.0)
    compiled, plain = Seen.empty(given, axis), Seen.empty(given, axis)
    for sign in (1, 1, -1):
        compiled.observe(given, axis, sign)
    plain.observe_numpy(given, axis)
    assert_same(compiled, plain)


@pytest.mark.parametrize("shape", [(1, 24, 45, 100), (2, 20, 40, 41), (1, 3, 200, 200), (1, 300, 5, 6)])
@pytest.mark.parametrize(("lanes", "axis"), [(8, 1), (16, 1), (16, None), (None, 1), (None, -1), (None, None)])
@pytest.mark.parametrize("steps", [(0, 60), (0, 30, 0, 60, 0), (0, 3)])
def test_elements_may_be_of_another_size_than_those_before(
    shape: tuple[int, ...], lanes: int | None, axis: int | None, steps: tuple[int, ...]
) -> None:
    """Sums are begun in units for what was seen before; here later elements are up to 2^60 times as large, or as small.

    What is no channel's, in blocks, is of as many values.
    """
    rng = np.random.default_rng(0)
    powers = np.interp(np.linspace(0, 1, shape[2] * shape[3]), np.linspace(0, 1, len(steps)), steps).reshape(shape[2:])
    x = (rng.standard_normal(shape) * np.exp2(np.rint(powers + rng.integers(0, 9, (1, shape[1], 1, 1))))).astype(np.float32)
    padding = rng.standard_normal(shape[2:]).astype(np.float32)
    given: np.ndarray | Blocks = x if lanes is None else in_blocks(x, lanes, padding)
    compiled, plain = Seen.empty(given, axis), Seen.empty(given, axis)
    for sign in (1, 1, -1):
        one = compiled.observe(given, axis, sign)
    other = plain.observe_numpy(given, axis)
    assert_same(compiled, plain)
    np.testing.assert_array_equal(one.low, other.low)
    np.testing.assert_array_equal(one.high, other.high)


def in_blocks(x: np.ndarray, lanes: int, padding: float | np.ndarray) -> Blocks:
    """The tensor (N, C, H, W) as the runtime would give it, with anything in the lanes that are none of it."""
    n, c, h, w = x.shape
    padded = np.full((n, -(-c // lanes) * lanes, h, w), padding, np.float32)
    padded[:, :c] = x
    memory = padded.reshape(n, -1, lanes, h, w).transpose(0, 1, 3, 4, 2)
    return Blocks.of(np.ascontiguousarray(memory).reshape(padded.shape), c, lanes)


IMAGES = st.sampled_from([(1, 3, 2, 2), (2, 16, 3, 5), (1, 20, 9, 4), (3, 8, 1, 1), (2, 33, 2, 7)])


@given(
    IMAGES.flatmap(lambda shape: hnp.arrays(np.uint32, shape)),
    st.sampled_from([8, 16]), st.sampled_from([None, 1]), st.integers(20, 3000), st.sampled_from([0.0, np.nan, 1e30]),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_blocks_of_channels_count_as_their_tensor(
    bits: np.ndarray, lanes: int, axis: int | None, most: int, padding: float
) -> None:
    x = bits.view(np.float32)
    x = np.where(np.isfinite(x), x, np.float32(1.5))
    blocks = in_blocks(x, lanes, padding)
    np.testing.assert_array_equal(blocks.plain(), x)
    assert (blocks.shape, blocks.size, blocks.ndim) == (x.shape, x.size, x.ndim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxq.pages, "MOST_AT_ONCE", most)
        compiled, oracle, plain = Seen.empty(blocks, axis), Seen.empty(blocks, axis), Seen.empty(x, axis)
        one, other = compiled.observe(blocks, axis), oracle.observe_numpy(blocks, axis)
        same = plain.observe(x, axis)
    assert_same(compiled, oracle)
    assert_same(compiled, plain)
    for name in ("low", "high"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        np.testing.assert_array_equal(getattr(one, name), getattr(same, name))
    assert one.ends() == same.ends()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_sketch_of_blocks_leaves_out_what_is_not_finite(bad: float) -> None:
    x = np.random.default_rng(0).standard_normal((2, 20, 3, 3)).astype(np.float32)
    one, other = TensorSketch(channel_axis=1), TensorSketch(channel_axis=1)
    x[1, 17, 2, 1] = bad
    assert not one.update(in_blocks(x, 16, 0.0))
    assert not other.update(x)
    assert equal(one, other)
    one.look(in_blocks(x + 1, 16, 0.0))
    one.drop(in_blocks(x + 1, 16, 0.0))
    assert equal(one, other)


def test_what_is_not_finite_is_seen() -> None:
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        x = np.array([1.0, value, -1.0], np.float32)
        found, expected = Seen.empty(x, None), Pages()
        assert not np.isfinite(found.observe(x, None).ends()).all()
        expected.count_numpy(x.view(np.uint32))
        assert_same_pages(found.pages, expected)


@given(st.lists(FEED, min_size=1, max_size=3), hnp.arrays(np.float32, (2, 3, 4), elements=st.floats(width=32)))
@settings(max_examples=60, deadline=None)
def test_what_is_forgotten_leaves_no_trace(feeds: list[np.ndarray], bad: np.ndarray) -> None:
    untouched, sketch = TensorSketch(channel_axis=1), TensorSketch(channel_axis=1)
    for k, x in enumerate(feeds):
        untouched.update(x, k)
        sketch.update(x, k)
    sketch.look(bad)
    sketch.drop(bad)
    assert equal(sketch, untouched)


@dataclass
class Seen:
    """What `observe` adds to."""

    pages: Pages
    total: ExactSum

    @classmethod
    def empty(cls, x: np.ndarray | Blocks, axis: int | None) -> Seen:
        return cls(Pages(), ExactSum.zeros(channels_of(x, axis)))

    def observe(self, x: np.ndarray | Blocks, axis: int | None, sign: int = 1) -> Extent:
        return observe(x, axis, self.pages, self.total, sign)

    def observe_numpy(self, x: np.ndarray | Blocks, axis: int | None) -> Extent:
        return observe_numpy(x, axis, self.pages, self.total)


def assert_same(one: Seen, other: Seen) -> None:
    assert_same_pages(one.pages, other.pages)
    np.testing.assert_array_equal(one.total.carried(), other.total.carried())


def assert_same_pages(one: Pages, other: Pages) -> None:
    for (page, row), (other_page, other_row) in zip(one.items(), other.items(), strict=True):
        assert page == other_page
        np.testing.assert_array_equal(row, other_row)


@given(st.lists(hnp.arrays(np.float64, (3,), elements=st.floats(-1e30, 1e30)), min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_exact_sum_is_the_sum_rounded_once(rows: list[np.ndarray]) -> None:
    total, reversed_total = ExactSum.zeros(3), ExactSum.zeros(3)
    for row in rows:
        total.add_numpy(row[None])
    for row in rows[::-1]:
        part = ExactSum.zeros(3)
        part.add_numpy(row[None])
        reversed_total.merge(part)
    np.testing.assert_array_equal(total.carried(), reversed_total.carried())
    expected = [math.fsum(column) for column in np.stack(rows).T]
    np.testing.assert_allclose(total.values(), expected, rtol=1e-15, atol=1e-55)
    np.testing.assert_allclose(total.of_all().values(), math.fsum(np.stack(rows).reshape(-1)), rtol=1e-15, atol=1e-55)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20))
@settings(max_examples=200, deadline=None)
def test_a_sum_of_float32_is_rounded_once_to_float64(numbers: list[float]) -> None:
    total = ExactSum.zeros(1)
    for number in numbers:
        total.add_numpy(np.array([[number]]))
    assert total.values().tolist() == [math.fsum(numbers)]


@given(hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-1e3, 1e3, width=32)))
@settings(max_examples=100, deadline=None)
def test_every_element_lies_in_a_bin(x: np.ndarray) -> None:
    sketch = TensorSketch()
    sketch.update(x)
    bins = sketch.histogram()
    assert (np.diff(bins.lower) >= 0).all()
    assert (bins.lower <= bins.upper).all()
    for v in x:
        value = 0.0 if abs(v) < np.finfo(np.float32).tiny else float(v)
        assert ((bins.lower <= value) & (value <= bins.upper)).any()


def test_nan_and_infinity_are_counted_apart() -> None:
    sketch = TensorSketch()
    sketch.update(np.array([1.0, np.nan, np.inf, -np.inf, 3.0], np.float32))
    assert (sketch.nan_count, sketch.inf_count, sketch.count) == (1, 2, 2)
    assert (sketch.minimum, sketch.maximum) == (1.0, 3.0)
    assert sketch.sum() == 4.0


def test_arrays_may_be_read_only_and_in_any_order() -> None:
    x = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    reversed_order, fixed = x.transpose(2, 1, 0).copy().transpose(2, 1, 0), x.copy()
    fixed.flags.writeable = False
    one = TensorSketch(channel_axis=1)
    one.update(x)
    for same in (reversed_order, fixed):
        other = TensorSketch(channel_axis=1)
        other.update(same)
        assert equal(one, other)


def test_channel_statistics() -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    sketch = TensorSketch(channel_axis=1)
    sketch.update(x)
    assert sketch.channels is not None
    np.testing.assert_array_equal(sketch.channels.minimum, x.min((0, 2)))
    np.testing.assert_array_equal(sketch.channels.mean, x.mean((0, 2)))
    with pytest.raises(CalibrationError, match="channels changes from 3 to 4"):
        sketch.update(x.transpose(0, 2, 1))


@given(FEED)
@settings(max_examples=30, deadline=None)
def test_arrays_hold_all_of_it(x: np.ndarray) -> None:
    sketch = TensorSketch(channel_axis=-1)
    sketch.update(x, 7)
    assert equal(sketch, TensorSketch.from_arrays(sketch.to_arrays()))
    assert TensorSketch.from_arrays(sketch.to_arrays()).series == sketch.series


def test_half_precision_is_counted_as_its_values() -> None:
    x = np.array([0.5, -2.0, 1e-7], np.float16)
    half, single = TensorSketch(), TensorSketch()
    half.update(x)
    single.update(x.astype(np.float32))
    assert equal(half, single)


def test_an_array_that_is_not_aligned_is_counted_as_another() -> None:
    """As samples are that come out of a message, e.g. on a worker of a Dask cluster."""
    x = np.frombuffer(bytearray(4 * 600 + 1), np.float32, 600, 1).reshape(2, 3, 100)
    x[:] = np.random.default_rng(0).standard_normal(x.shape)
    assert not x.flags.aligned
    found, expected = TensorSketch(1), TensorSketch(1)
    found.update(x)
    expected.update(x.copy())
    assert found.to_arrays().keys() == expected.to_arrays().keys()
    for part, array in expected.to_arrays().items():
        np.testing.assert_array_equal(found.to_arrays()[part], array)
