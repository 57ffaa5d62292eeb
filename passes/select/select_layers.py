"""select-layers"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx

from onnxq import runtime
from onnxq.emulation import emulated
from onnxq.graph import Node, Tensor
from onnxq.model import Model
from onnxq.passmanager import Pass

Outputs = list[dict[str, np.ndarray]]  # by feed
RANKED_ON = 2  # feeds: each layer is tried on them


@dataclass(frozen=True)
class SelectLayers(Pass):
    """Keep in float the layers whose rounding errors the outputs do not bear.

    Given:   specs and params; emulated, an output that is read entry by entry has an SQNR of less than `below` dB
    Result:  the graph unchanged; the layers of the largest errors are marked sensitive, as many as it takes for what the
             others leave to come to `goal` dB; placing starts again without them
    Refused: every such output has `below` dB; all outputs are score vectors, which are read through their largest entry.

    Errors are measured on the calibration's loudest feeds, those of most output energy. A layer's own error is that of the
    outputs when nothing is rounded but what it reads, its weight and what it gives; errors add, as independent noises do.
    """

    name: ClassVar[str] = "select-layers"
    below: float = 17.0
    goal: float = 30.0

    def apply(self, model: Model) -> int:
        calibration = model.calibration
        layers = [n for n in model.compute_nodes() if n.name in model.planned]
        entries = [t.name for t in model.graph.outputs if _is_read_by_entry(t)]
        if calibration is None or not calibration.loudest or not layers or not entries:
            return 0
        exact = _run(model, model.graph.to_stored_proto(), calibration.loudest)
        reached = _sqnr(exact, _run(model, emulated(model), calibration.loudest), entries)
        limit = self.goal if model.sensitive else self.below  # once begun, it is brought to its goal
        if reached >= limit:
            return 0
        errors = self._errors(model, layers, exact, entries)
        left, total, marked = sum(errors.values()), sum(errors.values()), set()
        if total == 0:
            return 0  # on these feeds no layer makes a difference
        for name in sorted(errors, key=errors.__getitem__, reverse=True):
            marked.add(name)
            left -= errors[name]
            if reached - 10 * np.log10(max(left / total, 1e-9)) >= self.goal:
                break
        model.sensitive = model.sensitive | marked
        for node in layers:
            if node.name in marked:
                model.refuse(node, "its rounding errors are too large in the outputs")
        return len(marked)

    def _errors(self, model: Model, layers: Sequence[Node], exact: Outputs, entries: Sequence[str]) -> dict[str, float]:
        """Noise over signal in the worst output, by layer."""
        assert model.calibration is not None
        found = {}
        for k, node in enumerate(layers):
            result = model.absorbed(node).name

            def of_this(tensor: str, reader: tuple[str, int], layer: str = node.name, result: str = result) -> bool:
                return reader[0] == layer or tensor == result

            rounded = _run(model, emulated(model, of_this), model.calibration.loudest[:RANKED_ON])
            found[node.name] = float(10 ** (-_sqnr(exact[:RANKED_ON], rounded, entries) / 10))
            if model.progress is not None:
                model.progress("ranking layers", k + 1, len(layers))
        return found


def _run(model: Model, proto: onnx.ModelProto, feeds: Sequence[Mapping[str, np.ndarray]]) -> Outputs:
    session = runtime.Session(proto, threads=model.threads, config=runtime.EMULATED)
    return [session.run(feed) for feed in feeds]


def _is_read_by_entry(output: Tensor) -> bool:
    """Whether an output is a map, a sequence or a number. A vector of scores, (N, C) or (N, C, 1, 1), is not."""
    return output.shape is None or len([d for d in output.shape[1:] if d != 1]) != 1


def _sqnr(exact: Outputs, rounded: Outputs, names: Sequence[str]) -> float:
    """In dB, of the worst of these outputs over all feeds together; infinite where none has any energy."""
    worst = np.inf
    for name in names:
        pairs = [(e[name], r[name]) for e, r in zip(exact, rounded, strict=True)]
        if not all(_are_comparable(e, r) for e, r in pairs):
            continue
        signal = sum(float(np.square(e, dtype=np.float64).sum()) for e, _ in pairs)
        noise = sum(float(np.square(e.astype(np.float64) - r).sum()) for e, r in pairs)
        if signal > 0 and noise > 0:
            worst = min(worst, 10 * np.log10(signal / noise))
    return worst


def _are_comparable(exact: object, rounded: object) -> bool:
    """Whether both are float arrays of one shape: a sequence is not, nor what was selected by its values."""
    if not isinstance(exact, np.ndarray) or not isinstance(rounded, np.ndarray):
        return False
    return exact.dtype.kind == "f" and exact.shape == rounded.shape
