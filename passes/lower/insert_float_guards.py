"""insert-float-guards"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Constant, Tensor, input_at
from onnxq.model import Model
from onnxq.passmanager import Pass

QUANTIZED_BY_THE_RUNTIME = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True)
class InsertFloatGuards(Pass):
    """Keep onnxruntime from quantizing the weight of a layer that is to stay float.

    Given:   %1 = DequantizeLinear(...);  %2 = Conv(%1, W);  %3 = QuantizeLinear(%2, ...)       W float
    Result:  %1 = DequantizeLinear(...);  %4 = Conv(%1, W);  %2 = LeakyRelu(%4) {alpha=1};  %3 = QuantizeLinear(%2, ...)
    Refused: W is dequantized (the layer is integer) or computed; %2 has another reader than the QuantizeLinear.

    From version 1.23 on the runtime gives such a float weight int8 codes of its own, one scale for the tensor, and it sees
    through what moves data (pools, reshapes) on either side and through Relu and Clip. LeakyRelu with slope 1 is the
    identity, is no pattern of the runtime's quantizer, and is fused into a float Conv's kernel.
    """

    name: ClassVar[str] = "insert-float-guards"

    def apply(self, model: Model) -> int:
        graph, inserted = model.graph, 0
        for node in graph.find(*QUANTIZED_BY_THE_RUNTIME):
            if not isinstance(input_at(node, 1), Constant):
                continue
            if not _comes_from(model, node.inputs[0]) or not _goes_to(model, node.outputs[0]):
                continue
            result = node.outputs[0]
            raw = graph.variable(f"{result.name}_unguarded", result.dtype, result.shape)
            graph.rewire(node, outputs=[raw])
            graph.insert("LeakyRelu", [raw], [result], {"alpha": 1.0}, name=f"{node.name}_guard")
            inserted += 1
        if inserted:
            graph.cleanup()
        return inserted


def _comes_from(model: Model, tensor: Tensor) -> bool:
    """Whether it is dequantized, there or before nodes that the runtime moves a DequantizeLinear over."""
    maker = model.graph.producer(tensor)
    while maker is not None and maker.op in model.target.pass_through and not maker.domain:
        maker = model.graph.producer(maker.inputs[0])
    return maker is not None and maker.op == "DequantizeLinear"


def _goes_to(model: Model, tensor: Tensor) -> bool:
    """Whether its only reader quantizes it, there or after nodes that the runtime drops or moves a QuantizeLinear over."""
    passed = model.target.pass_through | model.target.absorbed
    readers = [n for n, _ in model.graph.readers(tensor) if n is not None]
    while len(readers) == 1 and readers[0].op in passed and not readers[0].domain:
        readers = [n for n, _ in model.graph.readers(readers[0].outputs[0]) if n is not None]
    return len(readers) == 1 and readers[0].op == "QuantizeLinear"
