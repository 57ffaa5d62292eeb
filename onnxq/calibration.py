"""Calibration: the statistics of every observed tensor, what they were made from, and their file.

A `.calib` file is a zip of header.json (schema, hashes of the model and of the observed graph, runtime, feed hashes),
sketches.npz (plain arrays, no pickle), first_look.npz (by what channels were evened out) and feeds.npz (the few feeds that
passes may run again). Merging is not approximate:
see sketch.py. What fills it is collection.py.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from onnxq.errors import CalibrationError
from onnxq.feeds import Feed, arrays_of, flat, hash_of_feed, size_of, whole, without_objects
from onnxq.sketch import ChannelStatistics, TensorSketch

SCHEMA = 7
PROBES = 16
FEWEST_PROBES = 4  # however large they are
MOST_BYTES = 1 << 20  # of a probe beyond these
LOUDEST = 4
UNREADABLE = (  # what reading damaged or handmade files raises
    OSError, EOFError, LookupError, AttributeError, TypeError, ValueError, OverflowError, RecursionError, MemoryError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass
class Calibration:
    """Sketches by tensor, and what they were made from.

    Feeds count by their index in the data. `probes` are the few of least hash and `loudest` those of most output energy, the
    first most: the same ones whatever the order in which feeds are seen. A sketch holds for a tensor of its cone only.
    """

    sketches: dict[str, TensorSketch] = field(default_factory=dict)
    cones: dict[str, str] = field(default_factory=dict)  # tensor -> hash of all that it is computed from, see cones.py
    first_look: dict[str, ChannelStatistics] = field(default_factory=dict)  # by cone, of a few feeds, see firstlook.py
    feeds: dict[int, str] = field(default_factory=dict)  # index -> hash
    skipped: dict[int, str] = field(default_factory=dict)  # index -> why it was left out
    kept: dict[str, Feed] = field(default_factory=dict)  # hash -> feed
    probe_hashes: list[str] = field(default_factory=list)
    energies: dict[str, float] = field(default_factory=dict)  # of the loudest, by hash, the first most
    source_hash: str = ""
    versions: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # of what did not go as asked; not in the file

    @property
    def samples(self) -> int:
        """Feeds that were counted."""
        return len(self.feeds)

    def copy(self) -> Calibration:
        """A twin to which sketches can be added without changing this one."""
        return replace(self, sketches=dict(self.sketches), cones=dict(self.cones), notes=list(self.notes))

    @property
    def axes(self) -> dict[str, int | None]:
        """The tensors that there are statistics of, and the axis of the channels if there are some by channel."""
        return {name: sketch.channel_axis for name, sketch in self.sketches.items()}

    def holds(self, name: str, cone: str | None) -> bool:
        """Whether there are statistics of the tensor of this name and cone."""
        return name in self.sketches and self.cones.get(name) == cone

    def keep_feed(self, index: int, feed: Feed, digest: str, energy: float) -> None:
        """Note that a feed was counted, and keep it if it is one of the few that are kept."""
        self.feeds[index] = digest
        self._keep({digest: feed}, {digest: energy})

    def _keep(self, feeds: Mapping[str, Feed], energies: Mapping[str, float]) -> None:
        kept, loud = {**self.kept, **feeds}, {**self.energies, **energies}
        probes = _few(sorted({*self.probe_hashes, *feeds}), kept)
        loudest = sorted(loud, key=lambda digest: (loud[digest], digest), reverse=True)[:LOUDEST]
        self.probe_hashes, self.energies = probes, {digest: loud[digest] for digest in loudest}
        self.kept = {digest: kept[digest] for digest in sorted({*probes, *loudest})}

    @property
    def probes(self) -> list[Feed]:
        """The feeds of least hash."""
        return [self.kept[digest] for digest in self.probe_hashes]

    @property
    def loudest(self) -> list[Feed]:
        """The feeds of most output energy, the first most."""
        return [self.kept[digest] for digest in self.energies]

    def absorb(self, other: Calibration) -> None:
        """Add another part of the same collection: other feeds of the same data, or other tensors of the same feeds."""
        for name, sketch in other.sketches.items():
            if name in self.sketches:
                self.sketches[name].merge(sketch)
            else:
                self.sketches[name] = sketch
        self.cones.update(other.cones)
        self.feeds.update(other.feeds)
        self.skipped.update(other.skipped)
        self.notes += other.notes
        self._keep({d: other.kept[d] for d in other.probe_hashes}, {})
        self._keep({d: other.kept[d] for d in other.energies}, other.energies)

    def moved(self, by: int) -> Calibration:
        """The same, with its feeds counted from another index."""
        sketches = {}
        for name, sketch in self.sketches.items():
            series = {k + by: extent for k, extent in sketch.series.items()}
            sketches[name] = replace(sketch, series=series)
        feeds = {k + by: digest for k, digest in self.feeds.items()}
        return replace(self, sketches=sketches, feeds=feeds, skipped={k + by: why for k, why in self.skipped.items()})

    def hold_for(self, cones: Mapping[str, str]) -> None:
        """Drop the statistics of tensors that have the name, but not the cone, of one of these."""
        for name in [n for n in self.sketches if n in cones and self.cones.get(n) != cones[n]]:
            del self.sketches[name]
            self.cones.pop(name, None)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        from onnxq.files import write_whole

        flats = [flat(feed) for feed in self.kept.values()]
        header = {
            "schema": SCHEMA,
            "samples": self.samples,
            "source_hash": self.source_hash,
            "feeds": sorted(self.feeds.items()),
            "skipped": sorted(self.skipped.items()),
            "kept": list(self.kept),
            "sequences": {str(k): lengths for k, (_, lengths) in enumerate(flats) if lengths},
            "probes": self.probe_hashes,
            "loudest": {digest: energy.hex() for digest, energy in self.energies.items()},
            "versions": self.versions,
            "tensors": [[name, self.cones.get(name, "")] for name in self.sketches],
            "first_look": list(self.first_look),
        }
        arrays = {
            f"{k}/{part}": array
            for k, sketch in enumerate(self.sketches.values())
            for part, array in sketch.to_arrays().items()
        }
        first_look = {
            f"{k}/{part}": array
            for k, channels in enumerate(self.first_look.values())
            for part, array in channels.to_arrays().items()
        }
        feeds = {f"{k}/{name}": array for k, (arrays, _) in enumerate(flats) for name, array in arrays.items()}
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in {
                "header.json": json.dumps(header, indent=1).encode(),
                "sketches.npz": _npz(arrays),
                "first_look.npz": _npz(first_look),
                "feeds.npz": _npz(feeds),
            }.items():  # without the time, so that equal statistics are equal files
                archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
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
                arrays, looks = (_parts(archive.read(name)) for name in ("sketches.npz", "first_look.npz"))
                feeds, sequences = _parts(archive.read("feeds.npz")), header.get("sequences", {})
            kept = {d: whole(feeds.get(k, {}), sequences.get(str(k), {})) for k, d in enumerate(header["kept"])}
            known = {d: f for d, f in kept.items() if all(a.dtype.kind != "V" for a in arrays_of(f))}  # numpy's own types
            if any(hash_of_feed(feed) != digest for digest, feed in known.items()):
                raise ValueError("a kept feed is not the one of its hash")
            if not {*header["probes"], *header["loudest"]} <= kept.keys():
                raise ValueError("a probe is no kept feed")
            return cls(
                sketches={name: TensorSketch.from_arrays(arrays[k]) for k, (name, _) in enumerate(header["tensors"])},
                first_look={cone: ChannelStatistics.from_arrays(looks[k]) for k, cone in enumerate(header["first_look"])},
                cones={name: cone for name, cone in header["tensors"] if cone},
                kept=kept,
                probe_hashes=header["probes"],
                energies={digest: float.fromhex(energy) for digest, energy in header["loudest"].items()},
                feeds={int(k): digest for k, digest in header["feeds"]},
                skipped={int(k): why for k, why in header["skipped"]},
                source_hash=header["source_hash"],
                versions=header["versions"],
            )
        except CalibrationError:
            raise
        except UNREADABLE as error:
            raise CalibrationError(
                f"{path} is no readable calibration file: {error}; make it with onnxq calibrate"
            ) from error


def _few(digests: Sequence[str], feeds: Mapping[str, Feed]) -> list[str]:
    """The first few of these feeds, and more where they are small: of parts of the data those that are of the whole."""
    small = [d for d in digests if size_of(feeds[d]) <= MOST_BYTES]
    return sorted({*digests[:FEWEST_PROBES], *small[:PROBES]})


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{key: without_objects(array) for key, array in arrays.items()})  # type: ignore[arg-type]
    return buffer.getvalue()


def _parts(data: bytes) -> dict[int, dict[str, np.ndarray]]:
    found: dict[int, dict[str, np.ndarray]] = {}
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        for key in arrays.files:
            k, _, name = key.partition("/")
            found.setdefault(int(k), {})[name] = arrays[key]
    return found


def merge(
    parts: Sequence[str | Path | Calibration], *, output: str | Path | None = None, force: bool = False
) -> Calibration:
    """One calibration of several, or of their files, made of different data on the same model; see `merged`."""
    from onnxq.files import check_writable

    out = None if output is None else Path(output)
    if out is not None:
        check_writable(out, force, [Path(part) for part in parts if not isinstance(part, Calibration)])
    if not parts:
        raise CalibrationError("there is no calibration to merge; give at least one")
    whole = merged(
        [part if isinstance(part, Calibration) else Calibration.load(Path(part)) for part in parts],
        [f"calibration {k + 1}" if isinstance(part, Calibration) else str(part) for k, part in enumerate(parts)],
    )
    if out is not None:
        whole.save(out)
    return whole


def merged(parts: Sequence[Calibration], told: Sequence[str] = ()) -> Calibration:
    """One calibration of several, made of different data on the same model, in whatever order; `told` are
    their names in messages.

    Raises CalibrationError where they are of different models, share a feed, or have no tensor in common. Statistics of
    tensors that not all parts hold alike are left out: recipes differed, or channels were evened out in different ways.
    """
    first, seen = parts[0], set[str]()
    whole = Calibration(source_hash=first.source_hash, versions=first.versions)
    told = told or [f"calibration {k + 1}" for k in range(len(parts))]
    names = {n for n in first.sketches if all(part.holds(n, first.cones.get(n)) for part in parts)}
    for k, part in enumerate(parts):
        if part.source_hash != first.source_hash:
            raise CalibrationError(
                f"{told[k]} was made from another model than {told[0]} (their contents differ); collect it again "
                "on the same model"
            )
        shared = seen & set(part.feeds.values())
        if shared:
            raise CalibrationError(
                f"{told[k]} shares {len(shared)} of its {part.samples} feeds with those before, which would count "
                "twice; merge calibrations of different data"
            )
        seen |= set(part.feeds.values())
    if not names:
        raise CalibrationError(
            "the calibrations have no tensor in common: they were made with different recipes or versions of onnxq; collect "
            "them again with the same"
        )
    split = {n for n in names if len({part.sketches[n].channel_axis for part in parts}) > 1}  # by channels of other axes
    for part in sorted(parts, key=lambda c: sorted(c.feeds.values())):
        count = max([-1, *whole.feeds, *whole.skipped]) + 1
        copies = {n: s.copy() for n, s in part.sketches.items() if n in names}
        kept = replace(
            part, sketches={n: s.without_channels() if n in split else s for n, s in copies.items()},
            cones={n: c for n, c in part.cones.items() if n in names},
        )  # fmt: skip
        whole.absorb(kept.moved(count))
    return whole
