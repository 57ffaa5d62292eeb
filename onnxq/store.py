"""Weights on disk: the large arrays of a model in one file, mapped into memory, so that only what is read is resident.

A proto whose initializers refer to that file is for this process alone. It says in its metadata which folder the file is
in, for the runtime to find it; what is saved for others has its weights inside, or beside it.
"""

from __future__ import annotations

import hashlib
import mmap
import shutil
import tempfile
import weakref
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import uses_external_data

from onnxq.proto import folder_of, load_external, say_folder

FILE = "weights.bin"
LEAST = 1 << 16  # bytes of an array that is worth a place in the file
PAGE = 4096  # what a mapping starts at a multiple of


class WeightStore:
    """Arrays in a file of a temporary folder that goes when the store does."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._end = 0
        self._full = False
        self._mappings: list[mmap.mmap] = []
        self._mapped: dict[int, np.ndarray] = {}  # offset -> the array there
        self._offsets: dict[int, int] = {}  # id of such an array -> offset
        self._written: list[tuple[int, weakref.ref[np.ndarray], int, np.dtype, tuple[int, ...]]] = []  # not yet mapped
        self._copied: dict[int, tuple[weakref.ref[np.ndarray], np.ndarray]] = {}  # id of an array -> it, and what is mapped

    @property
    def folder(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="onnxq-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    def holds(self, values: Any) -> bool:
        return self._mapped.get(self._offsets.get(id(values), -1)) is values

    def keep(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """The arrays as they are in the file from now on; the same ones where they are there, small, or the disk is full."""
        for values in {id(a): a for a in arrays}.values():
            if not self.holds(values) and self._known(values) is values:
                self.write(values)
        self.map_written()
        return [self._known(values) for values in arrays]

    def write(self, values: np.ndarray) -> int | None:
        """Put an array at the end of the file, without the use of it before `map_written`.

        Gives its offset, or None where it is small, of a type that has no plain bytes, or the disk is full.
        """
        if self._full or values.dtype.isbuiltin != 1 or values.dtype == object or values.nbytes < LEAST:
            return None
        offset = self._end
        try:
            with open(self.folder / FILE, "ab") as file:
                file.truncate(offset)
                file.seek(offset)
                np.ascontiguousarray(values).tofile(file)
                self._end = -(-file.tell() // PAGE) * PAGE
                file.truncate(self._end)
        except OSError:  # the arrays stay in memory, as they would without a store
            self._full = True
            return None
        self._written.append((offset, weakref.ref(values), id(values), values.dtype, values.shape))
        return offset

    def map_written(self) -> None:
        """Map what was written, all of it at once: each mapping holds a file descriptor, and a process has few of them."""
        if not self._written:
            return
        start = self._written[0][0]
        mapping = np.memmap(self.folder / FILE, np.uint8, "c", start, (self._end - start,))
        self._mappings.append(mapping._mmap)  # type: ignore[attr-defined]
        for offset, source, key, dtype, shape in self._written:
            size = prod(shape) * dtype.itemsize
            mapped = mapping[offset - start : offset - start + size].view(np.ndarray).view(dtype).reshape(shape)
            self._mapped[offset], self._offsets[id(mapped)] = mapped, offset
            self._copied[key] = source, mapped
        self._written.clear()

    def _known(self, values: np.ndarray) -> np.ndarray:
        """The array in the file that is a copy of this one, or this one."""
        known = self._copied.get(id(values))
        return known[1] if known is not None and known[0]() is values else values

    def release(self) -> None:
        """Let go of the memory of what was read; it is read from the file again where it is needed."""
        for mapping in self._mappings:
            if hasattr(mapping, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
                mapping.madvise(mmap.MADV_DONTNEED)

    def reference(self, name: str, values: np.ndarray) -> TensorProto:
        """An initializer that refers to an array of the file."""
        return _reference(name, values.dtype, values.shape, self._offsets[id(values)])

    def find(self, tensor: TensorProto) -> np.ndarray:
        """The array that an initializer made by `reference` refers to."""
        return self._mapped[_number(tensor, "offset")].reshape(tuple(tensor.dims))


def stored(proto: onnx.ModelProto, folder: Path | None, store: WeightStore) -> onnx.ModelProto:
    """A copy of the model with its large initializers in the store; other external data, read from `folder`, is in it.

    Raises ModelError where external data cannot be read.
    """
    twin = onnx.ModelProto()
    _copy_but(proto, twin, "graph")
    _copy_but(proto.graph, twin.graph, "initializer")
    own = folder_of(proto)
    load_external(twin, own or folder)
    for tensor in proto.graph.initializer:
        if own == store.folder and uses_external_data(tensor):
            twin.graph.initializer.append(tensor)
            continue
        whole = tensor
        if uses_external_data(tensor):
            single = onnx.ModelProto(graph=onnx.GraphProto(initializer=[tensor]))
            load_external(single, own or folder)
            whole = single.graph.initializer[0]
        twin.graph.initializer.append(_written(whole, store))
    store.map_written()
    if any(uses_external_data(t) for t in twin.graph.initializer):
        say_folder(twin, store.folder)
    return twin


def _written(tensor: TensorProto, store: WeightStore) -> TensorProto:
    """The initializer with its data in the store, where that takes it."""
    if tensor.ByteSize() < LEAST or helper.tensor_dtype_to_np_dtype(tensor.data_type).isbuiltin != 1:
        return tensor
    try:
        values = numpy_helper.to_array(tensor)
    except (ValueError, TypeError):  # more or less data than its shape says: who reads it tells
        return tensor
    offset = store.write(values)
    return tensor if offset is None else _reference(tensor.name, values.dtype, values.shape, offset)


def _reference(name: str, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> TensorProto:
    kind = helper.np_dtype_to_tensor_dtype(dtype)
    tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, text in (("location", FILE), ("offset", offset), ("length", prod(shape) * dtype.itemsize)):
        tensor.external_data.add(key=key, value=str(text))
    return tensor


def _copy_but(given: Any, made: Any, left_out: str) -> None:
    """Copy a message, without one of its fields."""
    for field, content in given.ListFields():
        if field.name == left_out:
            continue
        if hasattr(content, "extend"):
            getattr(made, field.name).extend(content)
        elif field.message_type is not None:
            getattr(made, field.name).CopyFrom(content)
        else:
            setattr(made, field.name, content)


def size_of(proto: onnx.ModelProto) -> int:
    """Bytes of the model with its weights."""
    return proto.ByteSize() + sum(_number(t, "length") for t in proto.graph.initializer if uses_external_data(t))


def hash_of_model(proto: onnx.ModelProto) -> str:
    """SHA-256 of the model, the same wherever its large weights are."""
    digest, folder = hashlib.sha256(), folder_of(proto)
    light = onnx.ModelProto()
    _copy_but(proto, light, "graph")
    _copy_but(proto.graph, light.graph, "initializer")
    say_folder(light, None)
    for tensor in proto.graph.initializer:
        if (folder is None or not uses_external_data(tensor)) and len(tensor.raw_data) < LEAST:
            light.graph.initializer.append(tensor)
            continue
        light.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        digest.update(content_of(tensor, folder))
    digest.update(light.SerializeToString(deterministic=True))
    return digest.hexdigest()


def content_of(tensor: TensorProto, folder: Path | None) -> Any:
    """The bytes of an initializer, from the store in `folder` where it is there; all of it but its name, if not plain."""
    if folder is not None and uses_external_data(tensor):
        return np.memmap(folder / FILE, np.uint8, "r", _number(tensor, "offset"), (_number(tensor, "length"),))
    if tensor.HasField("raw_data"):
        return tensor.raw_data
    bare = TensorProto()
    bare.CopyFrom(tensor)
    bare.ClearField("name")
    return bare.SerializeToString(deterministic=True)


def _number(tensor: TensorProto, key: str) -> int:
    return next((int(e.value) for e in tensor.external_data if e.key == key), 0)
