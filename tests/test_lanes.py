"""lanes.py and memory.py: how many samples are under way at once, by cores and memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

import onnxq
import onnxq.collection
import onnxq.collector
from onnxq import cores, lanes, memory
from onnxq.collecting import Collecting
from onnxq.collection import collect
from onnxq.collector import Collector
from onnxq.data import Sample

MEGA = 1 << 20
NET = onnx.parser.parse_model(
    """<ir_version: 8, opset_import: ["" : 17]> net (float[1, 4] x) => (float[1, 4] y) { y = Relu (x) }"""
)


@pytest.mark.parametrize(
    ("usable", "threads", "total", "expected"),
    [
        (1, 0, None, (1, 1)),
        (2, 0, 64, (2, 1)),
        (16, 0, 512, (16, 1)),
        (16, 0, 3, (3, 5)),
        (16, 4, 512, (4, 4)),
        (2, 4, 512, (2, 4)),  # asked for
        (64, 0, None, (16, 4)),
    ],
)
def test_lanes_share_the_cores(
    usable: int, threads: int, total: int | None, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "usable", lambda: usable)
    monkeypatch.setattr(memory, "available", lambda: MEGA)
    assert lanes.lanes_here(threads, total) == expected


def test_lanes_are_few_where_memory_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable", lambda: 16)
    monkeypatch.setattr(memory, "available", lambda: None)
    assert lanes.lanes_here(0, 512) == (4, 4)


@pytest.mark.parametrize(("free", "most"), [(0, 4), (20, 5), (41, 6), (10_000, 16), (None, 4)])
def test_lanes_open_as_memory_allows(free: int | None, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = iter([100 * MEGA, 140 * MEGA])  # so each of the first four takes 10
    monkeypatch.setattr(memory, "resident", lambda: next(resident))
    monkeypatch.setattr(memory, "available", lambda: None if free is None else free * MEGA)
    gate, inside, entered = lanes.Gate(16), [0], [0]
    lock, wake = threading.Lock(), threading.Event()

    def work(waits: bool) -> None:
        with gate.lane():
            with lock:
                inside[0] += 1
                entered[0] = max(entered[0], inside[0])
                if entered[0] == most:
                    wake.set()
            if waits:
                wake.wait(2)
                time.sleep(0.05)  # for more to come in, if they may
            with lock:
                inside[0] -= 1

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, [False] * 4))
        entered[0] = 0
        list(pool.map(work, [True] * 16))
    assert entered[0] == gate.open == most


def test_any_number_of_lanes_counts_the_same(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    session = onnxq.runtime.Session(models / "residual.onnx")
    shape = [d or 1 for d in session.inputs[0].shape or ()]
    feeds = [{session.inputs[0].name: rng.standard_normal(shape).astype(np.float32)} for _ in range(48)]
    made = []
    for number in (1, 3, 16):
        monkeypatch.setattr(cores, "usable", lambda number=number: number)
        path = tmp_path / f"{number}.calib"
        onnxq.calibrate(models / "residual.onnx", feeds, output=path, threads=1)
        made.append(path.read_bytes())
    assert made[0] == made[1] == made[2]


def test_a_container_has_the_memory_of_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PROC", tmp_path)
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    assert memory.available() is None
    assert memory.resident() is None
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:  8000 kB\nHugePages_Total: 0\n")
    assert memory.available() == 8000 * 1024
    for folder, names in (
        ("cgroup", ("memory.max", "memory.current", "memory.stat", "inactive_file")),
        ("cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file")),
    ):
        (tmp_path / folder).mkdir()
        for name, text in zip(names, ("max", "5000000", f"anon 7\n{names[3]} 1000000\n"), strict=False):
            (tmp_path / folder / name).write_text(text)
        assert memory.available() == 8000 * 1024
        (tmp_path / folder / names[0]).write_text("6000000")
        assert memory.available() == 2000000
        (tmp_path / folder / names[0]).write_text("3000000")
        assert memory.available() == 0
        (tmp_path / folder / names[0]).unlink()
    assert memory.available() == 8000 * 1024


def test_no_more_is_read_ahead_than_lanes_are_open(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable", lambda: 16)
    monkeypatch.setattr(memory, "available", lambda: 0)
    add, done, waiting = Collector.add, [0], list[int]()

    def counted(*given: Any) -> None:
        add(*given)
        done[0] += 1

    def feeds() -> Iterator[dict[str, np.ndarray]]:
        for k in range(40):
            waiting.append(k - done[0])
            yield {"x": np.full((1, 4), k, np.float32)}

    monkeypatch.setattr(Collector, "add", counted)
    collect(NET, {"y": None}, (Sample(feed, None, "") for feed in feeds()), Collecting())
    assert max(waiting) <= lanes.FEW_LANES + lanes.AHEAD


@pytest.mark.parametrize("limit", [None, 1 << 20])
def test_a_limit_of_memory_is_shared_by_few_and_changes_no_thread(
    limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "usable", lambda: 16)
    monkeypatch.setattr(onnxq.collector, "is_possible", lambda _: False)  # so tensors are held
    run, seen = lanes.run_here, list[tuple[int, int]]()

    def noted(job: Any, model: Any, items: Any, keeper: Any, number: int, graphs: Any) -> None:
        seen.append((number, job.threads))
        run(job, model, items, keeper, number, graphs)

    monkeypatch.setattr(onnxq.collection, "run_here", noted)
    samples = [Sample({"x": np.full((1, 4), k, np.float32)}, None, "") for k in range(20)]
    collect(NET, {"y": None}, samples, Collecting(memory_limit=limit), total=20)
    assert seen == [(16 if limit is None else lanes.FEW_LANES, 1)]
