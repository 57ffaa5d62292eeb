"""infer-shapes"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx

from onnxq.graph import Variable
from onnxq.model import Model
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class InferShapes(Pass):
    """Note the type and shape of every tensor for which onnx's shape inference, with data propagation, knows more.

    Given:   (%0: float32[1, 3, 8, 8])  %1 = Relu(%0)          %1 of unknown type
    Result:  the same graph             %1: float32[1, 3, 8, 8]
    Refused: inference fails; what stays unknown is treated as unknown by every pass after.
    """

    name: ClassVar[str] = "infer-shapes"

    def apply(self, model: Model) -> int:
        proto = model.graph.to_light_proto()
        try:
            inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        except Exception as error:  # onnx raises InferenceError and, from C++, plain RuntimeErrors
            model.refusals.append(("model", f"shape inference fails: {str(error).splitlines()[0][:200]}"))
            return 0
        learned = 0
        tensors = model.graph.tensors()
        for info in [*inferred.graph.value_info, *inferred.graph.output]:
            tensor, kind = tensors.get(info.name), info.type.tensor_type
            if not isinstance(tensor, Variable) or not info.type.HasField("tensor_type"):
                continue
            if tensor.dtype is None and kind.elem_type:
                tensor.dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
                learned += 1
            if kind.HasField("shape"):
                shape = [_dimension(d) for d in kind.shape.dim]
                if _known(shape) > _known(tensor.shape):
                    tensor.shape = shape
                    learned += 1
        return learned


def _dimension(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return dim.dim_value
    return dim.dim_param or None


def _known(shape: list[int | str | None] | None) -> int:
    """How much a shape says: nothing, its rank, and a point for each dimension that is a number."""
    return -1 if shape is None else sum(isinstance(d, (int, np.integer)) for d in shape)
