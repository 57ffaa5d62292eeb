"""Latency of a quantized model beside its float model: interleaved runs, with a second float copy as the control."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from onnxq import runtime, timing
from onnxq.runtime import Session
from onnxq.source import size_in_memory

LARGE = 1 << 28  # bytes of a model of which memory for one copy is enough to ask for
SECONDS = 3.0  # of timing


@dataclass(frozen=True)
class Latency:
    """Milliseconds, interleaved; `speedup` is float over quantized, `control` float over a second copy of itself.

    Each ratio is (median of the paired ratios, low, high of its 95 % bootstrap interval). `threads`: 0 for all cores.
    `batch`: samples along axis 0 of every input; None: one sample, as the data has it.
    """

    threads: int
    rounds: int
    float_median: float
    float_p90: float
    float_p99: float
    quantized_median: float
    quantized_p90: float
    quantized_p99: float
    speedup: tuple[float, float, float]
    control: tuple[float, float, float]
    provider: str = runtime.CPU
    batch: int | None = None
    warm_up: int = timing.WARM_UP

    @property
    def float_p50(self) -> float:
        """The median, by the name that goes with the others."""
        return self.float_median

    @property
    def quantized_p50(self) -> float:
        return self.quantized_median

    @property
    def verdict(self) -> str:
        """faster, slower, or equal within the control's interval."""
        low, high = min(1.0, self.control[1]), max(1.0, self.control[2])
        if self.speedup[1] > high:
            return "faster"
        return "slower" if self.speedup[2] < low else "equal"


def latencies(
    models: Sequence[Any],
    feeds: Mapping[int | None, Mapping[str, np.ndarray]],
    *,
    threads: Sequence[int],
    providers: Sequence[str] = (runtime.CPU,),
    warm_up: int = timing.WARM_UP,
    seconds: float = SECONDS,
    seed: int = 0,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> list[Latency]:
    """Time (float, quantized), with a second copy of the float model as the control, `seconds` for each row.

    A row is a provider, a thread count and a feed, which goes by its batch; the last changes first. The sessions of a row
    are gone before those of the next are made. Of a model over LARGE bytes there is no second copy: it is run twice.
    """
    again = size_in_memory(models[0]) <= LARGE
    rows = list(product(providers, threads, feeds))
    found = []
    for k, (provider, count, batch) in enumerate(rows):
        bar = None if progress is None else lambda share, k=k: progress("timing", round(100 * (k + share)), 100 * len(rows))
        times = _times(
            models, feeds[batch], again, count, provider, warm_up=warm_up, seconds=seconds, seed=seed, progress=bar
        )
        found.append(_summary(times, threads=count, provider=provider, batch=batch, warm_up=warm_up))
    return found


def _times(
    models: Sequence[Any], feed: Mapping[str, np.ndarray], again: bool, threads: int, provider: str, **how: Any
) -> np.ndarray:
    """Milliseconds (rounds, 3) of float, float again, and quantized; `again`: by a second copy."""
    make = partial(Session, threads=threads, provider=provider, config=runtime.TAKING_TURNS)
    sessions = [make(m) for m in models]
    sessions.insert(1, make(models[0]) if again else sessions[0])
    return timing.time_paired([lambda s=s: s.run(feed) for s in sessions], **how)


def _summary(times: np.ndarray, **settings: Any) -> Latency:
    reference, control, quantized = times.T
    medians, p90, p99 = np.quantile(times[:, [0, 2]], [0.5, 0.9, 0.99], axis=0).tolist()
    return Latency(
        rounds=len(times),
        float_median=medians[0],
        float_p90=p90[0],
        float_p99=p99[0],
        quantized_median=medians[1],
        quantized_p90=p90[1],
        quantized_p99=p99[1],
        speedup=ratio_interval(reference, quantized),
        control=ratio_interval(reference, control),
        **settings,
    )


def ratio_interval(above: np.ndarray, below: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """(median of the paired ratios, and the ends of its 95 % bootstrap interval from 1,000 resamples)."""
    ratios = above / below
    rng = np.random.default_rng(seed)
    resampled = np.median(rng.choice(ratios, (1000, len(ratios))), 1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)
