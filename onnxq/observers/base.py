"""What an observer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from onnxq.numerics import QuantType
from onnxq.sketch import TensorSketch

Range = tuple[float, float]


@dataclass(frozen=True)
class Observer(ABC):
    """Chooses a range. The result always holds 0 once parameters are made of it."""

    name: ClassVar[str]

    @abstractmethod
    def choose(self, sketch: TensorSketch, quant_type: QuantType, *, symmetric: bool = False) -> Range:
        """(rmin, rmax) for a tensor with this sketch; the sketch has seen at least one finite element."""
