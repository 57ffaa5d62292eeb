"""insert-weight-only"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx

from onnxq.graph import Constant, Node, Tensor, input_at, is_float32
from onnxq.model import Entry, Model, Observed, Reason, State
from onnxq.numerics import Array, PerAxis, QuantType, quantize
from onnxq.passmanager import Pass
from onnxq.weights import weight_params

RECURRENT = ("GRU", "RNN", "LSTM")
LINEAR = ("MatMul", "Gemm", "Conv")
LEFT = {
    None,
    Reason.UNSUPPORTED,
    Reason.SLOWER,
    Reason.IN_BODY,
    Reason.NOT_FUSED,
}  # why a node is float that may have integer weights


@dataclass(frozen=True)
class InsertWeightOnly(Pass):
    """Store the weights of recurrent nodes, and of layers in bodies, in 8 bits where no integer kernel is gained.

    So are those of all layers that the target has no integers for.

    Given:   %1 = GRU(%0, W, R)                                                            W (D, 3H, I), R (D, 3H, H)
    Result:  %2 = Mul(Cast(W_q), W_scale);  %3 = Mul(Cast(R_q), R_scale);  %1 = GRU(%0, %2, %3)      a scale for each row
    Refused: excluded by the user; fewer than `least` bytes; something else reads the weight in float; it is computed.

    The runtime computes Cast and Mul of constants once, when it loads the file: the speed is that of float. Behind a
    DequantizeLinear, which it does not compute then, a GRU takes up to 2.1 times as long.
    """

    name: ClassVar[str] = "insert-weight-only"
    least: int = 4096

    def apply(self, model: Model) -> int:
        wanted = {(id(node), k): node for node, k in _weights(model)}
        made: dict[int, Tensor] = {}
        for node, index in list(_weights(model)):
            tensor = node.inputs[index]
            if not isinstance(tensor, Constant):
                if id(tensor) not in made:  # else another node that shares it was here before
                    model.refuse(node, "its weight is computed at run time")
                continue
            if tensor.nbytes < self.least:
                model.refuse(node, f"its weight has {tensor.nbytes} bytes")
                continue
            readers = [(n, k) for n in dict.fromkeys(tensor.outputs) for k, t in enumerate(n.inputs) if t is tensor]
            if model.graph.is_output(tensor) or any((id(reader), k) not in wanted for reader, k in readers):
                model.refuse(node, f"{tensor.name} is read in float, too")
                continue
            floats = _in_floats(model, tensor, _rows_first(node, index, tensor))
            for reader, k in readers:
                model.graph.set_input(reader, k, floats)
                model.ledger[reader.name] = Entry(reader.op, State.WEIGHT_ONLY)
            made[id(floats)] = floats
        if made:
            model.graph.cleanup()
        return len(made)


def _weights(model: Model) -> Iterator[tuple[Node, int]]:
    """The weights that may be stored so: (node, input index)."""
    without = [op for op in LINEAR if op not in model.target.compute]
    for scope in model.graph.scopes():
        for node in scope.find(*RECURRENT, *(LINEAR if scope is not model.graph else without)):
            entry = model.ledger.get(node.name)
            if node.name in model.excluded or (entry is not None and entry.reason not in LEFT):
                continue
            for index in (1, 2) if node.op in RECURRENT else (1,):
                tensor = input_at(node, index)
                if tensor is not None and is_float32(tensor) and len(tensor.shape or ()) >= 2:
                    yield node, index


def _rows_first(node: Node, index: int, tensor: Tensor) -> tuple[int, ...]:
    """The axes along which each place has a scale of its own."""
    if node.op in RECURRENT:
        return (0, 1)
    return (0,) if node.op == "Conv" or node.attrs.get("transB", 0) else (len(tensor.shape) - 1,)


def _in_floats(model: Model, tensor: Constant, axes: tuple[int, ...]) -> Tensor:
    """The weight as it comes out of 8 bits."""
    weight: Array = np.asarray(tensor.values)
    kept = [weight.shape[a] if a in axes else 1 for a in range(weight.ndim)]
    moved = np.moveaxis(weight, axes, range(len(axes)))
    rows = np.ascontiguousarray(moved).reshape(int(np.prod(kept)), -1)
    params = weight_params(rows, Observed(QuantType.INT8, PerAxis(0), symmetric=True))
    codes = np.moveaxis(quantize(rows, params).reshape(moved.shape), range(len(axes)), axes)
    graph, name = model.graph, tensor.name
    parts = [graph.constant(f"{name}_quantized", codes), graph.constant(f"{name}_scale", params.scale.reshape(kept))]
    cast = graph.variable(f"{name}_cast", np.float32, weight.shape)
    floats = graph.variable(f"{name}_in_floats", np.float32, weight.shape)
    graph.insert("Cast", [parts[0]], [cast], {"to": onnx.TensorProto.FLOAT})
    graph.insert("Mul", [cast, parts[1]], [floats], name=f"{name}_in_floats")
    return floats
