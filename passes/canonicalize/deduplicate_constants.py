"""deduplicate-constants"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Constant
from onnxq.model import Model
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class DeduplicateConstants(Pass):
    """Store once what several initializers hold.

    Given:   %1 = Mul(%0, a);  %2 = Mul(%1, b)           a and b of equal type, shape and bytes
    Result:  %1 = Mul(%0, a);  %2 = Mul(%1, a)
    Refused: the constant has fewer than `smallest` bytes, is a graph output, or is of a type that numpy lacks.
    """

    name: ClassVar[str] = "deduplicate-constants"
    smallest: int = 1024

    def apply(self, model: Model) -> int:
        graph, merged = model.graph, 0
        first: dict[tuple[str, tuple[int, ...], bytes], Constant] = {}  # by type, shape and a hash of the bytes
        for tensor in graph.tensors().values():
            if not isinstance(tensor, Constant) or tensor.nbytes < self.smallest or isinstance(tensor.dtype, int):
                continue
            if graph.is_output(tensor):
                model.refusals.append((tensor.name, "it is a graph output"))
                continue
            values = np.asarray(tensor.values)
            twin = first.setdefault(
                (values.dtype.str, values.shape, hashlib.sha256(np.ascontiguousarray(values).data).digest()), tensor
            )
            if twin is not tensor:
                graph.replace_uses(tensor, twin)
                merged += 1
        return merged
