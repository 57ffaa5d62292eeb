"""Targets: what an execution provider on a machine can run in integers, read from targets/*.toml, one file a target."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from onnxq.errors import RecipeError, nearest
from onnxq.numerics import QuantParams, QuantType


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Stored = Literal["uint8", "int8", "uint16", "int16"]
Granularity = Literal["per-channel", "per-tensor"]


class _Activation(_Strict):
    type: Stored
    symmetric: bool
    dynamic: bool = False
    accepts: tuple[Stored, ...] | None = None


class _Weight(_Strict):
    type: Stored
    symmetric: bool
    granularity: Granularity
    accepts: tuple[Stored, ...] | None = None


class Compute(_Strict):
    """How an op that starts an integer region is quantized."""

    weight_axis: int  # the output channels in the weight; for Gemm with transB = 0
    output: Literal["required", "optional"]
    granularity: Granularity | None = None  # of its weight, where that is not the target's


class _Ops(_Strict):
    ops: tuple[str, ...]


class _Region(_Ops):
    rule: Literal["between", "everywhere"] = "between"


class FixedOutput(_Strict):
    """The only parameters that the kernel of an op gives its result in a type."""

    op: str
    type: Stored
    scale: float
    zero_point: int


class _File(_Strict):
    name: str
    description: str
    provider: str
    domains: tuple[str, ...] = ()  # of the operators beyond ONNX's own that it runs
    u8s8_saturates: Literal["always", "never", "detect"]
    measured: bool = False
    audited: bool = True
    bias: Literal["int32", "float"] = "int32"
    adds: bool = False
    opset: int = 17
    source: str = ""
    activation: _Activation
    weight: _Weight
    compute: dict[str, Compute]
    region: _Region
    pass_through: _Ops
    absorbed: _Ops
    fixed: tuple[FixedOutput, ...] = ()


@dataclass(frozen=True)
class Target:
    """What a model is placed for. targets/cpu.toml says what each of these is."""

    name: str
    description: str
    provider: str
    domains: frozenset[str]
    saturates: bool
    measured: bool
    audited: bool
    float_bias: bool
    adds: bool
    opset: int
    source: str
    activation_type: QuantType
    activation_types: frozenset[QuantType]  # that its kernels read
    activation_symmetric: bool
    dynamic: bool
    weight_type: QuantType
    weight_types: frozenset[QuantType]
    weight_symmetric: bool
    weight_per_channel: bool
    compute: dict[str, Compute]
    region: frozenset[str]
    pass_through: frozenset[str]
    absorbed: frozenset[str]
    everywhere: bool
    fixed: tuple[FixedOutput, ...]

    @property
    def simulated(self) -> bool:
        """Whether no kernel has integers of these widths."""
        return bool(self.compute) and (self.activation_type not in self.activation_types or self.weight_type.bits > 8)

    def is_per_channel(self, op: str) -> bool:
        """Whether the weight of an op has a scale for each output channel."""
        said = self.compute[op].granularity if op in self.compute else None
        return self.weight_per_channel if said is None else said == "per-channel"

    def fixed_output(self, op: str) -> QuantParams | None:
        """The parameters that the result of an op must have in the type of the activations."""
        for rule in self.fixed:
            kind = QuantType(rule.type)
            if rule.op == op and kind == self.activation_type:
                return QuantParams(np.asarray(rule.scale, np.float32), np.asarray(rule.zero_point, kind.dtype), kind)
        return None

    def of_bits(self, weight: int, activation: int) -> Target:
        """The same with weights and activations of 2 to 16 bits."""
        same = activation == 8
        return replace(
            self,
            weight_type=self.weight_type.of_bits(weight),
            activation_type=self.activation_type.of_bits(activation),
            dynamic=self.dynamic and same,
            saturates=self.saturates and same,
        )


@lru_cache(maxsize=1)
def _paths() -> dict[str, Path]:
    found = {
        Path(str(f)).stem: Path(str(f)) for f in files("onnxq").joinpath("targets").iterdir() if f.name.endswith(".toml")
    }
    for entry in entry_points(group="onnxq.targets"):
        found[entry.name] = Path(entry.load())
    return found


def names() -> list[str]:
    """Every target that can be named, ours and those that packages add through the entry point group onnxq.targets."""
    return sorted(_paths())


def load(name: str) -> Target:
    """The target of this name. Raises RecipeError that names the nearest valid ones."""
    if name not in _paths():
        raise RecipeError(f"unknown target {name}; {nearest(name, names())}")
    try:
        data = _File.model_validate(_read(name))
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"target file {_paths()[name]}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return Target(
        name=data.name,
        description=data.description,
        provider=data.provider,
        domains=frozenset(data.domains),
        saturates=_saturates(data.u8s8_saturates),
        measured=data.measured,
        audited=data.audited,
        float_bias=data.bias == "float",
        adds=data.adds,
        opset=data.opset,
        source=data.source,
        activation_type=QuantType(data.activation.type),
        activation_types=_types(data.activation),
        activation_symmetric=data.activation.symmetric,
        dynamic=data.activation.dynamic,
        weight_type=QuantType(data.weight.type),
        weight_types=_types(data.weight),
        weight_symmetric=data.weight.symmetric,
        weight_per_channel=data.weight.granularity == "per-channel",
        compute=data.compute,
        region=frozenset(data.region.ops),
        pass_through=frozenset(data.pass_through.ops),
        absorbed=frozenset(data.absorbed.ops),
        everywhere=data.region.rule == "everywhere",
        fixed=data.fixed,
    )


def _types(side: _Activation | _Weight) -> frozenset[QuantType]:
    return frozenset(QuantType(name) for name in ((side.type,) if side.accepts is None else side.accepts))


def _read(name: str) -> dict[str, Any]:
    """The file's content over that of the target it extends: its keys and sections take the place of the other's."""
    try:
        data = tomllib.loads(_paths()[name].read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"target file {_paths()[name]} cannot be read: {error}") from error
    base = data.pop("extends", None)
    return {**_read(base), **data} if base else data


def _saturates(rule: str) -> bool:
    if rule == "detect":
        from onnxq import machine

        return machine.u8s8_saturates()
    return rule == "always"
