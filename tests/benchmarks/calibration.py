"""Calibration against plain inference of the same feeds, and its memory against the number of samples, in one run.

    python tests/benchmarks/calibration.py [MODEL.onnx DATA]

Prints ratios only: wall time of calibration with full sketches over onnxruntime inference of the same feeds, and peak
resident memory with eight times the samples over that with one time.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import onnxq
from onnxq.data import open_samples
from onnxq.runtime import Session

MODELS = Path(__file__).parent.parent.parent / "models"
ROUNDS = 5


def time_ratio(model: str, data: str) -> float:
    """The median over interleaved rounds, the first of which only warms up."""
    session = Session(model, threads=1)
    samples = list(open_samples(data, session.inputs))
    ratios = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        for sample in samples:
            session.run(sample.feed)
        inference = time.perf_counter() - start
        start = time.perf_counter()
        onnxq.calibrate(model, samples, threads=1)
        ratios.append((time.perf_counter() - start) / inference)
    return sorted(ratios[1:])[ROUNDS // 2]


def peak(model: str, data: str, times: int) -> int:
    """Peak resident memory, in a process of its own, of calibrating on the first 16 samples, repeated."""
    code = (
        "import itertools, resource, sys, onnxq; from onnxq.data import open_samples; from onnxq.runtime import Session;"
        "model, data, times = sys.argv[1], sys.argv[2], int(sys.argv[3]);"
        "few = [s.feed for s in open_samples(data, Session(model).inputs, limit=16)];"
        "onnxq.calibrate(model, (f for _ in range(times) for f in few), threads=1);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code, model, data, str(times)], capture_output=True, text=True, check=True)
    return int(done.stdout)


if __name__ == "__main__":
    model, data = sys.argv[1:] or [str(MODELS / "residual.onnx"), str(MODELS / "digits_calibration.npz")]
    print(f"calibration / inference, wall time: {time_ratio(model, data):.2f}")
    print(f"peak memory, 128 samples / 16 samples: {peak(model, data, 8) / peak(model, data, 1):.3f}")
