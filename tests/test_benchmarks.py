"""The calibration benchmark runs, on fewer feeds than are looked at first and on more."""

from __future__ import annotations

import pytest

from tests.benchmarks.calibration import in_process

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("count", [8, 40])
def test_onnxq_is_measured(count: int) -> None:
    found = in_process("onnxq", "inverted_residual", count, 1, timed=True)
    assert 0 < found["collecting"] < found["whole"]
    assert found["first"] > 0
    assert (found["running"] > 0) == (count > 32)


def test_onnxruntime_is_measured() -> None:
    found = in_process("ort MinMax", "inverted_residual", 4, 1, timed=True)
    assert 0 < found["inference"] < found["collecting"]
