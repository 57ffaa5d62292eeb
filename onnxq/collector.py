"""Collector: run a model on a sample and count every observed tensor, all of it or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx

from onnxq.blocks import Blocks
from onnxq.calibration import Calibration
from onnxq.data import Sample
from onnxq.equalization import Scaled, known_as
from onnxq.errors import CalibrationError, ModelError
from onnxq.exposure import Exposed, OptimizedGraphs
from onnxq.feeds import hash_of_feed
from onnxq.sketch import Look, TensorSketch
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
    """What one thread collects of a job. It is broken where a sample was neither counted whole nor taken away whole."""

    found: Calibration  # but for what the tally has not told yet
    tally: Tally | None = None
    is_broken: bool = False

    def settled(self) -> Calibration:
        """All that is collected."""
        if self.tally is not None:
            self.tally.settle()
        return self.found


class Collector:
    """Runs the model of a job on samples and sketches what comes out. Several threads may do so, each into its own part."""

    def __init__(self, job: Job, model: onnx.ModelProto, graphs: OptimizedGraphs | None = None) -> None:
        """`graphs` are as in exposure.Exposed."""
        self.job = job
        self._inputs = {i.name for i in model.graph.input}
        self._watched = None if job.holds else watched(model, job.axes, job.scaled, job.among, job.threads, graphs)
        if self._watched is None:
            wanted, config = computed(job.axes, job.scaled), config_of(job.threads)
            self._exposed = Exposed(model, wanted, among=job.among, graphs=graphs, threads=job.threads, config=config)

    def part(self) -> Part:
        """An empty part."""
        found = self.job.empty()
        return Part(found, None if self._watched is None else self._watched.tally(found.sketches))

    def add(self, index: int, sample: Sample, part: Part) -> None:
        """Run the model on a sample and count what it makes, all of it or nothing.

        Raises CalibrationError, ModelError; where what it counted could not be taken away again, the part is broken then.
        """
        counted: _Held | _Tallied
        if self._watched is None:
            given = {name: value for name, value in sample.feed.items() if name in self._inputs}
            counted = _Held(self.job, part, {**self._exposed.run(sample.feed, sample.where), **given}, sample)
        else:
            counted = _Tallied(part, self._watched, sample)
        was_broken, part.is_broken = part.is_broken, True
        try:
            counted.count()
        except Exception:
            part.is_broken = was_broken or not counted.undo()
            raise
        spoilt = counted.spoilt()
        if not spoilt or self.job.on_nonfinite == "ignore":
            counted.take(index)
            energy = _energy(counted.outputs, self.job.public)
            part.found.keep_feed(index, sample.feed, hash_of_feed(sample.feed), energy)
            part.is_broken = was_broken
            return
        first = min(spoilt, key=list(self.job.axes).index)
        part.is_broken = was_broken or not counted.undo(first)
        why = f"{counted.flaw or 'NaN or infinity'} in tensor {known_as(first)} at {sample.where}"
        if self.job.on_nonfinite == "error":
            raise CalibrationError(
                f"{why}: no range represents it; check the data and its preprocessing, or give --on-nonfinite skip to "
                "leave out such samples"
            )
        if part.is_broken:
            raise CalibrationError(
                f"{why}, and the sample cannot be left out: a second run of the model on it gave other values than the "
                "first, or failed; remove that sample from the data"
            )
        part.found.skipped[index] = why


def watched(
    model: onnx.ModelProto,
    sketches: Iterable[str],
    scaled: Mapping[str, Scaled],
    among: Iterable[str],
    threads: int,
    graphs: OptimizedGraphs | None = None,
) -> Watched | None:
    """A session that counts tensors while it runs; None where that cannot be had of the model."""
    if not is_possible(model):
        return None
    names, together, graphs = tuple(sketches), tuple(among), graphs or OptimizedGraphs()

    def make() -> Watched:
        config = config_of(threads)
        return Watched(model, names, scaled=scaled, among=together, graphs=graphs, threads=threads, config=config)

    try:
        return graphs.session(model, (names, together, tuple(scaled.items()), threads), make)
    except ModelError:  # exposure.py knows another way, or says what is wrong
        return None


def config_of(threads: int) -> Mapping[str, str]:
    """Of a session beside others."""
    return {} if threads == 1 else QUIET


class _Held:
    """Tensors of a sample that are held, and counted: all of them are taken then, or none."""

    def __init__(self, job: Job, part: Part, values: Mapping[str, Any], sample: Sample) -> None:
        self.outputs, self.flaw, self._where, self._counts = values, "", sample.where, False
        self._sketches = part.found.sketches
        self._arrays: dict[str, np.ndarray | Blocks] = {}
        self._looks: dict[str, Look] = {}
        for name, sketch in self._sketches.items():
            scaled = job.scaled.get(name)
            value = values[name] if scaled is None else scaled.value(values[scaled.of])
            if isinstance(value, Blocks) or (value.dtype.kind == "f" and value.size):
                self._arrays[name] = sketch.countable(value)

    def count(self) -> None:
        for name, array in self._arrays.items():  # before any of them counts this sample
            self._sketches[name].check(array, f"at {self._where}, tensor {name}: ")
        self._counts = True
        for name, array in self._arrays.items():
            self._looks[name] = self._sketches[name].look(array)

    def spoilt(self) -> list[str]:
        """The tensors with elements that are not finite."""
        return [name for name, look in self._looks.items() if not look.is_finite]

    def take(self, index: int) -> None:
        """Take what was counted into the sketches, as sample number `index`."""
        for name, look in self._looks.items():
            if look.is_finite:
                self._sketches[name].take(look, index)
            else:
                self._sketches[name].take_finite(self._arrays[name], index)

    def undo(self, first: str = "") -> bool:
        """Take away what was counted, and tell by `flaw` what there is in tensor `first`; whether that was all."""
        for name in self._looks:
            self._sketches[name].drop(self._arrays[name])
        self.flaw = _flaw(self._arrays[first]) if first in self._arrays else ""
        return not self._counts or len(self._looks) == len(self._arrays)


class _Tallied:
    """The same of tensors that are counted in the run; another run of the sample, which is rare, shows them again."""

    def __init__(self, part: Part, session: Watched, sample: Sample) -> None:
        assert part.tally is not None
        self.outputs, self.flaw, self._spoilt = dict[str, Any](), "", list[int]()
        self._tally, self._session, self._sample = part.tally, session, sample

    def count(self) -> None:
        self.outputs = self._session.run(self._sample.feed, self._tally, self._sample.where)

    def spoilt(self) -> list[str]:
        self._spoilt = self._tally.spoilt()
        return [self._tally.readings[k].sketch for k in self._spoilt]

    def take(self, index: int) -> None:
        def add_finite(k: int, array: np.ndarray | Blocks) -> None:
            if k in self._spoilt:
                self._tally.sketches[k].take_finite(array, index)

        self._tally.take(index, self._spoilt)
        if self._spoilt:
            self._session.run(self._sample.feed, self._tally, self._sample.where, add_finite)

    def undo(self, first: str = "") -> bool:
        if self._tally.is_lost:
            return False
        left = self._tally.counted()
        flaws = []

        def drop(k: int, array: np.ndarray | Blocks) -> None:
            if k in left:
                look = self._tally.sketches[k].drop(array)
                if np.array_equal((look.low, look.high, look.size), left[k], equal_nan=True):
                    del left[k]
                if self._tally.readings[k].sketch == first:
                    flaws.append(_flaw(array))

        with suppress(ModelError):  # as from the run before it, which got as far
            self._session.run(self._sample.feed, self._tally, self._sample.where, drop)
        self.flaw = "".join(flaws)
        return not left


def _flaw(value: np.ndarray | Blocks) -> str:
    plain = value.plain() if isinstance(value, Blocks) else value
    return "NaN" if np.isnan(plain).any() else "infinity"


def _energy(values: Mapping[str, Any], names: Sequence[str]) -> float:
    """Sum of squares of the float tensors among these."""
    arrays = [a for name, a in values.items() if name in names and isinstance(a, np.ndarray) and a.dtype.kind == "f"]
    energy = sum(float(np.square(a, dtype=np.float64).sum()) for a in arrays)
    return energy if np.isfinite(energy) else 0.0
