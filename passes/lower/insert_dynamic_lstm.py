"""insert-dynamic-lstm"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Constant, Node, Tensor, Variable, input_at, is_float32, value
from onnxq.model import Model, Observed, Reason
from onnxq.numerics import Array, PerAxis, QuantType, quantize
from onnxq.passmanager import Pass
from onnxq.weights import weight_params

DOMAIN = "com.microsoft"
PEEPHOLES = 7  # the input of LSTM that holds them


@dataclass(frozen=True)
class InsertDynamicLstm(Pass):
    """Let an LSTM of constant weights quantize its input and its state at every step.

    Given:   %1, %2, %3 = LSTM(%0, W, R, B)                                                W (D, 4H, I), R (D, 4H, H)
    Result:  %1, %2, %3 = com.microsoft.DynamicQuantizeLSTM(%0, W_q, R_q, B, ..., W_scale, W_zero_point, R_scale, ...)
             W_q (D, I, 4H) and R_q (D, H, 4H) with a scale for each gate of each unit; uint8 where the target saturates
    Refused: excluded by the user; the target has no such kernel; a weight is computed; it has peepholes or another layout;
             fewer than `least` units, where integers gain nothing (tests/benchmarks/lstm.py: slower than float at 64 units,
             faster from 128 on).
    """

    name: ClassVar[str] = "insert-dynamic-lstm"
    least: int = 96

    def apply(self, model: Model) -> int:
        inserted, made = 0, dict[tuple[str, int], list[Constant]]()
        for node in [n for scope in model.graph.scopes() for n in scope.find("LSTM")]:
            refusal = self._refusal(model, node)
            if refusal is not None:
                model.keep_float(node, *refusal)
                model.refuse(node, refusal[1] or refusal[0].value)
                continue
            _lower(model, node, made)
            inserted += 1
        return inserted

    def _refusal(self, model: Model, node: Node) -> tuple[Reason, str] | None:
        if node.name in model.excluded:
            return Reason.EXCLUDED, ""
        if not model.target.dynamic or DOMAIN not in model.target.domains:
            return Reason.UNSUPPORTED, ""
        weights = [value(input_at(node, k)) for k in (1, 2)]
        if any(w is None for w in weights):
            return Reason.NO_CONSTANT_WEIGHT, ""
        if not is_float32(node.inputs[0]) or not all(is_float32(t) for t in node.inputs[1:3]):
            return Reason.NOT_FLOAT32, f"{node.inputs[0].name} is {node.inputs[0].dtype}"
        if input_at(node, PEEPHOLES) is not None or node.attrs.get("layout", 0):
            return Reason.UNSUPPORTED, "it has peepholes or another layout"
        if node.inputs[2].shape[-1] < self.least:
            return Reason.SLOWER, f"it has {node.inputs[2].shape[-1]} units"
        return None


def _lower(model: Model, node: Node, made: dict[tuple[str, int], list[Constant]]) -> None:
    """`made` are the weights that are quantized already: several nodes may share one."""
    parts = []
    for tensor in node.inputs[1:3]:
        key = (tensor.name, id(tensor))
        if key not in made:
            made[key] = _quantized(model, tensor)
        parts.append(made[key])
    empty: list[Tensor] = [Variable.empty() for _ in range(PEEPHOLES + 1)]
    inputs = [input_at(node, k) or empty[k] for k in range(PEEPHOLES + 1)]
    inputs[1], inputs[2] = parts[0][0], parts[1][0]
    node.op, node.domain = "DynamicQuantizeLSTM", DOMAIN
    node.attrs = {k: v for k, v in node.attrs.items() if k != "layout"}
    model.graph.rewire(node, inputs=[*inputs, *parts[0][1:], *parts[1][1:]])


def _quantized(model: Model, tensor: Tensor) -> list[Constant]:
    """Codes with the gates last, scale and zero point of a weight (D, 4H, I)."""
    weight: Array = np.asarray(value(tensor))
    directions, gates, size = weight.shape
    kind = QuantType.UINT8 if model.target.saturates else model.target.weight_type
    rows = weight.reshape(-1, size)
    params = weight_params(rows, Observed(kind, PerAxis(0), symmetric=True))
    codes = quantize(rows, params).reshape(directions, gates, size).transpose(0, 2, 1)
    arrays = {
        "quantized": np.ascontiguousarray(codes),
        "scale": params.scale.reshape(directions, gates),
        "zero_point": params.zero_point.reshape(directions, gates),
    }
    return [model.graph.constant(f"{tensor.name}_{part}", values) for part, values in arrays.items()]
