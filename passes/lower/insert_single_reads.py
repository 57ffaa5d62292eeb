"""insert-single-reads"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Constant, Node
from onnxq.model import Model
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class InsertSingleReads(Pass):
    """Let several float nodes read a dequantized tensor at one place.

    Given:   %1 = DequantizeLinear(%0, s, z);  %2 = Pow(%1, 2);  %3 = Div(%1, %r)                    both in float kernels
    Result:  %4 = LeakyRelu(%1) {alpha=1};  %2 = Pow(%4, 2);  %3 = Div(%4, %r)
    Refused: fewer than two float nodes read it; the tensor is a constant; the target is not the CPU provider.

    onnxruntime gives every reader of a DequantizeLinear one of its own. Several float nodes then dequantize the same codes,
    and a normalization or activation of several nodes is no longer seen to be one. LeakyRelu with slope 1 is the identity.
    """

    name: ClassVar[str] = "insert-single-reads"

    def apply(self, model: Model) -> int:
        graph, inserted = model.graph, 0
        if not model.target.audited:
            return 0
        for dequantizer in [n for n in graph.nodes if n.op == "DequantizeLinear"]:
            if isinstance(dequantizer.inputs[0], Constant):
                continue
            tensor = dequantizer.outputs[0]
            floats = [(n, i) for n, i in graph.readers(tensor) if n is not None and _is_float(model, n)]
            if len({node for node, _ in floats}) < 2:
                continue
            single = graph.variable(f"{tensor.name}_single", tensor.dtype, tensor.shape)
            graph.insert("LeakyRelu", [tensor], [single], {"alpha": 1.0}, name=f"{dequantizer.name}_single")
            for node, index in floats:
                graph.set_input(node, index, single)
            inserted += 1
        if inserted:
            graph.cleanup()
        return inserted


def _is_float(model: Model, node: Node) -> bool:
    """Whether a reader is neither planned to be integer nor a guard, Q or shape of this kind."""
    return node.name not in model.planned and node.op not in ("QuantizeLinear", "LeakyRelu", "Shape")
