"""insert-qdq"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Constant, Tensor
from onnxq.model import OUTPUT, Model, short_name
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class InsertQdq(Pass):
    """Let the quantized readers of every activation read it through one QuantizeLinear and one DequantizeLinear.

    Given:   %1 = Conv(%0, W);  %2 = Conv(%1, V);  %3 = Sigmoid(%1)     quantized: (%2's Conv, 0)
    Result:  %4 = QuantizeLinear(%1);  %5 = DequantizeLinear(%4);  %2 = Conv(%5, V);  %3 = Sigmoid(%1)
    Refused: an activation with no quantized reader.

    A graph output that is read quantized keeps its name: it becomes the output of the DequantizeLinear. Bodies of
    control-flow nodes read the dequantized tensor where all readers outside do, or where it is a graph output.
    """

    name: ClassVar[str] = "insert-qdq"

    def apply(self, model: Model) -> int:
        inserted = 0
        for name, tensor in list(model.graph.tensors().items()):
            if isinstance(tensor, Constant) or name not in model.specs:
                continue
            readers = [r for r in model.readers(tensor) if r in model.quantized_inputs]
            if readers:
                _insert(model, tensor, readers)
                inserted += 1
        tensors = model.graph.tensors()
        for name in [n for n in model.specs if not isinstance(tensors.get(n), Constant)]:
            del model.specs[name]
        model.quantized_inputs.clear()
        model.graph.cleanup()
        return inserted


def _insert(model: Model, tensor: Tensor, readers: list[tuple[str, int]]) -> None:
    graph, params, base = model.graph, model.params_of(tensor.name), short_name(tensor.name)
    scale, zero_point = model.parameter_constants(tensor.name)
    by_all, is_output = model.output_is_quantized(tensor), any(name == OUTPUT for name, _ in readers)
    nodes = {n.name: n for n in dict.fromkeys(tensor.outputs)}
    source, result = tensor, graph.variable(f"{base}_dq", tensor.dtype, tensor.shape)
    if is_output:
        source, result = graph.variable(f"{base}_float", tensor.dtype, tensor.shape), tensor
        maker = graph.producer(tensor)
        assert maker is not None  # graph inputs are never placed as quantized outputs
        graph.rewire(maker, outputs=[source if t is tensor else t for t in maker.outputs])
        for name, index in model.readers(tensor):
            if name != OUTPUT and (name, index) not in readers:
                graph.set_input(nodes[name], index, source)
    for name, index in readers:
        if name != OUTPUT:
            graph.set_input(nodes[name], index, result)
    if by_all and not is_output:
        graph.replace_uses(tensor, result)  # what is left are the bodies that capture it
    codes = graph.variable(f"{base}_q", params.type.dtype, tensor.shape)
    domain = model.qdq_domain
    source = model.inside_width(source, params)
    graph.insert("QuantizeLinear", [source, scale, zero_point], [codes], name=f"{base}_Q", domain=domain)
    graph.insert("DequantizeLinear", [codes, scale, zero_point], [result], name=f"{base}_DQ", domain=domain)
