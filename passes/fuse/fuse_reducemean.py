"""fuse-reducemean"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node, input_at, is_float32, value
from onnxq.model import Model
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class FuseReducemean(Pass):
    """Write the mean over all spatial axes as GlobalAveragePool, which has an integer kernel.

    Given:   (%0: float32[N, C, H, W])  %1 = ReduceMean(%0, [2, 3]) {keepdims=1}
    Result:  %1 = GlobalAveragePool(%0)
    Given:   keepdims=0
    Result:  %2 = GlobalAveragePool(%0);  %1 = Flatten(%2)
    Refused: the axes are computed, or are not exactly the spatial ones; the rank is unknown or below 3; %0 is not float32;
             it is a mean or variance of a normalization, which runtimes know by its ReduceMean.
    """

    name: ClassVar[str] = "fuse-reducemean"

    def apply(self, model: Model) -> int:
        graph, fused = model.graph, 0
        for node in graph.find("ReduceMean"):
            shape = node.inputs[0].shape
            axes = _axes(node)
            if shape is None or len(shape) < 3:
                model.refuse(node, "the rank of its input is unknown, or below 3")
                continue
            if axes is None or sorted(a % len(shape) for a in axes) != list(range(2, len(shape))):
                model.refuse(node, "its axes are not the spatial ones")
                continue
            if not is_float32(node.inputs[0]):
                model.refuse(node, "its input is not known to be float32")
                continue
            if _normalizes(graph, node):
                model.refuse(node, "it is part of a normalization")
                continue
            source, result = node.inputs[0], node.outputs[0]
            keep = node.attrs.get("keepdims", 1)
            graph.remove(node)
            if keep:
                graph.insert("GlobalAveragePool", [source], [result], name=node.name)
            else:
                pooled = graph.variable(f"{result.name}_pooled", result.dtype, [*shape[:2], *[1] * (len(shape) - 2)])
                graph.insert("GlobalAveragePool", [source], [pooled], name=node.name)
                graph.insert("Flatten", [pooled], [result], {"axis": 1}, name=f"{node.name}_flatten")
            fused += 1
        if fused:
            graph.cleanup()
        return fused


def _normalizes(graph: Graph, node: Node) -> bool:
    """Whether the mean is subtracted from what it is the mean of, or is one of squares."""
    source, maker = node.inputs[0], graph.producer(node.inputs[0])
    if any(r.op == "Sub" and r.inputs[0] is source for r in node.outputs[0].outputs):
        return True
    return maker is not None and (maker.op == "Pow" or (maker.op == "Mul" and maker.inputs[0] is maker.inputs[1]))


def _axes(node: Node) -> list[int] | None:
    if "axes" in node.attrs:
        return [int(a) for a in node.attrs["axes"]]
    axes = value(input_at(node, 1))
    return None if axes is None else [int(a) for a in np.asarray(axes).reshape(-1)]
