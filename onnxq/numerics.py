"""Number formats, granularity, and quantize/dequantize in numpy.

    q  = saturate(round_half_even(x / scale) + zero_point)      ONNX QuantizeLinear
    x' = (q - zero_point) * scale                               ONNX DequantizeLinear

These are the reference: bit for bit what onnxruntime's QuantizeLinear and DequantizeLinear give.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class QuantType:
    """An integer type: its ONNX name, and its width where that is less than what it is stored in (0: all of it)."""

    value: str
    width: int = 0
    INT8: ClassVar[QuantType]
    UINT8: ClassVar[QuantType]
    INT16: ClassVar[QuantType]
    UINT16: ClassVar[QuantType]
    INT32: ClassVar[QuantType]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.value)

    @property
    def bits(self) -> int:
        return self.width or 8 * self.dtype.itemsize

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def signed(self) -> bool:
        return self.dtype.kind == "i"

    def of_bits(self, bits: int) -> QuantType:
        """The type of the same sign with 2 to 16 bits, stored in the least of 8 and 16 that holds them."""
        stored = 8 if bits <= 8 else 16
        return QuantType(f"{'' if self.signed else 'u'}int{stored}", 0 if bits == stored else bits)


QuantType.INT8, QuantType.UINT8 = QuantType("int8"), QuantType("uint8")
QuantType.INT16, QuantType.UINT16, QuantType.INT32 = QuantType("int16"), QuantType("uint16"), QuantType("int32")


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: scale has shape ()."""


@dataclass(frozen=True)
class PerAxis:
    """One scale a slice along `axis`: for a Conv weight (M, C, kH, kW) and axis 0, scale has shape (M,)."""

    axis: int


@dataclass(frozen=True)
class PerBlock:
    """One scale for `size` consecutive elements along `axis`: a (K, N) weight, axis 0, size 32: scale is (K/32, N)."""

    axis: int
    size: int


Granularity = PerTensor | PerAxis | PerBlock


@dataclass(frozen=True)
class QuantParams:
    """scale (float32) and zero_point (of `type`), shaped by the granularity; `rmin` and `rmax` follow from them."""

    scale: Array
    zero_point: Array
    type: QuantType
    granularity: Granularity = PerTensor()

    @property
    def rmin(self) -> Array:
        return (self.type.qmin - self.zero_point.astype(np.float64)) * self.scale

    @property
    def rmax(self) -> Array:
        return (self.type.qmax - self.zero_point.astype(np.float64)) * self.scale

    def scaled(self, factor: Array | float) -> QuantParams:
        """The same zero point, every scale times its factor."""
        return replace(self, scale=np.asarray(self.scale * np.asarray(factor), np.float32))


def params_of_range(
    rmin: Array | float,
    rmax: Array | float,
    quant_type: QuantType,
    *,
    symmetric: bool = False,
    granularity: Granularity = PerTensor(),
) -> QuantParams:
    """The parameters that represent [rmin, rmax], widened to hold 0 exactly.

    Symmetric: zero_point is the centre of the type (0, or 128 for uint8) and the codes are -127..127 about it. A range
    of zero width gets scale 1.
    """
    lo = np.minimum(np.asarray(rmin, np.float64), 0.0)
    hi = np.maximum(np.asarray(rmax, np.float64), 0.0)
    zero = np.zeros_like(lo)
    if symmetric:
        levels = (quant_type.qmax - quant_type.qmin) // 2  # 127 of 8 bits: as many below the centre as above
        scale = np.maximum(-lo, hi) / levels
        zero = np.full(scale.shape, 0 if quant_type.signed else levels + 1)
    else:
        scale = (hi - lo) / (quant_type.qmax - quant_type.qmin)
    scale = np.where(scale < np.finfo(np.float32).tiny, 1.0, scale).astype(np.float32)
    if not symmetric:
        zero = np.clip(np.rint(quant_type.qmin - lo / scale), quant_type.qmin, quant_type.qmax)
    return QuantParams(scale, zero.astype(quant_type.dtype), quant_type, granularity)


def as_type(
    params: QuantParams, quant_type: QuantType, granularity: Granularity, shape: tuple[int, ...] | None, *, symmetric: bool
) -> QuantParams | None:
    """The same grid with codes of another type of as many bits, or by channel; None where there is none.

    `shape` is that of the tensor, by which one scale is repeated for each channel.
    """
    if params.type.bits != quant_type.bits or params.type.dtype.itemsize != quant_type.dtype.itemsize:
        return None
    zero = params.zero_point.astype(np.int64) + (quant_type.qmin - params.type.qmin)
    if symmetric and np.any(zero != (0 if quant_type.signed else (quant_type.qmax + 1) // 2)):
        return None
    scale = params.scale
    if params.granularity != granularity:
        if not isinstance(params.granularity, PerTensor) or not isinstance(granularity, PerAxis) or shape is None:
            return None
        scale, zero = (np.broadcast_to(a, shape[granularity.axis]) for a in (scale, zero))
    return QuantParams(np.asarray(scale, np.float32), zero.astype(quant_type.dtype), quant_type, granularity)


def broadcast(values: Array, granularity: Granularity, shape: tuple[int, ...]) -> Array:
    """`values` of a granularity, laid out so that they broadcast against a tensor of `shape`."""
    if isinstance(granularity, PerAxis):
        ones = [1] * len(shape)
        ones[granularity.axis] = -1
        return values.reshape(ones)
    if isinstance(granularity, PerBlock):
        wide = np.repeat(values, granularity.size, axis=granularity.axis)
        return np.take(wide, np.arange(shape[granularity.axis]), axis=granularity.axis)
    return values.reshape(())


def quantize(x: Array, params: QuantParams) -> Array:
    """Integer codes of `x` (float32), rounded half to even and saturated. Same shape, dtype of `params.type`."""
    scale = broadcast(params.scale, params.granularity, x.shape)
    zero = broadcast(params.zero_point, params.granularity, x.shape).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # of infinities, and of NaN, for which no code stands
        codes = np.rint(np.clip(x / scale, params.type.qmin - zero, params.type.qmax - zero))
        return (codes + zero).astype(params.type.dtype)


def dequantize(codes: Array, params: QuantParams) -> Array:
    """The float32 values that the codes stand for."""
    scale = broadcast(params.scale, params.granularity, codes.shape)
    zero = broadcast(params.zero_point, params.granularity, codes.shape).astype(np.int32)
    return (codes.astype(np.int32) - zero).astype(np.float32) * scale


def fake_quantize(x: Array, params: QuantParams) -> Array:
    """`x` as it comes out of QuantizeLinear, DequantizeLinear."""
    return dequantize(quantize(x, params), params)


def quantize_bias(bias: Array, scale: Array) -> Array:
    """int32 codes of a bias (C,) at `scale` (C,) = input scale x weight scale, clipped where the exact code overflows."""
    codes = np.rint(bias.astype(np.float64) / scale.astype(np.float64))
    return np.clip(codes, QuantType.INT32.qmin, QuantType.INT32.qmax).astype(np.int32)
