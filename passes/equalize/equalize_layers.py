"""equalize-layers"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.equalization import choose_factors, conv_readers, has_constant_parameters, scale_inputs, scale_outputs
from onnxq.graph import Constant, Node
from onnxq.model import EQUALIZED, Model
from onnxq.passmanager import Pass

HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu")  # f(x / s) = f(x) / s for every s > 0


@dataclass(frozen=True)
class EqualizeLayers(Pass):
    """Even out the channels between two Convs, with or without a Relu, LeakyRelu or PRelu between them.

    Given:   %1 = Conv(%0, W, B);  %2 = Relu(%1);  %3 = Conv(%2, V)          statistics of %2 by channel
    Result:  %4 = Conv(%0, W / s, B / s);  %5 = Relu(%4);  %3 = Conv(%5, V * s)        s by channel, powers of two
    Refused: the predicted noise does not fall below `gain` of what it was; something else reads %1 or %2; a weight or the
             bias is computed; its ranges came with the model.
    """

    name: ClassVar[str] = "equalize-layers"
    gain: float = 0.8

    def apply(self, model: Model) -> int:
        if model.calibration is None:
            return 0
        return sum(self._equalize(model, node) for node in model.graph.find("Conv"))

    def _equalize(self, model: Model, first: Node) -> bool:
        graph = model.graph
        activation = graph.sole_consumer(first.outputs[0])
        if activation is None or not _is_homogeneous(activation):
            activation = None
        tensor = first.outputs[0] if activation is None else activation.outputs[0]
        readers = conv_readers(graph, tensor)
        sketch = model.calibration.sketches.get(tensor.name) if model.calibration else None
        if readers is None or sketch is None or sketch.channels is None or not has_constant_parameters(first):
            return False
        if model.excluded & {first.name, *(r.name for r in readers)}:
            return False
        if model.trained.keys() & {tensor.name, first.inputs[1].name, *(r.inputs[1].name for r in readers)}:
            model.refuse(first, "its ranges came with the model")
            return False
        factors = choose_factors(sketch.channels, readers, gain=self.gain)
        if factors is None:
            model.refuse(first, "its channels are even enough")
            return False
        scaled = scale_outputs(graph, first, factors)
        if activation is not None:
            result = graph.variable(f"{tensor.name}{EQUALIZED}", tensor.dtype, tensor.shape)
            graph.rewire(activation, inputs=[scaled, *activation.inputs[1:]], outputs=[result])
            scaled = result
        for reader in readers:
            scale_inputs(graph, reader, scaled, factors)
        return True


def _is_homogeneous(node: Node) -> bool:
    return node.op in HOMOGENEOUS and not node.domain and (node.op != "PRelu" or isinstance(node.inputs[1], Constant))
