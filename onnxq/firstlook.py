"""A first look: statistics of a few samples, by whose channels the model is evened out before all samples are collected.

The few are those of least hash: as good as drawn by chance, and the same ones in whatever order the samples come. Where
nothing is evened out, what was seen of them is a part of the collection; else they are run again with the others, as only
the extremes of a channel are known of them, and not what is in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from onnxq import passes as p
from onnxq.calibration import Calibration
from onnxq.collection import collect
from onnxq.collector import Axes
from onnxq.data import Sample, Samples
from onnxq.errors import CalibrationError
from onnxq.exposure import made_of
from onnxq.feeds import hash_of_feed, size_of
from onnxq.model import Model
from onnxq.passes.observe.collect_statistics import observed_tensors
from onnxq.preparation import Prepared, passes_of
from onnxq.recipe import Recipe
from onnxq.sketch import ChannelStatistics
from onnxq.stages import EQUALIZE, PLACE

FEW = 32
FEWEST = 4  # however large they are
MOST_BYTES = 1 << 28  # of all of them, beyond which they are fewer

Progress = Callable[[str, int, int | None], None]


def look(prepared: Prepared, start: Model, recipe: Recipe) -> None:
    """Fill `start.channels` with what the passes that even out may ask for, and `start.begun` with what they come from.

    It is of a few samples, or of what a calibration says that came from a file: of its own first look, or of all that it
    has seen where it has none. A source that gives its samples once is collected whole before it is read again, as an
    interrupt could lose what was read.
    """
    names = {name for one in passes_of(EQUALIZE, recipe) for name in one.looked_at(start.graph)}
    if not names:
        return
    placed = start.fork()
    prepared.manager.run(placed, passes_of(PLACE, recipe))
    observed = observed_tensors(placed)
    axes = {n: axis for n, axis in observed.items() if n in names and axis is not None}
    if start.calibration is not None:
        start.channels = _known(start, axes)
    elif start.samples is not None and start.samples.comes_once:
        prepared.manager.run(placed, passes_of([p.CollectStatistics], recipe))
        start.calibration = placed.calibration
    missing = {n: axis for n, axis in axes.items() if n not in start.channels}
    if missing and start.samples is not None:
        found = _seen(start, observed if start.calibration is None else missing, observed)
        start.begun = found if start.calibration is None else None
        seen = {} if found is None else {name: found.sketches[name].channels for name in missing}
        start.channels = {**start.channels, **{name: by for name, by in seen.items() if by is not None and by.count}}


def _known(start: Model, axes: dict[str, int]) -> dict[str, ChannelStatistics]:
    """What the calibration tells of these tensors."""
    given, found = start.calibration, {}
    assert given is not None
    for name in axes:
        cone = start.cones.get(name, "")
        channels = given.first_look.get(cone)
        if channels is None and not given.first_look and given.holds(name, cone):
            channels = given.sketches[name].channels
        if channels is not None:
            found[name] = channels
    return found


def _seen(start: Model, axes: Axes, among: Iterable[str]) -> Calibration | None:
    """What a few samples tell of these tensors; None where all of them were left out, which does not tell of the others."""
    assert start.samples is not None
    assert start.floats is not None
    progress, how = start.progress, start.collecting
    try:
        with ThreadPoolExecutor(1) as pool:  # reading samples, and hashing them, may take long
            pool.submit(how.graphs.of, start.floats, made_of(start.floats, axes, among)[1])
            few = few_of(start.samples, progress)
        told = None if progress is None else lambda _, done, __: progress("first look", done, len(few))
        how = replace(how, checkpoint=None, executor=None, progress=told, cones=start.cones)
        start.graph.release()
        found = collect(
            start.floats, axes, few.values(), how, numbers=few, total=start.samples.length, among=among
        )  # fmt: skip
    except CalibrationError:
        if how.on_nonfinite == "skip":
            return None
        raise
    except BaseException as stop:
        stop.partial = start.calibration  # type: ignore[attr-defined]  # what the few tell is of no use alone
        raise
    return replace(found, notes=[])  # they are of the whole


def few_of(samples: Samples, progress: Progress | None = None) -> dict[int, Sample]:
    """At most FEW different ones of the samples, by their number, FEWEST where they are large: those of least hash.

    Reads all of them, so `samples` knows their number afterwards.
    """
    few: dict[str, tuple[int, Sample]] = {}
    end = "z"  # of the hashes: those from here on are not among the few of all samples, whatever comes
    k = 0
    for k, sample in enumerate(samples):
        if (digest := hash_of_feed(sample.feed)) < end:
            few.setdefault(digest, (k, sample))
        while len(few) > FEW or (len(few) > FEWEST and sum(size_of(s.feed) for _, s in few.values()) > MOST_BYTES):
            end = max(few)
            del few[end]
        if progress is not None:
            progress("reading", k + 1, samples.length)
    samples.length = k + 1  # known now, for the time left to be told
    return dict(sorted(few.values(), key=lambda numbered: numbered[0]))
