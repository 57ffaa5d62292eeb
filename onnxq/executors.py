"""Executors to collect statistics on: processes of this machine, or a Dask cluster. Any other Executor will do as well."""

from __future__ import annotations

import logging
import shutil
import signal
import tempfile
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from onnxq.errors import RecipeError

UNKNOWN_SIZE = 4
WORKERS_SECONDS = 10.0  # that the workers of a cluster have to be there


def processes(count: int) -> Callable[[], Executor]:
    """A function that starts `count` fresh processes; it is called again when one of them died."""
    if count < 1:
        raise RecipeError(f"workers is {count}; it takes at least one")
    return lambda: _Processes(count)


class _Processes(ProcessPoolExecutor):
    """Fresh processes, and a folder for what they leave when they are killed: weights of models are among it."""

    def __init__(self, count: int) -> None:
        folder = tempfile.mkdtemp(prefix="onnxq-")
        spawning = get_context("spawn")  # a fork would copy the runtime's locks
        super().__init__(count, mp_context=spawning, initializer=_begin, initargs=(folder,))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)


def _begin(folder: str) -> None:
    """In a new process: Ctrl-C is for the one that started it, which stops the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tempfile.tempdir = folder


def size(pool: Executor) -> int:
    """Tasks that it runs at once, as far as it tells."""
    client = _client_of(pool)
    return int(getattr(pool, "_max_workers", UNKNOWN_SIZE)) if client is None else max(1, sum(client.nthreads().values()))


def has_workers(pool: Executor) -> bool:
    """Whether somebody is there to run what it was given, as far as it tells."""
    client = _client_of(pool)
    try:
        return client is None or bool(client.nthreads())
    except (OSError, RuntimeError):
        return False


def _client_of(pool: Executor) -> Any:
    """The client of Dask's whose executor it is; None of others."""
    return getattr(pool, "_client", None) if type(pool).__module__.startswith("distributed") else None


def end_if_stuck(pool: Executor) -> None:
    """Break a pool of processes that has lost one, and has not seen it for seconds."""
    if isinstance(pool, ProcessPoolExecutor) and not all(w.is_alive() for w in (pool._processes or {}).values()):
        _kill(pool)


def end(pool: Executor) -> None:
    """End a pool whose results nobody waits for, processes at once."""
    if isinstance(pool, ProcessPoolExecutor):
        if pool._processes:
            _kill(pool)  # which fails what is under way; a pool that breaks trips over what was cancelled
        pool.shutdown()
    else:
        pool.shutdown(cancel_futures=True)


def _kill(pool: ProcessPoolExecutor) -> None:
    """Kill the processes of a pool, and let it see that.

    One that was killed while it wrote its answer leaves the pool waiting for the rest of it for ever, which
    concurrent.futures has no remedy for. The end of what it reads makes it break as it does at other deaths.
    """
    for worker in [*(pool._processes or {}).values()]:
        worker.kill()
        worker.join()
    pool._result_queue._writer.close()  # type: ignore[attr-defined]  # the last that is open


@contextmanager
def dask(address: str) -> Iterator[Executor]:
    """The workers of the Dask cluster whose scheduler has this address, e.g. tcp://10.0.0.1:8786."""
    try:
        from distributed import Client
    except ImportError as error:
        raise RecipeError("--dask needs Dask; install it with: pip install 'onnxq[dask]'") from error
    try:
        client = Client(address, timeout=10)
    except (OSError, TimeoutError, ValueError) as error:
        raise RecipeError(f"there is no Dask scheduler at {address}: {error}; start one with: dask scheduler") from error
    logger = logging.getLogger("distributed.client")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # a lost cluster is one message of ours
    try:
        try:
            client.wait_for_workers(1, timeout=WORKERS_SECONDS)
        except TimeoutError as error:
            raise RecipeError(
                f"the Dask scheduler at {address} has no workers; start some with: dask worker {address}"
            ) from error
        yield client.get_executor()
    finally:
        client.close()
        logger.setLevel(level)
