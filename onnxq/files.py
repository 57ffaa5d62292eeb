"""Files are written whole or not at all, and never over what is read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from onnxq.errors import OutputError


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all. Raises OutputError."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def check_writable(path: Path, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse early what could not be written at the end, and always what is read. Raises OutputError."""
    for source in inputs:
        if path.exists() and source.exists() and path.samefile(source):
            raise OutputError(f"the output {path} is the input model, or its data; give another name")
    if path.exists() and not force:
        raise OutputError(f"{path} exists; give --force to replace it, or another name")
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"the folder {path.parent} is not writable; give another")
