"""gather-before-dequantize"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Constant, Tensor, value
from onnxq.model import Model, short_name
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class GatherBeforeDequantize(Pass):
    """Look rows up in a table of integers and dequantize those alone, not the whole table at every run.

    Given:   %1 = DequantizeLinear(T_q, s, z) {axis=1};  %2 = Gather(%1, %0)               T_q constant, of rank 2
    Result:  %3 = Gather(T_q, %0);  %2 = DequantizeLinear(%3, s, z) {axis=-1}
    Refused: the table has scales by row or block, or codes of other than 8 bits; the Gather is not by row.
    """

    name: ClassVar[str] = "gather-before-dequantize"

    def apply(self, model: Model) -> int:
        graph, moved = model.graph, 0
        for node in graph.find("Gather"):
            dequantizer = graph.producer(node.inputs[0])
            if (
                dequantizer is None
                or dequantizer.op != "DequantizeLinear"
                or not isinstance(dequantizer.inputs[0], Constant)
            ):
                continue
            codes, scale = dequantizer.inputs[0], value(dequantizer.inputs[1])
            by_column = scale is not None and (scale.ndim == 0 or dequantizer.attrs.get("axis", 1) in (1, -1))
            by_block = scale is None or scale.ndim > 1 or dequantizer.attrs.get("block_size", 0)
            if len(codes.shape or ()) != 2 or not by_column or by_block or node.attrs.get("axis", 0) != 0:
                model.refuse(node, "its table has scales by row or block, or it does not gather rows")
                continue
            if codes.dtype not in (np.int8, np.uint8):
                model.refuse(node, "the runtime gathers no codes of this type")
                continue
            result = node.outputs[0]
            rows: Tensor = graph.variable(f"{short_name(result.name)}_q", codes.dtype, result.shape)
            graph.rewire(node, inputs=[codes, node.inputs[1]], outputs=[rows])
            attrs = {"axis": -1} if scale is not None and scale.ndim else {}
            inputs = [rows, *dequantizer.inputs[1:]]
            name = f"{short_name(result.name)}_DQ"
            graph.insert("DequantizeLinear", inputs, [result], attrs, name=name, domain=dequantizer.domain or "")
            moved += 1
        if moved:
            graph.cleanup()
        return moved
