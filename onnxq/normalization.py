"""The forms in which exporters write (x - mean) / sqrt(variance + epsilon), scaled by gamma and shifted by beta."""

from __future__ import annotations

import numpy as np

from onnxq.pattern import Array, Either, Input, Match, Number, Op, Pattern, keeps_dimensions, reduced_axes

X = Input("x")


def _mean(of: Pattern, name: str) -> Pattern:
    total = Op("ReduceSum", of, name=name)
    return Either(Op("ReduceMean", of, name=name), Op("Mul", total, Number("share")), Op("Div", total, Number("count")))


_MEAN = _mean(X, "mean")
_CENTRED = Op("Sub", X, _MEAN)
_AGAIN = Op("Sub", X, _mean(X, "mean_of_variance"))  # some exporters compute the mean twice
_SQUARE = Either(Op("Pow", _AGAIN, Number(2)), Op("Mul", _AGAIN, _AGAIN))
_SQUARE_OF_X = Either(Op("Pow", X, Number(2)), Op("Mul", X, X))
_SQUARE_OF_MEAN = Either(Op("Pow", _MEAN, Number(2)), Op("Mul", _MEAN, _MEAN))
_DIFFERENCE = Op("Sub", _mean(_SQUARE_OF_X, "variance"), _SQUARE_OF_MEAN)
_VARIANCE = Either(_mean(_SQUARE, "variance"), Op("Max", _DIFFERENCE, Number(0)), _DIFFERENCE)
_SHIFTED = Op("Add", _VARIANCE, Number("epsilon"))
_DEVIATION = Op("Sqrt", _SHIFTED)
_INVERSE = Either(
    Op("Reciprocal", _DEVIATION), Op("Div", Number(1), _DEVIATION), Op("Pow", _SHIFTED, Number(-0.5)),
)  # fmt: skip
NORMALIZED = Either(Op("Div", _CENTRED, _DEVIATION), Op("Mul", _CENTRED, _INVERSE))
_FACTOR = Op("Mul", _INVERSE, Array("gamma"))
SCALED = Either(Op("Mul", NORMALIZED, Array("gamma")), Op("Mul", _CENTRED, _FACTOR))
AFFINE = Either(
    Op("Add", SCALED, Array("beta")),
    Op("Add", Op("Mul", X, _FACTOR), Op("Sub", Array("beta"), Op("Mul", _MEAN, _FACTOR))),
)


def normalized_axes(found: Match) -> tuple[int, ...] | None:
    """The axes of all means, counted from the end and in order; None where they are unknown, differ or are dropped.

    A sum counts as a mean only where it is divided by the number of elements that it sums.
    """
    shape = found.tensors["x"].shape
    said = set()
    for node in found.nodes.values():
        axes = reduced_axes(node)
        if axes is None or not keeps_dimensions(node) or (shape is None and any(a >= 0 for a in axes)):
            return None
        said.add(tuple(sorted(a - len(shape or ()) if a >= 0 else a for a in axes)))
    if len(said) != 1:
        return None
    axes = said.pop()
    if "share" in found.numbers or "count" in found.numbers:
        dims = None if shape is None else [shape[a] for a in axes]
        if dims is None or not all(isinstance(d, int) for d in dims):
            return None
        count = float(np.prod(dims))
        divisors = [found.numbers.get("count", count), 1 / found.numbers.get("share", 1 / count)]
        if not np.allclose(divisors, count, rtol=1e-4):
            return None
    return axes
