"""Lanes: threads of this process that take samples by turns; each runs the model and counts what it makes on the way."""

from __future__ import annotations

import gc
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import chain

import onnx

from onnxq import cores, memory
from onnxq.collector import Collector, Job, Part
from onnxq.data import Sample
from onnxq.exposure import OptimizedGraphs
from onnxq.keeper import Indexed, Keeper

MOST_LANES = 16
FEW_LANES = 4  # where it is not known what memory they may take
AHEAD = 2  # samples that are read before a lane is free for them
FREE_SHARE = 0.5  # of the memory that is free, which all lanes but a few may take


def lanes_here(threads: int, total: int | None) -> tuple[int, int]:
    """Samples that this process has under way at once, and the threads of the runtime for each: of all cores, if 0.

    One thread on each of many samples gets more done than many threads on each of a few, which wait for one another: on 16
    cores, 4 samples of ResNet-50 on 4 threads each took 1.8 times as long as plain inference with all cores, where 2 on one
    thread each took 0.56 times as long as plain inference on one.
    """
    usable = cores.usable()
    many = FEW_LANES if memory.available() is None else MOST_LANES
    most = max(FEW_LANES, min(many, usable // max(1, threads)))
    lanes = max(1, min(most, usable, most if total is None else total))
    return lanes, threads or usable // lanes


class Gate:
    """Lets a few samples be under way at once, and more of them when it is seen what memory these take."""

    def __init__(self, lanes: int) -> None:
        self.open = min(FEW_LANES, lanes)  # how many samples may be under way
        self._few, self._most, self._done = self.open, lanes, 0
        self._free, self._lock = threading.Semaphore(self.open), threading.Lock()
        self._before = memory.resident()

    @contextmanager
    def lane(self) -> Iterator[None]:
        """A lane, when one is free."""
        with self._free:
            yield
        with self._lock:
            self._done += 1
            if self._done == self._few < self._most and (more := self._affordable()):
                self.open += more
                self._free.release(more)

    def _affordable(self) -> int:
        """How many more lanes there is memory for, by what the first few have taken."""
        now, free = memory.resident(), memory.available()
        if self._before is None or now is None or free is None:
            return 0
        each = max(1, now - self._before) / self._few
        return min(self._most - self._few, int(FREE_SHARE * free / each))


def run_here(
    job: Job, model: onnx.ModelProto, items: Iterator[Indexed], keeper: Keeper, lanes: int, graphs: OptimizedGraphs
) -> None:
    """Each lane, a thread, runs the model on a sample and counts it in a part of its own, so that no core waits."""
    first = next(items, None)
    if first is None:  # all is known from before
        return
    collector = Collector(job, model, graphs)
    gate = Gate(lanes)
    parts, taking = list[Part](), threading.Lock()  # those that no lane has
    pending: deque[Future[None]] = deque()

    def add(index: int, sample: Sample) -> None:
        with gate.lane():
            with taking:
                part = parts.pop() if parts else None
            part = part or collector.part()
            try:
                collector.add(index, sample, part)
            finally:
                parts.append(part)

    def settle() -> None:
        """Wait for all that is under way, and add the parts up."""
        wait(pending)
        done, parts[:] = parts[:], []  # first, for an interrupt not to add them twice
        for part in done:
            if not part.is_broken:
                keeper.found.absorb(part.settled())

    done = 0
    with _young_garbage_only(), ThreadPoolExecutor(lanes, "onnxq-lane") as pool:
        try:
            for index, sample in chain([first], items):
                pending.append(pool.submit(add, index, sample))
                if len(pending) > gate.open + AHEAD:
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
