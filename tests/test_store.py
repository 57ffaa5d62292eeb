"""store.py: large weights go to a file and come back as they were, and a model is the same wherever they are."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

import onnxq
from onnxq import runtime, store
from onnxq.graph import Constant, Graph
from onnxq.proto import folder_of, with_external_data
from onnxq.runtime import Session, evaluate
from onnxq.store import WeightStore, hash_of_model, size_of, stored
from tests import tiny

LARGE = tiny.DENSE.replace("4", "256").replace("3", "96")  # a weight of 98 kB
CAPTURED = """tiny (float[N, 256] x, bool c) => (float[N, 96] y) <float[256, 96] w>
{ y = If (c) <then_branch = t () => (float[N, 96] u) { u = MatMul (x, w) },
              else_branch = e () => (float[N, 96] v) { v0 = MatMul (x, w)  v = Relu (v0) }> }"""
KINDS = (np.float32, np.float64, np.int8, np.int64, np.float16, np.bool_)


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 40)), min_size=1, max_size=6), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_arrays_come_back_as_they_were(shapes: list[tuple[type, int]], seed: int) -> None:
    rng, kept = np.random.default_rng(seed), WeightStore()
    arrays = [rng.integers(0, 2, (rows, 9001)).astype(kind) for kind, rows in shapes]
    mapped = [*kept.keep(*arrays[:2]), *kept.keep(*arrays[2:], *arrays[:1])[: len(arrays[2:])]]
    kept.release()
    for given_, found in zip(arrays, mapped, strict=True):
        assert kept.holds(found) == (given_.nbytes >= store.LEAST)
        assert (found is given_) == (given_.nbytes < store.LEAST)
        assert found.dtype == given_.dtype
        np.testing.assert_array_equal(found, given_)
        assert all(array is found for array in kept.keep(found, given_, found))
        if kept.holds(found):
            assert kept.find(kept.reference("w", found)) is not None
            np.testing.assert_array_equal(kept.find(kept.reference("w", found)), given_)


@pytest.mark.parametrize("text", [LARGE, CAPTURED])
def test_a_model_is_the_same_with_its_weights_in_a_store(text: str) -> None:
    proto = tiny.model(text)
    graph = Graph.from_proto(proto)
    light, full = graph.to_stored_proto(), graph.to_proto()
    assert light.ByteSize() < 4096 < size_of(light) < full.ByteSize() + 4096
    assert folder_of(full) is None
    assert (
        hash_of_model(light)
        == hash_of_model(full)
        == hash_of_model(with_external_data(light, None))
        != hash_of_model(tiny.model())
    )
    assert with_external_data(light, None).SerializeToString(deterministic=True) == full.SerializeToString(
        deterministic=True
    )
    onnx.checker.check_model(full, full_check=True)
    feed = {"x": np.random.default_rng(0).standard_normal((2, 256)).astype(np.float32), "c": np.array(False)}
    feed = {i.name: feed[i.name] for i in proto.graph.input}
    for name, array in evaluate(proto, feed).items():
        np.testing.assert_array_equal(evaluate(light, feed)[name], array)
        np.testing.assert_allclose(Session(light, threads=1).run(feed)[name], array, rtol=1e-5, atol=1e-5)


def test_one_other_weight_is_another_model() -> None:
    proto, other = tiny.model(LARGE), tiny.model(LARGE)
    values = bytearray(other.graph.initializer[0].raw_data)
    values[7] ^= 1
    other.graph.initializer[0].raw_data = bytes(values)
    graphs = [Graph.from_proto(p) for p in (proto, other)]
    assert len({hash_of_model(g.to_stored_proto()) for g in graphs}) == 2


def test_what_a_pass_makes_goes_to_the_store_when_a_session_needs_it() -> None:
    graph = Graph.from_proto(tiny.model(LARGE))
    weight = next(t for t in graph.tensors().values() if isinstance(t, Constant) and t.nbytes > store.LEAST)
    doubled = weight.values * 2
    weight.values = doubled
    light = graph.to_stored_proto()
    assert weight.values is not doubled
    np.testing.assert_array_equal(weight.values, doubled)
    read = {t.name: onnx.numpy_helper.to_array(t) for t in with_external_data(light, None).graph.initializer}
    np.testing.assert_array_equal(read[weight.name], doubled)
    again = Graph.from_proto(light, store=graph._store)
    assert {t.name for t in again.tensors().values()} == {t.name for t in graph.tensors().values()}


def test_the_file_goes_with_the_store() -> None:
    kept = WeightStore()
    kept.keep(np.zeros(store.LEAST, np.float32))
    folder = kept.folder
    assert folder.is_dir()
    del kept
    gc.collect()
    assert not folder.exists()


def test_weights_stay_in_memory_where_the_disk_is_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "open", full, raising=False)
    values = np.ones(store.LEAST, np.float32)
    assert WeightStore().keep(values)[0] is values
    feeds = [{"x": np.random.default_rng(0).standard_normal((2, 256)).astype(np.float32)}]
    report = onnxq.quantize(tiny.model(LARGE), feeds, target="cpu", threads=1, output=tmp_path / "q.onnx", validate=False)
    assert report.integer_share == 1


def test_a_large_proto_is_handed_over_through_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "LARGEST_IN_MEMORY", 1000)
    proto, kept = tiny.model(LARGE), WeightStore()
    feed = {"x": np.ones((2, 256), np.float32)}
    expected = evaluate(stored(proto, None, kept), feed)
    found = Session(proto, threads=1).run(feed)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5)
    assert folder_of(proto) is None


def test_where_the_weights_are_is_not_in_what_is_written(tmp_path: Path) -> None:
    feeds = [{"x": np.random.default_rng(0).standard_normal((2, 256)).astype(np.float32)}]
    onnx.save(tiny.model(LARGE), tmp_path / "m.onnx")
    onnxq.quantize(tmp_path / "m.onnx", feeds, target="cpu", threads=1, output=tmp_path / "q.onnx", validate=False)
    written = onnx.load(tmp_path / "q.onnx")
    assert folder_of(written) is None
    assert not any(t.external_data for t in written.graph.initializer)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="this system does not list its file descriptors there")
def test_many_weights_need_few_file_descriptors() -> None:
    """A process may have 1,024 of them, or 256."""
    rng = np.random.default_rng(0)
    weights = {f"w{k}": rng.standard_normal((128, 129)).astype(np.float32) for k in range(300)}
    nodes = [helper.make_node("Add", ["x", name], [f"y{k}"]) for k, name in enumerate(weights)]
    shape = [helper.make_tensor_value_info(n, 1, [128, 129]) for n in ("x", *(f"y{k}" for k in range(300)))]
    initializers = [onnx.numpy_helper.from_array(w, name) for name, w in weights.items()]
    proto = helper.make_model(helper.make_graph(nodes, "net", shape[:1], shape[1:], initializers), ir_version=9)
    before = len(list(Path("/proc/self/fd").iterdir()))
    graph = Graph.from_proto(proto)
    for tensor in graph.tensors().values():
        if isinstance(tensor, Constant):
            tensor.values = tensor.values + 1
    light = graph.to_stored_proto()
    assert len(list(Path("/proc/self/fd").iterdir())) < before + 10
    again = {t.name: t.values for t in Graph.from_proto(light).tensors().values() if isinstance(t, Constant)}
    for name, values in weights.items():
        np.testing.assert_array_equal(again[name], values + 1)
