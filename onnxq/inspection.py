"""Inspection: what the runtime runs for any file as it stands, by count and by multiply-accumulates, and what it left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from onnxq import runtime, workload
from onnxq.audit import FLOAT_KERNELS, INTEGER_KERNELS, KernelCount
from onnxq.proto import bodies
from onnxq.source import Source, load_any
from onnxq.unfused import Unfused, unfused
from onnxq.workload import Shape

OTHER_KERNELS = frozenset(["GroupQueryAttention", "DecoderMaskedMultiHeadAttention", "MoE", "MatMulBnb4", "DeformConv"])
COMPUTE_KERNELS = INTEGER_KERNELS - {"GatherBlockQuantized"} | FLOAT_KERNELS | OTHER_KERNELS  # those that multiply
FLOAT_OP = {
    "MatMulNBits": "MatMul",
    "QGemm": "Gemm",
    "FusedGemm": "Gemm",
    "TransposeMatMul": "MatMul",
    "MatMulInteger": "MatMul",
    "MatMulIntegerToFloat": "MatMul",
    "DynamicQuantizeMatMul": "MatMul",
    "DynamicQuantizeLSTM": "LSTM",
    "ConvInteger": "Conv",
    "GatherBlockQuantized": "Gather",
    "QMoE": "MoE",
    "QAttention": "Attention",
}


@dataclass(frozen=True)
class Uncounted:
    """A compute node whose multiply-accumulates are in no sum, and why."""

    node: str
    op: str
    reason: str


@dataclass(frozen=True)
class Inspection:
    """What the runtime runs for a file. Multiply-accumulates are of one run on inputs of the shapes `counted_for`."""

    integer: int
    float: int
    kernels: dict[str, int]
    dequantized_in_front: list[str]
    integer_macs: int
    float_macs: int
    macs: dict[str, int]
    coverage: dict[str, KernelCount]
    counted_for: dict[str, tuple[int, ...]]
    uncounted: list[Uncounted]
    unfused: list[Unfused] = field(default_factory=list)
    boundary: list[str] = field(default_factory=list)

    @property
    def integer_mac_share(self) -> float | None:
        """Share of the counted multiply-accumulates that run in integers; None where there are none."""
        total = self.integer_macs + self.float_macs
        return self.integer_macs / total if total else None


def count_kernels(proto: onnx.ModelProto) -> dict[str, int]:
    """How often each kernel is in an optimized graph and in its bodies."""
    kernels: dict[str, int] = {}
    for graph in [proto.graph, *bodies(proto.graph)]:
        for node in graph.node:
            kernels[node.op_type] = kernels.get(node.op_type, 0) + 1
    return dict(sorted(kernels.items()))


def compute_counts(kernels: Mapping[str, int]) -> tuple[int, int]:
    """(integer, float) compute nodes."""
    integer = sum(n for op, n in kernels.items() if op in INTEGER_KERNELS)
    return integer, sum(n for op, n in kernels.items() if op in FLOAT_KERNELS)


def is_integer(kernel: str) -> bool:
    return kernel in INTEGER_KERNELS or kernel.startswith("QLinear")


def inspect(model: Source | str | Path | bytes | onnx.ModelProto) -> Inspection:
    """What the runtime makes of any ONNX model, ours or not; bodies included. Raises ModelError."""
    source = model if isinstance(model, Source) else load_any(model)
    loadable = source.loadable
    with runtime.optimized_in_folder(loadable) as (proto, folder):
        shapes = workload.shapes_of(proto, folder, _wanted)
    kernels = count_kernels(proto)
    integer, other = compute_counts(kernels)
    missing = any(name not in shapes.of for g in [proto.graph, *bodies(proto.graph)] for name in _wanted(g))
    left: tuple[list[Unfused], list[str]] = ([], [])
    if missing or kernels.keys() & {"QuantizeLinear", "DequantizeLinear"}:
        with runtime.optimized_in_folder(loadable, fused=False) as (before, _):
            left = unfused(proto, before, source.proto)
            if missing:
                shapes.of = workload.inferred(before, shapes) | workload.inferred(proto, shapes) | shapes.of
    counted, uncounted = _count(proto.graph, shapes)
    macs: dict[str, int] = {}
    for kernel, work in counted:
        macs[kernel] = macs.get(kernel, 0) + work
    return Inspection(
        integer=integer,
        float=other,
        kernels=kernels,
        dequantized_in_front=_dequantized_in_front(proto),
        integer_macs=sum(work for kernel, work in macs.items() if is_integer(kernel)),
        float_macs=sum(work for kernel, work in macs.items() if not is_integer(kernel)),
        macs=dict(sorted(macs.items())),
        coverage=_coverage(kernels, macs),
        counted_for=shapes.inputs,
        uncounted=uncounted,
        unfused=left[0],
        boundary=left[1],
    )


def _wanted(graph: onnx.GraphProto) -> set[str]:
    return {name for n in graph.node if n.op_type in COMPUTE_KERNELS for name in (*n.input, n.output[0]) if name}


def _dequantized_in_front(proto: onnx.ModelProto) -> list[str]:
    found = []
    for graph in [proto.graph, *bodies(proto.graph)]:
        dequantized = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear"}
        found += [n.name for n in graph.node if n.op_type in FLOAT_KERNELS and n.input and n.input[0] in dequantized]
    return found


def _count(graph: onnx.GraphProto, shapes: workload.Shapes) -> tuple[list[tuple[str, int]], list[Uncounted]]:
    """(kernel, multiply-accumulates) of each compute node, and those that were not counted."""
    counted, uncounted = [], []
    for node, runs in _with_runs(graph, shapes, 1):
        if node.op_type not in COMPUTE_KERNELS:
            continue
        attrs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        try:
            work = workload.multiply_accumulates(node.op_type, node.domain, attrs, *_shapes_of(node, shapes))
        except (LookupError, ValueError, workload.NoFormulaError) as error:
            unknown = isinstance(error, workload.NoFormulaError)
            why = str(error) if unknown else "; ".join([*shapes.failures, "its shapes are not known"])
            uncounted.append(Uncounted(node.name or node.output[0], node.op_type, why))
        else:
            counted.append((node.op_type, work * runs))
    return counted, uncounted


def _shapes_of(node: onnx.NodeProto, shapes: workload.Shapes) -> tuple[Callable[[int], Shape], Callable[[], Shape]]:
    return lambda index: shapes.of[node.input[index]], lambda: shapes.of[node.output[0]]


def _with_runs(graph: onnx.GraphProto, shapes: workload.Shapes, runs: int) -> Iterator[tuple[onnx.NodeProto, int]]:
    """Every node with how often it runs; both branches of an If are taken to."""
    for node in graph.node:
        yield node, runs
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
                yield from _with_runs(body, shapes, runs * shapes.steps.get("|".join(node.output), 1))


def _coverage(kernels: Mapping[str, int], macs: Mapping[str, int]) -> dict[str, KernelCount]:
    """The compute kernels by the float op that they stand for."""
    table: dict[str, KernelCount] = {}
    for kernel in kernels.keys() & (INTEGER_KERNELS | FLOAT_KERNELS):
        op = FLOAT_OP.get(kernel, kernel.removeprefix("QLinear").removeprefix("Fused"))
        old, count, work = table.get(op, KernelCount()), kernels[kernel], macs.get(kernel, 0)
        if is_integer(kernel):
            table[op] = KernelCount(old.integer + count, old.float, old.integer_macs + work, old.float_macs)
        else:
            table[op] = KernelCount(old.integer, old.float + count, old.integer_macs, old.float_macs + work)
    return dict(sorted(table.items()))
