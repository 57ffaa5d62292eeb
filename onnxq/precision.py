"""Precision: a model of 16-bit floats as one that computes in float32 between the same inputs and outputs.

onnxruntime's CPU kernels compute float16 in float32 as well, with a Cast before and after each; bfloat16 most of them lack.
"""

from __future__ import annotations

import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from onnxq.errors import ModelError, UnsupportedModelError
from onnxq.proto import bodies, rename_in_nodes, tensor_type_of

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
TYPES = ("to", "dtype", "output_datatype")  # attributes that hold the type of what a node makes


def is_half(proto: onnx.ModelProto, kinds: tuple[int, ...] = HALVES) -> bool:
    """Whether any tensor of the model that its file tells the type of is of 16-bit floats, or of some of these."""
    for graph in [proto.graph, *bodies(proto.graph)]:
        infos = [*graph.input, *graph.output]
        if any(t.data_type in kinds for t in _tensors(graph)) or any(_is_half_type(i.type, kinds) for i in infos):
            return True
    return False


def widen(proto: onnx.ModelProto) -> None:
    """Turn every 16-bit float inside the model to float32, in place; inputs and outputs keep their types behind Casts.

    Raises UnsupportedModelError for sequences of 16-bit floats that come in or go out, and for bfloat16 beside any sequence
    or text, which onnxruntime takes no values for together.
    """
    graph = proto.graph
    overridable = {t.name for t in graph.initializer}
    fed = [i for i in graph.input if _is_half_type(i.type) and i.name not in overridable]
    given = [o for o in graph.output if _is_half_type(o.type)]
    for info in [*fed, *given]:
        if not info.type.HasField("tensor_type"):
            raise UnsupportedModelError(
                f"{info.name} is a sequence of 16-bit floats, which is not handled; export it in float32"
            )
    kinds = {info.name: info.type.tensor_type.elem_type for info in [*fed, *given]}
    short = next((name for name, kind in kinds.items() if kind == TensorProto.BFLOAT16), None)
    for info in [*graph.input, *graph.output] if short is not None else []:
        kind = info.type.optional_type.elem_type if info.type.HasField("optional_type") else info.type
        if kind.HasField("sequence_type") or tensor_type_of(kind).elem_type == TensorProto.STRING:
            raise UnsupportedModelError(
                f"{short} is of bfloat16, which onnxruntime does not take or give beside {info.name}, a sequence or text; "
                "export the model in float32"
            )
    for part in [graph, *bodies(graph)]:
        for tensor in _tensors(part):
            if tensor.data_type in HALVES:
                _to_float(tensor)
        for node in part.node:
            for attribute in node.attribute:
                if attribute.name in TYPES and attribute.type == AttributeProto.INT and attribute.i in HALVES:
                    attribute.i = TensorProto.FLOAT
        interface = [*part.input, *part.output] if part is not graph else [i for i in part.input if i.name in overridable]
        for info in [*interface, *part.value_info]:
            _widen_type(info.type)
    parts = [graph, *bodies(graph)]
    taken = {name for g in parts for n in g.node for name in [n.name, *n.input, *n.output]}
    taken |= {t.name for g in parts for t in [*g.initializer, *g.input, *g.output]}
    after = []
    for info in given:
        inner = _free(f"{info.name}_float32", taken)
        if info.name in overridable or any(info.name in n.output for n in graph.node):
            _rename(graph, info.name, inner)
            after.append(_cast(inner, info.name, kinds[info.name], taken))
    before = []
    for info in fed:
        inner = _free(f"{info.name}_float32", taken)
        _rename(graph, info.name, inner)
        before.append(_cast(info.name, inner, TensorProto.FLOAT, taken))
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)


def _tensors(graph: onnx.GraphProto) -> list[TensorProto]:
    attributes = [a.t for n in graph.node for a in n.attribute if a.type == AttributeProto.TENSOR]
    return [*graph.initializer, *attributes]


def _is_half_type(kind: onnx.TypeProto, kinds: tuple[int, ...] = HALVES) -> bool:
    if kind.HasField("sequence_type"):
        return _is_half_type(kind.sequence_type.elem_type, kinds)
    if kind.HasField("optional_type"):
        return _is_half_type(kind.optional_type.elem_type, kinds)
    return kind.tensor_type.elem_type in kinds


def _widen_type(kind: onnx.TypeProto) -> None:
    if kind.HasField("sequence_type"):
        _widen_type(kind.sequence_type.elem_type)
    elif kind.HasField("optional_type"):
        _widen_type(kind.optional_type.elem_type)
    elif kind.tensor_type.elem_type in HALVES:
        kind.tensor_type.elem_type = TensorProto.FLOAT


def _to_float(tensor: TensorProto) -> None:
    name = tensor.name
    try:
        values = numpy_helper.to_array(tensor).astype("float32")
    except ValueError as error:
        raise ModelError(f"tensor {name} cannot be read: {error}; export the model again") from error
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def _cast(x: str, y: str, to: int, taken: set[str]) -> onnx.NodeProto:
    return helper.make_node("Cast", [x], [y], name=_free(f"{y}_Cast", taken), to=to)


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Another name for a tensor of the main graph wherever a node makes or reads it, in bodies too."""
    rename_in_nodes(graph, old, new)
    for part in [graph, *bodies(graph)]:
        tensors = [*part.initializer] if part is graph else [*part.output]  # a body may give what it captured
        own = {t.name for t in part.initializer}
        tensors += [i for i in part.input if part is graph and i.name in own]  # an initializer that a caller may override
        for tensor in tensors:
            if tensor.name == old:
                tensor.name = new
