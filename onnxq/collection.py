"""Collection: run samples through a model and sketch every observed tensor, in this process or on an Executor.

A few threads take samples by turns; each runs the model and sketches what it makes on the way. Work that an Executor takes
is cut into shards of consecutive samples. What a thread or a shard collects is a small Calibration, and parts add up
exactly, so the result is the same bit for bit wherever and in whatever order they were made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import onnx

from onnxq import machine, memory, runtime
from onnxq.calibration import Calibration
from onnxq.collecting import Collecting
from onnxq.collector import Axes, Job, computed, watched
from onnxq.data import Sample
from onnxq.equalization import Scaled
from onnxq.errors import CalibrationError
from onnxq.grouping import grouped
from onnxq.keeper import Changed, Indexed, Keeper
from onnxq.lanes import FEW_LANES, lanes_here, run_here
from onnxq.shards import run_on
from onnxq.store import hash_of_model


def collect(
    proto: onnx.ModelProto,
    axes: Axes,
    samples: Iterable[Sample],
    how: Collecting | None = None,
    *,
    numbers: Iterable[int] | None = None,
    total: int | None = None,
    scaled: Mapping[str, Scaled] | None = None,
    among: Iterable[str] = (),
) -> Calibration:
    """Sketches of the tensors over the samples; those that `scaled` tells of are no tensors of the model.

    `numbers` are those of the samples in the data, where they are not all of it, in its order; `total` is how many it has.
    `among` are all tensors of it that are sketched at one time or another: so the runtime optimizes it the same each time.
    Raises CalibrationError, with tensor and sample, at the first NaN or infinity, unless `how` says otherwise. An error or
    an interrupt carries what was collected until then as its attribute `partial`.
    """
    how = how or Collecting()
    lanes, threads = 1, how.threads
    if how.executor is None:
        lanes, threads = lanes_here(how.threads, total)
    how, scaled = replace(how, threads=threads), scaled or {}
    together = computed(dict.fromkeys([*among, *axes]), scaled)
    groups: Sequence[Axes] = [axes]
    holds = False
    if how.memory_limit is not None and watched(proto, axes, scaled, together, threads, how.graphs) is None:
        holds, lanes = True, min(lanes, FEW_LANES)
        groups = grouped(proto, axes, scaled, next(iter(samples)), how.memory_limit // lanes)
        how = how if len(groups) == 1 else replace(how, begun=None)
    left_out = dict(how.left_out)
    memory.give_back()  # of the sessions before
    while True:
        found, again = Calibration(source_hash=how.source_hash), False
        for k, group in enumerate(groups):
            try:
                items = enumerate(samples) if numbers is None else zip(numbers, samples, strict=True)
                part = _read(proto, group, together, scaled, items, how, total, left_out, lanes, holds=holds)
            except Changed:
                how, again = replace(how, begun=None), True
                break
            except BaseException as stop:
                if len(groups) > 1:
                    stop.partial = None  # type: ignore[attr-defined]  # it lacks tensors of other groups
                raise
            again = k > 0 and not part.skipped.keys() <= left_out.keys()  # the groups before it counted that sample
            left_out.update(part.skipped)
            if again:
                break
            found.absorb(part)
        if not again:
            break
    if not found.feeds:
        raise CalibrationError(
            f"every sample was left out, the first for {left_out[min(left_out)]}; check the data and its preprocessing"
        )
    if found.skipped:
        found.notes.append(f"{len(found.skipped)} samples were left out, the first for {found.skipped[min(found.skipped)]}")
    found.versions = {k: v for k, v in machine.facts().items() if k in ("onnxruntime", "features")}
    return found


def _read(
    proto: onnx.ModelProto,
    axes: Axes,
    together: Iterable[str],
    scaled: Mapping[str, Scaled],
    items: Iterable[Indexed],
    how: Collecting,
    total: int | None,
    left_out: dict[int, str],
    lanes: int,
    *,
    holds: bool,
) -> Calibration:
    """Read the samples once for these tensors, on from where a checkpoint ends."""
    digest = ""
    if how.checkpoint is not None or how.executor is not None:  # others tell by it whether they know the job
        what = f"{dict(axes)} {list(together)} {dict(scaled)} {sorted(left_out)} {how.threads} {how.on_nonfinite}"
        digest = hashlib.sha256(f"{hash_of_model(proto)} {what}".encode()).hexdigest()[:16]
    public, libraries = tuple(o.name for o in proto.graph.output), tuple(runtime.custom_op_libraries)
    apart = {name: scaled[name] for name in axes if name in scaled}
    job = Job(digest, dict(axes), tuple(together), public, how.threads, how.on_nonfinite, libraries, apart, holds)
    keeper = Keeper(job, how, total, left_out)
    todo = keeper.unread((k, sample) for k, sample in items if k not in left_out)
    try:
        keeper.show()
        if how.executor is None:
            run_here(job, proto, todo, keeper, lanes, how.graphs)
        else:
            run_on(how.executor, job, proto, todo, keeper)
    except BaseException as stop:
        keeper.save()
        stop.partial = keeper.found  # type: ignore[attr-defined]
        raise
    keeper.save()  # so that what comes after can be gone on with as well
    return keeper.found
