"""What `inspect` says of any file: work by kernel, and why each Q and DQ that runs by itself is not fused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

import onnxq
from onnxq import runtime
from onnxq.audit import multiply_accumulates
from onnxq.cli import app
from onnxq.graph import Graph
from onnxq.inspection import inspect
from onnxq.wiring import is_arm
from tests import tiny

MODELS = Path(__file__).parent.parent / "models"
ROWS = "float[2, 4]"
MAPS = "float[1, 4, 6, 6]"
CONSTANTS = (
    "float s = {0.1}, float other = {0.2}, float product = {0.01}, uint8 z = {128}, uint8 low = {0}, int8 i = {0}, "
    "int32 none = {0}, uint16 wide = {9}, int8[4, 4] w, int8[4, 4, 1, 1] v, int32[4] b"
)


def pair(tensor: str, dequantized: str, *, scale: str = "s", zero: str = "z") -> str:
    codes = f"{dequantized}_codes"
    return (
        f"{codes} = QuantizeLinear ({tensor}, {scale}, {zero}) {dequantized} = DequantizeLinear ({codes}, {scale}, {zero})\n"
    )


def net(nodes: str, inputs: str = f"{ROWS} x", outputs: str = f"{ROWS} y", more: str = "") -> onnx.ModelProto:
    """A model of these nodes; constants that none of them reads are left out."""
    proto = tiny.model(f"net ({inputs}) => ({outputs}) <{CONSTANTS}{', ' + more if more else ''}> {{ {nodes} }}")
    read = {name for n in proto.graph.node for name in n.input}
    read |= {name for n in proto.graph.node for a in n.attribute for inner in a.g.node for name in inner.input}
    kept = [t for t in proto.graph.initializer if t.name in read]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return proto


def maps(nodes: str, inputs: str = f"{MAPS} x", outputs: str = f"{MAPS} y", more: str = "") -> onnx.ModelProto:
    return net(nodes, inputs, outputs, more)


WEIGHT = "k = DequantizeLinear (w, s, i)\n"
FILTER = "k = DequantizeLinear (v, s, i)\n"
IN = pair("x", "d")
TWO_OUT = f"{MAPS} y, {MAPS} u"

REASONS = {
    "an input in float": (
        net(IN + "a = MatMul (d, dense)" + pair("a", "y"), more="float[4, 4] dense"),
        ("x", "Q and DQ", "MatMul", "MatMul's input dense has no Q and DQ"),
    ),
    "a constant in float": (
        net(IN + "a = Add (d, shift)" + pair("a", "y"), more="float[4] shift"),
        ("x", "Q and DQ", "Add", "Add's input shift has no Q and DQ"),
    ),
    "only the weight": (maps(FILTER + "y = Conv (x, k)"), ("v", "DQ", "Conv", "Conv's input x has no Q and DQ")),
    "a weight that comes in": (
        maps(IN + "a = Conv (d, u)" + pair("a", "y"), f"{MAPS} x, float[4, 4, 1, 1] u"),
        ("x", "Q and DQ", "Conv", "Conv's input u has no Q and DQ"),
    ),
    "no Q behind, but a float op": (
        maps(IN + FILTER + "a = Conv (d, k) y = Tanh (a)"),
        ("x", "Q and DQ", "Conv", "Conv's output a has no Q: Tanh reads it"),
    ),
    "no Q behind, at an output": (
        maps(IN + FILTER + "y = Conv (d, k)"),
        ("x", "Q and DQ", "Conv", "Conv's output y has no Q: it is an output of the graph"),
    ),
    "an output as well": (
        maps(IN + FILTER + "u = Conv (d, k)" + pair("u", "y"), outputs=TWO_OUT),
        ("x", "Q and DQ", "Conv", "Conv's output u is an output of the graph too"),
    ),
    "read in float as well": (
        maps(IN + FILTER + "a = Conv (d, k) u = Tanh (a)" + pair("a", "y"), outputs=TWO_OUT),
        ("x", "Q and DQ", "Conv", "Conv's output a is read in float too, by Tanh"),
    ),
    "two Q": (
        maps(IN + FILTER + "a = Conv (d, k)" + pair("a", "y") + pair("a", "u", scale="other"), outputs=TWO_OUT),
        ("x", "Q and DQ", "Conv", "Conv's output a is read by 2 Q"),
    ),
    "a Relu that Q does not do": (
        maps(IN + FILTER + "a = Conv (d, k) r = Relu (a)" + pair("r", "y")),
        ("x", "Q and DQ", "Conv", "the Relu behind Conv changes values that its Q would not: the range of a is wider"),
    ),
    "a Clip that Q does not do": (
        maps(
            IN + FILTER + "a = Conv (d, k) r = Clip (a, from, to)" + pair("r", "y", zero="low"),
            more="float from = {0}, float to = {6}",
        ),
        ("x", "Q and DQ", "Conv", "the Clip behind Conv changes values that its Q would not: the range of a is wider"),
    ),
    "a bias of bytes": (
        maps(IN + FILTER + "c = DequantizeLinear (short, s, i) a = Conv (d, k, c)" + pair("a", "y"), more="int8[4] short"),
        ("short", "DQ", "Conv", "Conv's bias short is int8, not int32"),
    ),
    "a bias of another scale": (
        maps(IN + FILTER + "c = DequantizeLinear (b, s, none) a = Conv (d, k, c)" + pair("a", "y")),
        ("b", "DQ", "Conv", "Conv's bias b has another scale than that of its input times that of its weight"),
    ),
    "a bias in float behind a MatMul": (
        net(IN + WEIGHT + "a = MatMul (d, k) y = Add (a, shift)", more="float[4] shift"),
        ("x", "Q and DQ", "Gemm", "Gemm's bias shift is float, not int32"),
    ),
    "a bias that is scaled": (
        net(IN + WEIGHT + "c = DequantizeLinear (b, product, none) a = Gemm <beta = 0.5> (d, k, c)" + pair("a", "y")),
        ("x", "Q and DQ", "Gemm", "Gemm scales its bias (beta is not 1)"),
    ),
    "no integer kernel": (
        net(IN + "a = Tanh (d)" + pair("a", "y")),
        ("x", "Q and DQ", "Tanh", "onnxruntime has no integer kernel for Tanh"),
    ),
    "made in float": (
        net("a = Tanh (x)" + pair("a", "e") + WEIGHT + "m = MatMul (e, k)" + pair("m", "y")),
        ("a", "Q", "Tanh", "onnxruntime has no integer kernel for Tanh"),
    ),
    "read in float behind an integer kernel": (
        net(IN + WEIGHT + "a = MatMul (d, k)" + pair("a", "e") + "y = Tanh (e)"),
        ("a", "DQ", "Tanh", "onnxruntime has no integer kernel for Tanh"),
    ),
    "an interpolation": (
        maps(
            IN + 'a = Resize <mode = "linear"> (d, , sizes)' + pair("a", "y"),
            outputs="float[1, 4, 12, 12] y",
            more="float[4] sizes = {1, 1, 2, 2}",
        ),
        ("x", "Q and DQ", "Resize", "onnxruntime has an integer kernel for Resize in mode nearest only"),
    ),
    "other parameters behind a transposition": (
        net(
            IN + "a = Sigmoid (d)" + pair("a", "e") + "f = Transpose <perm = [1, 0]> (e)" + pair("f", "y", scale="other"),
            outputs="float[4, 2] y",
        ),
        ("a", "DQ", "Transpose", "the codes behind Transpose have another scale or zero point than those before it"),
    ),
    "a scale that comes in": (
        net(
            pair("x", "d", scale="u")
            + "a = Sigmoid (d)"
            + pair("a", "e", scale="u")
            + "f = Transpose <perm = [1, 0]> (e)"
            + pair("f", "y", scale="u"),
            f"{ROWS} x, float u",
            "float[4, 2] y",
        ),
        ("a", "DQ", "Transpose", "the scale of a is no constant"),
    ),
    "scales by channel": (
        maps(
            "c = QuantizeLinear <axis = 1> (x, each, zeros) d = DequantizeLinear <axis = 1> (c, each, zeros)"
            "a = MaxPool <kernel_shape = [1, 1]> (d)"
            "e = QuantizeLinear <axis = 1> (a, each, zeros) y = DequantizeLinear <axis = 1> (e, each, zeros)",
            more="float[4] each = {0.1, 0.2, 0.3, 0.4}, uint8[4] zeros = {0, 0, 0, 0}",
        ),
        ("x", "Q and DQ", "MaxPool", "MaxPool's input x is quantized per channel, and is no weight"),
    ),
    "signed codes and an unsigned weight": (
        net(
            "d = DequantizeLinear (x, s, i) k = DequantizeLinear (bytes, s, z) a = Gemm (d, k)" + pair("a", "y", zero="i"),
            "int8[2, 4] x",
            more="uint8[4, 4] bytes",
        ),
        ("x", "DQ", "Gemm", "Gemm's input x has int8 codes, its weight uint8"),
    ),
    "requantized": (
        net(IN + pair("d", "e", scale="other", zero="i") + "y = Tanh (e)"),
        ("x", "Q and DQ", "QuantizeLinear", "quantized again with other parameters"),
    ),
    "a table that is dequantized at each run": (
        net(WEIGHT + "a = Gather (k, x) y = Tanh (a)", "int64[2] x"),
        ("w", "DQ", "Gather", "Gather's output a has no Q: Tanh reads it"),
    ),
    "read in a body": (
        net(
            IN + f"y = If (c) <then_branch = t () => ({ROWS} u) {{ u = Tanh (d) }}, "
            f"else_branch = e () => ({ROWS} h) {{ h = Neg (d) }}>",
            f"{ROWS} x, bool c",
        ),
        ("x", "Q and DQ", "If", "read in a body of If"),
    ),
}
SIGNED = (  # a residual block of int8 codes: on x86, those of a tensor that two nodes read stay int8
    pair("x", "d", zero="i") + FILTER + "[first] a = Conv (d, k)" + pair("a", "e", zero="i")
) + ("[second] f = Conv (e, k)" + pair("f", "g", zero="i") + "h = Add (e, g)" + pair("h", "y", zero="i"))


@pytest.mark.parametrize("case", REASONS)
def test_each_pair_that_is_left_has_its_reason(case: str) -> None:
    proto, expected = REASONS[case]
    found = {(u.tensor, u.left, u.op, u.reason) for u in inspect(proto).unfused}
    assert expected in found
    assert not [u for u in found if "known conditions" in u[3]]


@pytest.mark.skipif(is_arm(), reason="the kernels of ARM take int8")
def test_int8_codes_of_two_readers_stay_int8_on_x86() -> None:
    found = {(u.node, u.reason) for u in inspect(maps(SIGNED)).unfused}
    several = "(2 nodes read those of a, so that they stay int8)"
    assert ("first", f"types of the codes around Conv differ: uint8 and int8 {several}") in found
    assert ("second", f"Conv's input a has int8 codes {several}; this machine's kernels take uint8") in found


def test_codes_of_sixteen_bits_run_in_float() -> None:
    proto = maps(pair("x", "d", zero="wide") + FILTER + "a = Conv (d, k)" + pair("a", "y", zero="wide"))
    proto.opset_import[0].version, proto.ir_version = 21, 10
    assert {u.reason for u in inspect(proto).unfused} == {"Conv's input x has uint16 codes"}


@pytest.mark.parametrize(
    "nodes, kernel",
    [
        (IN + FILTER + "a = Conv (d, k) r = Relu (a)" + pair("r", "y", zero="low"), "QLinearConv"),
        (IN + FILTER + "c = DequantizeLinear (b, product, none) a = Conv (d, k, c)" + pair("a", "y"), "QLinearConv"),
        (IN + "a = Sigmoid (d)" + pair("a", "y"), "QLinearSigmoid"),
    ],
)
def test_what_is_fused_leaves_only_the_boundary(nodes: str, kernel: str) -> None:
    found = inspect(maps(nodes))
    assert kernel in found.kernels
    assert found.unfused == []
    assert found.boundary[0] == "x"
    assert len(found.boundary) == 2


def test_bodies_are_fused_and_counted_too() -> None:
    branch = IN + WEIGHT + "m = MatMul (d, k)" + pair("m", "u")
    text = (
        f"y = If (c) <then_branch = t () => ({ROWS} u) {{ {branch} }}, else_branch = e () => ({ROWS} h) {{ h = Neg (x) }}>"
    )
    found = inspect(net(text, f"{ROWS} x, bool c"))
    assert (found.integer, found.integer_macs, found.float_macs) == (1, 2 * 4 * 4, 0)
    assert {u.reason for u in found.unfused} == {"at an input or output of a body"}


def test_bodies_count_as_often_as_they_run() -> None:
    loop = """y = Loop (five, , x) <body = step (int64 n, bool go, float[2, 4] h) => (bool on, float[2, 4] g)
      { on = Identity (go) g = MatMul (h, dense) }>"""
    found = inspect(net(loop, more="int64 five = {5}, float[4, 4] dense"))
    assert (found.float_macs, found.uncounted) == (5 * 2 * 4 * 4, [])
    scan = """last, y = Scan <num_scan_inputs = 1,
      body = step (float[1, 4] h, float[4] row) => (float[1, 4] g, float[1, 4] out) {
      a = MatMul (h, dense) g = Add (a, row) out = Identity (g) }> (start, x)"""
    found = inspect(net(scan, "float[7, 4] x", "float[7, 1, 4] y", more="float[1, 4] start, float[4, 4] dense"))
    assert (found.float_macs, found.uncounted) == (7 * 4 * 4, [])


def test_free_dimensions_are_said() -> None:
    found = inspect(tiny.model("net (float[N, T, 4] x) => (float[N, T, 3] y) <float[4, 3] w> { y = MatMul (x, w) }"))
    assert found.counted_for == {"x": (1, 64, 4)}
    assert found.macs == {"MatMul": 64 * 4 * 3}
    ids = "net (int64[N, T] x) => (float[N, T, 2] y) <float[1, 4] table, float[4, 2] w>"
    found = inspect(tiny.model(ids + "{ e = Gather (table, x) y = MatMul (e, w) }"))
    assert found.counted_for == {"x": (1, 64)}  # with zeros: 1 is no row of the table


FIXED = """net (float[N, M] x) => (float[1, 2, 5, 7] y)
<int64[4] sizes = {1, 3, 5, 7}, float[4, 3, 1, 1] v, float[2, 4, 1, 1] w> {
  a = Reshape (x, sizes) [first] b = Conv (a, v) c = Relu (b) y = Conv (c, w)
}"""


def test_what_does_not_run_on_made_up_inputs_is_inferred() -> None:
    found = inspect(tiny.model(FIXED))
    assert (found.float_macs, found.uncounted) == (5 * 7 * (3 * 4 + 4 * 2), [])


def test_what_could_not_be_counted_is_named() -> None:
    text = FIXED.replace("int64[4] sizes = {1, 3, 5, 7}, ", "").replace("float[N, M] x", "float[N, M] x, int64[4] sizes")
    found = inspect(tiny.model(text))
    assert (found.float_macs, [(u.op, u.node) for u in found.uncounted]) == (5 * 7 * 4 * 2, [("FusedConv", "first")])
    assert "cannot run the model on made-up inputs" in found.uncounted[0].reason


@pytest.mark.parametrize("name", ["residual", "vision_transformer", "recurrent"])
def test_work_is_that_of_the_float_graph(name: str) -> None:
    proto = onnx.load(MODELS / f"{name}.onnx")
    total = multiply_accumulates(Graph.from_proto(proto), {"image": np.zeros((1, 1, 32, 32), np.float32)})
    found = inspect(MODELS / f"{name}.onnx")
    assert (found.integer_macs, found.float_macs, found.uncounted) == (0, sum(total.values()), [])


def test_work_stays_the_same_when_a_model_is_quantized() -> None:
    report = onnxq.quantize(MODELS / "residual.onnx", MODELS / "digits_calibration.npz", validate=False, max_samples=4)
    found = inspect(report.model)
    before = inspect(MODELS / "residual.onnx")
    assert (found.integer_macs, found.float_macs) == (before.float_macs, 0)
    assert (found.coverage["Conv"].integer, found.coverage["Conv"].integer_macs) == (
        8,
        before.macs["Conv"] + before.macs["FusedConv"],
    )


def test_weights_of_four_bits_and_recurrent_layers_are_counted() -> None:
    nodes = [onnx.helper.make_node("DequantizeLinear", ["codes", "scale"], ["k"], axis=0, block_size=16)]
    nodes.append(onnx.helper.make_node("MatMul", ["x", "k"], ["y"]))
    info = onnx.helper.make_tensor_value_info
    codes = onnx.helper.make_tensor("codes", onnx.TensorProto.INT4, [32, 8], [1] * 256)
    scale = onnx.numpy_helper.from_array(np.ones((2, 8), np.float32), "scale")
    x, y = info("x", onnx.TensorProto.FLOAT, [3, 32]), info("y", onnx.TensorProto.FLOAT, [3, 8])
    graph = onnx.helper.make_graph(nodes, "net", [x], [y], [codes, scale])
    found = inspect(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10))
    assert found.macs == {"MatMulNBits": 3 * 32 * 8}
    assert found.coverage["MatMul"].integer_macs == 3 * 32 * 8
    dynamic = onnxq.quantize(MODELS / "recurrent.onnx", None, mode="dynamic", validate=False)
    found = inspect(dynamic.model)
    assert found.macs["DynamicQuantizeLSTM"] == inspect(MODELS / "recurrent.onnx").macs["LSTM"]


def test_products_of_einsum_and_attention() -> None:
    text = 'net (float[2, 3, 4] x, float[2, 4, 5] u) => (float[2, 3, 5] y) { y = Einsum <equation = "bij,bjk->bik"> (x, u) }'
    assert inspect(tiny.model(text)).macs == {"Einsum": 2 * 3 * 4 * 5}
    head = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>\n'
    text = """net (float[2, 6, 8] x, float[8, 24] w, float[24] b) => (float[2, 6, 8] y)
    { y = com.microsoft.Attention <num_heads = 2> (x, w, b) }"""
    assert inspect(onnx.parser.parse_model(head + text)).macs == {"Attention": 2 * 6 * 8 * 24 + 2 * (2 * 6 * 8) * 6}


def test_a_recurrent_layer_of_which_only_the_state_is_wanted() -> None:
    text = "net (float[5, 1, 4] x) => (float[1, 1, 3] y) <float[1, 12, 4] w, float[1, 12, 3] r>"
    proto = tiny.model(text + "{ all, y = LSTM <hidden_size = 3> (x, w, r) }")
    proto.graph.node[0].output[0] = ""
    found = inspect(proto)
    assert found.macs == {"LSTM": 5 * (12 * 4 + 12 * 3)}


def test_the_page_and_its_json(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(REASONS["read in float behind an integer kernel"][0].SerializeToString())
    result = CliRunner().invoke(app, ["inspect", str(path)], env={"COLUMNS": "140"})
    assert "1 of 1 compute nodes, 100.0% of the counted multiply-accumulates, run in integers" in " ".join(
        result.output.split()
    )
    assert "onnxruntime has no integer kernel for Tanh" in result.output
    assert "Counted: 32 multiply-accumulates for one run on x [2, 4]." in result.output
    plain = json.loads(CliRunner().invoke(app, ["inspect", str(path), "--json"]).output)
    assert plain["schema"] == 1
    assert plain["integer_macs"] == 32
    assert plain["coverage"]["MatMul"] == {"integer": 1, "float": 0, "integer_macs": 32, "float_macs": 0}
    assert [u["tensor"] for u in plain["unfused"]] == ["a"]
    assert plain["boundary"] == ["x"]


def test_names_that_look_like_markup_are_printed(tmp_path: Path) -> None:
    proto = REASONS["no integer kernel"][0]
    twin = onnx.ModelProto()
    twin.CopyFrom(proto)
    twin.graph.node[2].output[0] = twin.graph.node[3].input[0] = "[/a][red]"
    twin.graph.input[0].name = twin.graph.node[0].input[0] = "[/x]"
    path = tmp_path / "net.onnx"
    path.write_bytes(twin.SerializeToString())
    result = CliRunner().invoke(app, ["inspect", str(path)], env={"COLUMNS": "140"})
    assert (result.exit_code, "[/x]" in result.output, "[/a][red]" in result.output) == (0, True, True)


def test_long_lists_are_cut_on_the_terminal(tmp_path: Path) -> None:
    outputs = ", ".join(f"{ROWS} y{k}" for k in range(50))
    nodes = "".join(pair("x", f"d{k}", scale=f"s{k}") + f"[tanh_{k}] y{k} = Tanh (d{k})\n" for k in range(50))
    path = tmp_path / "net.onnx"
    scales = ", ".join(f"float s{k} = {{0.{k + 10}}}" for k in range(50))
    path.write_bytes(net(nodes, outputs=outputs, more=scales).SerializeToString())
    assert "And 10 rows more; --json lists all." in CliRunner().invoke(app, ["inspect", str(path)]).output


def test_large_weights_stay_outside_of_what_is_read_back() -> None:
    proto = tiny.model("net (float[2, 64] x) => (float[2, 64] y) <float[64, 64] w> { y = MatMul (x, w) }")
    with runtime.optimized_in_folder(proto) as (optimized, folder):
        assert optimized.graph.initializer[0].data_location == onnx.TensorProto.EXTERNAL
        assert (folder / "weights.bin").exists()
    assert inspect(proto).macs == {"MatMul": 2 * 64 * 64}
