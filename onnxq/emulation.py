"""What a placed model will compute, in float: tensors that are to be quantized are rounded where they are read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from onnxq.graph import Constant
from onnxq.model import OUTPUT, Derived, Model, Reader
from onnxq.numerics import fake_quantize


def emulated(model: Model, wanted: Callable[[str, Reader], bool] = lambda tensor, reader: True) -> onnx.ModelProto:
    """The model before lowering with Q and DQ where `wanted(tensor, reader)` reads quantized; weights are rounded in place.

    Biases stay exact: their 32 bits round to nothing against the rest. Graph outputs keep their float values.
    """
    twin = model.fork()
    graph = twin.graph
    nodes = {n.name: n for n in graph.nodes}
    for name, tensor in list(graph.tensors().items()):
        readers = [r for r in twin.readers(tensor) if r in model.quantized_inputs and r[0] != OUTPUT and wanted(name, r)]
        if not readers or name not in model.specs or isinstance(model.specs[name], Derived):
            continue
        params = twin.params_of(name)
        if isinstance(tensor, Constant):
            rounded = graph.constant(f"{name}_rounded", fake_quantize(np.asarray(tensor.values), params))
        else:
            scale, zero_point = twin.parameter_constants(name)
            codes = graph.variable(f"{name}_codes", params.type.dtype, tensor.shape)
            rounded = graph.variable(f"{name}_rounded", tensor.dtype, tensor.shape)
            inside = twin.inside_width(tensor, params)
            graph.insert("QuantizeLinear", [inside, scale, zero_point], [codes], domain=twin.qdq_domain)
            graph.insert("DequantizeLinear", [codes, scale, zero_point], [rounded], domain=twin.qdq_domain)
        for reader, index in readers:
            graph.set_input(nodes[reader], index, rounded)
    graph.cleanup()
    return graph.to_stored_proto()
