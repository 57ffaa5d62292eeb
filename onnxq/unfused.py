"""Unfused: which Q and DQ the runtime leaves to run by themselves, and for each the one reason that it has.

Reasons are asked of the graph as it is before Q and DQ are fused: later fusions hide which node it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from onnxq.fusing import DATA, why_float
from onnxq.proto import bodies
from onnxq.wiring import DQ, Q, Wiring


@dataclass(frozen=True)
class Unfused:
    """A Q, a DQ or a pair that runs by itself: the float tensor it stands for, the node beside it, and why."""

    tensor: str
    left: str
    node: str
    op: str
    reason: str


def unfused(fused: onnx.ModelProto, before: onnx.ModelProto, source: onnx.ModelProto) -> tuple[list[Unfused], list[str]]:
    """(what is left and why, the tensors that are left at inputs and outputs of the model, as they must be)."""
    names = _float_names(source)
    early = list(Wiring(before.graph, names).all())
    found: list[Unfused] = []
    boundary: list[str] = []
    for late in Wiring(fused.graph, names).all():
        for node in late.graph.node:
            if node.op_type not in (Q, DQ):
                continue
            reads = node.op_type == DQ
            readers = late.readers.get(node.output[0], [])
            if not reads and readers and all(r.op_type == DQ for r in readers):
                continue  # one row for the pair, by its DQ
            pair = late.made_by(node.input[0], Q) if reads else node
            tensor = node.output[0] if reads and readers else pair.input[0] if pair is not None else ""
            where = next((w for w in early if tensor in w.makers), late)
            beside = _neighbour(where, tensor, reading=reads and bool(readers))
            name = late.label(node.output[0])
            left = "Q" if not reads else "DQ" if pair is None else "Q and DQ"
            if beside is not None:
                found.append(Unfused(name, left, beside.name, beside.op_type, why_float(beside, where)))
            elif late.graph is fused.graph:
                boundary.append(name)
            else:
                found.append(Unfused(name, left, "", "", "at an input or output of a body"))
    return found, boundary


def _float_names(source: onnx.ModelProto) -> dict[str, str]:
    """The tensor that each code tensor, and what a DQ makes of it, stands for in the file."""
    names: dict[str, str] = {}
    for graph in [source.graph, *bodies(source.graph)]:
        for node in graph.node:
            if node.op_type == Q:
                names[node.output[0]] = node.input[0]
            elif node.op_type == DQ:
                names[node.output[0]] = names.get(node.input[0], node.input[0])
    return names


def _neighbour(where: Wiring, tensor: str, *, reading: bool) -> onnx.NodeProto | None:
    """The node that reads a dequantized tensor, or that makes one to be quantized: a layer before its Relu or Clip."""
    if reading:
        return next(iter(where.readers.get(tensor, [])), None)
    maker = where.makers.get(tensor)
    if maker is not None and maker.op_type in ("Relu", "Clip"):
        layer = where.makers.get(maker.input[0])
        if layer is not None and layer.op_type in DATA and len(where.readers.get(layer.output[0], [])) == 1:
            return layer
    return maker
