"""Bad input gives one clear message and exit code 2, no traceback, and leaves nothing behind; a missed gate gives 1."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from onnxq import cli, source
from onnxq.calibration import Calibration
from onnxq.errors import OutputError
from tests import tiny

X = tiny.rows()


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model and data that go together."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    tiny.write(tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=X, label=np.arange(8) % 3)
    return tmp_path


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command in this process, with what it and the C++ below it write."""

    def run_command(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["onnxq", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capfd.readouterr()
        assert isinstance(exit_.value.code, int)
        return Outcome(exit_.value.code, out, err)

    return run_command


@pytest.fixture
def fails(run: Run, folder: Path) -> Callable[..., None]:
    """The command fails with one message that says these words, and changes no file."""

    def check(arguments: str | list[str], *words: str, code: int = 2) -> None:
        before = snapshot(folder)
        got = run(*(arguments.split() if isinstance(arguments, str) else arguments))
        assert got.code == code, got.err
        assert one_line(got.err)
        for word in words:
            assert word in got.err
        assert snapshot(folder) == before

    return check


def one_line(err: str) -> bool:
    """One line, a sentence for a user: not Python's words for it."""
    assert "Traceback" not in err
    assert "onnxq's own" not in err
    return re.fullmatch(r"onnxq: \S[^\n]*\n", err) is not None


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file with its content; modules that Python compiled on the way do not count."""
    files = (p for p in folder.rglob("*") if "__pycache__" not in p.parts)
    return {str(p): p.read_bytes() if p.is_file() else None for p in files}


QUANTIZE = "quantize m.onnx -o q.onnx --data d.npz --no-validate"
VALIDATED = "quantize m.onnx -o q.onnx --data d.npz"


def test_what_the_others_vary_works(run: Run, folder: Path) -> None:
    got = run(*QUANTIZE.split(), "--quiet")
    assert got == Outcome(0, "", "")
    onnx.checker.check_model(onnx.load("q.onnx"))
    assert run("--version").code == 0


# ---- models


def test_files_that_are_no_model(folder: Path, fails: Callable[..., None]) -> None:
    with zipfile.ZipFile("weights.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    blind = tiny.model()
    del blind.graph.output[:]
    whole, noise = (folder / "m.onnx").read_bytes(), np.random.default_rng(0).bytes(500)
    for name, content, words in (
        ("text.onnx", b"hello, this is no model\n", "is not an ONNX file, or is truncated"),
        ("empty.onnx", b"", "is not an ONNX model, or is truncated: it has no graph"),
        ("blind.onnx", blind.SerializeToString(), "is not an ONNX model, or is truncated: it has no outputs"),
        ("noise.onnx", noise, "is not an ONNX file, or is truncated"),
        ("cut.onnx", whole[: len(whole) // 2], "truncated"),
        ("weights.pt", (folder / "weights.pt").read_bytes(), "is a zip archive, as PyTorch saves; give the .onnx"),
    ):
        (folder / name).write_bytes(content)
        for command in ("quantize {} -o q.onnx --data d.npz", "calibrate {} -o q.calib --data d.npz", "inspect {}"):
            fails(command.format(name), name, words)
        fails(f"validate {name} m.onnx --data d.npz", name, words)
        fails(f"validate m.onnx {name} --data d.npz", name, words)


def test_every_cut_of_a_model_is_refused(folder: Path, fails: Callable[..., None]) -> None:
    whole = (folder / "m.onnx").read_bytes()
    for length in range(0, len(whole), 7):
        (folder / "cut.onnx").write_bytes(whole[:length])
        fails("quantize cut.onnx -o q.onnx --data d.npz --no-validate", "cut.onnx is not an ONNX", "truncated")


def test_places_that_hold_no_model(folder: Path, fails: Callable[..., None]) -> None:
    (folder / "models").mkdir()
    fails("quantize models -o q.onnx --data d.npz", "models cannot be read: Is a directory")
    fails("quantize no.onnx -o q.onnx --data d.npz", "there is no model at no.onnx")
    fails("inspect no.onnx", "there is no model at no.onnx")
    fails(f"quantize {'n' * 300}.onnx -o q.onnx --data d.npz", "File name too long")


def test_missing_external_data(folder: Path, fails: Callable[..., None]) -> None:
    onnx.save(tiny.model(), "e.onnx", save_as_external_data=True, location="e.data", size_threshold=0)
    (folder / "e.data").unlink()
    fails("quantize e.onnx -o q.onnx --data d.npz", "external data of tensor w", "e.data", "put the data file next to")


# ---- data


@pytest.mark.parametrize(
    "feed, words",
    [
        ({"xx": X}, ["d.npz[0]: the model has no input xx; ", "x"]),
        ({"x": X.astype(np.int64)}, ["d.npz[0]: input x is int64, the model takes float32"]),
        ({"x": X[:, :3]}, ["d.npz[0]: input x has shape [1, 3], the model takes [?, 4]"]),
        ({"label": np.arange(8)}, ["d.npz[0]: there is no array for input x"]),
        ({"x": X[:0]}, ["d.npz is empty"]),
        ({}, ["d.npz is empty"]),
        ({"x": np.array([None] * 4)}, ["d.npz is no readable .npz file, at array x: it holds pickled objects"]),
    ],
)
def test_data_that_does_not_fit(feed: dict[str, np.ndarray], words: list[str], fails: Callable[..., None]) -> None:
    np.savez("d.npz", **feed)  # type: ignore[arg-type]
    fails(QUANTIZE, *words)
    fails("calibrate m.onnx -o q.calib --data d.npz", *words)
    fails("validate m.onnx m.onnx --data d.npz", *words)


def test_a_second_input_that_is_missing_or_misspelt(folder: Path, fails: Callable[..., None]) -> None:
    tiny.write(folder / "m.onnx", tiny.TWO_INPUTS)
    fails(QUANTIZE, "there is no array for input shift; it holds ['x']")
    np.savez("d.npz", x=X, shfit=X)
    fails(QUANTIZE, "the model has no input shfit; did you mean shift?")


def test_data_that_cannot_be_read(folder: Path, fails: Callable[..., None]) -> None:
    whole = (folder / "d.npz").read_bytes()
    np.save("array.npy", X)
    damaged = bytearray(whole)
    damaged[200:260] = bytes(60)
    for content in (b"", b"text", whole[:100], whole[:-30], bytes(damaged), (folder / "array.npy").read_bytes()):
        (folder / "d.npz").write_bytes(content)
        fails(QUANTIZE, "d.npz is no readable .npz file")
    for content in (b"", b"text", whole, (folder / "array.npy").read_bytes()[:-5]):
        (folder / "array.npy").write_bytes(content)
        fails("quantize m.onnx -o q.onnx --data array.npy", "array.npy is no readable .npy file")
    (folder / "feeds").mkdir()
    fails("quantize m.onnx -o q.onnx --data feeds", "feeds holds no .npz feeds, no test_data_set_* folders and no images")
    (folder / "feeds" / "a.npz").write_bytes(whole[:100])
    fails("quantize m.onnx -o q.onnx --data feeds", "feeds/a.npz is no readable .npz file")
    fails("quantize m.onnx -o q.onnx --data no/data", "there is no data at no/data; --data takes")
    fails(["quantize", "m.onnx", "-o", "q.onnx", "--data", ""], "there is no data at an empty path")
    fails("quantize m.onnx -o q.onnx --data m.onnx", "m.onnx is no kind of data that is known")


def test_evaluation_data_is_checked_before_the_long_work(folder: Path, fails: Callable[..., None]) -> None:
    np.savez("e.npz", x=X[:, :3])
    fails(f"{VALIDATED} --eval e.npz", "e.npz[0]: input x has shape [1, 3]")
    fails(f"{VALIDATED} --eval no.npz", "there is no data at no.npz")


@pytest.mark.filterwarnings("ignore:invalid value|divide by zero")
def test_activations_that_are_not_finite(folder: Path, run: Run, fails: Callable[..., None]) -> None:
    bad = X.copy()
    bad[5, 2] = -1
    np.savez("d.npz", x=bad)
    tiny.write(folder / "m.onnx", tiny.ROOT)
    fails(QUANTIZE, "NaN in tensor root at d.npz[5]", "check the data")
    found = run("calibrate", "m.onnx", "-o", "q.calib", "--data", "d.npz", "--checkpoint", "progress")
    assert found.code == 2
    for words in (
        "NaN in tensor root at d.npz[5]",
        "check the data",
        "the statistics of ",
        " samples are in q.partial.calib",
    ):
        assert words in found.err
    assert "the same command goes on from what is in progress" in found.err
    assert one_line(found.err)
    assert Calibration.load(folder / "q.partial.calib").samples >= 5
    bad[5, 2] = 0
    np.savez("d.npz", x=bad)
    tiny.write(folder / "m.onnx", tiny.DIVISION)
    fails(QUANTIZE, "infinity in tensor inverse at d.npz[5]", "check the data")
    for value, word in ((np.nan, "NaN"), (np.inf, "infinity")):
        bad[5, 2] = value
        np.savez("d.npz", x=bad)
        tiny.write(folder / "m.onnx")
        fails(QUANTIZE, f"{word} in tensor x at d.npz[5]", "check the data")


def test_no_data(fails: Callable[..., None]) -> None:
    fails("quantize m.onnx -o q.onnx", "there is no calibration data", "give --data")
    fails("calibrate m.onnx -o q.calib", "--data", "--merge")


@pytest.mark.parametrize("kind", ["SIGINT", "SIGTERM"])
def test_an_interrupt_says_what_is_kept(folder: Path, run: Run, kind: str) -> None:
    (folder / f"mine_{kind}.py").write_text(
        "import numpy as np, signal\ndef feeds():\n    for k in range(9):\n        if k == 5:\n"
        f"            signal.raise_signal(signal.{kind})\n        yield {{'x': np.ones((1, 4), np.float32) * k}}\n",
        encoding="utf-8",
    )
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets jobs in the background ignore it
    try:
        found = run("calibrate", "m.onnx", "--data", f"mine_{kind}:feeds", "-o", "q.calib", "--checkpoint", "progress")
    finally:
        signal.signal(signal.SIGINT, ours)
    assert found.code == 130
    assert "the statistics of 5 samples are in q.partial.calib, for quantize --calibration" in found.err
    assert "the same command goes on from what is in progress" in found.err
    assert not (folder / "q.calib").exists()


def test_nothing_is_left_behind_by_a_run_that_is_told_to_end(folder: Path) -> None:
    (folder / "ending.py").write_text(
        "import glob, os, pathlib, signal, tempfile\ndef feeds():\n"
        "    pathlib.Path('held').write_text(str(glob.glob(tempfile.gettempdir() + '/onnxq-*')))\n"
        "    signal.raise_signal(signal.SIGTERM)\n    yield {}\n",
        encoding="utf-8",
    )
    large = tiny.write(
        folder / "large.onnx", "net (float[N, 4] x) => (float[N, 8192] y) <float[4, 8192] w> { y = MatMul (x, w) }"
    )
    (folder / "tmp").mkdir()
    command = [sys.executable, "-m", "onnxq", "calibrate", str(large), "--data", "ending:feeds", "-o", "q.calib"]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "TMPDIR": str(folder / "tmp")}, capture_output=True, check=False
    )
    assert done.returncode == 130
    assert "onnxq-" in (folder / "held").read_text(encoding="utf-8")
    assert not list((folder / "tmp").glob("onnxq-*"))


def test_how_to_collect(fails: Callable[..., None]) -> None:
    start = "calibrate m.onnx --data d.npz -o q.calib"
    fails(f"{start} --memory-limit much", "--memory-limit is much", "e.g. 512MB")
    fails(f"{start} --memory-limit 0", "memory-limit is 0 bytes")
    fails(f"{start} --on-nonfinite skipp", "on-nonfinite is skipp", "did you mean skip?")
    fails(f"{start} --checkpoint d.npz", "the checkpoint d.npz is a file", "give a folder")
    fails(f"{start} --feedback state", "--feedback is state", "OUTPUT=INPUT")
    fails(f"{start} --feedback a=b", "feedback a=b: the model has no output a")
    fails(f"{start} --workers 2 --dask tcp://x:1", "--workers and --dask", "give one")
    fails(f"{start} --workers 0", "--workers")
    fails("calibrate m.onnx n.onnx --data d.npz -o q.calib", "2 files were given", "--merge")
    fails("calibrate --merge none.calib -o q.calib", "none.calib", "calibration")
    idle = "--merge joins files and collects nothing; leave --target, --max-samples out"
    fails("calibrate --merge none.calib -o q.calib --target cpu --max-samples 3", idle)
    fails("quantize m.onnx --data d.npz -o q.onnx --ranges none.toml", "none.toml", "cannot be read")
    idle = "--max-samples and --image-size say how data is read, and there is none; give --data or --eval too"
    fails("quantize m.onnx --calibration none.calib -o q.onnx --max-samples 3 --image-size 8", idle)


def test_labels_that_do_not_fit(fails: Callable[..., None]) -> None:
    np.savez("d.npz", x=X, label=np.zeros((8, 2), np.int64))
    fails(VALIDATED, "d.npz[0]: 2 labels do not go with scores of shape [1, 3]", "give --metric")


def test_functions_that_fail(folder: Path, fails: Callable[..., None]) -> None:
    (folder / "mine_of_errors.py").write_text(
        "def metric(run, samples):\n    return run(samples[0][0])['y'][9]\ndef feeds():\n    raise OSError('no disk')\n"
    )
    fails(f"{VALIDATED} --metric mine_of_errors:metric", "mine_of_errors:metric raised IndexError", "look at line 2 of")
    fails(f"{VALIDATED} --metric mine_of_errors:metrik", "has no metrik; did you mean metric?")
    fails(f"{VALIDATED} --metric nowhere_at_all:metric", "module nowhere_at_all cannot be imported")
    fails(f"{VALIDATED} --metric metric", "metric names no function; it takes MODULE:FUNCTION")
    fails("quantize m.onnx -o q.onnx --data mine_of_errors:feeds", "raised OSError: no disk; look at line 4 of")
    fails("validate m.onnx m.onnx --data d.npz --metric mine_of_errors:metric", "raised IndexError")


# ---- choices


@pytest.mark.parametrize(
    "options, words",
    [
        ("--target cup", ["unknown target cup; did you mean cpu"]),
        ("--observer kll", ["unknown observer kll; did you mean kl"]),
        ("--observer percentile{uper=99}", ["observer percentile has no option uper; did you mean upper"]),
        ("--observer percentile{upper=high}", ["option upper of observer percentile is 'high'; it takes a number"]),
        ("--exclude Sofmax", ["exclude pattern Sofmax matches no node", "MatMul"]),
        ("--exclude matmul", ["exclude pattern matmul matches no node", "did you mean MatMul"]),
        ("--provider cppu", ["no provider cppu; ", "did you mean cpu"]),
        ("--max-samples 0", ["'--max-samples'", "see onnxq quantize --help"]),
        ("--max-samples many", ["'--max-samples'", "see onnxq quantize --help"]),
        ("--seed -1", ["'--seed'", "see onnxq quantize --help"]),
        ("--threads 100000", ["'--threads'", "see onnxq quantize --help"]),
        ("--threads -1", ["'--threads'", "see onnxq quantize --help"]),
        ("--bogus", ["No such option: --bogus", "see onnxq quantize --help"]),
        ("--image-size 4", ["--image-size is 4; it takes HEIGHTxWIDTH, e.g. 224x224"]),
        ("--image-size 0x4", ["--image-size is 0x4; it takes HEIGHTxWIDTH"]),
        ("--image-mean a,b,c", ["--image-mean is a,b,c; it takes one number, or one for each channel"]),
        ("--image-mean nan", ["the image mean is (nan,); it takes finite numbers"]),
        ("--image-std 1,0,1", ["the image std is (1.0, 0.0, 1.0)", "none of it may be 0"]),
        ("--image-scale big", ["'--image-scale'", "see onnxq quantize --help"]),
        ("--image-layout NWHC", ["unknown image layout NWHC; did you mean"]),
        ("--image-order RBG", ["unknown image order RBG; did you mean"]),
    ],
)
def test_options(options: str, words: list[str], fails: Callable[..., None]) -> None:
    fails(f"{QUANTIZE} {options}", *words)


@pytest.mark.parametrize(
    "text, words",
    [
        ("targett = 'cpu'", ["unknown key targett; did you mean target?"]),
        ("target = 3", ["target is 3"]),
        ("target = 'cup'", ["unknown target cup; did you mean cpu"]),
        ("schema = 2", ["schema is 2"]),
        ("[gates]\nmax_dorp = 1", ["unknown key gates.max_dorp; did you mean max_drop?"]),
        ("[[override]]\nmatch = 'x'\nobserver = 'ms'", ["unknown observer ms; did you mean mse"]),
        ("[passes]\ncorect-bias = false", ["unknown pass corect-bias; did you mean correct-bias"]),
        (
            "[passes]\nchoose-weight-ranges = { methd = 'max' }",
            ["choose-weight-ranges has no option methd; did you mean method?"],
        ),
        ("[passes]\nchoose-weight-ranges = { method = 3 }", ["option method of pass choose-weight-ranges is 3; it takes a"]),
        ("target = ", ["recipe r.toml cannot be read: Invalid value"]),
        ("\x00", ["recipe r.toml cannot be read"]),
    ],
)
def test_recipes(text: str, words: list[str], folder: Path, fails: Callable[..., None]) -> None:
    (folder / "r.toml").write_text(text)
    fails(f"{QUANTIZE} --recipe r.toml", *words)


def test_a_recipe_that_is_not_there(fails: Callable[..., None]) -> None:
    fails(f"{QUANTIZE} --recipe no.toml", "recipe no.toml cannot be read", "No such file")
    fails(f"{QUANTIZE} --recipe .", "recipe . cannot be read", "Is a directory")


def test_commands(fails: Callable[..., None], run: Run) -> None:
    fails("", "no command was given; see onnxq --help")
    assert "quantize" in run().out
    fails("quantise", "No such command 'quantise'", "see onnxq --help")
    fails("quantize", "Missing argument", "see onnxq quantize --help")
    fails("quantize m.onnx", "Missing option '--output'")
    fails("passes corect-bias", "unknown pass corect-bias; did you mean correct-bias")


# ---- calibration files


def test_calibration_files(folder: Path, run: Run, fails: Callable[..., None]) -> None:
    tiny.write(folder / "other.onnx", tiny.DENSE.replace("Relu", "Tanh"))
    assert run("calibrate", "other.onnx", "-o", "other.calib", "--data", "d.npz").code == 0
    fails("quantize m.onnx -o q.onnx --calibration other.calib", "made from another model", "run onnxq calibrate")
    whole = (folder / "other.calib").read_bytes()
    for content in (b"", b"garbage", whole[:-40], whole[: len(whole) // 2], (folder / "d.npz").read_bytes()):
        (folder / "bad.calib").write_bytes(content)
        fails("quantize other.onnx -o q.onnx --calibration bad.calib", "bad.calib is no readable calibration file")
    fails("quantize m.onnx -o q.onnx --calibration no.calib", "no.calib is no readable calibration file", "No such file")
    with zipfile.ZipFile("bad.calib", "w") as archive:
        archive.writestr("header.json", '{"schema": 99}')
    fails("quantize other.onnx -o q.onnx --calibration bad.calib", "has schema 99, this onnxq reads 7; calibrate again")
    fails("calibrate m.onnx -o other.calib --data d.npz", "other.calib exists; give --force")


# ---- outputs


def test_outputs_that_cannot_be_written(folder: Path, fails: Callable[..., None]) -> None:
    fails("quantize m.onnx -o no/q.onnx --data d.npz", "the folder no does not exist; make it first")
    fails("quantize m.onnx -o d.npz/q.onnx --data d.npz", "the folder d.npz does not exist")
    fails("calibrate m.onnx -o d.npz/q.calib --data d.npz", "the folder d.npz does not exist")
    (folder / "q").mkdir()
    fails("quantize m.onnx -o q --data d.npz --force", "q is a folder; give the name of a file")
    fails(f"{QUANTIZE} --report no/r.json", "the folder no does not exist")
    fails(f"{QUANTIZE} --report q --force", "q is a folder")
    fails(f"{QUANTIZE} --dump-dir d.npz", "d.npz", "exists")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_is_not_writable(folder: Path, fails: Callable[..., None]) -> None:
    (folder / "closed").mkdir(mode=0o500)
    fails("quantize m.onnx -o closed/q.onnx --data d.npz", "the folder closed is not writable; give another")
    fails(f"{QUANTIZE} --report closed/r.json", "the folder closed is not writable")


def test_an_existing_output_is_replaced_only_with_force(folder: Path, run: Run, fails: Callable[..., None]) -> None:
    (folder / "q.onnx").write_bytes(b"mine")
    (folder / "r.json").write_bytes(b"mine")
    fails(QUANTIZE, "q.onnx exists; give --force to replace it, or another name")
    fails("quantize m.onnx -o new.onnx --data d.npz --report r.json", "r.json exists; give --force")
    fails("validate m.onnx m.onnx --data d.npz --report r.json", "r.json exists; give --force")
    (folder / "bad.npz").write_bytes(b"text")
    fails("quantize m.onnx -o q.onnx --data bad.npz --force", "bad.npz is no readable")  # and q.onnx is as it was
    assert run(*QUANTIZE.split(), "--force", "--report", "r.json").code == 0
    onnx.checker.check_model(onnx.load("q.onnx"))
    assert (folder / "r.json").read_bytes().startswith(b"{")
    assert sorted(p.name for p in folder.iterdir()) == ["bad.npz", "d.npz", "m.onnx", "q.onnx", "r.json"]


def test_what_is_read_is_never_written_over(folder: Path, run: Run, fails: Callable[..., None]) -> None:
    (folder / "sub").mkdir()
    (folder / "link.onnx").symlink_to("m.onnx")
    os.link(folder / "m.onnx", folder / "hard.onnx")
    (folder / "r.toml").write_text("target = 'cpu'")
    assert run("calibrate", "m.onnx", "-o", "c.calib", "--data", "d.npz").code == 0
    for force in ("", " --force"):
        for name in ("m.onnx", "link.onnx", "hard.onnx", "sub/../m.onnx", folder / "m.onnx"):
            fails(f"quantize m.onnx -o {name} --data d.npz{force}", f"the output {name} is the input model")
            fails(f"calibrate m.onnx -o {name} --data d.npz{force}", f"the output {name} is the input model")
            fails(f"{QUANTIZE} --report {name}{force}", f"the report {name} is the input model")
        fails(f"quantize link.onnx -o m.onnx --data d.npz{force}", "the output m.onnx is the input model")
        fails(f"quantize m.onnx -o d.npz --data d.npz{force}", "the output d.npz is the --data")
        fails(f"quantize m.onnx -o d.npz --data d.npz --eval d.npz{force}", "the output d.npz is the --data")
        fails(f"{QUANTIZE} --recipe r.toml --report r.toml{force}", "the report r.toml is the --recipe")
        fails(f"quantize m.onnx -o c.calib --calibration c.calib{force}", "the output c.calib is the --calibration file")
        fails(f"{QUANTIZE} --report q.onnx{force}", "is the output")
        fails(f"validate m.onnx link.onnx --data d.npz --report m.onnx{force}", "the report m.onnx is a model to compare")


def test_a_model_is_not_there_in_part(folder: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., None]) -> None:
    def replace(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (folder / "q.onnx").write_bytes(b"mine")
    monkeypatch.setattr(os, "replace", replace)
    fails(f"{QUANTIZE} --force", "q.onnx cannot be written: No space left on device")


def test_a_model_over_two_gigabytes_has_its_weights_beside_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = tiny.model(tiny.DENSE.replace("4", "400"))
    monkeypatch.setattr(source, "LARGEST_FILE", 100)
    for _ in range(2):  # a second time over the first
        source.save(proto, folder / "big.onnx")
        assert sorted(p.name for p in folder.glob("*big*")) == ["big.onnx", "big.onnx.data"]
        assert (folder / "big.onnx.data").stat().st_size == 400 * 3 * 4
        found = onnx.load(folder / "big.onnx")
        assert found.graph.initializer[0].raw_data == proto.graph.initializer[0].raw_data
        onnx.checker.check_model(found)
    (folder / "other.onnx.data").write_bytes(b"mine")
    before = snapshot(folder)
    with pytest.raises(OutputError, match=r"other\.onnx\.data, where the weights go, exists"):
        source.save(proto, folder / "other.onnx")
    with pytest.raises(OutputError, match="cannot be written"):
        source.save(proto, folder / "no" / "big.onnx")
    assert snapshot(folder) == before


# ---- gates


def test_missed_gates_are_exit_code_1(folder: Path, run: Run) -> None:
    got = run(*VALIDATED.split(), "--quiet", "--min-speedup", "1000")
    assert got.code == 1
    assert one_line(got.err)
    assert "the speedup of" in got.err
    assert "is under --min-speedup 1000" in got.err
    got = run("validate", "m.onnx", "q.onnx", "--data", "d.npz", "--quiet", "--min-speedup", "1000", "--max-drop", "-101")
    assert got.code == 1
    assert [line.split(" of ")[0] for line in got.err.splitlines()] == ["onnxq: the drop", "onnxq: the speedup"]


def test_gates_that_cannot_be_measured(fails: Callable[..., None]) -> None:
    fails(f"{QUANTIZE} --max-drop 1", "a gate needs the comparison")
    fails(f"{QUANTIZE} --min-speedup 1", "a gate needs the comparison")


# ---- images


def test_images_without_their_preprocessing(folder: Path, fails: Callable[..., None]) -> None:
    tiny.write(folder / "m.onnx", tiny.CONV)
    (folder / "images").mkdir()
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(folder / "images" / "a.png")
    command = "quantize m.onnx -o q.onnx --data images"
    fails(command, "images holds images", "give --image-mean and --image-std")
    fails(f"{command} --image-mean 0,0 --image-std 1", "--image-mean has 2 numbers, and the images have 3 channels")
    fails(f"{command} --image-mean 0 --image-std 1 --image-size 5x5", "a.png: input x has shape [1, 3, 5, 5]")
    (folder / "images" / "a.png").write_bytes(b"text")
    fails(f"{command} --image-mean 0 --image-std 1", "images/a.png is no readable image")


# ---- our own mistakes


def test_an_error_of_ours_is_said_to_be_ours(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for raised, code, words in (
        (RuntimeError("oops"), 2, "an error of onnxq's own, please report it: RuntimeError: oops"),
        (MemoryError(), 2, "out of memory"),
        (KeyboardInterrupt(), 130, "nothing was written"),
    ):

        def raise_it(*_: object, raised: BaseException = raised, **__: object) -> None:
            raise raised

        monkeypatch.setattr("onnxq.quantize", raise_it, raising=False)
        got = run(*QUANTIZE.split())
        assert (got.code, got.err.strip().count("\n")) == (code, 0)
        assert words in got.err
