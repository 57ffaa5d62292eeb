"""fuse-instancenorm"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Tensor, is_float32
from onnxq.model import Model
from onnxq.normalization import AFFINE, NORMALIZED, normalized_axes
from onnxq.passmanager import Pass
from onnxq.pattern import Match, match, substitute


@dataclass(frozen=True)
class FuseInstancenorm(Pass):
    """Write an instance normalization, or the core of a group normalization, that is spelled out in small ops as one node.

    Given:   %d = Sub(%x, ReduceMean(%x) {axes=[2, 3]});  %v = ReduceMean(Pow(%d, 2)) {axes=[2, 3]}
             %y = Div(%d, Sqrt(Add(%v, epsilon)))              with a scale and shift by channel or without; or a form of the
             same that fuse-layernorm lists; %x of rank 4 or more, or of rank 3 and made by a Reshape into groups
    Result:  %y = InstanceNormalization(%x, scale, shift) {epsilon}
    Refused: the axes are not all but the first two; the number of channels is not known; an inner result has another reader.

    Ulyanov, Vedaldi and Lempitsky, Instance Normalization, arXiv 1607.08022; Wu and He, Group Normalization, 1803.08494.
    """

    name: ClassVar[str] = "fuse-instancenorm"

    def apply(self, model: Model) -> int:
        graph, fused = model.graph, 0
        for pattern in (AFFINE, NORMALIZED):
            before = fused
            for root in graph.find("Add", "Mul", "Div"):
                found = match(graph, root, pattern)
                if found is None or not is_float32(found.tensors["x"]):
                    continue
                parameters = _parameters(graph, found)
                if parameters is None:
                    model.refuse(root, "it does not normalize each channel of each sample by itself")
                    continue
                if not found.is_closed(graph):
                    model.refuse(root, "an inner result has another reader")
                    continue
                constants: list[Tensor] = [graph.constant(f"{root.name}_{n}", p) for n, p in parameters.items()]
                attrs = {"epsilon": found.numbers["epsilon"]}
                substitute(graph, found, "InstanceNormalization", [found.tensors["x"], *constants], attrs)
                fused += 1
            if fused > before:
                graph.cleanup()
        return fused


def _parameters(graph: Graph, found: Match) -> dict[str, np.ndarray] | None:
    """Scale and shift, one for each channel; None where the pattern is not an instance normalization."""
    x = found.tensors["x"]
    shape = list(x.shape or [])
    rank = len(shape)
    if rank < 3 or not isinstance(shape[1], int) or normalized_axes(found) != tuple(range(2 - rank, 0)):
        return None
    channels = shape[1]
    if "gamma" not in found.tensors:
        maker = graph.producer(x)
        if rank == 3 and (maker is None or maker.op != "Reshape"):
            return None  # rows of a sequence: fuse-layernorm's
        return {"scale": np.ones(channels, np.float32), "shift": np.zeros(channels, np.float32)}
    by_channel = {}
    for name, parameter in (("scale", found.array("gamma")), ("shift", found.array("beta"))):
        wanted = (channels, *[1] * (rank - 2))
        if parameter.shape not in (wanted, (1, *wanted)):
            return None
        by_channel[name] = parameter.reshape(-1)
    return by_channel
