"""Wiring: who makes and who reads each tensor of a graph as the file has it, and what its Q and DQ hold."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import TensorProto

Q, DQ = "QuantizeLinear", "DequantizeLinear"


class Wiring:
    """Who makes and who reads each tensor of one graph; constants of outer scopes too."""

    def __init__(self, graph: onnx.GraphProto, names: Mapping[str, str], outer: Wiring | None = None) -> None:
        self.graph, self.names = graph, names
        self.makers = {o: n for n in graph.node for o in n.output if o}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        self.inputs = {i.name for i in graph.input}
        self.outputs = {o.name for o in graph.output}
        self.constants: dict[str, TensorProto] = dict(outer.constants) if outer else {}
        self.constants |= {t.name: t for t in graph.initializer}
        self.bodies: list[Wiring] = []
        for node in graph.node:
            inner = [Wiring(b, names, self) for a in node.attribute for b in ([a.g] if a.HasField("g") else a.graphs)]
            captured = {name for w in inner for part in w.all() for name in [*part.readers, *part.outputs]}
            for name in {*node.input, *captured} - {""}:
                self.readers.setdefault(name, []).append(node)
            self.bodies += inner

    def all(self) -> Iterator[Wiring]:
        yield self
        for body in self.bodies:
            yield from body.all()

    def made_by(self, name: str, op: str) -> onnx.NodeProto | None:
        maker = self.makers.get(name)
        return maker if maker is not None and maker.op_type == op else None

    def label(self, name: str) -> str:
        """The float tensor of the file that this one is, or holds the codes of."""
        dequantize = self.made_by(name, DQ)
        codes = name if dequantize is None else dequantize.input[0]
        quantize = self.made_by(codes, Q)
        return self.names.get(name) or self.names.get(codes) or (codes if quantize is None else quantize.input[0])

    def parameter(self, node: onnx.NodeProto, index: int) -> np.ndarray | None:
        """Scale (1) or zero point (2) of a Q or DQ, or a bound of a Clip, where it is a constant in the file itself."""
        tensor = self.constants.get(node.input[index]) if len(node.input) > index else None
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return None
        return onnx.numpy_helper.to_array(tensor)

    def code_type(self, node: onnx.NodeProto) -> int:
        """The type of the codes that a Q makes or a DQ reads, as the file has it."""
        for name in (node.input[2] if len(node.input) > 2 else "", node.input[0] if node.op_type == DQ else ""):
            if name in self.constants:
                return self.constants[name].data_type
        maker = self.made_by(node.input[0], Q) if node.op_type == DQ else None
        given = next((a.i for a in node.attribute if a.name == "output_dtype" and a.i), TensorProto.UINT8)
        return self.code_type(maker) if maker is not None else given

    def kernel_type(self, node: onnx.NodeProto) -> int:
        """The same as the kernels see it: on x86, int8 codes between one Q and one DQ become uint8."""
        kind = self.code_type(node)
        codes = node.output[0] if node.op_type == Q else node.input[0]
        readers = self.readers.get(codes, [])
        lone = len(readers) == 1 and readers[0].op_type == DQ and codes not in self.outputs
        shifts = kind == TensorProto.INT8 and not is_arm() and lone and self.made_by(codes, Q) is not None
        return TensorProto.UINT8 if shifts else kind


def is_arm() -> bool:
    return platform.machine().lower().startswith(("arm", "aarch"))
