"""ModelProtos before and after they pass the door to graphsurgeon: external data, names, interface."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx.inliner
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from onnxq.errors import ModelError

FOLDER = "onnxq.weights_folder"  # the metadata key
OWN_INITIALIZERS = 4  # the first ir_version in which an initializer need not be an input too


def bodies(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.GraphProto]:
    """Every body in the graph or function, those in other bodies too."""
    for node in graph.node:
        yield from bodies_of(node)


def bodies_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        for body in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
            yield body
            yield from bodies(body)


def tensor_type_of(kind: onnx.TypeProto) -> onnx.TypeProto.Tensor:
    """The type of a tensor, or of the tensors in a sequence or an Optional; an empty one of a map."""
    if kind.HasField("optional_type"):
        return tensor_type_of(kind.optional_type.elem_type)
    if kind.HasField("sequence_type"):
        return tensor_type_of(kind.sequence_type.elem_type)
    return kind.tensor_type


def type_attributes(proto: onnx.ModelProto) -> dict[str, list[onnx.AttributeProto]]:
    """The attributes that hold a type, by the name of their node: of Optional, which graphsurgeon does not know."""
    kinds = (onnx.AttributeProto.TYPE_PROTO, onnx.AttributeProto.TYPE_PROTOS)
    nodes = [n for g in [proto.graph, *bodies(proto.graph)] for n in g.node]
    return {n.name: [a for a in n.attribute if a.type in kinds] for n in nodes if any(a.type in kinds for a in n.attribute)}


def inline_functions(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every call of a function of its own written out, so that passes see what is computed."""
    return onnx.inliner.inline_local_functions(proto) if proto.functions else proto


def folder_of(proto: onnx.ModelProto) -> Path | None:
    """Where the weights of a proto are that is for this process alone: see store.py."""
    return next((Path(p.value) for p in proto.metadata_props if p.key == FOLDER), None)


def say_folder(proto: onnx.ModelProto, folder: Path | None) -> None:
    """Note that folder in the proto, in place of what it says; None: nowhere but in it."""
    others = [p for p in proto.metadata_props if p.key != FOLDER]
    del proto.metadata_props[:]
    proto.metadata_props.extend(others)
    if folder is not None:
        proto.metadata_props.add(key=FOLDER, value=str(folder))


def with_external_data(proto: onnx.ModelProto, folder: Path | None) -> onnx.ModelProto:
    """A copy of the model whose external data, if any, has been read from `folder`, or from where the proto says."""
    twin = onnx.ModelProto()
    twin.CopyFrom(proto)
    load_external(twin, folder_of(proto) or folder)
    say_folder(twin, None)
    return twin


def load_external(proto: onnx.ModelProto, folder: Path | None) -> None:
    """Read all external data from `folder` into the proto. Raises ModelError where it cannot be read."""
    for tensor in list(external_tensors(proto)):
        _load_external(tensor, folder)


def external_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """The tensors whose data is in another file: initializers and attributes, in bodies too."""
    for graph in [proto.graph, *bodies(proto.graph)]:
        attributes = (a.t for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.TENSOR)
        for tensor in [*graph.initializer, *attributes]:
            if uses_external_data(tensor):
                yield tensor


def _load_external(tensor: onnx.TensorProto, folder: Path | None) -> None:
    location = next((e.value for e in tensor.external_data if e.key == "location"), "")
    if folder is None:
        raise ModelError(
            f"tensor {tensor.name} keeps its data in {location}, and a model given in memory has no folder; "
            "give the path of the model file instead"
        )
    try:
        load_external_data_for_tensor(tensor, str(folder.resolve()))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise ModelError(
            f"external data of tensor {tensor.name} cannot be read from {folder / location}: {error}; "
            "put the data file next to the model"
        ) from error
    tensor.ClearField("data_location")
    del tensor.external_data[:]


def make_names_unique(proto: onnx.ModelProto) -> frozenset[str]:
    """Name every node, apart from all others in every scope; returns the names of the initializers that bodies own.

    Tensor names are apart already: ONNX forbids a body to redefine a name of its outer scope, and sibling bodies that
    share one are told apart by renaming the later.
    """
    taken = {n.name for g in [proto.graph, *bodies(proto.graph)] for n in g.node if n.name}
    seen: set[str] = set()
    for graph in [proto.graph, *bodies(proto.graph)]:
        for node in graph.node:
            if not node.name or node.name in seen:
                base, k = node.name or f"{node.op_type}_{len(seen)}", 0
                name = base
                while name in taken or name in seen:
                    k += 1
                    name = f"{base}_{k}"
                node.name = name
            seen.add(node.name)
    owned: set[str] = set()
    tensors = {t.name for t in proto.graph.initializer} | {o for n in proto.graph.node for o in n.output}
    tensors |= {i.name for i in proto.graph.input}
    for body in bodies(proto.graph):
        local = [t.name for t in body.initializer] + [o for n in body.node for o in n.output if o]
        for name in local:
            if name in tensors:
                new = name
                while new in tensors:
                    new += "_"
                rename(body, name, new)
                tensors.add(new)
            tensors.add(name)
        owned.update(t.name for t in body.initializer)
    return frozenset(owned)


def rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Another name for a tensor of the graph, wherever it, or a body in it, makes, reads or describes it."""
    for part in [graph, *bodies(graph)]:
        for tensor in [*part.initializer, *part.value_info, *part.output]:
            if tensor.name == old:
                tensor.name = new
    rename_in_nodes(graph, old, new)


def rename_in_nodes(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Another name for a tensor wherever a node of the graph, or of a body in it, makes or reads it."""
    for part in [graph, *bodies(graph)]:
        for node in part.node:
            for names in (node.input, node.output):
                for k, name in enumerate(names):
                    if name == old:
                        names[k] = new


def restore_interface(proto: onnx.ModelProto, side: onnx.ModelProto) -> None:
    """Doc strings and denotations of inputs and outputs, and the initializers that a caller may override."""
    for exported, original in ((proto.graph.input, side.graph.input), (proto.graph.output, side.graph.output)):
        by_name = {v.name: v for v in original}
        for info in exported:
            if info.name in by_name:
                info.CopyFrom(by_name[info.name])
    if side.ir_version < OWN_INITIALIZERS:
        return  # there every initializer was an input, whether or not anybody meant to override it
    present = {i.name for i in proto.graph.input}
    initializers = {t.name: t for t in proto.graph.initializer}
    for info in side.graph.input:
        if info.name not in present and info.name in initializers:
            proto.graph.input.append(info)
