"""Collection: run samples through a model and sketch every observed tensor, in this process or on an Executor.

A few threads take samples by turns; each runs the model and sketches what it makes on the way. Work that an Executor takes
is cut into shards of consecutive samples. What a thread or a shard collects is a small Calibration, and parts add up
exactly, so the result is the same bit for bit wherever and in whatever order they were made.
"""

from __future__ import annotations

import gc
import hashlib
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import onnx

from onnxq import machine, memory, runtime
from onnxq.calibration import Calibration
from onnxq.collector import Axes, Collector, Job, Nonfinite, computed, watched
from onnxq.data import Sample
from onnxq.equalization import Scaled
from onnxq.errors import CalibrationError, OutputError, RecipeError
from onnxq.executors import end, end_if_stuck, has_workers, size
from onnxq.exposure import OptimizedGraphs
from onnxq.feeds import hash_of_feed
from onnxq.grouping import grouped
from onnxq.proto import with_external_data
from onnxq.store import hash_of_model

Progress = Callable[[str, int, int | None], None]
Indexed = tuple[int, Sample]
MOST_LANES = 4
SHARD = 8  # samples that a task of an executor takes
CHECKPOINT_SECONDS = 30.0
DEATH_SECONDS = 5.0  # after which a pool must have seen that a worker died
ALONE_SECONDS = 60.0  # after which a cluster without workers is given up
MOST_DEATHS = 3  # of workers, one after another, on the same work


@dataclass(frozen=True)
class Collecting:
    """How samples are collected.

    `threads` of the runtime work on each sample; 0: all cores are divided among the samples that are under way at once.
    `executor` is an Executor, or a function that makes one, which is needed to go on after a worker of a process pool died.
    `memory_limit` bounds, in bytes, the activations that are held at once: where tensors cannot be counted while the model
    runs, they are then collected in groups.
    `checkpoint` is a folder for progress; what is collected there is gone on with.
    """

    threads: int = 0
    on_nonfinite: Nonfinite = "error"
    memory_limit: int | None = None
    checkpoint: Path | None = None
    executor: Executor | Callable[[], Executor] | None = None
    progress: Progress | None = None
    source_hash: str = ""
    cones: Mapping[str, str] = field(default_factory=dict)  # of the tensors, see cones.py
    begun: Calibration | None = None  # what was collected before of some of the samples, of the same tensors
    graphs: OptimizedGraphs = field(default_factory=OptimizedGraphs)  # shared with what is made of this by `replace`
    left_out: Mapping[int, str] = field(default_factory=dict)  # samples that are not to be counted, and why
    written: list[Path] = field(default_factory=list)  # the checkpoints, shared with what is made of this by `replace`

    def clear(self) -> None:
        """Remove the checkpoints, once all that they are for is done."""
        for path in self.written:
            path.unlink(missing_ok=True)
        if self.checkpoint is not None and self.checkpoint.is_dir() and not any(self.checkpoint.iterdir()):
            self.checkpoint.rmdir()


def collect(
    proto: onnx.ModelProto,
    axes: Axes,
    samples: Iterable[Sample],
    how: Collecting | None = None,
    *,
    numbers: Iterable[int] | None = None,
    total: int | None = None,
    scaled: Mapping[str, Scaled] | None = None,
    among: Iterable[str] = (),
) -> Calibration:
    """Sketches of the tensors over the samples; those that `scaled` tells of are no tensors of the model.

    `numbers` are those of the samples in the data, where they are not all of it, in its order; `total` is how many it has.
    `among` are all tensors of it that are sketched at one time or another: so the runtime optimizes it the same each time.
    Raises CalibrationError, with tensor and sample, at the first NaN or infinity, unless `how` says otherwise. An error or
    an interrupt carries what was collected until then as its attribute `partial`.
    """
    how = how or Collecting()
    lanes, threads = lanes_here(how.threads, total) if how.executor is None else (1, how.threads)
    how, scaled = replace(how, threads=threads), scaled or {}
    together = computed(dict.fromkeys([*among, *axes]), scaled)
    groups: Sequence[Axes] = [axes]
    holds = False
    if how.memory_limit is not None and watched(proto, axes, scaled, together, threads, how.graphs) is None:
        holds = True
        groups = grouped(proto, axes, scaled, next(iter(samples)), how.memory_limit // lanes)
        how = how if len(groups) == 1 else replace(how, begun=None)
    left_out = dict(how.left_out)
    memory.give_back()  # of the sessions before
    while True:
        found, again = Calibration(source_hash=how.source_hash), False
        for k, group in enumerate(groups):
            try:
                items = enumerate(samples) if numbers is None else zip(numbers, samples, strict=True)
                part = _read(proto, group, together, scaled, items, how, total, left_out, lanes, holds=holds)
            except _Changed:
                how, again = replace(how, begun=None), True
                break
            except BaseException as stop:
                if len(groups) > 1:
                    stop.partial = None  # type: ignore[attr-defined]  # it lacks tensors of other groups
                raise
            again = k > 0 and not part.skipped.keys() <= left_out.keys()  # the groups before it counted that sample
            left_out.update(part.skipped)
            if again:
                break
            found.absorb(part)
        if not again:
            break
    if not found.feeds:
        raise CalibrationError(
            f"every sample was left out, the first for {left_out[min(left_out)]}; check the data and its preprocessing"
        )
    if found.skipped:
        found.notes.append(f"{len(found.skipped)} samples were left out, the first for {found.skipped[min(found.skipped)]}")
    found.versions = {k: v for k, v in machine.facts().items() if k in ("onnxruntime", "features")}
    return found


def lanes_here(threads: int, total: int | None) -> tuple[int, int]:
    """Samples that this process has under way at once, and the threads of the runtime for each: of all cores, if 0."""
    cores = os.cpu_count() or 1
    lanes = max(1, min(MOST_LANES, cores, total or MOST_LANES))
    return lanes, threads or cores // lanes


def _read(
    proto: onnx.ModelProto,
    axes: Axes,
    together: Iterable[str],
    scaled: Mapping[str, Scaled],
    items: Iterable[Indexed],
    how: Collecting,
    total: int | None,
    left_out: dict[int, str],
    lanes: int,
    *,
    holds: bool,
) -> Calibration:
    """Read the samples once for these tensors, on from where a checkpoint ends."""
    digest = ""
    if how.checkpoint is not None or how.executor is not None:  # others tell by it whether they know the job
        what = f"{dict(axes)} {list(together)} {dict(scaled)} {sorted(left_out)} {how.threads} {how.on_nonfinite}"
        digest = hashlib.sha256(f"{hash_of_model(proto)} {what}".encode()).hexdigest()[:16]
    public, libraries = tuple(o.name for o in proto.graph.output), tuple(runtime.custom_op_libraries)
    apart = {name: scaled[name] for name in axes if name in scaled}
    job = Job(digest, dict(axes), tuple(together), public, how.threads, how.on_nonfinite, libraries, apart, holds)
    keeper = _Keeper(job, how, total, left_out)
    todo = keeper.unread((k, sample) for k, sample in items if k not in left_out)
    try:
        keeper.show()
        if how.executor is None:
            _run_here(job, proto, todo, keeper, lanes, how.graphs)
        else:
            _run_on(how.executor, job, proto, todo, keeper)
    except BaseException as stop:
        keeper.save()
        stop.partial = keeper.found  # type: ignore[attr-defined]
        raise
    keeper.save()  # so that what comes after can be gone on with as well
    return keeper.found


class _Changed(Exception):
    """The data is not what it was when a part of it was collected: a source may give it in another order each time."""


class _Keeper:
    """What is collected so far, on its way into a checkpoint and onto the progress bar."""

    def __init__(self, job: Job, how: Collecting, total: int | None, left_out: Mapping[int, str]) -> None:
        self.found = job.empty()
        self.found.source_hash = how.source_hash
        self.found.cones = {name: how.cones[name] for name in job.axes if name in how.cones}
        self._progress, self._total = how.progress, total
        self._path = None if how.checkpoint is None else how.checkpoint / f"{job.digest}.calib"
        self._written = how.written
        self._saved = time.monotonic()
        self._known: dict[int, str] = {}  # the samples that the checkpoint holds
        if self._path is not None and self._path.is_file():
            try:
                self.found = Calibration.load(self._path)
            except CalibrationError as error:
                raise CalibrationError(
                    f"the checkpoint {self._path} cannot be read ({error.__cause__ or error}); remove it to start over"
                ) from error
            self._written.append(self._path)
            self._known = dict(self.found.feeds)
        elif how.begun is not None:
            self.found.absorb(how.begun)
        self.found.skipped.update(left_out)
        self._begun = {k: d for k, d in self.found.feeds.items() if k not in self._known}
        self._done_before = len(self.found.feeds) + len(self.found.skipped)

    def unread(self, items: Iterable[Indexed]) -> Iterator[Indexed]:
        """The samples that are not done.

        Raises CalibrationError where the data is not what a checkpoint is of, _Changed where it is not what was begun with.
        """
        seen = set()
        for index, sample in items:
            seen.add(index)
            known = self._known.get(index)
            if index in self._begun:
                if self._begun[index] != hash_of_feed(sample.feed):
                    raise _Changed
            elif known is None and index not in self.found.skipped:
                yield index, sample
            elif known is not None and known != hash_of_feed(sample.feed):
                raise CalibrationError(
                    f"{sample.where} is not what it was when {self._path} was written; remove that file to start over"
                )
        if not self._begun.keys() <= seen:
            raise _Changed
        if not self._known.keys() <= seen:
            raise CalibrationError(
                f"{self._path} holds {len(self._known.keys() - seen)} samples that the data does not have now; "
                "remove that file to start over"
            )

    def show(self, more: int = 0) -> None:
        """Tell how many samples are done: those that were found when the work began, and more."""
        if self._progress is not None:
            self._progress("calibrating", self._done_before + more, self._total)

    @property
    def is_due(self) -> bool:
        return self._path is not None and time.monotonic() - self._saved > CHECKPOINT_SECONDS

    def save(self) -> None:
        """Write the checkpoint. The work goes on without it where the disk is full, and says so at the end."""
        if self._path is None or not self.found.feeds:
            return
        self._saved = time.monotonic()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self.found.save(self._path)
            self._written.append(self._path)
        except (OSError, OutputError) as error:
            self.found.notes.append(
                f"the checkpoint {self._path} could not be written ({error}); the work went on without it"
            )
            self._path = None


def _run_here(
    job: Job, model: onnx.ModelProto, items: Iterable[Indexed], keeper: _Keeper, lanes: int, graphs: OptimizedGraphs
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


@dataclass
class _Shard:
    """Consecutive samples, and how often a worker died on them."""

    items: list[Indexed]
    deaths: int = 0
    ships_model: bool = field(default=False)

    @property
    def where(self) -> str:
        first, more = self.items[0][1].where, len(self.items) - 1
        return f"{first} and the {more} samples after it" if more > 1 else f"{first} and the one after it" if more else first


def _said(error: BaseException) -> str:
    """An error as one line."""
    return " ".join(f"{type(error).__name__}: {error}".rstrip(": ").split())


def _run_on(
    executor: Executor | Callable[[], Executor], job: Job, model: onnx.ModelProto, items: Iterator[Indexed], keeper: _Keeper
) -> None:
    """Shards on an executor, a bounded number at a time; those of a worker that died are run again."""
    make = None if isinstance(executor, Executor) else executor
    pool = executor if isinstance(executor, Executor) else executor()
    content = with_external_data(model, None).SerializeToString()  # a worker may be on another machine
    most = 2 * size(pool)
    pending: dict[Future[Calibration | None], _Shard] = {}
    waiting: list[_Shard] = []
    done, without_workers = 0, 0.0  # the latter in seconds

    def submit() -> bool:
        """Hand out one more shard, if there is one."""
        shard = waiting.pop() if waiting else _Shard(list(islice(items, SHARD)))
        if shard.items:
            try:
                pending[pool.submit(observe_shard, job, content if shard.ships_model else None, shard.items)] = shard
            except BrokenExecutor as death:  # a worker died while there was nothing to do for it
                revive(shard, death)
            except (RuntimeError, OSError) as error:
                raise CalibrationError(f"the executor takes no more samples ({_said(error)}); give one that runs") from error
        return bool(shard.items)

    def take_in(finished: Iterable[Future[Calibration | None]]) -> None:
        """Add up what came back; where a worker died, what was with it is run again."""
        nonlocal done
        for future in finished:
            shard = pending.pop(future)
            try:
                part = future.result()
            except BrokenExecutor as death:
                revive(shard, death)
                return
            except CancelledError as error:
                raise CalibrationError(
                    f"the executor gave up {shard.where}: its workers or its scheduler are gone; start them again"
                ) from error
            except Exception as error:
                if not type(error).__module__.startswith("distributed"):
                    raise
                raise CalibrationError(f"the cluster could not run {shard.where} ({_said(error)})") from error
            if part is None:  # this worker has not seen the model yet
                shard.ships_model = True
                waiting.append(shard)
                continue
            keeper.found.absorb(part)
            done += len(shard.items)
            keeper.show(done)
            if keeper.is_due:
                keeper.save()

    def revive(shard: _Shard, death: BrokenExecutor) -> None:
        """A new pool for what was under way when a worker died."""
        nonlocal pool
        shard.deaths += 1
        if make is None or shard.deaths >= MOST_DEATHS:
            raise CalibrationError(
                f"a worker died while it ran {shard.where}; it may lack memory: use fewer --workers, or give --memory-limit"
            ) from death
        waiting.extend([shard, *pending.values()])
        pending.clear()
        pool.shutdown(wait=False, cancel_futures=True)
        pool = make()

    try:
        while True:
            while len(pending) < most and submit():
                take_in([future for future in pending if future.done()])  # else an interrupt would lose it
            if not pending:
                break
            finished = wait(pending, DEATH_SECONDS, FIRST_COMPLETED).done
            take_in(finished)
            if finished or has_workers(pool):
                without_workers = 0.0
            elif (without_workers := without_workers + DEATH_SECONDS) >= ALONE_SECONDS:
                raise CalibrationError(f"the cluster has had no workers for {ALONE_SECONDS:.0f} s; start some again")
            if not finished:
                end_if_stuck(pool)
    except BaseException:
        for future in [future for future in pending if future.done() and not future.cancelled()]:
            if future.exception() is None and (part := future.result()) is not None:
                keeper.found.absorb(part)
        if make is not None:
            end(pool)
        else:
            for future in pending:
                future.cancel()
        raise
    if make is not None:
        pool.shutdown()


_worker = threading.local()  # holds the collector of the job that this thread of a worker works on


def observe_shard(job: Job, content: bytes | None, items: list[Indexed]) -> Calibration | None:
    """What a worker does with a shard; None where it needs the model's content first."""
    collector: Collector | None = getattr(_worker, "collector", None)
    if collector is None or collector.job.digest != job.digest:
        if content is None:
            return None
        try:
            runtime.register_custom_ops(job.custom_op_libraries)
        except RecipeError as error:  # a worker of a cluster may lack a file that is here
            raise RecipeError(f"on the worker {platform.node()}: {error}") from error
        collector = _worker.collector = Collector(job, onnx.ModelProto.FromString(content))
    part = collector.part()
    for index, sample in items:
        collector.add(index, sample, part)
    return part.settled()
