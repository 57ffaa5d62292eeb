"""The one runner of the golden files: tests/golden/<pass>/<case>.txt says what a pass does to a graph.

A file is a sentence, lines `pass: name{option=value}` (left out: the folder's name), `target: name`
(left out: cpu) and `before: pass pass ...`, and blocks:

    --- given       a model in ONNX's textual syntax; values declared but not set are drawn from a seed
    --- specs       TOML, optional: parameters of tensors and who reads them quantized, for passes that lower
    --- result      canonical text (onnxq/text.py) after the pass, or `unchanged`
    --- refused     optional: a part of the reason for each refusal, one a line

Shapes are inferred first, then the passes named in `before` run. Whatever the file says, the result must pass onnx.checker
and run; but for refine, every pass before lower must leave the outputs equal to 1e-5 of their largest element, or, where it
takes a quantization back, as near as activations of 8 bits are; and but for select and refine, which measure, a second run
must find nothing to do.
`pytest --update-golden` writes the result and refused blocks.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from onnxq import proof, target
from onnxq.data import Samples, open_samples
from onnxq.graph import Graph
from onnxq.model import Fixed, Model, verify
from onnxq.numerics import PerAxis, PerTensor, QuantParams, QuantType
from onnxq.passes import PASSES
from onnxq.passmanager import Pass
from onnxq.proof import compare
from onnxq.runtime import Session, TensorInfo, evaluate
from onnxq.text import to_text

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(GOLDEN.glob("*/*.txt"))
EXPORTERS = ("pytorch", "tensorflow", "keras", "paddle", "jax", "onnxruntime")
ROUNDING = 0.1  # of the largest element: what activations of 8 bits lose
HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'


@pytest.mark.parametrize("path", CASES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_golden(path: Path, request: pytest.FixtureRequest) -> None:
    head, blocks = split(path.read_text(encoding="utf-8"))
    given = parse(blocks["given"])
    model = Model(Graph.from_proto(given), target.load(head.get("target", "cpu")), samples=samples(given), threads=1)
    PASSES["infer-shapes"]().apply(model)
    for name in head.get("before", "").split():
        make(name).apply(model)
    stage = PASSES[head.get("pass", path.parent.name).partition("{")[0]].__module__.split(".")[2]
    if stage == "equalize":  # of what ran before it only the statistics are left
        sketches = model.calibration.sketches if model.calibration is not None else {}
        channels = {name: s.channels for name, s in sketches.items() if s.channels is not None}
        model = Model(model.graph, model.target, channels=channels)
    place(model, blocks.get("specs", ""))
    before, before_text, p = model.fork(), to_text(model), make(head.get("pass", path.parent.name))
    model.refusals.clear()

    rewrites = p.apply(model)
    refusals = list(model.refusals)
    verify(model)
    text = to_text(model)
    text = "unchanged\n" if text == before_text else text
    assert rewrites or text == "unchanged\n", "the pass changed the graph and says that it did nothing"
    reasons = "".join(f"{why}\n" for _, why in refusals)

    if stage not in ("select", "refine"):
        assert p.apply(model) == 0, "a second run finds something to do"
    proto = model.graph.to_proto()
    onnx.checker.check_model(proto)
    if stage not in ("refine", "lower"):
        assert_equal(before, model, given, ROUNDING if stage == "recover" else proof.FLOAT_TOLERANCE)
    for feed in feeds(given):
        Session(proto, threads=1).run(feed)
    if request.config.getoption("--update-golden"):
        update(path, blocks, text, reasons)
    else:
        assert text == blocks["result"]
        check_refusals(reasons, blocks.get("refused", ""))


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_is_a_file_of_its_name_and_has_its_cases(name: str) -> None:
    kind = PASSES[name]
    assert "".join(part.capitalize() for part in name.split("-")) == kind.__name__
    assert kind.__module__.rsplit(".", 1)[1] == name.replace("-", "_")
    doc = kind.__doc__ or ""
    assert "Given:" in doc
    assert "Result:" in doc
    assert "Refused:" in doc
    cases = [p for p in CASES if p.parent.name == name]
    assert len(cases) >= 3, f"{name} needs a case in which it fires, one that it refuses, one with an inner graph output"
    unchanged = [p for p in cases if split(p.read_text(encoding="utf-8"))[1]["result"] == "unchanged\n"]
    assert unchanged, f"{name} has no case in which nothing changes"
    assert len(unchanged) < len(cases), f"{name} has no case in which it fires"


@pytest.mark.parametrize(
    "name", [n for n, kind in PASSES.items() if {"match", "find"} & vars(sys.modules[kind.__module__]).keys()]
)
def test_every_recogniser_knows_several_exporters_and_refuses_a_near_miss(name: str) -> None:
    cases = {p.stem: split(p.read_text(encoding="utf-8"))[1]["result"] for p in CASES if p.parent.name == name}
    found = [
        case
        for case in cases
        if re.match("pytorch|tensorflow|keras|paddle|jax|onnxruntime", case) and cases[case] != "unchanged\n"
    ]
    missed = [case for case in cases if case.startswith("near-")]
    assert len({case.split("-")[0] for case in found}) >= 1, f"{name} has no case of an exporter"
    assert missed, f"{name} has no near miss"
    assert all(cases[case] == "unchanged\n" for case in missed)


def split(text: str) -> tuple[dict[str, str], dict[str, str]]:
    head, *parts = re.split(r"^--- (\w+)\n", text, flags=re.MULTILINE)
    keys = dict(re.findall(r"^(pass|before|target): *(.+)$", head, flags=re.MULTILINE))
    return keys, dict(zip(parts[::2], parts[1::2], strict=True))


def make(text: str) -> Pass:
    """`name` or `name{option=value}`; values are TOML."""
    name, _, options = text.partition("{")
    return PASSES[name].with_options(tomllib.loads("\n".join(options.rstrip("}").split(";"))))


def parse(text: str) -> onnx.ModelProto:
    """The model; a header of opset 17 is put before it unless it has one. Unset values become seeded initializers."""
    proto = onnx.parser.parse_model(text if text.lstrip().startswith("<") else HEADER + text)
    rng = np.random.default_rng(0)
    made = {o for n in proto.graph.node for o in n.output} | {t.name for t in proto.graph.initializer}
    for info in list(proto.graph.value_info):
        if info.name not in made:
            shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
            values = np.asarray(rng.uniform(0.1, 1.0, shape) if dtype.kind == "f" else rng.integers(0, 3, shape))
            proto.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(dtype), info.name))
            proto.graph.value_info.remove(info)
    return proto


def feeds(proto: onnx.ModelProto) -> list[dict[str, np.ndarray]]:
    """Two seeded feeds; symbolic dimensions are 2."""
    rng, constants = np.random.default_rng(1), {t.name for t in proto.graph.initializer}
    found: list[dict[str, np.ndarray]] = []
    for _ in range(2):
        feed = {}
        for info in proto.graph.input:
            if info.name in constants:
                continue
            shape = [d.dim_value or 2 for d in info.type.tensor_type.shape.dim]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
            values = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)
            feed[info.name] = values.astype(dtype)
        found.append(feed)
    return found


def samples(proto: onnx.ModelProto) -> Samples:
    inputs = [TensorInfo(name, a.dtype, a.shape) for name, a in feeds(proto)[0].items()]
    return open_samples(feeds(proto), inputs)


def place(model: Model, text: str) -> None:
    """Specs of tensors: [name] type, scale, zero_point, axis, readers = ["node:0", "output:0"]."""
    for name, said in tomllib.loads(text).items():
        kind = QuantType(said.get("type", "uint8"))
        scale, zero = np.array(said["scale"], np.float32), np.array(said["zero_point"], kind.dtype)
        granularity = PerAxis(said["axis"]) if "axis" in said else PerTensor()
        model.specs[name] = Fixed(QuantParams(scale, zero, kind, granularity))
        for reader in said["readers"]:
            node, index = reader.rsplit(":", 1)
            model.quantized_inputs.add(("" if node == "output" else node, int(index)))


def assert_equal(before: Model, after: Model, given: onnx.ModelProto, tolerance: float) -> None:
    for feed in feeds(given):
        expected, got = evaluate(before.graph.to_proto(), feed), evaluate(after.graph.to_proto(), feed)
        assert list(expected) == list(got)
        for name, array in expected.items():
            if array.dtype.kind in "iu":  # codes
                assert np.abs(array.astype(np.int64) - got[name].astype(np.int64)).max(initial=0) <= 1
            else:
                assert compare(array, got[name], tolerance) is None


def check_refusals(reasons: str, expected: str) -> None:
    for line in filter(None, expected.splitlines()):
        assert line in reasons


def update(path: Path, blocks: dict[str, str], result: str, reasons: str) -> None:
    head = path.read_text(encoding="utf-8").split("--- given\n")[0]
    kept = "".join(f"--- {name}\n{blocks[name]}" for name in ("given", "specs") if name in blocks)
    refused = f"--- refused\n{reasons}" if reasons else ""
    path.write_text(f"{head}{kept}--- result\n{result}{refused}", encoding="utf-8")
