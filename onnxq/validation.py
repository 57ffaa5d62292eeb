"""A quantized model against its float model, through onnxruntime: accuracy, latency (`latency.py`), gates.

Three columns are told apart: float; emulated, in which Q and DQ run as written and layers in float, as 32-bit-accumulating
integer hardware would; and the runtime's real kernels. A gap between the last two is an effect of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import machine, runtime, timing
from onnxq.batches import batches, check_batches
from onnxq.data import Sample, Samples, load_function, open_samples
from onnxq.errors import DataError, RecipeError
from onnxq.images import ImageOptions
from onnxq.latency import LARGE, SECONDS, Latency, latencies
from onnxq.runtime import Session, TensorInfo
from onnxq.source import Source, load_any, size_in_memory

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
Metric = Callable[[Run, Iterable[tuple[dict[str, np.ndarray], np.ndarray | None]]], float]
INAUDIBLE = 60.0  # dB of SQNR: a gap above it is rounding
GAP = 3.0  # dB of SQNR between emulation and kernels that is worth a sentence
MOST_THREADS = 1024
MOST_ROWS = 1 << 20  # of a batch


@dataclass(frozen=True)
class OutputDistance:
    """How far an output is from the float model's: SQNR in dB, cosine similarity, share of equal arg maxes in percent."""

    sqnr: float
    cosine: float
    argmax_agreement: float | None


@dataclass(frozen=True)
class Scores:
    """One column: the metric (None without labels) and the distance of each float output."""

    metrics: dict[str, float]
    outputs: dict[str, OutputDistance]


@dataclass(frozen=True)
class Accuracy:
    """The three columns, on how many samples of which data; `half_width`: 95 % of the paired difference, in points.

    The real kernels are those of `provider`; float and emulated run on the CPU.
    """

    data: str
    samples: int
    float: Scores
    emulated: Scores
    real: Scores
    half_width: float | None = None
    provider: str = runtime.CPU

    @property
    def metric(self) -> str | None:
        return next(iter(self.float.metrics), None)

    @property
    def drop(self) -> float | None:
        """Points lost on the runtime's kernels; None without labels or metric."""
        return None if self.metric is None else self.float.metrics[self.metric] - self.real.metrics[self.metric]

    @property
    def kernel_effect(self) -> str | None:
        """A sentence on the gap between emulation and kernels, where there is one."""
        for name, emulated in self.emulated.outputs.items():
            real = self.real.outputs[name]
            if emulated.sqnr - real.sqnr > GAP and real.sqnr < INAUDIBLE:
                return (
                    f"kernel effect: output {name} has {real.sqnr:.1f} dB on the runtime's kernels and "
                    f"{emulated.sqnr:.1f} dB emulated; 16-bit saturation is the usual cause"
                )
        return None


@dataclass
class _Tally:
    """Running sums of one output's distance."""

    signal: float = 0.0
    noise: float = 0.0
    product: float = 0.0
    square: float = 0.0
    agree: int = 0
    rows: int = 0

    def add(self, reference: np.ndarray, got: np.ndarray) -> None:
        r, g = reference.astype(np.float64), got.astype(np.float64)
        self.signal += float(np.square(r).sum())
        if r.shape != g.shape:  # entries are selected by their values, and others were: nothing can be set side by side
            self.noise += float(np.square(r).sum())
            return
        self.noise += float(np.square(r - g).sum())
        self.product += float((r * g).sum())
        self.square += float(np.square(g).sum())
        classes = 1 if r.ndim >= 4 else -1  # a map has its classes on axis 1, scores and sequences on the last
        if r.ndim >= 2 and r.shape[classes] > 1:
            same = r.argmax(classes) == g.argmax(classes)
            self.agree += int(same.sum())
            self.rows += same.size

    def distance(self) -> OutputDistance:
        norm = np.sqrt(self.signal * self.square)
        return OutputDistance(
            sqnr=float("inf") if self.noise == 0 else float(10 * np.log10(max(self.signal, 1e-300) / self.noise)),
            cosine=float(self.product / norm) if norm > 0 else 1.0,
            argmax_agreement=100.0 * self.agree / self.rows if self.rows else None,
        )


@dataclass
class _Column:
    hits: list[np.ndarray] = field(default_factory=list)
    top5: list[np.ndarray] = field(default_factory=list)
    tallies: dict[str, _Tally] = field(default_factory=dict)


def accuracy(sessions: Sequence[Session], samples: Iterable[Sample], *, provider: str = runtime.CPU, **how: Any) -> Accuracy:
    """`accuracies` of one provider: (float, emulated, real) sessions."""
    return accuracies(sessions, samples, providers=[provider], **how)[0]


def accuracies(
    sessions: Sequence[Session],
    samples: Iterable[Sample],
    *,
    data: str,
    providers: Sequence[str],
    metric: Metric | None = None,
    progress: Callable[[str, int, int | None], None] | None = None,
    total: int | None = None,
) -> list[Accuracy]:
    """Compare (float, emulated, and real for each provider) sessions on the samples, one pass over these.

    With integer labels: top-1, and top-5 from ten classes on. With `metric`, a user's function of (run, samples) that gives
    a number, higher is better. Always: the distance of every float output from the float model's.
    """
    columns = [_Column() for _ in sessions]
    count, labelled = 0, True
    for sample in samples:
        results = [s.run(sample.feed, sample.where) for s in sessions]
        labelled = labelled and sample.label is not None
        for column, result in zip(columns, results, strict=True):
            _tally(column, results[0], result)
            if labelled and sample.label is not None and metric is None:
                _score(column, result, sample)
        count += 1
        if progress is not None:
            progress("comparing outputs", count, total)
    metrics: list[dict[str, float]] = [{} for _ in sessions]
    half_widths: list[float | None] = [None] * len(providers)
    if metric is not None:
        pairs = [(s.feed, s.label) for s in samples]
        metrics = [{"metric": _number(metric(s.run, pairs))} for s in sessions]
    elif labelled:
        hits = [np.concatenate(c.hits) for c in columns]
        for scores, column, hit in zip(metrics, columns, hits, strict=True):
            scores["top1"] = 100.0 * float(hit.mean())
            if column.top5:
                scores["top5"] = 100.0 * float(np.concatenate(column.top5).mean())
        differences = [hits[0].astype(float) - real for real in hits[2:]]
        half_widths = [196.0 * float(d.std() / np.sqrt(len(d))) for d in differences]
    scores = [
        Scores(m, {name: t.distance() for name, t in c.tallies.items()}) for m, c in zip(metrics, columns, strict=True)
    ]
    return [
        Accuracy(data, count, scores[0], scores[1], real, half_width, provider)
        for real, half_width, provider in zip(scores[2:], half_widths, providers, strict=True)
    ]


def _number(result: Any) -> float:
    try:
        return float(result)
    except (TypeError, ValueError) as error:
        raise DataError(f"the metric gave {str(result)[:80]!r}; it must give one number, higher is better") from error


def _tally(column: _Column, reference: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray]) -> None:
    for name, array in reference.items():
        if isinstance(array, np.ndarray) and (array.dtype.kind == "f" or array.dtype in (np.int8, np.uint8)):
            column.tallies.setdefault(name, _Tally()).add(array, got[name])  # a quantized model may give codes


def _score(column: _Column, result: Mapping[str, np.ndarray], sample: Sample) -> None:
    label = np.asarray(sample.label).reshape(-1)
    scores = next(iter(result.values()))
    if scores.size % max(1, label.size) or scores.size == label.size:
        raise DataError(
            f"{sample.where}: {label.size} labels do not go with scores of shape {list(scores.shape)}; "
            "give --metric module:function for anything but classification"
        )
    scores = scores.reshape(label.size, -1)
    if label.dtype.kind not in "iu" or label.min() < 0 or label.max() >= scores.shape[1]:
        raise DataError(
            f"{sample.where}: the label {label.tolist()} is no class of 0 to {scores.shape[1] - 1}; store class numbers as "
            "integers, or give --metric module:function"
        )
    column.hits.append(scores.argmax(1) == label)
    if scores.shape[1] >= 10:
        column.top5.append((np.argsort(-scores, 1, kind="stable")[:, :5] == label[:, None]).any(1))


def compared(original: Any, quantized: Any, threads: int, providers: Sequence[str]) -> list[Session]:
    """The sessions that `accuracies` runs: float, emulated, and the real kernels of each provider."""
    return [
        Session(original, threads=threads),
        Session(quantized, threads=threads, config=runtime.EMULATED, fold=size_in_memory(original) <= LARGE),
        *[Session(quantized, threads=threads, provider=provider) for provider in providers],
    ]


@dataclass(frozen=True)
class Comparison:
    """What `validate` found out: an accuracy for each provider, a latency for each provider, thread count and batch."""

    accuracies: list[Accuracy]
    latencies: list[Latency]
    kernels: dict[str, int]
    integer: int
    float: int
    float_bytes: int
    quantized_bytes: int
    machine: dict[str, Any]
    missed_gates: list[str]

    @property
    def accuracy(self) -> Accuracy:
        """On the first provider."""
        return self.accuracies[0]

    @property
    def latency(self) -> Latency:
        """The first row: the first provider, thread count and batch."""
        return self.latencies[0]


def missed_gates(
    accuracy: Accuracy | None, latency: Latency | None, max_drop: float | None, min_speedup: float | None
) -> list[str]:
    """A sentence for each gate that is not met. Raises RecipeError where what a gate is about was not measured."""
    missed = []
    if max_drop is not None:
        drop = None if accuracy is None else accuracy.drop
        if drop is None:
            raise RecipeError("max-drop needs a metric: give data with labels, or --metric, and no --no-validate")
        if not drop <= max_drop:  # a NaN is no pass
            missed.append(f"the drop of {drop:.2f} is over --max-drop {max_drop:g}")
    if min_speedup is not None:
        if latency is None:
            raise RecipeError("min-speedup needs the latency to be measured: leave --no-validate out")
        if not latency.speedup[0] >= min_speedup:
            missed.append(f"the speedup of {latency.speedup[0]:.2f} is under --min-speedup {min_speedup:g}")
    return missed


def validate(
    reference: Any,
    quantized: Any,
    data: Any,
    *,
    metric: str | Metric | None = None,
    max_drop: float | None = None,
    min_speedup: float | None = None,
    max_samples: int | None = None,
    images: ImageOptions | None = None,
    provider: str | Sequence[str] = runtime.CPU,
    threads: int | Sequence[int] = 0,
    batch: int | Sequence[int] | None = None,
    warm_up: int = timing.WARM_UP,
    seconds: float = SECONDS,
    seed: int = 0,
    custom_op_library: str | Path | Sequence[str | Path] | None = None,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Comparison:
    """Compare any quantized model with its float model (paths, bytes or protos). Raises OnnxqError.

    Accuracy is measured for each provider; latency for each provider, thread count (0: all cores) and batch, after `warm_up`
    runs, for `seconds` each. The one thread count 0 is all cores for accuracy, and one thread for latency. A batch is of
    that many samples along axis 0 of every input; None times one sample. `min_speedup` is about the first of these rows,
    `max_drop` about every provider. `custom_op_library` is as in `quantize`.
    """
    from onnxq.inspection import compute_counts, count_kernels

    providers = list(dict.fromkeys(runtime.check_provider(name) for name in _listed("provider", provider)))
    counts = _whole("threads", threads, 0, MOST_THREADS)
    sizes = [] if batch is None else _whole("batch", batch, 1, MOST_ROWS)
    _whole("warm_up", warm_up, 0)
    if not 0 <= seconds < float("inf"):
        raise RecipeError(f"seconds is {seconds}; it takes a number from 0 on")
    runtime.register_custom_ops(custom_op_library)
    float_model, candidate = load_any(reference), load_any(quantized)
    most = 0 if 0 in counts else max(counts)
    sessions = compared(float_model.loadable, candidate.loadable, most, providers)
    _check_pair(sessions[0], sessions[2])
    inputs, others = _inputs(sessions[0], float_model), _inputs(sessions[2], candidate)
    check_batches([*inputs, *others], sizes)
    samples = open_samples(data, inputs, images=images, limit=max_samples)
    feeds = _feeds(samples, inputs, sizes, [sessions[0], *sessions[2:]])
    score = load_function(metric) if isinstance(metric, str) else metric
    found = accuracies(
        sessions, samples, data="given", providers=providers, metric=score, progress=progress, total=samples.length
    )
    del sessions  # for their weights not to be there twice
    times = latencies(
        [float_model.loadable, candidate.loadable],
        feeds,
        threads=counts if counts != [0] else [1],
        providers=providers,
        warm_up=warm_up,
        seconds=seconds,
        seed=seed,
        progress=progress,
    )
    kernels = count_kernels(runtime.optimized(candidate.loadable))
    integer, other = compute_counts(kernels)
    return Comparison(
        accuracies=found,
        latencies=times,
        kernels=kernels,
        integer=integer,
        float=other,
        float_bytes=float_model.size,
        quantized_bytes=candidate.size,
        machine=machine.facts(),
        missed_gates=[*_drops(found, max_drop), *missed_gates(None, times[0], None, min_speedup)],
    )


def _drops(found: Sequence[Accuracy], max_drop: float | None) -> list[str]:
    """What is missed on each provider."""
    missed = []
    for accuracy in found:
        where = f"{runtime.short_name(accuracy.provider)}: " if len(found) > 1 else ""
        missed += [f"{where}{gate}" for gate in missed_gates(accuracy, None, max_drop, None)]
    return missed


def _check_pair(reference: Session, candidate: Session) -> None:
    """Raise DataError where the inputs or outputs have other names."""
    names = [[o.name for o in s.outputs] for s in (reference, candidate)]
    if names[0] != names[1]:
        raise DataError(f"the models have other outputs: {names[0]} and {names[1]}; they are not a pair")
    if [i.name for i in reference.inputs] != [i.name for i in candidate.inputs]:
        raise DataError("the models have other inputs; they are not a pair")


def _inputs(session: Session, source: Source) -> list[TensorInfo]:
    return runtime.as_declared(session.inputs, source.proto)


def _feeds(
    samples: Samples, inputs: Sequence[TensorInfo], sizes: Sequence[int], sessions: Sequence[Session]
) -> dict[int | None, dict[str, np.ndarray]]:
    """What is timed: a feed for each batch, or under None the first sample. Each batch has run once, to fail early."""
    if not sizes:
        return {None: next(iter(samples)).feed}
    feeds = batches(samples, inputs, sizes)
    for size, feed in feeds.items():
        for session in sessions:
            session.run(feed, f"{size} rows stacked along axis 0, as --batch asks")
    return {**feeds}


def _listed(key: str, given: Any) -> list[Any]:
    """One value or several, as a list without repeats. Raises RecipeError where there is none."""
    several = isinstance(given, Iterable) and not isinstance(given, str)
    found = list(dict.fromkeys(given if several else [given]))
    if not found:
        raise RecipeError(f"{key} is empty; give one at least")
    return found


def _whole(key: str, given: Any, least: int, most: float = float("inf")) -> list[int]:
    """The same, of whole numbers in these limits. Raises RecipeError at another one."""
    found = _listed(key, given)
    for number in found:
        if not isinstance(number, (int, np.integer)) or not least <= number <= most:
            limits = f"from {least} on" if most == float("inf") else f"from {least} to {most}"
            raise RecipeError(f"{key} is {number}; it takes whole numbers {limits}")
    return [int(number) for number in found]
