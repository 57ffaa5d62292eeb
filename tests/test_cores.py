"""cores.py: of a machine's cores a process uses those that it was given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
