"""Preparation: a model loaded, taken back to floats and rewritten, with samples that fit it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx

from onnxq import native, proof, runtime
from onnxq import passes as p
from onnxq.calibration import Calibration
from onnxq.collecting import Collecting
from onnxq.cones import cones_of
from onnxq.data import Samples, fed_back, open_samples
from onnxq.errors import CalibrationError, DataError, ModelError, RecipeError, nearest
from onnxq.feeds import Feed, hash_of_feed
from onnxq.graph import Constant, Graph
from onnxq.images import ImageOptions
from onnxq.model import Model, verify
from onnxq.numerics import QuantParams
from onnxq.passmanager import Pass, PassManager, PassRecord
from onnxq.recipe import Recipe
from onnxq.runtime import Session, TensorInfo
from onnxq.source import Source
from onnxq.stages import FLOAT, RECOVER
from onnxq.store import hash_of_model, size_of
from onnxq.target import load as load_target

Progress = Callable[[str, int, int | None], None]
P = TypeVar("P", bound=Pass)


@dataclass
class Prepared:
    """A model after the float stages, with all that the rest of the run needs."""

    source: Source
    source_hash: str
    model: Model
    manager: PassManager
    records: list[PassRecord]
    inputs: list[TensorInfo]
    provider: str
    float_bytes: int
    session: Session | None  # of the model as it was loaded, where states are fed back
    ranges: dict[str, QuantParams] = field(default_factory=dict)  # of activations, by scope and name, see ranges.py
    unplaced: frozenset[str] = frozenset()  # what the audit found in float
    note: str = ""  # on how the placement was chosen
    notes: list[str] = field(default_factory=list)  # on bodies
    dump_dir: Path | None = None


def prepare(
    source: Source,
    data: Any,
    recipe: Recipe,
    *,
    calibration: str | Path | Calibration | None = None,
    max_samples: int | None = None,
    images: ImageOptions | None = None,
    threads: int = 0,
    provider: str | None = None,
    dump_dir: str | Path | None = None,
    collecting: Collecting | None = None,
    feedback: Mapping[str, str] | None = None,
    recalibrate: bool = False,
    scope: str = "",
    progress: Progress | None = None,
) -> Prepared:
    chosen = load_target(recipe.target).of_bits(recipe.weight_bits, recipe.activation_bits)
    device = chosen.provider if runtime.has_provider(chosen.provider) else runtime.CPU
    if provider is not None:
        device = runtime.check_provider(provider)
    if data is None and calibration is None and recipe.mode == "static":
        raise DataError(
            "there is no calibration data: activations need samples to choose their ranges; give --data FOLDER, or "
            "--mode dynamic"
        )
    collected = Calibration.load(Path(calibration)) if isinstance(calibration, (str, Path)) else calibration
    collected = None if collected is None else collected.copy()
    native.make_ready(progress)
    graph = Graph.from_proto(source.proto, source.folder, source.store)
    given = graph.to_stored_proto()
    size = size_of(given)
    model = Model(graph, chosen, calibration=collected, threads=threads, progress=progress, scope=scope)
    probes: list[dict[str, np.ndarray]] = []
    how = collecting or Collecting()
    prove = proof.prover(probes, threads, make_room=how.graphs.end_session)
    manager = PassManager(verify, prove, proof.dumper(dump_dir))
    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(hash_of_model, given)
        recovered = manager.run(model, passes_of(RECOVER, recipe))  # first: onnxruntime cannot load all that comes
        if recalibrate:
            tensors = graph.tensors()
            model.trained = {n: q for n, q in model.trained.items() if isinstance(tensors.get(n), Constant)}
        original = graph.to_stored_proto()
        is_run = bool(feedback) or recipe.mode == "dynamic"
        session = Session(original, threads=threads) if is_run else _loaded(original, threads)
        digest = hashing.result()
    if collected is not None and collected.source_hash != digest:
        file = f" {calibration}" if isinstance(calibration, (str, Path)) else ""
        raise CalibrationError(
            f"the calibration{file} was made from another model than "
            f"{source.name} (their contents differ); run onnxq calibrate on this one"
        )
    if collected is not None and not collected.probes:
        raise CalibrationError("the calibration holds no probe feeds; collect it again with onnxq calibrate")
    model.collecting = replace(how, threads=threads, progress=progress, source_hash=digest)
    inputs = runtime.as_declared(session.inputs, original)
    samples = None if data is None else open_samples(data, inputs, images=images, limit=max_samples)
    if samples is not None and feedback:
        samples = fed_back(samples, session, feedback, inputs)
    stream = session if feedback else None
    if recipe.mode == "dynamic":
        model.calibration = _for_probes(samples, session, inputs)
    del session  # its copy of the weights would stay through the float passes
    model.samples = samples
    probes += _probes(samples, model.calibration)
    model, records = manager.run_exact(model, passes_of(FLOAT, recipe))
    records = recovered + records
    if recipe.mode == "static":
        model.floats = model.graph.to_stored_proto()
        model.cones = cones_of(model.floats)
        if collected is not None:
            collected.hold_for(model.cones)
    model.reference = model.graph.copy()
    model.excluded = _excluded(model.graph, recipe.exclude, is_body=bool(scope))
    dumps = None if dump_dir is None else Path(dump_dir)
    return Prepared(source, digest, model, manager, records, inputs, device, size, stream, dump_dir=dumps)


def _loaded(model: onnx.ModelProto, threads: int) -> Session:
    """A session that tells of the inputs of a model. Raises ModelError where onnxruntime cannot load it."""
    try:
        return Session(model, threads=threads, config=runtime.UNPACKED, optimize=False)
    except ModelError:  # it may lack a kernel for what it would optimize away
        return Session(model, threads=threads)


def passes_of(kinds: Sequence[type[P]], recipe: Recipe) -> list[P]:
    """The passes with the recipe's options; those that it leaves out are left out."""
    made: list[P] = []
    for kind in kinds:
        options = recipe.options(kind.name)
        if options is None:
            continue
        if kind is p.ChooseRanges:
            overrides = tuple((o.match, o.observer) for o in recipe.override)
            options = {"observer": recipe.observer, "overrides": overrides, **options}
        made.append(kind.with_options(options))
    return made


def _probes(samples: Samples | None, calibration: Calibration | None) -> list[Feed]:
    if samples is not None:
        found = []
        for sample in samples:
            found.append(sample.feed)
            if len(found) == 2:
                break
        return found
    return [] if calibration is None else calibration.probes[:2]


def _for_probes(samples: Samples | None, session: Session, inputs: Sequence[TensorInfo]) -> Calibration:
    """No statistics, but feeds to prove and to time with: the first samples, or made-up ones that the model takes."""
    found = Calibration()
    for k, sample in enumerate([] if samples is None else islice(samples, 4)):
        found.keep_feed(k, sample.feed, hash_of_feed(sample.feed), 0.0)
    rng = np.random.default_rng(0)
    for size, filler in ((1, 0), (1, 1), (16, 1)) if samples is None else ():
        feed: Feed = {}
        for info in inputs:
            if info.is_optional:
                continue
            if info.dtype is None or info.dtype.kind not in "fiub" or info.shape is None:
                return found
            shape = [size if d is None else d for d in info.shape]
            made = rng.standard_normal(shape) if info.dtype.kind == "f" else np.full(shape, filler)
            feed[info.name] = [made.astype(info.dtype)] if info.is_sequence else made.astype(info.dtype)
        try:
            session.run(feed)
        except ModelError:
            continue
        found.keep_feed(0, feed, hash_of_feed(feed), 0.0)
        break
    return found


def _excluded(graph: Graph, patterns: Sequence[str], *, is_body: bool) -> frozenset[str]:
    """The nodes, in bodies too, that match a pattern by name, op type or output, with all that is inside them.

    A pattern that matches nothing is an error; of a body by itself it is none, as the rest of the model may match.
    """
    found: set[str] = set()
    nodes = [n for scope in graph.scopes() for n in scope.nodes]
    for pattern in patterns:
        matched = {
            n.name
            for n in nodes
            if fnmatchcase(n.name, pattern) or n.op == pattern or any(fnmatchcase(t.name, pattern) for t in n.outputs)
        }
        inside = {view for n in nodes if n.name in matched for _, part in graph.bodies_of(n) for view in part.scopes()}
        matched |= {n.name for view in inside for n in view.nodes}
        if not matched and not is_body:
            close = nearest(pattern, {n.op for n in nodes} | {n.name for n in nodes})
            hint = close if close.startswith("did") else f"its op types: {', '.join(sorted({n.op for n in nodes}))}"
            raise RecipeError(f"exclude pattern {pattern} matches no node name, op type or output of the model; {hint}")
        found |= matched
    return frozenset(found)


def was_quantized(records: Sequence[PassRecord]) -> bool:
    return any(r.rewrites for r in records if r.name in {kind.name for kind in RECOVER[1:]})


def comparable(prepared: Prepared) -> tuple[str | Path | onnx.ModelProto, str]:
    """The model as it was given, or, where it was quantized so that onnxruntime cannot load it, the floats it stands for.

    With it a sentence that says so.
    """
    given = prepared.source.loadable
    if not was_quantized(prepared.records):
        return given, ""
    try:
        Session(given, threads=1)
    except ModelError as error:
        assert prepared.model.reference is not None
        why = f"The model as it was given is not compared with: {error}. In its place is what it was taken back to."
        return prepared.model.reference.to_stored_proto(), why
    return given, ""


def counted(prepared: Prepared, model: Model) -> Samples | None:
    """The calibration samples but for those that were left out."""
    samples, skipped = prepared.model.samples, model.calibration.skipped if model.calibration else {}
    return samples.without(skipped) if samples is not None and skipped else samples
