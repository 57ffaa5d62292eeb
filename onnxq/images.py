"""Folders of images as samples: preprocessing, and labels from subfolders or labels.txt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxq.errors import DataError, RecipeError, nearest
from onnxq.runtime import TensorInfo

LAYOUTS, ORDERS = ("NCHW", "NHWC"), ("RGB", "BGR")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})
LabelledImage = tuple[np.ndarray, np.ndarray | None, str]


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


def open_images(
    folder: Path, files: Sequence[Path], inputs: Sequence[TensorInfo], options: ImageOptions
) -> Callable[[], Iterator[LabelledImage]]:
    """A reader of (input array, class or None, file name), each image loaded when it is reached. Raises DataError."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise DataError("reading images needs Pillow: pip install 'onnxq[images]'") from error
    if len(inputs) != 1 or inputs[0].is_sequence:
        what = f"{inputs[0].name} takes a sequence" if len(inputs) == 1 else f"the model has {len(inputs)}"
        raise DataError(f"a folder of images feeds one input, and {what}; use .npz feeds")
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

    def read() -> Iterator[LabelledImage]:
        for file, label in zip(files, labels, strict=True):
            x = _load_image(file, size, options, inputs[0])
            yield x, label, _within(folder, file)

    return read


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


def _image_labels(folder: Path, files: Sequence[Path]) -> list[np.ndarray | None]:
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
