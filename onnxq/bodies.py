"""Bodies: those of If, Loop and Scan as models of their own, fed with what the model around them hands to them.

So a body is calibrated, placed, proved and measured as any model is, and then put back in its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from onnxq import runtime
from onnxq.data import Sample, Samples, open_samples
from onnxq.errors import ModelError
from onnxq.feeds import Feed
from onnxq.graph import Constant, Graph, Node, Tensor, Variable
from onnxq.runtime import Session

LAYERS = ("Conv", "MatMul", "Gemm")
MOST_STEPS = 10_000  # that a loop is followed for one sample


@dataclass(frozen=True)
class Body:
    """A body of a node. `formal` are its own inputs in order, `captured` what it reads from outside."""

    node: Node
    key: str
    proto: onnx.ModelProto
    inputs: tuple[Tensor, ...]  # its own
    formal: tuple[str, ...]
    captured: tuple[str, ...]


def bodies_with_layers(graph: Graph, least: int) -> Iterator[Body]:
    """The bodies of a graph, those in other bodies not, that hold a layer; in a loop one of `least` weights or more."""
    for node in graph.nodes:
        for key, part in graph.bodies_of(node):
            layers = [n for n in part.find(*LAYERS) if len(n.inputs) > 1 and isinstance(n.inputs[1], Constant)]
            sizes = [int(np.prod(n.inputs[1].shape)) for n in layers]
            deeper = any(True for n in part.nodes for _ in part.bodies_of(n))
            if not deeper and (not sizes or (node.op != "If" and max(sizes) < least)):
                continue
            formal = tuple(t.name for t in part.inputs)
            proto, captured = graph.body_model(node, key)
            yield Body(node, key, proto, tuple(part.inputs), formal, captured)


def samples_of(body: Body, graph: Graph, samples: Iterable[Sample], threads: int) -> Samples | None:
    """What the body is fed with when the model runs on these samples; None where it never runs, or not on tensors.

    Of the steps of a loop the first four are given, and then every eighth.
    """
    outer = [t.name for t in body.node.inputs if isinstance(t, Variable) and t.name]
    wanted = [n for n in dict.fromkeys([*outer, *body.captured]) if n not in {t.name for t in graph.inputs}]
    around = Session(runtime.exposed(graph.to_stored_proto(), wanted), threads=threads)
    constants = {t.name: t.values for t in body.node.inputs if isinstance(t, Constant)}
    found: list[Session] = []  # of the body itself, once the first step tells the types of its inputs

    def inside(feed: Feed) -> Session:
        if not found:
            type_inputs(body.proto, feed)
            found.append(Session(body.proto, threads=threads))
        return found[0]

    def read() -> Iterator[Sample]:
        for sample in samples:
            values = {**constants, **sample.feed, **around.run(sample.feed, sample.where)}
            if not values.keys() >= set(body.captured):  # an Optional that this sample gives nothing for
                continue
            captured = {name: values[name] for name in body.captured}
            given = [values.get(t.name) if t.name else None for t in body.node.inputs]
            for step, feed in enumerate(_steps(body, given, captured, inside)):
                if step < 4 or step % 8 == 0:
                    yield Sample(feed, None, f"{sample.where}, step {step} of {body.node.name}")

    try:
        first = next(read(), None)
    except ModelError:
        return None
    if first is None or not all(isinstance(v, np.ndarray) and v.dtype != object for v in first.feed.values()):
        return None
    return open_samples(read, inside(first.feed).inputs)


def _steps(body: Body, given: list[Any], captured: Feed, inside: Any) -> Iterator[Feed]:
    """The feeds of the body in one run of the node, whose inputs are `given`."""
    attrs = body.node.attrs
    if body.node.op == "If":
        if bool(np.asarray(given[0]).reshape(())) == (body.key == "then_branch"):
            yield captured
    elif body.node.op == "Loop":
        count = MOST_STEPS if given[0] is None else min(int(np.asarray(given[0]).reshape(())), MOST_STEPS)
        going, carried = given[1] is None or bool(np.asarray(given[1]).reshape(())), given[2:]
        for step in range(count):
            if not going:
                return
            shapes = [[1] * len(t.shape or ()) for t in body.inputs[:2]]  # some declare them as of one element
            own = [np.full(shapes[0], step, np.int64), np.full(shapes[1], going), *carried]
            feed = {**captured, **dict(zip(body.formal, own, strict=True))}
            yield feed
            results = list(inside(feed).run(feed).values())
            going, carried = bool(np.asarray(results[0]).reshape(())), results[1 : 1 + len(carried)]
    elif body.node.op == "Scan":
        scanned = int(attrs["num_scan_inputs"])
        states, sequences = given[: len(given) - scanned], given[len(given) - scanned :]
        axes, backwards = (attrs.get(k) or [0] * scanned for k in ("scan_input_axes", "scan_input_directions"))
        steps = sequences[0].shape[axes[0]]
        for step in range(min(steps, MOST_STEPS)):
            places = [steps - 1 - step if back else step for back in backwards]
            slices = [np.take(s, at, axis) for s, at, axis in zip(sequences, places, axes, strict=True)]
            feed = {**captured, **dict(zip(body.formal, [*states, *slices], strict=True))}
            yield feed
            states = list(inside(feed).run(feed).values())[: len(states)]


def type_inputs(proto: onnx.ModelProto, feed: Mapping[str, np.ndarray]) -> None:
    """Say of every input of a model what type it is of, and what rank; where it says nothing, its sizes are free."""
    for info in proto.graph.input:
        kind = info.type.tensor_type
        if info.name in feed and (not kind.elem_type or not kind.HasField("shape")):
            array = np.asarray(feed[info.name])
            free = [None] * array.ndim
            info.CopyFrom(helper.make_tensor_value_info(info.name, helper.np_dtype_to_tensor_dtype(array.dtype), free))
