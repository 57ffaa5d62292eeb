"""Timing: of models side by side, and of the kernels in a model."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from onnxq.runtime import TAKING_TURNS, Feed, Session

MOST_ROUNDS = 300  # that a profile is of
WARM_UP = 2  # runs of each model before those that are timed


def time_paired(
    runs: Sequence[Callable[[], object]],
    *,
    seconds: float,
    least: int = 10,
    warm_up: int = WARM_UP,
    progress: Callable[[float], None] | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Milliseconds (rounds, len(runs)) of the runs, interleaved: each round runs every one once, in random order.

    At least `least` rounds and at most 1,000, as many as fit into `seconds`. Before these each runs `warm_up` times.
    """
    rng = np.random.default_rng(seed)
    for run in runs:
        for _ in range(warm_up):
            run()
    start, rows = time.perf_counter(), []
    while len(rows) < least or (time.perf_counter() - start < seconds and len(rows) < 1000):
        row = np.empty(len(runs))
        for k in rng.permutation(len(runs)):
            begin = time.perf_counter()
            runs[k]()
            row[k] = (time.perf_counter() - begin) * 1e3
        rows.append(row)
        if progress is not None:
            progress(min(1.0, (time.perf_counter() - start) / max(seconds, 1e-9)))
    return np.stack(rows)


@dataclass(frozen=True)
class Kernel:
    """A node that the runtime runs: its name, its op, and the microseconds of a call."""

    name: str
    op: str
    micros: float


def kernel_times(models: Sequence[onnx.ModelProto], feed: Feed, *, threads: int, seconds: float = 1.0) -> list[list[Kernel]]:
    """The kernels of each model with the mean time of their faster calls; the models take turns, three times at least."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        sessions = [
            Session(model, threads=threads, config=TAKING_TURNS, profile=Path(folder) / str(k))
            for k, model in enumerate(models)
        ]
        start, rounds = time.perf_counter(), 0
        while rounds < MOST_ROUNDS and (rounds < 3 or time.perf_counter() - start < seconds):
            for session in sessions:
                session.run(feed)
            rounds += 1
        return [_kernels(session.end_profile()) for session in sessions]


def _kernels(path: Path) -> list[Kernel]:
    """What a profile says. Its times are whole microseconds, so that of short kernels only a mean tells."""
    calls: dict[tuple[str, str, str], list[float]] = {}
    for event in json.loads(path.read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = event["args"].get("node_index", ""), event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]
            calls.setdefault(key, []).append(event["dur"])
    return [
        Kernel(name, op, float(np.mean(np.sort(times)[: max(1, len(times) * 3 // 5)])))
        for (_, name, op), times in calls.items()
    ]
