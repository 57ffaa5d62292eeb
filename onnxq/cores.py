"""Cores: how many of the machine's this process may use."""

from __future__ import annotations

import os
from functools import lru_cache
from math import ceil
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable() -> int:
    """The cores of this process: fewer than the machine has in a container or a batch job of some, or under taskset."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = _share()
    return own if share is None else max(1, min(own, ceil(share)))


@lru_cache(maxsize=1)
def _share() -> float | None:
    """How many cores' time a container may take, as docker's --cpus and Kubernetes' limits have it; None: all of it."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return None
    try:
        return int(quota) / int(period) if int(quota) > 0 else None
    except ValueError:  # "max"
        return None


def threads_for(threads: int) -> int:
    """The threads to ask onnxruntime for, 0: as many as it sees fit, one for each core of the machine.

    It binds each of those to a core of its own, also to cores that are not of this process: seen with 1.32 under taskset
    with 2 of 16 cores, where it ran on all 16. So it is not left to itself where the process has not all of them.
    """
    return threads or (0 if usable() == os.cpu_count() else usable())
