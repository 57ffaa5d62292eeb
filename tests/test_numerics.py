"""Laws of numerics.py: equal to onnxruntime's QuantizeLinear and DequantizeLinear, bit for bit."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.numerics import (
    PerAxis,
    PerBlock,
    QuantParams,
    QuantType,
    broadcast,
    dequantize,
    fake_quantize,
    params_of_range,
    quantize,
    quantize_bias,
)
from onnxq.runtime import Session

TYPES = [QuantType.UINT8, QuantType.INT8, QuantType.UINT16, QuantType.INT16]
FLOATS = st.floats(-1e6, 1e6, width=32)
SCALES = st.floats(2**-20, 2**10, width=32, exclude_min=True)


@lru_cache
def runtime_pair(kind: QuantType, per_axis: bool) -> Session:
    """A session that quantizes and dequantizes with the scale and zero point of the feed."""
    shape = "[C]" if per_axis else ""
    text = f"""
    <ir_version: 10, opset_import: ["" : 21]>
    net (float[R, C] x, float{shape} scale, {kind.value}{shape} zero) => ({kind.value}[R, C] q, float[R, C] y)
    {{
      q = QuantizeLinear <axis = 1> (x, scale, zero)
      y = DequantizeLinear <axis = 1> (q, scale, zero)
    }}"""
    return Session(onnx.parser.parse_model(text), threads=1)


def check_equal(x: np.ndarray, params: QuantParams) -> None:
    session = runtime_pair(params.type, isinstance(params.granularity, PerAxis))
    got = session.run({"x": x, "scale": params.scale, "zero": params.zero_point})
    codes = quantize(x, params)
    np.testing.assert_array_equal(codes, got["q"])
    np.testing.assert_array_equal(dequantize(codes, params), got["y"])


@pytest.mark.parametrize("kind", TYPES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_per_tensor_equals_onnxruntime(kind: QuantType, data: st.DataObject) -> None:
    x = data.draw(hnp.arrays(np.float32, (3, 5), elements=FLOATS))
    scale = np.float32(data.draw(SCALES))
    zero = data.draw(st.integers(kind.qmin, kind.qmax))
    check_equal(x, QuantParams(np.asarray(scale), np.asarray(zero, kind.dtype), kind))


@pytest.mark.parametrize("kind", TYPES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_per_axis_equals_onnxruntime(kind: QuantType, data: st.DataObject) -> None:
    x = data.draw(hnp.arrays(np.float32, (4, 3), elements=FLOATS))
    scale = data.draw(hnp.arrays(np.float32, (3,), elements=SCALES))
    zero = data.draw(hnp.arrays(kind.dtype, (3,), elements=st.integers(kind.qmin, kind.qmax)))
    check_equal(x, QuantParams(scale, zero, kind, PerAxis(1)))


@pytest.mark.parametrize("kind", TYPES)
def test_ties_go_to_even_and_ends_saturate(kind: QuantType) -> None:
    steps = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 1e9, -1e9, np.inf, -np.inf], np.float32).reshape(2, 5)
    for zero in (kind.qmin, kind.qmax, (kind.qmin + kind.qmax) // 2):
        check_equal(steps * np.float32(0.5), QuantParams(np.asarray(0.5, np.float32), np.asarray(zero, kind.dtype), kind))
    codes = quantize(steps, QuantParams(np.ones((), np.float32), np.zeros((), np.int8), QuantType.INT8))
    assert codes[0].tolist() == [-2, -2, 0, 0, 2]


@given(
    st.floats(-1e5, 1e5, width=32),
    st.floats(-1e5, 1e5, width=32),
    st.sampled_from(TYPES),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_a_range_holds_zero_exactly_and_its_ends_within_a_step(a: float, b: float, kind: QuantType, symmetric: bool) -> None:
    params = params_of_range(min(a, b), max(a, b), kind, symmetric=symmetric)
    assert fake_quantize(np.zeros(1, np.float32), params)[0] == 0.0
    ends = np.array([min(a, b, 0), max(a, b, 0)], np.float32)
    if max(abs(a), abs(b)) > 1e-30:
        assert np.abs(fake_quantize(ends, params) - ends).max() <= float(params.scale) * 1.001


@given(hnp.arrays(np.float32, (40,), elements=st.floats(-100, 100, width=32)), st.sampled_from(TYPES))
@settings(max_examples=100, deadline=None)
def test_inside_the_range_the_error_is_at_most_half_a_step(x: np.ndarray, kind: QuantType) -> None:
    params = params_of_range(-101.0, 101.0, kind)
    assert np.abs(fake_quantize(x, params) - x).max() <= float(params.scale) * 0.5001


def test_symmetric_codes_are_as_many_below_zero_as_above() -> None:
    params = params_of_range(-1.0, 2.0, QuantType.INT8, symmetric=True)
    assert params.zero_point == 0
    assert quantize(np.array([-2.0, 2.0], np.float32), params).tolist() == [-127, 127]
    params = params_of_range(-1.0, 2.0, QuantType.UINT8, symmetric=True)
    assert params.zero_point == 128
    assert quantize(np.array([-2.0, 2.0], np.float32), params).tolist() == [1, 255]


def test_a_range_of_zero_width_has_scale_one() -> None:
    assert params_of_range(0.0, 0.0, QuantType.UINT8).scale == 1.0


def test_block_scales_repeat_along_their_axis() -> None:
    scale = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    wide = broadcast(scale, PerBlock(0, 2), (3, 2))
    assert wide.tolist() == [[1, 2], [1, 2], [3, 4]]


def test_bias_codes_clip_instead_of_wrapping() -> None:
    codes = quantize_bias(np.array([1.0, 1e12, -1e12], np.float32), np.full(3, 0.5, np.float32))
    assert codes.tolist() == [2, 2**31 - 1, -(2**31)]
