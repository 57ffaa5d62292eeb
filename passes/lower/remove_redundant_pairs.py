"""remove-redundant-pairs"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Node, value
from onnxq.model import Model
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class RemoveRedundantPairs(Pass):
    """Remove a DequantizeLinear and a QuantizeLinear after it that give back the same codes.

    Given:   %1 = DequantizeLinear(%0, s, z);  %2 = QuantizeLinear(%1, s, z);  %3 = DequantizeLinear(%2, s, z)
    Result:  %3 = DequantizeLinear(%0, s, z)
    Refused: scale, zero point or type differ (the second then rounds or clips); %2 is a graph output.

    The reverse pair, Q and then DQ, is what rounds a tensor to its grid: it is never redundant.
    """

    name: ClassVar[str] = "remove-redundant-pairs"

    def apply(self, model: Model) -> int:
        graph, removed = model.graph, 0
        for quantizer in [n for n in graph.nodes if n.op == "QuantizeLinear"]:
            dequantizer = graph.producer(quantizer.inputs[0])
            if dequantizer is None or dequantizer.op != "DequantizeLinear":
                continue
            if not _same_parameters(dequantizer, quantizer):
                model.refuse(quantizer, "its parameters are not those of the DequantizeLinear before it")
            elif graph.is_output(quantizer.outputs[0]):
                model.refuse(quantizer, "its codes are a graph output")
            else:
                graph.replace_uses(quantizer.outputs[0], dequantizer.inputs[0])
                graph.remove(quantizer)
                removed += 1
        if removed:
            graph.cleanup()
        return removed


def _same_parameters(a: Node, b: Node) -> bool:
    if len(a.inputs) != len(b.inputs) or a.attrs.get("axis", 1) != b.attrs.get("axis", 1):
        return False
    if a.attrs.get("block_size", 0) != b.attrs.get("block_size", 0) or "output_dtype" in b.attrs:
        return False
    if len(a.inputs) < 3 and a.inputs[0].dtype != np.uint8:
        return False  # without a zero point a QuantizeLinear gives uint8
    pairs = [(value(x), value(y)) for x, y in zip(a.inputs[1:], b.inputs[1:], strict=True)]
    return all(x is not None and y is not None and x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)
