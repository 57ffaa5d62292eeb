"""insert-float-guards"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Constant, input_at
from onnxq.model import Model
from onnxq.passmanager import Pass

QUANTIZED_BY_THE_RUNTIME = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True)
class InsertFloatGuards(Pass):
    """Keep onnxruntime from quantizing the weight of a layer that is to stay float.

    Given:   %1 = DequantizeLinear(...);  %2 = Conv(%1, W);  %3 = QuantizeLinear(%2, ...)       W float
    Result:  %1 = DequantizeLinear(...);  %4 = Conv(%1, W);  %2 = LeakyRelu(%4) {alpha=1};  %3 = QuantizeLinear(%2, ...)
    Refused: W is dequantized (the layer is integer) or computed; %2 has another reader than the QuantizeLinear.

    From version 1.23 on the runtime gives such a float weight int8 codes of its own, one scale for the tensor. LeakyRelu
    with slope 1 is the identity, is no pattern of the runtime's quantizer, and is fused into the float kernel.
    """

    name: ClassVar[str] = "insert-float-guards"

    def apply(self, model: Model) -> int:
        graph, inserted = model.graph, 0
        for node in graph.find(*QUANTIZED_BY_THE_RUNTIME):
            maker = graph.producer(node.inputs[0])
            reader = graph.sole_consumer(node.outputs[0])
            if not isinstance(input_at(node, 1), Constant) or maker is None or maker.op != "DequantizeLinear":
                continue
            if reader is None or reader.op != "QuantizeLinear":
                continue
            result = node.outputs[0]
            raw = graph.variable(f"{result.name}_unguarded", result.dtype, result.shape)
            graph.rewire(node, outputs=[raw])
            graph.insert("LeakyRelu", [raw], [result], {"alpha": 1.0}, name=f"{node.name}_guard")
            inserted += 1
        if inserted:
            graph.cleanup()
        return inserted
