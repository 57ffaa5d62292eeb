"""Whether two graphs compute the same, told by running both; and dumps of the graph between passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.errors import ModelError, OutputError
from onnxq.files import write_whole
from onnxq.model import Model
from onnxq.runtime import Session
from onnxq.text import to_text

FLOAT_TOLERANCE = 1e-5  # of the largest magnitude of each float output
INTEGER_AGREEMENT = 0.999


def prover(probes: Sequence[Mapping[str, np.ndarray]], threads: int) -> Callable[[Model, Model], str | None]:
    """Compares the outputs of two models on the probe feeds; a model that differs from itself proves nothing."""
    known: dict[int, list[dict[str, np.ndarray]]] = {}

    def prove(before: Model, after: Model) -> str | None:
        if id(before) not in known:
            session = Session(before.graph.to_proto(), threads=threads)
            known[id(before)] = [session.run(feed) for feed in probes]
        try:
            session = Session(after.graph.to_proto(), threads=threads)
            results = [session.run(feed) for feed in probes]
        except ModelError as error:
            return str(error)
        for expected, got in zip(known[id(before)], results, strict=True):
            for name, array in expected.items():
                difference = compare(array, got[name])
                if difference is not None:
                    return f"output {name} {difference}"
        return None

    return prove


def compare(expected: Any, got: Any) -> str | None:
    """None where two outputs are equal for our purposes, else how they differ."""
    if not isinstance(expected, np.ndarray) or not isinstance(got, np.ndarray):
        return None
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return f"was {expected.dtype}{list(expected.shape)} and is {got.dtype}{list(got.shape)}"
    if expected.size == 0:
        return None
    if expected.dtype.kind == "f":
        bad = np.isfinite(expected) != np.isfinite(got)
        finite = np.isfinite(expected) & np.isfinite(got)
        if bad.any():
            return "is not finite in the same places"
        a, b = expected[finite].astype(np.float64), got[finite].astype(np.float64)
        difference, largest = np.abs(a - b).max(initial=0.0), np.abs(a).max(initial=0.0)
        return (
            None
            if difference <= FLOAT_TOLERANCE * largest
            else f"differs by {difference:.3g}, and its largest element is {largest:.3g}"
        )
    equal = float((expected == got).mean())
    return None if equal >= INTEGER_AGREEMENT else f"agrees in {equal:.1%} of its elements"


def dumper(folder: str | Path | None) -> Callable[[str, Model], None] | None:
    """Writes text and ONNX after every pass that changed something."""
    if folder is None:
        return None
    root = Path(folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the dump folder {root} cannot be made: {error.strerror}; give another name") from error
    count = 0

    def dump(name: str, model: Model) -> None:
        nonlocal count
        (root / f"{count:03d}-{name}.txt").write_text(to_text(model), encoding="utf-8")
        write_whole(root / f"{count:03d}-{name}.onnx", model.graph.to_proto().SerializeToString())
        count += 1

    return dump
