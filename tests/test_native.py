"""native.py: the loops of the compiled package as machine code, out of a file or compiled anew."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from onnxq import compiled, kernels, native, pages
from onnxq.compiled import LOOPS, SHORT, compiling
from onnxq.errors import OnnxqError

CODE = native._machine_code()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Where machine code is kept during a test, in which loops are loaded anew and compiling takes no time."""
    found = [tmp_path / "package" / "loops.o", tmp_path / "user" / "loops.o"]
    monkeypatch.setattr(native, "_files", lambda: found)
    monkeypatch.setattr(compiling, "machine_code", lambda _: CODE)
    native._loaded.cache_clear()
    native.loop.cache_clear()
    yield found
    native._loaded.cache_clear()
    native.loop.cache_clear()


def never(*_: Any) -> bytes:
    raise AssertionError("it is compiled")


def test_a_process_that_finds_machine_code_does_without_numba(tmp_path: Path, models: Path) -> None:
    code = f"""
import sys, numpy as np, onnxq
model, data = {str(models / "residual.onnx")!r}, {str(models / "digits_calibration.npz")!r}
onnxq.quantize(model, data, max_samples=8, validate=False, target="cpu")
print([m for m in ("numba", "onnxq.compiled.counting") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_was_compiled_is_kept_and_found(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.carry(np.zeros((3, 2), np.int64))
    assert files[0].is_file()
    assert not files[1].exists()
    native._loaded.cache_clear()
    monkeypatch.setattr(compiling, "machine_code", never)
    kernels.carry(np.zeros((3, 2), np.int64))


@pytest.mark.parametrize("damage", [lambda c: c[:-1], lambda c: c[:40] + bytes([c[40] ^ 1]) + c[41:], lambda c: b""])
def test_machine_code_that_is_damaged_is_not_run(files: list[Path], damage: Any) -> None:
    kernels.carry(np.zeros((3, 2), np.int64))
    whole = files[0].read_bytes()
    files[0].write_bytes(damage(whole))
    native._loaded.cache_clear()
    native.loop.cache_clear()
    kernels.carry(np.zeros((3, 2), np.int64))
    assert files[0].read_bytes() == whole


def test_machine_code_goes_to_the_user_where_the_package_cannot_have_it(files: list[Path]) -> None:
    files[0].parent.write_text("no folder")
    kernels.carry(np.zeros((3, 2), np.int64))
    assert files[1].is_file()


def test_loops_run_where_nothing_can_be_written(files: list[Path]) -> None:
    for path in files:
        path.parent.write_text("no folder")
    limbs = np.array([[1 << 40], [0]], np.int64)
    kernels.carry(limbs)
    assert limbs.tolist() == [[0], [1 << 8]]


def test_a_user_without_a_home_has_the_folder_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", lost)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert [path.parent.name for path in native._files()] == ["__pycache__"]
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert [path.parent.name for path in native._files()] == ["__pycache__", "onnxq"]


def test_nothing_is_kept_where_there_are_no_sources_to_know_it_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a package that is a zip file, or that holds compiled modules only."""
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "onnxq.zip" / "compiled" / "__init__.py"))
    monkeypatch.setattr(native, "__file__", str(tmp_path / "onnxq.zip" / "native.py"))
    native._key.cache_clear()
    assert native._files() == []
    native._key.cache_clear()


def test_numba_compiles_though_the_environment_tells_it_not_to(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config: Any = import_module("numba.core.config")
    seen: list[int] = []
    monkeypatch.setattr(config, "DISABLE_JIT", 1)
    monkeypatch.setattr(compiling, "machine_code", lambda _: seen.append(config.DISABLE_JIT) or CODE)
    native.loop("carry")
    assert seen == [0]
    assert config.DISABLE_JIT == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_process_that_is_forked_while_another_thread_loads_does_not_wait_for_it(tmp_path: Path) -> None:
    code = """
import os, threading
import numpy as np
from onnxq import kernels, native
native._lock.acquire()  # as another thread has it
child = os.fork()
if not child:
    kernels.carry(np.zeros((3, 2), np.int64))
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "7"


@pytest.mark.parametrize("shape", [(1, 0, 5), (2, 0, 7), (1, 3, 0), (0, 3, 2), (2, 0, 1)])
def test_an_array_without_elements_adds_nothing(shape: tuple[int, int, int]) -> None:
    low, high = np.zeros((2, 3), np.int32)
    total, (tables, seen) = np.zeros((14, 3), np.int64), pages.new_scratch()
    slots, rows = np.full(512, -1, np.int16), np.zeros((8, 128), np.int64)
    used = kernels.observe(np.ones(shape, np.float32), 0, True, low, high, total, tables, seen, slots, rows, 0, 1)
    assert used == 0
    assert not total.any()
    assert (low > high).all()


def test_it_is_told_that_loops_are_compiled(files: list[Path]) -> None:
    told: list[str] = []
    whole = xxhash.xxh3_128_digest(CODE) + CODE
    for _ in range(2):
        native.make_ready(lambda what, *_: told.append(what))
        for path in files:
            path.unlink(missing_ok=True)
        native.make_ready(lambda what, *_: told.append(what))  # it is loaded all the same
        files[0].write_bytes(whole)
        native._loaded.cache_clear()
        native.loop.cache_clear()
    assert told == ["compiling, once"] * 2  # before and after, the first time


def test_machine_code_is_of_the_sources_and_of_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loops.py").write_text("a")
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "__init__.py"))
    keys = [native._key.__wrapped__()]
    monkeypatch.setenv("NUMBA_CPU_NAME", "haswell")
    keys.append(native._key.__wrapped__())
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+avx2")
    keys.append(native._key.__wrapped__())
    (tmp_path / "loops.py").write_text("b")
    keys.append(native._key.__wrapped__())
    assert len({*keys}) == 4
    assert keys[-1] == native._key.__wrapped__()


@pytest.mark.parametrize(
    "limbs",
    [
        np.zeros((3, 2), np.int32),
        np.zeros((3, 2), ">i8"),
        np.zeros(3, np.int64),
        np.zeros((4, 4), np.int64)[:, ::2],
        np.broadcast_to(np.int64(0), (3, 1)),  # which is not to be written to
    ],
)
def test_a_loop_takes_no_array_that_it_would_read_wrongly(limbs: np.ndarray) -> None:
    with pytest.raises(TypeError, match="a loop takes int64 of 2 axes, contiguous and to be written to, not "):
        native.loop("carry")(limbs)


def test_a_loop_takes_as_many_arguments_as_it_has() -> None:
    with pytest.raises(TypeError, match="a loop takes 6 arguments, not 1"):
        native.loop("drain")(np.zeros((8, 256), np.uint16))


def test_loops_have_names_of_their_own() -> None:
    names = [name for loops in LOOPS.values() for name in loops]
    assert len({*names}) == len(names)
    assert {*SHORT} <= {*names}
    assert {*compiled.GIVING} <= {*names}


@pytest.mark.parametrize("name", ["pow", "NRT_Allocate", "numba_attempt_nocopy_reshape"])
def test_compiled_code_may_not_ask_for_what_is_not_there(name: str) -> None:
    line = f"declare double @{name}(double, double) local_unnamed_addr #2"
    with pytest.raises(OnnxqError, match=f"compiled code asks for {name}"):
        compiling._alone(line)


def test_what_tells_python_of_exceptions_does_nothing() -> None:
    text = "@PyExc_RuntimeError = external global i8\ndeclare noalias ptr @numba_unpickle(ptr, i32) local_unnamed_addr #2\n"
    found = compiling._alone(text)
    assert "external" not in found
    assert re.search(
        r"define internal noalias ptr @numba_unpickle\(ptr, i32\) local_unnamed_addr \{\nret ptr zeroinit", found
    )


def test_a_short_loop_holds_other_threads_of_python() -> None:
    held = native.loop("ends")._function
    assert held._flags_ & ctypes._FUNCFLAG_PYTHONAPI  # type: ignore[attr-defined]
    assert not native.loop("carry")._function._flags_ & ctypes._FUNCFLAG_PYTHONAPI  # type: ignore[attr-defined]


def test_a_lack_of_memory_is_told() -> None:
    """Of loops that Python calls and of those that the runtime does, where the C library has none for them."""
    code = """
import ctypes
import llvmlite.binding as llvm
import numpy as np, onnx.parser
none = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(lambda size: None)
llvm.add_symbol("malloc", ctypes.cast(none, ctypes.c_void_p).value)
from onnxq import collection, data, errors, sketch
for axis in (None, 1):
    try:
        sketch.TensorSketch(axis).update(np.ones((3, 40), np.float32))
    except MemoryError as error:
        print(error)
text = '<ir_version: 9, opset_import: ["" : 17]> net (float[N] x) => (float[N] y) { a = Neg (x) y = Neg (a) }'
sample = data.Sample({"x": np.ones(40, np.float32)}, None, "sample 0")
try:
    collection.collect(onnx.parser.parse_model(text), {"a": None}, [sample])
except errors.CalibrationError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        *["there is no memory to count a tensor in"] * 2,
        "a tensor of sample 0 could not be counted, probably for lack of memory",
    ], done.stderr
