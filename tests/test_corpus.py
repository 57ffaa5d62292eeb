"""The backend tests of the onnx package: every model that onnxruntime runs goes through."""

from __future__ import annotations

import re
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnxq
from onnxq.errors import OnnxqError
from onnxq.runtime import Session

PARTS = 12  # the default suite takes the first of them


@lru_cache(maxsize=1)
def cases() -> list[tuple[str, onnx.ModelProto, list[Any]]]:
    """(name, model, its inputs in order): of single ops, made by the package, and of small networks, from its files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        found = [(c.name, c.model, list(c.data_sets[0][0])) for c in collect_testcases(None) if c.model and c.data_sets]
    for path in sorted((Path(onnx.__file__).parent / "backend" / "test" / "data").glob("*/*/model.onnx")):
        stored = sorted(path.parent.glob("test_data_set_0/input_*.pb"), key=lambda p: int(re.findall(r"\d+", p.stem)[-1]))
        model = onnx.load(path)
        kinds = [i.type for i in model.graph.input]
        inputs = [value_of(p.read_bytes(), kind) for p, kind in zip(stored, kinds, strict=False)]
        found.append((path.parent.name, model, inputs))
    return sorted(found, key=lambda case: case[0])


def value_of(content: bytes, kind: onnx.TypeProto) -> Any:
    if kind.HasField("optional_type"):
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(content))
    if kind.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(content))
    return numpy_helper.to_array(onnx.TensorProto.FromString(content))


def goes_through(part: int) -> None:
    seen, wrong = 0, []
    for name, model, inputs in cases()[part::PARTS]:
        fixed = {t.name for t in model.graph.initializer}
        names = [i.name for i in model.graph.input if i.name not in fixed]
        plain = [v if isinstance(v, list) or v is None else np.asarray(v) for v in inputs]
        feed: dict[str, Any] = dict(zip(names, plain, strict=False))
        try:
            Session(model, threads=1).run(feed)
        except OnnxqError:
            continue  # onnxruntime does not have it
        seen += 1
        try:
            onnxq.quantize(model, [feed], target="cpu", threads=1, validate=False)
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
    assert seen > 50
    assert wrong == []


@pytest.mark.filterwarnings("ignore")
def test_models_of_the_onnx_package_go_through() -> None:
    goes_through(0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(1, PARTS))
def test_all_models_of_the_onnx_package_go_through(part: int) -> None:
    goes_through(part)
