"""Ranges as a file: what every activation is quantized with, in TOML, to read, edit by hand and give back.

schema = 1

[ranges."/conv1/Relu_output_0"]
min = 0.0
max = 3.1875
type = "uint8"
scale = 0.0125
zero_point = 0

Of what is read back min and max count, and the rest follows from them and from what the model is quantized for; where these
two are left out, scale and zero_point count.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from glob import escape
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from onnxq.errors import RecipeError
from onnxq.numerics import QuantParams
from onnxq.observers import observer
from onnxq.recipe import Override


class _Range(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    min: float | None = None
    max: float | None = None
    type: Literal["uint8", "int8", "uint16", "int16"] | None = None
    bits: int | None = Field(default=None, ge=2, le=16)
    scale: float | None = None
    zero_point: int | None = None

    @model_validator(mode="after")
    def _is_one(self) -> _Range:
        if self.min is None and self.max is None:
            if self.scale is None:
                raise ValueError("there is neither a range, min and max, nor a scale and zero_point")
        elif self.min is None or self.max is None:
            raise ValueError("of min and max there is only one; give both, or neither and scale and zero_point")
        try:
            observer(self.observer)
        except RecipeError as error:
            raise ValueError(str(error).replace("fixed-range needs lower < upper", "it needs min < max")) from error
        return self

    @property
    def observer(self) -> str:
        if self.min is not None:
            return f"fixed-range{{lower={self.min!r},upper={self.max!r}}}"
        zero = "" if self.zero_point is None else f",zero_point={self.zero_point}"
        return f"fixed-scale{{scale={self.scale!r}{zero}}}"

    def differs(self, found: _Range) -> bool:
        """Whether it says something else than what came of it."""
        mine = {key: value for key, value in self.model_dump(exclude={"min", "max"}).items() if value is not None}
        theirs = found.model_dump()
        return any(v != theirs[k] if k != "scale" else not np.isclose(v, theirs[k], rtol=1e-6) for k, v in mine.items())


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_: Literal[1] = Field(alias="schema")
    ranges: dict[str, _Range] = {}


def _pattern(name: str) -> str:
    """A pattern that matches this name alone, and is no op type where the name is one."""
    return f"[{name[0]}]{escape(name[1:])}" if name[:1].isalpha() else escape(name)


def to_toml(params: Mapping[str, QuantParams], *, symmetric: bool = False) -> str:
    """The ranges of these tensors, each with one scale. Symmetric ones reach as far below 0 as above."""
    lines = ["schema = 1"]
    for name, p in params.items():
        lines += [
            "",
            f"[ranges.{_quoted(name)}]",
            f"min = {-float(p.rmax) if symmetric else float(p.rmin)!r}",
            f"max = {float(p.rmax)!r}",
            f'type = "{p.type.value}"',
            *([f"bits = {p.type.width}"] if p.type.width else []),
            f"scale = {float(p.scale)!r}",
            f"zero_point = {int(p.zero_point)}",
        ]
    return "\n".join(lines) + "\n"


def _quoted(name: str) -> str:
    """A string as TOML has it, which knows no surrogates."""
    return json.dumps(name, ensure_ascii=False).replace("\x7f", "\\u007f")


def load(path: Path) -> tuple[Override, ...]:
    """The ranges in a file, as overrides that a recipe can take. Raises RecipeError that names the key."""
    overrides = []
    for name, said in _read(path).items():
        override = Override(match=_pattern(name), observer=said.observer)
        override._name, override._where = name, f"the ranges {path}: {name}"
        overrides.append(override)
    return tuple(overrides)


def unlike(path: Path, found: str) -> list[str]:
    """A note on what a file says beside its ranges, and what did not come to be: `found` is what did, see `to_toml`."""
    came = _File.model_validate(tomllib.loads(found)).ranges
    names = [name for name, said in _read(path).items() if name in came and said.differs(came[name])]
    if not names:
        return []
    others = f" and {len(names) - 1} others" if len(names) > 1 else ""
    return [
        f"Of {names[0]}{others}, type, bits, scale or zero_point in {path} are not what came of it: they follow from min "
        "and max, and from the target and the bits asked for; leave min and max out for scale and zero_point to count."
    ]


def _read(path: Path) -> dict[str, _Range]:
    try:
        return _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8-sig"))).ranges
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"the ranges {path} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key, why = ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
        if first["type"] in ("model_type", "dict_type"):
            why = "it is no table of keys"
        raise RecipeError(f"the ranges {path}: {key}: {why[:1].lower()}{why[1:]}") from error
