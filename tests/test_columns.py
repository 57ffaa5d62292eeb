"""columns.py: what it says of a tensor's columns is what the runtime computes, for any chain of the ops it follows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.columns import Column, Columns
from onnxq.graph import Graph, Variable
from onnxq.model import Model
from onnxq.passes import PASSES
from onnxq.runtime import evaluate
from onnxq.target import load

WIDTH = 6
STEPS = {  # how a tensor of WIDTH columns is made of another of as many
    "neg": "{y} = Neg ({x})",
    "halves": "{y}a = Slice ({x}, three, far, last)\n{y}b = Slice ({x}, zero, three, minus)\n"
    "{y} = Concat <axis = -1> ({y}a, {y}b)",
    "split": "{y}a, {y}b = Split <axis = 2> ({x})\n{y}n = Neg ({y}a)\n{y} = Concat <axis = 2> ({y}b, {y}n)",
    "strides": "{y}a = Slice ({x}, one, far, last, two)\n{y}b = Slice ({x}, zero, far, last, two)\n"
    "{y} = Concat <axis = -1> ({y}a, {y}b)",
    "pairs": "{y}r = Reshape ({x}, apart)\n{y}a = Gather <axis = 3> ({y}r, nought)\n{y}b = Slice ({y}r, one, two, minus)\n"
    "{y}c = Squeeze ({y}b, minus)\n{y}d = Unsqueeze ({y}c, minus)\n{y}e = Unsqueeze ({y}a, minus)\n"
    "{y}f = Concat <axis = -1> ({y}d, {y}e)\n{y} = Reshape ({y}f, together)",
    "order": "{y} = Gather <axis = -1> ({x}, order)",
    "add": "{y}a = Gather <axis = -1> ({x}, order)\n{y} = Add ({x}, {y}a)",
    "sub": "{y}a = Neg ({x})\n{y} = Sub ({y}a, {x})",
    "table": "{y} = Mul ({x}, table)",
    "rows": "{y}a = Unsqueeze (rows, zero)\n{y} = Mul ({y}a, {x})",
}
CONSTANTS = (
    "int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}, int64[1] last = {2}, "
    "int64[1] minus = {-1}, int64[1] far = {9223372036854775807}, int64 nought = {0}, int64[6] order = {2, 0, 1, 5, 4, 3}, "
    "int64[4] apart = {2, 3, 3, 2}, int64[3] together = {2, 3, 6}, float[6] table = {1, 2, 3, 4, 5, 6}, "
    "float[3, 6] rows = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18}"
)


@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6))
def test_the_columns_are_those_that_the_runtime_computes(steps: list[str]) -> None:
    body = "\n".join(STEPS[step].format(x=f"t{k}", y=f"t{k + 1}") for k, step in enumerate(steps))
    graph, x = chain(body, len(steps))
    columns = Columns(graph, x)
    result = columns.of(graph.outputs[0])
    if result is None:
        return
    feed = np.random.default_rng(0).standard_normal((2, 3, WIDTH)).astype(np.float32)
    expected = evaluate(graph.to_proto(), {"t0": feed})[graph.outputs[0].name]
    own = {factor: feed[..., k] for k, factor in enumerate(columns.of_x())}
    if not any(factor in own for column in result.flat for _, factors in column for factor in factors):
        tables = sum(step in ("table", "rows") for step in steps)
        assert tables > 1 or sum(step in ("add", "sub") for step in steps) > 1  # powers and longer sums are not followed
        return
    for k, column in enumerate(result.flat):
        np.testing.assert_allclose(value_of(column, own), expected[..., k], rtol=1e-5)


@pytest.mark.parametrize("step", STEPS)
def test_each_op_is_followed(step: str) -> None:
    graph, x = chain(STEPS[step].format(x="t0", y="t1"), 1)
    columns = Columns(graph, x)
    result, own = columns.of(graph.outputs[0]), set(columns.of_x())
    assert result is not None
    assert all(factors & own for column in result.flat for _, factors in column)


def chain(body: str, length: int) -> tuple[Graph, Variable]:
    text = f'<ir_version: 8, opset_import: ["" : 17]>\nnet (float[2, 3, 6] t0) => (float[2, 3, 6] t{length})\n'
    graph = Graph.from_proto(onnx.parser.parse_model(f"{text}<{CONSTANTS}>\n{{\n{body}\n}}"))
    PASSES["infer-shapes"]().apply(Model(graph, load("cpu")))
    return graph, graph.inputs[0]


def value_of(column: Column, own: dict) -> np.ndarray:
    """(2, 3): the sum of products that a column is, with constants read back from the factors that stand for them."""
    return sum(sign * np.prod([_value(f, own) for f in factors], axis=0) for sign, factors in column)  # type: ignore[return-value]


def _value(factor: Any, own: dict) -> np.ndarray:
    if factor in own:
        return own[factor]
    (key,) = factor if len(factor) == 1 else (factor,)
    if key[0] == "Unsqueeze":
        ((_, inner),) = key[2]
        return _value(next(iter(inner)), own)
    lead, content = key
    return np.broadcast_to(np.frombuffer(content, np.float32).reshape(lead), (2, 3))


ROTATED = """<ir_version: 8, opset_import: ["" : 17]>
net (float[B, 3, {heads}, 4] x) => (float[B, 3, {heads}, 4] y) <float[3, 1, 2] c, float[3, 1, 2] s> {{
  a, b = Split <axis = -1> (x)
  ac = Mul (a, c)
  bs = Mul (b, s)
  u = Sub (ac, bs)
  bc = Mul (b, c)
  as = Mul (a, s)
  v = Add (bc, as)
  y = Concat <axis = -1> (u, v)
}}"""


@pytest.mark.parametrize(
    ("heads", "domains", "why"),
    [
        ("2", frozenset({"com.microsoft"}), None),
        ("2", frozenset(), "the target has no operator for it"),
        ("H", frozenset({"com.microsoft"}), "the number of heads is not known"),
    ],
)
def test_a_rotary_embedding_is_fused_where_it_can_be_written(heads: str, domains: frozenset[str], why: str | None) -> None:
    proto = onnx.parser.parse_model(ROTATED.format(heads=heads))
    for name in ("c", "s"):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((3, 1, 2), np.float32), name))
    del proto.graph.value_info[:]
    model = Model(Graph.from_proto(proto), replace(load("cpu"), domains=domains))
    PASSES["infer-shapes"]().apply(model)
    assert PASSES["fuse-rotary"]().apply(model) == (why is None)
    assert [reason for _, reason in model.refusals] == ([] if why is None else [why])
