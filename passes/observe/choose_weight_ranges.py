"""choose-weight-ranges"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.errors import RecipeError
from onnxq.graph import Constant
from onnxq.model import Model, Observed
from onnxq.numerics import Array, Granularity, PerAxis, QuantParams, as_type, fake_quantize, params_of_range
from onnxq.observers import Observer, observer
from onnxq.passmanager import Pass
from onnxq.sketch import TensorSketch

CANDIDATES = np.linspace(1.0, 0.5, 26)


@dataclass(frozen=True)
class ChooseWeightRanges(Pass):
    """Choose the parameters of every observed constant from its values.

    Given:   specs: W observed, int8, per output channel, symmetric
    Result:  the graph unchanged; params: scale of each channel of W of least squared error (`method` mse), that of its
             largest magnitude (`method` max), or that of the range that an observer chooses (its name); a weight that came
             in quantized keeps its scales
    Refused: nothing; a channel of zeros gets scale 1.
    """

    name: ClassVar[str] = "choose-weight-ranges"
    method: str = "mse"

    def __post_init__(self) -> None:
        if self.method not in ("mse", "max"):
            try:
                observer(self.method)
            except RecipeError as error:
                raise RecipeError(f"method is {self.method}; it takes mse, max or an observer: {error}") from error

    def apply(self, model: Model) -> int:
        chosen = 0
        for name, tensor in model.graph.tensors().items():
            spec = model.specs.get(name)
            if isinstance(tensor, Constant) and isinstance(spec, Observed) and name not in model.params:
                values, trained = np.asarray(tensor.values), model.trained.get(name)
                kept = None if trained is None else _kept(trained, spec, values.shape)
                model.params[name] = kept or weight_params(values, spec, self.method)
                chosen += 1
        return chosen


def _kept(trained: QuantParams, spec: Observed, shape: tuple[int, ...]) -> QuantParams | None:
    return as_type(trained, spec.type, spec.granularity, shape, symmetric=spec.symmetric)


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
