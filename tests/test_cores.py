"""cores.py: of a machine's cores a process uses those that it was given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from onnxq import cores

PINNED = """
import json, os, sys
from pathlib import Path
own = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, {own})
from onnxq import cores, lanes, runtime
session = runtime.Session(sys.argv[1])
used = {core for task in os.listdir("/proc/self/task") for core in os.sched_getaffinity(int(task))}
print(json.dumps([cores.usable(), lanes.lanes_here(0, None), sorted(used), own]))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or os.cpu_count() == 1, reason="no cores to keep from a process")
def test_a_process_with_some_of_the_cores_stays_on_them(models: Path) -> None:
    command = [sys.executable, "-c", PINNED, str(models / "residual.onnx")]
    usable, lanes, used, own = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert usable == 1
    assert lanes == [1, 1]
    assert used == [own]


@pytest.mark.parametrize(
    ("quota", "expected"), [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("x", 8)]
)
def test_a_container_has_the_cores_of_its_limit(
    quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    cores._share.cache_clear()
    assert cores.usable() == 8
    assert cores.threads_for(0) == 0
    cores._share.cache_clear()
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert cores.usable() == expected
    assert cores.threads_for(0) == (0 if expected == 8 else expected)
    assert cores.threads_for(3) == 3
    cores._share.cache_clear()
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    words = quota.split() if quota != "x" else ["-1", "100000"]
    for name, text in zip(("quota", "period"), words, strict=True):
        (tmp_path / "cpu" / f"cpu.cfs_{name}_us").write_text(text.replace("max", "-1"))
    assert cores.usable() == expected
    cores._share.cache_clear()  # what the next test is to see is the machine
