"""ranges.py: what is saved and given back unchanged gives the same model; what is edited counts."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnxq
from onnxq.errors import RecipeError
from onnxq.numerics import QuantType, params_of_range
from onnxq.observers import observer
from onnxq.ranges import load, to_toml, unlike
from onnxq.sketch import TensorSketch

LOW, HIGH = st.floats(-1e6, -1e-6), st.floats(0, 1e6)


@given(LOW, HIGH, st.sampled_from([QuantType.UINT8, QuantType.INT8]), st.booleans(), st.text(min_size=1))
def test_what_is_written_and_read_gives_the_same_parameters(
    low: float, high: float, kind: QuantType, even: bool, name: str
) -> None:
    params = params_of_range(low, high, kind, symmetric=even)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "r.toml"
        path.write_text(to_toml({name: params}, symmetric=even), encoding="utf-8")
        (override,) = load(path)
    assert fnmatchcase(name, override.match)
    chosen = observer(override.observer).choose(TensorSketch(), kind, symmetric=even)
    again = params_of_range(*chosen, kind, symmetric=even)
    assert (float(again.scale), int(again.zero_point)) == (float(params.scale), int(params.zero_point))


def test_ranges_given_back_give_the_same_bytes_and_edited_ones_count(models: Path, tmp_path: Path) -> None:
    model, data = models / "residual.onnx", models / "digits_calibration.npz"
    first = onnxq.quantize(model, data, target="cpu", validate=False)
    path = tmp_path / "r.toml"
    path.write_text(first.ranges_toml, encoding="utf-8")
    again = onnxq.quantize(model, data, target="cpu", ranges=path, validate=False)
    assert [t.SerializeToString() for t in again.model.graph.initializer] == [
        t.SerializeToString() for t in first.model.graph.initializer
    ]
    said = tomllib.loads(first.ranges_toml)["ranges"]
    assert len(said) > 5
    name, old = next((n, r) for n, r in said.items() if r["zero_point"] == 0)
    path.write_text(f'schema = 1\n[ranges."{name}"]\nmin = 0.0\nmax = {2 * old["max"]}\n', encoding="utf-8")
    edited = tomllib.loads(onnxq.quantize(model, data, target="cpu", ranges=path, validate=False).ranges_toml)["ranges"]
    assert edited[name]["scale"] == pytest.approx(2 * old["scale"])
    assert {n: r for n, r in edited.items() if n != name} == {n: r for n, r in said.items() if n != name}


def test_a_scale_alone_counts_and_what_does_not_count_is_told(models: Path, tmp_path: Path) -> None:
    model, data, path = models / "residual.onnx", models / "digits_calibration.npz", tmp_path / "r.toml"
    first = onnxq.quantize(model, data, target="cpu", max_samples=8, validate=False)
    name, old = next((n, r) for n, r in tomllib.loads(first.ranges_toml)["ranges"].items() if r["zero_point"] > 3)

    def came_of(text: str) -> tuple[dict[str, object], list[str]]:
        path.write_text(f'schema = 1\n[ranges."{name}"]\n{text}', encoding="utf-8-sig")  # as editors on Windows write it
        found = onnxq.quantize(model, data, target="cpu", ranges=path, max_samples=8, validate=False)
        return tomllib.loads(found.ranges_toml)["ranges"][name], [n for n in found.notes if str(path) in n]

    found, notes = came_of(f"scale = {1.5 * old['scale']}\nzero_point = {old['zero_point'] + 2}\n")
    assert (found["scale"], found["zero_point"]) == (pytest.approx(1.5 * old["scale"]), old["zero_point"] + 2)
    assert notes == []
    given = f"min = {old['min']}\nmax = {old['max']}\n"
    found, notes = came_of(f"{given}scale = 1.0\n")
    assert (found["scale"], found["zero_point"], found["type"]) == (old["scale"], old["zero_point"], old["type"])
    assert notes[0].startswith(f"Of {name}, type, bits, scale or zero_point in")
    for stale, is_told in (
        (f"scale = {old['scale']}\nzero_point = {old['zero_point']}", False),
        ("zero_point = 7", True),
        ('type = "uint16"', True),
        ("bits = 6", True),
    ):
        path.write_text(f'schema = 1\n[ranges."{name}"]\n{given}{stale}\n', encoding="utf-8")
        assert bool(unlike(path, first.ranges_toml)) == is_told


def test_a_name_that_is_not_there_is_told_with_the_file(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("schema = 1\n[ranges.imag]\nmin = 0\nmax = 2\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"the ranges .*r.toml: imag matches no quantized tensor; did you mean image"):
        onnxq.quantize(
            models / "residual.onnx", models / "digits_calibration.npz", ranges=path, max_samples=8, validate=False
        )


def test_names_with_wildcards_are_names(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('schema = 1\n[ranges."a[0]*"]\nmin = -1\nmax = 2\n', encoding="utf-8")
    (override,) = load(path)
    assert fnmatchcase("a[0]*", override.match)
    assert not fnmatchcase("a0x", override.match)
    sketch = TensorSketch()
    sketch.update(np.ones(3, np.float32))
    assert observer(override.observer).choose(sketch, QuantType.UINT8) == (-1.0, 2.0)


def test_ranges_hold_at_other_widths(models: Path, tmp_path: Path) -> None:
    model, data, path = models / "residual.onnx", models / "digits_calibration.npz", tmp_path / "r.toml"
    path.write_text(onnxq.quantize(model, data, max_samples=16, validate=False).ranges_toml, encoding="utf-8")
    said = tomllib.loads(path.read_text(encoding="utf-8"))["ranges"]
    wide = onnxq.quantize(model, data, max_samples=16, ranges=path, activation_bits=16, validate=False)
    for name, found in tomllib.loads(wide.ranges_toml)["ranges"].items():
        assert found["max"] == pytest.approx(said[name]["max"], rel=1e-2, abs=1e-2)
        assert found["min"] == pytest.approx(said[name]["min"], rel=1e-2, abs=1e-2)


def test_a_tensor_that_is_named_like_an_op_speaks_for_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("schema = 1\n[ranges.Relu]\nmin = 0\nmax = 2\n", encoding="utf-8")
    (override,) = load(path)
    assert override.match != "Relu"
    assert fnmatchcase("Relu", override.match)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("schema = 1\n[ranges.x]\nmin = 1\nmax = 0\n", "ranges.x: it needs min < max, float32 numbers, not 1.0 and 0.0"),
        ("schema = 1\n[ranges.x]\nmin = 0\nmax = inf\n", "ranges.x: option upper .* is inf; it takes a finite number"),
        ("schema = 1\n[ranges.x]\nmin = 0\nmax = 1\nbits = 99\n", "ranges.x.bits"),
        (
            "schema = 1\n[ranges.x]\nmin = 0\nmax = 1e-45\n",
            "ranges.x: it needs min < max, float32 numbers, not 0.0 and 1",
        ),
        ("schema = 1\n[ranges.x]\nmin = 1\n", "ranges.x: of min and max there is only one; give both"),
        ("schema = 1\n[ranges.x]\nzero_point = 1\n", "ranges.x: there is neither a range, min and max, nor a scale"),
        ("schema = 1\n[ranges.x]\nscale = -1.0\n", "ranges.x: fixed-scale needs a positive scale"),
        ("schema = 1\n[ranges]\nx = 1\n", "ranges.x: it is no table of keys"),
        ("schema = 2\n", "schema: input should be 1"),
        ("schema = ", "cannot be read"),
    ],
)
def test_bad_files_are_explained(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "r.toml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=words):
        load(tmp_path / "r.toml")
