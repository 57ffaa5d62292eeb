"""choose-ranges"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar

import numpy as np

from onnxq.errors import CalibrationError
from onnxq.graph import ONNX_DOMAINS, Constant, Node, Tensor, Variable, clip_bounds
from onnxq.model import Model, Observed, known_as
from onnxq.numerics import QuantParams, as_type, params_of_range
from onnxq.observers import Auto, Observer, observer
from onnxq.passmanager import Pass
from onnxq.runtime import Session, exposed
from onnxq.sketch import TensorSketch


@dataclass(frozen=True)
class ChooseRanges(Pass):
    """Choose the parameters of every observed activation from its sketch.

    Given:   specs: %1 observed; a sketch of %1
    Result:  the graph unchanged; params: scale and zero point of %1, by the observer named for it, else by `observer`
    Refused: a tensor that was empty in every sample: an error, because nothing is known of it.

    Where the tensor is a Relu's or Clip's output, the range is kept inside what these let through, as the runtime drops
    them only then. `overrides` holds (pattern, observer) pairs, a pattern being of tensor names or the type of the op that
    makes the tensor; the last that matches counts. In a body, names may have its scope in front of them. A tensor that came
    in quantized keeps its parameters, unless one matches.
    """

    name: ClassVar[str] = "choose-ranges"
    observer: str = "mse"
    overrides: tuple[tuple[str, str], ...] = ()

    def apply(self, model: Model) -> int:
        default = observer(self.observer)
        overrides = [(pattern, observer(text)) for pattern, text in self.overrides]
        tensors = model.graph.tensors()
        observed = [name for name, s in model.specs.items() if isinstance(s, Observed)]
        named = [name for name in observed if not isinstance(tensors.get(name), Constant)]
        makers = {name: _maker(model, tensors[name]) for name in named if name in tensors}
        model.overridable |= {own for name in named for own in _names(name, model.scope)} | set(makers.values()) - {""}
        chosen = 0
        for name, tensor in tensors.items():
            spec = model.specs.get(name)
            if not isinstance(spec, Observed) or isinstance(tensor, Constant) or name in model.params:
                continue
            own = {*_names(name, model.scope), makers[name]}
            kind = next((o for pattern, o in reversed(overrides) if any(fnmatchcase(n, pattern) for n in own)), None)
            trained = model.trained.get(name) if kind is None else None
            kept = None if trained is None else as_type(trained, spec.type, spec.granularity, None, symmetric=spec.symmetric)
            if kept is not None:
                model.params[name] = kept
                chosen += 1
                continue
            sketch = model.calibration.sketches.get(name) if model.calibration else None
            if sketch is None or not sketch.count:
                was = "NaN or infinity" if sketch is not None and sketch.nan_count + sketch.inf_count else "empty"
                raise CalibrationError(f"tensor {name} was {was} in every sample; give data in which it is not")
            model.params[name] = _params(model, tensor, spec, sketch, kind or default)
            chosen += 1
        return chosen


def _maker(model: Model, tensor: Tensor) -> str:
    """The type of the op that makes a tensor; empty where it is an input."""
    maker = model.graph.producer(tensor)
    return "" if maker is None else maker.op


def _names(name: str, scope: str) -> set[str]:
    """What a tensor goes by in overrides."""
    return {before + own for before in ("", scope) for own in (name, known_as(name))}


def _params(model: Model, tensor: Tensor, spec: Observed, sketch: TensorSketch, kind: Observer) -> QuantParams:
    if isinstance(kind, Auto):
        rmin, rmax = kind.choose_for(sketch, spec.type, *_readings(model, tensor), symmetric=spec.symmetric)
    else:
        rmin, rmax = kind.choose(sketch, spec.type, symmetric=spec.symmetric)
    maker = model.graph.producer(tensor)
    if maker is not None and maker.domain not in ONNX_DOMAINS:
        maker = None  # a custom op may have the name of another
    low, high = -np.inf, np.inf
    if maker is not None and maker.op == "Relu":
        low = 0.0
    elif maker is not None and maker.op == "Clip":
        bounds = clip_bounds(maker)
        low = bounds[0] if bounds[0] is not None and bounds[0] <= 0 else low
        high = bounds[1] if bounds[1] is not None and bounds[1] >= 0 else high
    lower, upper = max(rmin, low), min(rmax, high)
    if lower == upper == 0:  # a dead activation: what it lets through is all that is known
        lower, upper = (bound if np.isfinite(bound) else 0.0 for bound in (low, high))
    params = params_of_range(lower, upper, spec.type, symmetric=spec.symmetric)
    return params if spec.symmetric else _inside(params, low, high)


def _readings(model: Model, tensor: Tensor) -> tuple[list[np.ndarray], list[Callable[[np.ndarray], np.ndarray]]]:
    """The tensor on the probes, and the layers that read it, each as a function of it alone."""
    assert model.calibration is not None
    if model.graph.producer(tensor) is None:
        arrays = [feed[tensor.name] for feed in model.calibration.probes]
    else:
        session = Session(exposed(model.graph.to_stored_proto(), [tensor.name]), threads=model.threads)
        arrays = [session.run(feed)[tensor.name] for feed in model.calibration.probes]
    readers: list[Callable[[np.ndarray], np.ndarray]] = []
    for node, index in model.graph.readers(tensor):
        if (
            node is None
            or node.name not in model.planned
            or any(isinstance(t, Variable) for t in node.inputs if t is not tensor)
        ):
            continue
        if index == 0 and not node.in_body:
            readers.append(_alone(model, node, tensor))
    return arrays, readers or [lambda x: x]


def _alone(model: Model, node: Node, tensor: Tensor) -> Callable[[np.ndarray], np.ndarray]:
    session = Session(model.graph.extract([node], [node.outputs[0]]), threads=model.threads)
    return lambda x: session.run({tensor.name: x})[node.outputs[0].name]


def _inside(params: QuantParams, low: float, high: float) -> QuantParams:
    """The parameters so that both ends of the range, rounded as they are, lie in [low, high].

    Where rounding put an end a fraction of a step too far, the scale shrinks by that fraction; where one side of the range
    is no more than a step, that side is given up instead, as shrinking could cost most of the other.
    """
    scale, zero = np.float32(params.scale), int(params.zero_point)
    if zero - params.type.qmin == 1 and -scale < low:
        zero = params.type.qmin
    if params.type.qmax - zero == 1 and scale > high:
        zero = params.type.qmax
    below, above = params.type.qmin - zero, params.type.qmax - zero
    while (below and np.float32(below) * scale < low) or (above and np.float32(above) * scale > high):
        limit = min(low / below if below else np.inf, high / above if above else np.inf)
        scale = min(np.float32(limit), np.nextafter(scale, np.float32(0)))
    return replace(params, scale=np.asarray(scale, np.float32), zero_point=np.asarray(zero, params.type.dtype))
