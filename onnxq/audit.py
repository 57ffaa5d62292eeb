"""What the runtime made of each node: integer or float kernel, by count and by multiply-accumulates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from onnxq import runtime, workload
from onnxq.graph import Graph, Node, value
from onnxq.model import Entry, Model, Reason, State

COMPUTE = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN", "Einsum"})
FLOAT_KERNELS = COMPUTE | {
    "FusedConv",
    "FusedMatMul",
    "TransposeMatMul",
    "FusedGemm",
    "Attention",
    "MultiHeadAttention",
}
INTEGER_KERNELS = frozenset(
    [
        "QLinearConv",
        "QLinearMatMul",
        "QGemm",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "ConvInteger",
        "MatMulNBits",
        "DynamicQuantizeLSTM",
        "QAttention",
        "QMoE",
        "GatherBlockQuantized",
    ]
)
INTEGER_OTHER = frozenset(
    [
        "QLinearAdd",
        "QLinearMul",
        "QLinearConcat",
        "QLinearAveragePool",
        "QLinearGlobalAveragePool",
        "QLinearSigmoid",
        "QLinearLeakyRelu",
        "QLinearSoftmax",
        "QLinearWhere",
    ]
)


@dataclass(frozen=True)
class KernelCount:
    """Kernels of one float op: how many the runtime runs in integers and in float, and their multiply-accumulates."""

    integer: int = 0
    float: int = 0
    integer_macs: int = 0
    float_macs: int = 0


def run_in_integers(proto: onnx.ModelProto, model: Model) -> set[str]:
    """The nodes of the model's reference that the runtime runs in integer kernels, planned or not.

    At the EXTENDED level a QLinearConv keeps its node's name and other kernels have it as a prefix. A planned node that
    only moves data counts when what it reads is not dequantized first, or when nothing is left of it; any other only when
    its integer kernel is seen. Of another provider than the CPU's the placement is taken at its word.
    """
    if not model.target.audited:
        return set(model.planned)
    assert model.reference is not None
    names = {n.name for n in model.reference.nodes}
    graph = runtime.optimized(proto).graph
    makers = {o: n for n in graph.node for o in n.output}
    floats: set[str] = set()
    found: set[str] = set()
    for node in graph.node:
        name = owner(node.name.removeprefix("fused "), names)  # as a float layer with its activation is renamed
        if name is None or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        if node.op_type in INTEGER_KERNELS | INTEGER_OTHER:
            found.add(name)
        elif node.op_type in FLOAT_KERNELS or _reads_dequantized(node, makers):
            floats.add(name)
    moving = {n.name for n in model.reference.nodes if n.op in model.target.pass_through}
    return found | (model.planned & moving - floats)


def owner(name: str, names: set[str]) -> str | None:
    """The longest of the names that the runtime's name is, or begins with."""
    while name:
        if name in names:
            return name
        name = name[:-1]
    return None


def _reads_dequantized(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> bool:
    first = makers.get(node.input[0]) if node.input else None
    return first is not None and first.op_type == "DequantizeLinear"


def complete_ledger(model: Model, integer: set[str]) -> None:
    """Give every compute node of the reference, and every node that was placed, its line: the runtime says which kernel."""
    reference = model.reference
    assert reference is not None
    made = [n for scope in model.graph.scopes() for n in scope.nodes]
    dynamic = {n.name for n in made if n.op in ("MatMulInteger", "DynamicQuantizeLSTM")}
    for node in reference.nodes:
        entry = model.ledger.get(node.name)
        if node.name in integer:
            model.ledger[node.name] = Entry(node.op, State.DYNAMIC if node.name in dynamic else State.INTEGER)
        elif node.op in FLOAT_KERNELS and entry is None:
            simulated = model.target.simulated and node.name in model.planned
            model.ledger[node.name] = Entry(node.op, State.FLOAT, Reason.SIMULATED if simulated else Reason.UNSUPPORTED)
        for body in [part for b in node.bodies for part in (b, *b.subgraphs(recursive=True))]:
            for inner in body.nodes:
                if inner.name in dynamic:
                    model.ledger[inner.name] = Entry(inner.op, State.DYNAMIC)
                elif inner.op in FLOAT_KERNELS and inner.name not in model.ledger:
                    model.ledger[inner.name] = Entry(inner.op, State.FLOAT, Reason.IN_BODY, f"body of {node.name}")
    for name in [n for n, e in model.ledger.items() if e.is_integer and n not in integer | dynamic]:
        model.ledger[name] = Entry(model.ledger[name].op, State.FLOAT, Reason.NOT_FUSED)


def multiply_accumulates(graph: Graph, feed: Mapping[str, np.ndarray], threads: int = 0) -> dict[str, int]:
    """Multiply-accumulates of the Conv, ConvTranspose, MatMul, Gemm and recurrent nodes outside bodies, for this feed."""
    nodes = graph.find("Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN")
    names = [t.name for n in nodes for t in (*n.inputs[:3], *n.outputs[:1]) if t.name and value(t) is None]
    session = runtime.Session(runtime.exposed(graph.to_stored_proto(), names), threads=threads, config=runtime.UNPACKED)
    values = {**feed, **session.run(feed)}
    shapes = {name: array.shape for name, array in values.items() if isinstance(array, np.ndarray)}
    return {n.name: _macs(n, shapes) for n in nodes}


def _macs(node: Node, shapes: Mapping[str, tuple[int, ...]]) -> int:
    def shape(index: int) -> tuple[int, ...]:
        tensor = node.inputs[index]
        values = value(tensor)
        return shapes[tensor.name] if values is None else values.shape

    return workload.multiply_accumulates(node.op, node.domain or "", node.attrs, shape, lambda: shapes[node.outputs[0].name])


def coverage(ledger: Mapping[str, Entry], macs: Mapping[str, int]) -> dict[str, KernelCount]:
    """Kernel counts by float op type."""
    table: dict[str, KernelCount] = {}
    for name, entry in ledger.items():
        old, work = table.get(entry.op, KernelCount()), macs.get(name, 0)
        if entry.is_integer:
            table[entry.op] = KernelCount(old.integer + 1, old.float, old.integer_macs + work, old.float_macs)
        else:
            table[entry.op] = KernelCount(old.integer, old.float + 1, old.integer_macs, old.float_macs + work)
    return dict(sorted(table.items()))
