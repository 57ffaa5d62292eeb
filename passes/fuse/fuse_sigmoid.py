"""fuse-sigmoid"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import is_float32
from onnxq.model import Model
from onnxq.passmanager import Pass
from onnxq.pattern import Either, Input, Number, Op, match, substitute

X = Input("x")
_NEGATED = Either(Op("Neg", X), Op("Mul", X, Number(-1)), Op("Sub", Number(0), X))
_DENOMINATOR = Op("Add", Op("Exp", _NEGATED), Number(1))
_HALF_TANH = Op("Tanh", Either(Op("Mul", X, Number(0.5)), Op("Div", X, Number(2))))
SIGMOID = Either(
    Op("Div", Number(1), _DENOMINATOR),
    Op("Reciprocal", _DENOMINATOR),
    Op("Add", Op("Mul", _HALF_TANH, Number(0.5)), Number(0.5)),
    Op("Mul", Op("Add", _HALF_TANH, Number(1)), Number(0.5)),
)
SILU = Op("Div", X, _DENOMINATOR)


@dataclass(frozen=True)
class FuseSigmoid(Pass):
    """Write a sigmoid that is spelled out in small ops as one node, and a SiLU as a sigmoid and a product.

    Given:   %y = Div(1, Add(1, Exp(Neg(%x)))), or its reciprocal form, or 0.5 + 0.5 tanh(x / 2)
             %y = Div(%x, Add(1, Exp(Neg(%x))))
    Result:  %y = Sigmoid(%x)
             %y = Mul(%x, Sigmoid(%x))
    Refused: an inner result has another reader.

    SiLU: Elfwing, Uchibe and Doya, arXiv 1702.03118; Swish with beta 1.
    """

    name: ClassVar[str] = "fuse-sigmoid"

    def apply(self, model: Model) -> int:
        graph, fused = model.graph, 0
        for root in graph.find("Div", "Reciprocal", "Add", "Mul"):
            for pattern in (SIGMOID, SILU):
                found = match(graph, root, pattern)
                if found is None or not is_float32(found.tensors["x"]):
                    continue
                if not found.is_closed(graph):
                    model.refuse(root, "an inner result has another reader")
                    break
                x = found.tensors["x"]
                if pattern is SIGMOID:
                    substitute(graph, found, "Sigmoid", [x])
                else:
                    gate = graph.variable(f"{x.name}_sigmoid", x.dtype, x.shape)
                    graph.insert("Sigmoid", [x], [gate])
                    substitute(graph, found, "Mul", [x, gate])
                fused += 1
                break
        if fused:
            graph.cleanup()
        return fused
