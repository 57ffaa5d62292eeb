"""Whether two graphs compute the same, told by running both; and dumps of the graph between passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import cores
from onnxq.errors import ModelError, OutputError
from onnxq.feeds import Feed
from onnxq.files import write_whole
from onnxq.model import Model
from onnxq.runtime import UNPACKED, Session, exposed
from onnxq.text import to_text

FLOAT_TOLERANCE = 1e-5  # of the largest magnitude of each float output
INNER_TOLERANCE = 1e-3  # the same for tensors inside, where rounding of deep layers has not yet averaged out
INTEGER_AGREEMENT = 0.999
NOISE = 4.0  # times what the last bit of the inputs changes in a tensor: other rounding than before, in some layers


def prover(
    probes: Sequence[Feed], threads: int, make_room: Callable[[], None] = lambda: None
) -> Callable[[Model, Model], str | None]:
    """Compares two models on the probe feeds in every tensor that has the same name in both, outputs first.

    A name is a promise of a value: a rewrite that changes what a tensor holds gives it another name. `prove(m, m)` runs m
    twice, which tells whether it is deterministic at all. Deep networks can make much of little: what differs by more than
    the tolerance is still equal where the last bit of the inputs alone makes a difference of that order. `make_room` is
    called before that, which takes memory. With `threads` 0 the cores are divided among the probes.
    """

    def prove(before: Model, after: Model) -> str | None:
        public, inside = [t.name for t in before.graph.outputs], set(_computed(after))
        names = dict.fromkeys([*public, *(n for n in _computed(before) if n in inside)])
        tolerance_of = lambda name: FLOAT_TOLERANCE if name in public else INNER_TOLERANCE  # noqa: E731
        each = threads or max(1, cores.usable() // max(1, len(probes)))  # more than that would wait for one another
        make_room()
        try:
            session = _exposing(before, names, each)
            wanted = _results(session, probes)
            if after is not before:
                del session  # one at a time, for the weights not to be there twice
                session = _exposing(after, names, each)
            for probe, expected, got in zip(probes, wanted, _results(session, probes), strict=True):
                differ = [n for n in names if compare(expected[n], got[n], tolerance_of(n)) is not None]
                noise = _exposing(before, differ, each).run(nudged(probe)) if differ else {}
                for name in differ:
                    slack = _slack(expected[name], noise[name])
                    difference = compare(expected[name], got[name], tolerance_of(name), slack)
                    if difference is not None:
                        return f"tensor {name} {difference}"
        except ModelError as error:
            return str(error)
        return None

    return prove


def _computed(model: Model) -> list[str]:
    return [t.name for node in model.graph.nodes for t in node.outputs if t.name]


def _exposing(model: Model, names: Iterable[str], threads: int) -> Session:
    return Session(exposed(model.graph.to_stored_proto(), names), threads=threads, config=UNPACKED)


def _results(session: Session, probes: Sequence[Feed]) -> list[dict[str, Any]]:
    """What a session makes of each probe; they run at the same time, each on the threads of the session."""
    with ThreadPoolExecutor(max(1, len(probes))) as pool:
        return list(pool.map(session.run, probes))


def nudged(feed: Feed) -> Feed:
    """The feed with every float off by its last bit, up or down by chance."""
    rng = np.random.default_rng(0)

    def other(array: np.ndarray) -> np.ndarray:
        if array.dtype.kind != "f":
            return array
        return np.asarray(np.nextafter(array, rng.choice([-np.inf, np.inf], array.shape).astype(array.dtype)))

    return {name: [other(a) for a in v] if isinstance(v, list) else other(v) for name, v in feed.items()}


def _slack(expected: Any, noise: Any) -> float:
    """What two results may differ by where the inputs' last bit makes this of the expected one."""
    if not isinstance(expected, np.ndarray) or expected.dtype.kind != "f" or expected.shape != noise.shape:
        return 0.0
    a, b = expected.astype(np.float64), noise.astype(np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    change, largest = np.abs(a - b)[finite].max(initial=0.0), np.abs(a)[finite].max(initial=0.0)
    return min(NOISE * float(change), INNER_TOLERANCE * float(largest))


def compare(expected: Any, got: Any, tolerance: float = FLOAT_TOLERANCE, slack: float = 0.0) -> str | None:
    """None where two outputs are equal for our purposes, else how they differ.

    Floats are where none differs by more than `tolerance` of the largest magnitude, or by more than `slack`.
    """
    if not isinstance(expected, np.ndarray) or not isinstance(got, np.ndarray):
        return None
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return f"was {expected.dtype}{list(expected.shape)} and is {got.dtype}{list(got.shape)}"
    if expected.size == 0:
        return None
    if expected.dtype.kind == "f":
        difference, largest = _difference(expected, got)
        if np.isfinite(difference) and np.isfinite(largest):
            return _told(difference, largest, max(tolerance * largest, slack))
        finite = np.isfinite(expected)
        if not np.array_equal(expected[~finite], got[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
            return "is not finite in the same places"
        difference, largest = _difference(expected[finite], got[finite])
        return _told(difference, largest, max(tolerance * largest, slack))
    equal = float((expected == got).mean())
    return None if equal >= INTEGER_AGREEMENT else f"agrees in {equal:.1%} of its elements"


def _difference(expected: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    """The largest difference and the largest magnitude that was expected; not finite where an element is not."""
    if not expected.size:
        return 0.0, 0.0
    wide = np.promote_types(expected.dtype, np.float32)
    a, b = expected.astype(wide, copy=False), got.astype(wide, copy=False)
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.abs(a - b).max()), float(max(a.max(), -a.min()))


def _told(difference: float, largest: float, allowed: float) -> str | None:
    if difference <= allowed:
        return None
    return f"differs by {difference:.3g}, and its largest element is {largest:.3g}"


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
