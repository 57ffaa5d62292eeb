"""Latency of a quantized model beside its float model: interleaved runs, with a second float copy as the control."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq import runtime
from onnxq.runtime import Session
from onnxq.source import size_in_memory

LARGE = 1 << 28  # bytes of a model of which memory for one copy is enough to ask for


@dataclass(frozen=True)
class Latency:
    """Milliseconds, interleaved; `speedup` is float over quantized, `control` float over a second copy of itself.

    Each ratio is (median of the paired ratios, low, high of its 95 % bootstrap interval).
    """

    threads: int
    rounds: int
    float_median: float
    float_p90: float
    quantized_median: float
    quantized_p90: float
    speedup: tuple[float, float, float]
    control: tuple[float, float, float]

    @property
    def verdict(self) -> str:
        """faster, slower, or equal within the control's interval."""
        low, high = min(1.0, self.control[1]), max(1.0, self.control[2])
        if self.speedup[1] > high:
            return "faster"
        return "slower" if self.speedup[2] < low else "equal"


def latency(
    models: Sequence[Any],
    feed: Mapping[str, np.ndarray],
    *,
    threads: int = 1,
    provider: str = runtime.CPU,
    seconds: float = 3.0,
    seed: int = 0,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Latency:
    """Time (float, quantized) on one feed, with a second copy of the float model as the control.

    Of a model over LARGE bytes there is no second copy: it is run twice.
    """
    sessions = [Session(m, threads=threads, provider=provider) for m in models]
    again = sessions[0] if size_in_memory(models[0]) > LARGE else Session(models[0], threads=threads, provider=provider)
    sessions.insert(1, again)
    bar = None if progress is None else lambda share: progress("timing", round(100 * share), 100)
    times = runtime.time_paired([lambda s=s: s.run(feed) for s in sessions], seconds=seconds, progress=bar, seed=seed)
    reference, control, quantized = times.T
    return Latency(
        threads=threads,
        rounds=len(times),
        float_median=float(np.median(reference)),
        float_p90=float(np.quantile(reference, 0.9)),
        quantized_median=float(np.median(quantized)),
        quantized_p90=float(np.quantile(quantized, 0.9)),
        speedup=ratio_interval(reference, quantized),
        control=ratio_interval(reference, control),
    )


def ratio_interval(above: np.ndarray, below: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """(median of the paired ratios, and the ends of its 95 % bootstrap interval from 1,000 resamples)."""
    ratios = above / below
    rng = np.random.default_rng(seed)
    resampled = np.median(rng.choice(ratios, (1000, len(ratios))), 1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)
