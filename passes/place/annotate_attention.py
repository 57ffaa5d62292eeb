"""annotate-attention"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Graph, Node, Tensor, Variable, is_float32
from onnxq.model import Model, Observed, Reason
from onnxq.numerics import PerTensor
from onnxq.passmanager import Pass

BETWEEN = ("Add", "Sub", "Mul", "Div", "Where", "Clip", "Max")  # scale, mask, relative positions


@dataclass(frozen=True)
class AnnotateAttention(Pass):
    """Recognise attention and say how its two products of activations are computed: in float, or in integers if asked to.

    Given:   %s = MatMul(%q, %k);  %p = Softmax(Add(Mul(%s, scale), %mask)) over the last axis;  %c = MatMul(%p, %v)
             with scale, mask and other terms in any number and order
    Result:  with `integers`: specs: %q, %k, %p and %v observed; both MatMuls read them quantized. Else the ledger says that
             both stay float
    Refused: a factor is constant or not float32; the Softmax is over another axis; a node is excluded by the user.

    Integers are not the default: quantizing both factors of a product at every run costs more than their product gains.
    """

    name: ClassVar[str] = "annotate-attention"
    integers: bool = False

    def apply(self, model: Model) -> int:
        annotated = 0
        for softmax in model.graph.find("Softmax"):
            products = _products(model.graph, softmax)
            if products is None:
                model.refuse(softmax, "it is not between two products of activations")
                continue
            for node in products:
                if node.name in model.excluded | model.unplaced | model.sensitive:
                    continue
                if not self.integers:
                    model.keep_float(node, Reason.ATTENTION)
                elif node.name not in model.planned:
                    _annotate(model, node)
                    annotated += 1
        return annotated


def _products(graph: Graph, softmax: Node) -> tuple[Node, Node] | None:
    """The MatMul of queries and keys and that of probabilities and values."""
    rank = len(softmax.inputs[0].shape or ())
    if softmax.attrs.get("axis", -1) not in (-1, rank - 1):
        return None
    scores, probabilities = _scores(graph, softmax.inputs[0]), softmax.outputs[0]
    guards = [n for n, _ in graph.readers(probabilities) if n is not None and n.op == "Where"]  # 0 for a row of NaN
    sources = [probabilities, *(n.outputs[0] for n in guards)]
    readers = [n for t in sources for n, i in graph.readers(t) if n is not None and n.op == "MatMul" and i == 0]
    if scores is None or len(readers) != 1:
        return None
    products = scores, readers[0]
    return products if all(_is_product(n) for n in products) else None


def _scores(graph: Graph, tensor: Tensor) -> Node | None:
    """The MatMul that a tensor comes from by way of scales, masks and sums with other terms."""
    waiting = [tensor]
    for _ in range(8):  # deeper is no attention
        if not waiting:
            return None
        makers = [m for t in waiting if (m := graph.producer(t)) is not None and not m.domain]
        found = [m for m in makers if m.op == "MatMul" and _is_product(m)]
        if found:
            return found[0] if len(found) == 1 else None
        waiting = [t for m in makers if m.op in BETWEEN for t in m.inputs if isinstance(t, Variable)]
    return None


def _is_product(node: Node) -> bool:
    return all(isinstance(t, Variable) and is_float32(t) for t in node.inputs)


def _annotate(model: Model, node: Node) -> None:
    target = model.target
    for index, tensor in enumerate(node.inputs):
        model.specs.setdefault(tensor.name, Observed(target.activation_type, PerTensor(), target.activation_symmetric))
        model.quantized_inputs.add((node.name, index))
    model.planned.add(node.name)
    model.ledger.pop(node.name, None)
