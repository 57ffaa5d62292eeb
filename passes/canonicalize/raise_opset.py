"""raise-opset"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx
from onnx import helper, version_converter
from onnx.external_data_helper import uses_external_data

from onnxq.graph import Graph
from onnxq.model import PER_CHANNEL_OPSET, Model
from onnxq.passmanager import Pass
from onnxq.proto import folder_of, say_folder

RESIZE_OPSET = 11  # the first in which Resize has modes; before, it had those of _keep_sampling


@dataclass(frozen=True)
class RaiseOpset(Pass):
    """Raise the opset to the first that has LayerNormalization, or else to the first that has per-channel DequantizeLinear.

    Given:   opset 4:  %y = Reshape(%x) {shape=[1, -1]}
    Result:  opset 17: %y = Reshape(%x, [1, -1])                    13 where onnx's converter does not get to 17
             21 where the target has types or ops of it
    Refused: the opset is that or newer; the converter has no adapter for an op (where it is below 13 then, Q and DQ
             of com.microsoft are emitted, which need opset 10).
    """

    name: ClassVar[str] = "raise-opset"
    version: int = 17

    def apply(self, model: Model) -> int:
        graph = model.graph
        wanted = max(self.version, model.target.opset)
        for version in dict.fromkeys((wanted, self.version, PER_CHANNEL_OPSET)):
            if graph.opset >= version:
                return 0
            try:
                raised = _raised(graph, version)
            except Exception as error:  # the converter raises plain RuntimeErrors and its own ConvertError
                why = f"onnx cannot convert opset {graph.opset} to {version}: {str(error).splitlines()[0][:200]}"
                model.refusals.append(("model", why))
                continue
            graph.replace(raised)
            return 1
        return 0


def _raised(graph: Graph, version: int) -> onnx.ModelProto:
    proto = graph.to_stored_proto()
    used = {n.domain for n in _nodes(proto.graph)} | {""}
    kept = [o for o in proto.opset_import if o.domain in used]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    proto.ir_version = max(proto.ir_version, 4)  # before 4 every initializer had to be an input too
    initializers = {t.name for t in proto.graph.initializer}
    inputs = [i for i in proto.graph.input if i.name not in initializers]
    weights = [t for t in proto.graph.initializer if uses_external_data(t)]  # inputs, for the converter not to ask for them
    small = [t for t in proto.graph.initializer if not uses_external_data(t)]
    del proto.graph.input[:], proto.graph.initializer[:]
    proto.graph.input.extend([*inputs, *(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in weights)])
    proto.graph.initializer.extend(small)
    raised = version_converter.convert_version(proto, version)
    if graph.opset < RESIZE_OPSET:
        _keep_sampling(raised)
    onnx.checker.check_model(raised)
    raised.ir_version = max(raised.ir_version, 8)
    kept = {i.name for i in inputs}
    inputs = [i for i in raised.graph.input if i.name in kept]
    del raised.graph.input[:]
    raised.graph.input.extend(inputs)
    raised.graph.initializer.extend(weights)
    say_folder(raised, folder_of(proto))
    return raised


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the bodies in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in [attribute.g, *attribute.graphs]:
                yield from _nodes(body)


def _keep_sampling(raised: onnx.ModelProto) -> None:
    """Say on each Resize what Upsample and Resize did before opset 11: onnx's converter leaves it to the newer defaults."""
    for node in _nodes(raised.graph):
        if node.op_type == "Resize" and not node.domain:
            node.attribute.append(onnx.helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
            node.attribute.append(onnx.helper.make_attribute("nearest_mode", "floor"))
