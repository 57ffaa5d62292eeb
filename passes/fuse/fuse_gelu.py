"""fuse-gelu"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi, sqrt
from typing import ClassVar

from onnxq.graph import is_float32
from onnxq.model import Model
from onnxq.passmanager import Pass
from onnxq.pattern import Either, Input, Number, Op, Product, match, substitute

GELU_OPSET = 20
CONTRIB = "com.microsoft"
X = Input("x")


_ERF = Op("Erf", Either(Op("Div", X, Number(sqrt(2))), Op("Mul", X, Number(sqrt(0.5)))))
BY_ERF = Either(
    Product(X, Op("Add", _ERF, Number(1)), Number(0.5)),
    Op("Mul", X, Op("Add", Op("Mul", _ERF, Number(0.5)), Number(0.5))),
)
_CUBE = Either(Op("Mul", Op("Pow", X, Number(3)), Number(0.044715)), Product(X, X, X, Number(0.044715)))
_ROOT = Number(sqrt(2 / pi))
_CUBIC = Either(
    Op("Mul", Op("Add", X, _CUBE), _ROOT),
    Product(X, Op("Add", Product(X, X, Number(0.044715)), Number(1)), _ROOT),
    Op("Mul", X, Op("Add", Product(X, X, Number(0.044715 * sqrt(2 / pi))), _ROOT)),
)
_TANH = Op("Tanh", _CUBIC)
BY_TANH = Either(
    Product(X, Op("Add", _TANH, Number(1)), Number(0.5)),
    Op("Mul", X, Op("Add", Op("Mul", _TANH, Number(0.5)), Number(0.5))),
)


@dataclass(frozen=True)
class FuseGelu(Pass):
    """Write a GELU that is spelled out in small ops as one node.

    Given:   %y = Mul(Mul(%x, Add(Erf(Div(%x, 1.414)), 1)), 0.5), or its factors in another order;
             or x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) likewise
    Result:  opset 20: %y = Gelu(%x) {approximate};  before: com.microsoft.Gelu(%x), or FastGelu for the form of tanh
    Refused: an inner result has another reader or is a graph output; before opset 20, the target has ONNX's own ops alone.

    Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv 1606.08415.
    """

    name: ClassVar[str] = "fuse-gelu"

    def apply(self, model: Model) -> int:
        graph, fused = model.graph, 0
        for root in graph.find("Mul"):
            for pattern, approximate, contributed in ((BY_ERF, "none", "Gelu"), (BY_TANH, "tanh", "FastGelu")):
                found = match(graph, root, pattern)
                if found is None or not is_float32(found.tensors["x"]):
                    continue
                if not found.is_closed(graph):
                    model.refuse(root, "an inner result has another reader")
                elif graph.opset < GELU_OPSET and CONTRIB not in model.target.domains:
                    model.refuse(root, "the target has no operator for it")
                elif graph.opset >= GELU_OPSET:
                    substitute(graph, found, "Gelu", [found.tensors["x"]], {"approximate": approximate})
                    fused += 1
                else:
                    substitute(graph, found, contributed, [found.tensors["x"]], domain=CONTRIB)
                    fused += 1
                break
        if fused:
            graph.cleanup()
        return fused
