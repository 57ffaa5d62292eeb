"""fuse-conv-affine"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Node, input_at, is_float32, value
from onnxq.model import Model
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class FuseConvAffine(Pass):
    """Fold an Add or a Mul of one constant for each channel into the Conv or ConvTranspose before it.

    Given:   %1 = Conv(%0, W, B);  %2 = Add(%1, float32[M, 1, 1])
    Result:  %2 = Conv(%0, W, B + c)
    Given:   %1 = Conv(%0, W, B);  %2 = Mul(%1, float32[M, 1, 1])
    Result:  %2 = Conv(%0, W * c, B * c)
    Refused: %1 has another consumer or is a graph output; the constant varies along another axis; W or B is computed.
    """

    name: ClassVar[str] = "fuse-conv-affine"

    def apply(self, model: Model) -> int:
        graph, fused = model.graph, 0
        for node in graph.find("Add", "Mul"):
            for side in (0, 1):
                conv, constant = graph.producer(node.inputs[side]), value(node.inputs[1 - side])
                if conv is None or conv.op not in ("Conv", "ConvTranspose") or conv.domain or constant is None:
                    continue
                weight, bias = value(input_at(conv, 1)), value(input_at(conv, 2))
                if weight is None or not is_float32(conv.inputs[1]) or (bias is None and input_at(conv, 2) is not None):
                    model.refuse(node, f"the weight or bias of {conv.name} is computed")
                elif graph.sole_consumer(conv.outputs[0]) is not node:
                    model.refuse(node, f"the output of {conv.name} is used elsewhere")
                elif (by_channel := _by_channel(constant, _channels(conv, weight), weight.ndim)) is None:
                    model.refuse(node, "its constant varies along another axis than the channels")
                else:
                    _fold(model, conv, node, weight, bias, by_channel)
                    fused += 1
                break
        return fused


def _channels(conv: Node, weight: np.ndarray) -> int:
    """Output channels: a ConvTranspose's weight is (C, M / group, kernel...)."""
    return weight.shape[0] if conv.op == "Conv" else weight.shape[1] * int(conv.attrs.get("group", 1))


def _by_channel(constant: np.ndarray, channels: int, rank: int) -> np.ndarray | None:
    """The constant as (M,) float64; None where it is not one number for each channel of (N, M, spatial...)."""
    if constant.ndim > rank or constant.size not in (1, channels):
        return None
    padded = (1,) * (rank - constant.ndim) + constant.shape
    if constant.size > 1 and padded[1] != channels:
        return None
    return np.broadcast_to(constant.astype(np.float64).reshape(-1), (channels,))


def _scaled(conv: Node, weight: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The weight with each output channel times its factor."""
    ones = [1] * (weight.ndim - 2)
    if conv.op == "Conv":
        return weight * c.reshape(-1, 1, *ones)
    groups = int(conv.attrs.get("group", 1))
    by_group = weight.reshape(groups, -1, *weight.shape[1:]) * c.reshape(groups, 1, -1, *ones)
    return by_group.reshape(weight.shape)


def _fold(model: Model, conv: Node, node: Node, weight: np.ndarray, bias: np.ndarray | None, c: np.ndarray) -> None:
    graph = model.graph
    old = np.zeros(len(c)) if bias is None else bias.astype(np.float64)
    new = old + c if node.op == "Add" else old * c
    if node.op == "Mul":
        scaled = _scaled(conv, weight, c)
        model.scale_weight(conv, scaled.astype(weight.dtype), c, 0 if conv.op == "Conv" else None)
    if node.op == "Add" or bias is not None:
        graph.set_input(conv, 2, graph.constant(f"{conv.name}_bias", new.astype(weight.dtype)))
    result = node.outputs[0]
    graph.remove(node)
    graph.rewire(conv, outputs=[result])
