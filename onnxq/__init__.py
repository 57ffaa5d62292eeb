"""onnxq: an ONNX graph-rewriting post-training quantizer.

    import onnxq

    report = onnxq.quantize("model.onnx", "calibration.npz", output="model.int8.onnx")

Names are imported when they are first used, so that `import onnxq` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Calibration": "calibration",
    "CalibrationError": "errors",
    "DataError": "errors",
    "GateError": "errors",
    "ImageOptions": "images",
    "ModelError": "errors",
    "OnnxqError": "errors",
    "OutputError": "errors",
    "Pass": "passmanager",
    "PassError": "errors",
    "PassManager": "passmanager",
    "Recipe": "recipe",
    "RecipeError": "errors",
    "Report": "report",
    "UnsupportedModelError": "errors",
    "calibrate": "pipeline",
    "check": "checking",
    "merge": "calibration",
    "quantize": "pipeline",
    "validate": "validation",
}

__all__ = [
    "Calibration",
    "CalibrationError",
    "DataError",
    "GateError",
    "ImageOptions",
    "ModelError",
    "OnnxqError",
    "OutputError",
    "Pass",
    "PassError",
    "PassManager",
    "Recipe",
    "RecipeError",
    "Report",
    "UnsupportedModelError",
    "calibrate",
    "check",
    "merge",
    "quantize",
    "validate",
]

if TYPE_CHECKING:
    from onnxq.calibration import Calibration, merge
    from onnxq.checking import check
    from onnxq.errors import (
        CalibrationError,
        DataError,
        GateError,
        ModelError,
        OnnxqError,
        OutputError,
        PassError,
        RecipeError,
        UnsupportedModelError,
    )
    from onnxq.images import ImageOptions
    from onnxq.passmanager import Pass, PassManager
    from onnxq.pipeline import calibrate, quantize
    from onnxq.recipe import Recipe
    from onnxq.report import Report
    from onnxq.validation import validate


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module onnxq has no attribute {name}")
    return getattr(import_module(f"onnxq.{_HOMES[name]}"), name)
