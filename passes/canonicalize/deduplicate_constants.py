"""deduplicate-constants"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar
from zlib import crc32

import numpy as np

from onnxq.graph import Constant
from onnxq.model import Model
from onnxq.passmanager import Pass

CHECKED = 4096  # bytes: what differs mostly differs there, and only what does not is compared whole


@dataclass(frozen=True)
class DeduplicateConstants(Pass):
    """Store once what several initializers hold.

    Given:   %1 = Mul(%0, a);  %2 = Mul(%1, b)           a and b of equal type, shape and bytes
    Result:  %1 = Mul(%0, a);  %2 = Mul(%1, a)
    Refused: the constant has fewer than `smallest` bytes, is a graph output, or is of strings or of a type that numpy lacks.
    """

    name: ClassVar[str] = "deduplicate-constants"
    smallest: int = 1024

    def apply(self, model: Model) -> int:
        graph, merged = model.graph, 0
        different = defaultdict[tuple[str, tuple[int, ...], int], list[Constant]](list)  # by type, shape and checksum
        for tensor in graph.tensors().values():
            if not isinstance(tensor, Constant) or tensor.nbytes < self.smallest or isinstance(tensor.dtype, int):
                continue
            if graph.is_output(tensor):
                model.refusals.append((tensor.name, "it is a graph output"))
                continue
            values = np.asarray(tensor.values)
            if values.dtype.kind == "O":  # strings
                continue
            content = _bytes(values)
            alike = different[values.dtype.str, values.shape, crc32(content[:CHECKED].tobytes())]
            twin = next((other for other in alike if np.array_equal(_bytes(np.asarray(other.values)), content)), None)
            if twin is None:
                alike.append(tensor)
            else:
                graph.replace_uses(tensor, twin)
                merged += 1
        return merged


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
