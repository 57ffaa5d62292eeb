"""Cores: how many of the machine's this process may use."""

from __future__ import annotations

import os


def usable() -> int:
    """The cores of this process: fewer than the machine has in a container or a batch job of some, or under taskset."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_for(threads: int) -> int:
    """The threads to ask onnxruntime for, 0: as many as it sees fit.

    It binds each of those to a core of its own, also to cores that are not of this process: seen with 1.32 under taskset
    with 2 of 16 cores, where it ran on all 16. So it is not left to itself where the process has not all of them.
    """
    return threads or (0 if usable() == os.cpu_count() else usable())
