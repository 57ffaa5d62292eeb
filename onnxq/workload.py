"""Workload: the multiply-accumulates of each kernel, and the shapes they follow from, for a model without samples.

The shapes are seen, not inferred: the graph that the runtime optimized runs once on made-up inputs, and so does each body
of an If, Loop or Scan, on the values that reach it. Where that fails, shape inference is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxq.errors import ModelError
from onnxq.proto import bodies, bodies_of, tensor_type_of
from onnxq.runtime import Session

Shape = tuple[int, ...]
Values = Mapping[str, Any]

FREE = (64, 224, 16, 1)  # what a free dimension is taken to be, in this order until the model runs; the first axis is 1
FILLINGS = (1, 0)  # what made-up inputs hold: 0 where 1 is no valid index, mode or the like
MOST_STEPS = 2**31 - 2  # of a Loop: one that counts to more ends by its condition
MATMULS = frozenset(["MatMul", "FusedMatMul", "TransposeMatMul", "MatMulInteger", "MatMulIntegerToFloat"])
MATMULS |= {"DynamicQuantizeMatMul", "QLinearMatMul", "Gemm", "FusedGemm", "QGemm"}
CONVOLUTIONS = {"Conv": 1, "FusedConv": 1, "ConvInteger": 1, "QLinearConv": 3}  # op: where its weight is
RECURRENT = frozenset(["LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"])
KEYS = {"Attention": 1, "MultiHeadAttention": 1}  # op: where its keys are, (..., steps, features)


class NoFormulaError(Exception):
    """The multiply-accumulates of a node follow from its shapes in a way that is not known here."""


def multiply_accumulates(
    op: str, domain: str, attrs: Mapping[str, Any], shape: Callable[[int], Shape], out: Callable[[], Shape]
) -> int:
    """Of one node whose k-th input has shape(k), and whose first output has out(). May raise NoFormulaError."""
    if op in CONVOLUTIONS:
        return math.prod(out()) * math.prod(shape(CONVOLUTIONS[op])[1:])
    if op == "ConvTranspose":
        return math.prod(shape(0)) * math.prod(shape(1)[1:])
    if op in MATMULS:
        return math.prod(out()) * shape(0)[-2 if attrs.get("transA", 0) else -1]
    if op == "MatMulNBits":
        return math.prod(out()) * int(attrs["K"])
    if op in RECURRENT:  # each step: gates x (input + hidden) for each direction, weight (D, gates x H, I)
        return math.prod(shape(0)[:2]) * (math.prod(shape(1)) + math.prod(shape(2)))
    if op in ("Attention", "QAttention") and domain == "com.microsoft":  # input (B, S, I), weight (I, 3H), output (B, S, H)
        batch, steps, _ = shape(0)
        return batch * steps * math.prod(shape(1)) + 2 * math.prod(out()) * steps
    if op in KEYS and len(shape(KEYS[op])) < 5:
        return (math.prod(shape(0)) + math.prod(out())) * shape(KEYS[op])[-2]
    if op == "Einsum":
        return _einsum(attrs["equation"], shape)
    raise NoFormulaError(f"no count is known for {op}")


def _einsum(equation: str | bytes, shape: Callable[[int], Shape]) -> int:
    text = (equation.decode() if isinstance(equation, bytes) else equation).replace(" ", "")
    sizes: dict[str, int] = {}
    for k, letters in enumerate(text.split("->")[0].split(",")):
        if len(letters) != len(shape(k)):
            raise NoFormulaError(f"no count is known for Einsum {text}")
        sizes |= dict(zip(letters, shape(k), strict=True))
    return math.prod(sizes.values())


@dataclass
class Shapes:
    """Shapes by tensor name, in all scopes. `steps`: how often the bodies of a node run, by its outputs."""

    inputs: dict[str, Shape]
    of: dict[str, Shape]
    steps: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def shapes_of(proto: onnx.ModelProto, folder: Path, names: Callable[[onnx.GraphProto], set[str]]) -> Shapes:
    """Shapes of the tensors that `names` wants of each graph. External weights of the model are in the folder."""
    observer = _Observer(proto, folder, names)
    weights = {t.name for t in proto.graph.initializer}
    inputs = [i for i in proto.graph.input if i.name not in weights]
    found = Shapes({}, {t.name: tuple(t.dims) for g in [proto.graph, *bodies(proto.graph)] for t in g.initializer})
    try:
        session = observer.session(proto.graph, {})
        found.inputs, values = _first_that_runs(session, inputs)
        observer.take(proto.graph, values, found)
    except ModelError as error:
        found.failures.append(_short(error))
        found.inputs = {i.name: _sizes(i, inputs, FREE[0]) for i in inputs}
    return found


def _first_that_runs(session: Session, inputs: list[onnx.ValueInfoProto]) -> tuple[dict[str, Shape], dict[str, Any]]:
    given = [i for i in inputs if not i.type.HasField("optional_type")]
    sequences = {i.name for i in given if i.type.HasField("sequence_type")}
    error: ModelError | None = None
    for free in FREE:
        for filling in FILLINGS:
            try:
                arrays = {i.name: _made_up(i, _sizes(i, inputs, free), filling) for i in given}
                feed = {n: [array] if n in sequences else array for n, array in arrays.items()}
                return {n: array.shape for n, array in arrays.items()}, feed | session.run(feed, "made-up inputs")
            except ModelError as failed:
                error = error or failed
    assert error is not None
    raise error


def _sizes(info: onnx.ValueInfoProto, inputs: list[onnx.ValueInfoProto], free: int) -> Shape:
    """Its dimensions; those that are free are 1 on the first axis, also where their name is seen elsewhere."""
    firsts = {shape.dim[0].dim_param for i in inputs if (shape := tensor_type_of(i.type).shape).dim}
    dims = list(tensor_type_of(info.type).shape.dim)
    batch = [k == 0 or (d.dim_param and d.dim_param in firsts) for k, d in enumerate(dims)]
    return tuple(d.dim_value if d.dim_value > 0 else 1 if b else free for d, b in zip(dims, batch, strict=True))


def _made_up(info: onnx.ValueInfoProto, shape: Shape, filling: int) -> np.ndarray:
    kind = tensor_type_of(info.type).elem_type
    if kind == onnx.TensorProto.STRING:
        return np.full(shape, str(filling), object)
    if kind == onnx.TensorProto.UNDEFINED:
        raise ModelError(f"input {info.name} is no tensor")
    return np.full(shape, filling, onnx.helper.tensor_dtype_to_np_dtype(kind))


@dataclass(frozen=True)
class _Observer:
    """Runs a graph of the model, outermost or a body, such that it tells the shapes that are wanted in it."""

    proto: onnx.ModelProto
    folder: Path
    names: Callable[[onnx.GraphProto], set[str]]

    def session(self, graph: onnx.GraphProto, captured: Values) -> Session:
        """The graph as a model, with the values it captures as inputs; it gives shapes, and what its own bodies need."""
        model = onnx.ModelProto(ir_version=self.proto.ir_version, opset_import=self.proto.opset_import)
        model.graph.CopyFrom(graph)
        made = {o for n in graph.node for o in n.output if o}
        own = made | {t.name for t in graph.initializer} | {i.name for i in graph.input}
        outer = _used(graph) - own
        scopes = [self.proto.graph, *bodies(self.proto.graph)]
        weights = {t.name: t for g in scopes for t in g.initializer if t.name in outer}
        model.graph.initializer.extend(weights.values())
        for info in model.graph.input:
            if info.name in captured:
                info.CopyFrom(_info(info.name, captured[info.name]))
        model.graph.input.extend(_info(name, captured[name]) for name in sorted(outer - set(weights)) if name in captured)
        carriers = [n for n in graph.node if any(True for _ in bodies_of(n))]
        shown = {name for n in carriers for b in bodies_of(n) for name in _used(b)} & made
        shown |= {name for n in carriers for name in n.input} & (made | {t.name for t in model.graph.initializer})
        shown -= {o.name for o in graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(shown))
        for k, name in enumerate(sorted(self.names(graph) & (made | {i.name for i in model.graph.input}))):
            model.graph.node.append(onnx.helper.make_node("Shape", [name], [f"onnxq_shape_{k}:{name}"]))
            model.graph.output.append(onnx.ValueInfoProto(name=f"onnxq_shape_{k}:{name}"))
        path = self.folder / "observed.onnx"  # beside the weights that it refers to
        path.write_bytes(model.SerializeToString())
        try:
            return Session(path, optimize=False)
        except ModelError as error:
            raise ModelError(str(error).replace(str(path), "it")) from error

    def take(self, graph: onnx.GraphProto, values: Values, found: Shapes) -> None:
        """Keep the shapes that a run gave, and run the bodies in the graph on the values that it gave."""
        for name, value in values.items():
            if name.startswith("onnxq_shape_"):
                found.of[name.split(":", 1)[1]] = tuple(int(d) for d in value)
        for node in graph.node:
            for body in _own_bodies(node):
                try:
                    steps, given = _given(node, body, values)
                    found.steps["|".join(node.output)] = steps
                    inside = dict(values) | given
                    results = self.session(body, inside).run(inside, f"made-up inputs of {node.op_type} {node.name}")
                    self.take(body, inside | results, found)
                except (ModelError, LookupError, TypeError, ValueError) as error:
                    found.failures.append(f"a body of {node.op_type} {node.name} does not run by itself ({_short(error)})")


def _short(error: Exception) -> str:
    return str(error).split("; check this sample")[0]


def _own_bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        yield from [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs


def _given(node: onnx.NodeProto, body: onnx.GraphProto, values: Values) -> tuple[int, dict[str, Any]]:
    """(how often the body runs, what its own inputs are at the first time)."""
    if node.op_type == "Loop":
        count = int(np.asarray(values[node.input[0]]).reshape(())) if node.input[0] in values else MOST_STEPS + 1
        first = [np.asarray(0, np.int64), np.asarray(True), *[values[name] for name in node.input[2:]]]
        return count if 0 <= count <= MOST_STEPS else 1, _by_name(body, first)
    if node.op_type == "Scan":
        attrs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        scanned = int(attrs["num_scan_inputs"])
        states, sequences = node.input[: len(node.input) - scanned], node.input[len(node.input) - scanned :]
        axes = attrs.get("scan_input_axes", [0] * scanned)
        slices = [np.take(values[name], 0, axis) for name, axis in zip(sequences, axes, strict=True)]
        return values[sequences[0]].shape[axes[0]], _by_name(body, [*[values[name] for name in states], *slices])
    return 1, {}


def _by_name(body: onnx.GraphProto, values: list[Any]) -> dict[str, Any]:
    return {info.name: value for info, value in zip(body.input, values, strict=True)}


def _used(graph: onnx.GraphProto) -> set[str]:
    inside = {o.name for g in [graph, *bodies(graph)] for o in g.output}
    return inside | {name for g in [graph, *bodies(graph)] for n in g.node for name in n.input if name}


def _info(name: str, value: Any) -> onnx.ValueInfoProto:
    if not isinstance(value, np.ndarray):
        raise ModelError(f"{name} is no tensor")
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)


def inferred(proto: onnx.ModelProto, found: Shapes) -> dict[str, Shape]:
    """Shapes that inference tells, given those of the made-up inputs."""
    twin = onnx.ModelProto()
    twin.CopyFrom(proto)
    for info in twin.graph.input:
        if info.name in found.inputs and info.type.HasField("tensor_type"):
            kind = info.type.tensor_type.elem_type
            info.CopyFrom(onnx.helper.make_tensor_value_info(info.name, kind, found.inputs[info.name]))
    try:
        graph = onnx.shape_inference.infer_shapes(twin, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, ValueError):
        return {}
    shapes: dict[str, Shape] = {}
    for part in [graph, *bodies(graph)]:
        for info in [*part.value_info, *part.input, *part.output]:
            dims = info.type.tensor_type.shape.dim
            if info.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
                shapes[info.name] = tuple(d.dim_value for d in dims)
    return shapes
