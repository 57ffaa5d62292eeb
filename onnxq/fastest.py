"""The fastest of several placements, told by timing whole models side by side on this machine.

Candidates: integers wherever the target allows; linear layers that quantize their input at every run; integers only where
the kernels' measured times say that they pay; and float. A later one takes the place of an earlier one only where it is
faster beyond doubt, but float already where integers are slower beyond doubt. They are timed on one thread; what wins
there must not be slower than the model as it was given on all cores either, which is what the runtime uses where nobody says
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx

from onnxq import cores, costs, runtime, timing
from onnxq.graph import Graph, Variable, is_float32
from onnxq.latency import ratio_interval
from onnxq.model import Model, State
from onnxq.numerics import QuantParams
from onnxq.passmanager import PassRecord
from onnxq.placement import cheapest

WORTH = 1.02  # what another placement has to gain
FLOAT_WORTH = 1.01  # and what float has to, on one thread: at the same speed integers are smaller
BORNE = 1.03  # and on all cores, where times differ more from one session to the next
SECONDS = 1.2  # of timing for each comparison
SESSIONS = 3  # of each model in a comparison, where it takes little time
SHORT = 2.0  # milliseconds
ROUNDS = 2  # of choosing by kernel, each from the kernels of what was chosen before


@dataclass(frozen=True)
class Built:
    """A lowered model, and how it came about."""

    model: Model
    records: list[PassRecord]
    ranges: dict[str, QuantParams] = field(default_factory=dict)  # of its activations
    unplaced: frozenset[str] = frozenset()  # what the audit found in float
    note: str = ""

    @property
    def proto(self) -> onnx.ModelProto:
        return self.model.graph.to_stored_proto()


Build = Callable[[frozenset[str], bool], Built]  # of the nodes to leave in float, and whether ranges are of each run
Feed = Mapping[str, np.ndarray]
Loadable = onnx.ModelProto | str | Path


def fastest(first: Built, build: Build, plain: Callable[[], Built], given: Loadable, feed: Feed, *, threads: int) -> Built:
    """The fastest placement for this feed; `first` is the one with all that can be in integers, `given` what came in.

    `plain` makes the model in float, without what is done to its channels for the sake of integers. `threads` is how many it
    is for; 0: for one as well as for all cores.
    """
    for_all, threads = not threads, threads or 1
    reference = first.model.reference
    assert reference is not None
    everything = frozenset(first.model.planned)
    if not everything:
        return first
    best = first

    def show(done: int) -> None:
        if first.model.progress is not None:
            first.model.progress("comparing placements", done, ROUNDS + 2)

    show(0)
    linear = {n.name for n in reference.find("MatMul", "Gemm")}
    if first.model.target.dynamic and any(first.model.ledger[n].state is State.INTEGER for n in linear & everything):
        other = build(frozenset(), True)
        if any(e.state is State.DYNAMIC for e in other.model.ledger.values()):
            best = _faster(best, other, feed, threads, WORTH)
    show(1)
    alike = build(everything, False)  # in float, but with the names and channels of the others
    shapes = _shapes(reference, feed, threads)
    for k in range(ROUNDS):
        kept = _worth_it(best, alike, reference, feed, shapes, threads)
        if not kept or kept == best.model.planned:
            break
        other = build(everything - kept, best.model.at_run_time)
        chosen = _faster(best, other, feed, threads, WORTH)
        show(2 + k)
        if chosen is best:
            break
        best = chosen
    floats = plain()
    on_one = best = _faster(best, floats, feed, threads, FLOAT_WORTH)
    if for_all and best is not floats and cores.usable() > 1 and _is_slower(best, given, feed, 0):
        kept = best.model.planned & _worth_it(best, alike, reference, feed, shapes, 0)
        other = build(everything - kept, best.model.at_run_time) if kept else floats
        best = floats if any(_is_slower(other, given, feed, count) for count in (1, 0)) else other
    show(ROUNDS + 2)
    return replace(best, note=_note(first, best, floats, on_one))


def _faster(holder: Built, challenger: Built, feed: Feed, threads: int, worth: float) -> Built:
    """The challenger where it is faster by that factor, and beyond doubt."""
    ratio, low, _ = _ratio(holder.proto, challenger.proto, feed, threads)
    return challenger if ratio > worth and low > 1 else holder


def _is_slower(built: Built, given: Loadable, feed: Feed, threads: int) -> bool:
    """Whether it is slower than the model that came in, beyond doubt, and by more than is borne."""
    ratio, _, high = _ratio(given, built.proto, feed, threads)
    return ratio * BORNE < 1 and high < 1


def _ratio(one: Loadable, other: Loadable, feed: Feed, threads: int) -> tuple[float, float, float]:
    """The time of one model over that of the other, with its interval.

    A model that takes little time is faster in one session than in the next, as its weights come to lie in memory. Such are
    loaded several times: the interval is of all ratios, from the least low end to the greatest high one.
    """
    found: list[tuple[float, float, float]] = []
    while len(found) < SESSIONS:
        sessions = [runtime.Session(m, threads=threads, config=runtime.TAKING_TURNS) for m in (one, other)]
        time_for = partial(timing.time_paired, [partial(s.run, feed) for s in sessions], least=5)
        times = time_for(seconds=SECONDS / SESSIONS)
        if np.median(times) > SHORT:
            return ratio_interval(*time_for(seconds=SECONDS).T)
        found.append(ratio_interval(*times.T))
    ratios, lows, highs = zip(*found, strict=True)
    return float(np.median(ratios)), min(lows), max(highs)


def _worth_it(
    best: Built, alike: Built, reference: Graph, feed: Feed, shapes: Mapping[str, tuple[int, ...]], threads: int
) -> set[str]:
    """The nodes whose kernels say that integers pay."""
    measured = timing.kernel_times([best.proto, alike.proto], feed, threads=threads)
    integer, floats = (costs.by_node(kernels, reference) for kernels in measured)
    planned, target = set(best.model.planned), best.model.target
    return cheapest(reference, planned, integer, floats, shapes, costs.prices(threads), target.absorbed)


def _shapes(graph: Graph, feed: Feed, threads: int) -> dict[str, tuple[int, ...]]:
    wanted = [n for n, t in graph.tensors().items() if isinstance(t, Variable) and t.inputs and is_float32(t)]
    proto = runtime.exposed(graph.to_stored_proto(), wanted)
    values = {**feed, **runtime.Session(proto, threads=threads, config=runtime.UNPACKED).run(feed)}
    return {name: array.shape for name, array in values.items() if isinstance(array, np.ndarray)}


def _note(first: Built, best: Built, floats: Built, on_one: Built) -> str:
    left = first.model.planned - best.model.planned
    if best is floats and on_one is not floats:
        return (
            "Integers are faster than float here on one thread, and slower on all cores: it was written in float. Where it "
            "is to run on one thread, give --threads 1."
        )
    if best is floats:
        return (
            "Integers are slower than float here, whatever part of the model they are in: it was written in float. For a "
            "smaller file all the same give --objective size; for another machine, --target."
        )
    if not left:
        return ""
    return f"{len(left)} nodes that could be integer are faster in float on this machine and stay so."
