"""equalize-gates"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.equalization import Equalizing, Gate, choose_factors, conv_readers, evened, scale_inputs, scale_outputs, scaled_by
from onnxq.graph import Graph, Node, Tensor
from onnxq.model import Model
from onnxq.streams import has_constant_parameters

GATES = ("Sigmoid", "HardSigmoid")


@dataclass(frozen=True)
class EqualizeGates(Equalizing):
    """Even out the channels between two Convs with a HardSwish or SiLU between them.

    Given:   %1 = Conv(%0, W, B);  %2 = HardSwish(%1);  %3 = Conv(%2, V)          statistics of %1 and %2 by channel
    Result:  %4 = Conv(%0, W / s, B / s);  %5 = Mul(%4, HardSigmoid(Mul(%4, s)));  %3 = Conv(%5, V * s)
             s by channel, powers of two: x g(x) / s = (x / s) g(s (x / s))
    Refused: the predicted noise does not fall below `gain` of what it was, or `silu_gain` for a SiLU, which loses its
             integer kernels by it; something else reads %1 or %2; a weight or the bias is computed; its ranges came with
             the model.

    X. Hu et al., "I-LLM", arXiv 2405.17849, section 3.3, has the same for the gates of language models.
    """

    name: ClassVar[str] = "equalize-gates"
    gain: float = 0.8
    silu_gain: float = 0.25

    def looked_at(self, graph: Graph) -> set[str]:
        found = [(n.outputs[0], gated[2]) for n in graph.find("Conv") if (gated := _gated(graph, n.outputs[0]))]
        return {t.name for x, result in found if conv_readers(graph, result) for t in (x, result)}

    def apply(self, model: Model) -> int:
        return sum(self._equalize(model, node) for node in model.graph.find("Conv"))

    def _equalize(self, model: Model, first: Node) -> bool:
        graph, x = model.graph, first.outputs[0]
        gated = _gated(graph, x)
        if gated is None or not has_constant_parameters(first):
            return False
        op, attrs, result, old_gate = gated
        readers = conv_readers(graph, result)
        after, before = (model.channels.get(t.name) for t in (result, x))
        if readers is None or after is None or before is None:
            return False
        gain = self.silu_gain if op == "Sigmoid" else self.gain
        if model.excluded & {first.name, *(r.name for r in readers)}:
            return False
        if model.trained.keys() & {x.name, result.name, first.inputs[1].name, *(r.inputs[1].name for r in readers)}:
            model.refuse(first, "its ranges came with the model")
            return False
        factors = choose_factors([after, before], [(r, after) for r in readers], gain=gain)
        if factors is None:
            model.refuse(first, "its channels are even enough")
            return False
        spatial = len(first.inputs[1].shape) - 2
        by_channel = factors.reshape(1, -1, *[1] * spatial).astype(np.float32)
        scaled = scale_outputs(graph, first, factors)
        argument = graph.variable(f"{x.name}_gate_input", x.dtype, x.shape)
        gate = graph.variable(f"{x.name}_gate", x.dtype, x.shape)
        product = evened(graph, result)
        graph.insert("Mul", [scaled, graph.constant(f"{x.name}_factors", by_channel)], [argument])
        graph.insert(op, [argument], [gate], attrs)
        graph.insert("Mul", [scaled, gate], [product])
        for reader in readers:
            scale_inputs(graph, reader, product, factors)
        same = np.ones(len(factors))
        model.scaled |= {scaled.name: scaled_by(x, factors), product.name: scaled_by(result, factors)}
        model.scaled[argument.name] = scaled_by(x, same)
        if old_gate is None:
            model.gates[gate.name] = Gate(x.name, op, attrs)
        else:
            model.scaled[gate.name] = scaled_by(old_gate, same)
        graph.cleanup()
        return True


def _gated(graph: Graph, x: Tensor) -> tuple[str, dict[str, float], Tensor, Tensor | None] | None:
    """(op, attributes) of the gate g, the tensor x g(x), and g(x) if that is one, where nothing else reads x or the gate."""
    if graph.is_captured(x):
        return None
    readers = [n for n, _ in graph.readers(x)]
    if len(readers) == 1 and readers[0] is not None and readers[0].op == "HardSwish" and not readers[0].domain:
        return "HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, readers[0].outputs[0], None
    if len(readers) != 2 or None in readers:
        return None
    gates = [n for n in readers if n is not None and n.op in GATES and not n.domain]
    products = [n for n in readers if n is not None and n.op == "Mul" and not n.domain]
    if len(gates) != 1 or len(products) != 1 or graph.sole_consumer(gates[0].outputs[0]) is not products[0]:
        return None
    return gates[0].op, dict(gates[0].attrs), products[0].outputs[0], gates[0].outputs[0]
