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
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.errors import DataError, nearest
from onnxq.runtime import TensorInfo

LABEL_NAMES = ("label", "labels")
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


class Samples:
    """A sequence of samples that can be read any number of times; each is checked against the model's inputs."""

    def __init__(
        self, read: Callable[[], Iterator[Sample]], inputs: Sequence[TensorInfo], length: int | None, limit: int | None
    ) -> None:
        self._read, self._inputs, self._limit = read, inputs, limit
        self.length = length if limit is None else limit if length is None else min(length, limit)

    def __iter__(self) -> Iterator[Sample]:
        empty = True
        for sample in islice(self._read(), self._limit):
            empty = False
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
        return Samples(source._read, inputs, source.length, limit)
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
            raise DataError(f"{sample.where}: there is no array for input {info.name}; it holds {sorted(sample.feed)}")
        array = sample.feed[info.name]
        if info.dtype is not None and info.dtype != object and array.dtype != info.dtype:
            raise DataError(
                f"{sample.where}: input {info.name} is {array.dtype}, the model takes {info.dtype}; store it as {info.dtype}"
            )
        if info.shape is not None and not _fits(array.shape, info.shape):
            wanted = ", ".join("?" if d is None else str(d) for d in info.shape)
            raise DataError(f"{sample.where}: input {info.name} has shape {list(array.shape)}, the model takes [{wanted}]")


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(w is None or s == w for s, w in zip(shape, wanted, strict=True))


Opened = tuple[Callable[[], Iterator[Sample]], int | None]


def _open_path(text: str, inputs: Sequence[TensorInfo], images: ImageOptions) -> Opened:
    path = Path(text)
    if path.is_dir():
        return _open_folder(path, inputs, images)
    if path.suffix == ".npz" and path.is_file():
        return _stacked(_load_npz(path), path.name, inputs)
    if path.suffix == ".npy" and path.is_file():
        if len(inputs) != 1:
            raise DataError(f"{path} holds one array, and the model has {len(inputs)} inputs; use an .npz with their names")
        try:
            return _stacked({inputs[0].name: np.load(path)}, path.name, inputs)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} is no readable .npy file: {error}") from error
    module, colon, function = text.rpartition(":")
    if colon and module.replace(".", "").isidentifier() and function.isidentifier():
        return _open_object(load_function(text))
    if not path.exists():
        raise DataError(f"there is no data at {text}; {HOW}")
    raise DataError(f"{text} is no kind of data that is known; {HOW}")


def _open_folder(folder: Path, inputs: Sequence[TensorInfo], images: ImageOptions) -> Opened:
    feeds = sorted(folder.glob("*.npz"))
    if feeds:
        return (lambda: (_labelled(_load_npz(f), f.name, inputs) for f in feeds)), len(feeds)
    sets = sorted(p for p in folder.glob("test_data_set_*") if p.is_dir())
    if not sets and (folder / "input_0.pb").is_file():
        sets = [folder]
    if sets:
        return (lambda: (_load_protos(s, inputs) for s in sets)), len(sets)
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if files:
        return _open_images(folder, files, inputs, images)
    raise DataError(f"{folder} is empty: it holds no .npz feeds, no test_data_set_* folders and no images; {HOW}")


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {k: arrays[k] for k in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no readable .npz file: {error}") from error


def _labelled(arrays: dict[str, np.ndarray], where: str, inputs: Sequence[TensorInfo]) -> Sample:
    names = {i.name for i in inputs}
    label = next((arrays[k] for k in LABEL_NAMES if k in arrays and k not in names), None)
    return Sample({k: v for k, v in arrays.items() if k in names or k not in LABEL_NAMES}, label, where)


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
            yield _labelled(feed, f"{where}[{part.start}]", inputs)

    return read, total


def _load_protos(folder: Path, inputs: Sequence[TensorInfo]) -> Sample:
    import onnx
    from google.protobuf.message import DecodeError

    feed = {}
    for k, info in enumerate(inputs):
        path = folder / f"input_{k}.pb"
        try:
            feed[info.name] = onnx.numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))
        except OSError as error:
            raise DataError(f"{folder.name}: {path.name}, for input {info.name}, cannot be read: {error}") from error
        except (DecodeError, ValueError, TypeError) as error:
            raise DataError(f"{folder.name}: {path.name} is no serialized tensor: {error}") from error
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
    labels = _image_labels(folder, files)

    def read() -> Iterator[Sample]:
        for file, label in zip(files, labels, strict=True):
            x = _load_image(file, size, options, inputs[0])
            yield Sample({inputs[0].name: x}, label, str(file.relative_to(folder)))

    return read, len(files)


def _size_of(info: TensorInfo, layout: str) -> tuple[int, int]:
    if info.shape is not None and len(info.shape) == 4:
        height, width = info.shape[2:] if layout == "NCHW" else info.shape[1:3]
        if height is not None and width is not None:
            return height, width
    raise DataError(f"the size of input {info.name} is not in the model: give --image-size HEIGHTxWIDTH")


def _image_labels(folder: Path, files: list[Path]) -> list[np.ndarray | None]:
    listing = folder / "labels.txt"
    if listing.is_file():
        pairs = dict(line.split() for line in listing.read_text().splitlines() if line.strip())
        try:
            return [np.array([int(pairs[str(f.relative_to(folder))])]) for f in files]
        except KeyError as error:
            raise DataError(f"{listing} has no line for {error.args[0]}; it needs 'FILE CLASS' for each image") from error
    classes = sorted({f.parent.name for f in files if f.parent != folder})
    if len(classes) < 2:
        return [None] * len(files)
    return [np.array([classes.index(f.parent.name)]) for f in files]


def _load_image(file: Path, size: tuple[int, int], options: ImageOptions, info: TensorInfo) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    channels = None
    if info.shape is not None and len(info.shape) == 4:
        channels = info.shape[1] if options.layout == "NCHW" else info.shape[3]
    try:
        with Image.open(file) as image:
            pixels = np.asarray(
                image.convert("L" if channels == 1 else "RGB").resize(size[::-1], Image.Resampling.BILINEAR), np.float32
            )
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{file} is no readable image: {error}") from error
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    pixels = pixels[..., ::-1] if options.order == "BGR" else pixels
    assert options.mean is not None
    assert options.std is not None
    x = (pixels * np.float32(options.scale) - np.float32(options.mean)) / np.float32(options.std)
    x = x.transpose(2, 0, 1) if options.layout == "NCHW" else x
    return np.ascontiguousarray(x[None], info.dtype or np.float32)


def load_function(text: str) -> Any:
    """The object that `module:function` names, looked up with the current folder on the path."""
    module, _, function = text.rpartition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise DataError(f"{text}: module {module} cannot be imported: {error}") from error
    except AttributeError as error:
        raise DataError(f"{text}: module {module} has no {function}") from error


def _open_object(source: Any) -> Opened:
    if hasattr(source, "get_next"):
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
    length = len(source) if hasattr(source, "__len__") else None
    return (lambda: (_as_sample(item, k) for k, item in enumerate(feeds))), length


def _as_sample(item: Any, k: int) -> Sample:
    where = f"sample {k}"
    if isinstance(item, Sample):
        return item
    feed, label = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
    if not isinstance(feed, dict):
        raise DataError(f"{where} is a {type(feed).__name__}; a feed is a dict of one array for each input name")
    arrays = {str(name): np.asarray(array) for name, array in feed.items()}
    return Sample(arrays, None if label is None else np.asarray(label), where)


def _spooled(source: Iterator[Any]) -> Opened:
    """A source that can be read once, kept on disk as it is read."""
    folder = tempfile.TemporaryDirectory(prefix="onnxq-")
    kept: list[tuple[Path, str]] = []

    def read() -> Iterator[Sample]:
        k = 0
        while True:
            if k == len(kept):
                item = next(source, None)
                if item is None:
                    return
                sample = _as_sample(item, k)
                path = Path(folder.name) / f"{k}.npz"
                label = {} if sample.label is None else {"1": sample.label}
                np.savez(path, **{f"0{name}": array for name, array in sample.feed.items()}, **label)
                kept.append((path, sample.where))
            path, where = kept[k]
            with np.load(path) as arrays:
                feed = {name[1:]: arrays[name] for name in arrays.files if name[0] == "0"}
                yield Sample(feed, arrays["1"] if "1" in arrays.files else None, where)
            k += 1

    return read, None
