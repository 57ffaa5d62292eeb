"""remove-fake-quantize"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Constant, Graph, Node, Tensor, clip_bounds, value
from onnxq.model import Model
from onnxq.numerics import PerAxis, PerTensor, QuantParams, QuantType, dequantize, quantize
from onnxq.passmanager import Pass
from onnxq.recovery import inside, maker, of_codes


@dataclass(frozen=True)
class RemoveFakeQuantize(Pass):
    """Take rounding that is spelled out in float ops off a tensor, and remember what it was rounded with.

    Given:   %1 = Round(Clip(%0 / s + z, 0, 255));  %2 = (%1 - z) * s;  %3 = Conv(%2, W)     or without z
    Result:  %3 = Conv(%0, W)                                                       trained: s and z of %0
             %4 = Clip(%0, 0, 255 * s);  %3 = Conv(%4, W)                           where z is the least code
    Refused: a parameter is computed; the bounds are not those of 8 bits or fewer, or on an activation of fewer than 4, or
             leave zero out; the two scales differ; it is a graph output.

    The Clip may be before or after the Round. A constant is rounded now. As in remove-quantize-pairs, the range is written
    out where something beyond it can come that codes of 8 bits would let through.
    """

    name: ClassVar[str] = "remove-fake-quantize"

    def apply(self, model: Model) -> int:
        removed = 0
        for node in model.graph.find("Round"):
            found = _found(model.graph, node)
            if found is None:
                model.refuse(node, "it is not rounding to integers of at most 8 bits and back with constant parameters")
                continue
            source, result, params, (low, high) = found
            if isinstance(source, Constant):
                codes = np.clip(quantize(source.values, params), low, high).astype(params.type.dtype)
                weight = model.graph.constant(f"{source.name}_rounded", dequantize(codes, params))
                model.trained[weight.name] = params
                model.graph.replace_uses(result, weight)
            else:
                kept = of_codes(params, low, high)
                if kept is None:
                    model.refuse(node, "its bounds leave fewer codes than 4 bits have, or none for zero")
                    continue
                source = inside(model.graph, source, kept[0], always=kept[1])
                model.trained.setdefault(source.name, kept[0])
                model.graph.replace_uses(result, source)
            removed += 1
        model.graph.cleanup()
        return removed


def _found(graph: Graph, node: Node) -> tuple[Tensor, Tensor, QuantParams, tuple[int, int]] | None:
    """What is rounded, what comes out, the parameters, and the least and largest code."""
    bounds, before, after = None, node.inputs[0], node.outputs[0]
    clip = maker(graph, before, "Clip")
    if clip is not None:
        bounds, before = clip_bounds(clip), clip.inputs[0]
    zero, before = _constant_of(graph, maker(graph, before, "Add"), before)
    divided = maker(graph, before, "Div", "Mul")
    if divided is None:
        return None
    scale, source = _constant_of(graph, divided, before)
    if scale is None or not np.all(scale) or (divided.op == "Div" and divided.inputs[0] is not source):
        return None
    scale = np.asarray(scale if divided.op == "Div" else 1 / scale, np.float32)
    reader = graph.sole_consumer(after)
    if reader is not None and reader.op == "Clip":
        bounds, after = _both(bounds, clip_bounds(reader)), reader.outputs[0]
        reader = graph.sole_consumer(after)
    if reader is not None and reader.op in ("Sub", "Add") and zero is not None:
        taken, back = _constant_of(graph, reader, reader.outputs[0])
        if taken is None or not np.array_equal(taken if reader.op == "Sub" else -taken, zero) or back is not after:
            return None
        after = reader.outputs[0]
        reader = graph.sole_consumer(after)
    elif zero is not None:
        return None
    if reader is None or reader.op not in ("Mul", "Div"):
        return None
    again, back = _constant_of(graph, reader, reader.outputs[0])
    if again is None or not np.all(again) or back is not after or (reader.op == "Div" and reader.inputs[0] is not after):
        return None
    again = np.asarray(again if reader.op == "Mul" else 1 / again, np.float32)
    codes = None if bounds is None else _codes(*bounds)
    if (
        codes is None
        or graph.is_output(reader.outputs[0])
        or scale.shape != again.shape
        or not np.allclose(scale, again, rtol=1e-6, atol=0)
    ):
        return None
    params = _params(again, zero, QuantType.INT8 if codes[0] < 0 else QuantType.UINT8, source)
    return None if params is None else (source, reader.outputs[0], params, codes)


Bounds = tuple[float | None, float | None]


def _both(one: Bounds | None, other: Bounds) -> Bounds:
    """What is left of one and of the other."""
    lows, highs = ([end for end in ends if end is not None] for ends in zip(one or (None, None), other, strict=True))
    return max(lows, default=None), min(highs, default=None)


def _codes(low: float | None, high: float | None) -> tuple[int, int] | None:
    """The bounds as codes of int8 or uint8; None where they are not."""
    if low is None or high is None or not float(low).is_integer() or not float(high).is_integer() or low >= high:
        return None
    kind = QuantType.INT8 if low < 0 else QuantType.UINT8
    return (int(low), int(high)) if kind.qmin <= low and high <= kind.qmax else None


def _constant_of(graph: Graph, node: Node | None, default: Tensor) -> tuple[np.ndarray | None, Tensor]:
    """The constant operand of a node of two, and the other operand; None and `default` where there is none."""
    if node is None:
        return None, default
    for k in (1, 0):
        values = value(node.inputs[k])
        if values is not None:
            return values, node.inputs[1 - k]
    return None, default


def _params(scale: np.ndarray, zero: np.ndarray | None, kind: QuantType, source: Tensor) -> QuantParams | None:
    """Of one number, or of one number a channel, laid out so that it broadcasts against a tensor of known values."""
    zeros = np.zeros(1) if zero is None else zero
    if zeros.size not in (1, scale.size) or not zeros.size:
        return None
    zeros = np.broadcast_to(zeros.reshape(-1), (scale.size,)).reshape(scale.shape)
    if not np.array_equal(zeros, np.rint(zeros)) or zeros.min() < kind.qmin or zeros.max() > kind.qmax or scale.min() <= 0:
        return None
    if scale.size == 1:
        return QuantParams(scale.reshape(()), zeros.reshape(()).astype(kind.dtype), kind, PerTensor())
    if not isinstance(source, Constant) or scale.ndim > source.values.ndim:
        return None
    wide = (1,) * (source.values.ndim - scale.ndim) + scale.shape
    axes = [a for a, size in enumerate(wide) if size > 1]
    if len(axes) != 1 or wide[axes[0]] != source.values.shape[axes[0]]:
        return None
    return QuantParams(scale.reshape(-1), zeros.reshape(-1).astype(kind.dtype), kind, PerAxis(axes[0]))
