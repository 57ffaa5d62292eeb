"""Recipes: every choice about a quantization in one validated value. The command line wins over a recipe file.

schema = 1
target = "cpu"
observer = "mse"
exclude = ["Softmax", "head/*"]

[[override]]
match = "*gate*"
observer = "percentile{upper=99.9}"

[passes]
correct-bias = false
choose-weight-ranges = { method = "max" }

[gates]
max_drop = 1.0
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from onnxq.errors import RecipeError, nearest

NEEDED = ("collect-statistics", "choose-ranges", "choose-weight-ranges", "quantize-biases", "quantize-weights", "insert-qdq")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Override(_Strict):
    """An observer for the tensors whose name matches a pattern."""

    match: str
    observer: str
    _name: str = PrivateAttr("")  # of the one tensor that it is for, and
    _where: str = PrivateAttr("")  # what tells of it, where that is no recipe

    @property
    def told(self) -> str:
        return self._where or f"override {self.match}"

    @property
    def meant(self) -> str:
        """What a name that is not there may have been meant to be."""
        return self._name or self.match


class Gates(_Strict):
    """Conditions on the result; a missed one is exit code 1."""

    max_drop: float | None = None  # in the metric's own unit (points of top-1 ...), on the runtime's kernels
    min_speedup: float | None = None  # float latency over quantized latency
    require_int8: bool = False  # that some layer runs in integers: by default float is written where it is faster


class Recipe(_Strict):
    schema_: Literal[1] = Field(default=1, alias="schema")
    target: str = "host"
    mode: Literal["static", "dynamic"] = "static"
    objective: Literal["latency", "size", "coverage"] = "latency"  # what a target that is measured chooses by
    observer: str = "mse"
    weight_bits: int = Field(default=8, ge=2, le=16)
    activation_bits: int = Field(default=8, ge=2, le=16)
    exclude: tuple[str, ...] = ()
    override: tuple[Override, ...] = ()
    passes: dict[str, dict[str, Any] | bool] = {}
    gates: Gates = Gates()

    def options(self, name: str) -> dict[str, Any] | None:
        """The options of a pass; None where the recipe leaves the pass out."""
        given = self.passes.get(name, True)
        if given is False:
            return None
        return {} if given is True else dict(given)


def load(path: str | Path | Recipe | None, **overrides: Any) -> Recipe:
    """The recipe in a TOML file, a given or the default one, with what is given (and not None) put over it.

    Raises RecipeError that names the key, what it was, and what it may be.
    """
    data: dict[str, Any] = {}
    where = "recipe"
    if isinstance(path, Recipe):
        data = path.model_dump(by_alias=True)
    elif path is not None:
        where = f"recipe {path}"
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RecipeError(f"{where} cannot be read: {error}") from error
    gates = {k: v for k, v in overrides.pop("gates", {}).items() if v is not None}
    if gates and isinstance(data.get("gates", {}), dict):
        data["gates"] = {**data.get("gates", {}), **gates}
    data.update({k: v for k, v in overrides.items() if v is not None})
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error)}") from error
    _check_names(recipe)
    return recipe


def _explain(error: ValidationError) -> str:
    found = error.errors()
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])  # a misspelt key is also a missing one
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        owner = {"override": Override, "gates": Gates}.get(str(first["loc"][0]), Recipe)
        valid = [f.alias or name for name, f in owner.model_fields.items()]
        return f"unknown key {key}; {nearest(str(first['loc'][-1]), valid)}"
    return f"{key} is {first['input']!r}: {first['msg'].lower()}"


def _check_names(recipe: Recipe) -> None:
    """Every target, observer and pass that the recipe names exists, and every option fits."""
    from onnxq import target
    from onnxq.observers import observer
    from onnxq.passes import PASSES

    if recipe.target not in target.names():
        raise RecipeError(f"unknown target {recipe.target}; {nearest(recipe.target, target.names())}")
    observer(recipe.observer)
    for override in recipe.override:
        observer(override.observer)
    for name in recipe.passes:
        if name in NEEDED and recipe.options(name) is None:
            raise RecipeError(f"pass {name} cannot be left out: what comes after needs it")
        if name not in PASSES:
            raise RecipeError(f"unknown pass {name}; {nearest(name, PASSES)}")
        PASSES[name].with_options(recipe.options(name) or {})
