"""The README is a promise: its commands, its Python and its recipe are run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from onnxq.recipe import Recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "models", tmp_path / "models")
    return tmp_path


@pytest.mark.slow
def test_the_command_lines_run(checkout: Path) -> None:
    commands = [line for block in blocks("console") for line in block.splitlines() if line.startswith("onnxq ")]
    assert len(commands) >= 8
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", *shlex.split(command)],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert (checkout / "residual.int8.onnx").is_file()


def test_the_python_runs(checkout: Path) -> None:
    for code in blocks("python"):
        done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.split()) >= 3


def test_the_recipe_is_one() -> None:
    (text,) = blocks("toml")
    recipe = Recipe.model_validate(tomllib.loads(text))
    assert recipe.gates.max_drop == 1.0


def test_the_make_targets_are_what_stands_beside_them() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in blocks("console")[0].splitlines():
        assert re.search(rf"^{line.removeprefix('make ')}:", makefile, re.MULTILINE)
    by_hand = next(line for line in blocks("console")[1].splitlines() if line.startswith("onnxq quantize"))
    for word in shlex.split(by_hand)[1:3]:
        assert word in makefile


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists()
