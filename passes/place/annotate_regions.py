"""annotate-regions"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import ONNX_DOMAINS, Constant, Node, Tensor, Variable, is_float32
from onnxq.model import OUTPUT, Derived, Fixed, Model, Observed, Reason, Shared
from onnxq.numerics import PerTensor
from onnxq.passmanager import Pass

POOLS = ("AveragePool", "GlobalAveragePool")
JOINING = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Concat", "MatMul")  # all their inputs carry data
NORMALIZING = ("LayerNormalization",)  # input, scale and bias, as a layer has


@dataclass(frozen=True)
class AnnotateRegions(Pass):
    """Keep integers between integer nodes.

    Given:   %1 = Conv(%0, W);  %2 = Conv(%0, V);  %3 = Add(%1, %2);  %4 = MaxPool(%3);  %5 = Conv(%4, U)    Convs annotated
    Result:  specs: %1, %2, %3 observed, %4 shared with %3; all of them are read through Q and DQ
    Refused: an elementwise, pool or concat node stays float where it would quantize a tensor that is not quantized anyway:
             one that no integer node makes and no Conv, MatMul or Gemm reads in integers; or a result that some float node
             reads and none of these does. A pass-through node stays float unless its producer and one reader are integer.

    A pool of an integer node is integer whoever reads it: what it hands on is small, and its range narrower than before.
    On a target that has integers alone, every node that it can run is integer, whatever is around it.
    An activation that can vanish into the output parameters (Relu; Clip over 0) counts as part of the node before it.
    The outputs of an integer Conv, of a product of matrices that something computed is added to, and of every integer node
    that an integer node reads, are read through Q and DQ by all.
    """

    name: ClassVar[str] = "annotate-regions"

    def apply(self, model: Model) -> int:
        graph = model.graph
        compute = {n for n in model.compute_nodes() if n.name in model.planned}
        candidates = {n for n in graph.nodes if _can_be_integer(model, n)}
        everywhere = model.target.everywhere
        integer = compute | candidates if everywhere else _largest_consistent(model, compute, candidates)
        before = set(model.quantized_inputs)
        model.planned |= {n.name for n in integer}
        for node in graph.nodes:
            if node in integer - compute:
                _annotate(model, node)
        for node in graph.nodes:
            if node in integer:
                _quantize_output(model, node)
        for node in graph.nodes:  # in graph order: the ledger goes into the file
            if node in candidates - integer and node.op in model.target.region:
                model.keep_float(node, Reason.REGION)
                model.refuse(node, Reason.REGION.value)
        return len({name for name, _ in model.quantized_inputs - before})


def _can_be_integer(model: Model, node: Node) -> bool:
    target = model.target
    if node.op not in target.region | target.pass_through or node.domain not in ONNX_DOMAINS:
        return False
    if node.name in model.excluded | model.unplaced | model.slower | model.sensitive:
        return False
    if any(isinstance(model.specs.get(t.name), Derived) for t in node.inputs):
        return False  # the Add of a MatMul's bias
    data = _data_inputs(node)
    if not all(is_float32(t) for t in data) or not any(isinstance(t, Variable) for t in data):
        return False
    if node.op == "MatMul":
        return all(isinstance(t, Variable) for t in data)
    if node.op in JOINING:
        constants = [np.asarray(t.values) for t in data if isinstance(t, Constant)]
        return all(np.isfinite(c).all() and c.size if target.everywhere else _is_exact_in_8_bits(c) for c in constants)
    if node.op in NORMALIZING:
        parts = node.inputs[1:]
        return len(node.outputs) == 1 and len(parts) == 2 and all(isinstance(t, Constant) and is_float32(t) for t in parts)
    if node.op in target.absorbed and _vanishes(model, node):
        return False
    if node.op == "MaxPool":
        return len([t for t in node.outputs if t.name]) == 1 and model.graph.opset >= 12
    if node.op == "Resize":
        return node.attrs.get("mode", "nearest") == "nearest"
    if node.op in ("AveragePool", "GlobalAveragePool"):
        return len(node.inputs[0].shape or ()) in (3, 4)
    return True


def _vanishes(model: Model, node: Node) -> bool:
    """Whether an activation belongs to the node before it."""
    maker = model.graph.producer(node.inputs[0])
    before = model.target.region | model.target.compute.keys()
    return maker is not None and maker.op in before and model.absorbed(maker) is node.outputs[0]


def _is_exact_in_8_bits(constant: np.ndarray) -> bool:
    """One number is, at its own scale. A vector of several, such as the factors of a batch norm, shares one scale for
    the tensor, and its small entries would be lost.
    """
    return constant.size == 1 and bool(np.isfinite(constant).all())


def _data_inputs(node: Node) -> list[Tensor]:
    """The inputs that carry data, not shapes, indices or sizes."""
    if node.op in JOINING:
        return list(node.inputs)
    return [node.inputs[0]]


def _largest_consistent(model: Model, compute: set[Node], candidates: set[Node]) -> set[Node]:
    """The largest set with the compute nodes in which every other member has the neighbours that it needs."""
    integer = compute | candidates
    makers = {id(t): n for n in integer for t in (*n.outputs, model.absorbed(n))}
    waiting = [n for n in reversed(model.graph.nodes) if n in candidates]
    while waiting:
        node = waiting.pop()
        if node not in integer or node in compute or _consistent(model, node, integer, compute, makers):
            continue
        integer.remove(node)
        readers = [n for t in (*node.outputs, model.absorbed(node)) for n, _ in model.graph.readers(t)]
        around = [makers.get(id(t)) for t in node.inputs] + readers
        waiting += [n for n in around if n is not None and n in integer]
    return integer


def _consistent(model: Model, node: Node, integer: set[Node], compute: set[Node], makers: dict[int, Node]) -> bool:
    def readers(tensor: Tensor, among: set[Node]) -> list[bool]:
        return [n is not None and n in among and _reads_data(n, i) for n, i in model.graph.readers(tensor)]

    passes = node.op in model.target.pass_through
    for tensor in _data_inputs(node):
        quantized_anyway = makers.get(id(tensor)) in integer or (not passes and any(readers(tensor, compute)))
        if isinstance(tensor, Variable) and not quantized_anyway:
            return False
    results = [t for t in node.outputs if t.name] if passes else [model.absorbed(node)]
    if passes:
        return any(any(readers(t, integer)) for t in results)
    if node.op in POOLS:
        return True
    inside = readers(results[0], integer)
    return (bool(inside) and all(inside)) or any(readers(results[0], compute))


def _reads_data(node: Node, index: int) -> bool:
    return index == 0 or node.op in JOINING


def _annotate(model: Model, node: Node) -> None:
    target = model.target
    spec = Observed(target.activation_type, PerTensor(), target.activation_symmetric)
    for index, tensor in enumerate(_data_inputs(node)):
        if isinstance(tensor, Constant) and tensor.name not in model.specs and len(tensor.outputs) > 1:
            tensor = model.graph.constant(f"{node.name}_{tensor.name}", np.asarray(tensor.values))
            model.graph.set_input(node, index, tensor)
        model.specs.setdefault(tensor.name, spec)
        model.quantized_inputs.add((node.name, index))
    if node.op in target.pass_through:
        for result in node.outputs:
            model.specs[result.name] = Shared(node.inputs[0].name)
    if node.op in NORMALIZING:
        _annotate_parameters(model, node)


def _annotate_parameters(model: Model, node: Node) -> None:
    """Scale and bias of a normalization: of 8 bits, as activations are that have as many, and int32."""
    target = model.target
    for index, base in ((1, "scale"), (2, "bias")):
        if model.specs.get(node.inputs[index].name) is not None:  # another node's, too
            copy = model.graph.constant(f"{node.name}_{base}", np.asarray(node.inputs[index].values))
            model.graph.set_input(node, index, copy)
        model.quantized_inputs.add((node.name, index))
    kind = target.activation_type.of_bits(min(8, target.activation_type.bits))
    model.specs[node.inputs[1].name] = Observed(kind, PerTensor(), target.activation_symmetric)
    model.specs[node.inputs[2].name] = Derived(node.inputs[0].name, node.inputs[1].name)


def _quantize_output(model: Model, node: Node) -> None:
    """Let every reader of an integer node's result read it through Q and DQ, where the node needs that or gains by it."""
    target = model.target
    passes = node.op in target.pass_through
    results = [t for t in node.outputs if t.name] if passes else [model.absorbed(node)]
    spec = Observed(target.activation_type, PerTensor(), target.activation_symmetric)
    for result in results:
        readers = model.readers(result)
        fixed = target.fixed_output(node.op)
        rule = target.compute[node.op].output if node.op in target.compute else "required"
        wanted = any(r[0] != OUTPUT and r in model.quantized_inputs for r in readers)
        if rule == "required" or wanted or _looked_through(model, node, readers):
            model.specs.setdefault(result.name, spec)
            if fixed is not None:
                model.specs[result.name] = Fixed(fixed)
            model.quantized_inputs.update(readers)


def _looked_through(model: Model, node: Node, readers: list[tuple[str, int]]) -> bool:
    """Whether the runtime looks for the Q of a layer behind what comes after it, and drops it from its integers without one.

    It does where an activation has a single reader; and it makes a Gemm of a product of matrices and the sum after it.
    """
    add = model.graph.sole_consumer(node.outputs[0])
    if node.op == "MatMul" and add is not None and add.op == "Add" and len(node.outputs[0].shape or ()) == 2:
        return model.bias_of(node) is None
    follows = model.absorbed(node) is not node.outputs[0] and model.bias_of(node) in (None, (node, 2))
    follows = follows and model.target.audited
    return node.op in model.target.compute and follows and len(readers) == 1 and readers[0][0] != OUTPUT
