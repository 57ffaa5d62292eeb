"""The package as it is imported and installed."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import onnxq
from onnxq.passes import PASSES

ROOT = Path(__file__).parent.parent


def test_the_face_is_sorted_complete_and_importable() -> None:
    assert sorted(onnxq.__all__) == onnxq.__all__
    assert set(onnxq._HOMES) == set(onnxq.__all__)
    for name in onnxq.__all__:
        assert getattr(onnxq, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute quantise"):
        onnxq.quantise  # noqa: B018


def test_passes_are_imported_as_onnxq_passes_only() -> None:
    done = subprocess.run([sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "import onnxq.passes, not passes" in done.stderr


def test_every_folder_of_modules_is_packaged() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    passes = {p.parent.relative_to(ROOT / "passes") for p in (ROOT / "passes").rglob("*.py")}
    own = {p.parent.relative_to(ROOT) for p in (ROOT / "onnxq").rglob("*.py") if "passes" not in p.parts}
    wanted = {".".join(["onnxq", "passes", *folder.parts]) for folder in passes} | {".".join(f.parts) for f in own}
    assert listed == wanted


def test_every_pass_file_is_registered() -> None:
    files = {p.stem.replace("_", "-") for p in (ROOT / "passes").glob("*/*.py") if p.stem != "__init__"}
    assert files == set(PASSES)


def test_the_versions_agree() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == onnxq.__version__


@pytest.mark.parametrize("code", ["import onnxq", "import sys; sys.argv = ['onnxq', '--version']; import onnxq.cli"])
def test_importing_loads_nothing_heavy(code: str) -> None:
    heavy = ("onnxruntime", "onnx_graphsurgeon", "numba", "scipy", "onnx")
    code += f"\nimport sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


ALLOWED = {  # what the files of a stage may import of onnxq
    "recover": {"graph", "model", "numerics", "passmanager", "recovery"},
    "canonicalize": {"graph", "model", "numerics", "passmanager", "errors", "proto", "runtime"},
    "fuse": {"graph", "model", "numerics", "passmanager", "errors", "pattern", "normalization", "rotary"},
    "equalize": {"graph", "model", "numerics", "passmanager", "errors", "equalization", "sketch", "streams"},
    "place": {"graph", "model", "numerics", "passmanager", "errors"},
    "observe": {
        "graph",
        "model",
        "numerics",
        "passmanager",
        "errors",
        "calibration",
        "collection",
        "data",
        "store",
        "observers",
        "runtime",
        "sketch",
        "weights",
    },
    "select": {
        "graph",
        "model",
        "numerics",
        "passmanager",
        "errors",
        "costs",
        "audit",
        "runtime",
        "saturation",
        "rows",
        "emulation",
        "sketch",
    },
    "refine": {
        "graph",
        "model",
        "numerics",
        "passmanager",
        "errors",
        "runtime",
        "sketch",
        "saturation",
        "biases",
        "rows",
        "rounding",
    },
    "lower": {"graph", "model", "numerics", "passmanager", "errors", "weights"},
}


@pytest.mark.parametrize("stage", ALLOWED)
def test_a_stage_imports_what_it_may(stage: str) -> None:
    for path in (ROOT / "passes" / stage).glob("*.py"):
        text = path.read_text()
        found = set(re.findall(r"^\s*from onnxq\.(\w+)", text, re.MULTILINE))
        found |= {n.strip() for line in re.findall(r"^from onnxq import (.+)$", text, re.MULTILINE) for n in line.split(",")}
        assert found <= ALLOWED[stage], path.name


def test_the_catalogue_of_passes_is_up_to_date(request: pytest.FixtureRequest) -> None:
    path, text = ROOT / "passes" / "README.md", catalogue()
    if request.config.getoption("--update-golden"):
        path.write_text(text)
    assert path.read_text() == text


def catalogue() -> str:
    """passes/README.md: a table for each stage, from the docstrings."""
    lines = ["# The passes", "", "In running order. Made from the docstrings; `onnxq passes NAME` prints all of one.", ""]
    for stage in dict.fromkeys(kind.__module__.split(".")[2] for kind in PASSES.values()):
        lines += [f"## {stage}", "", (sys.modules[f"onnxq.passes.{stage}"].__doc__ or "").strip(), ""]
        lines += ["| pass | what it does |", "|---|---|"]
        members = [k for k in PASSES.values() if k.__module__.split(".")[2] == stage]
        lines += [f"| `{k.name}` | {(k.__doc__ or '').splitlines()[0]} |" for k in members] + [""]
    return "\n".join(lines)
