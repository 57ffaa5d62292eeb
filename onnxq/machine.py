"""The machine: what of it figures and kernels depend on."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

import onnx

from onnxq import cores, runtime


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """The CPU's feature flags, as Linux names them; empty where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()


@lru_cache(maxsize=1)
def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def u8s8_saturates() -> bool:
    """Whether u8 x s8 kernels of this machine add pairs of products in 16 bits: x86 without VNNI or AMX.

    An x86 machine that does not tell its flags is taken to saturate.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return False
    return not cpu_flags() & {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"}


def facts() -> dict[str, Any]:
    """What figures depend on: CPU, the features that matter to int8, cores, versions."""
    return {
        "cpu": cpu_name(),
        "features": sorted(cpu_flags() & {"avx2", "avx512bw", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}),
        "u8s8_saturates": u8s8_saturates(),
        "cores": cores.usable(),
        "onnxruntime": runtime.VERSION,
        "onnx": onnx.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }
