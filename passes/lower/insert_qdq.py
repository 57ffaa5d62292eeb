"""insert-qdq"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Constant, Tensor, Variable
from onnxq.model import OUTPUT, Model
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class InsertQdq(Pass):
    """Let the quantized readers of every activation read it through one QuantizeLinear and one DequantizeLinear.

    Given:   %1 = Conv(%0, W);  %2 = Conv(%1, V);  %3 = Sigmoid(%1)     quantized: (%2's Conv, 0)
    Result:  %4 = QuantizeLinear(%1);  %5 = DequantizeLinear(%4);  %2 = Conv(%5, V);  %3 = Sigmoid(%1)
    Refused: an activation with no quantized reader.

    A graph output that is read quantized keeps its name: it becomes the output of the DequantizeLinear.
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
        for name in [n for n in model.specs if not isinstance(model.graph.tensors().get(n), Constant)]:
            del model.specs[name]
        model.quantized_inputs.clear()
        model.graph.cleanup()
        return inserted


def _insert(model: Model, tensor: Variable | Tensor, readers: list[tuple[str, int]]) -> None:
    graph, params = model.graph, model.params_of(tensor.name)
    scale, zero_point = model.parameter_constants(tensor.name)
    nodes = {n.name: n for n in dict.fromkeys(tensor.outputs)}
    source = tensor
    if any(name == OUTPUT for name, _ in readers):
        source = graph.variable(f"{tensor.name}_float", tensor.dtype, tensor.shape)
        maker = graph.producer(tensor)
        assert maker is not None
        graph.rewire(maker, outputs=[source if t is tensor else t for t in maker.outputs])
        for name, index in model.readers(tensor):
            if name != OUTPUT and (name, index) not in model.quantized_inputs:
                graph.set_input(nodes[name], index, source)
        result = tensor
    else:
        result = graph.variable(f"{tensor.name}_DequantizeLinear_Output", tensor.dtype, tensor.shape)
    codes = graph.variable(f"{tensor.name}_QuantizeLinear_Output", params.type.dtype, tensor.shape)
    domain = model.qdq_domain
    base = tensor.name
    graph.insert("QuantizeLinear", [source, scale, zero_point], [codes], name=f"{base}_QuantizeLinear", domain=domain)
    graph.insert("DequantizeLinear", [codes, scale, zero_point], [result], name=f"{base}_DequantizeLinear", domain=domain)
    for name, index in readers:
        if name != OUTPUT:
            graph.set_input(nodes[name], index, result)
