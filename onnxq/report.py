"""Report: what a quantization did, as a terminal page and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxq.audit import KernelCount
from onnxq.latency import Latency
from onnxq.model import Entry, State
from onnxq.passmanager import PassRecord
from onnxq.runtime import CPU, short_name
from onnxq.validation import Accuracy, Comparison

if TYPE_CHECKING:
    import onnx
    from rich.console import Console
    from rich.table import Table

    from onnxq.checking import Violation
    from onnxq.inspection import Inspection
    from onnxq.target import Target

SCHEMA = 1


@dataclass
class Report:
    """The result of `quantize`. `model` is the quantized ModelProto; the rest says what was done and measured."""

    model: onnx.ModelProto
    version: str
    source: str
    output: str | None
    target: str
    observer: str
    samples: int
    machine: dict[str, Any]
    passes: list[PassRecord]
    ledger: dict[str, Entry]
    coverage: dict[str, KernelCount]
    float_bytes: int
    quantized_bytes: int
    audited: bool = True  # whether it is read back from the runtime what is integer, and not by rule
    ranges_toml: str = ""  # of every activation: see ranges.py
    accuracy: Accuracy | None = None
    latency: Latency | None = None
    notes: list[str] = field(default_factory=list)
    missed_gates: list[str] = field(default_factory=list)

    @property
    def integer_share(self) -> float:
        """Share of Conv, MatMul, Gemm and the like that run in integer kernels, by count."""
        return _share(*self._compute_counts("integer", "float"))

    @property
    def integer_mac_share(self) -> float:
        """The same share by multiply-accumulates."""
        return _share(*self._compute_counts("integer_macs", "float_macs"))

    def _compute_counts(self, integer: str, other: str) -> tuple[int, int]:
        from onnxq.audit import FLOAT_KERNELS

        rows = [c for op, c in self.coverage.items() if op in FLOAT_KERNELS]
        return sum(getattr(c, integer) for c in rows), sum(getattr(c, other) for c in rows)

    def to_dict(self) -> dict[str, Any]:
        """All of it but the model, as plain values."""
        found = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "model"}
        accuracy = self.accuracy
        if accuracy is not None:
            found["accuracy"] |= {
                "metric": accuracy.metric,
                "drop": _plain(accuracy.drop),
                "kernel_effect": accuracy.kernel_effect,
            }
        if self.latency is not None:
            found["latency"] = _plain_latency(self.latency)
        shares = {"integer_share": self.integer_share, "integer_mac_share": self.integer_mac_share}
        return {"schema": SCHEMA, **found, **shares}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def print(self, console: Console) -> None:
        """The page that ends `onnxq quantize`."""
        title = f"{Path(self.source).name} for {self.target}"
        accuracies = [] if self.accuracy is None else [self.accuracy]
        table = _table(title, accuracies, self.latency, self.float_bytes, self.quantized_bytes)
        console.print(table)
        for line in self.sentences():
            console.print(line, highlight=False)

    def sentences(self) -> list[str]:
        """What the table does not say, one sentence each."""
        lines = []
        if self.latency is not None:
            lines.append(speed_sentence(self.latency))
        integer, other = self._compute_counts("integer", "float")
        lines.append(
            f"{'Integer kernels' if self.audited else 'Placed in integers'}: {integer} of {integer + other} compute nodes "
            f"({self.integer_mac_share:.0%} of the counted multiply-accumulates)."
        )
        floats: dict[str, list[str]] = {}
        for entry in self.ledger.values():
            if entry.state is State.FLOAT and entry.reason is not None:
                floats.setdefault(entry.reason.value, []).append(entry.op)
        stored = [e.op for e in self.ledger.values() if e.state is State.WEIGHT_ONLY]
        if stored:
            counted = ", ".join(f"{stored.count(op)} {op}" for op in dict.fromkeys(stored))
            lines.append(f"Weights of 8 bits, computed in float: {counted}.")
        for why, ops in floats.items():
            counted = ", ".join(f"{ops.count(op)} {op}" for op in dict.fromkeys(ops))
            lines.append(f"Float: {counted}: {why}.")
        if self.accuracy is not None:
            lines.append(f"Compared on {self.accuracy.samples} samples of the {self.accuracy.data} data.")
        return [*lines, *self.notes, *[f"Missed: {gate}." for gate in self.missed_gates]]


def accuracy_rows(accuracies: Sequence[Accuracy]) -> list[tuple[str, ...]]:
    """Table rows (what, float, emulated, real kernels of each provider)."""
    first, rows = accuracies[0], []
    for name in first.float.metrics:
        unit = "" if name == "metric" else ", %"
        columns = (first.float, first.emulated, *[a.real for a in accuracies])
        rows.append((f"{name}{unit}", *[f"{c.metrics[name]:.2f}" for c in columns]))
    if first.drop is not None:
        rows.append(("drop", "", "", *[_drop(a) for a in accuracies]))
    for name in first.float.outputs:
        outputs = [c.outputs[name] for c in (first.emulated, *[a.real for a in accuracies])]
        rows.append((f"{name}: SQNR, dB", "", *[f"{o.sqnr:.1f}" for o in outputs]))
        rows.append((f"{name}: cosine", "", *[f"{o.cosine:.5f}" for o in outputs]))
        agreements = [o.argmax_agreement for o in outputs if o.argmax_agreement is not None]
        if len(agreements) == len(outputs):
            rows.append((f"{name}: same arg max, %", "", *[f"{agreement:.1f}" for agreement in agreements]))
    return rows


def _drop(accuracy: Accuracy) -> str:
    width = "" if accuracy.half_width is None else f" ± {accuracy.half_width:.2f}"
    return f"{accuracy.drop:.2f}{width}"


def _share(integer: int, other: int) -> float:
    return integer / (integer + other) if integer + other else 0.0


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)  # JSON has no infinity
    return getattr(value, "value", value)


def _plain_latency(latency: Latency) -> dict[str, Any]:
    percentiles = {"float_p50": latency.float_p50, "quantized_p50": latency.quantized_p50}
    return {**_plain(latency), **percentiles, "verdict": latency.verdict}


def to_json(content: Mapping[str, Any]) -> str:
    """Any of the result records as JSON, with the schema number."""
    return json.dumps({"schema": SCHEMA, **_plain(dict(content))}, indent=1) + "\n"


def to_plain_json(found: Comparison) -> str:
    """The result of `validate` as JSON, with the schema number; `accuracy` and `latency` are the first of theirs."""
    accuracies = [{**_plain(a), "metric": a.metric, "drop": _plain(a.drop)} for a in found.accuracies]
    latencies = [_plain_latency(row) for row in found.latencies]
    first = {"accuracy": accuracies[0], "latency": latencies[0]}
    plain = {**first, **_plain(found), "accuracies": accuracies, "latencies": latencies}
    return json.dumps({"schema": SCHEMA, **plain}, indent=1) + "\n"


def comparison_tables(found: Comparison) -> list[Table]:
    """The tables of `onnxq validate`: one, and one of latencies where several were measured."""
    single = found.latency if len(found.latencies) == 1 else None
    table = _table("validation", found.accuracies, single, found.float_bytes, found.quantized_bytes)
    return [table] if single else [table, _latency_table(found.latencies)]


def comparison_lines(found: Comparison) -> list[str]:
    lines = [speed_sentence(found.latency)] if len(found.latencies) == 1 else []
    lines.append(machine_sentence(found.machine))
    lines.append(f"Integer kernels: {found.integer} of {found.integer + found.float} compute nodes.")
    for accuracy in found.accuracies:
        if accuracy.kernel_effect:
            where = f"{short_name(accuracy.provider)}: " if len(found.accuracies) > 1 else ""
            lines.append(f"{where}{accuracy.kernel_effect}")
    return [*lines, f"Compared on {found.accuracy.samples} samples.", *[f"Missed: {g}." for g in found.missed_gates]]


def speed_sentence(latency: Latency) -> str:
    ratio, low, high = latency.speedup
    control = latency.control
    batch = "" if latency.batch is None else f", batch {latency.batch}"
    provider = "" if latency.provider == CPU else f" on {short_name(latency.provider)}"
    return (
        f"Speed: {ratio:.2f}x the float model ({low:.2f} to {high:.2f}; a second float copy: {control[1]:.2f} to "
        f"{control[2]:.2f}), {latency.verdict}; {latency.threads or 'all'} thread(s){batch}{provider}."
    )


def machine_sentence(machine: dict[str, Any]) -> str:
    """What latencies depend on, of `machine.facts()`."""
    features = ", ".join(machine["features"]) or "no feature for int8 known"
    saturates = "; u8 x s8 products saturate" if machine["u8s8_saturates"] else ""
    return (
        f"Machine: {machine['cpu']} ({features}{saturates}), {machine['cores']} cores; "
        f"onnxruntime {machine['onnxruntime']}, onnx {machine['onnx']}."
    )


def _table(
    title: str, accuracies: Sequence[Accuracy], latency: Latency | None, float_bytes: int, quantized_bytes: int
) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("")
    several = [f"{short_name(a.provider)} kernels" for a in accuracies] if len(accuracies) > 1 else ["real kernels"]
    for column in ("float", "emulated", *several):
        table.add_column(column, justify="right")
    for row in accuracy_rows(accuracies) if accuracies else ():
        table.add_row(*row)
    if latency is not None:
        table.add_row("latency, median ms", f"{latency.float_median:.3f}", "", f"{latency.quantized_median:.3f}")
        table.add_row("latency, p90 ms", f"{latency.float_p90:.3f}", "", f"{latency.quantized_p90:.3f}")
        table.add_row("latency, p99 ms", f"{latency.float_p99:.3f}", "", f"{latency.quantized_p99:.3f}")
    table.add_row("size, kB", f"{float_bytes / 1e3:.0f}", "", *[f"{quantized_bytes / 1e3:.0f}"] * len(several))
    return table


def _latency_table(rows: Sequence[Latency]) -> Table:
    """One row of two lines for each provider, thread count and batch, in 80 columns."""
    from rich.table import Table

    table = Table(title="latency, ms, and float over quantized", title_justify="left", padding=0, pad_edge=False)
    table.add_column("provider", overflow="fold")
    for column in ("threads", *["batch"] * (rows[0].batch is not None)):
        table.add_column(column, justify="right", overflow="fold")
    table.add_column("")
    for column in ("p50", "p90", "p99"):
        table.add_column(column, justify="right", overflow="fold")
    for column in ("speedup", "control"):
        table.add_column(column, overflow="fold")
    for row in rows:
        ratio, low, high = row.speedup
        times = (row.float_p50, row.quantized_p50), (row.float_p90, row.quantized_p90), (row.float_p99, row.quantized_p99)
        table.add_row(
            short_name(row.provider),
            str(row.threads or "all"),
            *[str(row.batch)] * (row.batch is not None),
            "float\nquantized",
            *[f"{_time(float_)}\n{_time(quantized)}" for float_, quantized in times],
            f"{ratio:.2f} {row.verdict}\n{low:.2f}-{high:.2f}",
            f"\n{row.control[1]:.2f}-{row.control[2]:.2f}",
        )
    return table


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.3f}" if milliseconds < 100 else f"{milliseconds:.1f}"


MOST_ROWS = 40  # of Q and DQ on the terminal


def inspection_page(path: Path) -> tuple[list[Table | str], dict[str, Any]]:
    """(tables and sentences, plain values) of what the runtime runs for a file; with its ledger, where it is onnxq's."""
    from onnxq.inspection import inspect
    from onnxq.source import load_any

    source = load_any(path)
    found = inspect(source)
    metadata = {p.key: p.value for p in source.proto.metadata_props}
    ledger = json.loads(metadata.get("onnxq.ledger", "{}"))
    opsets = ", ".join(f"{o.domain or 'onnx'} {o.version}" for o in source.proto.opset_import)
    parts = [_kernel_table(f"{path.name}: opset {opsets}", found, ledger), *_count_sentences(found)]
    if found.unfused:
        parts += _unfused_parts(found)
    if found.boundary:
        parts.append(f"Q and DQ at inputs and outputs of the model, as they must be: {', '.join(found.boundary)}.")
    plain = {"schema": SCHEMA, **_plain(found), "integer_mac_share": found.integer_mac_share}
    return parts, {**plain, "ledger": ledger, "metadata": metadata.get("onnxq.version")}


def _kernel_table(title: str, found: Inspection, ledger: dict[str, Any]) -> Table:
    from rich.table import Table

    from onnxq.audit import FLOAT_KERNELS
    from onnxq.inspection import is_integer

    share, work = found.integer_mac_share, found.integer_macs + found.float_macs
    said = "" if share is None else f", {share:.1%} of the counted multiply-accumulates,"
    nodes = f"{found.integer} of {found.integer + found.float} compute nodes"
    table = Table(title=f"{title}; {nodes}{said} run in integers", title_justify="left")
    table.add_column("kernel")
    table.add_column("count", justify="right")
    table.add_column("kind")
    table.add_column("multiply-accumulates", justify="right")
    for op, count in found.kernels.items():
        kind = "integer" if is_integer(op) else "float" if op in FLOAT_KERNELS else ""
        table.add_row(op, str(count), kind, f"{found.macs[op] / work:.1%}" if found.macs.get(op) else "")
    for op, lines in ledger.get("float", {}).items():
        for name, reason, *detail in lines:
            why = f"float: {reason}{f' ({detail[0]})' if detail else ''}"
            table.add_row(f"{op} {name}", "1", why, "")
    return table


def _count_sentences(found: Inspection) -> list[str]:
    lines = []
    if found.integer_macs + found.float_macs:
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in found.counted_for.items())
        total = found.integer_macs + found.float_macs
        lines.append(f"Counted: {total:,} multiply-accumulates for one run on {shapes or 'no input'}.")
    reasons: dict[str, list[str]] = {}
    for missing in found.uncounted:
        reasons.setdefault(missing.reason, []).append(f"{missing.op} {missing.node}")
    lines += [f"Not counted: {', '.join(nodes)}: {reason}." for reason, nodes in reasons.items()]
    return lines


def _unfused_parts(found: Inspection) -> list[Table | str]:
    """One row for all Q and DQ around a node that share a reason."""
    from rich.table import Table

    rows: dict[tuple[str, ...], list[str]] = {}
    for row in found.unfused:
        rows.setdefault((row.left, row.node, row.op, row.reason), []).append(row.tensor)
    title = f"Q and DQ that run by themselves: {len(found.unfused)}"
    table = Table(title=title, title_justify="left")
    for column in ("tensors", "left", "beside", "why"):
        table.add_column(column, overflow="fold")
    for (left, _, op, reason), tensors in list(rows.items())[:MOST_ROWS]:
        table.add_row(", ".join(tensors), left, op, reason)
    return [table, *([f"And {len(rows) - MOST_ROWS} rows more; --json lists all."] if len(rows) > MOST_ROWS else [])]


def check_parts(model: str, target: str, found: list[Violation]) -> list[Table | str]:
    """What `onnxq check` prints: a row for each violation."""
    from rich.table import Table

    if not found:
        return [f"{model} obeys {target}."]
    table = Table(title=f"{model} does not obey {target}: {len(found)} violations", title_justify="left")
    for column in ("node", "tensor", "demanded", "found"):
        table.add_column(column, overflow="fold")
    for v in found[:MOST_ROWS]:
        table.add_row(f"{v.op} {v.node}", v.tensor, v.demanded, v.found)
    return [table, *([f"And {len(found) - MOST_ROWS} more; --json lists all."] if len(found) > MOST_ROWS else [])]


def targets_table() -> Table:
    """What each target demands, and whether its provider is here."""
    from rich.table import Table

    from onnxq import runtime, target

    table = Table(title="targets", title_justify="left")
    for column in ("target", "activations", "weights", "bias", "provider", "here"):
        table.add_column(column)
    for name in target.names():
        one = target.load(name)
        here = "yes" if runtime.has_provider(one.provider) else "no"
        table.add_row(name, *_demands(one), one.provider.removesuffix("ExecutionProvider"), here)
    return table


def target_lines(name: str) -> list[str]:
    """All there is to a target."""
    from onnxq import runtime, target

    one = target.load(name)
    activations, weights, bias = _demands(one)
    layers = {op: f"output {'in integers' if c.output == 'required' else 'in either'}" for op, c in one.compute.items()}
    other = [op for op in layers if one.is_per_channel(op) != one.weight_per_channel]
    layers |= {op: f"{layers[op]}, {'a scale by channel' if one.is_per_channel(op) else 'one weight scale'}" for op in other}
    lines = [f"{one.name}: {one.description}"]
    lines.append(f"provider: {one.provider}, {'here' if runtime.has_provider(one.provider) else 'not here'}")
    lines.append(f"activations: {activations}")
    lines.append(f"weights: {weights}")
    lines.append(f"bias: {bias}")
    lines.append(f"u8 x s8 sums of 16 bits: {'yes, repaired' if one.saturates else 'no'}")
    lines.append(f"layers: {'; '.join(f'{op} ({what})' for op, what in layers.items()) or 'none in integers'}")
    where = "wherever they are" if one.everywhere else "between integer nodes"
    parts = (
        (f"in integers {where}", one.region),
        ("parameters pass through", one.pass_through),
        ("vanish into the Q behind them", one.absorbed),
    )
    lines += [f"{what}: {', '.join(sorted(ops))}" for what, ops in parts if ops]
    lines += ["an Add after a layer: only the other tensor in integers"] if one.adds else []
    lines += [f"{f.op} in {f.type}: scale {f.scale:.6g}, zero point {f.zero_point}" for f in one.fixed]
    lines.append(f"what is integer: {'read back from the runtime' if one.audited else 'by rule, not read back'}")
    return [*lines, *([f"source: {one.source}"] if one.source else [])]


def _demands(one: Target) -> tuple[str, str, str]:
    """(activations, weights, bias) in a few words."""
    if not one.activation_types:
        return "float", f"{one.weight_type.value} by channel, stored", "float"
    kinds = " or ".join(sorted((t.value for t in one.activation_types), key=lambda t: (t != one.activation_type.value, t)))
    weights = " or ".join(sorted((t.value for t in one.weight_types), key=lambda t: (t != one.weight_type.value, t)))
    activations = f"{kinds}{', zero point 0' if one.activation_symmetric else ''}"
    return (
        activations,
        f"{weights}{' by channel' if one.weight_per_channel else ''}{', symmetric' if one.weight_symmetric else ''}",
        "float" if one.float_bias else "int32",
    )
