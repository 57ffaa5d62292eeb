from __future__ import annotations

from pathlib import Path

import pytest

MODELS = Path(__file__).parent.parent / "models"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write what the passes give into the golden files")


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder of the shipped models and their data."""
    return MODELS


@pytest.fixture(autouse=True)
def everything_in_integers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Placements are not timed in tests, whose outcome is not to depend on the machine; `measured` ones do it."""
    if request.node.get_closest_marker("measured") is None:
        monkeypatch.setattr("onnxq.building.fastest", lambda first, *_, **__: first)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are held and counted after a run, as where onnxruntime's library for C is not there."""
    monkeypatch.setattr("onnxq.collector.is_possible", lambda _: False)
