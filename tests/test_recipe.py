"""recipe.py and target.py: validated, with the key and the allowed values in every error."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxq import machine, target
from onnxq.errors import RecipeError
from onnxq.numerics import QuantType
from onnxq.recipe import Recipe, load


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(text)
    return path


def test_the_default_recipe() -> None:
    assert load(None) == Recipe()
    assert load(None).target == "host"
    assert load(None).options("insert-qdq") == {}


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, 'target = "cpu"\nobserver = "kl"\n[gates]\nmax_drop = 1.0\n')
    recipe = load(path, observer="mse", target=None, gates={"max_drop": None, "min_speedup": 2.0})
    assert (recipe.target, recipe.observer) == ("cpu", "mse")
    assert (recipe.gates.max_drop, recipe.gates.min_speedup) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("targt = 'cpu'", "unknown key targt; did you mean target"),
        ("target = 'cpuu'", "unknown target cpuu; did you mean cpu"),
        ("observer = 'mze'", "unknown observer mze; did you mean mse"),
        ("target = 3", "target is 3"),
        ("schema = 2", "schema is 2"),
        ("[[override]]\nmatch = 'a'\nobservr = 'kl'", "unknown key override.0.observr; did you mean observer"),
        ("[passes]\ninsert-qdqs = false", "unknown pass insert-qdqs; did you mean insert-qdq"),
        ("[passes]\nrepair-saturation = { row = 3 }", "no option row; did you mean rows"),
        ("[passes]\nrepair-saturation = { rows = 'many' }", "it takes a int"),
        ("[gates]\nmax_dorp = 1", "unknown key gates.max_dorp; did you mean max_drop"),
        ("target = ", "cannot be read"),
    ],
)
def test_every_mistake_is_named_with_what_is_valid(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.toml cannot be read"):
        load(tmp_path / "none.toml")


def test_targets_are_read_from_their_files() -> None:
    assert {"cpu", "host"} <= set(target.names())
    cpu = target.load("cpu")
    assert (cpu.activation_type, cpu.weight_type) == (QuantType.UINT8, QuantType.INT8)
    assert cpu.saturates
    assert cpu.compute["Conv"].output == "required"


def test_host_is_cpu_for_this_machine() -> None:
    cpu, host = target.load("cpu"), target.load("host")
    assert host.saturates == machine.u8s8_saturates()
    assert (host.compute, host.region, host.pass_through) == (cpu.compute, cpu.region, cpu.pass_through)


@pytest.mark.parametrize(
    ("architecture", "flags", "saturates"),
    [
        ("x86_64", {"avx2"}, True),
        ("x86_64", {"avx2", "avx512bw"}, True),
        ("x86_64", {"avx2", "avx512_vnni"}, False),
        ("AMD64", {"avx_vnni"}, False),
        ("x86_64", set(), True),
        ("aarch64", set(), False),
        ("arm64", {"asimddp"}, False),
    ],
)
def test_saturation_follows_from_the_cpu(
    monkeypatch: pytest.MonkeyPatch, architecture: str, flags: set[str], saturates: bool
) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: architecture)
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(flags))
    assert machine.u8s8_saturates() is saturates
