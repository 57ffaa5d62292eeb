"""Observers: from the sketch of a tensor to the range that its integer type is to represent.

Each is a small frozen dataclass: its fields are its options, `choose` is the whole of it. They are named as in a recipe or
on the command line, with options in braces: `mse`, `percentile{upper=99.99}`.
"""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from importlib.metadata import entry_points
from math import isfinite

from onnxq.errors import RecipeError, nearest
from onnxq.observers.auto import Auto
from onnxq.observers.base import Observer, Range
from onnxq.observers.cosine import Cosine
from onnxq.observers.fixed import FixedRange, FixedScale
from onnxq.observers.kl import Kl
from onnxq.observers.minmax import MinMax, MovingAverage
from onnxq.observers.moments import Aciq, ClipStd
from onnxq.observers.mse import Mse
from onnxq.observers.percentile import Percentile

__all__ = ["Auto", "Observer", "Range", "observer", "registry"]

OURS: tuple[type[Observer], ...] = (
    MinMax, MovingAverage, Percentile, Kl, Mse, Cosine, ClipStd, Aciq, FixedRange, FixedScale, Auto,
)  # fmt: skip


@lru_cache(maxsize=1)
def registry() -> dict[str, type[Observer]]:
    """Every observer by its name: ours and those that packages add through the entry point group onnxq.observers."""
    found: dict[str, type[Observer]] = {c.name: c for c in OURS}
    for entry in entry_points(group="onnxq.observers"):
        found[entry.name] = entry.load()
    return found


def observer(text: str) -> Observer:
    """The observer that `name` or `name{option=number,...}` spells. Raises RecipeError that names the nearest valid."""
    name, _, rest = text.partition("{")
    kinds = registry()
    if name not in kinds:
        raise RecipeError(f"unknown observer {name}; {nearest(name, kinds)}")
    if ("{" in text) != text.endswith("}") or text.count("{") > 1:
        raise RecipeError(f"observer {text} is cut short; options stand in braces: {name}{{option=number}}")
    kind, options = kinds[name], {}
    known = {f.name: f.type for f in fields(kind)}
    for part in filter(None, rest.removesuffix("}").split(",")):
        key, _, number = part.partition("=")
        if key.strip() not in known:
            hint = nearest(key.strip(), known) if known else "it has no options"
            raise RecipeError(f"observer {name} has no option {key.strip()}; {hint}")
        try:
            options[key.strip()] = int(number) if known[key.strip()] == "int" else float(number)
        except ValueError as error:
            raise RecipeError(f"option {key.strip()} of observer {name} is {number!r}; it takes a number") from error
        if not isfinite(options[key.strip()]):
            raise RecipeError(f"option {key.strip()} of observer {name} is {number}; it takes a finite number")
    return kind(**options)
