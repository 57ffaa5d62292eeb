"""Fusing: the conditions on which onnxruntime's CPU provider replaces a float node between DQ and Q by an integer kernel."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from onnxq.wiring import DQ, Q, Wiring, is_arm

BYTES = frozenset([TensorProto.UINT8, TensorProto.INT8])
CODES: dict[int, tuple[int, int]] = {TensorProto.UINT8: (0, 255), TensorProto.INT8: (-128, 127)}
BIASED = frozenset(["Conv", "Gemm"])
SUMS = frozenset(["MatMul", "Gemm"])  # integer with a float output as well
UNARY = frozenset(["AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid", "Softmax"])
MOVING = frozenset(["Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Expand", "Tile", "Split"])
MOVING |= {"Gather", "GatherElements"}
MOVING_BYTES = frozenset(["MaxPool", "ReduceMax", "ReduceMin", "DepthToSpace", "Resize"])
DATA = (
    {op: slice(0, 1) for op in UNARY | MOVING | MOVING_BYTES}
    | {"Conv": slice(0, 2), "MatMul": slice(0, 2), "Gemm": slice(0, 2), "Where": slice(1, 3)}
    | {"Add": slice(0, 2), "Mul": slice(0, 2), "Concat": slice(0, None)}
)


def why_float(node: onnx.NodeProto, where: Wiring) -> str:
    """The first condition of an integer kernel that the node does not meet."""
    op = node.op_type
    if op == Q:
        return "quantized again with other parameters"
    if op == DQ:
        return "read and quantized again with other parameters"
    if op in ("If", "Loop", "Scan") or op not in DATA:
        return f"read in a body of {op}" if op in ("If", "Loop", "Scan") else f"onnxruntime has no integer kernel for {op}"
    if op == "Resize" and next((a.s for a in node.attribute if a.name == "mode"), b"nearest") != b"nearest":
        return "onnxruntime has an integer kernel for Resize in mode nearest only"
    data = [name for name in node.input[DATA[op]] if name]
    dequantized = [where.made_by(name, DQ) for name in data]
    for k, name in enumerate(data):
        if dequantized[k] is None:
            part = f"weight {name}" if k == 1 and op in BIASED and name in where.constants else f"input {where.label(name)}"
            return f"{op}'s {part} has no Q and DQ"
    sources = [d for d in dequantized if d is not None]
    return (
        _why_parameters(node, where, sources)
        or _why_output(node, where)
        or _why_types(node, where, sources)
        or _why_bias(node, where)
        or "none of the known conditions fails"
    )


def _why_parameters(node: onnx.NodeProto, where: Wiring, sources: list[onnx.NodeProto]) -> str | None:
    for name, source in zip(node.input[DATA[node.op_type]], sources, strict=False):
        scale, weight = where.constants.get(source.input[1]), source.input[0] in where.constants
        if scale is None and node.op_type in MOVING | MOVING_BYTES:
            return f"the scale of {where.label(name)} is no constant"
        if scale is not None and not weight and int(np.prod(scale.dims)) > 1:
            return f"{node.op_type}'s input {where.label(name)} is quantized per channel, and is no weight"
    return None


def _why_output(node: onnx.NodeProto, where: Wiring) -> str | None:
    op = node.op_type
    for output in [o for o in node.output if o]:
        readers = where.readers.get(output, [])
        clip = readers[0] if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip") else None
        after = where.readers.get(clip.output[0], []) if clip is not None else []
        if clip is not None and len(after) == 1 and after[0].op_type == Q and op not in MOVING | MOVING_BYTES:
            if _keeps(clip, after[0], where):
                continue
            return f"the {clip.op_type} behind {op} changes values that its Q would not: the range of {output} is wider"
        quantizing = [r for r in readers if r.op_type == Q]
        others = sorted({r.op_type for r in readers if r.op_type != Q})
        if not quantizing:
            if op in SUMS:
                continue
            readers_in_float = f"{', '.join(others) or 'nothing'} reads it"
            why = "it is an output of the graph" if output in where.outputs else readers_in_float
            return f"{op}'s output {output} has no Q: {why}"
        if output in where.outputs:
            return f"{op}'s output {output} is an output of the graph too"
        if others:
            return f"{op}'s output {output} is read in float too, by {', '.join(others)}"
        if len(quantizing) > 1:
            return f"{op}'s output {output} is read by {len(quantizing)} Q"
    return None


def _keeps(clip: onnx.NodeProto, quantize: onnx.NodeProto, where: Wiring) -> bool:
    """Whether the codes behind a Relu or Clip reach no value that it takes away."""
    attributes = {a.name: a.f for a in clip.attribute}
    bounds = [0.0 if clip.op_type == "Relu" else attributes.get("min", -np.inf), attributes.get("max", np.inf)]
    for k in (1, 2):
        if len(clip.input) > k and clip.input[k]:
            bound = where.parameter(clip, k)
            if bound is None:
                return False
            bounds[k - 1] = float(bound.reshape(-1)[0])
    scale, zero = where.parameter(quantize, 1), where.parameter(quantize, 2)
    if scale is None or scale.size > 1:
        return False
    codes = CODES.get(where.code_type(quantize), (-(2**15), 2**16 - 1))
    low, high = (float(scale.item()) * (code - (0 if zero is None else int(zero.item()))) for code in codes)
    return low >= bounds[0] and high <= bounds[1]


def _why_types(node: onnx.NodeProto, where: Wiring, sources: list[onnx.NodeProto]) -> str | None:
    op = node.op_type
    targets = [r for o in node.output for r in _behind(o, where)]
    kinds = [where.kernel_type(n) for n in sources]
    for name, kind in zip(node.input[DATA[op]], kinds, strict=False):
        if kind not in BYTES and op not in MOVING:
            return f"{op}'s input {where.label(name)} has {_name(kind)} codes"
    weighted = op in ("Conv", "MatMul", "Gemm")
    if weighted and kinds[0] == TensorProto.INT8 and (kinds[1] != TensorProto.INT8 or (op != "Gemm" and not is_arm())):
        return f"{op}'s input {where.label(node.input[0])} has int8 codes" + _several(sources[0], where) + _wants(kinds)
    told = [(n, where.kernel_type(n)) for n in ([sources[0]] if weighted else sources) + targets]
    other = next((n for n, kind in told if kind != told[0][1]), None)
    if other is not None:
        first, second = (_name(where.kernel_type(n)) for n in (told[0][0], other))
        shared = next((s for n, _ in told if (s := _several(n, where))), "")
        return f"types of the codes around {op} differ: {first} and {second}{shared}"
    if op in MOVING | MOVING_BYTES and any(_parameters(n, where) != _parameters(sources[0], where) for n in targets):
        return f"the codes behind {op} have another scale or zero point than those before it"
    return None


def _behind(output: str, where: Wiring) -> list[onnx.NodeProto]:
    readers = where.readers.get(output, [])
    if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
        readers = where.readers.get(readers[0].output[0], [])
    return [r for r in readers if r.op_type == Q]


def _several(node: onnx.NodeProto, where: Wiring) -> str:
    """Why int8 codes stay so on x86, where they do."""
    codes = node.output[0] if node.op_type == Q else node.input[0]
    readers = len(where.readers.get(codes, []))
    if where.kernel_type(node) != TensorProto.INT8 or is_arm():
        return ""
    if codes in where.constants:
        return f" (those of the constant {where.label(codes)}, where those of activations become uint8 here)"
    return f" ({readers} nodes read those of {where.label(codes)}, so that they stay int8)" if readers > 1 else ""


def _wants(kinds: list[int]) -> str:
    return ", its weight uint8" if kinds[1] == TensorProto.UINT8 else "; this machine's kernels take uint8"


def _parameters(node: onnx.NodeProto, where: Wiring) -> tuple[object, ...]:
    found = [where.parameter(node, k) for k in (1, 2)]
    return tuple(None if f is None or not f.any() else tuple(f.reshape(-1).tolist()) for f in found)


def _why_bias(node: onnx.NodeProto, where: Wiring) -> str | None:
    bias = node.input[2] if node.op_type in BIASED and len(node.input) > 2 else ""
    if not bias:
        return None
    source = where.made_by(bias, DQ)
    if source is None or where.code_type(source) != TensorProto.INT32:
        kind = "float" if source is None else _name(where.code_type(source))
        return f"{node.op_type}'s bias {where.label(bias)} is {kind}, not int32"
    if next((a.f for a in node.attribute if a.name == "beta"), 1.0) != 1.0:
        return f"{node.op_type} scales its bias (beta is not 1)"
    if node.op_type != "Conv":  # the kernel of Gemm takes any scale for the product
        return None
    scales = [where.parameter(d, 1) for d in (where.made_by(n, DQ) for n in node.input) if d is not None]
    x, weight, own = scales if len(scales) == 3 else (None, None, None)
    if x is None or weight is None or own is None or np.allclose(own, x * weight, rtol=1e-5, atol=0):
        return None
    return f"{node.op_type}'s bias {where.label(bias)} has another scale than that of its input times that of its weight"


def _name(kind: int) -> str:
    return TensorProto.DataType.Name(kind).lower()
