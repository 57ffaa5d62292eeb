"""fuse-layernorm"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Tensor, is_float32
from onnxq.model import Model
from onnxq.normalization import AFFINE, NORMALIZED, SCALED, normalized_axes
from onnxq.passmanager import Pass
from onnxq.pattern import Match, match, substitute

LAYERNORM_OPSET = 17


@dataclass(frozen=True)
class FuseLayernorm(Pass):
    """Write a layer normalization that is spelled out in small ops as one node.

    Given:   %m = ReduceMean(%x) {axes=[-1]};  %d = Sub(%x, %m);  %v = ReduceMean(Pow(%d, 2)) {axes=[-1]}
             %y = Add(Mul(Div(%d, Sqrt(Add(%v, epsilon))), gamma), beta)
             or a form of the same with ReduceSum and a division, with Mul(%d, %d), with a reciprocal root, with the variance
             E[x^2] - E[x]^2, with gamma multiplied into the reciprocal root; with no beta or neither
    Result:  %y = LayerNormalization(%x, gamma, beta) {axis=-1, epsilon}
    Refused: the opset is below 17; the axes are not the last ones, or those of the two means differ; gamma or beta are not
             of the shape of these axes; an inner result has another reader.

    Ba, Kiros and Hinton, Layer Normalization, arXiv 1607.06450.
    """

    name: ClassVar[str] = "fuse-layernorm"

    def apply(self, model: Model) -> int:
        graph, fused = model.graph, 0
        if graph.opset < LAYERNORM_OPSET:
            return 0
        for pattern in (AFFINE, SCALED, NORMALIZED):  # the whole before its parts
            before = fused
            for root in graph.find("Add", "Mul", "Div"):
                found = match(graph, root, pattern)
                if found is None or not is_float32(found.tensors["x"]):
                    continue
                refusal = _refusal(graph, found)
                if refusal is not None:
                    model.refuse(root, refusal)
                    continue
                _fuse(graph, found)
                fused += 1
            if fused > before:
                graph.cleanup()
        return fused


def _refusal(graph: Graph, found: Match) -> str | None:
    if not found.is_closed(graph):
        return "an inner result has another reader"
    axes = _last_axes(found)
    if axes is None:
        return "it does not normalize over the last axes"
    shape = found.tensors["x"].shape
    for name in ("gamma", "beta"):
        if name in found.tensors and _fitted(found.array(name), axes, shape) is None:
            return f"its {name} is not of the shape of the normalized axes"
    if "gamma" not in found.tensors and (shape is None or not all(isinstance(d, int) for d in shape[axes:])):
        return "it has no gamma, and the length of the normalized axes is not known"
    if not found.numbers.get("epsilon", 0.0) > 0:
        return "its epsilon is not positive"
    return None


def _last_axes(found: Match) -> int | None:
    """The first normalized axis where all after it are normalized too, counted from the end: -1, -2 ..."""
    axes = normalized_axes(found)
    return axes[0] if axes is not None and axes == tuple(range(-len(axes), 0)) else None


def _fitted(parameter: np.ndarray, axes: int, shape: list[object] | None) -> np.ndarray | None:
    """gamma or beta with one dimension for each normalized axis; None where it cannot have them."""
    wanted = -axes
    dims = list(parameter.shape)
    while len(dims) > wanted and dims[0] == 1:
        dims.pop(0)
    if len(dims) != wanted:
        return None
    if shape is not None and any(isinstance(s, int) and s != d for s, d in zip(shape[axes:], dims, strict=True)):
        return None
    if shape is None and 1 in dims:
        return None
    return parameter.reshape(dims)


def _fuse(graph: Graph, found: Match) -> None:
    x, axes = found.tensors["x"], _last_axes(found)
    assert axes is not None
    inputs: list[Tensor] = [x]
    for name in ("gamma", "beta"):
        if name not in found.tensors:
            if name == "gamma":
                inputs.append(graph.constant(f"{x.name}_gamma", np.ones(x.shape[axes:], np.float32)))
            continue
        tensor, fitted = found.tensors[name], _fitted(found.array(name), axes, x.shape)
        assert fitted is not None
        inputs.append(tensor if fitted.shape == found.array(name).shape else graph.constant(tensor.name, fitted))
    substitute(graph, found, "LayerNormalization", inputs, {"axis": axes, "epsilon": found.numbers["epsilon"]})
