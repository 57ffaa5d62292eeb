"""Calibration and evaluation samples, from every form that users keep them in.

    folder of .npz          one feed a file: an array for each input name
    one .npz, one .npy      arrays stacked along axis 0; a sample is a slice that keeps its batch axis
    test_data_set_* folders input_0.pb, input_1.pb ... as the ONNX backend tests store them
    folder of images        with the preprocessing given; a subfolder is a class
    module:function         a callable that gives feeds, or (feed, label) pairs
    iterable, reader        in the library: any iterable of feeds, or an onnxruntime CalibrationDataReader

A label is an array `label` that is not a model input. Samples are pulled lazily and never re-batched. A source that can be
read only once (a generator, a reader) is spooled to a temporary folder as it is read, so that it can be read again.
"""

from __future__ import annotations

import importlib
import math
import shutil
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.errors import DataError, RecipeError, nearest
from onnxq.runtime import TensorInfo

LABEL_NAMES = ("label", "labels")
LAYOUTS, ORDERS = ("NCHW", "NHWC"), ("RGB", "BGR")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})
HOW = "--data takes a folder of .npz feeds or of images, an .npz or .npy file, test_data_set_* folders, or module:function"


@dataclass(frozen=True)
class Sample:
    """One feed for the model, its label if it has one, and where it came from (for messages)."""

    feed: dict[str, np.ndarray]
    label: np.ndarray | None
    where: str


@dataclass(frozen=True)
class ImageOptions:
    """Preprocessing: x = (pixel * scale - mean) / std, by channel, in the given channel order."""

    size: tuple[int, int] | None = None  # (height, width); None: the model's
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float = 1 / 255
    layout: str = "NCHW"
    order: str = "RGB"

    def __post_init__(self) -> None:
        for what, given, valid in (("layout", self.layout, LAYOUTS), ("order", self.order, ORDERS)):
            if given not in valid:
                raise RecipeError(f"unknown image {what} {given}; {nearest(given, valid)}")
        if self.size is not None and min(self.size) < 1:
            raise RecipeError(f"the image size is {self.size}; it takes a height and a width of at least 1")
        for what, numbers in (("mean", self.mean), ("std", self.std), ("scale", (self.scale,))):
            if numbers is not None and not all(math.isfinite(number) for number in numbers):
                raise RecipeError(f"the image {what} is {numbers}; it takes finite numbers")
        if self.std is not None and 0 in self.std:
            raise RecipeError(f"the image std is {self.std}; pixels are divided by it, so none of it may be 0")


class Samples:
    """A sequence of samples that can be read any number of times; each is checked against the model's inputs."""

    def __init__(
        self, read: Callable[[], Iterator[Sample]], inputs: Sequence[TensorInfo], length: int | None, limit: int | None
    ) -> None:
        if limit is not None and limit < 1:
            raise DataError(f"at most {limit} samples are asked for; at least one is needed")
        self._read, self._inputs, self._limit = read, inputs, limit
        self.length = length if limit is None else limit if length is None else min(length, limit)

    def __iter__(self) -> Iterator[Sample]:
        empty = True
        for sample in islice(self._read(), self._limit):
            empty = False
            sample = _labelled(sample, self._inputs)
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
        return Samples(lambda: islice(source._read(), source._limit), inputs, source.length, limit)
    if isinstance(source, (str, Path)):
        read, length = _open_path(str(source), inputs, images or ImageOptions())
    else:
        read, length = _open_object(source)
    return Samples(read, inputs, length, limit)


def check(sample: Sample, inputs: Sequence[TensorInfo]) -> None:
    """Raise DataError, with the sample and the key, unless the feed has what the model takes."""
    names = [i.name for i in inputs]
    for name in sample.feed:
        if name not in names:
            raise DataError(f"{sample.where}: the model has no input {name}; {nearest(name, names)}")
    for info in inputs:
        if info.name not in sample.feed:
            raise DataError(
                f"{sample.where}: there is no array for input {info.name}; it holds {sorted(sample.feed)}, and each sample "
                f"needs all of {names}"
            )
        array = sample.feed[info.name]
        if info.dtype is not None and info.dtype != object and array.dtype != info.dtype:
            raise DataError(
                f"{sample.where}: input {info.name} is {array.dtype}, the model takes {info.dtype}; store it as {info.dtype}"
            )
        if info.shape is not None and not _fits(array.shape, info.shape):
            wanted = ", ".join("?" if d is None else str(d) for d in info.shape)
            raise DataError(
                f"{sample.where}: input {info.name} has shape {list(array.shape)}, the model takes [{wanted}]; give every "
                "sample in that shape, its batch axis included"
            )


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(w is None or s == w for s, w in zip(shape, wanted, strict=True))


Opened = tuple[Callable[[], Iterator[Sample]], int | None]


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
        return _open_named(text)
    if not text or not path.exists():
        raise DataError(f"there is no data at {text or 'an empty path'}; {HOW}")
    raise DataError(f"{text} is no kind of data that is known; {HOW}")


def _open_folder(folder: Path, inputs: Sequence[TensorInfo], images: ImageOptions) -> Opened:
    feeds = sorted(folder.glob("*.npz"))
    if feeds:
        return (lambda: (Sample(_load_npz(f), None, f.name) for f in feeds)), len(feeds)
    sets = sorted(p for p in folder.glob("test_data_set_*") if p.is_dir())
    if not sets and (folder / "input_0.pb").is_file():
        sets = [folder]
    if sets:
        return (lambda: (_load_protos(s, inputs) for s in sets)), len(sets)
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if files:
        return _open_images(folder, files, inputs, images)
    raise DataError(f"{folder} holds no .npz feeds, no test_data_set_* folders and no images; {HOW}")


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


def _stacked(arrays: dict[str, np.ndarray], where: str, inputs: Sequence[TensorInfo]) -> Opened:
    lengths = {k: len(v) for k, v in arrays.items() if v.ndim > 0}
    if not lengths or not all(lengths.values()):
        raise DataError(f"{where} is empty: its arrays hold no samples along axis 0")
    if len(set(lengths.values())) > 1:
        raise DataError(f"{where}: the arrays differ in length along axis 0, {lengths}; stack one entry a sample")
    baked = [i.shape[0] for i in inputs if i.shape]
    step = next((b for b in baked if b is not None), 1)
    total = next(iter(lengths.values())) // step
    if total == 0:
        raise DataError(f"{where}: the model takes batches of {step}, and there are fewer samples than that")

    def read() -> Iterator[Sample]:
        for k in range(total):
            part = slice(k * step, (k + 1) * step)
            feed = {name: array[part] if array.ndim else array for name, array in arrays.items()}
            yield Sample(feed, None, f"{where}[{part.start}]")

    return read, total


def _load_protos(folder: Path, inputs: Sequence[TensorInfo]) -> Sample:
    from onnx import TensorProto, numpy_helper

    feed = {}
    for k, info in enumerate(inputs):
        path = folder / f"input_{k}.pb"
        try:
            feed[info.name] = numpy_helper.to_array(TensorProto.FromString(path.read_bytes()))
        except OSError as error:
            raise DataError(f"{path}, for input {info.name}, cannot be read: {error.strerror}") from error
        except Exception as error:  # protobuf's, and whatever numpy makes of a tensor whose parts do not go together
            raise DataError(f"{path} is no serialized tensor: {error}; write it as onnx.TensorProto") from error
    return Sample(feed, None, folder.name)


def _open_images(folder: Path, files: list[Path], inputs: Sequence[TensorInfo], options: ImageOptions) -> Opened:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise DataError("reading images needs Pillow: pip install 'onnxq[images]'") from error
    if len(inputs) != 1:
        raise DataError(f"a folder of images feeds one input, and the model has {len(inputs)}; use .npz feeds")
    if options.mean is None or options.std is None:
        raise DataError(
            f"{folder} holds images, and how the model wants its pixels is not in the file: give --image-mean and "
            "--image-std (x = (pixel / 255 - mean) / std), e.g. --image-mean 0.485,0.456,0.406 --image-std 0.229,0.224,0.225"
        )
    size = options.size or _size_of(inputs[0], options.layout)
    channels = 1 if _channels(inputs[0], options.layout) == 1 else 3
    for what, numbers in (("mean", options.mean), ("std", options.std)):
        if len(numbers) not in (1, channels):
            raise DataError(
                f"--image-{what} has {len(numbers)} numbers, and the images have {channels} "
                f"channel{'s' if channels > 1 else ''}; give one number, or one for each channel"
            )
    labels = _image_labels(folder, files)

    def read() -> Iterator[Sample]:
        for file, label in zip(files, labels, strict=True):
            x = _load_image(file, size, options, inputs[0])
            yield Sample({inputs[0].name: x}, label, _within(folder, file))

    return read, len(files)


def _size_of(info: TensorInfo, layout: str) -> tuple[int, int]:
    if info.shape is not None and len(info.shape) == 4:
        height, width = info.shape[2:] if layout == "NCHW" else info.shape[1:3]
        if height is not None and width is not None:
            return height, width
    raise DataError(f"the size of input {info.name} is not in the model: give --image-size HEIGHTxWIDTH")


def _channels(info: TensorInfo, layout: str) -> int | None:
    if info.shape is None or len(info.shape) != 4:
        return None
    return info.shape[1] if layout == "NCHW" else info.shape[3]


def _within(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix()


def _image_labels(folder: Path, files: list[Path]) -> list[np.ndarray | None]:
    listing = folder / "labels.txt"
    if listing.is_file():
        known = _read_listing(listing)
        missing = next((f for f in files if _within(folder, f) not in known), None)
        if missing is not None:
            raise DataError(f"{listing} has no line for {_within(folder, missing)}; it needs 'FILE CLASS' for each image")
        return [np.array([known[_within(folder, f)]]) for f in files]
    classes = sorted({f.parent.name for f in files if f.parent != folder})
    if len(classes) < 2:
        return [None] * len(files)
    loose = next((f for f in files if f.parent == folder), None)
    if loose is not None:
        raise DataError(
            f"{loose} lies beside the folders of classes {', '.join(classes[:3])}...; move it into one of them, "
            "or list every image in labels.txt"
        )
    return [np.array([classes.index(f.parent.name)]) for f in files]


def _read_listing(listing: Path) -> dict[str, int]:
    """Lines `FILE CLASS`; a file's name may hold spaces."""
    found = {}
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{listing} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, kind = line.strip().rpartition(" ")
        try:
            found[name.strip()] = int(kind)
        except ValueError as error:
            raise DataError(
                f"{listing}, line {number}: {line.strip()!r} is not 'FILE CLASS' with the class as a number"
            ) from error
    return found


def _load_image(file: Path, size: tuple[int, int], options: ImageOptions, info: TensorInfo) -> np.ndarray:
    from PIL import Image

    channels = _channels(info, options.layout)
    try:
        with Image.open(file) as image:
            pixels = np.asarray(
                image.convert("L" if channels == 1 else "RGB").resize((size[1], size[0]), Image.Resampling.BILINEAR),
                np.float32,
            )
    except Exception as error:  # OSError, and SyntaxError, ValueError, struct.error and more at damaged files
        raise DataError(f"{file} is no readable image: {error}; mend it or leave it out") from error
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    pixels = pixels[..., ::-1] if options.order == "BGR" else pixels
    assert options.mean is not None
    assert options.std is not None
    x = (pixels * np.float32(options.scale) - np.array(options.mean, np.float32)) / np.array(options.std, np.float32)
    x = x.transpose(2, 0, 1) if options.layout == "NCHW" else x
    return np.ascontiguousarray(x[None], info.dtype or np.float32)


def load_function(text: str) -> Callable[..., Any]:
    """The function that `module:function` names. What it raises comes out as a DataError that names its line."""
    function = _named(text)
    if not callable(function):
        raise DataError(f"{text} is a {type(function).__name__}; it takes a function")

    def call(*arguments: Any, **options: Any) -> Any:
        with _blamed(text):
            return function(*arguments, **options)

    return call


def _open_named(text: str) -> Opened:
    with _blamed(text):
        read, length = _open_object(_named(text))

    def guarded() -> Iterator[Sample]:
        with _blamed(text):
            yield from read()

    return guarded, length


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


def _open_object(source: Any) -> Opened:
    if hasattr(source, "get_next") and not isinstance(source, type):
        return _spooled(iter(source.get_next, None))
    if callable(source):  # called anew for each reading
        return (lambda: (_as_sample(item, k) for k, item in enumerate(_iterable(source())))), None
    if isinstance(source, Iterator):
        return _spooled(source)
    return _reiterable(source)


def _iterable(source: Any) -> Iterable[Any]:
    if hasattr(source, "get_next"):
        return iter(source.get_next, None)
    if not isinstance(source, Iterable):
        raise DataError(f"data of type {type(source).__name__} is not an iterable of feeds; {HOW}")
    return source


def _reiterable(source: Any) -> Opened:
    feeds = _iterable(source)
    try:
        length = len(source)
    except (TypeError, NotImplementedError):  # has no length, or says so only when asked
        length = None
    return (lambda: (_as_sample(item, k) for k, item in enumerate(feeds))), length


def _as_sample(item: Any, k: int) -> Sample:
    where = f"sample {k}"
    if isinstance(item, Sample):
        return item
    feed, label = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
    if not isinstance(feed, dict):
        raise DataError(f"{where} is a {type(feed).__name__}; a feed is a dict of one array for each input name")
    arrays = {str(name): _as_array(array, f"input {name}", where) for name, array in feed.items()}
    return Sample(arrays, None if label is None else _as_array(label, "the label", where), where)


def _as_array(given: Any, what: str, where: str) -> np.ndarray:
    try:
        return np.asarray(given)
    except Exception as error:  # numpy's, or that of the type that is asked to become an array
        raise DataError(f"{where}: {what} is a {type(given).__name__} that makes no array: {error}") from error


def _spooled(source: Iterator[Any]) -> Opened:
    """A source that can be read once, kept on disk as it is read."""
    folder = Path(tempfile.mkdtemp(prefix="onnxq-"))
    kept: list[tuple[Path, str]] = []

    def read() -> Iterator[Sample]:
        k = 0
        while True:
            if k == len(kept):
                item = next(source, None)
                if item is None:
                    return
                sample = _as_sample(item, k)
                path = folder / f"{k}.npz"
                arrays: dict[str, Any] = {f"0{name}": _plain(array) for name, array in sample.feed.items()}
                if sample.label is not None:
                    arrays["1"] = _plain(sample.label)
                np.savez(path, **arrays)
                kept.append((path, sample.where))
            path, where = kept[k]
            with np.load(path) as stored:
                feed = {name[1:]: stored[name] for name in stored.files if name[0] == "0"}
                label = stored["1"] if "1" in stored.files else None
            yield Sample(feed, label, where)
            k += 1

    weakref.finalize(read, shutil.rmtree, folder, ignore_errors=True)
    return read, None


def _plain(array: np.ndarray) -> np.ndarray:
    """The array without Python objects, which are kept by pickle alone: strings as numpy's own."""
    return array.astype(str) if array.dtype == object else array
