"""cosine: by the angle between what is represented and what was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.numerics import QuantType
from onnxq.observers.base import Observer, Range
from onnxq.observers.search import best_range
from onnxq.sketch import Histogram, TensorSketch

POINTS = 4  # of a bin: the widest is no wider than two steps of 8 bits


@dataclass(frozen=True)
class Cosine(Observer):
    """The range of greatest cosine similarity between the elements and what they are rounded to.

    sum(x q) / sqrt(sum(x^2) sum(q^2)), over the histogram; the lower and the upper limit are searched apart (Wu et al.,
    EasyQuant, arXiv 2006.16669, which searches scales by the cosine of a layer's outputs).
    """

    name: ClassVar[str] = "cosine"

    def choose(self, sketch: TensorSketch, quant_type: QuantType, *, symmetric: bool = False) -> Range:
        return best_range(angle, sketch, quant_type, symmetric=symmetric)


def angle(bins: Histogram, rmin: np.ndarray, rmax: np.ndarray, levels: int) -> np.ndarray:
    """1 - cosine similarity for each candidate range: rmin, rmax (n,) float64 -> (n,)."""
    inside = (np.arange(POINTS) + 0.5) / POINTS
    x = (bins.lower[:, None] + inside * (bins.upper - bins.lower)[:, None]).reshape(-1)
    count = np.repeat(bins.count / POINTS, POINTS)
    found = np.ones(len(rmin))
    length = np.sqrt((count * x * x).sum())
    for k, (low, high) in enumerate(zip(rmin, rmax, strict=True)):
        scale = max((high - low) / levels, 1e-300)
        zero = np.rint(-low / scale)
        q = np.clip(np.rint(x / scale), -zero, levels - zero) * scale
        norm = np.sqrt((count * q * q).sum()) * length
        found[k] = 1 - (count * x * q).sum() / norm if norm > 0 else 1.0
    return np.round(found, 12)  # among equals the widest is taken
