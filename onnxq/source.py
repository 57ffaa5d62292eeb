"""Models as they come and go: read from a path, bytes or a proto; written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError, Message
from onnx.external_data_helper import set_external_data

from onnxq.errors import ModelError, OutputError
from onnxq.files import write_whole
from onnxq.precision import is_half, widen
from onnxq.proto import external_tensors, folder_of, with_external_data
from onnxq.store import WeightStore, size_of, stored

LARGEST_FILE = 1_800_000_000  # bytes: protobuf refuses messages of 2 GB
SMALLEST_BESIDE = 1024  # bytes of a tensor that goes into the file of weights


@dataclass(frozen=True)
class Source:
    """A model as it was given: its proto, the folder of its external data, and a name for messages.

    Large weights that were in a file or in bytes are in `store`, for the proto not to hold them in memory.
    """

    proto: onnx.ModelProto
    folder: Path | None
    path: Path | None
    store: WeightStore = field(default_factory=WeightStore)

    @property
    def name(self) -> str:
        return str(self.path) if self.path else "model"

    @property
    def loadable(self) -> Path | onnx.ModelProto:
        """What the runtime loads: the file where there is one, so that it finds external data, and no large weights in it.

        Most kernels of bfloat16 are missing on a CPU: such a model is given as one that computes in float32.
        """
        if not is_half(self.proto, (onnx.TensorProto.BFLOAT16,)):
            return self.proto if self.path is None or folder_of(self.proto) is not None else self.path
        twin = with_external_data(self.proto, self.folder)
        widen(twin)
        return twin

    @property
    def size(self) -> int:
        """Bytes of the model with its external data."""
        return sum(p.stat().st_size for p in self.files if p.is_file()) if self.path else size_of(self.proto)

    @property
    def files(self) -> list[Path]:
        """Every file that the model is read from."""
        return [*([self.path] if self.path else []), *self.beside]

    @property
    def beside(self) -> list[Path]:
        """The files that hold its external data."""
        if self.folder is None:
            return []
        places = {e.value for t in external_tensors(self.proto) for e in t.external_data if e.key == "location"}
        return [] if folder_of(self.proto) is not None else [self.folder / p for p in sorted(places)]


def load_any(model: str | Path | bytes | onnx.ModelProto) -> Source:
    """Read a model of any kind. Raises ModelError where it is no ONNX model."""
    if isinstance(model, onnx.ModelProto):
        return Source(model, None, None)
    if isinstance(model, bytes):
        return _stored(_parse(model, "the model"), None)
    path = Path(model)
    if not path.exists():
        raise ModelError(f"there is no model at {path}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    return _stored(_parse(data, str(path)), path)


def _stored(proto: onnx.ModelProto, path: Path | None) -> Source:
    folder, store = None if path is None else path.parent, WeightStore()
    if next(external_tensors(proto), None) is None:  # external data is not in memory anyway
        proto = stored(proto, None, store)
    return Source(proto, folder, path, store)


def _parse(data: bytes, where: str) -> onnx.ModelProto:
    if data.startswith(b"PK\3\4"):
        raise ModelError(
            f"{where} is a zip archive, as PyTorch saves; give the .onnx file that torch.onnx.export makes of it"
        )
    try:
        proto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise ModelError(
            f"{where} is not an ONNX file, or is truncated: {error}; copy it or export the model again"
        ) from error
    if _has_broken_text(proto):
        raise ModelError(f"{where} is damaged: a name in it is no text; copy it or export the model again")
    parts = {"graph": proto.graph.node, "outputs": proto.graph.output, "operator set": proto.opset_import}
    missing = next((name for name, part in parts.items() if not part), None)
    if missing is not None:
        raise ModelError(f"{where} is not an ONNX model, or is truncated: it has no {missing}; export the model again")
    return proto


def _has_broken_text(message: Message) -> bool:
    """Whether a name or another text in it is no UTF-8; protobuf then gives its bytes."""
    for kind, content in message.ListFields():
        parts: Any = content if isinstance(content, Sequence) and not isinstance(content, (str, bytes)) else [content]
        if kind.message_type is not None and any(_has_broken_text(part) for part in parts):
            return True
        if kind.type == kind.TYPE_STRING and not all(isinstance(part, str) for part in parts):
            return True
    return False


def size_in_memory(loadable: onnx.ModelProto | str | Path) -> int:
    """Bytes of what `Source.loadable` gives, with its weights."""
    if isinstance(loadable, onnx.ModelProto):
        return size_of(loadable)
    return load_any(loadable).size


def save(proto: onnx.ModelProto, path: Path) -> None:
    """Write a model, whole or not at all; one over 2 GB with its weights in `<name>.data` beside it. Raises OutputError."""
    if proto.ByteSize() < LARGEST_FILE:
        write_whole(path, proto.SerializeToString(deterministic=True))
        return
    twin = onnx.ModelProto()
    twin.CopyFrom(proto)
    weights = path.with_name(f"{path.name}.data")
    if weights.exists() and not path.exists():  # where the model exists, leave was given to replace both
        raise OutputError(f"{weights}, where the weights go, exists; remove it, or give another name")
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            with open(Path(folder) / weights.name, "wb") as file:
                for tensor in twin.graph.initializer:
                    if len(tensor.raw_data) >= SMALLEST_BESIDE:
                        set_external_data(tensor, weights.name, file.tell(), len(tensor.raw_data))
                        file.write(tensor.raw_data)
                        tensor.ClearField("raw_data")
            written = Path(folder) / path.name
            written.write_bytes(twin.SerializeToString(deterministic=True))
            os.replace(Path(folder) / weights.name, weights)
            os.replace(written, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
