"""onnxruntime's C API, by ctypes: sessions with an op of our own, which its Python API cannot make without a compiler.

The wheels of onnxruntime have the library that exports this API beside the module for Python, of the same build. Functions
are members of the struct OrtApi, which only grows: none changes its place (onnxruntime_c_api.h: "do not modify above").
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime as ort

from onnxq import cores

VERSION = 17  # of the API; every onnxruntime since 1.17 has it
FATAL = 4  # the level of the log: what matters is raised
CPU_ALLOCATOR, CPU_MEMORY = 1, 0  # an arena; the default kind of memory
CODES = (
    "OK", "FAIL", "INVALID_ARGUMENT", "NO_SUCHFILE", "NO_MODEL", "ENGINE_ERROR", "RUNTIME_EXCEPTION", "INVALID_PROTOBUF",
    "MODEL_LOADED", "NOT_IMPLEMENTED", "INVALID_GRAPH", "EP_FAIL",
)  # fmt: skip
PATH, encode = (ctypes.c_wchar_p, str) if os.name == "nt" else (c_char_p, os.fsencode)
Out, Names, Dims = POINTER(c_void_p), POINTER(c_char_p), POINTER(c_int64)
FUNCTIONS: Mapping[str, tuple[int, tuple[Any, ...]]] = {  # name -> its place in OrtApi, and what it takes
    "CreateEnv": (3, (c_int, c_char_p, Out)),
    "DisableTelemetryEvents": (6, (c_void_p,)),
    "CreateSession": (7, (c_void_p, PATH, c_void_p, Out)),
    "Run": (9, (c_void_p, c_void_p, Names, Out, c_size_t, Names, c_size_t, Out)),
    "CreateSessionOptions": (10, (Out,)),
    "SetSessionGraphOptimizationLevel": (23, (c_void_p, c_int)),
    "SetIntraOpNumThreads": (24, (c_void_p, c_int)),
    "CreateCustomOpDomain": (26, (c_char_p, Out)),
    "CustomOpDomain_Add": (27, (c_void_p, c_void_p)),
    "AddCustomOpDomain": (28, (c_void_p, c_void_p)),
    "CreateTensorWithDataAsOrtValue": (49, (c_void_p, c_void_p, c_size_t, Dims, c_size_t, c_int, Out)),
    "IsTensor": (50, (c_void_p, POINTER(c_int))),
    "GetTensorMutableData": (51, (c_void_p, Out)),
    "GetTensorElementType": (60, (c_void_p, POINTER(c_int))),
    "GetDimensionsCount": (61, (c_void_p, POINTER(c_size_t))),
    "GetDimensions": (62, (c_void_p, Dims, c_size_t)),
    "GetTensorTypeAndShape": (65, (c_void_p, Out)),
    "CreateCpuMemoryInfo": (69, (c_int, c_int, Out)),
    "KernelInfoGetAttribute_int64": (86, (c_void_p, c_char_p, Dims)),
    "KernelContext_GetInput": (90, (c_void_p, c_size_t, Out)),
    "AddSessionConfigEntry": (130, (c_void_p, c_char_p, c_char_p)),
}
GET_ERROR_CODE, GET_ERROR_MESSAGE = 1, 2
RELEASE = {
    "Status": 93,
    "Session": 95,
    "Value": 96,
    "TensorTypeAndShapeInfo": 99,
    "SessionOptions": 100,
    "CustomOpDomain": 101,
}
LIBRARIES = ("libonnxruntime.so*", "libonnxruntime*.dylib", "onnxruntime.dll")


class ApiError(Exception):
    """What a function of the API says, in the words in which onnxruntime's Python API raises it."""


class Api:
    """The functions of OrtApi by their names. Each raises ApiError where it fails."""

    def __init__(self, library: Path) -> None:
        loaded = ctypes.CDLL(str(library))
        loaded.OrtGetApiBase.restype = POINTER(c_void_p)
        get_api, get_version = loaded.OrtGetApiBase()[:2]
        version = (ctypes.CFUNCTYPE(c_char_p)(get_version)() or b"").decode()
        if not version or not ort.__version__.startswith(version):  # left over from another installation
            raise OSError(f"{library} is of onnxruntime {version}, not {ort.__version__}")
        self._table = ctypes.CFUNCTYPE(POINTER(c_void_p), c_uint32)(get_api)(VERSION)
        if not self._table:
            raise OSError(f"{library} does not have version {VERSION} of the API")
        self._functions = {n: ctypes.CFUNCTYPE(c_void_p, *kinds)(self._table[k]) for n, (k, kinds) in FUNCTIONS.items()}
        self._release = {what: ctypes.CFUNCTYPE(None, c_void_p)(self._table[k]) for what, k in RELEASE.items()}
        self._code = ctypes.CFUNCTYPE(c_int, c_void_p)(self._table[GET_ERROR_CODE])
        self._message = ctypes.CFUNCTYPE(c_char_p, c_void_p)(self._table[GET_ERROR_MESSAGE])
        self.environment = self.made("CreateEnv", FATAL, b"onnxq")
        self("DisableTelemetryEvents", self.environment)
        self.memory = self.made("CreateCpuMemoryInfo", CPU_ALLOCATOR, CPU_MEMORY)

    def __call__(self, name: str, *arguments: Any) -> None:
        status = self._functions[name](*arguments)
        if status:
            code, message = self._code(status), (self._message(status) or b"").decode(errors="replace")
            self.release("Status", status)
            raise ApiError(f"[ONNXRuntimeError] : {code} : {CODES[code] if code < len(CODES) else '?'} : {message}")

    def made(self, name: str, *arguments: Any) -> int:
        """What a function hands out by its last argument."""
        place = c_void_p()
        self(name, *arguments, byref(place))
        return place.value or 0

    def release(self, what: str, made: int) -> None:
        self._release[what](made)

    def address(self, name: str) -> int:
        """Where a function is, for compiled code to call it."""
        place = RELEASE[name.removeprefix("Release")] if name.startswith("Release") else FUNCTIONS[name][0]
        return int(self._table[place] or 0)


@lru_cache(maxsize=1)
def api() -> Api | None:
    """The API of the onnxruntime that is installed; None where its library is not beside it."""
    folder = Path(ort.__file__ or "").parent / "capi"
    for library in sorted(path for pattern in LIBRARIES for path in folder.glob(pattern)):
        try:
            return Api(library)
        except (OSError, AttributeError, ApiError):  # no library, or one of another kind or version
            continue
    return None


CREATE = ctypes.CFUNCTYPE(c_void_p, c_void_p, c_void_p, c_void_p)
NAME = ctypes.CFUNCTYPE(c_void_p, c_void_p)
NUMBER = ctypes.CFUNCTYPE(c_size_t, c_void_p)
OF_INPUT = ctypes.CFUNCTYPE(c_int, c_void_p, c_size_t)
RETURNS_INT = ctypes.CFUNCTYPE(c_int, c_void_p)
DESTROY = ctypes.CFUNCTYPE(None, c_void_p)
ANY_TYPE, REQUIRED, ON_CPU = 0, 0, 0


class _CustomOp(ctypes.Structure):
    """OrtCustomOp as of version 14 of the API, and room for the members that came later."""

    _fields_: ClassVar = [
        ("version", c_uint32),
        ("CreateKernel", CREATE),
        ("GetName", NAME),
        ("GetExecutionProviderType", NAME),
        ("GetInputType", OF_INPUT),
        ("GetInputTypeCount", NUMBER),
        ("GetOutputType", OF_INPUT),
        ("GetOutputTypeCount", NUMBER),
        ("KernelCompute", c_void_p),
        ("KernelDestroy", DESTROY),
        ("GetInputCharacteristic", OF_INPUT),
        ("GetOutputCharacteristic", OF_INPUT),
        ("GetInputMemoryType", OF_INPUT),
        ("GetVariadicInputMinArity", RETURNS_INT),
        ("GetVariadicInputHomogeneity", RETURNS_INT),
        ("GetVariadicOutputMinArity", RETURNS_INT),
        ("GetVariadicOutputHomogeneity", RETURNS_INT),
        ("later", c_void_p * 16),
    ]


class Op:
    """An op of `inputs` tensors of any type and no outputs, in a domain of its own.

    `compute` is the address of a C function of (kernel, context). `kernel` gives for the numbers that a node has as its
    `attributes` the address that is the first of these; whoever makes the op keeps what is there.
    """

    def __init__(
        self, domain: str, name: str, inputs: int, attributes: Sequence[str], kernel: Callable[..., int], compute: int
    ) -> None:
        found = api()
        assert found is not None
        self._api = found
        label = ctypes.create_string_buffer(name.encode())

        def create(_: int, __: int, info: int) -> int:
            numbers = []
            for attribute in attributes:
                number = c_int64()
                found("KernelInfoGetAttribute_int64", info, attribute.encode(), byref(number))
                numbers.append(number.value)
            return kernel(*numbers)

        none, zero = OF_INPUT(lambda _, __: REQUIRED), RETURNS_INT(lambda _: 0)
        self._struct = _CustomOp(
            14, CREATE(create), NAME(lambda _: ctypes.addressof(label)), NAME(lambda _: None),
            OF_INPUT(lambda _, __: ANY_TYPE), NUMBER(lambda _: inputs), none, NUMBER(lambda _: 0), compute,
            DESTROY(lambda _: None), none, none, OF_INPUT(lambda _, __: ON_CPU), zero, zero, zero, zero,
        )  # fmt: skip
        self.domain = found.made("CreateCustomOpDomain", domain.encode())
        found("CustomOpDomain_Add", self.domain, ctypes.addressof(self._struct))

    def __del__(self) -> None:
        if hasattr(self, "domain"):
            self._api.release("CustomOpDomain", self.domain)


class Session:
    """A model in a file that was optimized already, and that may have nodes of an op."""

    def __init__(self, path: Path, op: Op, *, threads: int, config: Mapping[str, str]) -> None:
        """Raises ApiError where the model does not load."""
        found = api()
        assert found is not None
        self._api, self._op = found, op
        options = found.made("CreateSessionOptions")
        try:
            found("SetSessionGraphOptimizationLevel", options, 0)
            found("SetIntraOpNumThreads", options, cores.threads_for(threads))
            for key, text in config.items():
                found("AddSessionConfigEntry", options, key.encode(), text.encode())
            found("AddCustomOpDomain", options, op.domain)
            self._session = found.made("CreateSession", found.environment, encode(path), options)
        finally:
            found.release("SessionOptions", options)

    def __del__(self) -> None:
        if hasattr(self, "_session"):
            self._api.release("Session", self._session)

    def run(self, feed: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """The outputs that are tensors of numbers that numpy knows, by name. Raises ApiError where the run fails."""
        found = self._api
        arrays = {name: np.require(array, requirements="C") for name, array in feed.items()}
        given, made = (c_void_p * len(arrays))(), (c_void_p * len(outputs))()
        try:
            for k, array in enumerate(arrays.values()):
                given[k] = found.made(
                    "CreateTensorWithDataAsOrtValue", found.memory, array.ctypes.data, array.nbytes,
                    (c_int64 * array.ndim)(*array.shape), array.ndim, onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
                )  # fmt: skip
            names = (c_char_p * len(arrays))(*[name.encode() for name in arrays])
            wanted = (c_char_p * len(outputs))(*[name.encode() for name in outputs])
            found("Run", self._session, None, names, given, len(arrays), wanted, len(outputs), made)
            return {name: a for name, v in zip(outputs, made, strict=True) if (a := self._array(v)) is not None}
        finally:
            for value in (*given, *made):
                if value:
                    found.release("Value", value)

    def _array(self, value: int | None) -> np.ndarray | None:
        """A copy of a tensor's content; None of what is no tensor, or has elements that numpy lacks."""
        found, is_tensor, kind, rank = self._api, c_int(), c_int(), c_size_t()
        if not value:
            return None
        found("IsTensor", value, byref(is_tensor))
        if not is_tensor.value:
            return None
        try:
            info = found.made("GetTensorTypeAndShape", value)
        except ApiError:  # of an Optional without content, which calls itself a tensor
            return None
        try:
            found("GetTensorElementType", info, byref(kind))
            found("GetDimensionsCount", info, byref(rank))
            dims = (c_int64 * rank.value)()
            found("GetDimensions", info, dims, rank.value)
        finally:
            found.release("TensorTypeAndShapeInfo", info)
        return array_at(found.made("GetTensorMutableData", value), kind.value, tuple(dims), copy=True)


def array_at(address: int, kind: int, shape: tuple[int, ...], *, copy: bool = False) -> np.ndarray | None:
    """An array over memory, by ONNX's number of the type of its elements; bfloat16 as float32; None of types numpy lacks."""
    bfloat16 = kind == onnx.TensorProto.BFLOAT16
    if kind == onnx.TensorProto.STRING:
        return None
    dtype = np.dtype(np.uint16) if bfloat16 else onnx.helper.tensor_dtype_to_np_dtype(kind)
    if dtype.kind not in "fiubc":
        return None
    size = int(np.prod(shape, dtype=np.int64))
    content: Any = (ctypes.c_char * (size * dtype.itemsize)).from_address(address) if size else b""
    array = np.frombuffer(content, dtype).reshape(shape)
    if bfloat16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.copy() if copy else array
