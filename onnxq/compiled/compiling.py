"""Compiling: all loops as machine code that stands for itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import llvmlite.binding as llvm
import numba
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from onnxq.compiled import GIVING, LOOPS, PREFIX, places
from onnxq.compiled.records import RECORD
from onnxq.errors import OnnxqError

LIBRARY = {"malloc", "free"}  # what the loops ask the C library for; LLVM itself may ask for more of it
OF_PYTHON = (  # what numba would tell Python of exceptions by, of which there are none, and give memory of arrays back
    "numba_gil_", "numba_unpickle", "numba_do_raise", "numba_runtime_build_excinfo_struct", "Py", "NRT_Free",
    "NRT_MemInfo_call_dtor",
)  # fmt: skip


def machine_code(target: llvm.TargetMachine) -> bytes:
    """An object file for this machine with all loops, each as a C function of its name, with a prefix."""
    parts = []
    for name in [name for loops in LOOPS.values() for name in loops]:
        llvm.add_symbol(PREFIX + name, 1)  # numba links what it compiles, each for itself, without running it
    for module, loops in LOOPS.items():
        source = import_module(f"onnxq.compiled.{module}")
        parts += [llvm.parse_assembly(_text(name, getattr(source, name), takes)) for name, takes in loops.items()]
    for part in parts[1:]:
        parts[0].link_in(part)
    parts[0].verify()
    return target.emit_object(parts[0])


def _text(name: str, loop: Any, takes: Sequence[str]) -> str:
    """LLVM's assembly of the C function that a loop is, without anything of numba's or Python's in it."""
    kinds = ", ".join("int64" if take.endswith("]") else take for take in takes)
    made = numba.cfunc(f"{'int64' if name in GIVING else 'void'}({kinds})", error_model="numpy")(_entry(loop, takes))
    text = made.inspect_llvm().replace(f'"{made.native_name}"', made.native_name).replace(made.native_name, PREFIX + name)
    return _alone(text)


def _alone(text: str) -> str:
    """The same without what is elsewhere, but for LLVM's own, the library's and other loops. Raises OnnxqError."""
    names = r"^@(Py\w+) = external global (\S+?)(,.*)?$"
    text = re.sub(names, r"@\1 = internal global \2 zeroinitializer", text, flags=re.MULTILINE)
    return re.sub(r"^declare ([^@\n]*)@([\w.]+)(\([^\n#]*)(#\d+)?$", _on_its_own, text, flags=re.MULTILINE)


def _on_its_own(declared: re.Match[str]) -> str:
    """A function that does nothing in place of one of numba's."""
    kind, name, rest, _ = declared.groups()
    if name.startswith(("llvm.", PREFIX)) or name in LIBRARY:
        return declared[0]
    if not name.startswith(OF_PYTHON):
        raise OnnxqError(f"compiled code asks for {name}, which is not known to be there; use another version of numba")
    gives = re.sub(r"\b(noalias|nonnull|noundef|signext|zeroext)\b", "", kind).strip()
    nothing = "void" if gives == "void" else f"{gives} zeroinitializer"
    return f"define internal {kind}@{name}{rest.rstrip()} {{\nret {nothing}\n}}"


def _entry(loop: Any, takes: Sequence[str]) -> Callable[..., Any]:
    """What calls a loop with arrays, by the addresses that they are at; the loop itself where it takes none."""
    if not any(take.endswith("]") for take in takes):
        return loop.py_func
    names = [f"a{k}" for k in range(len(takes))]
    known: dict[str, Any] = {"loop": loop, "carray": carray, "data_of": places.data_of, "length_of": places.length_of}
    given = list(names)
    for k, take in enumerate(takes):
        kind, _, rank = take.rstrip("]").partition("[")
        if rank:
            known[f"at{k}"] = places.at(RECORD if kind == "RECORD" else kind)
            shape = "".join(f"length_of(a{k}, {axis})," for axis in range(int(rank)))
            given[k] = f"carray(at{k}(data_of(a{k})), ({shape}))"
    exec(f"def entry({', '.join(names)}):\n    return loop({', '.join(given)})\n", known)
    return known["entry"]
