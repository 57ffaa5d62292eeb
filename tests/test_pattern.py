"""pattern.py: what matches, in which orders, and when a match is closed."""

from __future__ import annotations

import onnx.parser
import pytest

from onnxq.graph import Graph
from onnxq.pattern import Array, Either, Input, Number, Op, Pattern, Product, match, reduced_axes

HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'
X = Input("x")


def graph(body: str, consts: str = "float two = {2}, float half = {0.5}", outputs: str = "float[2] y") -> Graph:
    text = f"{HEADER}net (float[2] x, float[2] z) => ({outputs}) <{consts}> {{ {body} }}"
    return Graph.from_proto(onnx.parser.parse_model(text))


@pytest.mark.parametrize("body", ["y = Mul (x, two)", "y = Mul (two, x)"])
def test_a_product_of_two_matches_in_either_order(body: str) -> None:
    found = graph(body)
    result = match(found, found.nodes[-1], Op("Mul", X, Number(2)))
    assert result is not None
    assert result.tensors["x"].name == "x"


@pytest.mark.parametrize("body", ["y = Sub (two, x)", "y = Mul (x, half)", "y = Add (x, two)", "y = Mul (x, z)"])
def test_another_order_number_op_or_kind_does_not_match(body: str) -> None:
    found = graph(body)
    assert match(found, found.nodes[-1], Either(Op("Sub", X, Number(2)), Op("Mul", X, Number(2)))) is None


def test_a_maximum_of_three_is_not_one_of_two_and_a_number_of_more_dimensions_is_none() -> None:
    three = graph("y = Max (x, two, half)")
    assert match(three, three.nodes[-1], Op("Max", X, Number(2))) is None
    wider = graph("y = Mul (x, w)", "float[1, 1] w = {2}", "float[1, 2] y")
    assert match(wider, wider.nodes[-1], Op("Mul", X, Number(2))) is None


def test_an_input_of_one_name_is_one_tensor() -> None:
    square = Op("Mul", X, X)
    same, different = graph("y = Mul (x, x)"), graph("y = Mul (x, z)")
    assert match(same, same.nodes[-1], square) is not None
    assert match(different, different.nodes[-1], square) is None


@pytest.mark.parametrize(
    "body",
    [
        "a = Mul (x, x) b = Mul (a, two) c = Tanh (z) y = Mul (b, c)",
        "a = Mul (x, two) c = Tanh (z) b = Mul (c, x) y = Mul (a, b)",
        "c = Tanh (z) a = Mul (two, c) b = Mul (a, x) y = Mul (x, b)",
    ],
)
def test_the_factors_of_a_product_match_in_any_order(body: str) -> None:
    found = graph(body)
    result = match(found, found.nodes[-1], Product(X, X, Number(2), Op("Tanh", Input("z"))))
    assert result is not None
    assert {n.op for n in result.inner} == {"Mul", "Tanh"}
    assert result.is_closed(found)


def test_names_of_numbers_arrays_and_nodes_are_bound() -> None:
    found = graph(
        "a = Mul (x, v) b = Add (a, two) y = Div (b, half)", "float[2] v = {3, 4}, float two = {2}, float half = {0.5}"
    )
    pattern = Op("Div", Op("Add", Op("Mul", X, Array("v")), Number("shift"), name="sum"), Number("by"))
    result = match(found, found.nodes[-1], pattern)
    assert result is not None
    assert result.numbers == {"shift": 2.0, "by": 0.5}
    assert result.array("v").tolist() == [3, 4]
    assert result.nodes["sum"].op == "Add"


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("a = Exp (x) y = Mul (a, two)", "float[2] y, float[2] a"),
        ("a = Exp (x) y = Mul (a, two) w = Tanh (a)", "float[2] y, float[2] w"),
    ],
)
def test_a_match_whose_inner_result_is_read_elsewhere_is_open(body: str, outputs: str) -> None:
    found = graph(body, outputs=outputs)
    (root,) = found.find("Mul")
    pattern: Pattern = Op("Mul", Op("Exp", X), Number(2))
    result = match(found, root, pattern)
    assert result is not None
    assert not result.is_closed(found)


def test_axes_are_read_from_the_attribute_or_the_input() -> None:
    body = "a = ReduceMean <axes = [1], keepdims = 1> (x) y = ReduceSum (a, axes)"
    found = graph(body, "int64[1] axes = {-1}")
    assert [reduced_axes(n) for n in found.nodes] == [(1,), (-1,)]
