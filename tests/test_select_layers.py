"""select-layers: how many labels are expected to change."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.passes.select.select_layers import _changed_labels

RNG = np.random.default_rng(0)


def changed(exact: np.ndarray, rounded: np.ndarray) -> float:
    return _changed_labels([{"y": exact}], [{"y": rounded}], ["y"], 1.0)


@pytest.mark.parametrize("shape", [(40_000, 10), (40_000, 3, 1, 1)])
def test_it_is_about_what_really_changes(shape: tuple[int, ...]) -> None:
    exact = RNG.standard_normal(shape)
    rounded = exact + 0.3 * RNG.standard_normal(shape)
    really = float((exact.argmax(1) != rounded.argmax(1)).mean())
    assert changed(exact, rounded) == pytest.approx(really, rel=0.35)


def test_scores_without_errors_and_scores_that_tie_change_nothing() -> None:
    exact = RNG.standard_normal((5, 4))
    assert changed(exact, exact) == 0
    assert changed(np.zeros((4, 5)), np.zeros((4, 5))) == 0
    assert changed(np.zeros((4, 5)), RNG.standard_normal((4, 5))) == 0


def test_one_score_has_no_label() -> None:
    assert changed(np.ones((4, 1)), np.zeros((4, 1))) <= 0.01
