"""Checking: whether a quantized model, anybody's, is laid out as a target demands, and where it is not.

What is looked at is what the file says: types, zero points, granularity, biases, and which ops stand between Q and DQ. What
a runtime makes of it is another matter: see inspection.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxq.graph import Constant, Graph, Node, Tensor, Variable, input_at, is_float32, value
from onnxq.model import Model
from onnxq.numerics import PerAxis, QuantParams, QuantType
from onnxq.passes import FoldConstants
from onnxq.recovery import DOMAINS, params_at
from onnxq.runtime import CONTRIB
from onnxq.source import load_any
from onnxq.target import Target, load

Q, DQ = "QuantizeLinear", "DequantizeLinear"
LAYERS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
NORMALIZING = frozenset({"LayerNormalization", "InstanceNormalization", "BatchNormalization", "GroupNormalization"})
AT_RUN_TIME = frozenset({"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"})
BIAS_TOLERANCE = 1e-4  # of its scale: products are rounded in more than one way


@dataclass(frozen=True)
class Violation:
    """What a target demands of a tensor at a node, and what is there."""

    node: str
    op: str
    tensor: str
    demanded: str
    found: str


def check(model: str | Path | bytes | onnx.ModelProto, target: str | Target) -> list[Violation]:
    """Where the model does not obey the target, in the order of its nodes; nothing where it does.

    A model without Q and DQ obeys every target: it is computed in float. Raises ModelError where it is no ONNX model and
    RecipeError where there is no such target.
    """
    chosen = load(target) if isinstance(target, str) else target
    source = load_any(model)
    graph = Graph.from_proto(source.proto, source.folder, source.store)
    FoldConstants().apply(Model(graph, chosen))  # parameters may come through Constant, Identity and Cast
    return [v for scope in graph.scopes() for v in _Scope(scope, chosen).violations()]


class _Scope:
    """The main graph, or one body."""

    def __init__(self, graph: Graph, target: Target) -> None:
        self.graph, self.target = graph, target
        self.found: list[Violation] = []

    def violations(self) -> list[Violation]:
        for node in self.graph.nodes:
            if _is(node, Q) and isinstance(node.inputs[0], Variable):
                self._activation(node, node.inputs[0])
            elif _is(node, DQ):
                self._dequantizer(node)
            elif not _is(node, Q):
                self._operator(node)
                self._integer_node(node)
        return self.found

    def _say(self, node: Node, tensor: Tensor, demanded: str, found: str) -> None:
        self.found.append(Violation(node.name, node.op, tensor.name, demanded, found))

    # ---- activations

    def _activation(self, node: Node, tensor: Tensor) -> None:
        """A Q of an activation, or a DQ of codes that no Q made."""
        target, params = self.target, params_at(node)
        if not target.activation_types:
            self._say(node, tensor, "activations in float", f"{node.op}")
        elif params is None:
            self._say(node, tensor, f"{_names(target.activation_types)}, scale and zero point constant", _unreadable(node))
        elif isinstance(params.granularity, PerAxis):
            self._say(node, tensor, "one scale for the tensor", _grain(params))
        elif params.type not in target.activation_types:
            self._say(node, tensor, f"activations of {_names(target.activation_types)}", params.type.value)
        elif target.activation_symmetric and params.zero_point != _centre(params.type):
            self._say(node, tensor, f"zero point {_centre(params.type)}", f"zero point {params.zero_point}")

    # ---- constants

    def _dequantizer(self, node: Node) -> None:
        codes, maker = node.inputs[0], self.graph.producer(node.inputs[0])
        if isinstance(codes, Constant) or (maker is not None and _is(maker, Q) and isinstance(maker.inputs[0], Constant)):
            for reader, index in self.graph.readers(node.outputs[0]):
                if reader is not None:
                    self._constant(node, reader, index)
        elif maker is not None and maker.op == "Gather" and isinstance(maker.inputs[0], Constant):
            self._table(node)
        elif maker is None or not _is(maker, Q):
            self._activation(node, node.outputs[0])

    def _constant(self, node: Node, reader: Node, index: int) -> None:
        """A dequantized constant, at one of its readers."""
        if reader.op in LAYERS and index == 1:
            if reader.op in self.target.compute and self._dequantized(reader.inputs[0]):
                self._weight(node, reader)
            return
        layer = self._layer_of_bias(node, reader, index)
        if layer is not None:
            self._bias(node, reader, layer)
            return
        params, allowed = params_at(node), self.target.activation_types | self.target.weight_types
        if reader.op in NORMALIZING or reader.op == "Gather" or not self._around(reader):
            return
        if params is None or params.type not in allowed:
            self._say(reader, node.outputs[0], f"constants of {_names(allowed)}", _unreadable(node, params))
        elif isinstance(params.granularity, PerAxis):
            self._say(reader, node.outputs[0], "one scale for the tensor", _grain(params))

    def _table(self, node: Node) -> None:
        """Rows that were looked up in a table of codes."""
        params = params_at(node)
        if params is None or params.type not in self.target.weight_types:
            allowed = _names(self.target.weight_types)
            self._say(node, node.outputs[0], f"tables of {allowed}", _unreadable(node, params))

    def _weight(self, node: Node, layer: Node) -> None:
        target, params, weight = self.target, params_at(node), node.outputs[0]
        if params is None or params.type not in target.weight_types:
            self._say(layer, weight, f"a weight of {_names(target.weight_types)}", _unreadable(node, params))
            return
        if target.weight_symmetric and np.any(params.zero_point != _centre(params.type)):
            self._say(layer, weight, f"zero point {_centre(params.type)}", _zero_points(params))
        if not isinstance(params.granularity, PerAxis):
            return
        rank = len(weight.shape or node.inputs[0].shape or ())
        axis, demanded = params.granularity.axis, target.compute[layer.op].weight_axis
        if layer.op == "Gemm" and layer.attrs.get("transB", 0):
            demanded = 1 - demanded
        if not target.is_per_channel(layer.op):
            self._say(layer, weight, "one scale for the weight", _grain(params))
        elif rank and axis % rank != demanded % rank:
            self._say(layer, weight, f"a scale for each output channel, by axis {demanded % rank}", _grain(params))

    def _layer_of_bias(self, node: Node, reader: Node, index: int) -> Node | None:
        """The layer whose bias a dequantized constant is, if it is one: its own, or what is added to a MatMul as int32."""
        if (reader.op in LAYERS or reader.op in NORMALIZING) and index == 2:
            return reader
        codes = node.inputs[0]
        if reader.op == "Add" and codes.dtype is not None and not isinstance(codes.dtype, int) and codes.dtype == np.int32:
            layer = self.graph.producer(reader.inputs[1 - index])
            return layer if layer is not None and layer.op == "MatMul" and not self.target.everywhere else None
        return None

    def _bias(self, node: Node, reader: Node, layer: Node) -> None:
        if not self._dequantized(layer.inputs[0]):
            return
        params, bias = params_at(node), node.outputs[0]
        if self.target.float_bias:
            self._say(reader, bias, "a float32 bias", _unreadable(node, params))
            return
        if params is None or params.type != QuantType.INT32:
            self._say(reader, bias, "an int32 bias", _unreadable(node, params))
            return
        parts = [self._params_of(layer.inputs[k]) for k in (0, 1)]
        if parts[0] is None or parts[1] is None:
            return
        demanded = np.asarray(parts[0].scale.reshape(-1) * parts[1].scale.reshape(-1), np.float32)
        scale = params.scale.reshape(-1)
        if np.any(params.zero_point):
            self._say(reader, bias, "zero point 0", _zero_points(params))
        elif scale.size not in (1, demanded.size) and demanded.size != 1:
            self._say(reader, bias, f"{demanded.size} scales, as the weight has", f"{scale.size} scales")
        elif np.any(np.abs(scale - demanded) > BIAS_TOLERANCE * np.abs(demanded)):
            worst = int(np.argmax(np.abs(scale - demanded) / np.maximum(demanded, np.finfo(np.float32).tiny)))
            one = demanded[worst if demanded.size > 1 else 0], scale[worst if scale.size > 1 else 0]
            self._say(reader, bias, f"input scale x weight scale, {one[0]:.6g}", f"scale {one[1]:.6g}")

    # ---- nodes

    def _operator(self, node: Node) -> None:
        target, first = self.target, node.outputs[0]
        if node.domain == CONTRIB and CONTRIB not in target.domains:
            self._say(node, first, "operators of ONNX's own", f"{CONTRIB}.{node.op}")
        elif node.op in AT_RUN_TIME and node.domain in DOMAINS and not target.dynamic:
            self._say(node, first, "ranges that are constants of the file", f"{node.op}, a range of each run")
        elif node.op == "ConvInteger":
            self._say(node, first, "Q and DQ around a Conv", "ConvInteger, which has no fast kernel")
        elif node.op.startswith("QLinear") and node.domain in DOMAINS and not target.audited:
            self._say(node, first, f"Q and DQ around {node.op.removeprefix('QLinear')}", node.op)

    def _integer_node(self, node: Node) -> None:
        """What stands between DQ and Q: a layer, or another node that the target is to have in integers."""
        target = self.target
        if node.domain not in DOMAINS or not any(self._is_activation(t) for t in node.inputs):
            return
        result = self._result(node)
        gives = self._quantized(result)
        if node.op in target.compute:
            self._layer(node, result, gives=gives)
        elif gives and target.region | target.pass_through and not self._is_known(node) and self._for_nothing(node, result):
            self._say(node, result, f"{node.op} in float, without Q and DQ around it", "DequantizeLinear and QuantizeLinear")
        elif gives and target.audited and node.op in target.pass_through:
            self._same_parameters(node, result)
        if gives:
            self._fixed(node, result)

    def _layer(self, node: Node, result: Tensor, *, gives: bool) -> None:
        weight = node.inputs[1]
        inside = all(self._dequantized(t) for t in node.inputs[:2])
        if inside and self.target.compute[node.op].output == "required" and not gives:
            self._say(node, result, "a result that is read through one QuantizeLinear alone", "a float32 result")
        is_float = isinstance(weight, Constant) and is_float32(weight)
        if not inside and gives and is_float and self._is_activation(node.inputs[0]):
            allowed = _names(self.target.weight_types)
            self._say(node, weight, f"a weight of {allowed}", "a float32 weight between DequantizeLinear and QuantizeLinear")

    def _for_nothing(self, node: Node, result: Tensor) -> bool:
        """Whether its input, or its result, is quantized and no node that the target has in integers makes or reads it."""
        for tensor in node.inputs:
            if self._is_activation(tensor):
                quantizer = self._maker(self._maker(tensor, DQ), Q)
                source = None if quantizer is None else self.graph.producer(quantizer.inputs[0])
                others = [n for n, _ in self.graph.readers(tensor) if n is not None and n is not node]
                if not any(self._is_known(n) for n in (source, *others) if n is not None):
                    return True
        readers = [n for q, _ in self.graph.readers(result) if q is not None for n in self._readers_of_codes(q)]
        return not any(n is None or self._is_known(n) for n in readers)

    def _maker(self, made: Tensor | Node | None, op: str) -> Node | None:
        """The Q or DQ that makes a tensor, or a node's first input."""
        if isinstance(made, Node):
            made = made.inputs[0]
        maker = None if made is None else self.graph.producer(made)
        return maker if maker is not None and _is(maker, op) else None

    def _readers_of_codes(self, quantizer: Node) -> list[Node | None]:
        """Who reads what a Q quantized, through DQ; None for a graph output."""
        dequantizers = [n for n, _ in self.graph.readers(quantizer.outputs[0]) if n is not None]
        return [n for d in dequantizers if _is(d, DQ) for n, _ in self.graph.readers(d.outputs[0])]

    def _is_known(self, node: Node) -> bool:
        target = self.target
        if node.op == "Add" and target.adds:
            return True
        return node.op in target.region | target.pass_through | target.absorbed | target.compute.keys()

    def _same_parameters(self, node: Node, result: Tensor) -> None:
        before, after = self._params_of(node.inputs[0]), self._quantizer_params(result)
        if before is None or after is None or before.scale.ndim or after.scale.ndim:
            return
        if before.scale != after.scale or before.zero_point != after.zero_point:
            self._say(node, result, f"the parameters of its input, {_pair(before)}", _pair(after))

    def _fixed(self, node: Node, result: Tensor) -> None:
        after = self._quantizer_params(result)
        for rule in self.target.fixed:
            if after is None or rule.op != node.op or rule.type != after.type.value or after.scale.ndim:
                continue
            if not np.isclose(after.scale, rule.scale, rtol=1e-5) or int(after.zero_point) != rule.zero_point:
                self._say(node, result, f"scale {rule.scale:.6g}, zero point {rule.zero_point}", _pair(after))

    # ---- who makes and reads what

    def _dequantized(self, tensor: Tensor) -> bool:
        maker = self.graph.producer(tensor)
        return maker is not None and _is(maker, DQ)

    def _is_activation(self, tensor: Tensor) -> bool:
        """Whether a tensor is a dequantized one that is no constant."""
        maker = self.graph.producer(tensor)
        if maker is None or not _is(maker, DQ) or isinstance(maker.inputs[0], Constant):
            return False
        before = self.graph.producer(maker.inputs[0])
        return before is None or not _is(before, Q) or isinstance(before.inputs[0], Variable)

    def _around(self, node: Node) -> bool:
        """Whether a node has an activation before it in integers and a result that becomes integers."""
        return any(self._is_activation(t) for t in node.inputs) and self._quantized(self._result(node))

    def _result(self, node: Node) -> Tensor:
        """The tensor in which a node's result leaves it: behind a MatMul's int32 bias and an activation that vanishes."""
        result = node.outputs[0]
        add = self.graph.sole_consumer(result) if node.op == "MatMul" else None
        if add is not None and add.op == "Add":
            makers = [self.graph.producer(t) for t in add.inputs if t is not result]
            if any(m is not None and _is(m, DQ) and isinstance(m.inputs[0], Constant) for m in makers):
                result = add.outputs[0]
        reader = self.graph.sole_consumer(result)
        vanishes = reader is not None and reader.op in self.target.absorbed and not reader.domain
        return reader.outputs[0] if vanishes and reader is not None else result

    def _quantized(self, tensor: Tensor) -> bool:
        readers = self.graph.readers(tensor)
        return bool(readers) and all(n is not None and _is(n, Q) for n, _ in readers)

    def _quantizer_params(self, tensor: Tensor) -> QuantParams | None:
        readers = [n for n, _ in self.graph.readers(tensor) if n is not None and _is(n, Q)]
        return params_at(readers[0]) if readers else None

    def _params_of(self, tensor: Tensor) -> QuantParams | None:
        """The parameters that a tensor was dequantized with."""
        maker = self.graph.producer(tensor)
        return params_at(maker) if maker is not None and _is(maker, DQ) else None


def _is(node: Node, op: str) -> bool:
    return node.op == op and node.domain in DOMAINS


def _names(types: Iterable[QuantType]) -> str:
    return " or ".join(sorted(t.value for t in types))


def _centre(kind: QuantType) -> int:
    """The zero point of a symmetric range."""
    return 0 if kind.signed else 1 << (kind.bits - 1)


def _grain(params: QuantParams) -> str:
    axis = params.granularity.axis if isinstance(params.granularity, PerAxis) else None
    return "one scale" if axis is None else f"{params.scale.size} scales, by axis {axis}"


def _zero_points(params: QuantParams) -> str:
    values = sorted(set(np.asarray(params.zero_point).reshape(-1).tolist()))
    return f"zero points {', '.join(map(str, values[:3]))}{', ...' if len(values) > 3 else ''}"


def _pair(params: QuantParams) -> str:
    return f"scale {float(params.scale):.6g}, zero point {int(params.zero_point)}"


def _unreadable(node: Node, params: QuantParams | None = None) -> str:
    """The type of the codes of a Q or DQ, and what else is the matter with its parameters."""
    if params is not None:
        return params.type.value
    if value(node.inputs[1]) is None:
        return "parameters that are computed at run time"
    if node.attrs.get("block_size", 0):
        return f"scales by blocks of {node.attrs['block_size']}"
    zero = input_at(node, 2)
    return _type_name((zero if zero is not None else node.inputs[0] if node.op == DQ else node.outputs[0]).dtype)


def _type_name(dtype: Any) -> str:
    if dtype is None:
        return "an unknown type"
    return onnx.TensorProto.DataType.Name(dtype).lower() if isinstance(dtype, int) else np.dtype(dtype).name
