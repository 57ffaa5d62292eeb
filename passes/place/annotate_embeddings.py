"""annotate-embeddings"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Constant, Node, is_float32
from onnxq.model import PER_CHANNEL_OPSET, Model, Observed
from onnxq.numerics import PerAxis, PerTensor
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class AnnotateEmbeddings(Pass):
    """Let a Gather of rows read its table as integers, with one scale for each column.

    Given:   %1 = Gather(T, %0)                                      T a constant (rows, columns) of float32
    Result:  specs: T observed by column; the Gather reads it quantized (gather-before-dequantize puts the Dequantize behind)
    Refused: the table has fewer than `smallest` elements; it is not of rank 2 or not gathered by row; the opset is below 13,
             where there is no scale by column; it holds infinity; the Gather is excluded by the user.

    Only the file and the memory become smaller: the rows are dequantized after they are looked up.
    """

    name: ClassVar[str] = "annotate-embeddings"
    smallest: int = 4096

    def apply(self, model: Model) -> int:
        annotated = 0
        for node in model.graph.find("Gather"):
            table = node.inputs[0]
            if not isinstance(table, Constant) or not is_float32(table) or len(table.shape or ()) != 2:
                continue
            refusal = self._refusal(model, node, table)
            if refusal is not None:
                model.refuse(node, refusal)
            elif (node.name, 0) not in model.quantized_inputs:
                if model.specs.get(table.name, _spec(model)) != _spec(model):  # a layer's weight, with other scales
                    table = model.graph.constant(f"{node.name}_{table.name}", np.asarray(table.values))
                    model.graph.set_input(node, 0, table)
                model.specs[table.name] = _spec(model)
                model.quantized_inputs.add((node.name, 0))
                annotated += 1
        return annotated

    def _refusal(self, model: Model, node: Node, table: Constant) -> str | None:
        if node.attrs.get("axis", 0) != 0:
            return "it does not gather rows"
        if table.shape[0] * table.shape[1] < self.smallest:
            return "its table is small"
        if not np.isfinite(np.asarray(table.values)).all():
            return "its table holds NaN or infinity"
        if model.graph.opset < PER_CHANNEL_OPSET:
            return "the opset has no scale by column"
        if node.name in model.excluded:
            return "excluded by the user"
        return None


def _spec(model: Model) -> Observed:
    granularity = PerAxis(1) if model.target.weight_per_channel else PerTensor()
    return Observed(model.target.weight_type, granularity, model.target.weight_symmetric)
