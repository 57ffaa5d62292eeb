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
RUNNERS_UP = 5
MARGIN, STEEPNESS = 1.0, 5.0  # dB, as errors only roughly add; dB for the square of what is missing, as the samples are few


@dataclass(frozen=True)
class Demand:
    """Outputs that do not bear the rounding, the feeds on which that was seen, and how many dB the errors have to fall."""

    outputs: list[str]
    feeds: Sequence[Mapping[str, np.ndarray]]
    decibels: float


@dataclass(frozen=True)
class SelectLayers(Pass):
    """Keep in float the layers whose rounding errors the outputs do not bear.

    Given:   specs and params; emulated, an output that is read entry by entry has an SQNR of less than `below` dB; or the
             largest entry of a vector of scores is expected to be another one for more than a share `labels` of the samples
    Result:  the graph unchanged; the layers of the largest errors are marked sensitive, as many as it takes for what the
             others leave to come to `goal` dB, or half of `labels`; placing starts again without them. Of an output that
             is but d dB below what it bears, it is to `below` + 1 + 5 d^2 that they come, if that is less than `goal`
    Refused: every output bears it. Scores with an SQNR of `scores` dB do.

    Errors are measured on the calibration's loudest feeds, those of most output energy, and of scores on its probes. A
    layer's own error is that of the outputs when nothing is rounded but what it reads, its weight and what it gives; errors
    add, as independent noises do.
    """

    name: ClassVar[str] = "select-layers"
    below: float = 17.0
    goal: float = 30.0
    labels: float = 0.08
    scores: float = 20.0

    def apply(self, model: Model) -> int:
        calibration = model.calibration
        layers = [n for n in model.compute_nodes() if n.name in model.planned]
        if calibration is None or not calibration.loudest or not layers:
            return 0
        marked: set[str] = set()
        for demand in (self._of_entries(model), self._of_scores(model)):
            if demand is not None:
                marked |= self._worst(model, layers, demand)
        model.sensitive = model.sensitive | marked
        for node in layers:
            if node.name in marked:
                model.refuse(node, "its rounding errors are too large in the outputs")
        return len(marked)

    def _of_entries(self, model: Model) -> Demand | None:
        """What outputs demand that are maps, sequences or numbers."""
        assert model.calibration is not None
        names = [t.name for t in model.graph.outputs if _is_read_by_entry(t)]
        feeds = model.calibration.loudest
        reached = _sqnr(*_exact_and_rounded(model, feeds), names) if names else np.inf
        if not model.demanded and reached < self.below:
            model.demanded = min(self.goal, self.below + MARGIN + STEEPNESS * (self.below - reached) ** 2)
        return Demand(names, feeds, model.demanded - reached) if reached < model.demanded else None

    def _of_scores(self, model: Model) -> Demand | None:
        """What outputs demand that are vectors of scores."""
        assert model.calibration is not None
        names = [t.name for t in model.graph.outputs if not _is_read_by_entry(t)]
        feeds = model.calibration.probes
        if not names or not feeds:
            return None
        exact, rounded = _exact_and_rounded(model, feeds)
        reached, limit = _sqnr(exact, rounded, names), self.labels / 2 if model.sensitive else self.labels
        if reached >= self.scores or _changed_labels(exact, rounded, names, 1.0) <= limit:
            return None
        needed = 1.0
        while (
            _changed_labels(exact, rounded, names, 10 ** (-needed / 20)) > self.labels / 2 and reached + needed < self.scores
        ):
            needed += 1.0
        return Demand(names, feeds[:RANKED_ON], needed)

    def _worst(self, model: Model, layers: Sequence[Node], demand: Demand) -> set[str]:
        """The layers of the largest errors, without which the demand is met."""
        errors, marked = self._errors(model, layers, demand), set[str]()
        left = total = sum(errors.values())
        for name in sorted(errors, key=errors.__getitem__, reverse=True) if total else ():  # or no layer makes a difference
            marked.add(name)
            left -= errors[name]
            if -10 * np.log10(max(left / total, 1e-9)) >= demand.decibels:
                break
        return marked

    def _errors(self, model: Model, layers: Sequence[Node], demand: Demand) -> dict[str, float]:
        """Noise over signal in the worst output, by layer."""
        feeds, found = demand.feeds[:RANKED_ON], {}
        exact = _run(model, model.graph.to_stored_proto(), feeds)
        for k, node in enumerate(layers):
            result = model.absorbed(node).name

            def of_this(tensor: str, reader: tuple[str, int], layer: str = node.name, result: str = result) -> bool:
                return reader[0] == layer or tensor == result

            rounded = _run(model, emulated(model, of_this), feeds)
            found[node.name] = float(10 ** (-_sqnr(exact, rounded, demand.outputs) / 10))
            if model.progress is not None:
                model.progress("ranking layers", k + 1, len(layers))
        return found


def _exact_and_rounded(model: Model, feeds: Sequence[Mapping[str, np.ndarray]]) -> tuple[Outputs, Outputs]:
    return _run(model, model.graph.to_stored_proto(), feeds), _run(model, emulated(model), feeds)


def _changed_labels(exact: Outputs, rounded: Outputs, names: Sequence[str], share: float) -> float:
    """Of samples, how many are expected to have another largest score, where scores are off by `share` of what they are.

    By the errors of a sample: those of two scores are taken for independent and normal, so that a lead of m changes hands
    with probability Phi(-m / (sqrt(2) s)). The five runners-up count.
    """
    from scipy.special import ndtr  # slow to import, and calibrating does not need it

    expected = []
    for name in names:
        for e, r in zip(exact, rounded, strict=True):
            if not _are_comparable(e[name], r[name]) or e[name].size < 2:
                continue
            for scores, other in zip(_vectors(e[name]), _vectors(r[name]), strict=True):
                error = other - scores
                spread = share * float(np.sqrt(2 * np.square(error - error.mean()).mean()))
                ordered = np.sort(scores)[::-1]
                lead = ordered[0] - ordered[1 : 1 + RUNNERS_UP]
                lead = lead[lead > 0]  # of scores that tie, none is the label
                expected.append(1 - float(np.prod(1 - ndtr(-lead / spread))) if spread > 0 else 0.0)
    return float(np.mean(expected)) if expected else 0.0


def _vectors(scores: np.ndarray) -> np.ndarray:
    """(samples, classes) float64 of (N, C), (N, C, 1, 1) or (C,)."""
    return scores.astype(np.float64).reshape(len(scores) if scores.ndim > 1 else 1, -1)


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
