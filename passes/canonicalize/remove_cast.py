"""remove-cast"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx

from onnxq.model import Model
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class RemoveCast(Pass):
    """Remove Cast to the type that the tensor has.

    Given:   (%0: float32[3])  %1 = Cast(%0) {to=1};  %2 = Relu(%1)
    Result:  %2 = Relu(%0)
    Refused: the type differs or is unknown; both its ends are public.
    """

    name: ClassVar[str] = "remove-cast"

    def apply(self, model: Model) -> int:
        removed = 0
        for node in model.graph.find("Cast"):
            kind, to = node.inputs[0].dtype, node.attrs["to"]
            if kind is None or isinstance(kind, int):
                model.refuse(node, "the type of its input is unknown")
            elif onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind)) != int(_onnx_type(to)):
                model.refuse(node, "it changes the type")
            elif model.graph.bypass(node):
                removed += 1
            else:
                model.refuse(node, "both its ends are public")
        return removed


def _onnx_type(to: object) -> int:
    return int(to) if isinstance(to, (int, np.integer)) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(to))  # type: ignore[arg-type]
