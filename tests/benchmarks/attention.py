"""Attention's products of activations in float against integers, both against the float model, in one run.

    python tests/benchmarks/attention.py [MODEL.onnx DATA]

Prints ratios only: latency of the float model over that of each result, medians of interleaved runs on one thread.
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnxq
from onnxq.recipe import Recipe

MODELS = Path(__file__).parent.parent.parent / "models"

if __name__ == "__main__":
    model, data = sys.argv[1:] or [str(MODELS / "vision_transformer.onnx"), str(MODELS / "digits_calibration.npz")]
    for integers in (False, True):
        recipe = Recipe(target="cpu", passes={"annotate-attention": {"integers": integers}})
        report = onnxq.quantize(model, data, recipe=recipe, threads=1)
        assert report.latency is not None
        said = "integers" if integers else "float"
        share = f"{100 * report.integer_share:.0f} % of the compute nodes in integers"
        print(f"attention's products in {said}: {report.latency.speedup[0]:.2f}x the float model, {share}")
