"""infer-shapes"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np
import onnx

from onnxq.graph import Node, Variable, input_at, value
from onnxq.model import Model
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class InferShapes(Pass):
    """Note the type and shape of every tensor for which onnx's shape inference, with data propagation, knows more.

    Given:   (%0: float32[1, 3, 8, 8])  %1 = Relu(%0)          %1 of unknown type
    Result:  the same graph             %1: float32[1, 3, 8, 8]
    Given:   (%0: float32[64, 8])  %1 = Slice(%0, 0, %n) along axis 0;  %3 = Reshape(%2: float32[N, 4, 2], [N, -1])
    Result:  the same graph        %1: float32[?, 8], %3: float32[N, 8]: two that onnx's inference leaves out
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
        for node in model.graph.find(*BEYOND_ONNX):
            shape = BEYOND_ONNX[node.op](node)
            if shape is not None and _known(shape) > _known(node.outputs[0].shape):
                node.outputs[0].shape = shape
                learned += 1
        return learned


def _after_slice(node: Node) -> list[int | str | None] | None:
    """Axes that a Slice leaves alone keep their length, whatever its bounds."""
    source, axes = node.inputs[0].shape, value(input_at(node, 3))
    if source is None or axes is None:
        return None
    cut = {int(a) % len(source) for a in axes}
    now = node.outputs[0].shape or [None] * len(source)
    return [now[k] if k in cut else length for k, length in enumerate(source)]


def _after_reshape(node: Node) -> list[int | str | None] | None:
    """The one unknown length of a result follows from the number of elements, where symbols cancel."""
    before, after = node.inputs[0].shape, node.outputs[0].shape
    if before is None or after is None:
        return None
    left = [d for d in before if not isinstance(d, int)]
    unknown = []
    for k, length in enumerate(after):
        if isinstance(length, str) and length in left:
            left.remove(length)
        elif not isinstance(length, int):
            unknown.append(k)
    counts = [prod(d for d in shape if isinstance(d, int)) for shape in (before, after)]
    if left or len(unknown) != 1 or not counts[1] or counts[0] % counts[1]:
        return None
    return [counts[0] // counts[1] if k in unknown else length for k, length in enumerate(after)]


BEYOND_ONNX = {"Slice": _after_slice, "Reshape": _after_reshape}


def _dimension(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return dim.dim_value
    return dim.dim_param or None


def _known(shape: list[int | str | None] | None) -> int:
    """How much a shape says: nothing, its rank, and a point for each dimension that is a number."""
    return -1 if shape is None else sum(isinstance(d, (int, np.integer)) for d in shape)
