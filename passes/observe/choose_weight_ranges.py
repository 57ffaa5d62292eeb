"""choose-weight-ranges"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.errors import RecipeError
from onnxq.graph import Constant
from onnxq.model import Model, Observed
from onnxq.numerics import QuantParams, as_type
from onnxq.observers import observer
from onnxq.passmanager import Pass
from onnxq.weights import weight_params


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
