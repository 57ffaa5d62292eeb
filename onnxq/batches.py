"""Samples stacked along axis 0 into batches of given sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from onnxq.data import Sample
from onnxq.errors import DataError
from onnxq.runtime import TensorInfo


def check_batches(inputs: Iterable[TensorInfo], sizes: Sequence[int]) -> None:
    """Raise DataError where an input does not take a batch of one of these sizes along its axis 0."""
    for info in inputs if sizes else ():
        if info.dtype is None or info.is_sequence or info.shape == ():
            raise DataError(f"input {info.name} has no axis for a batch; leave --batch out")
        if info.shape is None or info.shape[0] is None:
            continue
        fixed = info.shape[0]
        refused = next((size for size in sizes if size != fixed), None)
        if refused is not None:
            raise DataError(
                f"input {info.name} has a fixed batch of {fixed}, and --batch is {refused}; "
                "export the model with a free first dimension, or leave --batch out"
            )


def batches(
    samples: Iterable[Sample], inputs: Sequence[TensorInfo], sizes: Sequence[int]
) -> dict[int, dict[str, np.ndarray]]:
    """A feed for each size: the first samples stacked along axis 0 of every input, over and over where they are too few.

    Samples from the first one on that has another shape are left out. Raises DataError where the inputs of a sample differ
    in their lengths along axis 0, so that they cannot all have the batch there.
    """
    stacked = _first_rows(samples, [i.name for i in inputs], max(sizes))
    return {size: {name: array[np.arange(size) % len(array)] for name, array in stacked.items()} for size in sizes}


def _first_rows(samples: Iterable[Sample], names: Sequence[str], wanted: int) -> dict[str, np.ndarray]:
    parts: list[dict[str, np.ndarray]] = []
    rows = 0
    for sample in samples:
        feed = {name: sample.feed[name] for name in names if name in sample.feed}
        if parts and _shapes(feed) != _shapes(parts[0]):
            break
        rows += _length(feed, sample.where)
        parts.append(feed)
        if rows >= wanted:
            break
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _shapes(feed: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """What rows must share to be stacked."""
    return {name: array.shape[1:] for name, array in feed.items()}


def _length(feed: Mapping[str, np.ndarray], where: str) -> int:
    lengths = {name: array.shape[0] if array.ndim else 0 for name, array in feed.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"{where} cannot be stacked to batches: lengths along axis 0 are {said}; leave --batch out")
    return next(iter(lengths.values()))
