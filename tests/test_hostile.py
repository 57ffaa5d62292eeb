"""Files that were made to do harm, or by accident: refused with a reason; nothing is written, nothing read elsewhere."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

import onnxq
from onnxq.errors import OnnxqError

WEIGHT = numpy_helper.from_array(np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3), "w")
PRODUCT = [helper.make_node("MatMul", ["x", "w"], ["y"])]
FEEDS = [{"x": np.ones((1, 4), np.float32)}]


def model(nodes: Sequence[NodeProto], weights: Sequence[TensorProto] = (), opset: int = 17) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(list(nodes), "g", [x], [y], list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def external(location: str, **more: int) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 3], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    for key, number in more.items():
        tensor.external_data.add(key=key, value=str(number))
    return tensor


def declared(*dims: int, raw: bytes = b"") -> TensorProto:
    return TensorProto(name="w", data_type=TensorProto.FLOAT, dims=list(dims), raw_data=raw)


def node(kind: str, inputs: str, output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


def numbers(name: str, *values: int) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


SUM = [node("ReduceSum", "k", "r", keepdims=0), node("Add", "x r", "y")]
CASES: dict[str, tuple[onnx.ModelProto, str]] = {
    "parent folder": (model(PRODUCT, [external("../secret.bin")]), "points outside the directory"),
    "link": (model(PRODUCT, [external("link.bin")]), "symbolic link"),
    "folder": (model(PRODUCT, [external(".")]), "not regular file"),
    "no location": (model(PRODUCT, [external("")]), "should not be empty"),
    "offset before the file": (model(PRODUCT, [external("w.bin", offset=-4)]), "offset must be non-negative"),
    "offset beyond the file": (model(PRODUCT, [external("w.bin", offset=1 << 40)]), "exceeds file size"),
    "length beyond the file": (model(PRODUCT, [external("w.bin", length=1 << 40)]), "exceeds available data"),
    "a weight of 16 TB": (model(PRODUCT, [declared(4, 1 << 40)]), "declares a size of 17592186044416 bytes"),
    "a negative dimension": (model(PRODUCT, [declared(4, -3)]), "Out of bounds dimensions"),
    "a weight that is cut": (model(PRODUCT, [declared(4, 3, raw=b"123")]), "size mismatch"),
    "a zero point of another field": (
        model(
            [
                node("QuantizeLinear", "x scale zero", "q"),
                node("DequantizeLinear", "q scale zero", "d"),
                node("MatMul", "d w", "y"),
            ],
            [
                TensorProto(name="scale", data_type=TensorProto.FLOAT, float_data=[0.1]),
                TensorProto(name="zero", data_type=TensorProto.FLOAT, int32_data=[0]),
                WEIGHT,
            ],
        ),
        "the constant zero cannot be read: .*; export the model again",
    ),
    "4 TB of ones": (model([node("ConstantOfShape", "s", "k"), *SUM], [numbers("s", 1 << 40)]), "cannot run the model"),
    "an Expand to 64 TB": (
        model(
            [node("Cast", "one", "o", to=1), node("Expand", "o s", "k"), *SUM],
            [numbers("one", 1), numbers("s", 1 << 22, 1 << 22)],
        ),
        "cannot run the model",
    ),
    "a cycle": (
        model([node("Add", "x b", "a"), node("Relu", "a", "b"), node("MatMul", "b w", "y")], [WEIGHT]),
        "not a graph input, initializer, or output of a previous node",
    ),
    "a node that reads itself": (model([node("Add", "x y", "y")]), "not acyclic"),
    "a tensor from nowhere": (model([node("Add", "x nothing", "y")]), "Node input 'nothing'"),
    "a tensor made twice": (model([node("Relu", "x", "y"), node("Neg", "x", "y")]), "Duplicate definition of name"),
    "an op that is none": (model([node("Foo", "x", "y")]), "Foo"),
    "an opset to come": (model(PRODUCT, [WEIGHT], opset=999), "999"),
    "an attribute that is none": (model([node("Relu", "x", "y", axis="z")]), "axis"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file of weights, and one outside of it."""
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.bin").write_bytes(np.full(12, 7, np.float32).tobytes())
    (inside / "w.bin").write_bytes(np.ones(12, np.float32).tobytes())
    (inside / "link.bin").symlink_to(tmp_path / "secret.bin")
    monkeypatch.chdir(inside)
    return inside


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_with_the_reason(name: str, folder: Path) -> None:
    proto, words = CASES[name]
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    before = set(os.listdir(folder))
    with pytest.raises(OnnxqError) as refused:
        onnxq.quantize(folder / "m.onnx", FEEDS, target="cpu", output=folder / "out.onnx")
    assert re.search(words, str(refused.value))
    assert set(os.listdir(folder)) == before


def test_an_absolute_path_of_weights_is_refused(folder: Path) -> None:
    (folder / "m.onnx").write_bytes(model(PRODUCT, [external(str(folder / "w.bin"))]).SerializeToString())
    with pytest.raises(OnnxqError, match="should be a relative path"):
        onnxq.quantize(folder / "m.onnx", FEEDS, target="cpu")


def test_nodes_in_any_order_and_of_one_name_go_through(folder: Path) -> None:
    nodes = [helper.make_node("MatMul", ["a", "w"], ["y"], name="n"), helper.make_node("Relu", ["x"], ["a"], name="n")]
    report = onnxq.quantize(model(nodes, [WEIGHT]), FEEDS, target="cpu", validate=False)
    assert any(e.is_integer for e in report.ledger.values())


def test_bodies_in_bodies_go_through(folder: Path) -> None:
    first = helper.make_tensor_value_info("o0", TensorProto.FLOAT, [1, 4])
    outer = helper.make_graph([helper.make_node("Identity", ["x"], ["o0"])], "b", [], [first])
    for k in range(1, 20):
        inner = helper.make_node("If", ["c"], [f"o{k}"], then_branch=outer, else_branch=outer if k < 3 else _plain(k))
        outer = helper.make_graph([inner], "b", [], [helper.make_tensor_value_info(f"o{k}", TensorProto.FLOAT, [1, 4])])
    proto = model([*outer.node, helper.make_node("MatMul", ["o19", "w"], ["y"])], [WEIGHT])
    proto.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    report = onnxq.quantize(proto, [{**FEEDS[0], "c": np.array(True)}], target="cpu", validate=False)
    assert any(e.is_integer for e in report.ledger.values())


def _plain(k: int) -> onnx.GraphProto:
    node = helper.make_node("Neg", ["x"], [f"e{k}"])
    return helper.make_graph([node], "e", [], [helper.make_tensor_value_info(f"e{k}", TensorProto.FLOAT, [1, 4])])
