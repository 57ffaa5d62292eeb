"""collect-statistics"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.calibration import Calibration, collect, hash_of_model
from onnxq.errors import CalibrationError
from onnxq.graph import Constant
from onnxq.model import Model, Observed
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class CollectStatistics(Pass):
    """Run the samples through the float model and sketch every tensor that a spec observes.

    Given:   specs: %1 observed, %2 shared with %1, W observed (a constant)
    Result:  the graph unchanged; sketches: %1, with per-channel statistics where a Conv, MatMul or Gemm reads it
    Refused: statistics were given from a file: they are checked to be of this very graph, and nothing is run.
    """

    name: ClassVar[str] = "collect-statistics"

    def apply(self, model: Model) -> int:
        wanted = observed_tensors(model)
        graph_hash = hash_of_model((model.reference or model.graph).to_proto())
        if model.calibration is not None:
            _check_same_graph(model.calibration, graph_hash, wanted)
            return 0
        if model.samples is None:
            raise CalibrationError("there are no samples to calibrate on; give --data, or --calibration")
        proto = model.graph.to_proto()
        model.calibration = collect(
            proto, wanted, model.samples, threads=model.threads, total=model.samples.length, progress=model.progress
        )
        model.calibration.graph_hash = graph_hash
        return len(wanted)


def observed_tensors(model: Model) -> dict[str, int | None]:
    """The tensors to sketch, in graph order, each with its channel axis if it needs per-channel statistics."""
    axes: dict[str, int] = {}
    for node in model.compute_nodes():
        if (node.name, 0) in model.quantized_inputs:
            axes[node.inputs[0].name] = 1 if node.op == "Conv" else -1
    tensors = model.graph.tensors()
    return {
        name: axes.get(name)
        for name, tensor in tensors.items()
        if (isinstance(model.specs.get(name), Observed) and not isinstance(tensor, Constant))
        or (name in axes and not isinstance(tensor, Constant))
    }


def _check_same_graph(calibration: Calibration, graph_hash: str, wanted: dict[str, int | None]) -> None:
    """Raise CalibrationError unless the statistics are of the graph after these very float passes, and complete."""
    if calibration.graph_hash != graph_hash:
        raise CalibrationError(
            "the calibration was made with other float passes, another opset or another onnxq; collect it again with: "
            "onnxq calibrate MODEL --data DATA -o FILE.calib, and the same recipe"
        )
    missing = [name for name in wanted if name not in calibration.sketches]
    if missing:
        raise CalibrationError(
            f"the calibration has no statistics of {len(missing)} tensors that are quantized now, the first {missing[0]}; "
            "collect them with: onnxq calibrate MODEL --data DATA -o FILE.calib, and the same recipe"
        )
