"""Weights: the parameters that a constant is quantized with, from its values alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from onnxq import cores, kernels
from onnxq.model import Observed
from onnxq.numerics import Array, Granularity, PerAxis, QuantParams, params_of_range
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
    rows = np.ascontiguousarray(_rows(weight, spec.granularity), np.float32)
    least = rounding_errors(rows, best)
    scale, zero = best.scale.copy(), best.zero_point.copy()
    for share in CANDIDATES[1:]:
        tried = params_of_range(low * share, high * share, spec.type, symmetric=spec.symmetric, granularity=spec.granularity)
        errors = rounding_errors(rows, tried)
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


def _rows(weight: Array, granularity: Granularity) -> Array:
    """The weight as (channels, n), or (1, n) where one scale is for all of it."""
    if isinstance(granularity, PerAxis):
        return np.moveaxis(weight, granularity.axis, 0).reshape(weight.shape[granularity.axis], -1)
    return weight.reshape(1, -1)


def rounding_errors(rows: Array, params: QuantParams) -> Array:
    """Squared error, float64 (C,), of rows (C, n) float32 that are rounded with parameters of each; () for one of all."""
    scale = np.broadcast_to(params.scale, len(rows)).astype(np.float32)
    zero = np.broadcast_to(params.zero_point, len(rows)).astype(np.float32)
    low, high, total = params.type.qmin - zero, params.type.qmax - zero, np.zeros(len(rows))
    parts = np.array_split(np.arange(len(rows)), max(1, min(cores.usable(), rows.size >> 20)))
    with ThreadPoolExecutor(len(parts)) as pool:
        for part in [
            pool.submit(_add_errors, rows, scale, low, high, total, slice(p[0], p[-1] + 1)) for p in parts if len(p)
        ]:
            part.result()
    return total.reshape(params.scale.shape)


def _add_errors(rows: Array, scale: Array, low: Array, high: Array, total: Array, part: slice) -> None:
    kernels.rounding_errors(rows[part], scale[part], low[part], high[part], total[part])
