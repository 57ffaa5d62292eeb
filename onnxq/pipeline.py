"""Load, quantize, calibrate, save: a model through the stages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx

from onnxq import audit, proof, runtime, validation
from onnxq import passes as p
from onnxq.bodies import bodies_with_layers, samples_of
from onnxq.calibration import Calibration, hash_of_feed
from onnxq.collection import Collecting, Nonfinite
from onnxq.data import Sample, Samples, fed_back, load_function, open_samples
from onnxq.errors import CalibrationError, DataError, ModelError, RecipeError, nearest
from onnxq.fastest import Built, fastest
from onnxq.files import check_writable
from onnxq.graph import Constant, Graph, Variable
from onnxq.images import ImageOptions
from onnxq.latency import latencies
from onnxq.model import Model, Observed, State, verify
from onnxq.passmanager import UNPROVABLE, Pass, PassManager, PassRecord
from onnxq.precision import is_half
from onnxq.ranges import load as load_ranges
from onnxq.ranges import to_toml
from onnxq.recipe import Recipe
from onnxq.recipe import load as load_recipe
from onnxq.report import Report
from onnxq.runtime import Session, TensorInfo
from onnxq.source import Source, load_any, save
from onnxq.stages import DYNAMIC, EQUALIZE, FLOAT, LOWER, OBSERVE, PLACE, RECOVER, REFINE, SELECT
from onnxq.store import hash_of_model, size_of
from onnxq.target import load as load_target

Progress = Callable[[str, int, int | None], None]
LEAST_IN_LOOP = 1 << 18  # weights of a layer that is worth being integer in each step, where that is not measured


def quantize(
    model: str | Path | bytes | onnx.ModelProto,
    data: Any = None,
    *,
    output: str | Path | None = None,
    eval: Any = None,  # noqa: A002
    calibration: str | Path | Calibration | None = None,
    target: str | None = None,
    mode: str | None = None,
    objective: str | None = None,
    observer: str | None = None,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    exclude: str | Sequence[str] | None = None,
    recipe: str | Path | Recipe | None = None,
    ranges: str | Path | None = None,
    metric: str | validation.Metric | None = None,
    max_drop: float | None = None,
    min_speedup: float | None = None,
    max_samples: int | None = None,
    images: ImageOptions | None = None,
    threads: int = 0,
    provider: str | None = None,
    seed: int = 0,
    validate: bool = True,
    force: bool = False,
    dump_dir: str | Path | None = None,
    on_nonfinite: Nonfinite = "error",
    memory_limit: int | None = None,
    feedback: Mapping[str, str] | None = None,
    recalibrate: bool = False,
    custom_op_library: str | Path | Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Quantize a float32 ONNX model, check the result and compare it with the float model.

    `data` are calibration samples in any form that data.py lists; `eval` the ones to compare on, `data` where it is left
    out. `calibration` takes their place where statistics were collected before. With `output` the model is written there.
    For this machine (target "host") what is faster in float stays so: `objective` "latency"; with "size" and "coverage"
    all is integer that can be.
    In mode "dynamic" no data is needed: MatMul, Gemm and LSTM quantize their input anew at every run, the rest stays float.
    `ranges` is a file that `Report.ranges_toml` wrote, with what was edited in it; these ranges are taken as they are.
    A model that comes in quantized, or trained for it, keeps the ranges that it has; with `recalibrate` those of activations
    are chosen anew. `on_nonfinite`, `memory_limit` (bytes) and `feedback` are as in `calibrate`. `custom_op_library` is a
    shared library, or several, with the ops of the model's own domains, as onnxruntime loads them; they stay registered in
    this process. Raises OnnxqError, RecipeError where such a library cannot be loaded; a missed gate is no error: it is in
    `Report.missed_gates`.
    """
    runtime.register_custom_ops(custom_op_library)
    gates = {"max_drop": max_drop, "min_speedup": min_speedup}
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude or ())
    chosen = load_recipe(
        recipe, target=target, mode=mode, objective=objective, observer=observer, weight_bits=weight_bits,
        activation_bits=activation_bits, exclude=patterns or None, gates=gates,
    )  # fmt: skip
    if ranges is not None:
        chosen = chosen.model_copy(update={"override": chosen.override + load_ranges(Path(ranges))})
    if chosen.mode == "dynamic" and (calibration is not None or ranges is not None):
        raise RecipeError(
            "mode dynamic quantizes activations with the range of each run; leave --calibration and --ranges out"
        )
    if not load_target(chosen.target).compute:
        chosen = chosen.model_copy(update={"mode": "dynamic"})  # there are no activations to choose ranges of
    source = load_any(model)
    out = None if output is None else Path(output)
    if out is not None:
        check_writable(out, force, source.files)
    if not validate and (chosen.gates.max_drop is not None or chosen.gates.min_speedup is not None):
        raise RecipeError("a gate needs the comparison with the float model: leave --no-validate out")
    score = load_function(metric) if isinstance(metric, str) else metric
    prepared = _prepare(
        source, data, chosen, calibration=calibration, max_samples=max_samples, images=images, threads=threads,
        provider=provider, dump_dir=dump_dir, collecting=_collecting(on_nonfinite, memory_limit),
        feedback=feedback, recalibrate=recalibrate, progress=progress,
    )  # fmt: skip
    evaluation = None
    if eval is not None:
        evaluation = open_samples(eval, prepared.inputs, images=images, limit=max_samples)
        if feedback:
            assert prepared.session is not None
            evaluation = fed_back(evaluation, prepared.session, feedback, prepared.inputs)
        next(iter(evaluation))  # a bad path or shape is found before the long work
    compared = evaluation if evaluation is not None else prepared.model.samples
    if chosen.gates.max_drop is not None and score is None and (compared is None or next(iter(compared)).label is None):
        raise RecipeError("max-drop needs a metric: give data with labels, or --metric")
    quantized, records = _quantize(prepared, chosen)
    proto = quantized.graph.to_proto()
    del proto.graph.value_info[:]  # of the float graph, and inferred: the runtime infers it again
    report = _report(prepared, quantized, proto, chosen, records, out)
    if validate:
        samples, name = (
            (evaluation, "evaluation") if evaluation is not None else (_counted(prepared, quantized), "calibration")
        )
        _validate(report, source, samples, name, score, prepared, seed=seed, progress=progress)
    limits = chosen.gates
    report.missed_gates = validation.missed_gates(report.accuracy, report.latency, limits.max_drop, limits.min_speedup)
    if out is not None:
        save(proto, out)
    return report


def calibrate(
    model: str | Path | bytes | onnx.ModelProto,
    data: Any,
    *,
    output: str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    target: str | None = None,
    max_samples: int | None = None,
    images: ImageOptions | None = None,
    threads: int = 0,
    force: bool = False,
    on_nonfinite: Nonfinite = "error",
    memory_limit: int | None = None,
    checkpoint: str | Path | None = None,
    executor: Executor | Callable[[], Executor] | None = None,
    feedback: Mapping[str, str] | None = None,
    custom_op_library: str | Path | Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Collect the statistics that `quantize(calibration=...)` needs, so that the data is read once. Raises OnnxqError.

    `on_nonfinite` says what to do with a sample that makes NaN or infinity somewhere: raise an error, skip the sample, or
    ignore those elements. `memory_limit` bounds, in bytes, the activations held at once. `checkpoint` is a folder in which
    progress is kept, and found again after an interrupt. `executor` is a concurrent.futures.Executor, or a function that
    makes one; the result is the same bit for bit. `feedback` names outputs that are inputs of the next sample (output ->
    input), which the samples then need not hold: see data.fed_back. `custom_op_library` is as in `quantize`; workers
    load the libraries at the same paths. An interrupt writes what was collected beside `output`, as *.partial.calib.
    """
    runtime.register_custom_ops(custom_op_library)
    chosen = load_recipe(recipe, target=target, mode="static")
    source = load_any(model)
    out = None if output is None else Path(output)
    if out is not None:
        check_writable(out, force, source.files)
    how = _collecting(on_nonfinite, memory_limit, checkpoint, executor)
    prepared = _prepare(
        source, data, chosen, max_samples=max_samples, images=images, threads=threads, collecting=how, feedback=feedback,
        progress=progress,
    )  # fmt: skip
    try:
        placed = _equalize(prepared, chosen)[0].fork()
        prepared.manager.run(placed, _passes((*PLACE, p.CollectStatistics), chosen))
    except KeyboardInterrupt as stop:
        _say_what_is_kept(stop, how, out)
        raise
    assert placed.calibration is not None
    if out is not None:
        placed.calibration.save(out)
    how.clear()
    return placed.calibration


def _collecting(
    on_nonfinite: str,
    memory_limit: int | None,
    checkpoint: str | Path | None = None,
    executor: Executor | Callable[[], Executor] | None = None,
) -> Collecting:
    if on_nonfinite not in get_args(Nonfinite):
        raise RecipeError(f"on-nonfinite is {on_nonfinite}; {nearest(on_nonfinite, get_args(Nonfinite))}")
    if memory_limit is not None and memory_limit < 1:
        raise RecipeError(f"memory-limit is {memory_limit} bytes; it takes at least one")
    folder = None if checkpoint is None else Path(checkpoint)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise RecipeError(f"the checkpoint {folder} is a file; give a folder, which is made where it does not exist")
    return Collecting(on_nonfinite=on_nonfinite, memory_limit=memory_limit, checkpoint=folder, executor=executor)  # type: ignore[arg-type]


def _say_what_is_kept(stop: KeyboardInterrupt, how: Collecting, out: Path | None) -> None:
    """Write what was collected until an interrupt, a calibration of fewer samples, beside where the whole would go."""
    partial, kept = getattr(stop, "partial", None), []
    if partial is not None and partial.feeds and out is not None:
        path = out.with_name(f"{out.stem}.partial{out.suffix}")
        partial.save(path)
        kept.append(f"the statistics of {partial.samples} samples are in {path}, for quantize --calibration")
    if how.written:
        kept.append(f"the same command goes on from what is in {how.checkpoint}")
    if kept:
        stop.args = ("; ".join(["interrupted", *kept]),)


@dataclass
class _Prepared:
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
    ranges_toml: str = ""
    unplaced: frozenset[str] = frozenset()  # what the audit found in float
    note: str = ""  # on how the placement was chosen


def _prepare(
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
    progress: Progress | None = None,
) -> _Prepared:
    chosen = load_target(recipe.target).of_bits(recipe.weight_bits, recipe.activation_bits)
    device = runtime.check_provider(provider or (chosen.provider if runtime.has_provider(chosen.provider) else runtime.CPU))
    if data is None and calibration is None and recipe.mode == "static":
        raise DataError(
            "there is no calibration data: activations need samples to choose their ranges; give --data FOLDER, or "
            "--mode dynamic"
        )
    collected = Calibration.load(Path(calibration)) if isinstance(calibration, (str, Path)) else calibration
    collected = None if collected is None else collected.copy()
    graph = Graph.from_proto(source.proto, source.folder, source.store)
    given = graph.to_stored_proto()
    digest, size = hash_of_model(given), size_of(given)
    if collected is not None and collected.source_hash != digest:
        raise CalibrationError(
            "the calibration file was made from another model (their contents differ); run onnxq calibrate on this one"
        )
    if collected is not None and not collected.probes:
        raise CalibrationError("the calibration holds no probe feeds; collect it again with onnxq calibrate")
    how = replace(collecting or Collecting(), threads=threads, progress=progress, source_hash=digest)
    model = Model(graph, chosen, calibration=collected, collecting=how, threads=threads, progress=progress)
    probes: list[dict[str, np.ndarray]] = []
    manager = PassManager(verify, proof.prover(probes, threads), proof.dumper(dump_dir))
    recovered = manager.run(model, _passes(RECOVER, recipe))  # before onnxruntime sees it: it cannot load all that comes
    if recalibrate:
        tensors = graph.tensors()
        model.trained = {n: q for n, q in model.trained.items() if isinstance(tensors.get(n), Constant)}
    original = graph.to_stored_proto()
    session = Session(original, threads=threads)
    inputs = runtime.with_unknown_ranks(session.inputs, original)
    samples = None if data is None else open_samples(data, inputs, images=images, limit=max_samples)
    if samples is not None and feedback:
        samples = fed_back(samples, session, feedback, inputs)
    stream = session if feedback else None
    if recipe.mode == "dynamic":
        model.calibration = _for_probes(samples, session, inputs)
    del session  # its copy of the weights would stay through the float passes
    model.samples = samples
    probes += _probes(samples, model.calibration)
    model, records = manager.run_exact(model, _passes(FLOAT, recipe))
    records = recovered + records
    if collected is not None and collected.graph_hash != hash_of_model(model.graph.to_stored_proto()):
        raise CalibrationError(
            "the calibration was made with other float passes, another opset or another onnxq; collect it again with: "
            "onnxq calibrate MODEL --data DATA -o FILE.calib, and the same recipe"
        )
    model.reference = model.graph.copy()
    model.excluded = _excluded(model.graph, recipe.exclude)
    return _Prepared(source, digest, model, manager, records, inputs, device, size, stream)


def _passes(kinds: Sequence[type[Pass]], recipe: Recipe) -> list[Pass]:
    """The passes with the recipe's options; those that it leaves out are left out."""
    made = []
    for kind in kinds:
        options = recipe.options(kind.name)
        if options is None:
            continue
        if kind is p.ChooseRanges:
            overrides = tuple((o.match, o.observer) for o in recipe.override)
            options = {"observer": recipe.observer, "overrides": overrides, **options}
        made.append(kind.with_options(options))
    return made


def _probes(samples: Samples | None, calibration: Calibration | None) -> list[dict[str, np.ndarray]]:
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
        feed = {}
        for info in inputs:
            if info.dtype is None or info.dtype.kind not in "fiub" or info.shape is None:
                return found
            shape = [size if d is None else d for d in info.shape]
            made = rng.standard_normal(shape) if info.dtype.kind == "f" else np.full(shape, filler)
            feed[info.name] = made.astype(info.dtype)
        try:
            session.run(feed)
        except ModelError:
            continue
        found.keep_feed(0, feed, hash_of_feed(feed), 0.0)
        break
    return found


def _excluded(graph: Graph, patterns: Sequence[str]) -> frozenset[str]:
    """The nodes that match a pattern by name, op type or output. A pattern that matches nothing is an error."""
    found: set[str] = set()
    for pattern in patterns:
        matched = {
            n.name
            for n in graph.nodes
            if fnmatchcase(n.name, pattern) or n.op == pattern or any(fnmatchcase(t.name, pattern) for t in n.outputs)
        }
        if not matched:
            close = nearest(pattern, {n.op for n in graph.nodes} | {n.name for n in graph.nodes})
            hint = close if close.startswith("did") else f"its op types: {', '.join(sorted({n.op for n in graph.nodes}))}"
            raise RecipeError(f"exclude pattern {pattern} matches no node name, op type or output of the model; {hint}")
        found |= matched
    return frozenset(found)


def _equalize(prepared: _Prepared, recipe: Recipe) -> tuple[Model, list[PassRecord]]:
    """The float model with its channels evened out by a first look at the activations, which is kept."""
    first = prepared.model.fork()
    prepared.manager.run(first, _passes((*PLACE, p.CollectStatistics), recipe))
    start = prepared.model.fork()
    start.calibration = first.calibration
    start, records = prepared.manager.run_exact(start, _passes(EQUALIZE, recipe), once=True)
    if any(r.rewrites for r in records):
        start.reference = start.graph.copy()
    assert start.calibration is not None
    start.calibration.hold_for(hash_of_model(start.graph.to_stored_proto()))
    return start, records


def _quantize(prepared: _Prepared, recipe: Recipe) -> tuple[Model, list[PassRecord]]:
    """Build the model in integers, as is fastest where that is measured, and the bodies in it."""
    static = recipe.mode == "static"
    start, equalized = _equalize(prepared, recipe) if static else (prepared.model, [])
    make = _build if static else _build_dynamic

    def build(slower: frozenset[str], at_run_time: bool) -> Built:
        other = start.fork()
        other.slower, other.at_run_time = slower, at_run_time
        return make(prepared, other, recipe)

    def plain() -> Built:
        other = prepared.model.fork()
        other.calibration, other.slower = start.calibration, frozenset(n.name for n in other.graph.nodes)
        return make(prepared, other, recipe)

    best = make(prepared, start, recipe)
    probes = start.calibration.probes if start.calibration is not None else []
    if start.target.measured and recipe.objective == "latency" and not start.target.simulated and probes:
        best = fastest(best, build, plain, probes[0], threads=start.threads or 1)
    model, prepared.unplaced, prepared.note, prepared.ranges_toml = best.model, best.unplaced, best.note, best.ranges_toml
    _quantize_bodies(prepared, recipe, model)
    _stamp(model, recipe, prepared)
    prepared.model.calibration = start.calibration
    return model, prepared.records + equalized + best.records


def _build(prepared: _Prepared, start: Model, recipe: Recipe) -> Built:
    """A model in integers; again from placing without what the runtime did not fuse, or the outputs do not bear."""
    while True:
        model = start.fork()
        records = prepared.manager.run(model, _passes(PLACE + OBSERVE + SELECT, recipe))
        start.calibration = model.calibration
        if model.sensitive != start.sensitive:
            start.sensitive = model.sensitive
            continue
        records += prepared.manager.run(model, _passes(REFINE, recipe))
        ranges = {name: model.params[name] for name in _activations(model)}
        records += prepared.manager.run(model, _passes(LOWER, recipe))
        integer = audit.run_in_integers(model.graph.to_stored_proto(), model)
        if model.planned <= integer or model.target.simulated:  # each round un-places at least one node more, so this comes
            break
        start.unplaced = start.unplaced | (model.planned - integer)
    audit.complete_ledger(model, integer)
    said = to_toml(ranges, ranges if model.target.activation_symmetric else ())
    return Built(model, records, said, start.unplaced)


def _quantize_bodies(prepared: _Prepared, recipe: Recipe, model: Model) -> None:
    """The bodies of If, Loop and Scan, each as a model of its own, in place of what they are in the model."""
    reference, calibration = model.reference, model.calibration
    assert reference is not None
    assert calibration is not None
    samples: Iterable[Sample] = model.samples or [Sample(f, None, f"kept feed {k}") for k, f in calibration.kept.items()]
    own = recipe.model_copy(update={"exclude": (), "override": (), "passes": {**recipe.passes, "raise-opset": False}})
    nodes = {n.name: n for n in model.graph.nodes}
    for body in bodies_with_layers(reference, 1 if model.target.measured else LEAST_IN_LOOP):
        if body.node.name in model.excluded or not all(name in model.graph.tensors() for name in body.captured):
            continue
        inside = None if recipe.mode == "dynamic" else samples_of(body, reference, samples, model.threads)
        if inside is None and recipe.mode != "dynamic":
            continue  # nothing is known of what goes in
        part = _prepare(Source(body.proto, None, None), inside, own, threads=model.threads, progress=model.progress)
        done, _ = _quantize(part, own)
        if any(e.state is not State.FLOAT for e in done.ledger.values()):
            model.graph.set_body(nodes[body.node.name], body.key, done.graph.to_proto())
            model.ledger.update(done.ledger)
    model.graph.cleanup()
    prepared.manager.run(model, _passes([p.InsertWeightOnly], recipe))  # of what a body has in float all the same


def _build_dynamic(prepared: _Prepared, start: Model, recipe: Recipe) -> Built:
    """Weights in integers, activations quantized at every run; again without what the runtime did not fuse."""
    while True:
        model = start.fork()
        records = prepared.manager.run(model, _passes(DYNAMIC, recipe))
        integer = audit.run_in_integers(model.graph.to_stored_proto(), model)
        if model.planned <= integer:
            break
        start.unplaced = start.unplaced | (model.planned - integer)
    audit.complete_ledger(model, integer)
    return Built(model, records, unplaced=start.unplaced)


def _counted(prepared: _Prepared, model: Model) -> Samples | None:
    """The calibration samples but for those that were left out."""
    samples, skipped = prepared.model.samples, model.calibration.skipped if model.calibration else {}
    return samples.without(skipped) if samples is not None and skipped else samples


def _activations(model: Model) -> list[str]:
    """The tensors with a range of their own."""
    tensors = model.graph.tensors()
    observed = [name for name, spec in model.specs.items() if isinstance(spec, Observed) and name in model.params]
    return [name for name in observed if isinstance(tensors.get(name), Variable)]


def _stamp(model: Model, recipe: Recipe, prepared: _Prepared) -> None:
    """Provenance into the file's metadata; nothing in it depends on the time or the place."""
    from onnxq import __version__

    ledger: dict[str, dict[str, list[Any]]] = {}  # state, op type, then names: with their reason where they have one
    for name, e in model.ledger.items():
        line = name if e.reason is None else [name, e.reason.name.lower(), *([e.detail] if e.detail else [])]
        ledger.setdefault(e.state.value, {}).setdefault(e.op, []).append(line)
    model.graph.set_metadata("onnxq.version", __version__)
    model.graph.set_metadata("onnxq.recipe", recipe.model_dump_json(by_alias=True))
    model.graph.set_metadata("onnxq.source_sha256", prepared.source_hash)
    model.graph.set_metadata("onnxq.ledger", json.dumps(ledger, separators=(",", ":")))


def _report(
    prepared: _Prepared,
    model: Model,
    proto: onnx.ModelProto,
    recipe: Recipe,
    records: list[PassRecord],
    out: Path | None,
) -> Report:
    from onnxq import __version__

    calibration, reference = model.calibration, model.reference
    assert calibration is not None
    assert reference is not None
    session = Session(proto, threads=model.threads)  # the result loads and runs, or nothing is written
    macs: dict[str, int] = {}
    for probe in calibration.probes[:1]:
        session.run(probe)
    del session  # for its weights not to be there twice
    for probe in calibration.probes[:1]:
        macs = audit.multiply_accumulates(reference, probe, model.threads)
    report = Report(
        model=proto,
        version=__version__,
        source=prepared.source.name,
        output=None if out is None else str(out),
        target=model.target.name,
        observer=recipe.observer if recipe.mode == "static" else "of each run",
        samples=calibration.samples if recipe.mode == "static" else 0,
        machine=runtime.machine(),
        passes=records,
        ledger=model.ledger,
        coverage=audit.coverage(model.ledger, macs),
        float_bytes=prepared.float_bytes,
        quantized_bytes=proto.ByteSize(),
        audited=model.target.audited,
        ranges_toml=prepared.ranges_toml,
    )
    report.notes += [f"{note[0].upper()}{note[1:]}." for note in calibration.notes]
    report.notes += [f"Pass {r.name} was rolled back: {r.rolled_back}." for r in records if r.rolled_back]
    report.notes += [
        f"The float rewrites could not be proved: the model differs from itself ({r.refusals[0][1]})."
        for r in records
        if r.name == UNPROVABLE
    ]
    if _was_quantized(records):
        kept = len(model.trained.keys() & model.params.keys())
        report.notes.append(
            f"The model was quantized already: it was taken back to floats, and {kept} ranges that it came with are kept. "
            "What is called float here is the model as it was given."
        )
    if is_half(prepared.source.proto):
        report.notes.append(
            "The model is of 16-bit floats: what is not integer computes in float32, inputs and outputs are kept."
        )
    kept = {i.name for i in proto.graph.input}
    fixed = [i.name for i in prepared.source.proto.graph.input if i.name not in kept]
    if fixed and prepared.source.proto.ir_version >= 4:  # before, every initializer had to be an input as well
        report.notes.append(
            f"{len(fixed)} initializers that could be given as inputs are constants in the result, the first {fixed[0]}."
        )
    unfused = [n for n, e in model.ledger.items() if e.state is State.FLOAT and n in prepared.unplaced]
    if unfused:
        report.notes.append(
            f"The runtime did not fuse {len(unfused)} nodes; they were left in float, the first {unfused[0]}."
        )
    report.notes += [prepared.note] if prepared.note else []
    report.notes += _notes_on_target(model, prepared.provider) + _notes_on_provider(proto, prepared.provider)
    if not prepared.note and not model.target.simulated and all(e.state is State.FLOAT for e in model.ledger.values()):
        report.notes.append("Nothing could be quantized; the result is the float model after its float rewrites.")
    return report


def _notes_on_target(model: Model, provider: str) -> list[str]:
    """What the figures are not of: another provider, or kernels that saturate otherwise."""
    placed, notes = model.target, []
    if provider != placed.provider:
        why = "" if runtime.has_provider(placed.provider) else ": it is not here"
        notes.append(f"Not run on {placed.provider}{why}; what is compared and timed is on {provider}.")
    if not placed.audited and placed.compute:
        notes.append(f"Placed for {placed.name} by its rules; which kernels it has for each node is not read back.")
    if placed.audited and not placed.saturates and runtime.u8s8_saturates() and not placed.simulated and placed.compute:
        notes.append(f"The kernels of this machine saturate, those of {placed.name} do not: accuracy there is as emulated.")
    return notes


def _notes_on_provider(proto: onnx.ModelProto, provider: str) -> list[str]:
    """How much of the result a provider takes, where it is not the CPU's, which takes all."""
    try:
        found = None if provider == runtime.CPU else runtime.on_provider(proto, provider)
    except ModelError:
        return []  # said where it is compared
    if found is None:
        return []
    taken, left = found
    rest = ", ".join(f"{count} {op}" for op, count in left.items())
    return [f"{provider} takes {taken} of {taken + sum(left.values())} nodes{f'; the CPU runs {rest}' if rest else ''}."]


def _was_quantized(records: Sequence[PassRecord]) -> bool:
    return any(r.rewrites for r in records if r.name in {kind.name for kind in RECOVER[1:]})


def _comparable(report: Report, source: Source, prepared: _Prepared) -> str | Path | onnx.ModelProto:
    """The model as it was given, or, where it was quantized so that onnxruntime cannot load it, the floats it stands for."""
    if not _was_quantized(prepared.records):
        return source.loadable
    try:
        Session(source.loadable, threads=1)
    except ModelError as error:
        assert prepared.model.reference is not None
        report.notes.append(
            f"The model as it was given is not compared with: {error}. In its place is what it was taken back to."
        )
        return prepared.model.reference.to_stored_proto()
    return source.loadable


def _provider_that_loads(report: Report, prepared: _Prepared) -> str:
    """The provider to compare on: the CPU where the one that was meant does not load the result, which the report says."""
    if prepared.provider != runtime.CPU:
        try:
            Session(report.model, threads=prepared.model.threads, provider=prepared.provider)
        except ModelError as error:
            report.notes.append(f"Not run on {prepared.provider}, which does not take it: {error}. In its place is the CPU.")
            return runtime.CPU
    return prepared.provider


def _validate(
    report: Report,
    source: Source,
    samples: Samples | None,
    name: str,
    metric: validation.Metric | None,
    prepared: _Prepared,
    *,
    seed: int,
    progress: Progress | None,
) -> None:
    threads, provider = prepared.model.threads, _provider_that_loads(report, prepared)
    original = _comparable(report, source, prepared)
    assert prepared.model.calibration is not None
    if samples is None:
        has_statistics = bool(prepared.model.calibration.sketches)
        why = "a calibration file holds statistics, not samples" if has_statistics else "there is no data"
        report.notes.append(f"No accuracy was measured: {why}; give --eval.")
    else:
        report.accuracy = validation.accuracy(
            validation.compared(original, report.model, threads, [provider]), samples, data=name, metric=metric,
            provider=provider, progress=progress, total=samples.length,
        )  # fmt: skip
        if report.accuracy.kernel_effect and provider == prepared.model.target.provider:
            report.notes.append(report.accuracy.kernel_effect)
    if not prepared.model.calibration.probes:
        report.notes.append("Nothing was timed or proved: the model does not run on made-up inputs; give --data.")
        return
    try:
        (report.latency,) = latencies(
            [original, report.model], {None: prepared.model.calibration.probes[0]}, threads=[threads or 1],
            providers=[provider], seed=seed, progress=progress,
        )  # fmt: skip
    except ModelError as error:
        if provider == runtime.CPU:
            raise
        report.notes.append(f"Nothing was timed: {provider} does not take both models: {error}.")
