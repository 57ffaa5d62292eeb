"""Weights: the parameters that a constant is quantized with, from its values alone."""

from __future__ import annotations

import numpy as np

from onnxq.model import Observed
from onnxq.numerics import Array, Granularity, PerAxis, QuantParams, fake_quantize, params_of_range
from onnxq.observers import Observer, observer
from onnxq.sketch import TensorSketch

CANDIDATES = np.linspace(1.0, 0.5, 26)


def weight_params(weight: Array, spec: Observed, method: str = "mse") -> QuantParams:
    """Parameters of a constant, by channel or for the whole."""
    if method not in ("mse", "max"):
        return _observed(weight, spec, observer(method))
    axes = _reduced_axes(weight, spec.granularity)
    low, high = weight.min(axes), weight.max(axes)
    best = params_of_range(low, high, spec.type, symmetric=spec.symmetric, granularity=spec.granularity)
    if method != "mse":
        return best
    least = _errors(weight, best, axes)
    scale, zero = best.scale.copy(), best.zero_point.copy()
    for share in CANDIDATES[1:]:
        tried = params_of_range(low * share, high * share, spec.type, symmetric=spec.symmetric, granularity=spec.granularity)
        errors = _errors(weight, tried, axes)
        better = errors < least
        scale, zero = np.where(better, tried.scale, scale), np.where(better, tried.zero_point, zero)
        least = np.minimum(least, errors)
    return QuantParams(scale.astype(np.float32), zero.astype(spec.type.dtype), spec.type, spec.granularity)


def _observed(weight: Array, spec: Observed, kind: Observer) -> QuantParams:
    """By what an observer makes of each channel's elements."""
    axis = spec.granularity.axis if isinstance(spec.granularity, PerAxis) else None
    parts = [weight] if axis is None else list(np.moveaxis(weight, axis, 0))
    ranges = []
    for part in parts:
        sketch = TensorSketch()
        sketch.update(part)
        ranges.append(kind.choose(sketch, spec.type, symmetric=spec.symmetric))
    low, high = np.array(ranges).T if axis is not None else ranges[0]
    return params_of_range(low, high, spec.type, symmetric=spec.symmetric, granularity=spec.granularity)


def _reduced_axes(weight: Array, granularity: Granularity) -> tuple[int, ...] | None:
    if isinstance(granularity, PerAxis):
        return tuple(a for a in range(weight.ndim) if a != granularity.axis)
    return None


def _errors(weight: Array, params: QuantParams, axes: tuple[int, ...] | None) -> Array:
    return np.square((fake_quantize(weight, params) - weight).astype(np.float64)).sum(axes)
