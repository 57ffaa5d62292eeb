"""fuse-rmsnorm"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxq.graph import Constant, Graph, Node, Tensor, Variable, is_float32
from onnxq.model import Model
from onnxq.passmanager import Pass
from onnxq.pattern import Array, Either, Input, Match, Number, Op, keeps_dimensions, match, reduced_axes, substitute

RMSNORM_OPSET = 23
X = Input("x")
_MEAN = Op("ReduceMean", Either(Op("Pow", X, Number(2)), Op("Mul", X, X)), name="mean")
_SHIFTED = Op("Add", _MEAN, Number("epsilon"))
_ROOT = Op("Sqrt", _SHIFTED)
_INVERSE = Either(Op("Reciprocal", _ROOT), Op("Div", Number(1), _ROOT), Op("Pow", _SHIFTED, Number(-0.5)))
_NORMALIZED = Either(Op("Div", X, _ROOT), Op("Mul", X, _INVERSE))
SCALED = Either(Op("Mul", _NORMALIZED, Array("gamma")), Op("Mul", X, Op("Mul", _INVERSE, Array("gamma"))))
CANONICAL = Op(
    "Mul",
    Op("Div", X, Op("Sqrt", Op("Add", Op("ReduceMean", Op("Pow", X, Number(2)), name="mean"), Number("epsilon")))),
    Array("gamma"),
)


@dataclass(frozen=True)
class FuseRmsnorm(Pass):
    """Write a root-mean-square normalization in the form that onnxruntime fuses.

    Given:   %y = Mul(Mul(%x, Reciprocal(Sqrt(Add(ReduceMean(Mul(%x, %x)), epsilon)))), gamma), over the last axis; or a form
             of the same with Pow, Div, a power of -0.5, gamma multiplied into the reciprocal root; or no gamma
    Result:  opset 23: %y = RMSNormalization(%x, gamma) {axis=-1, epsilon}
             before: %y = Mul(Div(%x, Sqrt(Add(ReduceMean(Pow(%x, 2)), epsilon))), gamma)
    Refused: another axis; gamma is not of its shape; an inner result has another reader; it has that form already.

    Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467.
    """

    name: ClassVar[str] = "fuse-rmsnorm"

    def apply(self, model: Model) -> int:
        graph, fused = model.graph, 0
        for pattern in (SCALED, _NORMALIZED):  # the whole before its part
            before = fused
            for root in graph.find("Mul", "Div"):
                found = match(graph, root, pattern)
                if found is None or not is_float32(found.tensors["x"]):
                    continue
                if graph.opset < RMSNORM_OPSET and _is_canonical(graph, root):
                    continue
                refusal = _refusal(graph, found)
                if refusal is not None:
                    model.refuse(root, refusal)
                    continue
                gamma = graph.constant(f"{root.name}_gamma", _gamma(found))
                if graph.opset >= RMSNORM_OPSET:
                    attrs = {"axis": -1, "epsilon": found.numbers["epsilon"]}
                    substitute(graph, found, "RMSNormalization", [found.tensors["x"], gamma], attrs)
                else:
                    _write_out(graph, found, gamma)
                fused += 1
            if fused > before:
                graph.cleanup()
        return fused


def _is_canonical(graph: Graph, root: Node) -> bool:
    """Whether the node ends the form that onnxruntime fuses, or is the division before its end."""
    reader = graph.sole_consumer(root.outputs[0]) if root.outputs else None
    return any(n is not None and match(graph, n, CANONICAL) is not None for n in (root, reader))


def _gamma(found: Match) -> np.ndarray:
    """(length of the last axis,) float32: ones where the pattern has none."""
    if "gamma" in found.tensors:
        return found.array("gamma").reshape(-1)
    return np.ones(found.tensors["x"].shape[-1], np.float32)


def _refusal(graph: Graph, found: Match) -> str | None:
    if not found.is_closed(graph):
        return "an inner result has another reader"
    x, node = found.tensors["x"], found.nodes["mean"]
    axes = reduced_axes(node)
    if axes != (-1,) and (x.shape is None or axes != (len(x.shape) - 1,)):
        return "it does not normalize over the last axis alone"
    if not keeps_dimensions(node):
        return "its mean drops the axis"
    if "gamma" not in found.tensors:
        known = x.shape is not None and isinstance(x.shape[-1], int)
        return None if known else "it has no gamma, and the length of the last axis is not known"
    gamma = found.array("gamma")
    if gamma.ndim == 0 or gamma.size != gamma.shape[-1]:
        return "its gamma is not a vector"
    return None


def _write_out(graph: Graph, found: Match, gamma: Constant) -> None:
    x, mean, base = found.tensors["x"], found.nodes["mean"], found.root.name

    def made(op: str, *inputs: Tensor, attrs: dict[str, Any] | None = None) -> Variable:
        result = graph.variable(f"{base}_{op}", np.float32)
        graph.insert(op, inputs, [result], attrs)
        return result

    square = made("Pow", x, graph.constant(f"{base}_two", np.array(2, np.float32)))
    average = made("ReduceMean", square, *mean.inputs[1:], attrs=dict(mean.attrs))
    epsilon = graph.constant(f"{base}_epsilon", np.array(found.numbers["epsilon"], np.float32))
    divided = made("Div", x, made("Sqrt", made("Add", average, epsilon)))
    substitute(graph, found, "Mul", [divided, gamma])
