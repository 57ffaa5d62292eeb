"""Exposure: run a model and see its inner tensors, at little more than the cost of running it.

A tensor that is made an output is brought into the layout of the model, and no longer fused away with its neighbours, each
time the model runs; on small convolutions this doubles the time. Here onnxruntime optimizes the model first, with a probe on
each wanted tensor: an op of its own kind of layout that keeps the tensor apart and tells where it went. Then the probes are
taken out again, and what they read becomes an output of the optimized graph, which runs as it is.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxq import runtime
from onnxq.blocks import Blocks
from onnxq.errors import ModelError
from onnxq.proto import bodies_of

PROBE = "onnxq_probe_"
BLOCKED = "com.microsoft.nchwc"  # the domain of onnxruntime's ops on blocks of channels
S = TypeVar("S")


@dataclass(frozen=True)
class Place:
    """Where a tensor is in the optimized graph: the output it is of, and how many channels are in blocks, if they are."""

    output: str
    channels: int | None = None


class Exposed:
    """A session that gives, besides the outputs of the model, some tensors of it."""

    def __init__(
        self,
        proto: onnx.ModelProto,
        names: Iterable[str],
        *,
        among: Iterable[str] = (),
        graphs: OptimizedGraphs | None = None,
        threads: int = 0,
        config: Mapping[str, str] | None = None,
    ) -> None:
        """`among` are all tensors that are seen of this model in other sessions, too, so that all of them run one graph.

        `graphs` are those that were made before. Raises ModelError where onnxruntime cannot load the model.
        """
        wanted, everything = made_of(proto, names, among)
        try:
            graph = (graphs or OptimizedGraphs()).of(proto, everything)
            model, self.places = graph.exposing(wanted)
            self._session = runtime.Session(graph.save(model), threads=threads, config=config, optimize=False)
        except ModelError:  # what the runtime makes of some models it cannot load again
            twin = runtime.exposed(proto, wanted)
            self._session = runtime.Session(twin, threads=threads, config=config)
            self.places = {name: Place(name) for name in wanted}
        self._public = [o.name for o in proto.graph.output]
        self.inputs = self._session.inputs

    def run(self, feed: runtime.Feed, where: str = "a sample") -> dict[str, Any]:
        """The outputs and the tensors by name; those that are in blocks of channels as Blocks."""
        values = self._session.run(feed, where)
        found = {name: values[name] for name in self._public}
        for name, place in self.places.items():
            value = values[place.output]
            found[name] = value if place.channels is None else Blocks.of(value, place.channels, lanes())
        return found


def made_of(proto: onnx.ModelProto, names: Iterable[str], among: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those of the names that nodes of the model make, and all of both that they make, in the model's order."""
    made = dict.fromkeys(name for node in proto.graph.node for name in node.output)
    wanted = [name for name in names if name in made]
    everything = {*among, *wanted}
    return wanted, [name for name in made if name in everything]


class OptimizedGraph:
    """The graph that onnxruntime makes of a model, in which certain tensors are to be had. Its weights are in a folder."""

    def __init__(self, proto: onnx.ModelProto, tensors: Iterable[str]) -> None:
        """The tensors are made by nodes of the model. Raises ModelError where onnxruntime cannot load it."""
        self._public = [o.name for o in proto.graph.output]
        self._folder = Path(tempfile.mkdtemp(prefix="onnxq-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._serial = count()
        tensors = list(tensors)
        probed = _images(proto, tensors) - {*self._public} if lanes() else set()
        plain = [name for name in tensors if name not in probed and name not in self._public]
        while True:
            probes = {f"{PROBE}{k}": name for k, name in enumerate(tensors) if name in probed}
            path = self._path()
            runtime.save_optimized(_with_probes(proto, probes, plain), path)
            self._model = onnx.load(path, load_external_data=False)
            self._places = _places(self._model, probes)
            if not (lost := probed - self._places.keys()):
                break
            plain += sorted(lost)
            probed -= lost
        self._places |= {name: Place(name) for name in tensors if name in self._public or name in plain}

    def exposing(self, wanted: Iterable[str]) -> tuple[onnx.ModelProto, dict[str, Place]]:
        """A copy of it, without the probes, with some of the tensors as further outputs, and where each of them is."""
        model, chosen = onnx.ModelProto(), {name: self._places[name] for name in wanted}
        model.CopyFrom(self._model)
        _expose(model, self._public, [place.output for place in chosen.values()])
        return model, chosen

    def save(self, model: onnx.ModelProto) -> Path:
        """Write what was made of a copy to a file beside the weights, which is there as long as this object."""
        path = self._path()
        onnx.save(model, path)
        return path

    def _path(self) -> Path:
        return self._folder / f"optimized{next(self._serial)}.onnx"


class OptimizedGraphs:
    """Where optimized graphs are made; the last one and its last session are kept for whoever asks for the same again.

    Models are the same if their messages are: large weights are in a file, see store.py.
    """

    def __init__(self) -> None:
        self._graph, self._session = _Last(), _Last()

    def of(self, proto: onnx.ModelProto, tensors: Iterable[str]) -> OptimizedGraph:
        """See OptimizedGraph."""
        names = tuple(tensors)
        return self._graph.of((_message(proto), names), lambda: OptimizedGraph(proto, names))

    def session(self, proto: onnx.ModelProto, how: Hashable, make: Callable[[], S]) -> S:
        """What runs a model in a certain way; `make` makes it."""
        return self._session.of((_message(proto), how), make)

    def end_session(self) -> None:
        """Let go of the session, and of the memory that it has."""
        self._session.clear()

    def clear(self) -> None:
        """Let go of all that is kept."""
        self._session.clear()
        self._graph.clear()


class _Last:
    """What was made last, by what it was made of."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self._made: Any = None

    def of(self, key: Hashable, make: Callable[[], S]) -> S:
        if self._made is None or self._key != key:
            self.clear()  # first, for there not to be two of them at once
            self._made, self._key = make(), key
        return self._made

    def clear(self) -> None:
        self._key = self._made = None


def _message(proto: onnx.ModelProto) -> bytes:
    return proto.SerializeToString(deterministic=True)


def _images(proto: onnx.ModelProto, names: Iterable[str]) -> set[str]:
    """Those of the tensors that are known to be float32 (N, C, H, W): what convolutions lay out in blocks."""
    wanted, graph = set(names), proto.graph
    return {
        info.name
        for info in [*graph.value_info, *graph.output]
        if info.name in wanted
        and info.type.tensor_type.elem_type == TensorProto.FLOAT
        and len(info.type.tensor_type.shape.dim) == 4
    }


def _with_probes(proto: onnx.ModelProto, probes: Mapping[str, str], plain: Iterable[str]) -> onnx.ModelProto:
    """The model with a probe, a pool, on each tensor, and with plain tensors as outputs."""
    twin = runtime.exposed(proto, plain)
    for probe, name in probes.items():
        twin.graph.node.append(helper.make_node("GlobalAveragePool", [name], [probe], name=probe))
        twin.graph.output.append(helper.make_tensor_value_info(probe, TensorProto.FLOAT, None))
    return twin


def _places(model: onnx.ModelProto, probes: Mapping[str, str]) -> dict[str, Place]:
    """What each probe reads in the optimized graph; a probe that is no longer one is left out."""
    makers = {name: node for node in model.graph.node for name in node.output}
    places = {}
    for probe, name in probes.items():
        pool, channels = makers.get(probe), None
        if pool is not None and (pool.domain, pool.op_type) == (BLOCKED, "ReorderOutput"):
            channels = next((a.i for a in pool.attribute if a.name == "channels"), None)
            pool = makers.get(pool.input[0])
            if channels is None or pool is None or pool.domain != BLOCKED:
                continue
        if pool is not None and pool.op_type == "GlobalAveragePool" and pool.input[0] in makers:
            places[name] = Place(pool.input[0], channels)
    return places


def _expose(model: onnx.ModelProto, public: list[str], tensors: Iterable[str]) -> None:
    """Leave what makes the model's own outputs, and these tensors as further outputs."""
    graph = model.graph
    kept = [o for o in graph.output if o.name in public]
    del graph.output[:]
    graph.output.extend(kept)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(tensors) if name not in public)
    needed = {o.name for o in graph.output}
    used = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            used.append(node)
            needed.update(node.input)
            needed.update(_read_inside(node))
    del graph.node[:]
    graph.node.extend(reversed(used))


def _read_inside(node: onnx.NodeProto) -> set[str]:
    """What the bodies of a node read, from wherever."""
    inner = list(bodies_of(node))
    return {o.name for body in inner for o in body.output} | {i for body in inner for n in body.node for i in n.input}


@lru_cache(maxsize=1)
def lanes() -> int:
    """Channels to a block on this machine, as its runtime really lays them out; 0 where it does not."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64, 1, 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    node = helper.make_node("ReorderInput", ["x"], ["y"], domain=BLOCKED)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(BLOCKED, 1)]
    model = helper.make_model(helper.make_graph([node], "g", [x], [y]), opset_imports=imports, ir_version=8)
    values = np.arange(128, dtype=np.float32).reshape(1, 64, 1, 2)
    try:
        found = runtime.evaluate(model, {"x": values})["y"]
    except ModelError:
        return 0
    sizes = [b for b in (4, 8, 16, 32) if found.shape == values.shape and np.array_equal(_plain(found, b), values)]
    return sizes[0] if sizes else 0


def _plain(found: np.ndarray, size: int) -> np.ndarray:
    return Blocks.of(found, found.shape[1], size).plain()
