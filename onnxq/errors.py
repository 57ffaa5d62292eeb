"""Every error that onnxq raises on purpose.

    OnnxqError                        exit code 2
    ├── ModelError (ValueError)       the file is no ONNX model, is truncated, or lacks its external data
    │   └── UnsupportedModelError     a sound model of a kind that onnxq does not quantize
    ├── DataError (ValueError)        calibration or evaluation data that does not fit the model
    ├── CalibrationError (ValueError) activations or a calibration file that cannot be used
    ├── RecipeError (ValueError)      an unknown or ill-typed option, target, observer or pass
    ├── OutputError (OSError)         the result cannot be written
    ├── PassError                     a pass left the model in a state that it must not leave
    └── GateError                     a gate was missed; exit code 1

A message names what went wrong, where (pass, tensor, sample, key) and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OnnxqError(Exception):
    exit_code = 2


class ModelError(OnnxqError, ValueError):
    pass


class UnsupportedModelError(ModelError):
    pass


class DataError(OnnxqError, ValueError):
    pass


class CalibrationError(OnnxqError, ValueError):
    pass


class RecipeError(OnnxqError, ValueError):
    pass


class OutputError(OnnxqError, OSError):
    pass


class PassError(OnnxqError):
    pass


class GateError(OnnxqError):
    exit_code = 1


def nearest(name: str, valid: Iterable[str]) -> str:
    """The tail of an "unknown ..." message: the closest valid names, or all of them."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"valid: {', '.join(valid)}"
