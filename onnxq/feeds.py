"""Feeds: what a model is given by the names of its inputs, an array, or a list of arrays where it takes a sequence.

An Optional input that is given nothing is not in the feed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import xxhash

Value = Any  # np.ndarray | list[np.ndarray]; as the type of each, it would have to be told apart wherever one is at hand
Feed = dict[str, Value]


def arrays_of(feed: Mapping[str, Value]) -> Iterator[np.ndarray]:
    """Every array in it, those in lists too."""
    for value in feed.values():
        yield from value if isinstance(value, list) else [value]


def size_of(feed: Mapping[str, Value]) -> int:
    """Its bytes."""
    return sum(array.nbytes for array in arrays_of(feed))


def flat(feed: Mapping[str, Value]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The feed as arrays alone, those of a list as name[0], name[1] ..., and the lengths of its lists by name."""
    lists = {name: value for name, value in feed.items() if isinstance(value, list)}
    arrays = {name: value for name, value in feed.items() if not isinstance(value, list)}
    arrays |= {f"{name}[{k}]": array for name, value in lists.items() for k, array in enumerate(value)}
    return arrays, {name: len(value) for name, value in lists.items()}


def whole(arrays: Mapping[str, np.ndarray], lengths: Mapping[str, int]) -> Feed:
    """What `flat` was given. Raises KeyError where an array of a list is missing."""
    parts = {name: [f"{name}[{k}]" for k in range(length)] for name, length in lengths.items()}
    inside = {key for keys in parts.values() for key in keys}
    feed: Feed = {name: array for name, array in arrays.items() if name not in inside}
    return feed | {name: [arrays[key] for key in keys] for name, keys in parts.items()}


def without_objects(array: np.ndarray) -> np.ndarray:
    """The array without Python objects, which only pickle keeps: strings as numpy's own."""
    return array.astype(str) if array.dtype.kind in "OT" else array


def hash_of_feed(feed: Mapping[str, Value]) -> str:
    """128 bits as 32 hex digits by which equal feeds are known, and which draw as well as chance does (XXH3).

    It is no seal: who wants two feeds of one hash can make them. A cryptographic hash takes 20 to 40 times as long, a tenth
    of the inference of a small network.
    """
    arrays, lengths = flat(feed)
    digest = xxhash.xxh3_128(json.dumps(lengths, sort_keys=True).encode() if lengths else b"")
    for name in sorted(arrays):
        array = np.ascontiguousarray(without_objects(arrays[name]))  # strings by what they say
        digest.update(f"{name}:{array.dtype}:{array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
