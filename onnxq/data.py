"""Calibration and evaluation samples, from every form that users keep them in.

    folder of .npz          one feed a file: an array for each input name
    one .npz, one .npy      arrays stacked along axis 0; a sample is a slice that keeps its batch axis
    test_data_set_* folders input_0.pb, input_1.pb ... as the ONNX backend tests store them
    folder of images        with the preprocessing given; a subfolder is a class
    module:function         a callable that gives feeds, or (feed, label) pairs
    iterable, reader        in the library: any iterable of feeds, or an onnxruntime CalibrationDataReader

A label is an array `label` that is not a model input. For an input x that takes a sequence, a feed holds a list of arrays,
a file the arrays x[0], x[1] ...; for an Optional one that is given nothing, nothing. Samples are pulled lazily and never
re-batched. A source that can be read only once (a generator, a reader) is spooled to a temporary folder as it is read, so
that it can be read again.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.errors import DataError, nearest
from onnxq.feeds import Feed, Value, flat, whole, without_objects
from onnxq.images import SUFFIXES, ImageOptions, open_images
from onnxq.runtime import Session, TensorInfo

LABEL_NAMES = ("label", "labels")
HOW = "--data takes a folder of .npz feeds or of images, an .npz or .npy file, test_data_set_* folders, or module:function"


@dataclass(frozen=True)
class Sample:
    """One feed for the model, its label if it has one, and where it came from (for messages)."""

    feed: Feed
    label: np.ndarray | None
    where: str


@dataclass(frozen=True)
class Opened:
    """What gives the samples as they are stored, from the first on each time, and how many there are, if that is known.

    A source that comes once is read while the samples are pulled for the first time.
    """

    read: Callable[[], Iterator[Sample]]
    length: int | None
    comes_once: bool = False


class Samples:
    """A sequence of samples that can be read any number of times; each is checked against the model's inputs."""

    def __init__(self, opened: Opened, inputs: Sequence[TensorInfo], limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise DataError(f"at most {limit} samples are asked for; at least one is needed")
        self._read, self._inputs, self._limit = opened.read, inputs, limit
        self.length = opened.length if limit is None else limit if opened.length is None else min(opened.length, limit)
        self.comes_once = opened.comes_once

    def raw(self) -> Iterator[Sample]:
        """The samples as they are stored."""
        return islice(self._read(), self._limit)

    def without(self, indices: Collection[int]) -> Samples:
        """The same but for those of these indices."""
        left = None if self.length is None else self.length - len(indices)
        opened = Opened(lambda: (s for k, s in enumerate(self.raw()) if k not in indices), left, self.comes_once)
        return Samples(opened, self._inputs)

    def __iter__(self) -> Iterator[Sample]:
        empty = True
        for sample in self.raw():
            empty = False
            sample = _as_floats_of(_labelled(sample, self._inputs), self._inputs)
            check(sample, self._inputs)
            yield sample
        if empty:
            raise DataError(f"the data is empty: there is not one sample in it; {HOW}")


def open_samples(
    source: Any,
    inputs: Sequence[TensorInfo],
    *,
    images: ImageOptions | None = None,
    limit: int | None = None,
) -> Samples:
    """Samples for a model with these inputs. Raises DataError where the source is of no known kind or does not exist."""
    if isinstance(source, Samples):
        opened = Opened(source.raw, source.length, source.comes_once)
    elif isinstance(source, (str, Path)):
        opened = _open_path(str(source), inputs, images or ImageOptions())
    else:
        opened = _open_object(source, _sequences(inputs))
    return Samples(opened, inputs, limit)


def fed_back(samples: Samples, session: Session, states: Mapping[str, str], inputs: Sequence[TensorInfo]) -> Samples:
    """The samples as one stream: each lacks the inputs that are outputs (output -> input) of the run before.

    The model is run to make them. They are zeros in the first sample, dimensions that the model leaves open being 1; of a
    sequence, no arrays; of an Optional, nothing. A sample that holds them starts the stream anew from there. Raises
    DataError where a name is none of the model's.
    """
    of = {i.name: i for i in inputs}
    outputs = [o.name for o in session.outputs]
    for output, name in states.items():
        for what, said, valid in (("output", output, outputs), ("input", name, list(of))):
            if said not in valid:
                raise DataError(f"feedback {output}={name}: the model has no {what} {said}; {nearest(said, valid)}")

    def read() -> Iterator[Sample]:
        state: Feed = {}
        for sample in samples.raw():
            feed = dict(sample.feed)
            for name in states.values():
                if name in feed:
                    continue
                if name in state:
                    feed[name] = state[name]
                elif not of[name].is_optional:
                    shape = [1 if d is None else d for d in of[name].shape or ()]
                    feed[name] = [] if of[name].is_sequence else np.zeros(shape, of[name].dtype)
            full = _as_floats_of(_labelled(Sample(feed, sample.label, sample.where), inputs), inputs)
            check(full, inputs)
            results = session.run(full.feed, full.where)
            state = {name: results[output] for output, name in states.items() if results[output] is not None}
            for output, name in states.items():
                if name in state:
                    _check_value(state[name], of[name], f"feedback {output}={name}, made of {full.where}")
            yield full

    return Samples(Opened(read, samples.length, samples.comes_once), inputs)


def check(sample: Sample, inputs: Sequence[TensorInfo]) -> None:
    """Raise DataError, with the sample and the key, unless the feed has what the model takes."""
    names = [i.name for i in inputs]
    for name in sample.feed:
        if name not in names:
            raise DataError(f"{sample.where}: the model has no input {name}; {nearest(name, names)}")
    for info in inputs:
        if info.name in sample.feed:
            _check_value(sample.feed[info.name], info, sample.where)
        elif not info.is_optional:
            what = f"are no arrays {info.name}[0], {info.name}[1] ..." if info.is_sequence else "is no array"
            needed = [i.name for i in inputs if not i.is_optional]
            raise DataError(
                f"{sample.where}: there {what} for input {info.name}; it holds {sorted(sample.feed)}, and each sample "
                f"needs all of {needed}"
            )


def _check_value(value: Value, info: TensorInfo, where: str) -> None:
    if isinstance(value, list) != info.is_sequence:
        takes, given = ("a list of arrays", "one array") if info.is_sequence else ("one array", "a list of arrays")
        raise DataError(f"{where}: input {info.name} takes {takes} and is given {given}; give it as {takes}")
    for array in value if isinstance(value, list) else [value]:
        if info.dtype is not None and info.dtype != object and array.dtype != info.dtype:
            raise DataError(
                f"{where}: input {info.name} is {array.dtype}, the model takes {info.dtype}; store it as {info.dtype}"
            )
        if info.shape is not None and not _fits(array.shape, info.shape):
            wanted = ", ".join("?" if d is None else str(d) for d in info.shape)
            raise DataError(
                f"{where}: input {info.name} has shape {list(array.shape)}, the model takes [{wanted}]; give every "
                "sample in that shape, its batch axis included"
            )


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(w is None or s == w for s, w in zip(shape, wanted, strict=True))


def _open_path(text: str, inputs: Sequence[TensorInfo], images: ImageOptions) -> Opened:
    path = Path(text)
    if text and path.is_dir():
        return _open_folder(path, inputs, images)
    if path.suffix == ".npz" and path.is_file():
        return _stacked(_load_npz(path), path.name, inputs)
    if path.suffix == ".npy" and path.is_file():
        if len(inputs) != 1:
            raise DataError(f"{path} holds one array, and the model has {len(inputs)} inputs; use an .npz with their names")
        return _stacked({inputs[0].name: _load_npy(path)}, path.name, inputs)
    module, colon, function = text.rpartition(":")
    if colon and module.replace(".", "").isidentifier() and function.isidentifier():
        return _open_named(text, _sequences(inputs))
    if not text or not path.exists():
        raise DataError(f"there is no data at {text or 'an empty path'}; {HOW}")
    raise DataError(f"{text} is no kind of data that is known; {HOW}")


def _open_folder(folder: Path, inputs: Sequence[TensorInfo], images: ImageOptions) -> Opened:
    feeds = sorted(folder.glob("*.npz"))
    if feeds:
        names = _sequences(inputs)
        return Opened(lambda: (Sample(_gathered(_load_npz(f), names), None, f.name) for f in feeds), len(feeds))
    sets = sorted(p for p in folder.glob("test_data_set_*") if p.is_dir())
    if not sets and (folder / "input_0.pb").is_file():
        sets = [folder]
    if sets:
        return Opened(lambda: (_load_protos(s, inputs) for s in sets), len(sets))
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if files:
        read = open_images(folder, files, inputs, images)
        name = inputs[0].name
        return Opened(lambda: (Sample({name: x}, label, where) for x, label, where in read()), len(files))
    raise DataError(f"{folder} holds no .npz feeds, no test_data_set_* folders and no images; {HOW}")


def _sequences(inputs: Iterable[TensorInfo]) -> frozenset[str]:
    return frozenset(i.name for i in inputs if i.is_sequence)


def _gathered(arrays: Mapping[str, np.ndarray], sequences: Iterable[str]) -> Feed:
    """The arrays of a file as a feed: those of sequences, name[0], name[1] ..., in lists."""
    lengths = {name: next(k for k in count() if f"{name}[{k}]" not in arrays) for name in sequences}
    return whole(arrays, {name: length for name, length in lengths.items() if length})


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    key = ""
    found = {}
    try:
        with path.open("rb") as file:  # numpy leaves a file that it opens itself open when it is damaged
            arrays = np.load(file, allow_pickle=False)
            if isinstance(arrays, np.ndarray):
                raise ValueError("it is an .npy file by another name")
            for key in arrays.files:
                found[key] = arrays[key]
    except Exception as error:  # zipfile, zlib and numpy raise some ten classes between them at a damaged file
        raise DataError(f"{path} is no readable .npz file{f', at array {key}' if key else ''}: {_why(error)}") from error
    return found


def _load_npy(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an .npz file by another name")
    except Exception as error:
        raise DataError(f"{path} is no readable .npy file: {_why(error)}") from error
    return array


def _why(error: Exception) -> str:
    if "pickle" in str(error):
        return "it holds pickled objects, or is no file of numpy's at all; store plain arrays of numbers with numpy.savez"
    return f"{str(error) or type(error).__name__}; store it again with numpy.savez"


def _labelled(sample: Sample, inputs: Sequence[TensorInfo]) -> Sample:
    """The sample with its label taken out of the feed, unless it came with one."""
    kept = {i.name for i in inputs}
    labels = [name for name in LABEL_NAMES if name in sample.feed and name not in kept]
    if sample.label is not None or not labels:
        return sample
    feed = {name: array for name, array in sample.feed.items() if name not in labels}
    return Sample(feed, sample.feed[labels[0]], sample.where)


def _as_floats_of(sample: Sample, inputs: Sequence[TensorInfo]) -> Sample:
    """The sample with floats of another width than the model takes turned into those."""
    wanted = {i.name: i.dtype for i in inputs if i.dtype is not None and i.dtype.kind == "f"}

    def fitted(name: str, array: np.ndarray) -> np.ndarray:
        if array.dtype.name == "bfloat16":  # of ml_dtypes, as onnx reads such tensors
            array = array.astype(np.float32)
        return array.astype(wanted.get(name, array.dtype), copy=False) if array.dtype.kind == "f" else array

    feed: Feed = {
        name: [fitted(name, a) for a in value] if isinstance(value, list) else fitted(name, value)
        for name, value in sample.feed.items()
    }
    return Sample(feed, sample.label, sample.where)


def _stacked(arrays: dict[str, np.ndarray], where: str, inputs: Sequence[TensorInfo]) -> Opened:
    lengths = {k: len(v) for k, v in arrays.items() if v.ndim > 0}
    if not lengths or not all(lengths.values()):
        raise DataError(f"{where} is empty: its arrays hold no samples along axis 0")
    if len(set(lengths.values())) > 1:
        raise DataError(f"{where}: the arrays differ in length along axis 0, {lengths}; stack one entry a sample")
    baked, names = [i.shape[0] for i in inputs if i.shape], _sequences(inputs)
    step = next((b for b in baked if b is not None), 1)
    total = next(iter(lengths.values())) // step
    if total == 0:
        raise DataError(f"{where}: the model takes batches of {step}, and there are fewer samples than that")
    rest = next(iter(lengths.values())) % step
    if rest:
        raise DataError(f"{where}: the model takes batches of {step}, which leaves {rest} samples over; drop or add some")

    def read() -> Iterator[Sample]:
        for k in range(total):
            part = slice(k * step, (k + 1) * step)
            feed = {name: array[part] if array.ndim else array for name, array in arrays.items()}
            yield Sample(_gathered(feed, names), None, f"{where}[{part.start}]")

    return Opened(read, total)


def _load_protos(folder: Path, inputs: Sequence[TensorInfo]) -> Sample:
    feed: Feed = {}
    for k, info in enumerate(inputs):
        path = folder / f"input_{k}.pb"
        try:
            value = _load_proto(path.read_bytes(), info)
        except OSError as error:
            raise DataError(f"{path}, for input {info.name}, cannot be read: {error.strerror}") from error
        except Exception as error:  # protobuf's, and whatever numpy makes of a tensor whose parts do not go together
            kind = "OptionalProto" if info.is_optional else "SequenceProto" if info.is_sequence else "TensorProto"
            raise DataError(
                f"{path}, for input {info.name}, is no serialized value: {error}; write it as onnx.{kind}"
            ) from error
        if value is not None:
            feed[info.name] = value
    return Sample(feed, None, folder.name)


def _load_proto(content: bytes, info: TensorInfo) -> Value | None:
    from onnx import OptionalProto, SequenceProto, TensorProto, numpy_helper

    if info.is_optional:
        optional = OptionalProto.FromString(content)
        is_empty = not any(optional.HasField(f) for f in ("tensor_value", "sequence_value"))
        return None if is_empty else numpy_helper.to_optional(optional)
    if info.is_sequence:
        return numpy_helper.to_list(SequenceProto.FromString(content))
    return numpy_helper.to_array(TensorProto.FromString(content))


def load_function(text: str) -> Callable[..., Any]:
    """The function that `module:function` names. What it raises comes out as a DataError that names its line."""
    function = _named(text)
    if not callable(function):
        raise DataError(f"{text} is a {type(function).__name__}; it takes a function")

    def call(*arguments: Any, **options: Any) -> Any:
        with _blamed(text):
            return function(*arguments, **options)

    return call


def _open_named(text: str, sequences: frozenset[str]) -> Opened:
    with _blamed(text):
        opened = _open_object(_named(text), sequences)

    def guarded() -> Iterator[Sample]:
        with _blamed(text):
            yield from opened.read()

    return replace(opened, read=guarded)


def _named(text: str) -> Any:
    """What `module:function` names, looked up with the current folder on the path."""
    module, _, function = text.rpartition(":")
    if not module or not function:
        raise DataError(f"{text} names no function; it takes MODULE:FUNCTION, e.g. metrics:accuracy")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise DataError(
            f"{text}: module {module} cannot be imported: {error}; run where {module.split('.')[0]}.py is, or install it"
        ) from error
    except Exception as error:  # whatever the module does when it is imported
        raise DataError(f"{text}: module {module} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(found, function):
        own = [n for n, v in vars(found).items() if getattr(v, "__module__", "") == module and not n.startswith("_")]
        raise DataError(f"{text}: module {module} has no {function}; {nearest(function, own)}")
    return getattr(found, function)


@contextmanager
def _blamed(text: str) -> Iterator[None]:
    """What a user's function raises, as one message with the line that raised it."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        home = getattr(sys.modules.get(text.rpartition(":")[0]), "__file__", None)
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if f.filename == home] or frames
        raise DataError(
            f"{text} raised {type(error).__name__}: {error}; look at line {own[-1].lineno} of {own[-1].filename}"
        ) from error


def _open_object(source: Any, sequences: frozenset[str]) -> Opened:
    if hasattr(source, "get_next") and not isinstance(source, type):
        return _spooled(iter(source.get_next, None), sequences)
    if callable(source):  # called anew for each reading
        return Opened(lambda: (_as_sample(item, k, sequences) for k, item in enumerate(_iterable(source()))), None)
    if isinstance(source, Iterator):
        return _spooled(source, sequences)
    return _reiterable(source, sequences)


def _iterable(source: Any) -> Iterable[Any]:
    if hasattr(source, "get_next"):
        return iter(source.get_next, None)
    if not isinstance(source, Iterable):
        raise DataError(f"data of type {type(source).__name__} is not an iterable of feeds; {HOW}")
    return source


def _reiterable(source: Any, sequences: frozenset[str]) -> Opened:
    feeds = _iterable(source)
    try:
        length = len(source)
    except (TypeError, NotImplementedError):  # has no length, or says so only when asked
        length = None
    return Opened(lambda: (_as_sample(item, k, sequences) for k, item in enumerate(feeds)), length)


def _as_sample(item: Any, k: int, sequences: frozenset[str]) -> Sample:
    where = f"sample {k}"
    if isinstance(item, Sample):
        return item
    feed, label = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
    if not isinstance(feed, dict):
        raise DataError(f"{where} is a {type(feed).__name__}; a feed is a dict of one array for each input name")
    taken: Feed = {}
    for name, given in feed.items():
        if name in sequences and isinstance(given, (list, tuple)):
            taken[str(name)] = [_as_array(array, f"input {name}[{j}]", where) for j, array in enumerate(given)]
        elif given is not None:  # nothing, for an Optional input
            taken[str(name)] = _as_array(given, f"input {name}", where)
    return Sample(taken, None if label is None else _as_array(label, "the label", where), where)


def _as_array(given: Any, what: str, where: str) -> np.ndarray:
    try:
        array = np.array(given)  # a copy: several samples are under way at once, and who gives them may use one buffer
        return array.astype(np.float32) if array.dtype.name == "bfloat16" else array  # which numpy does not keep in files
    except Exception as error:  # numpy's, or that of the type that is asked to become an array
        raise DataError(f"{where}: {what} is a {type(given).__name__} that makes no array: {error}") from error


def _spooled(source: Iterator[Any], sequences: frozenset[str]) -> Opened:
    """A source that can be read once, kept on disk as it is read."""
    folder = Path(tempfile.mkdtemp(prefix="onnxq-"))
    kept: list[tuple[Path, str, dict[str, int]]] = []

    def read() -> Iterator[Sample]:
        k = 0
        while True:
            if k == len(kept):
                item = next(source, None)
                if item is None:
                    return
                sample = _as_sample(item, k, sequences)
                path = folder / f"{k}.npz"
                given, lengths = flat(sample.feed)
                arrays: dict[str, Any] = {f"0{name}": without_objects(array) for name, array in given.items()}
                if sample.label is not None:
                    arrays["1"] = without_objects(sample.label)
                np.savez(path, **arrays)
                kept.append((path, sample.where, lengths))
            path, where, lengths = kept[k]
            with np.load(path) as stored:
                feed = {name[1:]: stored[name] for name in stored.files if name[0] == "0"}
                label = stored["1"] if "1" in stored.files else None
            yield Sample(whole(feed, lengths), label, where)
            k += 1

    weakref.finalize(read, shutil.rmtree, folder, ignore_errors=True)
    return Opened(read, None, comes_once=True)
