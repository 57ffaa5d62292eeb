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
