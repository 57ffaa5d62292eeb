"""Memory: what this process has of it, what is free, and giving back what it no longer needs."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

CONTAINER = (  # limit, usage and the statistics of a container's memory, and what there tells of files that can be dropped
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
CGROUP, PROC = Path("/sys/fs/cgroup"), Path("/proc")


def resident() -> int | None:
    """Bytes that this process has in memory; None where the system does not tell as Linux does."""
    try:
        return int((PROC / "self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, LookupError):
        return None


def available() -> int | None:
    """Bytes that may be taken of the machine's memory or of the container's; None where the system does not tell."""
    try:
        free = _named(PROC / "meminfo")["MemAvailable:"] * 1024
    except (OSError, ValueError, LookupError):
        return None
    for limit, usage, statistics, files in CONTAINER:
        try:
            used = int((CGROUP / usage).read_text()) - _named(CGROUP / statistics)[files]
            free = min(free, max(0, int((CGROUP / limit).read_text()) - used))
        except (OSError, ValueError, LookupError):  # there is no such file, or no limit
            continue
    return free


def _named(path: Path) -> dict[str, int]:
    """The numbers of a file that has a name and a number in each line."""
    return {words[0]: int(words[1]) for line in path.read_text().splitlines() if len(words := line.split()) > 1}


def give_back() -> None:
    """Give back what sessions that are gone had, where the C library is glibc; others do so by themselves."""
    trim = _trim()
    if trim is not None:
        trim(0)


@lru_cache(maxsize=1)
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # not glibc; on Windows None names no library
        return None
