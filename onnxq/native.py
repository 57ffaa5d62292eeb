"""Native: the compiled loops as C functions, of machine code that is kept in a file.

numba takes up to a second to be imported, and most of a minute to compile them. So it does that once; from then on its
machine code is loaded as it is, without numba. A file is for these sources and versions, and for this kind of processor.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import xxhash

from onnxq import compiled
from onnxq.compiled import GIVING, LOOPS, PREFIX, SHORT
from onnxq.compiled.records import RECORD
from onnxq.errors import OutputError
from onnxq.files import write_whole

HASH_BYTES = 16
SETTINGS = (
    "OPT",
    "DEBUGINFO",
    "BOUNDSCHECK",
    "LOOP_VECTORIZE",
    "SLP_VECTORIZE",
    "ENABLE_AVX",
)  # of numba, by the environment
ANY = "carry"  # with one of them all are loaded
Progress = Callable[[str, int, int | None], None]
_lock = threading.Lock()


def _unlock() -> None:
    """In a process that was forked while another thread had the lock, which is not there to give it back."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)


class Loop:
    """A compiled loop: it takes arrays that are laid out as C does and of the types that LOOPS tells, and numbers."""

    def __init__(self, address: int, takes: Sequence[str], *, gives: bool, is_short: bool) -> None:
        self.address, self._number = address, len(takes)
        self._arrays = [(k, *_array(take)) for k, take in enumerate(takes) if take.endswith("]")]
        kinds = [ctypes.c_double if take == "float64" else ctypes.c_int64 for take in takes]
        make = ctypes.PYFUNCTYPE if is_short else ctypes.CFUNCTYPE  # the latter lets other threads of Python go on
        self._function = make(ctypes.c_int64 if gives else None, *kinds)(address)

    def __call__(self, *arguments: Any) -> Any:
        """The whole number that it gives, or None. Raises TypeError where an argument is none that it takes."""
        if len(arguments) != self._number:
            raise TypeError(f"a loop takes {self._number} arguments, not {len(arguments)}")
        given = list(arguments)
        for k, dtype, rank in self._arrays:
            array = given[k]
            flags = array.flags
            if array.ndim != rank or array.dtype != dtype or not flags.c_contiguous or not flags.writeable:
                found = f"{array.dtype}{array.shape}"
                raise TypeError(f"a loop takes {dtype} of {rank} axes, contiguous and to be written to, not {found}")
            given[k] = id(array)
        return self._function(*given)


def _array(take: str) -> tuple[np.dtype, int]:
    """The type and the number of axes of an array, as LOOPS tells them."""
    kind, _, rank = take.rstrip("]").partition("[")
    return RECORD if kind == "RECORD" else np.dtype(kind), int(rank)


@lru_cache(maxsize=64)
def loop(name: str) -> Loop:
    """A loop of the compiled package, by its name there."""
    with _lock:  # for threads not to compile the same
        return _loaded()[name]


@lru_cache(maxsize=1)
def _loaded() -> dict[str, Loop]:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target())
    engine.add_object_file(llvm.ObjectFileRef.from_data(_machine_code()))
    engine.finalize_object()
    _engines.append(engine)
    return {
        name: Loop(engine.get_function_address(PREFIX + name), takes, gives=name in GIVING, is_short=name in SHORT)
        for loops in LOOPS.values()
        for name, takes in loops.items()
    }


_engines: list[Any] = []  # whose memory the functions are in


def make_ready(progress: Progress | None) -> None:
    """Compile the loops where that was not done before, and tell of it: it takes a while."""
    if progress is None or _loaded.cache_info().currsize or _kept() is not None:
        loop(ANY)
        return
    progress("compiling, once", 0, 1)
    loop(ANY)
    progress("compiling, once", 1, 1)


def _machine_code() -> bytes:
    """The machine code out of its file, or compiled now, and written for the next time where that can be."""
    found = _kept()
    if found is not None:
        return found
    content = _compiled()
    for path in _files():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, xxhash.xxh3_128_digest(content) + content)
        except (OSError, OutputError):
            continue
        break
    return content


def _compiled() -> bytes:
    """The machine code, compiled now, also where the environment tells numba not to compile what others have."""
    config: Any = import_module("numba.core.config")
    is_off, config.DISABLE_JIT = config.DISABLE_JIT, 0
    try:
        from onnxq.compiled.compiling import machine_code

        return machine_code(_target())
    finally:
        config.DISABLE_JIT = is_off


def _kept() -> bytes | None:
    """What a file holds."""
    return next((found for path in _files() if (found := _read(path)) is not None), None)


def _files() -> list[Path]:
    """Where the machine code may be: beside its source, where numba and Python keep theirs, or with the user.

    Nowhere where there are no sources to know it by.
    """
    if not (key := _key()):
        return []
    folders = [Path(compiled.__file__).parent / "__pycache__", _cache()]
    return [folder / f"loops-{key}.o" for folder in folders if folder is not None]


def _read(path: Path) -> bytes | None:
    """What was written; None where there is none, or not what was written."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    known, content = content[:HASH_BYTES], content[HASH_BYTES:]
    return content if xxhash.xxh3_128_digest(content) == known else None


def _cache() -> Path | None:
    """Where files of this user go that can be made again; None of a user that has no such place."""
    if given := os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"):
        return Path(given) / "onnxq"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home / {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache") / "onnxq"


@lru_cache(maxsize=1)
def _key() -> str:
    """A hash of all that machine code comes from; nothing where the package has no sources."""
    sources = sorted([*Path(compiled.__file__).parent.glob("*.py"), *Path(__file__).parent.glob("native.py")])
    found = xxhash.xxh3_64()
    for path in sources:
        found.update(path.read_bytes())
    versions = [version(name) for name in ("numba", "llvmlite", "numpy")]
    settings = [os.environ.get(f"NUMBA_{name}") for name in SETTINGS]
    found.update(repr((*versions, object.__basicsize__, platform.python_version(), settings, _options())).encode())
    return found.hexdigest() if sources else ""


def _options() -> dict[str, Any]:
    """What code is made for, as numba has it: on x86 LLVM wants code that is loaded as it is to have fixed addresses.

    numba takes the name of the processor, as LLVM has it, and its features from the environment if they are there.
    """
    features = os.environ.get("NUMBA_CPU_FEATURES")
    return {
        "cpu": os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name(),
        "features": llvm.get_host_cpu_features().flatten() if features is None else features,
        "reloc": "static" if llvm.get_process_triple().startswith("x86") else "default",
        "opt": 3,
        "codemodel": "jitdefault",
        "jit": True,
    }


def _target() -> llvm.TargetMachine:
    return llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(**_options())
