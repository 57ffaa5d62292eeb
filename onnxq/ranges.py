"""Ranges as a file: what every activation is quantized with, in TOML, to read, edit by hand and give back.

schema = 1

[ranges."/conv1/Relu_output_0"]
min = 0.0
max = 3.1875
type = "uint8"
scale = 0.0125        # these two follow from the others; what is read back is min and max
zero_point = 0
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from glob import escape
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from onnxq.errors import RecipeError
from onnxq.numerics import QuantParams, QuantType
from onnxq.recipe import Override


class _Range(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    min: float
    max: float
    type: Literal["uint8", "int8", "uint16", "int16"] | None = None
    bits: int | None = None
    scale: float | None = None
    zero_point: int | None = None

    @model_validator(mode="after")
    def _is_one(self) -> _Range:
        if not self.min < self.max:
            raise ValueError("min is not less than max")
        return self


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_: Literal[1] = Field(alias="schema")
    ranges: dict[str, _Range] = {}


def to_toml(params: Mapping[str, QuantParams]) -> str:
    """The ranges of these tensors, each with one scale."""
    lines = ["schema = 1"]
    for name, p in params.items():
        lines += [
            "",
            f"[ranges.{json.dumps(name)}]",
            f"min = {float(p.rmin)!r}",
            f"max = {float(p.rmax)!r}",
            f'type = "{p.type.value}"',
            *([f"bits = {p.type.width}"] if p.type.width else []),
            f"scale = {float(p.scale)!r}",
            f"zero_point = {int(p.zero_point)}",
        ]
    return "\n".join(lines) + "\n"


def load(path: Path) -> tuple[Override, ...]:
    """The ranges in a file, as overrides that a recipe can take. Raises RecipeError that names the key."""
    try:
        found = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"the ranges {path} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"the ranges {path}: {key}: {first['msg'].lower()}") from error
    return tuple(Override(match=escape(name), observer=_observer(r)) for name, r in found.ranges.items())


def _observer(said: _Range) -> str:
    if said.type is not None and said.scale is not None and said.zero_point is not None:
        kind = QuantType(said.type, said.bits or 0)
        ends = [(q - said.zero_point) * said.scale for q in (kind.qmin, kind.qmax)]
        if ends == [said.min, said.max]:
            return f"fixed-scale{{scale={said.scale!r},zero_point={said.zero_point}}}"
    return f"fixed-range{{lower={said.min!r},upper={said.max!r}}}"
