"""select-dynamic"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Constant, Node, Tensor, value
from onnxq.model import DYNAMIC_OPSET, OUTPUT, Dynamic, Model, Observed, Shared
from onnxq.numerics import QuantParams
from onnxq.passmanager import Pass
from onnxq.sketch import TensorSketch


@dataclass(frozen=True)
class SelectDynamic(Pass):
    """Quantize the input of linear layers anew at every run where one range for all runs costs too much.

    Given:   specs: %0 observed, read quantized by MatMuls and Gemms alone; %0 and their results are made and read in float
    Result:  spec of %0: dynamic
    Refused: the error of the static range is not `ratio` times that of a range for each feed, or fewer than 2 feeds were
             seen (neither counts where ranges of each run were measured to be faster); something else reads %0 quantized;
             the target does not quantize dynamically; the opset is below 11.

    Errors are mean squares: of the static parameters over the tensor's histogram, what is clipped included; of the dynamic
    ones step^2 / 12 of the feed's own range, the median of the feeds. The ratio is far from 1 because a feed in use may hold
    a larger batch than one in calibration, and then has a wider range.
    """

    name: ClassVar[str] = "select-dynamic"
    ratio: float = 4.0

    def apply(self, model: Model) -> int:
        if not model.target.dynamic or model.calibration is None or model.graph.opset < DYNAMIC_OPSET:
            return 0
        chosen = 0
        integers = {id(model.absorbed(n)) for n in model.compute_nodes() if n.name in model.planned}
        integers |= {id(t) for n in model.graph.nodes if n.name in model.planned for t in n.outputs}
        for name, tensor in model.graph.tensors().items():
            sketch = model.calibration.sketches.get(name)
            if sketch is None or not isinstance(model.specs.get(name), Observed):
                continue
            layers = None if id(tensor) in integers else _linear_readers(model, tensor)
            if layers is None or (len(sketch.series) < 2 and not model.at_run_time):
                continue
            if not model.at_run_time and _static_error(sketch, model.params_of(name)) < self.ratio * _dynamic_error(sketch):
                for node in layers:
                    model.refuse(node, "a static range serves it as well")
                continue
            model.specs[name] = Dynamic()
            chosen += 1
        return chosen


def _linear_readers(model: Model, tensor: Tensor) -> list[Node] | None:
    """The planned MatMuls and Gemms that read a tensor quantized, where nothing else does; else None."""
    graph = model.graph
    if isinstance(tensor, Constant) or any(isinstance(s, Shared) and s.tensor == tensor.name for s in model.specs.values()):
        return None
    nodes = []
    for node, index in graph.readers(tensor):
        if ((node.name if node else OUTPUT), index) not in model.quantized_inputs:
            continue
        if node is None or node.op not in ("MatMul", "Gemm") or index != 0 or node.name not in model.planned:
            return None
        weight, result = value(node.inputs[1]), model.absorbed(node)
        if (
            weight is None
            or weight.ndim != 2
            or model.gains_a_dimension(node)
            or any(r in model.quantized_inputs for r in model.readers(result))
        ):
            return None
        nodes.append(node)
    return nodes or None


def _static_error(sketch: TensorSketch, params: QuantParams) -> float:
    """Mean squared error of rounding and clipping to the parameters, over the histogram."""
    bins = sketch.histogram()
    clipped = np.clip(bins.centre, params.rmin, params.rmax) - bins.centre
    errors = np.square(clipped) + np.where(clipped == 0, float(params.scale) ** 2 / 12, 0)
    return float((errors * bins.count).sum() / bins.count.sum())


def _dynamic_error(sketch: TensorSketch) -> float:
    ranges = np.array(list(sketch.series.values()))
    steps = (np.maximum(ranges[:, 1], 0) - np.minimum(ranges[:, 0], 0)) / 255
    return float(np.median(np.square(steps)) / 12)
