"""graph.py closes what graphsurgeon loses or gets wrong, once, so that no pass ever meets it."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxq
from onnxq.errors import ModelError
from onnxq.graph import Constant, Graph, lazily
from onnxq.model import Model
from onnxq.passes import DeduplicateConstants
from onnxq.runtime import evaluate
from onnxq.target import load as load_target
from onnxq.text import to_text
from tests import tiny

HEADER = '<ir_version: 9, opset_import: ["" : 17]>\n'
CHAIN = """net (float[2, 3] x) => (float[2, 3] y) {
  [one] a = Relu (x)
  [two] b = Tanh (a)
  [three] y = Add (a, b)
}"""
BRANCHES = """net (bool c, float[3] x) => (float[3] y)
<float[3] w = {1.0, 2.0, 3.0}>
{
  a = Relu (x)
  y = If (c) <
    then_branch = then () => (float[3] t) { t = Add (a, w) },
    else_branch = other () => (float[3] e) { e = Mul (a, w) }
  >
}"""


def parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(HEADER + text)


def named(graph: Graph, name: str):
    return next(n for n in graph.nodes if n.name == name)


def test_metadata_doc_strings_and_version_survive() -> None:
    proto = parse(CHAIN)
    proto.doc_string, proto.domain, proto.model_version, proto.producer_name = "model", "org", 7, "maker"
    proto.metadata_props.add(key="license", value="free")
    proto.graph.doc_string = "graph"
    proto.graph.node[0].doc_string = "node"
    proto.graph.node[0].metadata_props.add(key="origin", value="layer 1")
    proto.graph.input[0].doc_string = "input"
    note = proto.graph.quantization_annotation.add(tensor_name="a")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    back = Graph.from_proto(proto).copy().to_proto()
    for field in ("doc_string", "domain", "model_version", "producer_name", "ir_version"):
        assert getattr(back, field) == getattr(proto, field)
    assert [(p.key, p.value) for p in back.metadata_props] == [("license", "free")]
    assert back.graph.doc_string == "graph"
    assert back.graph.node[0].doc_string == "node"
    assert back.graph.node[0].metadata_props[0].value == "layer 1"
    assert back.graph.input[0].doc_string == "input"
    assert back.graph.quantization_annotation[0].tensor_name == "a"


def test_an_overridable_initializer_stays_an_input() -> None:
    proto = parse("net (float[3] x, float[3] w = {1, 2, 3}) => (float[3] y) { y = Add (x, w) }")
    if "w" not in {i.name for i in proto.graph.input}:
        proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [3]))
    back = Graph.from_proto(proto).to_proto()
    assert [i.name for i in back.graph.input] == ["x", "w"]
    assert [t.name for t in back.graph.initializer] == ["w"]


def test_a_captured_initializer_stays_outside_once() -> None:
    proto = parse(BRANCHES)
    graph = Graph.from_proto(proto)
    for back in (graph.to_proto(), graph.copy().to_proto()):
        assert [t.name for t in back.graph.initializer] == ["w"]
        onnx.checker.check_model(back)
        x = np.array([-1, 2, 3], np.float32)
        for c, expected in ((True, [1, 4, 6]), (False, [0, 4, 9])):
            assert evaluate(back, {"c": np.array(c), "x": x})["y"].tolist() == expected


def test_a_body_that_reads_a_tensor_is_a_consumer() -> None:
    graph = Graph.from_proto(parse(BRANCHES))
    (a,) = graph.find("Relu")[0].outputs
    assert graph.is_captured(a)
    assert graph.sole_consumer(a) is None
    assert graph.readers(a) == []
    assert graph.cleanup() == 0


def test_a_graph_output_is_a_consumer() -> None:
    graph = Graph.from_proto(parse("net (float[3] x) => (float[3] a, float[3] y) { a = Relu (x) y = Tanh (a) }"))
    (a,) = graph.find("Relu")[0].outputs
    assert graph.sole_consumer(a) is None
    assert graph.readers(a) == [(graph.find("Tanh")[0], 0), (None, 0)]


def test_nodes_and_tensors_are_compared_by_identity_and_can_be_hashed() -> None:
    graph = Graph.from_proto(parse(CHAIN))
    twin = graph.copy()
    assert len({*graph.nodes, *twin.nodes}) == 6
    assert graph.nodes[0] != twin.nodes[0]
    assert graph.inputs[0] != twin.inputs[0]


def test_a_node_that_reads_a_tensor_twice_has_two_readings() -> None:
    graph = Graph.from_proto(parse("net (float[3] x) => (float[3] y) { a = Relu (x) y = Add (a, a) }"))
    add = graph.find("Add")[0]
    assert graph.readers(add.inputs[0]) == [(add, 0), (add, 1)]


def test_copies_share_arrays_and_nothing_else() -> None:
    proto = parse("net (float[3] x) => (float[3] y) <float[3] w = {1, 2, 3}> { y = Add (x, w) }")
    graph = Graph.from_proto(proto)
    values = graph.tensors()["w"].values
    twin = graph.copy()
    assert twin.tensors()["w"].values is values
    twin.remove(twin.nodes[0])
    assert len(graph.nodes) == 1


def test_every_node_gets_a_name_of_its_own_over_all_scopes() -> None:
    proto = parse(BRANCHES)
    proto.graph.node[0].name = "same"
    proto.graph.node[1].attribute[0].g.node[0].name = "same"
    back = Graph.from_proto(proto).to_proto()
    names = [n.name for n in back.graph.node]
    names += [n.name for a in back.graph.node[1].attribute for n in a.g.node]
    assert len(set(names)) == 4
    assert "" not in names


def test_bypass_keeps_public_names() -> None:
    graph = Graph.from_proto(parse("net (float[3] x) => (float[3] y) { a = Relu (x) y = Identity (a) }"))
    assert graph.bypass(graph.find("Identity")[0])
    assert to_text(graph).splitlines()[1] == "  %1 = Relu(%0)"
    assert graph.outputs[0].name == "y"
    direct = Graph.from_proto(parse("net (float[3] x) => (float[3] y) { y = Identity (x) }"))
    assert not direct.bypass(direct.nodes[0])


def test_cleanup_drops_dead_nodes_and_sorts() -> None:
    graph = Graph.from_proto(parse("net (float[3] x) => (float[3] y) { d = Tanh (x) a = Relu (x) y = Neg (a) }"))
    graph.nodes.reverse()
    assert graph.cleanup() == 1
    assert [n.op for n in graph.nodes] == ["Relu", "Neg"]


def test_fresh_names_are_never_taken() -> None:
    graph = Graph.from_proto(parse(BRANCHES))
    assert graph.fresh("t") != "t"
    assert graph.fresh("new") == "new"
    assert graph.fresh("new") == "new_1"


@pytest.mark.parametrize("kind", ["INT4", "UINT4", "FLOAT8E4M3FN", "INT16", "UINT16"])
def test_types_that_numpy_lacks_pass_through_untouched(kind: str) -> None:
    tensor = helper.make_tensor("w", getattr(TensorProto, kind), [5], [1, 0, 1, 1, 0])
    node = helper.make_node("Identity", ["w"], ["y"])
    output = helper.make_tensor_value_info("y", getattr(TensorProto, kind), [5])
    graph = helper.make_graph([node], "g", [], [output], [tensor])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    back = Graph.from_proto(proto).copy().to_proto()
    (kept,) = back.graph.initializer
    assert kept.data_type == tensor.data_type
    np.testing.assert_array_equal(numpy_helper.to_array(kept), numpy_helper.to_array(tensor))


def test_a_4_bit_constant_can_be_made() -> None:
    graph = Graph.from_proto(parse(CHAIN))
    tensor = helper.make_tensor("w4", TensorProto.INT4, [3], [1, -8, 7])
    constant = Constant("w4", lazily(tensor))
    node = graph.insert(
        "DequantizeLinear", [constant, graph.constant("s", np.array(0.5, np.float32))], [graph.variable("d")]
    )
    graph.outputs.append(node.outputs[0])
    (kept,) = [t for t in graph.to_proto().graph.initializer if t.name == "w4"]
    assert numpy_helper.to_array(kept).astype(np.int32).tolist() == [1, -8, 7]
    assert numpy_helper.to_array(kept).dtype == np.dtype(ml_dtypes.int4)


def test_reading_a_4_bit_constant_leaves_it_as_it_was() -> None:
    proto = parse("net (float[2, 4] x) => (float[2, 2] y) <float[4, 2] w> { y = MatMul (x, w) }")
    del proto.opset_import[:]
    proto.opset_import.append(helper.make_opsetid("", 21))
    codes = helper.make_tensor("codes", TensorProto.INT4, [4, 2], [1, -8, 7, 0, 2, 3, 4, 5])
    proto.graph.initializer.extend([codes, numpy_helper.from_array(np.array(0.5, np.float32), "s")])
    proto.graph.node.insert(0, helper.make_node("DequantizeLinear", ["codes", "s"], ["w4"]))
    proto.graph.node[1].input[1] = "w4"
    graph = Graph.from_proto(proto)
    constant = graph.tensors()["codes"]
    assert isinstance(constant, Constant)
    assert constant.values.astype(np.int32).reshape(-1).tolist() == [1, -8, 7, 0, 2, 3, 4, 5]
    (kept,) = [t for t in graph.copy().to_proto().graph.initializer if t.name == "codes"]
    assert kept == codes


def external_model(folder: Path) -> onnx.ModelProto:
    proto = parse("net (float[300] x) => (float[300] y) <float[300] w> { y = Add (x, w) }")
    del proto.graph.value_info[:]
    proto.graph.initializer.append(numpy_helper.from_array(np.arange(300, dtype=np.float32), "w"))
    onnx.save(proto, folder / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    return onnx.load(folder / "m.onnx", load_external_data=False)


def test_external_data_is_found_next_to_the_model(tmp_path: Path) -> None:
    proto = external_model(tmp_path)
    back = Graph.from_proto(proto, tmp_path).to_proto()
    np.testing.assert_array_equal(numpy_helper.to_array(back.graph.initializer[0]), np.arange(300, dtype=np.float32))


def test_missing_external_data_is_named(tmp_path: Path) -> None:
    proto = external_model(tmp_path)
    (tmp_path / "m.bin").unlink()
    with pytest.raises(ModelError, match=r"external data of tensor w cannot be read from .*m\.bin"):
        Graph.from_proto(proto, tmp_path)
    with pytest.raises(ModelError, match="no folder"):
        Graph.from_proto(proto)


def test_the_light_proto_has_shapes_and_no_weights() -> None:
    proto = parse("net (float[2, 900] x) => (float[2, 4] y) <float[900, 4] w> { y = MatMul (x, w) }")
    del proto.graph.value_info[:]
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((900, 4), np.float32), "w"))
    light = Graph.from_proto(proto).to_light_proto()
    assert light.ByteSize() < 500
    assert list(light.graph.initializer[0].dims) == [900, 4]


def test_an_old_model_whose_initializers_are_all_inputs_has_constant_weights_when_its_opset_is_raised() -> None:
    weight = np.ones((4, 3), np.float32)
    infos = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, d) for n, d in (("x", [2, 4]), ("w", [4, 3]), ("y", [2, 3]))
    ]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "old", infos[:2], infos[2:], [onnx.numpy_helper.from_array(weight, "w")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 8)], ir_version=3)
    report = onnxq.quantize(proto, [{"x": np.ones((2, 4), np.float32)}], target="cpu", exclude="MatMul", validate=False)
    assert [i.name for i in report.model.graph.input] == ["x"]


def test_optional_values_and_attributes_that_hold_a_type_pass() -> None:
    text = (
        HEADER
        + """net (float[2, 4] x) => (float[2, 3] y, optional(float[2, 4]) o, bool h) <float[4, 3] w>
    { o = Optional (x)  n = Optional ()  h = OptionalHasElement (n)  g = OptionalGetElement (o)  y = MatMul (g, w) }"""
    )
    proto = onnx.parser.parse_model(text)
    del proto.graph.value_info[:]
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((4, 3), np.float32), "w"))
    kind = helper.make_tensor_type_proto(TensorProto.FLOAT, [2, 4])
    proto.graph.node[1].attribute.append(helper.make_attribute("type", kind))
    onnx.checker.check_model(proto, full_check=True)
    again = Graph.from_proto(proto).copy().to_proto()
    onnx.checker.check_model(again, full_check=True)
    assert again.graph.node[1].attribute == proto.graph.node[1].attribute
    assert [o.type for o in again.graph.output] == [o.type for o in proto.graph.output]
    report = onnxq.quantize(proto, [{"x": np.ones((2, 4), np.float32)}], target="cpu", validate=False)
    assert report.integer_share == 1


def test_constants_that_differ_only_at_their_end_stay_apart() -> None:
    """Only their first bytes go into the checksum by which equal ones are looked for."""
    one = np.zeros((64, 64), np.float32)
    other = one.copy()
    other[-1, -1] = 1
    weights = [onnx.numpy_helper.from_array(w, name) for w, name in ((one, "a"), (other, "b"), (one, "c"))]
    x, y = (onnx.helper.make_tensor_value_info(name, 1, [64, 64]) for name in "xy")
    nodes = [onnx.helper.make_node("Add", [i, w], [o]) for i, w, o in (("x", "a", "p"), ("p", "b", "q"), ("q", "c", "y"))]
    graph = Graph.from_proto(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x], [y], weights), ir_version=9))
    assert DeduplicateConstants().apply(Model(graph, load_target("cpu"))) == 1
    assert [n.inputs[1].name for n in graph.nodes] == ["a", "b", "a"]


def test_a_type_that_says_nothing_is_as_none() -> None:
    proto = tiny.model()
    proto.graph.output[0].type.ParseFromString(b"\x08\x0d")  # a kind of type that nobody knows
    written = Graph.from_proto(proto).to_proto()
    assert [o.name for o in written.graph.output] == [o.name for o in proto.graph.output]
