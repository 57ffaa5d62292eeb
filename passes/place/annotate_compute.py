"""annotate-compute"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.errors import RecipeError
from onnxq.graph import Constant, Graph, Node, Tensor, Variable, input_at, is_float32, value
from onnxq.model import Derived, Model, Observed, QuantSpec, Reason
from onnxq.numerics import Granularity, PerAxis, PerTensor
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class AnnotateCompute(Pass):
    """Let every Conv, MatMul and Gemm of a constant weight read integers: activation, weight and bias.

    Given:   %1 = Conv(%0, W, B)
    Result:  specs: %0 observed (the target's activation type), W observed per output channel, B derived from both;
             the node reads all three through Q and DQ; a bias is left alone where the target's are float
    Refused: excluded by the user, found unfused by the audit, marked by select-layers or measured to be slower; the weight
             or bias is computed; the activation is not known to be float32; a Gemm with alpha, beta or transA that the
             kernel does not take.
    """

    name: ClassVar[str] = "annotate-compute"
    weight_granularity: str = "target"  # or per-channel, per-tensor
    weight_symmetry: str = "target"  # or symmetric, asymmetric

    def __post_init__(self) -> None:
        if self.weight_granularity not in ("target", "per-channel", "per-tensor"):
            raise RecipeError(f"weight_granularity is {self.weight_granularity}; it takes target, per-channel or per-tensor")
        if self.weight_symmetry not in ("target", "symmetric", "asymmetric"):
            raise RecipeError(f"weight_symmetry is {self.weight_symmetry}; it takes target, symmetric or asymmetric")

    def apply(self, model: Model) -> int:
        annotated = 0
        for node in list(model.compute_nodes()):
            refusal = _refusal(model, node)
            if refusal is not None:
                model.keep_float(node, *refusal)
                model.refuse(node, f"{refusal[0].value}; {refusal[1]}" if refusal[1] else refusal[0].value)
                continue
            if (node.name, 1) not in model.quantized_inputs:
                _annotate(model, node, self._weight_spec(model, node))
                model.planned.add(node.name)
                annotated += 1
        return annotated

    def _weight_spec(self, model: Model, node: Node) -> Observed:
        by_channel = self.weight_granularity == "per-channel"
        if self.weight_granularity == "target":
            by_channel = model.target.is_per_channel(node.op)
        symmetric = self.weight_symmetry == "symmetric"
        if self.weight_symmetry == "target":
            symmetric = model.target.weight_symmetric
        return Observed(model.target.weight_type, _by_channel(model, node) if by_channel else PerTensor(), symmetric)


def _refusal(model: Model, node: Node) -> tuple[Reason, str] | None:
    if node.name in model.excluded:
        return Reason.EXCLUDED, ""
    if node.name in model.unplaced:
        return Reason.NOT_FUSED, ""
    if node.name in model.sensitive:
        return Reason.SENSITIVE, ""
    if node.name in model.slower:
        return Reason.SLOWER, ""
    activation, weight, bias = node.inputs[0], node.inputs[1], input_at(node, 2)
    if not isinstance(weight, Constant):
        return Reason.NO_CONSTANT_WEIGHT, ""
    if not isinstance(activation, Variable):
        return Reason.UNSUPPORTED, "its activation is constant"
    if not is_float32(activation) or not is_float32(weight):
        return Reason.NOT_FLOAT32, f"{activation.name} is {activation.dtype}"
    if bias is not None and not isinstance(bias, Constant):
        return Reason.UNSUPPORTED, "its bias is computed"
    if node.op == "Gemm":
        attrs = node.attrs
        if attrs.get("alpha", 1.0) != 1.0 or (bias is not None and attrs.get("beta", 1.0) != 1.0) or attrs.get("transA", 0):
            return Reason.UNSUPPORTED, "alpha, beta or transA is set"
        if bias is not None and tuple(bias.shape) not in ((), (1,), (_columns(node),), (1, _columns(node))):
            return Reason.UNSUPPORTED, "its bias differs by row"
    if 0 in tuple(weight.shape):
        return Reason.UNSUPPORTED, "its weight is empty"
    if not np.isfinite(np.asarray(weight.values)).all():
        return Reason.UNSUPPORTED, "its weight holds NaN or infinity"
    if model.target.compute[node.op].output == "required" and not model.graph.readers(model.absorbed(node)):
        return Reason.CAPTURED, ""
    return None


def _annotate(model: Model, node: Node, weight_spec: Observed) -> None:
    graph, target = model.graph, model.target
    activation = node.inputs[0]
    model.specs.setdefault(activation.name, Observed(target.activation_type, PerTensor(), target.activation_symmetric))
    model.quantized_inputs.add((node.name, 0))

    weight = _own(model, node, 1, weight_spec)
    model.quantized_inputs.add((node.name, 1))

    bias = input_at(node, 2)
    if target.float_bias:
        return
    if bias is not None:
        _shape_bias(graph, node, bias)
        _own(model, node, 2, Derived(activation.name, weight.name))
        model.quantized_inputs.add((node.name, 2))
    elif node.op == "MatMul" and not target.everywhere:  # else the Add is an op of its own
        _annotate_added_bias(model, node, Derived(activation.name, weight.name))


def _annotate_added_bias(model: Model, matmul: Node, spec: Derived) -> None:
    """A row that is added to a MatMul is its bias: left in float, the runtime would make a float Gemm of the two."""
    add = model.graph.sole_consumer(matmul.outputs[0])
    if add is None or add.op != "Add" or add.domain:
        return
    index = 1 if add.inputs[0] is matmul.outputs[0] else 0
    if isinstance(add.inputs[index], Constant) and tuple(add.inputs[index].shape) == (_columns(matmul),):
        _own(model, add, index, spec)
        model.quantized_inputs.add((add.name, index))


def _columns(node: Node) -> int:
    """Output columns of a MatMul or Gemm."""
    return int(node.inputs[1].shape[0 if node.attrs.get("transB", 0) else -1])


def _by_channel(model: Model, node: Node) -> Granularity:
    rank = np.asarray(node.inputs[1].values).ndim
    axis = model.target.compute[node.op].weight_axis
    if node.op == "Gemm" and node.attrs.get("transB", 0):
        axis = 1 - axis
    if node.op == "MatMul" and rank != 2:
        return PerTensor()
    return PerAxis(axis % rank)


def _shape_bias(graph: Graph, node: Node, bias: Tensor) -> None:
    """A Gemm's bias may be a number, or a row of two dimensions; the integer kernel takes one for each column."""
    if node.op == "Gemm" and tuple(bias.shape) != (_columns(node),):
        row = np.broadcast_to(np.asarray(value(bias)).reshape(-1), (_columns(node),))
        graph.set_input(node, 2, graph.constant(bias.name, row))


def _own(model: Model, node: Node, index: int, spec: QuantSpec) -> Tensor:
    """Give the node's constant input this spec; one that another reader wants otherwise is copied first."""
    tensor = node.inputs[index]
    if model.specs.get(tensor.name, spec) != spec:
        tensor = model.graph.constant(f"{node.name}_{tensor.name}", np.asarray(value(tensor)))
        model.graph.set_input(node, index, tensor)
    model.specs[tensor.name] = spec
    return tensor
