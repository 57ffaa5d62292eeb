"""Calibration: run samples through the float model and keep a sketch of every observed tensor.

A `.calib` file is a zip of header.json (schema, hashes of the model and of the observed graph, runtime, feed hashes),
sketches.npz (plain arrays, no pickle) and probes.npz (the few feeds that passes may run again). Merging is not approximate:
see sketch.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxq import runtime
from onnxq.data import Sample
from onnxq.errors import CalibrationError
from onnxq.sketch import TensorSketch

SCHEMA = 2
PROBES = 4
LOUDEST = 4
Feed = dict[str, np.ndarray]
Progress = Callable[[str, int, int | None], None]


@dataclass
class Calibration:
    """Sketches by tensor, and what they were made from."""

    sketches: dict[str, TensorSketch] = field(default_factory=dict)
    samples: int = 0
    probes: list[Feed] = field(default_factory=list)
    loudest: list[Feed] = field(default_factory=list)  # of most output energy, the first most
    feed_hashes: list[str] = field(default_factory=list)
    source_hash: str = ""
    graph_hash: str = ""
    versions: dict[str, object] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        from onnxq.files import write_whole

        header = {
            "schema": SCHEMA,
            "samples": self.samples,
            "source_hash": self.source_hash,
            "graph_hash": self.graph_hash,
            "feed_hashes": self.feed_hashes,
            "versions": self.versions,
            "tensors": list(self.sketches),
            "probes": len(self.probes),
            "loudest": len(self.loudest),
        }
        arrays = {
            f"{k}/{part}": array
            for k, sketch in enumerate(self.sketches.values())
            for part, array in sketch.to_arrays().items()
        }
        feeds = [*self.probes, *self.loudest]
        probes = {f"{k}/{name}": array for k, feed in enumerate(feeds) for name, array in feed.items()}
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("header.json", json.dumps(header, indent=1))
            archive.writestr("sketches.npz", _npz(arrays))
            archive.writestr("probes.npz", _npz(probes))
        write_whole(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Raises CalibrationError where the file is none of ours, or of another schema."""
        try:
            with zipfile.ZipFile(path) as archive:
                header = json.loads(archive.read("header.json"))
                if header["schema"] != SCHEMA:
                    raise CalibrationError(
                        f"{path} has schema {header['schema']}, this onnxq reads {SCHEMA}; calibrate again"
                    )
                arrays = _parts(archive.read("sketches.npz"))
                probes = _parts(archive.read("probes.npz"))
            return cls(
                sketches={name: TensorSketch.from_arrays(arrays[k]) for k, name in enumerate(header["tensors"])},
                samples=header["samples"],
                probes=[probes[k] for k in range(header["probes"])],
                loudest=[probes[header["probes"] + k] for k in range(header["loudest"])],
                feed_hashes=header["feed_hashes"],
                source_hash=header["source_hash"],
                graph_hash=header["graph_hash"],
                versions=header["versions"],
            )
        except CalibrationError:
            raise
        except (OSError, LookupError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise CalibrationError(
                f"{path} is no readable calibration file: {error}; make it with onnxq calibrate"
            ) from error


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _parts(data: bytes) -> dict[int, dict[str, np.ndarray]]:
    found: dict[int, dict[str, np.ndarray]] = {}
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        for key in arrays.files:
            k, _, name = key.partition("/")
            found.setdefault(int(k), {})[name] = arrays[key]
    return found


def collect(
    proto: onnx.ModelProto,
    tensors: Mapping[str, int | None],
    samples: Iterable[Sample],
    *,
    threads: int = 0,
    total: int | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Sketches of `tensors` (name -> channel axis for per-channel statistics, or None) over the samples.

    Raises CalibrationError, with tensor and sample, at the first NaN or infinity.
    """
    session = runtime.Session(runtime.exposed(proto, tensors), threads=threads)
    inputs = {i.name for i in session.inputs}
    found = Calibration(sketches={name: TensorSketch(axis) for name, axis in tensors.items()})
    probes: dict[str, Feed] = {}
    loudest: dict[tuple[float, str], Feed] = {}
    public = {o.name for o in proto.graph.output}
    for k, sample in enumerate(samples):
        values = {**session.run(sample.feed, sample.where), **{n: a for n, a in sample.feed.items() if n in inputs}}
        for name, sketch in found.sketches.items():
            if values[name].dtype.kind == "f":
                sketch.update(values[name], k)
            if sketch.nan_count or sketch.inf_count:
                what = "NaN" if sketch.nan_count else "infinity"
                raise CalibrationError(
                    f"{what} in tensor {name} at {sample.where} (sample {k}): no range represents it; "
                    "check the data and its preprocessing, or leave the sample out"
                )
        digest = hash_of_feed(sample.feed)
        found.feed_hashes.append(digest)
        probes[digest] = sample.feed
        if len(probes) > PROBES:  # the feeds of least hash: the same few whatever the order
            del probes[max(probes)]
        loudest[_energy(values, public), digest] = sample.feed
        if len(loudest) > LOUDEST:
            del loudest[min(loudest)]
        found.samples = k + 1
        if progress is not None:
            progress("calibrating", k + 1, total)
    found.probes = [probes[d] for d in sorted(probes)]
    found.loudest = [loudest[key] for key in sorted(loudest, reverse=True)]
    found.versions = {k: v for k, v in runtime.machine().items() if k in ("onnxruntime", "features")}
    return found


def _energy(values: Mapping[str, Any], names: Collection[str]) -> float:
    """Sum of squares of the float tensors among these."""
    arrays = [a for name, a in values.items() if name in names and isinstance(a, np.ndarray) and a.dtype.kind == "f"]
    return sum(float(np.square(a, dtype=np.float64).sum()) for a in arrays)


def hash_of_feed(feed: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(feed):
        array = np.ascontiguousarray(feed[name])
        digest.update(f"{name}:{array.dtype}:{array.shape}".encode())
        digest.update(array.tobytes() if array.dtype == object else array.data)
    return digest.hexdigest()[:32]


def hash_of_model(proto: onnx.ModelProto) -> str:
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
