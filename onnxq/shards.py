"""Shards: consecutive samples that an Executor takes, those of a worker that died again."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from dataclasses import dataclass, field
from itertools import islice

import onnx

from onnxq import runtime
from onnxq.calibration import Calibration
from onnxq.collector import Collector, Job
from onnxq.errors import CalibrationError, RecipeError
from onnxq.executors import end, end_if_stuck, has_workers, size
from onnxq.keeper import Indexed, Keeper
from onnxq.proto import with_external_data

SHARD = 8  # samples that a task takes
DEATH_SECONDS = 5.0  # after which a pool must have seen that a worker died
ALONE_SECONDS = 60.0  # after which a cluster without workers is given up
MOST_DEATHS = 3  # of workers, one after another, on the same work


@dataclass
class Shard:
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


def run_on(
    executor: Executor | Callable[[], Executor], job: Job, model: onnx.ModelProto, items: Iterator[Indexed], keeper: Keeper
) -> None:
    """Shards on an executor, a bounded number at a time; those of a worker that died are run again."""
    make = None if isinstance(executor, Executor) else executor
    pool = executor if isinstance(executor, Executor) else executor()
    content = with_external_data(model, None).SerializeToString()  # a worker may be on another machine
    most = 2 * size(pool)
    pending: dict[Future[Calibration | None], Shard] = {}
    waiting: list[Shard] = []
    done, without_workers = 0, 0.0  # the latter in seconds

    def submit() -> bool:
        """Hand out one more shard, if there is one."""
        shard = waiting.pop() if waiting else Shard(list(islice(items, SHARD)))
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

    def revive(shard: Shard, death: BrokenExecutor) -> None:
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
