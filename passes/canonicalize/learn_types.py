"""learn-types"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq import runtime
from onnxq.errors import ModelError
from onnxq.graph import Variable
from onnxq.model import Model
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class LearnTypes(Pass):
    """Learn the type and rank of tensors by running one sample, where shape inference knows nothing of an op.

    Given:   %1 = com.microsoft.BiasGelu(%0, b)          %1 of unknown type
    Result:  the same graph                              %1: float32[?, ?]
    Refused: every type is known; there is no sample; the model does not run; the value is no tensor.

    Dimensions may differ from sample to sample and stay unknown.
    """

    name: ClassVar[str] = "learn-types"

    def apply(self, model: Model) -> int:
        tensors = {
            n: t for n, t in model.graph.tensors().items() if isinstance(t, Variable) and t.dtype is None and t.inputs
        }
        feed = _one_feed(model)
        if not tensors or feed is None:
            return 0
        try:
            session = runtime.Session(runtime.exposed(model.graph.to_stored_proto(), tensors), threads=model.threads)
            values = session.run(feed)
        except ModelError as error:
            model.refusals.append(("model", str(error)))
            return 0
        learned = 0
        for name, tensor in tensors.items():
            value = values.get(name)
            if isinstance(value, np.ndarray) and value.dtype != object:
                tensor.dtype = value.dtype
                tensor.shape = [None] * value.ndim if tensor.shape is None else tensor.shape
                learned += 1
        return learned


def _one_feed(model: Model) -> dict[str, np.ndarray] | None:
    if model.samples is not None:
        return next(iter(model.samples)).feed
    return model.calibration.probes[0] if model.calibration is not None and model.calibration.probes else None
