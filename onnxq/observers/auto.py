"""auto: by what the layer behind makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.numerics import QuantType, fake_quantize, params_of_range
from onnxq.observers.base import Observer, Range
from onnxq.observers.kl import Kl
from onnxq.observers.minmax import MinMax
from onnxq.observers.moments import Aciq
from onnxq.observers.mse import Mse
from onnxq.observers.percentile import Percentile
from onnxq.sketch import TensorSketch

CANDIDATES: tuple[Observer, ...] = (Mse(), MinMax(), Percentile(), Kl(), Aciq())


@dataclass(frozen=True)
class Auto(Observer):
    """The range of whichever other observer leaves the least squared error in the outputs of the layers that read it.

    They are run on the few feeds that a calibration keeps; where nothing reads the tensor that could be run alone, the
    squared error of its own elements counts.
    """

    name: ClassVar[str] = "auto"

    def choose(self, sketch: TensorSketch, quant_type: QuantType, *, symmetric: bool = False) -> Range:
        """By the sketch alone, it is mse that leaves the least error."""
        return CANDIDATES[0].choose(sketch, quant_type, symmetric=symmetric)

    def choose_for(
        self,
        sketch: TensorSketch,
        quant_type: QuantType,
        arrays: list[np.ndarray],
        readers: list[Callable[[np.ndarray], np.ndarray]],
        *,
        symmetric: bool = False,
    ) -> Range:
        """By the outputs that the readers make of these arrays, rounded, against those they make of them as they are."""
        arrays = [x for x in arrays if np.isfinite(x).all()]
        ranges = [kind.choose(sketch, quant_type, symmetric=symmetric) for kind in CANDIDATES]
        exact = [[read(x) for x in arrays] for read in readers]
        errors = []
        for rmin, rmax in ranges:
            params = params_of_range(rmin, rmax, quant_type, symmetric=symmetric)
            rounded = [fake_quantize(x, params) for x in arrays]
            pairs = [(read(x), y) for read, ys in zip(readers, exact, strict=True) for x, y in zip(rounded, ys, strict=True)]
            errors.append(sum(float(np.square(a - b, dtype=np.float64).sum()) for a, b in pairs))
        return ranges[int(np.argmin(errors))]
