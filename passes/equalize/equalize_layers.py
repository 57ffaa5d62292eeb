"""equalize-layers"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.equalization import Equalizing, choose_factors, evened, scale_inputs, scale_outputs, scaled_by
from onnxq.graph import Graph
from onnxq.model import Model
from onnxq.streams import Stream, stream_of


@dataclass(frozen=True)
class EqualizeLayers(Equalizing):
    """Even out the channels between Convs: along a Relu, a pool, and all residual sums that have to be scaled together.

    Given:   %1 = Conv(%0, W, B);  %2 = Relu(%1);  %3 = Conv(%2, V)          statistics of %2 by channel
    Result:  %4 = Conv(%0, W / s, B / s);  %5 = Relu(%4);  %3 = Conv(%5, V * s)        s by channel, powers of two
    Refused: the predicted noise does not fall below `gain` of what it was; something reads or makes a part that is no Conv
             of constant parameters, Relu, LeakyRelu, PRelu, pool or Add; its ranges came with the model.
    """

    name: ClassVar[str] = "equalize-layers"
    gain: float = 0.8

    def looked_at(self, graph: Graph) -> set[str]:
        return {name for node in graph.find("Conv") if (s := stream_of(graph, node.outputs[0])) for name in s.tensors}

    def apply(self, model: Model) -> int:
        seen, rewrites = set[str](), 0
        for node in list(model.graph.find("Conv")):
            if node.outputs[0].name in seen or not model.channels:
                continue
            stream = stream_of(model.graph, node.outputs[0])
            if stream is not None:
                rewrites += self._equalize(model, stream)
                seen |= {t.name for n in (*stream.makers, *stream.between) for t in n.outputs}
        return rewrites

    def _equalize(self, model: Model, stream: Stream) -> bool:
        first, nodes = stream.makers[0], [*stream.makers, *stream.readers]
        if model.excluded & {n.name for n in nodes}:
            return False
        if model.trained.keys() & {*stream.tensors, *(n.inputs[1].name for n in nodes)}:
            model.refuse(first, "its ranges came with the model")
            return False
        seen = {name: model.channels[name] for name in stream.tensors if name in model.channels}
        if not seen or any(r.inputs[0].name not in seen for r in stream.readers):
            return False
        factors = choose_factors(list(seen.values()), [(r, seen[r.inputs[0].name]) for r in stream.readers], gain=self.gain)
        if factors is None:
            model.refuse(first, "its channels are even enough")
            return False
        graph, new = model.graph, {name: evened(model.graph, tensor) for name, tensor in stream.tensors.items()}
        for maker in stream.makers:
            scale_outputs(graph, maker, factors, new[maker.outputs[0].name])
        for node in stream.between:
            inputs = [new.get(t.name, t) for t in node.inputs]
            graph.rewire(node, inputs=inputs, outputs=[new[node.outputs[0].name]])
        for reader in stream.readers:
            scale_inputs(graph, reader, new[reader.inputs[0].name], factors)
        model.scaled |= {new[name].name: scaled_by(tensor, factors) for name, tensor in stream.tensors.items()}
        return True
