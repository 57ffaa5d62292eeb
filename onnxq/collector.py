"""Collector: run a model on a sample and count every observed tensor, all of it or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx

from onnxq.blocks import Blocks
from onnxq.calibration import Calibration, hash_of_feed
from onnxq.data import Sample
from onnxq.equalization import Scaled, known_as
from onnxq.errors import CalibrationError, ModelError
from onnxq.exposure import Exposed
from onnxq.sketch import TensorSketch
from onnxq.tally import Tally
from onnxq.watching import Watched, is_possible

Nonfinite = Literal["error", "skip", "ignore"]
Axes = Mapping[str, int | None]  # tensor -> channel axis for statistics by channel, or None
QUIET = {"session.intra_op.allow_spinning": "0"}  # threads that wait busily hold up those of other sessions, and of ours


@dataclass(frozen=True)
class Job:
    """One reading of the data: the tensors to observe, and a hash of the model and of what is done with it."""

    digest: str
    axes: Axes
    among: tuple[str, ...]  # these and the tensors of other readings, so that one graph is run for all of them
    public: tuple[str, ...]  # the outputs that the model has of its own
    threads: int
    on_nonfinite: Nonfinite
    custom_op_libraries: tuple[str, ...] = ()  # without which no session of the model is made
    scaled: Mapping[str, Scaled] = field(default_factory=dict)  # those of the tensors that are computed from others
    holds: bool = False  # whether the tensors of a sample are to be held until all are there, and counted then

    def empty(self) -> Calibration:
        return Calibration(sketches={name: TensorSketch(axis) for name, axis in self.axes.items()})


def computed(names: Iterable[str], scaled: Mapping[str, Scaled]) -> list[str]:
    """The tensors that the model has to give for these."""
    return list(dict.fromkeys(scaled[name].of if name in scaled else name for name in names))


@dataclass
class Part:
    """What one thread collects of a job."""

    found: Calibration
    tally: Tally | None = None
    is_broken: bool = False  # what a sample added could not be taken away again


class Collector:
    """Runs the model of a job on samples and sketches what comes out. Several threads may do so, each into its own part."""

    def __init__(self, job: Job, model: onnx.ModelProto) -> None:
        self.job = job
        self._inputs = {i.name for i in model.graph.input}
        self._watched = None if job.holds else watched(model, job.axes, job.scaled, job.among, job.threads)
        if self._watched is None:
            wanted, config = computed(job.axes, job.scaled), config_of(job.threads)
            self._exposed = Exposed(model, wanted, among=job.among, threads=job.threads, config=config)

    def part(self) -> Part:
        """An empty part."""
        found = self.job.empty()
        return Part(found, None if self._watched is None else self._watched.tally(found.sketches))

    def add(self, index: int, sample: Sample, part: Part) -> None:
        """Run the model on a sample and count what it makes."""
        given = {name: value for name, value in sample.feed.items() if name in self._inputs}
        counted: _Held | _Tallied
        if self._watched is None:
            outputs = self._exposed.run(sample.feed, sample.where)
            counted = _Held(self.job, part, {**outputs, **given}, sample.where)
        else:
            counted = _Tallied(self.job, part, self._watched, sample, given)
            outputs = counted.outputs
        spoilt = counted.spoilt()
        if spoilt and self.job.on_nonfinite != "ignore":
            first = min(spoilt, key=list(self.job.axes).index)
            why = f"{counted.drop(first) or 'NaN or infinity'} in tensor {known_as(first)} at {sample.where}"
            if self.job.on_nonfinite == "error":
                raise CalibrationError(
                    f"{why}: no range represents it; check the data and its preprocessing, or give --on-nonfinite skip to "
                    "leave out such samples"
                )
            part.found.skipped[index] = why
            return
        counted.take(index)
        part.found.keep_feed(index, sample.feed, hash_of_feed(sample.feed), _energy(outputs, self.job.public))


def watched(
    model: onnx.ModelProto, sketches: Iterable[str], scaled: Mapping[str, Scaled], among: Iterable[str], threads: int
) -> Watched | None:
    """A session that counts tensors while it runs; None where that cannot be had of the model."""
    if not is_possible(model):
        return None
    try:
        return Watched(model, sketches, scaled=scaled, among=among, threads=threads, config=config_of(threads))
    except ModelError:  # exposure.py knows another way, or says what is wrong
        return None


def config_of(threads: int) -> Mapping[str, str]:
    """Of a session beside others."""
    return {} if threads == 1 else QUIET


class _Held:
    """Tensors of a sample that are held, and counted: all of them are taken then, or dropped again."""

    def __init__(self, job: Job, part: Part, values: Mapping[str, Any], where: str) -> None:
        self._sketches = part.found.sketches
        self._arrays: dict[str, np.ndarray | Blocks] = {}
        for name, sketch in self._sketches.items():
            scaled = job.scaled.get(name)
            source = name if scaled is None else scaled.of
            if source not in values:
                continue
            value = values[source] if scaled is None else scaled.value(values[source])
            if isinstance(value, Blocks) or (value.dtype.kind == "f" and value.size):
                self._arrays[name] = sketch.countable(value)
        for name, array in self._arrays.items():
            self._sketches[name].check(array, f"at {where}, tensor {name}: ")  # before any of them counts this sample
        self._looks = {name: self._sketches[name].look(array) for name, array in self._arrays.items()}

    def spoilt(self) -> list[str]:
        """The tensors with elements that are not finite."""
        return [name for name, look in self._looks.items() if not look.is_finite]

    def take(self, index: int) -> None:
        for name, look in self._looks.items():
            if look.is_finite:
                self._sketches[name].take(look, index)
            else:
                self._sketches[name].take_finite(self._arrays[name], index)

    def drop(self, first: str) -> str:
        """Take away what was counted; what there is in tensor `first` that is not finite."""
        for name, array in self._arrays.items():
            self._sketches[name].drop(array)
        return _flaw(self._arrays[first]) if first in self._arrays else ""


class _Tallied:
    """The same of tensors that were counted in the run; another run of the sample, which is rare, shows them again."""

    def __init__(self, job: Job, part: Part, session: Watched, sample: Sample, given: Mapping[str, Any]) -> None:
        assert part.tally is not None
        self._part, self._tally, self._session, self._sample = part, part.tally, session, sample
        try:
            self.outputs = session.run(sample.feed, self._tally, sample.where)
            self._held = _Held(job, part, given, sample.where)
        except BaseException:
            self._drop_own("")
            raise
        self._spoilt = self._tally.spoilt()

    def spoilt(self) -> list[str]:
        return [*(self._tally.readings[k].sketch for k in self._spoilt), *self._held.spoilt()]

    def take(self, index: int) -> None:
        def add_finite(k: int, array: np.ndarray | Blocks) -> None:
            if k in self._spoilt:
                self._tally.sketches[k].take_finite(array, index)

        self._tally.take(index, self._spoilt)
        if self._spoilt:
            self._session.run(self._sample.feed, self._tally, self._sample.where, add_finite)
        self._held.take(index)

    def drop(self, first: str) -> str:
        return self._held.drop(first) + self._drop_own(first)

    def _drop_own(self, first: str) -> str:
        left, flaws = self._tally.counted(), []

        def drop(k: int, array: np.ndarray | Blocks) -> None:
            if k in left:
                self._tally.sketches[k].drop(array)
                left.remove(k)
                if self._tally.readings[k].sketch == first:
                    flaws.append(_flaw(array))

        with suppress(ModelError):  # as from the run before it, which got as far
            self._session.run(self._sample.feed, self._tally, self._sample.where, drop)
        self._part.is_broken = bool(left)
        return "".join(flaws)


def _flaw(value: np.ndarray | Blocks) -> str:
    plain = value.plain() if isinstance(value, Blocks) else value
    return "NaN" if np.isnan(plain).any() else "infinity"


def _energy(values: Mapping[str, Any], names: Sequence[str]) -> float:
    """Sum of squares of the float tensors among these."""
    arrays = [a for name, a in values.items() if name in names and isinstance(a, np.ndarray) and a.dtype.kind == "f"]
    energy = sum(float(np.square(a, dtype=np.float64).sum()) for a in arrays)
    return energy if np.isfinite(energy) else 0.0
