"""Calibration against onnxruntime's own calibrators, on the same feeds: time over inference time, memory, error of ranges.

    python -m tests.benchmarks.calibration [--networks resnet50,inverted_residual,transformer] [--threads N] [--feeds 64]

Each figure comes from a process of its own, which first runs the plain model on the same feeds: `x inference` is the time of
collecting over that, for --feeds of them. onnxq's is given three times: of collecting once it has started, as the last
feeds go, three quarters of them or those that it has not looked at before; of collecting with its start, and with the first
look where that is a part of it; and of all that `onnxq.calibrate` does (load, rewrite, prove, a first look where channels
may be evened out, collect), run again in the same process, with, in brackets, the first run, in which much of onnxq and its
compiled loops are loaded. Memory is the peak of the process after the first run at 32 and at 256
samples; `~` is extrapolated from 8 and 32, for tools that keep every activation. The error is that of the 99.99th percentile
of magnitude against numpy's on all elements, median and largest over the tensors, on 8 feeds.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from rich.console import Console
from rich.table import Table

import onnxq
from onnxq import cores, firstlook
from onnxq.collecting import Collecting
from onnxq.collection import collect
from onnxq.observers.percentile import quantile
from onnxq.passes.observe import collect_statistics
from onnxq.runtime import Session, exposed
from onnxq.sketch import Histogram, TensorSketch
from tests.benchmarks import shapes

TOOLS = ("onnxq", "ort MinMax", "ort Percentile", "ort Entropy")
PERCENTILE = 99.99
MOST_MEMORY = 12e9  # of one process


class Found(NamedTuple):
    """Seconds of the whole, the first time in a process and later; of collecting, with its start and without; peak bytes."""

    first: float
    whole: float
    collecting: float
    running: float
    peak: float


class Feeds(Sequence[dict[str, np.ndarray]]):
    """So many feeds, each made of one of a few when it is asked for."""

    def __init__(self, few: list[dict[str, np.ndarray]], count: int) -> None:
        self._few, self._count = few, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return [self[j] for j in range(self._count)[k]]
        if not 0 <= k < self._count:
            raise IndexError(k)
        feed = {name: array.copy() for name, array in self._few[k % len(self._few)].items()}
        for array in feed.values():
            array.flat[0] = k / self._count
        return feed


def one(tool: str, network: str, count: int, threads: int, *, timed: bool) -> dict[str, float]:
    """Seconds of plain inference, of collecting and of the whole, and peak bytes, in this process.

    Where it is timed the feeds are all in memory, so that nobody waits for them, and the peak is with them.
    """
    model = shapes.NETWORKS[network]()
    made = Feeds(shapes.feeds(model, 16), count)
    feeds = list(made) if timed else made
    session = Session(model, threads=threads)
    for feed in feeds[:2]:
        session.run(feed)
    start = time.perf_counter()
    for feed in feeds:
        session.run(feed)
    inference = time.perf_counter() - start
    del session
    found = run_onnxq(model, feeds, threads) if tool == "onnxq" else run_ort(tool, model, feeds, threads)
    return {"inference": inference, **found._asdict()}


def run_onnxq(model: onnx.ModelProto, feeds: Sequence[dict[str, np.ndarray]], threads: int) -> Found:
    taken: list[float] = []
    done: dict[int, float] = {}

    def timed(proto: Any, axes: Any, samples: Any, how: Collecting, **options: Any) -> Any:
        if how.begun is None:
            taken.clear()
        start = time.perf_counter()
        found = collect(proto, axes, samples, how, **options)
        taken.append(time.perf_counter() - start)
        return found

    def progress(what: str, count: int, __: int | None) -> None:
        if what == "calibrating":
            done.setdefault(count, time.perf_counter())

    def calibrate() -> float:
        taken.clear()
        done.clear()
        start = time.perf_counter()
        onnxq.calibrate(model, feeds, threads=threads, progress=progress)
        return time.perf_counter() - start

    collect_statistics.collect = firstlook.collect = timed
    first, peak = calibrate(), peak_memory()
    whole = calibrate()
    start = max(len(feeds) // 4, *sorted(done)[:2])  # the first is told before it starts
    left = len(feeds) - start
    running = (done[len(feeds)] - done[start]) / left * len(feeds) if left else float("nan")
    return Found(first, whole, sum(taken), running, peak)


def peak_memory() -> float:
    return 1024.0 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def calibrator(tool: str, path: Path, threads: int) -> Any:
    import onnxruntime
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    kind = {"MinMax": CalibrationMethod.MinMax, "Percentile": CalibrationMethod.Percentile}.get(
        tool.split()[1], CalibrationMethod.Entropy
    )
    plain = onnxruntime.SessionOptions

    def options() -> Any:  # it makes its sessions with default options
        made = plain()
        made.intra_op_num_threads = threads
        return made

    onnxruntime.SessionOptions = options
    extra = {"percentile": PERCENTILE} if "Percentile" in tool else {}
    return create_calibrator(
        path, augmented_model_path=str(path.with_suffix(".augmented.onnx")), calibrate_method=kind, extra_options=extra
    )


def run_ort(tool: str, model: onnx.ModelProto, feeds: Sequence[dict[str, np.ndarray]], threads: int) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        start = time.perf_counter()
        made = calibrator(tool, path, threads)
        made.collect_data(reader(feeds))
        made.compute_data()
        seconds = time.perf_counter() - start
    return Found(seconds, seconds, seconds, float("nan"), peak_memory())


def reader(feeds: Iterable[dict[str, np.ndarray]]) -> Any:
    left = iter(feeds)
    return type("Reader", (), {"get_next": lambda self: next(left, None)})()


def range_errors(network: str) -> dict[str, tuple[float, float]]:
    """Median and largest relative error of the percentile of magnitude, by tool."""
    model = shapes.NETWORKS[network]()
    feeds = shapes.feeds(model, 8)
    names = [n.output[0] for n in model.graph.node if n.op_type in ("Conv", "MatMul", "Add", "Relu", "Clip")][:40]
    session = Session(exposed(model, names), threads=0)
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for feed in feeds:
        values = session.run(feed)
        for name in names:
            arrays[name].append(values[name].reshape(-1))
    exact = {n: float(np.percentile(np.abs(np.concatenate(a)), PERCENTILE)) for n, a in arrays.items()}
    ours = {}
    for name, parts in arrays.items():
        sketch = TensorSketch()
        for k, part in enumerate(parts):
            sketch.update(np.abs(part), k)
        bins = sketch.histogram()
        ours[name] = quantile(Histogram(bins.lower, bins.upper, bins.count), PERCENTILE / 100)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        made = calibrator("ort Percentile", path, 0)
        made.collect_data(reader(feeds))
        theirs = {n: float(np.max(np.abs(d.range_value))) for n, d in made.compute_data().items() if n in exact}
    found = {}
    for tool, said in (("onnxq", ours), ("ort Percentile", theirs)):
        errors = [abs(said[n] - exact[n]) / exact[n] for n in said if exact[n] > 0]
        found[tool] = (float(np.median(errors)), float(max(errors)))
    return found


def in_process(tool: str, network: str, count: int, threads: int, *, timed: bool = False) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.calibration", "--one", tool, network, str(count), str(threads)]
    command += ["timed"] if timed else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tool} on {network}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def row(tool: str, network: str, threads: int, feeds: int, errors: dict[str, tuple[float, float]]) -> list[str]:
    few, some = (in_process(tool, network, count, threads)["peak"] for count in (8, 32))
    timed = in_process(tool, network, feeds, threads, timed=True)
    expected = some + (some - few) / 24 * 224
    fits = expected < MOST_MEMORY and tool in ("onnxq", "ort MinMax")
    many = in_process(tool, network, 256, threads)["peak"] if fits else expected
    said = "" if fits else "~"
    error = errors.get(tool)
    return [
        network, tool, "" if tool != "onnxq" else f"{timed['running'] / timed['inference']:.2f}",
        f"{timed['collecting'] / timed['inference']:.2f}", f"{timed['whole'] / timed['inference']:.2f}"
        + (f" ({timed['first'] / timed['inference']:.2f})" if tool == "onnxq" else ""),
        f"{some / 1e9:.2f}", f"{said}{many / 1e9:.2f}",
        "" if error is None else f"{100 * error[0]:.2f} / {100 * error[1]:.2f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(shapes.NETWORKS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--feeds", type=int, default=64)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.one:
        tool, network, count, threads, *timed = said.one
        print(json.dumps(one(tool, network, int(count), int(threads), timed=bool(timed))))
        return
    table = Table(title=f"{cores.usable()} cores, {said.threads or 'all'} thread(s) of onnxruntime, {said.feeds} feeds")
    for column in (
        "network", "tool", "once started, x inference",
        "collecting, x inference", "whole (first), x inference", "GB at 32", "GB at 256", "error of p99.99, %"
    ):  # fmt: skip
        table.add_column(column)
    for network in said.networks.split(","):
        errors = range_errors(network)
        for tool in TOOLS:
            table.add_row(*row(tool, network, said.threads, said.feeds, errors))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
