"""Recovery: what Q and DQ nodes say of the tensors around them, for models that come in quantized."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx

from onnxq.graph import ONNX_DOMAINS, Constant, Graph, Node, Tensor, clip_bounds, input_at, value
from onnxq.numerics import PerAxis, PerTensor, QuantParams, QuantType, dequantize, quantize

DOMAINS = (*ONNX_DOMAINS, "com.microsoft")
WIDE_SHARE = 0.75  # of all codes, with which a range is not called narrow
FEWEST_STEPS = 15  # of a range, those of 4 bits, for which a finer grid does
CLIP_INPUTS = 11  # the first opset in which the bounds of Clip are inputs
NEVER_NEGATIVE = ("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Sqrt", "Exp", "Softplus")
MOVING = (  # ops whose result holds nothing but what they read, be it floats or their codes
    "MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather", "Identity", "Expand",
    "DepthToSpace", "SpaceToDepth", "Tile",
)  # fmt: skip
BETWEEN = ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax")  # never below all that they read
TYPES = {t.value: t for t in (QuantType.INT8, QuantType.UINT8, QuantType.INT16, QuantType.UINT16, QuantType.INT32)}


def find(graph: Graph, *op_types: str) -> list[Node]:
    """The nodes of these types, of ONNX or of com.microsoft, which had some of them first."""
    return [n for n in graph.nodes if n.op in op_types and n.domain in DOMAINS]


def maker(graph: Graph, tensor: Tensor, *op_types: str) -> Node | None:
    """The node that makes a tensor, if it is of one of these types."""
    node = graph.producer(tensor)
    return node if node is not None and node.op in op_types and node.domain in DOMAINS else None


def params_at(node: Node) -> QuantParams | None:
    """The parameters of a QuantizeLinear or DequantizeLinear; None where they are computed, in blocks, or of another type.

    Without a zero point the type is that of the codes, and uint8 where nothing tells it.
    """
    scale, zero = input_at(node, 1), input_at(node, 2)
    kind = zero.dtype if zero is not None else _code_type(node)
    return params_of(scale, zero, kind, node.attrs.get("axis", 1), blocked=bool(node.attrs.get("block_size", 0)))


def _code_type(node: Node) -> object:
    """The type of the codes where no zero point tells it."""
    if node.op == "QuantizeLinear":
        said = int(node.attrs.get("output_dtype", 0))
        return onnx.helper.tensor_dtype_to_np_dtype(said) if said else np.uint8
    codes = node.inputs[0]
    source = codes.inputs[0] if codes.inputs else None
    return _code_type(source) if source is not None and source.op == "QuantizeLinear" else codes.dtype


def params_of(
    scale: Tensor | None, zero: Tensor | None, kind: object, axis: int, *, blocked: bool = False
) -> QuantParams | None:
    """Parameters of constants: scale () or (C,), zero point of the same shape, or None for 0."""
    scales, zeros = value(scale), value(zero)
    if blocked or scales is None or scales.dtype != np.float32 or (zero is not None and zeros is None):
        return None
    name = "uint8" if kind is None else "" if isinstance(kind, int) else np.dtype(kind).name  # type: ignore[call-overload]
    if name not in TYPES or scales.ndim > 1:
        return None
    of = TYPES[name]
    zeros = np.zeros(scales.shape, of.dtype) if zeros is None else zeros
    if zeros.ndim > 1 or not scales.size or not zeros.size:
        return None
    if scales.size == 1 and np.all(zeros == zeros.reshape(-1)[0]):
        return QuantParams(scales.reshape(()), zeros.reshape(-1)[:1].reshape(()), of, PerTensor())
    if 1 not in (scales.size, zeros.size) and scales.size != zeros.size:
        return None
    scales, zeros = np.broadcast_arrays(scales.reshape(-1), zeros.reshape(-1))
    return QuantParams(np.array(scales), np.array(zeros), of, PerAxis(axis))


def kept_range(graph: Graph, node: Node, params: QuantParams) -> tuple[QuantParams, bool] | None:
    """The parameters of a DequantizeLinear for the range that a Clip of its codes leaves, if any: see `of_codes`."""
    clip = maker(graph, node.inputs[0], "Clip")
    ends = (None, None) if clip is None else [value(input_at(clip, k)) for k in (1, 2)]
    low, high = (None if end is None else int(end) for end in ends)
    return of_codes(params, params.type.qmin if low is None else low, params.type.qmax if high is None else high)


def of_codes(params: QuantParams, low: int, high: int) -> tuple[QuantParams, bool] | None:
    """Parameters for the range that codes of low to high have, and whether what is beyond it must be cut off in any case.

    They stay as they are where that leaves three quarters of all codes or more, about a zero point inside; else the range
    gets all codes of the type, and the zero point is the code nearest to where it was. None where it lies outside of the
    range, and for so few codes that a finer grid would be another function.
    """
    kind, zero = params.type, int(params.zero_point)
    low, high = max(low, kind.qmin), min(high, kind.qmax)
    levels = kind.qmax - kind.qmin
    if not low <= zero <= high or high - low < FEWEST_STEPS:
        return None
    if (low, high) == (kind.qmin, kind.qmax) or (high - low >= WIDE_SHARE * levels and low < zero < high):
        return params, zero == kind.qmax
    kept = kind.qmin + round((zero - low) * levels / (high - low))
    scale = np.float32(params.scale) * np.float32((high - low) / levels)
    return replace(params, scale=np.asarray(scale, np.float32), zero_point=np.asarray(kept, kind.dtype)), True


def inside(graph: Graph, source: Tensor, params: QuantParams, *, always: bool = False) -> Tensor:
    """The tensor as its QuantizeLinear lets it through, where codes that have nothing below zero may stand for a Relu.

    A quantizer takes away a Relu or Clip in front of such codes: the tensor is clipped to their range, unless what makes it
    shows that nothing in it is negative; or `always`.
    """
    if not always and (int(params.zero_point) != params.type.qmin or _is_never_negative(graph, source)):
        return source
    kind = np.float32 if source.dtype is None else source.dtype
    low, high = (np.asarray(end, kind) for end in (params.rmin, params.rmax))
    result = graph.variable(f"{source.name}_inside", source.dtype, source.shape)
    if graph.opset < CLIP_INPUTS:
        graph.insert("Clip", [source], [result], {"min": float(low), "max": float(high)})
    else:
        bounds = [graph.constant(f"{source.name}_{end}", values) for end, values in (("low", low), ("high", high))]
        graph.insert("Clip", [source, *bounds], [result])
    return result


def _is_never_negative(graph: Graph, tensor: Tensor) -> bool:
    node = graph.producer(tensor)
    while node is not None and node.op in (*MOVING, *BETWEEN) and node.inputs:
        tensor = node.inputs[0]
        node = graph.producer(tensor)
    if node is None:
        return False
    if node.op == "Clip":
        low = clip_bounds(node)[0]
        return low is not None and low >= 0
    return node.op in NEVER_NEGATIVE


def same(one: QuantParams, other: QuantParams) -> bool:
    return (
        one.type == other.type
        and one.granularity == other.granularity
        and np.array_equal(one.scale, other.scale)
        and np.array_equal(one.zero_point, other.zero_point)
    )


def fits(params: QuantParams, shape: tuple[int, ...]) -> QuantParams | None:
    """The parameters with their axis counted from the front of this shape; None where they do not fit it."""
    if not isinstance(params.granularity, PerAxis):
        return params
    axis = params.granularity.axis + (len(shape) if params.granularity.axis < 0 else 0)
    if not 0 <= axis < len(shape) or params.scale.shape != (shape[axis],):
        return None
    return replace(params, granularity=PerAxis(axis))


def codes_of(graph: Graph, tensor: Tensor) -> np.ndarray | None:
    """Integer codes that are known: a constant, or QuantizeLinear of one, with or without a Clip; else None."""
    if isinstance(tensor, Constant):
        return None if isinstance(tensor.dtype, int) else tensor.values
    clip = maker(graph, tensor, "Clip")
    if clip is not None:
        codes, low, high = codes_of(graph, clip.inputs[0]), value(input_at(clip, 1)), value(input_at(clip, 2))
        return None if codes is None or low is None or high is None else np.clip(codes, low, high)
    node = maker(graph, tensor, "QuantizeLinear")
    values = None if node is None else value(node.inputs[0])
    params = None if node is None or values is None else params_at(node)
    params = None if params is None or values is None else fits(params, values.shape)
    if values is None or params is None or values.dtype != np.float32:
        return None
    return quantize(values, params)


def floats_of(codes: np.ndarray, params: QuantParams) -> np.ndarray | None:
    """The float32 values of codes; None where the parameters do not fit them."""
    fitting = fits(params, codes.shape)
    return None if fitting is None or codes.dtype != fitting.type.dtype else dequantize(codes, fitting)
