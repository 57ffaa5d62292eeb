"""cones.py: what changes the hash of all that a tensor is computed from, and what does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

import onnxq
from onnxq.cones import cones_of
from onnxq.errors import CalibrationError

NET = """<ir_version: 9, opset_import: ["" : 17]>
net (float[N, 3] x, bool c) => (float[N, 3] y) <float[1] w = {2.0}> {
  a = Mul (x, w)
  s = Softmax <axis = 1> (a)
  b = If (c) <
    then_branch = t () => (float[N, 3] u) { u = Mul (s, w) },
    else_branch = e () => (float[N, 3] v) { v = Neg (s) }
  >
  y = Add (b, x)
}"""


def cones(old: str = "", new: str = "") -> dict[str, str]:
    assert old in NET
    return cones_of(onnx.parser.parse_model(NET.replace(old, new) if old else NET))


def changed(old: str, new: str) -> set[str]:
    before, after = cones(), cones(old, new)
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("{2.0}", "{3.0}", {"w", "a", "s", "b", "y"}),
        ("axis = 1", "axis = 0", {"s", "b", "y"}),
        ("Mul (x, w)", "Add (x, w)", {"a", "s", "b", "y"}),
        ("Mul (x, w)", "Mul (w, x)", {"a", "s", "b", "y"}),
        ("Neg (s)", "Abs (s)", {"b", "y"}),
        ("Neg (s)", "Neg (a)", {"b", "y"}),
        ("y = Add (b, x)", "y = Sub (b, x)", {"y"}),
        ('"" : 17', '"" : 11', {"a", "s", "b", "y"}),  # of these ops the version before
        ('"" : 17', '"" : 18', set()),  # not of these
    ],
)
def test_a_change_is_seen_by_all_that_is_computed_from_it(old: str, new: str, expected: set[str]) -> None:
    assert changed(old, new) == expected


def test_names_do_not_count() -> None:
    before, after = cones(), cones("u) { u = Mul (s, w) }", "q) { q = Mul (s, w) }")
    assert before == after
    renamed = cones_of(onnx.parser.parse_model(NET.replace("a = Mul", "k = Mul").replace("(a)", "(k)")))
    assert renamed["k"] == before["a"]
    assert renamed["y"] == before["y"]


def test_the_interface_does() -> None:
    renamed = cones_of(onnx.parser.parse_model(NET.replace("x", "z").replace("Softmaz <azis", "Softmax <axis")))
    assert renamed["a"] != cones()["a"]


def test_statistics_serve_another_target_and_recipe_as_far_as_they_go(models: Path, tmp_path: Path) -> None:
    """What two recipes compute alike is collected once; the rest is named, with what collects it."""
    images = np.load(models / "digits_calibration.npz")["image"][:16]
    feeds = [{"image": image[None]} for image in images]
    path = tmp_path / "m.calib"
    onnxq.calibrate(models / "residual.onnx", feeds, output=path)
    for target in ("cpu", "tensorrt", "openvino"):
        report = onnxq.quantize(models / "residual.onnx", calibration=path, target=target, validate=False)
        assert report.samples == 16
    recipe = onnxq.Recipe.model_validate({"schema": 1, "passes": {"fuse-conv-batchnorm": False}})
    with pytest.raises(CalibrationError, match=r"no statistics of \d+ tensors .* another recipe, target or version"):
        onnxq.quantize(models / "residual.onnx", calibration=path, recipe=recipe, validate=False)
