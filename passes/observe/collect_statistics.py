"""collect-statistics"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from typing import ClassVar

import onnx
from onnx import helper

from onnxq.calibration import Calibration
from onnxq.collection import collect
from onnxq.data import Sample
from onnxq.errors import CalibrationError
from onnxq.graph import Constant
from onnxq.model import Model, Observed
from onnxq.passmanager import Pass

GATES = ("HardSwish", "HardSigmoid", "Sigmoid")


@dataclass(frozen=True)
class CollectStatistics(Pass):
    """Run the samples through the float model and sketch every tensor that a spec observes.

    Given:   specs: %1 observed, %2 shared with %1, W observed (a constant)
    Result:  the graph unchanged; sketches: %1, with per-channel statistics where a Conv, MatMul or Gemm reads it; for a
             calibration also the tensors that evening out took away; they are counted on the model as it was before, where
             what evening out made is a tensor of that model, scaled
    Refused: statistics were given from a file: only what they lack is collected, where there are samples; what a merged or
             interrupted calibration cannot hold, because channels are evened out anew, is seen on the feeds it keeps.
    """

    name: ClassVar[str] = "collect-statistics"

    def apply(self, model: Model) -> int:
        wanted, tensors = {**observed_tensors(model), **model.observed_too}, model.graph.tensors()
        given, samples, total = model.calibration, model.samples, None if model.samples is None else model.samples.length
        missing = {n: axis for n, axis in wanted.items() if given is None or not given.holds(n, model.cones.get(n))}
        if given is not None and samples is not None:  # what was seen along another axis is seen again
            ranks = {n: len(t.shape or ()) for n, t in tensors.items()}
            missing |= {
                n: axis for n, axis in wanted.items()
                if n not in missing and axis is not None and given.sketches[n].along(axis, ranks.get(n, 0)) is None
            }  # fmt: skip
        if given is not None and not missing:
            model.collecting.graphs.clear()
            return 0
        how = replace(model.collecting, cones=model.cones, left_out={} if given is None else given.skipped)
        notes = []
        if given is None and model.begun is not None and model.begun.axes == missing and how.checkpoint is None:
            how = replace(how, begun=model.begun)  # else the data must be the same each time
        if samples is None:
            if given is None or not missing.keys() <= model.evened_out:
                raise CalibrationError(_how_to_collect(given, [name for name in missing if name not in model.evened_out]))
            samples, total = (
                [Sample(feed, None, f"kept feed {k}") for k, feed in enumerate(given.kept.values())],
                len(given.kept),
            )
            how = replace(how, checkpoint=None, executor=None)
            notes = [
                f"{len(missing)} tensors were evened out anew, and seen only on the {total} feeds that the calibration keeps"
            ]
        try:
            scaled = {n: model.scaled[n] for n in wanted if n in model.scaled}
            model.graph.release()
            found = collect(_with_gates(model, wanted), missing, samples, how, total=total, scaled=scaled, among=wanted)
        except BaseException as stop:
            if given is not None:
                stop.partial = given  # type: ignore[attr-defined]  # without what it lacks now
            raise
        finally:
            how.graphs.clear()  # nobody runs this model again
        if given is None:
            model.calibration = found
        else:
            given.sketches.update(found.sketches)
            given.cones.update(found.cones)
            given.skipped.update(found.skipped)
            given.notes += [*found.notes, *notes]
        return len(missing)


def _with_gates(model: Model, wanted: Container[str]) -> onnx.ModelProto:
    """The model that statistics are collected on, with nodes for what only evening out made."""
    proto = model.graph.to_stored_proto() if model.floats is None else model.floats
    gates = {name: gate for name, gate in model.gates.items() if name in wanted}
    if not gates:
        return proto
    twin = onnx.ModelProto()
    twin.CopyFrom(proto)
    twin.graph.node.extend(helper.make_node(g.op, [g.of], [name], **g.attrs) for name, g in gates.items())
    return twin


def observed_tensors(model: Model) -> dict[str, int | None]:
    """The tensors to sketch, in graph order, each with its channel axis if it needs per-channel statistics."""
    axes: dict[str, int] = {}
    for node in model.compute_nodes():
        if (node.name, 0) in model.quantized_inputs and isinstance(node.inputs[1], Constant):
            axes[node.inputs[0].name] = 1 if node.op == "Conv" else -1
    for node in model.graph.find("Add"):  # equalize-layers looks at all that is added up between Convs
        for tensor in node.inputs:
            shape = tensor.shape or ()
            if isinstance(model.specs.get(tensor.name), Observed) and len(shape) == 4 and isinstance(shape[1], int):
                axes.setdefault(tensor.name, 1)
    for node in model.graph.find(*GATES):  # equalize-gates looks at what goes in, too
        maker = model.graph.producer(node.inputs[0])
        if maker is not None and maker.op == "Conv" and maker.name in model.planned:
            axes.setdefault(node.inputs[0].name, 1)
    tensors = model.graph.tensors()
    return {
        name: axes.get(name)
        for name, tensor in tensors.items()
        if (isinstance(model.specs.get(name), Observed) and not isinstance(tensor, Constant))
        or (name in axes and not isinstance(tensor, Constant))
    }


def _how_to_collect(calibration: Calibration | None, missing: list[str]) -> str:
    if calibration is None:
        return "there are no samples to calibrate on; give --data, or --calibration"
    return (
        f"the calibration has no statistics of {len(missing)} tensors that are quantized now, the first {missing[0]}: it "
        "was made with another recipe, target or version of onnxq; collect them with: onnxq calibrate MODEL --data DATA -o "
        "FILE.calib, and the same recipe"
    )
