"""Watching: run a model and count its inner tensors on the way, each while it is still in the cache.

The graph that onnxruntime made of the model, see exposure.py, gets a node of an op of our own behind each tensor that is to
be counted. It makes nothing, so no tensor outlives its readers, and the memory of a run is that of the model alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import count

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxq import capi, kernels, runtime
from onnxq.compiled.records import OP
from onnxq.equalization import Scaled
from onnxq.errors import ModelError
from onnxq.exposure import OptimizedGraphs, Place, lanes, made_of
from onnxq.proto import bodies
from onnxq.sketch import TensorSketch
from onnxq.tally import Reading, Tally, Visit

DOMAIN, OBSERVE = "onnxq", "Observe"
TALLY = "onnxq_tally_"  # and a number: the input by which a run is told of its tally
RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
NUMBERS = {
    getattr(TensorProto, name)
    for name in (
        "FLOAT", "DOUBLE", "FLOAT16", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "BOOL",
    )
}  # fmt: skip


def is_possible(proto: onnx.ModelProto) -> bool:
    """Whether this module does for the model: onnxruntime's library is here, and two runs on one sample are alike.

    Models with inputs that are no arrays of numbers, or with ops out of other libraries, are left to exposure.py.
    """
    given = {t.name for t in proto.graph.initializer}
    inputs = [i.type for i in proto.graph.input if i.name not in given]
    nodes = (n for top in (proto.graph, *proto.functions) for part in (top, *bodies(top)) for n in part.node)
    return (
        capi.api() is not None
        and not runtime.custom_op_libraries
        and all(i.HasField("tensor_type") and i.tensor_type.elem_type in NUMBERS for i in inputs)
        and not any(node.op_type in RANDOM or _trains(node) for node in nodes)
    )


def _trains(node: onnx.NodeProto) -> bool:
    """Whether it is a Dropout that may be asked to drop something."""
    return node.op_type == "Dropout" and len(node.input) > 2 and bool(node.input[2])


class Watched:
    """A session in which sketches are counted: those of tensors of the model, its inputs too, and those scaled from them."""

    def __init__(
        self,
        proto: onnx.ModelProto,
        sketches: Iterable[str],
        *,
        scaled: Mapping[str, Scaled],
        among: Iterable[str] = (),
        graphs: OptimizedGraphs,
        threads: int = 0,
        config: Mapping[str, str] | None = None,
    ) -> None:
        """`among` and `graphs` are as in exposure.Exposed. Raises ModelError where the model does not load, or not again."""
        by_tensor: dict[str, list[str]] = {}
        for name in sketches:
            by_tensor.setdefault(scaled[name].of if name in scaled else name, []).append(name)
        wanted, everything = made_of(proto, by_tensor, among)
        self.inputs = {i.name for i in proto.graph.input} - {t.name for t in proto.graph.initializer}
        self._public = [o.name for o in proto.graph.output]
        self.readings: list[Reading] = []
        graph = graphs.of(proto, everything)
        model, places = graph.exposing(wanted)
        nodes = []
        taken = {name for node in model.graph.node for name in node.output} | {i.name for i in model.graph.input}
        self._told = next(name for k in count() if (name := f"{TALLY}{k}") not in taken)
        for tensor in [*(name for name in by_tensor if name in self.inputs), *wanted]:
            place, first = places.get(tensor, Place(tensor)), len(self.readings)
            self.readings += [Reading(name, scaled.get(name), place.channels) for name in by_tensor[tensor]]
            nodes.append(helper.make_node(
                OBSERVE, [place.output, self._told], [], domain=DOMAIN, first=first, number=len(by_tensor[tensor]),
            ))  # fmt: skip
        _watch(model, self._public, nodes, self._told)
        try:
            self._session = capi.Session(graph.save(model), _observe(), threads=threads, config=config or {})
        except capi.ApiError as error:
            raise ModelError(f"onnxruntime cannot load what it made of the model: {runtime.first_line(error)}") from error

    def tally(self, sketches: Mapping[str, TensorSketch]) -> Tally:
        """Memory for the counts of sketches that a thread adds to."""
        return Tally(sketches, self.readings, lanes())

    def run(
        self, feed: Mapping[str, np.ndarray], tally: Tally, where: str = "a sample", visit: Visit | None = None
    ) -> dict[str, np.ndarray]:
        """Run the model on a feed and count into the tally, or show `visit` each array; the outputs of the model."""
        given = {name: np.asarray(feed[name]) for name in self.inputs if name in feed}
        tally.begin(where, visit)
        try:
            found = self._session.run({**given, self._told: tally.place}, self._public)
        except (capi.ApiError, TypeError, ValueError) as error:  # the latter of what is no array of numbers
            tally.end()
            raise runtime.run_error(error, where) from error
        tally.end()
        return found


def _watch(model: onnx.ModelProto, public: list[str], nodes: list[onnx.NodeProto], told: str) -> None:
    """Leave the outputs of the model, and let these nodes read the others.

    They come last and the first of them at the very end: onnxruntime orders a graph from its last leaf on, so it runs each
    as soon as what it reads is there.
    """
    graph = model.graph
    kept = [o for o in graph.output if o.name in public]
    del graph.output[:]
    graph.output.extend(kept)
    graph.input.append(helper.make_tensor_value_info(told, TensorProto.INT64, [1]))
    graph.node.extend(reversed(nodes))
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


@lru_cache(maxsize=1)
def _observe() -> capi.Op:
    """The op. What its nodes are told by is kept as long as the process."""
    api = capi.api()
    assert api is not None
    told: list[np.ndarray] = []

    def kernel(first: int, number: int) -> int:
        own = np.zeros(1, OP)
        for name, content in (
            ("first", first), ("number", number), ("lanes", lanes()), ("input", api.address("KernelContext_GetInput")),
            ("data", api.address("GetTensorMutableData")), ("info", api.address("GetTensorTypeAndShape")),
            ("kind", api.address("GetTensorElementType")), ("rank", api.address("GetDimensionsCount")),
            ("dims", api.address("GetDimensions")), ("release", api.address("ReleaseTensorTypeAndShapeInfo")),
        ):  # fmt: skip
            own[name] = content
        told.append(own)
        return int(own.ctypes.data)

    return capi.Op(DOMAIN, OBSERVE, 2, ("first", "number"), kernel, kernels.count_input())
