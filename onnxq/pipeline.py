"""Load, quantize, calibrate, save: a model through the stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, get_args

import onnx

from onnxq import passes as p
from onnxq import runtime, validation
from onnxq.building import build, equalize
from onnxq.calibration import Calibration
from onnxq.collecting import Collecting
from onnxq.collector import Nonfinite
from onnxq.data import fed_back, load_function, open_samples
from onnxq.errors import OnnxqError, OutputError, RecipeError, nearest
from onnxq.files import check_writable
from onnxq.images import ImageOptions
from onnxq.outcome import compare, report_on
from onnxq.passes.observe.collect_statistics import observed_tensors
from onnxq.preparation import counted, passes_of, prepare
from onnxq.ranges import load as load_ranges
from onnxq.ranges import unlike
from onnxq.recipe import Recipe
from onnxq.recipe import load as load_recipe
from onnxq.report import Report
from onnxq.sketch import ChannelStatistics
from onnxq.source import load_any, save
from onnxq.stages import PLACE
from onnxq.target import load as load_target

Progress = Callable[[str, int, int | None], None]


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
    require_int8: bool = False,
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
    gates = {"max_drop": max_drop, "min_speedup": min_speedup, "require_int8": require_int8 or None}
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
    prepared = prepare(
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
    quantized, records = build(prepared, chosen)
    proto = quantized.graph.to_proto()
    del proto.graph.value_info[:]  # of the float graph, and inferred: the runtime infers it again
    report = report_on(prepared, quantized, proto, chosen, records, out)
    report.notes += [] if ranges is None else unlike(Path(ranges), report.ranges_toml)
    if validate:
        samples, name = (
            (evaluation, "evaluation") if evaluation is not None else (counted(prepared, quantized), "calibration")
        )
        compare(report, source, samples, name, score, prepared, seed=seed, progress=progress)
    limits = chosen.gates
    report.missed_gates = validation.missed_gates(report.accuracy, report.latency, limits.max_drop, limits.min_speedup)
    if limits.require_int8 and report.integer_share == 0:
        report.missed_gates.append("no layer is integer, and --require-int8 was given")
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
    ignore those elements. `memory_limit` bounds, in bytes, the activations kept at once, where they are not counted while
    the model runs. `checkpoint` is a folder in which progress is kept, and found again after an interrupt. `executor` is a
    concurrent.futures.Executor, or a function that makes one; the result is the same bit for bit. `feedback` names outputs
    that are inputs of the next sample (output -> input), which the samples then need not hold: see data.fed_back.
    `custom_op_library` is as in `quantize`; workers load the libraries at the same paths. An interrupt or an error
    writes what was collected beside `output`, as *.partial.calib.
    """
    runtime.register_custom_ops(custom_op_library)
    chosen = load_recipe(recipe, target=target, mode="static")
    source = load_any(model)
    out = None if output is None else Path(output)
    if out is not None:
        check_writable(out, force, source.files)
    how = _collecting(on_nonfinite, memory_limit, checkpoint, executor)
    prepared = prepare(
        source, data, chosen, max_samples=max_samples, images=images, threads=threads, collecting=how, feedback=feedback,
        progress=progress,
    )  # fmt: skip
    first_look = {}
    try:
        evened = equalize(prepared, chosen)[0]
        placed = evened.fork()
        prepared.manager.run(placed, passes_of(PLACE, chosen))
        if evened.evened_out:
            plain, left = prepared.model.fork(), evened.graph.tensors()
            prepared.manager.run(plain, passes_of(PLACE, chosen))
            placed.observed_too = {n: axis for n, axis in observed_tensors(plain).items() if n not in left}
        first_look = {evened.cones[name]: channels for name, channels in evened.channels.items()}
        prepared.manager.run(placed, passes_of([p.CollectStatistics], chosen))
    except (KeyboardInterrupt, OnnxqError) as stop:
        _say_what_is_kept(stop, how, out, first_look)
        raise
    assert placed.calibration is not None
    placed.calibration.first_look = first_look
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


def _say_what_is_kept(
    stop: KeyboardInterrupt | OnnxqError, how: Collecting, out: Path | None, first_look: dict[str, ChannelStatistics]
) -> None:
    """Write what was collected until it stopped, a calibration of fewer samples, beside where the whole would go."""
    partial, kept = getattr(stop, "partial", None), []
    if partial is not None and partial.feeds and out is not None:
        partial.first_look = first_look
        path = out.with_name(f"{out.stem}.partial{out.suffix}")
        try:
            partial.save(path)
            kept.append(f"the statistics of {partial.samples} samples are in {path}, for quantize --calibration")
        except (OSError, OutputError) as error:
            kept.append(f"the statistics of {partial.samples} samples could not be written ({error})")
    if how.written:
        kept.append(f"the same command goes on from what is in {how.checkpoint}")
    if kept:
        stop.args = ("; ".join([str(stop) or "interrupted", *kept]),)
