"""Streams: tensors whose channels can only be scaled together, from the Convs that make them to the Convs that read them.

A residual branch is added to what it branched off; so all that is added up along a network is of one scale by channel.
Between the Convs at both ends stand only ops that keep channels apart and give f(x / s) = f(x) / s for every s > 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from onnxq.graph import Constant, Graph, Node, Tensor, input_at

HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")


@dataclass
class Stream:
    tensors: dict[str, Tensor] = field(default_factory=dict)
    makers: list[Node] = field(default_factory=list)  # Convs of constant parameters
    between: list[Node] = field(default_factory=list)
    readers: list[Node] = field(default_factory=list)  # Convs of constant weights, by their input


def stream_of(graph: Graph, tensor: Tensor) -> Stream | None:
    """The stream that a tensor is in; None where something takes part that cannot be scaled by channel."""
    stream, waiting, nodes = Stream(), [tensor], set[str]()
    while waiting:
        tensor = waiting.pop(0)
        if tensor.name in stream.tensors:
            continue
        maker = graph.producer(tensor)
        readers = graph.readers(tensor)
        if maker is None or isinstance(tensor, Constant) or not readers or graph.is_captured(tensor):
            return None
        stream.tensors[tensor.name] = tensor
        if maker.op == "Conv" and not maker.domain:
            if not has_constant_parameters(maker):
                return None
            stream.makers.append(maker)
        elif not _passes(stream, waiting, nodes, maker):
            return None
        for node, index in readers:
            if node is None:
                return None
            if node.op == "Conv" and not node.domain:
                if index != 0 or not isinstance(node.inputs[1], Constant):
                    return None
                stream.readers.append(node)
            elif not _passes(stream, waiting, nodes, node):
                return None
    return stream


def has_constant_parameters(node: Node) -> bool:
    bias = input_at(node, 2)
    return isinstance(node.inputs[1], Constant) and (bias is None or isinstance(bias, Constant))


def _passes(stream: Stream, waiting: list[Tensor], nodes: set[str], node: Node) -> bool:
    """Whether the node lets factors through; what it reads and gives is then looked at too."""
    if node.name in nodes:
        return True
    nodes.add(node.name)
    if node.domain or len(node.outputs) != 1:
        return False
    if node.op == "Add":
        a, b = node.inputs
        if a.shape is None or b.shape is None or len(a.shape) != len(b.shape) or a.shape[1:2] != b.shape[1:2]:
            return False
        data = [a, b]
    elif node.op in HOMOGENEOUS and all(isinstance(t, Constant) for t in node.inputs[1:]):
        data = [node.inputs[0]]
    else:
        return False
    stream.between.append(node)
    waiting += [*data, node.outputs[0]]
    return True
