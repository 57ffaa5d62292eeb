"""Outcome: what was done to a model, and how the result compares with what it was."""

from __future__ import annotations

from pathlib import Path

import onnx

from onnxq import audit, machine, runtime, validation
from onnxq.data import Samples
from onnxq.errors import ModelError
from onnxq.latency import latencies
from onnxq.model import Model, State
from onnxq.passmanager import UNPROVABLE, PassRecord
from onnxq.precision import is_half
from onnxq.preparation import Prepared, Progress, comparable, was_quantized
from onnxq.ranges import to_toml
from onnxq.recipe import Recipe
from onnxq.report import Report
from onnxq.runtime import Session
from onnxq.source import Source


def report_on(
    prepared: Prepared,
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
        machine=machine.facts(),
        passes=records,
        ledger=model.ledger,
        coverage=audit.coverage(model.ledger, macs),
        float_bytes=prepared.float_bytes,
        quantized_bytes=proto.ByteSize(),
        audited=model.target.audited,
        ranges_toml=to_toml(prepared.ranges, symmetric=model.target.activation_symmetric),
    )
    report.notes += [f"{note[0].upper()}{note[1:]}." for note in calibration.notes]
    report.notes += [f"Pass {r.name} was rolled back: {r.rolled_back}." for r in records if r.rolled_back]
    report.notes += [
        f"The float rewrites could not be proved: the model differs from itself ({r.refusals[0][1]})."
        for r in records
        if r.name == UNPROVABLE
    ]
    if was_quantized(records):
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
    report.notes += prepared.notes
    report.notes += _notes_on_target(model, prepared.provider) + _notes_on_provider(proto, prepared.provider)
    if not prepared.note and not model.target.simulated and all(e.state is State.FLOAT for e in model.ledger.values()):
        report.notes.append("Nothing could be quantized; the result is the float model after its float rewrites.")
    return report


def _notes_on_target(model: Model, provider: str) -> list[str]:
    """What the figures are not of: another provider, or kernels that saturate otherwise."""
    placed, notes = model.target, []
    if provider != placed.provider:
        why = "" if runtime.has_provider(placed.provider) else ": it is not here, or lacks its device or libraries"
        notes.append(f"Not run on {placed.provider}{why}; what is compared and timed is on {provider}.")
    if not placed.audited and placed.compute:
        notes.append(f"Placed for {placed.name} by its rules; which kernels it has for each node is not read back.")
    if placed.audited and not placed.saturates and machine.u8s8_saturates() and not placed.simulated and placed.compute:
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


def _provider_that_loads(report: Report, prepared: Prepared) -> str:
    """The provider to compare on: the CPU where the one that was meant does not load the result, which the report says."""
    if prepared.provider != runtime.CPU:
        try:
            Session(report.model, threads=prepared.model.threads, provider=prepared.provider)
        except ModelError as error:
            report.notes.append(f"Not run on {prepared.provider}, which does not take it: {error}. In its place is the CPU.")
            return runtime.CPU
    return prepared.provider


def compare(
    report: Report,
    source: Source,
    samples: Samples | None,
    name: str,
    metric: validation.Metric | None,
    prepared: Prepared,
    *,
    seed: int,
    progress: Progress | None,
) -> None:
    threads, provider = prepared.model.threads, _provider_that_loads(report, prepared)
    original, note = comparable(prepared)
    report.notes += [note] if note else []
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
