"""Lanes: threads of this process that take samples by turns; each runs the model and counts what it makes on the way."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

import onnx

from onnxq import cores
from onnxq.collector import Collector, Job
from onnxq.data import Sample
from onnxq.exposure import OptimizedGraphs
from onnxq.keeper import Indexed, Keeper

MOST_LANES = 4


def lanes_here(threads: int, total: int | None) -> tuple[int, int]:
    """Samples that this process has under way at once, and the threads of the runtime for each: of all cores, if 0."""
    usable = cores.usable()
    lanes = max(1, min(MOST_LANES, usable, total or MOST_LANES))
    return lanes, threads or usable // lanes


def run_here(
    job: Job, model: onnx.ModelProto, items: Iterable[Indexed], keeper: Keeper, lanes: int, graphs: OptimizedGraphs
) -> None:
    """Each lane, a thread, runs the model on a sample and counts it in a part of its own, so that no core waits."""
    collector = Collector(job, model, graphs)
    parts = [collector.part() for _ in range(lanes)]  # those that no lane has
    pending: deque[Future[None]] = deque()

    def add(index: int, sample: Sample) -> None:
        part = parts.pop()
        try:
            collector.add(index, sample, part)
        finally:
            parts.append(part)

    def settle() -> None:
        """Wait for all that is under way, and add the parts up."""
        wait(pending)
        done, parts[:] = parts[:], [collector.part() for _ in range(lanes)]  # first, for an interrupt not to add them twice
        for part in done:
            if not part.is_broken:
                keeper.found.absorb(part.settled())

    done = 0
    with _young_garbage_only(), ThreadPoolExecutor(lanes, "onnxq-lane") as pool:
        try:
            for index, sample in items:
                pending.append(pool.submit(add, index, sample))
                if len(pending) > 2 * lanes:
                    pending.popleft().result()  # in their order, so that of several faults the first is told
                    done += 1
                    keeper.show(done)
                if keeper.is_due:
                    settle()
                    keeper.save()
            while pending:
                pending.popleft().result()
                done += 1
                keeper.show(done)
        finally:
            settle()


@contextmanager
def _young_garbage_only() -> Iterator[None]:
    """Let the garbage collector leave alone what is there now: to look through it would hold up all threads for long."""
    if gc.get_freeze_count():  # the caller has frozen things and counts on it
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
