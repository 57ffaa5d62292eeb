"""Cones: a hash of all that a tensor is computed from, by which statistics know the tensor that they are of.

Two tensors of one cone hold the same values on the same feeds, whatever else is in their graphs and whatever their names. So
statistics stay usable where another recipe or target changes the graph elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import xxhash

from onnxq.proto import folder_of
from onnxq.store import content_of


def cone_of_scaled(cone: str, factors: Sequence[float]) -> str:
    """The cone of a tensor of this cone with its channels divided by factors, however that is done."""
    return _hash("scaled", cone, *(float(factor).hex() for factor in factors))


def cones_of(proto: onnx.ModelProto, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """The cone of every tensor of the main graph.

    A cone is SHA-256 over a node's op, the version of it that the model's opset means, its attributes and the cones of its
    inputs; over the type, shape and XXH3 of a constant; over the name and type of an input. A body counts by the cones of
    its outputs.
    Those that are `known` are taken as they are, and what is computed from these tensors goes by them.
    """
    return _Hashing(proto, known or {}).of_graph(proto.graph, {})


class _Hashing:
    def __init__(self, proto: onnx.ModelProto, known: Mapping[str, str]) -> None:
        self._known = known
        self._folder = folder_of(proto)
        self._opsets = {o.domain: o.version for o in proto.opset_import}
        self._functions = {(f.domain, f.name): f.SerializeToString(deterministic=True) for f in proto.functions}

    def of_graph(self, graph: onnx.GraphProto, outer: Mapping[str, str]) -> dict[str, str]:
        """Cones of what the graph holds and makes; `outer` are those of the tensors around it, which it may read."""
        is_body = bool(outer)
        found: dict[str, str] = {}
        for k, tensor in enumerate(graph.input):
            found[tensor.name] = _hash("input", str(k) if is_body else tensor.name, str(tensor.type.tensor_type.elem_type))
        for tensor in graph.initializer:
            own = found.get(tensor.name, "")  # an input may have it for its default
            content = xxhash.xxh3_128_hexdigest(memoryview(content_of(tensor, self._folder)))
            found[tensor.name] = _hash("constant", own, str(tensor.data_type), str(tensor.dims), content)
        for sparse in graph.sparse_initializer:
            found[sparse.values.name] = _hash("sparse", sparse.SerializeToString(deterministic=True))
        for node in graph.node:
            known = {**outer, **found} if any(a.HasField("g") or a.graphs for a in node.attribute) else {}
            parts = [self._op(node), *(self._attribute(a, known) for a in sorted(node.attribute, key=lambda a: a.name))]
            parts += [found.get(name) or outer.get(name, "") for name in node.input]
            whole = _hash("node", *parts)
            for k, name in enumerate(node.output):
                if name:
                    found[name] = (not outer and self._known.get(name)) or _hash("output", whole, str(k))
        return found

    def _op(self, node: onnx.NodeProto) -> bytes:
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = self._opsets.get(node.domain, self._opsets.get(domain, 0))
        if onnx.defs.has(node.op_type, version, domain):
            version = onnx.defs.get_schema(node.op_type, version, domain).since_version
        function = self._functions.get((node.domain, node.op_type), b"")
        return f"{domain}:{node.op_type}:{version}:{node.overload}:".encode() + function

    def _attribute(self, attribute: onnx.AttributeProto, known: Mapping[str, str]) -> bytes:
        bodies = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
        if not bodies:
            bare = onnx.AttributeProto()
            bare.CopyFrom(attribute)
            bare.ClearField("doc_string")
            return bare.SerializeToString(deterministic=True)
        cones = [self.of_graph(body, known) for body in bodies]
        outputs = [
            cone.get(o.name) or known.get(o.name, "") for body, cone in zip(bodies, cones, strict=True) for o in body.output
        ]
        return _hash(attribute.name, *outputs).encode()


def _hash(*parts: Any) -> str:
    """Of strings and buffers of bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:".encode())
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:32]
