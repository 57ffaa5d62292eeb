"""Fuzzing: random valid models go through; mutated files and recipes are refused with one message or go through.

`pytest -m slow` takes thousands of cases where the default suite takes some.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import onnxq
from onnxq import machine
from onnxq.errors import ModelError, OnnxqError
from onnxq.graph import Graph
from onnxq.runtime import EMULATED, Session, evaluate
from tests import tiny
from tests.random_graphs import random_model

SEEDS, STEPS = st.integers(0, 2**40), st.integers(1, 24)
KERNELS = 0.05 if machine.u8s8_saturates() else 0.02  # of the largest element: what kernels may differ from emulation
LENIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
RECIPE = """schema = 1
target = "cpu"
observer = "percentile{lower=0.1,upper=99.9}"
weight_bits = 8
exclude = ["y"]
[[override]]
match = "x"
observer = "min-max"
[passes]
choose-weight-ranges = { method = "max" }
correct-bias = false
[gates]
max_drop = 1.0
"""


def feeds_of(proto: onnx.ModelProto) -> list[dict[str, np.ndarray]]:
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(3)]


def is_loadable(proto: onnx.ModelProto) -> bool:
    """onnxruntime breaks some valid models when it optimizes them: two Pads before a pool, if nothing else reads them."""
    try:
        Session(proto, threads=1)
        graph = Graph.from_proto(proto)
        graph.cleanup()
        Session(graph.to_proto(), threads=1)  # without what no output needs
    except ModelError:
        return False
    return True


def goes_through(seed: int, steps: int) -> None:
    proto = random_model(seed, steps)
    feeds = feeds_of(proto)
    expected = evaluate(proto, feeds[0])
    if not all(np.isfinite(array).all() for array in expected.values()) or not is_loadable(proto):
        return
    report = onnxq.quantize(proto, feeds, target="cpu", threads=1, validate=False)
    for record in report.passes:
        off = re.search(r"differs by (\S+),", record.rolled_back)  # what random chains make of a rounding error
        assert not record.rolled_back or (off is not None and float(off[1]) < 1e-3)
    onnx.checker.check_model(report.model)
    real = Session(report.model, threads=1).run(feeds[0])
    emulated = Session(report.model, threads=1, config=EMULATED).run(feeds[0])
    for name, array in expected.items():
        assert (real[name].shape, real[name].dtype) == (array.shape, array.dtype)
        largest = float(np.abs(array).max(initial=0)) or 1.0
        assert np.isfinite(real[name]).all()
        allowed = KERNELS * largest
        if machine.u8s8_saturates():  # where large terms cancel out, what rounding does may be more
            allowed = max(allowed, float(np.abs(emulated[name] - array).max(initial=0)))
        assert np.abs(real[name] - emulated[name]).max(initial=0) <= allowed


@given(SEEDS, STEPS)
@settings(LENIENT, max_examples=120)
def test_random_models_go_through(seed: int, steps: int) -> None:
    goes_through(seed, steps)


@pytest.mark.slow
@given(SEEDS, STEPS)
@settings(LENIENT, max_examples=2500)
def test_thousands_of_random_models_go_through(seed: int, steps: int) -> None:
    goes_through(seed, steps)


def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with some bytes changed, or cut off, or with a piece of it repeated."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(changed) - 1))
        kind = draw(st.sampled_from(["change", "cut", "repeat"]))
        if kind == "change":
            changed[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del changed[at : at + draw(st.integers(1, 20))]
        else:
            changed[at:at] = changed[at : at + draw(st.integers(1, 20))]
        if not changed:
            break
    return bytes(changed)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    text = draw(st.sampled_from([tiny.DENSE, tiny.CONV, tiny.QUANTIZED, tiny.HALF]))
    return mutated(draw, tiny.model(text).SerializeToString())


@st.composite
def recipes(draw: st.DrawFn) -> bytes:
    return mutated(draw, RECIPE.encode())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of weights of 1e38
@given(files())
@settings(LENIENT, max_examples=300)
def test_mutated_files_are_refused_or_go_through(content: bytes) -> None:
    feeds = [{"x": tiny.rows(1)}, {"x": np.ones((1, 3, 4, 6), np.float32)}]
    for feed in feeds:
        with suppress(OnnxqError):
            onnxq.quantize(content, [feed], target="cpu", threads=1, validate=False)


@given(recipes())
@settings(LENIENT, max_examples=200)
def test_mutated_recipes_are_refused_or_go_through(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "recipe.toml"
    path.write_bytes(content)
    with suppress(OnnxqError):
        onnxq.quantize(tiny.model(), [{"x": tiny.rows(1)}], recipe=path, threads=1, validate=False)
