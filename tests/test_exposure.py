"""exposure.py: tensors of the graph that the runtime made of a model are those of the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

import onnxq.exposure
from onnxq.blocks import Blocks
from onnxq.exposure import Exposed, Place, lanes
from onnxq.runtime import Session, exposed

IMAGES = ["residual", "inverted_residual"]


def inner(proto: onnx.ModelProto) -> list[str]:
    return [name for node in proto.graph.node for name in node.output]


def inferred(path: Path) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(onnx.load(path))


def random_feed(session: Session | Exposed, batch: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        i.name: rng.standard_normal([d or batch for d in i.shape or ()]).astype(np.float32)
        for i in session.inputs
        if i.dtype == np.float32
    }


@pytest.mark.parametrize("name", [*IMAGES, "vision_transformer", "video", "recurrent"])
def test_every_tensor_is_what_the_unoptimized_model_gives(models: Path, name: str) -> None:
    proto = inferred(models / f"{name}.onnx")
    names = inner(proto)
    plain = Session(exposed(proto, names), threads=1, optimize=False)
    seen = Exposed(proto, names, threads=1)
    feed = random_feed(plain)
    expected, found = plain.run(feed), seen.run(feed)
    assert found.keys() == expected.keys()
    for tensor, value in found.items():
        value = value.plain() if isinstance(value, Blocks) else value
        assert value.shape == expected[tensor].shape
        scale = float(np.abs(expected[tensor]).max(initial=0)) or 1.0
        np.testing.assert_allclose(value, expected[tensor], atol=2e-5 * scale, rtol=0, err_msg=tensor)


@pytest.mark.skipif(not lanes(), reason="the runtime lays nothing out in blocks of channels on this CPU")
@pytest.mark.parametrize("name", IMAGES)
def test_most_tensors_of_convolutional_networks_are_seen_in_blocks(models: Path, name: str) -> None:
    proto = inferred(models / f"{name}.onnx")
    relevant = [n.output[0] for n in proto.graph.node if n.op_type in ("Conv", "Relu", "Clip", "Add")]
    seen = Exposed(proto, relevant, threads=1)
    blocked = [p for p in seen.places.values() if p.channels is not None]
    assert len(blocked) > 0.7 * len(relevant), seen.places


@pytest.mark.parametrize("name", IMAGES)
def test_a_group_of_tensors_has_the_bits_it_has_among_all(models: Path, name: str) -> None:
    proto = inferred(models / f"{name}.onnx")
    names = inner(proto)
    everything = Exposed(proto, names, threads=1)
    feed = random_feed(everything)
    values = everything.run(feed)
    for group in (names[:2], names[5:6], names[-3:]):
        found = Exposed(proto, group, among=names, threads=1).run(feed)
        for tensor in group:
            one, other = found[tensor], values[tensor]
            assert isinstance(one, Blocks) == isinstance(other, Blocks)
            one, other = (v.plain() if isinstance(v, Blocks) else v for v in (one, other))
            np.testing.assert_array_equal(one, other)


def test_a_pool_of_the_model_that_is_like_a_probe_stays() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 17]>
        net (float[1, 16, 8, 8] x) => (float[1, 16, 1, 1] y) <float[1, 16, 8, 8] a>
        { a = Relu (x) b = GlobalAveragePool (a) y = Neg (b) }"""
    )
    seen = Exposed(proto, ["a"], threads=1)
    feed = random_feed(seen)
    found = seen.run(feed)
    np.testing.assert_array_equal(found["a"], np.maximum(feed["x"], 0))
    np.testing.assert_allclose(found["y"], -found["a"].mean((2, 3), keepdims=True), rtol=1e-5)


def test_a_graph_that_the_runtime_cannot_load_again_is_seen_as_it_is(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: object, path: Path) -> None:
        path.write_bytes(onnx.parser.parse_model(
            '<ir_version: 9, opset_import: ["" : 17, "nowhere" : 1]> g (float[1] x) => (float[1] y) { y = nowhere.Op (x) }'
        ).SerializeToString())  # fmt: skip

    monkeypatch.setattr(onnxq.exposure.runtime, "save_optimized", broken)
    proto = inferred(models / "residual.onnx")
    name = inner(proto)[3]
    assert Exposed(proto, [name], threads=1).places == {name: Place(name)}
