"""The one door to onnx-graphsurgeon: Graph, Node, Tensor, and the few ways to change a graph.

graphsurgeon's traps are closed here, once: nodes and tensors compare and hash by identity; `readers` and `sole_consumer`
know that a graph output or a body that captures a tensor is a consumer too; metadata, doc strings, overridable inputs and
captured initializers survive the round trip; copies share arrays; external data is found next to the model.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
from onnx.external_data_helper import uses_external_data

from onnxq.errors import ModelError
from onnxq.precision import is_half, widen
from onnxq.proto import (
    OWN_INITIALIZERS,
    bodies,
    inline_functions,
    make_names_unique,
    rename,
    restore_interface,
    say_folder,
    type_attributes,
    with_external_data,
)
from onnxq.store import WeightStore, stored

gs: Any = import_module("onnx_graphsurgeon")  # it has no types; ours are given to its classes below
LazyValues: Any = import_module("onnx_graphsurgeon.ir.tensor").LazyValues

SHARED = 1024  # bytes of a constant that several bodies are to have once
ONNX_DOMAINS = ("", "ai.onnx", None)


class Node(gs.Node):
    """An operation. Compared by identity."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__
    op: str
    name: str
    domain: str | None
    attrs: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[Tensor]
    doc: str = ""
    metadata: dict[str, str] = {}
    in_body: bool = False  # inside an If, Loop or Scan
    types: tuple[onnx.AttributeProto, ...] = ()  # attributes that hold a type, which graphsurgeon drops

    @property
    def bodies(self) -> list[Any]:
        return [a for a in self.attrs.values() if isinstance(a, gs.Graph)]


class Variable(gs.Variable):
    """A tensor that is known only when the model runs. Compared by identity."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__
    name: str
    dtype: Any  # a numpy dtype, an int for the ONNX types that numpy lacks, or None
    shape: Any  # a list of numbers, names and None; None where even the rank is unknown
    inputs: list[Node]
    outputs: list[Node]


class Constant(gs.Constant):
    """A tensor of known values. Compared by identity."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__
    name: str
    dtype: Any
    shape: Any
    inputs: list[Node]
    outputs: list[Node]

    @property
    def values(self) -> np.ndarray:
        """The array. graphsurgeon would replace a lazy tensor by it, and cannot write one of a type that numpy lacks.

        Raises ModelError where its data is not what its type and shape say.
        """
        lazy = self._values
        try:
            if (
                isinstance(lazy, LazyValues)
                and isinstance(lazy.tensor, onnx.TensorProto)
                and _is_foreign(lazy.tensor.data_type)
            ):
                return onnx.numpy_helper.to_array(lazy.tensor)
            return cast(np.ndarray, gs.Constant.values.fget(self))
        except (TypeError, ValueError) as error:
            raise ModelError(f"the constant {self.name} cannot be read: {error}; export the model again") from error

    @values.setter
    def values(self, values: Any) -> None:
        self._values = values

    @property
    def nbytes(self) -> int:
        return int(self._values.nbytes)


Tensor = Variable | Constant


def _is_foreign(data_type: int) -> bool:
    """Whether numpy itself lacks an ONNX type: 4 bits, 8-bit floats, bfloat16."""
    return onnx.helper.tensor_dtype_to_np_dtype(data_type).isbuiltin != 1


def value(tensor: Tensor | None) -> np.ndarray | None:
    """The values of a constant; None for anything else."""
    return tensor.values if isinstance(tensor, Constant) else None


def input_at(node: Node, index: int) -> Tensor | None:
    """The node's input `index`, or None where it is omitted."""
    if index < len(node.inputs) and not node.inputs[index].is_empty():
        return node.inputs[index]
    return None


def is_float32(tensor: Tensor) -> bool:
    return tensor.dtype is not None and not isinstance(tensor.dtype, int) and np.dtype(tensor.dtype) == np.float32


def batchnorm_affine(node: Node) -> tuple[np.ndarray, np.ndarray] | None:
    """(scale, shift), float64 by channel, of a BatchNormalization of inference: y = x * scale + shift.

    scale = gamma / sqrt(var + epsilon), shift = beta - mean * scale; None where a parameter is computed or it trains.
    """
    parameters = [value(t) for t in node.inputs[1:5]]
    trains = node.attrs.get("training_mode", 0) or len([t for t in node.outputs if t.name]) > 1
    if trains or not node.attrs.get("spatial", 1) or len(parameters) < 4 or any(p is None for p in parameters):
        return None  # spatial = 0 (before opset 9) has a parameter for every activation, not for every channel
    gamma, beta, mean, variance = (np.asarray(p, np.float64) for p in parameters)
    scale = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
    return scale, beta - mean * scale


def clip_bounds(node: Node) -> tuple[float | None, float | None]:
    """(min, max) of a Clip: -inf and inf where they are left out, None where one is computed."""
    bounds: list[float | None] = []
    for index, key, default in ((1, "min", -np.inf), (2, "max", np.inf)):
        tensor = input_at(node, index)
        values = np.array(node.attrs.get(key, default)) if tensor is None else value(tensor)
        bounds.append(None if values is None else float(values.reshape(-1)[0]))
    return bounds[0], bounds[1]


class Graph:
    """An ONNX graph that can be changed in place. `nodes`, `inputs` and `outputs` are of the main graph's scope."""

    def __init__(
        self, surgeon: Any, sidecar: onnx.ModelProto, body_initializers: frozenset[str], store: WeightStore
    ) -> None:
        self._surgeon = surgeon
        self._sidecar = sidecar  # what graphsurgeon drops: metadata, doc strings, model version, overridable inputs
        self._body_initializers = body_initializers
        self._store = store
        self._shared: dict[tuple[str, tuple[int, ...], bytes], Tensor] = {}  # constants that bodies have, by content
        self._taken: set[str] = set()
        self._has_bodies = any(n.bodies for n in self.nodes)

    # ---- in and out

    @classmethod
    def from_proto(cls, proto: onnx.ModelProto, folder: Path | None = None, store: WeightStore | None = None) -> Graph:
        """The graph of a model, computing in float32 where it is of 16-bit floats; the proto is not changed.

        External data is looked up in `folder`. Large weights go to `store`, if they are not there.

        Raises ModelError when external data is missing, UnsupportedModelError for types that are not handled.
        """
        store = store or WeightStore()
        if is_half(proto):
            proto = with_external_data(proto, folder)
            widen(proto)
        proto = inline_functions(stored(proto, folder, store))
        say_folder(proto, None)
        names = make_names_unique(proto)
        typed = type_attributes(proto)
        for part in [proto.graph, *bodies(proto.graph)]:  # graphsurgeon cannot write what it reads of these
            for info in [*part.value_info, *part.input, *part.output]:
                if info.type.WhichOneof("value") in ((None,) if part is proto.graph else (None, "optional_type")):
                    info.ClearField("type")
        try:
            surgeon = gs.import_onnx(proto)
        except Exception as error:  # graphsurgeon has no errors of its own: whatever broke, the model is not one it knows
            raise ModelError(
                f"the graph cannot be read: {type(error).__name__}: {error}; check it with onnx.checker"
            ) from error
        _adopt(surgeon, store, in_body=False)
        for part in surgeon.subgraphs(recursive=True):
            _adopt(part, store, in_body=True)
        for part in [surgeon, *surgeon.subgraphs(recursive=True)] if typed else []:
            for node in part.nodes:
                node.types = tuple(typed.get(node.name, ()))
        for node, original in zip(surgeon.nodes, proto.graph.node, strict=True):
            node.doc = original.doc_string
            node.metadata = {p.key: p.value for p in original.metadata_props}
        sidecar = onnx.ModelProto()
        sidecar.CopyFrom(proto)
        del (
            sidecar.graph.node[:],
            sidecar.graph.initializer[:],
            sidecar.graph.sparse_initializer[:],
            sidecar.functions[:],
        )
        return cls(surgeon, sidecar, names, store)

    def to_proto(self) -> onnx.ModelProto:
        """A complete ModelProto, with everything that the loaded model carried beside its graph."""
        for node in self.nodes:
            if node.domain is None:
                node.domain = ""
        proto = gs.export_onnx(self._surgeon, do_type_check=False)
        side = self._sidecar
        proto.ir_version = max(proto.ir_version, side.ir_version, OWN_INITIALIZERS)
        for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
            setattr(proto, field, getattr(side, field))
        proto.metadata_props.extend(side.metadata_props)
        proto.training_info.extend(side.training_info)
        proto.graph.doc_string = side.graph.doc_string
        proto.graph.metadata_props.extend(side.graph.metadata_props)
        tensors = {t.name for t in proto.graph.initializer} | {o for n in proto.graph.node for o in n.output}
        proto.graph.quantization_annotation.extend(a for a in side.graph.quantization_annotation if a.tensor_name in tensors)
        for node, exported in zip(self.nodes, proto.graph.node, strict=True):
            exported.doc_string = node.doc
            for key, text in node.metadata.items():
                exported.metadata_props.add(key=key, value=text)
        typed = {n.name: n.types for part in [self._surgeon, *self._surgeon.subgraphs(recursive=True)] for n in part.nodes}
        for exported in [n for g in [proto.graph, *bodies(proto.graph)] for n in g.node]:
            exported.attribute.extend(typed.get(exported.name, ()))
        restore_interface(proto, side)
        self._hoist_captured(proto)
        return proto

    def to_stored_proto(self) -> onnx.ModelProto:
        """As `to_proto`, but large initializers are in the file of the store: for this process, not to be saved."""
        read = [t for t in self._constants() if isinstance(t._values, np.ndarray)]
        for tensor, kept in zip(read, self._store.keep(*(t._values for t in read)), strict=True):
            tensor.values = kept
        large = [(t, self._store.reference(t.name, t._values)) for t in read if self._store.holds(t._values)]
        proto = self._written_as(large)
        if any(uses_external_data(t) for g in [proto.graph, *bodies(proto.graph)] for t in g.initializer):
            say_folder(proto, self._store.folder)
            self._store.release()
        return proto

    def release(self) -> None:
        """Let go of the memory of large weights that were read; they are read from the store again where they are needed."""
        self._store.release()

    def kept(self, values: np.ndarray) -> np.ndarray:
        """The array as it is on disk from now on, if it is large, so that it is in memory only while it is read."""
        return self._store.keep(values)[0]

    def _constants(self) -> list[Constant]:
        """Every constant that a node reads, in bodies too, or that is an output."""
        parts = [self._surgeon, *self._surgeon.subgraphs(recursive=True)]
        read = (t for part in parts for source in [*[n.inputs for n in part.nodes], part.outputs] for t in source)
        return list({id(t): t for t in read if isinstance(t, Constant)}.values())

    def to_light_proto(self, keep: int = 1024) -> onnx.ModelProto:
        """As `to_proto`, but no initializer of more than `keep` bytes carries data: enough for shape inference."""
        bare = []
        for tensor in self._constants():
            if tensor.nbytes > keep:
                kind = tensor.dtype if isinstance(tensor.dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(tensor.dtype)
                bare.append((tensor, onnx.TensorProto(name=tensor.name, data_type=kind, dims=list(tensor.shape or ()))))
        return self._written_as(bare)

    def _written_as(self, stead: Sequence[tuple[Constant, onnx.TensorProto]]) -> onnx.ModelProto:
        """As `to_proto`, with initializers of these in place of those of some constants."""
        values = [tensor._values for tensor, _ in stead]
        try:
            for tensor, initializer in stead:
                tensor._values = LazyValues(initializer)
            return self.to_proto()
        finally:
            for (tensor, _), own in zip(stead, values, strict=True):
                tensor._values = own

    def _hoist_captured(self, proto: onnx.ModelProto) -> None:
        """graphsurgeon writes an outer initializer that a body reads into the body; put it back, once."""
        outer = {t.name for t in proto.graph.initializer}
        for body in bodies(proto.graph):
            captured = [t for t in body.initializer if t.name not in self._body_initializers]
            kept = [t for t in body.initializer if t.name in self._body_initializers]
            for tensor in captured:
                if tensor.name not in outer:
                    proto.graph.initializer.append(tensor)
                    outer.add(tensor.name)
            if captured:
                del body.initializer[:]
                body.initializer.extend(kept)

    def replace(self, proto: onnx.ModelProto) -> None:
        """Take over another model's graph, in place; metadata and doc strings of this one are kept."""
        other, mine = Graph.from_proto(proto, store=self._store), self._sidecar
        noted = {n.name: n for n in self.nodes}
        for node in other.nodes:
            if node.name in noted:
                node.doc, node.metadata = noted[node.name].doc, noted[node.name].metadata
        self._surgeon, self._body_initializers = other._surgeon, other._body_initializers
        self._has_bodies = other._has_bodies
        kept = onnx.ModelProto()
        kept.CopyFrom(mine)
        if mine.ir_version < OWN_INITIALIZERS:  # no initializer was meant to be overridden, but all were inputs
            inputs = {t.name for t in other.inputs}
            given = [i for i in kept.graph.input if i.name in inputs]
            del kept.graph.input[:]
            kept.graph.input.extend(given)
        del kept.opset_import[:]
        kept.opset_import.extend(other._sidecar.opset_import)
        kept.ir_version = max(mine.ir_version, proto.ir_version)
        self._sidecar = kept
        self._taken = set()

    def copy(self) -> Graph:
        """A graph whose nodes and tensors are new and whose arrays are shared."""
        return Graph(_copy(self._surgeon, {}), self._sidecar, self._body_initializers, self._store)

    def scopes(self) -> list[Graph]:
        """This graph, then every body in it, outer ones first, each to be read and changed as a graph of its own.

        Names that are made in one of them are taken in all.
        """
        self._taken = self._taken or self._names()
        found: list[Graph] = [self]
        for part in self._surgeon.subgraphs(recursive=True):
            part.ir_version = self._surgeon.ir_version  # else that of the newest onnx, for what is extracted from it
            view = Graph(part, self._sidecar, self._body_initializers, self._store)
            view._taken = self._taken
            found.append(view)
        return found

    # ---- bodies

    def bodies_of(self, node: Node) -> list[tuple[str, Graph]]:
        """(attribute, body) of a node, each body to be read and changed as a graph of its own."""
        views = {id(view._surgeon): view for view in self.scopes()} if node.bodies else {}
        return [(key, views[id(part)]) for key, part in node.attrs.items() if isinstance(part, gs.Graph)]

    def body_model(self, node: Node, key: str) -> tuple[onnx.ModelProto, tuple[str, ...]]:
        """A body as a model for this process (see `to_stored_proto`), and what it captures, which are inputs of it too."""
        twin = self.copy()
        (copied,) = [n for n in twin.nodes if n.name == node.name]
        body = copied.attrs[key]
        parts = _with_nested(body)
        own = {id(t) for part in parts for n in part.nodes for t in n.outputs} | {id(t) for p in parts for t in p.inputs}
        read = [t for part in parts for source in [*[n.inputs for n in part.nodes], part.outputs] for t in source]
        captured = {id(t): t for t in read if isinstance(t, Variable) and t.name and id(t) not in own}
        twin._surgeon.nodes, twin._surgeon.outputs = list(body.nodes), list(body.outputs)
        twin._surgeon.inputs = [*body.inputs, *captured.values()]
        twin._sidecar = onnx.ModelProto(ir_version=self._sidecar.ir_version, opset_import=self._sidecar.opset_import)
        return twin.to_stored_proto(), tuple(t.name for t in captured.values())

    def set_body(self, node: Node, key: str, model: onnx.ModelProto) -> None:
        """Put a model in the place of a body; what it reads beyond the body's own inputs it captures. In place."""
        old, graph = node.attrs[key], onnx.GraphProto()
        graph.CopyFrom(model.graph)
        formal = [t.name for t in old.inputs]
        given = {i.name: i for i in graph.input}
        del graph.input[:]
        graph.input.extend(given[name] for name in formal)
        for part in _with_nested(old):
            for inner in part.nodes:
                self.rewire(inner, inputs=[], outputs=[])
        node.attrs.pop(key)
        self._taken = self._names()
        public = {*formal, *(o.name for o in graph.output)}
        for inner in graph.node:
            inner.name = self.fresh(inner.name)
        for name in [*(t.name for t in graph.initializer), *(o for n in graph.node for o in n.output if o)]:
            if name not in public and (other := self.fresh(name)) != name:
                rename(graph, name, other)
        body = gs.importers.onnx_importer.OnnxImporter.import_graph(
            graph, self.tensors(), opset=self.opset, import_domains=self._surgeon.import_domains
        )
        for part in _with_nested(body):
            _adopt(part, self._store, in_body=True)
        node.attrs[key] = body
        nested = [graph, *bodies(graph)]
        owned = {t.name for part in nested for t in part.initializer}
        self._body_initializers = self._body_initializers | (owned - self._share(body))

    def _share(self, body: Any) -> set[str]:
        """Let the larger constants of a body be of the main scope, one for all bodies that have it; returns their names."""
        moved: set[str] = set()
        for inner in [n for part in _with_nested(body) for n in part.nodes]:
            for index, tensor in enumerate(inner.inputs):
                if not isinstance(tensor, Constant) or tensor.nbytes < SHARED or isinstance(tensor.dtype, int):
                    continue
                values = np.ascontiguousarray(tensor.values)
                content = (values.dtype.str, values.shape, hashlib.sha256(values.data).digest())
                moved.add(tensor.name)
                self.set_input(inner, index, self._shared.setdefault(content, tensor))
        return moved

    # ---- reading

    @property
    def nodes(self) -> list[Node]:
        return cast(list[Node], self._surgeon.nodes)

    @property
    def inputs(self) -> list[Variable]:
        return cast(list[Variable], self._surgeon.inputs)

    @property
    def outputs(self) -> list[Tensor]:
        return cast(list[Tensor], self._surgeon.outputs)

    @property
    def opset(self) -> int:
        return int(self._surgeon.opset)

    @property
    def metadata(self) -> dict[str, str]:
        return {p.key: p.value for p in self._sidecar.metadata_props}

    def set_metadata(self, key: str, text: str) -> None:
        sidecar = onnx.ModelProto()
        sidecar.CopyFrom(self._sidecar)
        kept = [p for p in sidecar.metadata_props if p.key != key]
        del sidecar.metadata_props[:]
        sidecar.metadata_props.extend(kept)
        sidecar.metadata_props.add(key=key, value=text)
        self._sidecar = sidecar

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the main scope by its name."""
        found: dict[str, Tensor] = {}
        for tensor in self._all_tensors():
            if tensor.name:
                found.setdefault(tensor.name, tensor)
        return found

    def _all_tensors(self) -> Iterator[Tensor]:
        yield from self.inputs
        for node in self.nodes:
            yield from node.inputs
            yield from node.outputs
        yield from self.outputs

    def find(self, *op_types: str) -> list[Node]:
        """The nodes of these ONNX op types, in order; bodies are not entered."""
        return [n for n in self.nodes if n.op in op_types and n.domain in ONNX_DOMAINS]

    def producer(self, tensor: Tensor) -> Node | None:
        return tensor.inputs[0] if tensor.inputs else None

    def readers(self, tensor: Tensor) -> list[tuple[Node | None, int]]:
        """Who reads a tensor: (node, input index) in this scope, and (None, index) for each graph output it is."""
        found: list[tuple[Node | None, int]] = []
        for node in dict.fromkeys(n for n in tensor.outputs if not n.in_body):
            found += [(node, i) for i, t in enumerate(node.inputs) if t is tensor]
        found += [(None, i) for i, t in enumerate(self.outputs) if t is tensor]
        return found

    def is_output(self, tensor: Tensor) -> bool:
        return any(t is tensor for t in self.outputs)

    def is_captured(self, tensor: Tensor) -> bool:
        """Whether a body of a control-flow node reads the tensor."""
        if not self._has_bodies:
            return False
        bodies = (part for n in self.nodes for b in n.bodies for part in _with_nested(b))
        return any(n.in_body for n in tensor.outputs) or any(t is tensor for part in bodies for t in part.outputs)

    def sole_consumer(self, tensor: Tensor) -> Node | None:
        """The one node that reads the tensor; None when several do, a body does, or it is a graph output."""
        if self.is_output(tensor) or len(tensor.outputs) != 1 or self.is_captured(tensor):
            return None
        return tensor.outputs[0]

    # ---- changing

    def fresh(self, base: str) -> str:
        """A tensor and node name that nothing uses yet: `base`, else base_1, base_2 ..."""
        self._taken = self._taken or self._names()
        name, serial = base, 0
        while name in self._taken:
            serial += 1
            name = f"{base}_{serial}"
        self._taken.add(name)
        return name

    def _names(self) -> set[str]:
        names = set(self._body_initializers)
        for part in [self._surgeon, *self._surgeon.subgraphs(recursive=True)]:
            for node in part.nodes:
                names.add(node.name)
                names.update(t.name for t in node.inputs)
                names.update(t.name for t in node.outputs)
            names.update(t.name for t in part.inputs)
            names.update(t.name for t in part.outputs)
        return names

    def constant(self, base: str, values: np.ndarray) -> Constant:
        """A new initializer named after `base`."""
        return Constant(self.fresh(base), np.asarray(values, order="C"))

    def variable(self, base: str, dtype: Any = None, shape: Sequence[Any] | None = None) -> Variable:
        return Variable(self.fresh(base), dtype, None if shape is None else list(shape))

    def insert(
        self,
        op: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        attrs: dict[str, Any] | None = None,
        *,
        name: str = "",
        domain: str = "",
    ) -> Node:
        """A new node. Its place in the list is settled by `cleanup`."""
        node = Node(op, self.fresh(name or f"{outputs[0].name}_{op}"), dict(attrs or {}), domain=domain)
        node.inputs.extend(inputs)
        node.outputs.extend(outputs)
        self.nodes.append(node)
        return node

    def rewire(self, node: Node, *, inputs: Sequence[Tensor] | None = None, outputs: Sequence[Tensor] | None = None) -> None:
        """Give a node other inputs, other outputs, or both."""
        if inputs is not None:
            node.inputs.clear()
            node.inputs.extend(inputs)
        if outputs is not None:
            node.outputs.clear()
            node.outputs.extend(outputs)

    def set_input(self, node: Node, index: int, tensor: Tensor) -> None:
        inputs = list(node.inputs)
        while len(inputs) <= index:
            inputs.append(Variable.empty())
        inputs[index] = tensor
        self.rewire(node, inputs=inputs)

    def replace_uses(self, old: Tensor, new: Tensor) -> None:
        """Every node that reads `old`, in bodies too, reads `new`. Graph outputs are left: their names are public."""
        for node in list(dict.fromkeys(old.outputs)):
            self.rewire(node, inputs=[new if t is old else t for t in node.inputs])
        for node in self.nodes if self._has_bodies else []:
            for body in node.bodies:
                for part in _with_nested(body):
                    part.outputs = [new if t is old else t for t in part.outputs]

    def remove(self, node: Node) -> None:
        self.rewire(node, inputs=[], outputs=[])
        self._surgeon.nodes = [n for n in self.nodes if n is not node]

    def bypass(self, node: Node) -> bool:
        """Remove a one-in, one-out node that hands its first input on unchanged.

        False, and nothing done, when both its ends are public: a graph input or constant that becomes a graph output.
        """
        source, result = node.inputs[0], node.outputs[0]
        if not self.is_output(result):
            self.replace_uses(result, source)
            self.remove(node)
            return True
        maker = self.producer(source)
        if maker is None or self.is_output(source) or maker not in set(self.nodes):
            return False
        self.remove(node)
        self.replace_uses(source, result)
        result.dtype, result.shape = result.dtype or source.dtype, result.shape or source.shape
        self.rewire(maker, outputs=[result if t is source else t for t in maker.outputs])
        return True

    def extract(self, nodes: Sequence[Node], outputs: Sequence[Tensor]) -> onnx.ModelProto:
        """A model of these nodes alone. Its inputs are the variables that they read and do not make."""
        twin = self.copy()
        chosen, tensors = {n.name for n in nodes}, twin.tensors()
        kept = [n for n in twin.nodes if n.name in chosen]
        made = {id(t) for n in kept for t in n.outputs}
        needed = {id(t): t for n in kept for t in [*n.inputs, *_captured(n)] if isinstance(t, Variable) and t.name}
        twin._surgeon.nodes = kept
        twin._surgeon.inputs = [t for k, t in needed.items() if k not in made]
        twin._surgeon.outputs = [tensors[t.name] for t in outputs]
        return twin.to_stored_proto()

    def cleanup(self) -> int:
        """Drop nodes whose outputs nobody reads and sort the rest by data flow, stable; returns how many were dropped."""
        needed = {id(t) for t in self.outputs}
        kept: list[Node] = []
        for node in reversed(self._sorted()):
            if not node.outputs or any(id(t) in needed for t in node.outputs):
                kept.append(node)
                needed.update(id(t) for t in node.inputs)
                needed.update(id(t) for t in _captured(node))
        kept.reverse()
        dropped = set(self.nodes) - set(kept)
        for node in dropped:
            self.rewire(node, inputs=[], outputs=[])
        self._surgeon.nodes = kept
        return len(dropped)

    def _sorted(self) -> list[Node]:
        position = {node: k for k, node in enumerate(self.nodes)}
        done: dict[Node, bool] = {}
        order: list[Node] = []
        for root in self.nodes:
            stack = [(root, False)]
            while stack:
                node, expanded = stack.pop()
                if expanded:
                    done[node] = True
                    order.append(node)
                elif node not in done:
                    done[node] = False
                    stack.append((node, True))
                    sources = [t.inputs[0] for t in [*node.inputs, *_captured(node)] if t.inputs]
                    sources = [n for n in dict.fromkeys(sources) if n in position]
                    stack.extend((n, False) for n in sorted(sources, key=position.__getitem__, reverse=True))
                elif done[node] is False:
                    continue
        return order


def _captured(node: Node) -> list[Tensor]:
    """Tensors that the node's bodies read from outside."""
    found: list[Tensor] = []
    for body in node.bodies:
        for part in _with_nested(body):
            found += [t for n in part.nodes for t in n.inputs]
            found += list(part.outputs)
    return found


def _with_nested(body: Any) -> list[Any]:
    return [body, *body.subgraphs(recursive=True)]


def _adopt(part: Any, store: WeightStore, *, in_body: bool) -> None:
    """Turn graphsurgeon's nodes and tensors into ours, which compare by identity, with the values that the store has."""
    for node in part.nodes:
        node.__class__ = Node
        node.in_body = in_body
        for tensor in [*node.inputs, *node.outputs]:
            _adopt_tensor(tensor, store)
    for tensor in [*part.inputs, *part.outputs]:
        _adopt_tensor(tensor, store)


def _adopt_tensor(tensor: Any, store: WeightStore) -> None:
    if type(tensor) is gs.Constant:
        tensor.__class__ = Constant
        lazy = tensor._values
        if isinstance(lazy, LazyValues) and uses_external_data(lazy.tensor):
            tensor._values, tensor.data_location = store.find(lazy.tensor), None
    elif type(tensor) is gs.Variable:
        tensor.__class__ = Variable
        if getattr(tensor, "type", "") == "optional_type":
            tensor.type, tensor.dtype, tensor.shape = "tensor_type", None, None


def _copy(part: Any, seen: dict[int, Any]) -> Any:
    def tensor(old: Any) -> Any:
        if id(old) not in seen:
            if isinstance(old, Constant):
                twin = Constant(old.name, old._values, old.data_location, old._export_dtype)
            else:
                twin = Variable(old.name, old.dtype, copy.copy(old.shape), getattr(old, "type", "tensor_type"))
            seen[id(old)] = twin
        return seen[id(old)]

    nodes = []
    for old in part.nodes:
        inputs, outputs = [tensor(t) for t in old.inputs], [tensor(t) for t in old.outputs]
        attrs = {k: _copy(v, seen) if isinstance(v, gs.Graph) else v for k, v in old.attrs.items()}
        node = Node(old.op, old.name, attrs, domain=old.domain)
        node.inputs.extend(inputs)
        node.outputs.extend(outputs)
        node.doc, node.metadata, node.in_body, node.types = old.doc, old.metadata, old.in_body, old.types
        nodes.append(node)
    twin = gs.Graph(
        nodes=nodes,
        inputs=[tensor(t) for t in part.inputs],
        outputs=[tensor(t) for t in part.outputs],
        name=part.name,
        doc_string=part.doc_string,
        opset=part.opset,
        import_domains=list(part.import_domains or []),
        functions=part.functions,
    )
    for field in ("producer_name", "producer_version", "ir_version"):
        if hasattr(part, field):
            setattr(twin, field, getattr(part, field))
    return twin


def lazily(tensor: onnx.TensorProto) -> Any:
    """Values that graphsurgeon exports verbatim: the way to give an initializer a 4-bit type."""
    return LazyValues(tensor)
