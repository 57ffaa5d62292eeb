"""Costs: what each node takes on this machine in float and in integers, and what it takes to go from one to the other.

Times are of kernels in their place in the whole graph, as the runtime's own profile has them, and not of nodes on their own:
on its own a convolution pays for the layout that its neighbours share with it, and is not fused with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxq.audit import owner
from onnxq.exposure import BLOCKED, lanes
from onnxq.graph import Graph
from onnxq.timing import Kernel, kernel_times

BETWEEN = ("QuantizeLinear", "DequantizeLinear", "ReorderInput", "ReorderOutput")  # what stands between regions
Maker = Callable[[int], tuple[onnx.ModelProto, Mapping[str, np.ndarray]]]  # of a size: one op, and what it reads
SIZES = (1 << 10, 1 << 18)  # elements, to tell what a call takes from what an element does


def by_node(kernels: Iterable[Kernel], graph: Graph) -> dict[str, float]:
    """Microseconds by node of the graph; of nodes that were fused, the name of the kernel tells which one has the time.

    The runtime names a kernel after its node, or a blocked one after the tensor that it makes.
    """
    makers = {t.name: n.name for n in graph.nodes for t in n.outputs if t.name}
    names = {n.name for n in graph.nodes}
    found: dict[str, float] = {}
    for kernel in kernels:
        if kernel.op in BETWEEN:
            continue
        name = owner(kernel.name.removeprefix("fused "), names | makers.keys())
        if name is not None:
            node = name if name in names else makers[name]
            found[node] = found.get(node, 0.0) + kernel.micros
    return found


@dataclass(frozen=True)
class Price:
    """Microseconds of a call and of an element."""

    call: float
    element: float

    def of(self, elements: int) -> float:
        return self.call + self.element * elements


@dataclass(frozen=True)
class Prices:
    """What it takes to quantize and to dequantize a tensor, and to bring one of images from blocked to plain layout."""

    quantize: Price
    dequantize: Price
    layout: Price

    def crossing(self, shape: tuple[int, ...], *, into_integers: bool) -> float:
        size = int(np.prod(shape))
        return (self.quantize if into_integers else self.dequantize).of(size) + (
            self.layout.of(size) if len(shape) == 4 else 0.0
        )


@lru_cache(maxsize=4)
def prices(threads: int) -> Prices:
    """Measured on this machine, once in a process."""
    parts = {
        "quantize": [_quantizer],
        "dequantize": [_dequantizer],
        "layout": [_transpose] + ([_reorder] if lanes() else []),
    }
    return Prices(**{name: _price(makers, threads) for name, makers in parts.items()})


def _price(makers: Sequence[Maker], threads: int) -> Price:
    call = element = 0.0
    for make in makers:
        times = []
        for size in SIZES:
            model, feed = make(size)
            times.append(sum(k.micros for k in kernel_times([model], feed, threads=threads, seconds=0.05)[0]))
        slope = max(0.0, (times[1] - times[0]) / (SIZES[1] - SIZES[0]))
        element += slope
        call += max(0.0, times[0] - slope * SIZES[0])
    return Price(call, element)


def _model(node: onnx.NodeProto, given: tuple[int, list[int]], made: int, *constants: TensorProto) -> onnx.ModelProto:
    x, y = helper.make_tensor_value_info("x", *given), helper.make_tensor_value_info("y", made, None)
    graph = helper.make_graph([node], "g", [x], [y], list(constants))
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(BLOCKED, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def _scale() -> list[TensorProto]:
    return [helper.make_tensor("s", TensorProto.FLOAT, [], [0.02]), helper.make_tensor("z", TensorProto.UINT8, [], [128])]


def _quantizer(size: int) -> tuple[onnx.ModelProto, Mapping[str, np.ndarray]]:
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
    return _model(node, (TensorProto.FLOAT, [size]), TensorProto.UINT8, *_scale()), {"x": np.ones(size, np.float32)}


def _dequantizer(size: int) -> tuple[onnx.ModelProto, Mapping[str, np.ndarray]]:
    node = helper.make_node("DequantizeLinear", ["x", "s", "z"], ["y"])
    return _model(node, (TensorProto.UINT8, [size]), TensorProto.FLOAT, *_scale()), {"x": np.ones(size, np.uint8)}


def _transpose(size: int) -> tuple[onnx.ModelProto, Mapping[str, np.ndarray]]:
    shape = [1, 64, 4, size // 256]
    node = helper.make_node("Transpose", ["x"], ["y"], perm=[0, 2, 3, 1])
    return _model(node, (TensorProto.UINT8, shape), TensorProto.UINT8), {"x": np.ones(shape, np.uint8)}


def _reorder(size: int) -> tuple[onnx.ModelProto, Mapping[str, np.ndarray]]:
    shape = [1, 64, 4, size // 256]
    node = helper.make_node("ReorderInput", ["x"], ["y"], domain=BLOCKED)
    return _model(node, (TensorProto.FLOAT, shape), TensorProto.FLOAT), {"x": np.ones(shape, np.float32)}
