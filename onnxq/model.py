"""Model: the one value that travels through the passes, and the small types its tables hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnxq.collecting import Collecting
from onnxq.equalization import Gate, Scaled, known_as
from onnxq.errors import PassError
from onnxq.graph import Constant, Graph, Node, Tensor, clip_bounds
from onnxq.numerics import Granularity, PerAxis, PerTensor, QuantParams, QuantType, as_type

PER_CHANNEL_OPSET = 13
WIDE_OPSET = 21
DYNAMIC_OPSET = 11  # the first that has DynamicQuantizeLinear
LONGEST_BASE = 16

if TYPE_CHECKING:
    from onnxq.calibration import Calibration
    from onnxq.data import Samples
    from onnxq.sketch import ChannelStatistics
    from onnxq.target import Target


@dataclass(frozen=True)
class Observed:
    """Parameters come from statistics of the tensor: its sketch, or its values where it is a constant."""

    type: QuantType
    granularity: Granularity = PerTensor()
    symmetric: bool = False


@dataclass(frozen=True)
class Shared:
    """Parameters are those of another tensor."""

    tensor: str


@dataclass(frozen=True)
class Derived:
    """A bias: int32, scale = scale of `activation` x scale of `weight`, zero point 0."""

    activation: str
    weight: str


@dataclass(frozen=True)
class Fixed:
    """Parameters are given."""

    params: QuantParams


@dataclass(frozen=True)
class Dynamic:
    """Parameters are computed at every run, from the tensor's range in it. Until then those of calibration stand in."""


QuantSpec = Observed | Shared | Derived | Fixed | Dynamic

# A reader is (node name, input index); a graph output reads as (OUTPUT, its index).
Reader = tuple[str, int]
OUTPUT = ""


class State(Enum):
    INTEGER = "int8"
    DYNAMIC = "dynamic"
    WEIGHT_ONLY = "weight-only"
    FLOAT = "float"


class Reason(Enum):
    """Why a compute node is not integer."""

    UNSUPPORTED = "the target has no integer kernel for it"
    NO_CONSTANT_WEIGHT = "its weight is computed at run time"
    ATTENTION = "a product of activations in an attention, where integers cost more than they gain"
    NOT_FLOAT32 = "its input is not known to be float32"
    REGION = "a neighbour stays float, so integers would only cost conversions"
    EXCLUDED = "excluded by the user"
    NOT_FUSED = "the runtime does not fuse it"
    SENSITIVE = "its rounding errors are too large in the outputs"
    SIMULATED = "no kernel has integers of this width: their rounding is simulated in float"
    IN_BODY = "it is in a body of a control-flow node"
    SLOWER = "integers are not faster for it"
    CAPTURED = "only a body of a control-flow node reads its result"


@dataclass(frozen=True)
class Entry:
    """One line of the ledger."""

    op: str
    state: State
    reason: Reason | None = None
    detail: str = ""

    @property
    def is_integer(self) -> bool:
        return self.state in (State.INTEGER, State.DYNAMIC)


@dataclass
class Model:
    """A graph on its way to being quantized.

    specs says where and how a tensor is quantized, params holds the numbers; `quantized_inputs` says which readers read a
    tensor through QuantizeLinear and DequantizeLinear. Which tables are filled is the stage that the model is in.
    """

    graph: Graph
    target: Target
    specs: dict[str, QuantSpec] = field(default_factory=dict)
    quantized_inputs: set[Reader] = field(default_factory=set)
    planned: set[str] = field(default_factory=set)  # nodes meant to run in integer kernels
    params: dict[str, QuantParams] = field(default_factory=dict)
    trained: dict[str, QuantParams] = field(default_factory=dict)  # what tensors of a quantized model came in with
    ledger: dict[str, Entry] = field(default_factory=dict)
    calibration: Calibration | None = None
    cones: dict[str, str] = field(default_factory=dict)  # by tensor, of the float model: by them statistics are known again
    channels: Mapping[str, ChannelStatistics] = field(default_factory=dict)  # by which they are evened out
    begun: Calibration | None = None  # the statistics of a few of the samples, of the graph as it was then
    floats: onnx.ModelProto | None = None  # as it was before its channels were evened out: statistics are collected on it
    scaled: dict[str, Scaled] = field(default_factory=dict)  # what evening out made of tensors of that model
    gates: dict[str, Gate] = field(default_factory=dict)  # the same, where it is more than scaled
    observed_too: dict[str, int | None] = field(default_factory=dict)  # tensors of that model to sketch as well, by axis
    evened_out: frozenset[str] = frozenset()  # tensors that evening out made
    reference: Graph | None = None
    samples: Samples | None = None
    collecting: Collecting = field(default_factory=Collecting)
    threads: int = 0
    progress: Callable[[str, int, int | None], None] | None = None
    excluded: frozenset[str] = frozenset()  # nodes that the user wants in float
    unplaced: frozenset[str] = frozenset()  # nodes that the audit found in float all the same
    sensitive: frozenset[str] = frozenset()  # nodes whose rounding the outputs do not bear
    demanded: float = 0.0  # dB that the outputs are to come to, where they did not bear the rounding
    slower: frozenset[str] = frozenset()  # nodes that were measured to be faster in float
    at_run_time: bool = False  # whether linear layers quantize their input at every run wherever they can
    scope: str = ""  # what names have in front of them in the file of ranges, where this is a body
    overridable: set[str] = field(default_factory=set)  # all that overrides could match so far, shared by all forks
    refusals: list[tuple[str, str]] = field(default_factory=list)
    rounded: dict[Any, Any] = field(default_factory=dict)  # of round-weights, shared by all forks
    constants: dict[str, tuple[Constant, Constant]] = field(default_factory=dict)  # scale and zero point, once lowered
    zero_points: dict[str, Constant] = field(default_factory=dict)

    def fork(self) -> Model:
        """A twin that can be changed without changing this one. Arrays are shared; they are never written in place."""
        return Model(
            graph=self.graph.copy(),
            target=self.target,
            specs=dict(self.specs),
            quantized_inputs=set(self.quantized_inputs),
            planned=set(self.planned),
            params=dict(self.params),
            trained=dict(self.trained),
            ledger=dict(self.ledger),
            calibration=self.calibration,
            cones=self.cones,
            channels=self.channels,
            begun=self.begun,
            floats=self.floats,
            scaled=dict(self.scaled),
            gates=dict(self.gates),
            observed_too=self.observed_too,
            evened_out=self.evened_out,
            reference=self.reference,
            samples=self.samples,
            collecting=self.collecting,
            threads=self.threads,
            progress=self.progress,
            excluded=self.excluded,
            unplaced=self.unplaced,
            sensitive=self.sensitive,
            demanded=self.demanded,
            slower=self.slower,
            at_run_time=self.at_run_time,
            scope=self.scope,
            overridable=self.overridable,
            refusals=list(self.refusals),
            rounded=self.rounded,
        )

    def refuse(self, node: Node, why: str) -> None:
        """Record that the running pass left this node alone."""
        self.refusals.append((node.name, why))

    def keep_float(self, node: Node, reason: Reason, detail: str = "") -> None:
        self.ledger[node.name] = Entry(node.op, State.FLOAT, reason, detail)

    def gains_a_dimension(self, node: Node) -> bool:
        """Whether a constant of more dimensions than a product has is added to it.

        onnxruntime takes it for the bias of a product that is quantized at run time, and gives a result of fewer dimensions.
        """
        add = self.graph.sole_consumer(node.outputs[0])
        if add is None or add.op != "Add" or len(add.inputs) != 2:
            return False
        rank = len(node.outputs[0].shape) if node.outputs[0].shape is not None else 1
        return any(isinstance(t, Constant) and len(t.shape or ()) > rank for t in add.inputs)

    def scale_weight(self, node: Node, scaled: np.ndarray, factors: np.ndarray, axis: int | None) -> None:
        """Give a layer its weight times factors (C,) along an axis; the parameters that it came with are scaled along.

        They are lost where the axis is None, as the factors then lie along no single one.
        """
        old, new = node.inputs[1], self.graph.constant(node.inputs[1].name, scaled)
        self.graph.set_input(node, 1, new)
        params = self.trained.get(old.name)
        if params is not None and axis is not None:
            grid = as_type(params, params.type, PerAxis(axis), scaled.shape, symmetric=True)
            if grid is not None and np.all(factors):  # centred, so that a negative factor is a change of sign
                self.trained[new.name] = grid.scaled(np.abs(factors))

    def root(self, tensor: str) -> str:
        """The tensor whose parameters this one shares, itself where it shares none."""
        seen = {tensor}
        while isinstance(spec := self.specs.get(tensor), Shared):
            tensor = spec.tensor
            if tensor in seen:
                raise PassError(f"tensor {tensor} shares parameters with itself")
            seen.add(tensor)
        return tensor

    def params_of(self, tensor: str) -> QuantParams:
        root = self.root(tensor)
        spec = self.specs.get(root)
        if isinstance(spec, Fixed):
            return spec.params
        if root not in self.params:
            raise PassError(f"tensor {tensor} has a spec and no parameters yet; choose ranges first")
        return self.params[root]

    def readers(self, tensor: Tensor) -> list[Reader]:
        return [(node.name if node else OUTPUT, index) for node, index in self.graph.readers(tensor)]

    def output_is_quantized(self, tensor: Tensor) -> bool:
        """Whether every reader of the tensor, graph outputs too, reads it through Q and DQ."""
        readers = self.readers(tensor)
        return bool(readers) and tensor.name in self.specs and all(r in self.quantized_inputs for r in readers)

    @property
    def qdq_domain(self) -> str:
        """The domain of Q and DQ: ONNX's own has them per channel from opset 13, of 16 bits from 21; the other always."""
        wide = max(self.target.activation_type.bits, self.target.weight_type.bits) > 8
        return "" if self.graph.opset >= (WIDE_OPSET if wide else PER_CHANNEL_OPSET) else "com.microsoft"

    def parameter_constants(self, tensor: str) -> tuple[Constant, Constant]:
        """The initializers x_scale and x_zero_point of a tensor; tensors that share parameters share them."""
        root, params = self.root(tensor), self.params_of(tensor)
        if root not in self.constants:
            scale = self.graph.constant(f"{short_name(root)}_scale", params.scale)
            self.constants[root] = scale, self._zero_point(params)
        return self.constants[root]

    def inside_width(self, tensor: Tensor, params: QuantParams) -> Tensor:
        """The tensor clipped to its range where its type has fewer bits than what it is stored in, which Q does not do."""
        if not params.type.width:
            return tensor
        bounds = [
            self.graph.constant(f"{short_name(tensor.name)}_{end}", np.asarray(value, np.float32))
            for end, value in (("min", params.rmin), ("max", params.rmax))
        ]
        result = self.graph.variable(f"{short_name(tensor.name)}_clipped", tensor.dtype, tensor.shape)
        self.graph.insert("Clip", [tensor, *bounds], [result])
        return result

    def _zero_point(self, params: QuantParams) -> Constant:
        """Tensors with the same zero point share one: most are 0."""
        zero_point = np.asarray(params.zero_point)
        if zero_point.ndim:
            return self.graph.constant("zero_points", zero_point)
        key = f"{zero_point.dtype}_{zero_point}"
        if key not in self.zero_points:
            self.zero_points[key] = self.graph.constant(f"zero_point_{zero_point}", zero_point)
        return self.zero_points[key]

    def insert_dequantized(self, tensor: Constant, codes: np.ndarray, params: QuantParams) -> None:
        """Replace a constant by its integer codes and the DequantizeLinear that reads them.

        A zero point of 0 is left out for int32 codes, which can have no other, and for the weight of a Conv. MatMul and Gemm
        stay float in onnxruntime 1.31 where it is left out and no Q follows.
        """
        graph, base = self.graph, short_name(tensor.name)
        by_convs = all(n.op == "Conv" for n in tensor.outputs)
        inputs = [graph.constant(f"{base}_q", codes), graph.constant(f"{base}_scale", params.scale)]
        if np.any(params.zero_point) or not (params.type == QuantType.INT32 or (params.type.signed and by_convs)):
            inputs.append(self._zero_point(params))
        result = graph.variable(f"{base}_dq", np.float32, codes.shape)
        attrs = {"axis": params.granularity.axis} if isinstance(params.granularity, PerAxis) else {}
        nodes = {n.name: n for n in tensor.outputs}
        for name, index in self.quantized_inputs.intersection(self.readers(tensor)):
            graph.set_input(nodes[name], index, result)  # who reads it in float goes on reading the float constant
            self.quantized_inputs.discard((name, index))
        graph.insert("DequantizeLinear", inputs, [result], attrs, name=f"{base}_DQ", domain=self.qdq_domain)

    def absorbed(self, node: Node) -> Tensor:
        """The tensor in which a node's result leaves it: its output, or that of the activation that its Q takes in.

        A Relu can vanish into the Q after it, and so can a Clip of constant bounds with 0 between them. An Add of a bias
        belongs to its MatMul.
        """
        bias = self.bias_of(node)
        result = node.outputs[0] if bias is None else bias[0].outputs[0]
        reader = self.graph.sole_consumer(result)
        if reader is None or reader.op not in self.target.absorbed or reader.domain:
            return result
        if reader.op == "Clip":
            low, high = clip_bounds(reader)
            if low is None or high is None or low > 0 or high < 0:
                return result
        return reader.outputs[0]

    def bias_of(self, node: Node) -> tuple[Node, int] | None:
        """Who reads the quantized bias of a compute node: itself, or the Add after a MatMul, and at which input."""
        if (node.name, 2) in self.quantized_inputs:
            return node, 2
        add = self.graph.sole_consumer(node.outputs[0]) if node.op == "MatMul" else None
        for index in (0, 1):
            if add is not None and add.op == "Add" and isinstance(self.specs.get(add.inputs[index].name), Derived):
                return add, index
        return None

    def compute_nodes(self) -> Iterator[Node]:
        """The nodes that can start an integer region on the target: Conv, MatMul, Gemm."""
        yield from self.graph.find(*self.target.compute)


def short_name(name: str) -> str:
    """What the names of a tensor's Q, DQ and parameters begin with: its name, or the last whole words of one that is long.

    Each such name stands several times in the file; exporters that join a whole path into a name would make these names
    outweigh the weights.
    """
    name = known_as(name)
    if len(name) <= LONGEST_BASE:
        return name
    end = name[-LONGEST_BASE:]
    words = re.split(r"[/.:;_]+", end, maxsplit=1)
    return words[1] if len(words) == 2 and words[1] else end


def verify(model: Model) -> None:
    """Raise PassError unless the graph is sorted, single-assignment, and every table entry names something that exists."""
    graph = model.graph
    known = {t.name for t in graph.inputs}
    names: set[str] = set()
    for node in graph.nodes:
        if node.name in names:
            raise PassError(f"two nodes are named {node.name}")
        names.add(node.name)
        for tensor in node.inputs:
            if tensor.name and not isinstance(tensor, Constant) and tensor.name not in known:
                raise PassError(f"node {node.name} reads {tensor.name} before anything makes it")
        for tensor in node.outputs:
            if tensor.name in known:
                raise PassError(f"tensor {tensor.name} has two producers, the second is {node.name}")
            if tensor.name:
                known.add(tensor.name)
    for tensor in graph.outputs:
        if tensor.name not in known and not isinstance(tensor, Constant):
            raise PassError(f"nothing makes the graph output {tensor.name}")
    live = graph.tensors()
    for tensor in model.specs:
        if tensor not in live:
            raise PassError(f"there is a spec for {tensor}, which is not in the graph")
    for name, _ in model.quantized_inputs:
        if name != OUTPUT and name not in names:
            raise PassError(f"a quantized input belongs to {name}, which is not in the graph")
