"""repair-saturation"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from onnxq.graph import Node, value
from onnxq.model import Dynamic, Model, Observed
from onnxq.numerics import Array, QuantParams, QuantType, dequantize, quantize
from onnxq.passmanager import Pass
from onnxq.rows import is_depthwise, rows_of_inputs, rows_of_weight
from onnxq.saturation import can_saturate, excess

INAUDIBLE = 1e-5  # of the output's power, 50 dB below it: an error that no 8-bit output shows
FACTORS = (1.0, 1.07, 1.15, 1.23, 1.32, 1.41, 1.52, 1.63, 1.75, 1.87, 2.0)


@dataclass(frozen=True)
class RepairSaturation(Pass):
    """Keep u8 x s8 kernels that add pairs of products in 16 bits from saturating, layer by layer, best remedy first.

    Given:   params: W int8 with a pair of neighbouring codes whose sum lies outside [-128, 128]
    Result:  the graph unchanged; params of W: nothing changed, where the emulated damage is nil; the scale of each output
             channel times its own f in [1, 2], the one of least emulated error; or uint8 codes about 128, which the
             kernels multiply exactly and more slowly, where no f comes within `tolerance` (a ratio of squared
             errors) of them, or the input is quantized at run time: its codes fill their range in every run
    Refused: the target does not saturate; a depthwise Conv; no pair can saturate.

    The error of a remedy is that of the layer's output on `rows` rows of its input, taken from the probe feeds of the
    calibration: rounding of activations and weights and the exact emulation of the 16-bit sums together.
    """

    name: ClassVar[str] = "repair-saturation"
    rows: int = 1024
    tolerance: float = 1.1

    def apply(self, model: Model) -> int:
        suspects = [n for n in model.compute_nodes() if self._suspicious(model, n)] if model.target.saturates else []
        at_run_time = {n.inputs[1].name for n in suspects if isinstance(model.specs.get(n.inputs[0].name), Dynamic)}
        for name in at_run_time:
            _make_unsigned(model, name)
        suspects = [n for n in suspects if n.inputs[1].name not in at_run_time]
        if not suspects or model.calibration is None or not model.calibration.probes:
            return len(at_run_time)
        rows = rows_of_inputs(model, suspects, [self.rows] * len(suspects))
        by_weight: dict[str, list[Node]] = {}
        for node in suspects:
            by_weight.setdefault(node.inputs[1].name, []).append(node)
        return len(at_run_time) + sum(self._repair(model, name, nodes, rows) for name, nodes in by_weight.items())

    def _suspicious(self, model: Model, node: Node) -> bool:
        weight = value(node.inputs[1])
        if (node.name, 1) not in model.quantized_inputs or weight is None or weight.ndim < 2:
            return False
        if not isinstance(model.specs.get(node.inputs[1].name), Observed):
            return False  # given parameters are not changed
        params = model.params_of(node.inputs[1].name)
        if params.type != QuantType.INT8 or is_depthwise(node, weight) or (node.op != "Conv" and weight.ndim != 2):
            return False
        return bool(can_saturate(rows_of_weight(node, quantize(weight, params))).any())

    def _repair(self, model: Model, name: str, nodes: list[Node], rows: dict[str, Array]) -> int:
        """Choose for one weight, by the errors of all the nodes that read it."""
        params, layers = model.params_of(name), [_Layer.of(model, node, rows[node.name]) for node in nodes]

        def errors_of(tried: QuantParams, *, saturate: bool = True) -> Array:
            return np.sum([layer.errors(tried, saturate=saturate) for layer in layers], axis=0)

        errors = np.stack([errors_of(params.scaled(f)) for f in FACTORS])  # (factors, channels)
        unsaturated = errors_of(params, saturate=False).sum()
        best, least = errors.argmin(0), errors.min(0).sum()
        if params.scale.ndim == 0:
            best, least = np.asarray(errors.sum(1).argmin()), errors.sum(1).min()
        if errors[0].sum() <= least * (1 + 1e-9):
            return 0
        power = sum(np.square(part.outputs, dtype=np.float64).sum() for layer in layers for part in layer.parts)
        if least <= max(self.tolerance * unsaturated, INAUDIBLE * power):
            model.params[name] = params.scaled(np.asarray(FACTORS, np.float32)[best])
        else:
            _make_unsigned(model, name)
        return 1


def _make_unsigned(model: Model, name: str) -> None:
    """Let int8 codes be uint8 ones that are 128 larger."""
    params = model.params_of(name)
    shifted = (params.zero_point.astype(np.int16) + 128).astype(np.uint8)
    model.params[name] = replace(params, zero_point=shifted, type=QuantType.UINT8)


@dataclass(frozen=True)
class _Part:
    """Rows (R, K) that a group of a layer's channels reads, as codes and as what these stand for, and its float outputs
    without bias, (R, M / groups)."""

    codes: Array
    rounded: Array
    outputs: Array


@dataclass(frozen=True)
class _Layer:
    """A layer on rows of its input."""

    node: Node
    weight: Array
    activation: QuantParams
    parts: tuple[_Part, ...]  # by group

    @classmethod
    def of(cls, model: Model, node: Node, x: Array) -> _Layer:
        """x: (groups, R, K)."""
        activation, weight = model.params_of(node.inputs[0].name), np.asarray(value(node.inputs[1]))
        parts = []
        for rows, exact in zip(x, rows_of_weight(node, weight), strict=True):
            codes = quantize(rows, activation)
            parts.append(_Part(codes, dequantize(codes, activation), rows @ exact.T))
        return cls(node, weight, activation, tuple(parts))

    def errors(self, params: QuantParams, *, saturate: bool = True) -> Array:
        """Sum of squared output errors by output channel (M,) of the integer kernel, with these parameters of the weight."""
        codes = quantize(self.weight, params)
        integer, rounded = rows_of_weight(self.node, codes), rows_of_weight(self.node, dequantize(codes, params))
        scale = np.broadcast_to(params.scale, (integer.shape[0] * integer.shape[1],)).reshape(integer.shape[:2])
        totals = []
        for part, own_codes, own, channels in zip(self.parts, integer, rounded, scale, strict=True):
            error = part.rounded @ own.T - part.outputs
            if saturate:
                error = error - excess(part.codes, own_codes) * (channels * float(self.activation.scale))
            totals.append(np.square(error.astype(np.float64)).sum(0))
        return np.concatenate(totals)
