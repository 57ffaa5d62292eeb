"""The command line: one function a verb. It parses, calls the library, prints; nothing else."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import onnxq
from onnxq.errors import OnnxqError, OutputError, RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from onnxq.images import ImageOptions

INTERRUPTED = 130  # the exit code, as shells have it
Progress = Callable[[str, int, int | None], None]
app = typer.Typer(
    name="onnxq",
    help="Quantize ONNX models: right, in integers, and fast on the machine they run on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

DATA_HELP = "Samples: a folder of .npz feeds or of images, an .npz or .npy file, test_data_set_* folders, module:function."
Data = Annotated[str | None, typer.Option("--data", metavar="DATA", help=DATA_HELP)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output.")]
MaxSamples = Annotated[int | None, typer.Option("--max-samples", min=1, help="Use at most so many samples.")]
Threads = Annotated[
    int, typer.Option("--threads", min=0, max=1024, help="Threads of the runtime; 0: all cores, and 1 for timing.")
]
Provider = Annotated[str | None, typer.Option("--provider", help="Execution provider to validate on, e.g. cpu, openvino.")]
Metric = Annotated[str | None, typer.Option("--metric", metavar="MODULE:FUNCTION", help="metric(run, samples) -> float.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
ReportFile = Annotated[Path | None, typer.Option("--report", metavar="FILE.json", help="Write the report as JSON.")]
MaxDrop = Annotated[float | None, typer.Option("--max-drop", help="Exit 1 if the metric drops by more (points).")]
MinSpeedup = Annotated[float | None, typer.Option("--min-speedup", help="Exit 1 if float / quantized latency is less.")]
Recipe = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE.toml", help="Choices in a file; options win over it.")
]
Target = Annotated[str | None, typer.Option("--target", help="What to place for: see onnxq targets. [default: host]")]
Size = Annotated[
    str | None, typer.Option("--image-size", metavar="HxW", help="Images: resize to this. [default: the model's]")
]
Mean = Annotated[str | None, typer.Option("--image-mean", metavar="R,G,B", help="Images: subtracted, after the scale.")]
Std = Annotated[str | None, typer.Option("--image-std", metavar="R,G,B", help="Images: divided by, last.")]
Scale = Annotated[float, typer.Option("--image-scale", help="Images: pixels times this, first.", show_default="1/255")]
Layout = Annotated[str, typer.Option("--image-layout", help="Images: NCHW or NHWC.")]
Order = Annotated[str, typer.Option("--image-order", help="Images: RGB or BGR.")]
OnNonfinite = Annotated[
    str, typer.Option("--on-nonfinite", help="At NaN or infinity: error, skip the sample, or ignore those elements.")
]
Feedback = Annotated[
    list[str] | None,
    typer.Option("--feedback", metavar="OUTPUT=INPUT", help="A state: an output that the next sample takes in; repeatable."),
]
MemoryLimit = Annotated[
    str | None, typer.Option("--memory-limit", metavar="SIZE", help="Of activations kept at once, where they are, e.g. 2GB.")
]
CustomOps = Annotated[
    list[Path] | None,
    typer.Option("--custom-op-library", metavar="PATH", help="A library with ops of the model's own domains; repeatable."),
]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False) -> None:
    if version:
        typer.echo(f"onnxq {onnxq.__version__}")
        raise typer.Exit


@app.command(epilog="Example: onnxq quantize model.onnx -o model.int8.onnx --data calibration/ --eval test.npz")
def quantize(
    model: Annotated[Path, typer.Argument(help="The ONNX model: of floats, or quantized already.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the quantized model goes.")],
    data: Data = None,
    evaluation: Annotated[
        str | None, typer.Option("--eval", metavar="DATA", help="Samples to compare on. [default: the --data]")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", metavar="FILE.calib", help="Statistics from onnxq calibrate.")
    ] = None,
    target: Target = None,
    mode: Annotated[
        str | None,
        typer.Option("--mode", help="static, or dynamic: linear and LSTM layers, no data needed. [default: static]"),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective", help="latency: what is faster in float on this machine stays so; size, coverage: all in integers."
        ),
    ] = None,
    observer: Annotated[
        str | None,
        typer.Option("--observer", help="mse, kl, min-max, percentile{upper=99.9}, auto ... [default: mse]"),
    ] = None,
    weight_bits: Annotated[
        int | None, typer.Option("--weight-bits", min=2, max=16, help="Of weights; to 8 in integer kernels. [default: 8]")
    ] = None,
    activation_bits: Annotated[
        int | None,
        typer.Option("--activation-bits", min=2, max=16, help="But for 8, or 16 of qnn-htp, simulated. [default: 8]"),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="GLOB-OR-OPTYPE", help="Nodes to leave in float; repeatable."),
    ] = None,
    recipe: Recipe = None,
    ranges: Annotated[
        Path | None, typer.Option("--ranges", metavar="FILE.toml", help="Take these ranges, whatever was observed.")
    ] = None,
    save_ranges: Annotated[
        Path | None, typer.Option("--save-ranges", metavar="FILE.toml", help="Write the ranges chosen, to edit.")
    ] = None,
    report: ReportFile = None,
    metric: Metric = None,
    max_drop: MaxDrop = None,
    min_speedup: MinSpeedup = None,
    require_int8: Annotated[
        bool, typer.Option("--require-int8", help="Exit 1 if no layer is integer, as where float is faster here.")
    ] = False,
    max_samples: MaxSamples = None,
    threads: Threads = 0,
    provider: Provider = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the order in which runs are timed.")] = 0,
    no_validate: Annotated[bool, typer.Option("--no-validate", help="Do not compare with the float model.")] = False,
    force: Force = False,
    dump_dir: Annotated[Path | None, typer.Option("--dump-dir", help="Write text and ONNX after every pass here.")] = None,
    on_nonfinite: OnNonfinite = "error",
    memory_limit: MemoryLimit = None,
    feedback: Feedback = None,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="Of a quantized model: choose the ranges of activations anew.")
    ] = False,
    custom_op_library: CustomOps = None,
    image_size: Size = None,
    image_mean: Mean = None,
    image_std: Std = None,
    image_scale: Scale = 1 / 255,
    image_layout: Layout = "NCHW",
    image_order: Order = "RGB",
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Quantize a trained float32 model and compare the result with it."""
    if data is None and evaluation is None:
        of_data = {
            "max-samples": max_samples, "feedback": feedback, "image-size": image_size, "image-mean": image_mean,
            "image-std": image_std,
        }  # fmt: skip
        if given := [f"--{name}" for name, value in of_data.items() if value]:
            raise RecipeError(f"{' and '.join(given)} say how data is read, and there is none; give --data or --eval too")
    images = _images(image_size, image_mean, image_std, image_scale, image_layout, image_order)
    read = {"the --data": data, "the --eval data": evaluation, "the --calibration file": calibration, "the --recipe": recipe}
    written = {"the report": report, "the output": output, "the ranges saved": save_ranges}
    _check_overwrites(written, {"the input model": model, "the --ranges": ranges, **read, **_libraries(custom_op_library)})
    _check_report(report, force)
    _check_report(save_ranges, force)
    with _progress(quiet or json_) as progress:
        result = onnxq.quantize(
            model, data, output=output, eval=evaluation, calibration=calibration, target=target, mode=mode,
            objective=objective, observer=observer, weight_bits=weight_bits, activation_bits=activation_bits,
            exclude=exclude, recipe=recipe, ranges=ranges, metric=metric, max_drop=max_drop, min_speedup=min_speedup,
            require_int8=require_int8, max_samples=max_samples, images=images, threads=threads, provider=provider, seed=seed,
            validate=not no_validate, force=force, dump_dir=dump_dir,
            on_nonfinite=on_nonfinite, memory_limit=_bytes(memory_limit),  # type: ignore[arg-type]
            feedback=_states(feedback), recalibrate=recalibrate, custom_op_library=custom_op_library, progress=progress,
        )  # fmt: skip
    if report is not None:
        _write(report, result.to_json())
    if save_ranges is not None:
        _write(save_ranges, result.ranges_toml)
    if json_:
        typer.echo(result.to_json(), nl=False)
    elif not quiet:
        result.print(_console())
        _console().print(f"Written to {output}.", highlight=False)
    _exit_on(result.missed_gates)


@app.command(
    epilog="Examples: onnxq calibrate model.onnx --data calibration/ -o model.calib; "
    "onnxq calibrate --merge a.calib b.calib -o model.calib"
)
def calibrate(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="MODEL", help="The float32 ONNX model; with --merge, calibration files.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the statistics go.")],
    data: Data = None,
    merge: Annotated[bool, typer.Option("--merge", help="Join calibrations of different data on one model.")] = False,
    recipe: Recipe = None,
    target: Target = None,
    max_samples: MaxSamples = None,
    threads: Threads = 0,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", metavar="FOLDER", help="Keep progress here, and go on from it.")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Collect in so many processes.")] = None,
    dask: Annotated[
        str | None, typer.Option("--dask", metavar="ADDRESS", help="Collect on a Dask cluster, e.g. tcp://host:8786.")
    ] = None,
    on_nonfinite: OnNonfinite = "error",
    memory_limit: MemoryLimit = None,
    feedback: Feedback = None,
    custom_op_library: CustomOps = None,
    force: Force = False,
    image_size: Size = None,
    image_mean: Mean = None,
    image_std: Std = None,
    image_scale: Scale = 1 / 255,
    image_layout: Layout = "NCHW",
    image_order: Order = "RGB",
    quiet: Quiet = False,
) -> None:
    """Collect the statistics of a model's activations, for quantize --calibration."""
    if merge:
        idle = {
            "data": data, "workers": workers, "dask": dask, "checkpoint": checkpoint, "recipe": recipe, "target": target,
            "max-samples": max_samples, "threads": threads, "memory-limit": memory_limit, "feedback": feedback,
            "custom-op-library": custom_op_library, "on-nonfinite": on_nonfinite != "error", "image-size": image_size,
            "image-mean": image_mean, "image-std": image_std,
        }  # fmt: skip
        if given := [f"--{name}" for name, value in idle.items() if value]:
            raise RecipeError(f"--merge joins files and collects nothing; leave {', '.join(given)} out")
        _merge(inputs, output, force=force, quiet=quiet)
        return
    if len(inputs) != 1:
        raise RecipeError(f"{len(inputs)} files were given; calibrate takes one model, or calibration files with --merge")
    if data is None:
        raise RecipeError("there is no data to calibrate on; give --data FOLDER, or --merge to join calibration files")
    if workers is not None and dask is not None:
        raise RecipeError("--workers and --dask both say where to collect; give one of them")
    (model,) = inputs
    images = _images(image_size, image_mean, image_std, image_scale, image_layout, image_order)
    read = {"the input model": model, "the --data": data, "the --recipe": recipe, **_libraries(custom_op_library)}
    _check_overwrites({"the output": output}, read)
    with _interruptible(), _progress(quiet) as progress, _executor(workers, dask) as executor:
        found = onnxq.calibrate(
            model, data, output=output, recipe=recipe, target=target, max_samples=max_samples, images=images,
            threads=_shared(threads, workers, dask), force=force, on_nonfinite=on_nonfinite,  # type: ignore[arg-type]
            memory_limit=_bytes(memory_limit), checkpoint=checkpoint, executor=executor,
            feedback=_states(feedback), custom_op_library=custom_op_library, progress=progress,
        )  # fmt: skip
    if not quiet:
        for note in found.notes:
            _console().print(f"{note[0].upper()}{note[1:]}.", highlight=False)
        _console().print(f"{found.samples} samples, {len(found.sketches)} tensors; written to {output}.", highlight=False)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Say what an interrupt left: typer would swallow the message."""
    try:
        yield
    except KeyboardInterrupt as stop:
        _fail(str(stop) or "interrupted; nothing was written", INTERRUPTED)


def _merge(inputs: list[Path], output: Path, *, force: bool, quiet: bool) -> None:
    _check_overwrites({"the output": output}, {f"calibration {k + 1}": path for k, path in enumerate(inputs)})
    whole = onnxq.merge(inputs, output=output, force=force)
    if not quiet:
        _console().print(f"{whole.samples} samples of {len(inputs)} files; written to {output}.", highlight=False)


@contextmanager
def _executor(workers: int | None, dask: str | None) -> Iterator[Any]:
    """What to collect on; None for this process."""
    from onnxq import executors

    if dask is None:
        yield None if workers is None else executors.processes(workers)
        return
    with executors.dask(dask) as pool:
        yield pool


def _shared(threads: int, workers: int | None, dask: str | None) -> int:
    """Threads of each worker: the number given, or the cores divided among the processes, or one of a cluster's threads."""
    from onnxq import cores

    if threads or (workers is None and dask is None):
        return threads
    return 1 if workers is None else max(1, cores.usable() // workers)


def _states(pairs: list[str] | None) -> dict[str, str] | None:
    """Outputs and the inputs that take them in the next sample."""
    for pair in pairs or []:
        if not all(pair.partition("=")):
            raise RecipeError(f"--feedback is {pair}; it takes OUTPUT=INPUT, e.g. stateN=state")
    return {output: name for output, _, name in (pair.partition("=") for pair in pairs or [])} or None


def _bytes(text: str | None) -> int | None:
    """A size such as 512MB or 2GiB in bytes."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if found is None or len(text) > 24:
        raise RecipeError(f"--memory-limit is {text[:40]}; it takes a size, e.g. 512MB or 2GB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit or " "))


@app.command(epilog="Example: onnxq validate model.onnx model.int8.onnx --data test.npz --max-drop 1")
def validate(
    reference: Annotated[Path, typer.Argument(metavar="FLOAT", help="The float model.")],
    quantized: Annotated[Path, typer.Argument(metavar="QUANTIZED", help="Any quantized form of it.")],
    data: Annotated[str, typer.Option("--data", "--eval", metavar="DATA", help=DATA_HELP)],
    metric: Metric = None,
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", help="Exit 1 if the metric drops by more (points) on any provider.")
    ] = None,
    min_speedup: Annotated[
        float | None,
        typer.Option(
            "--min-speedup",
            help="Exit 1 if float / quantized latency is less on the first provider, threads and batch given.",
        ),
    ] = None,
    max_samples: MaxSamples = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            "--provider", metavar="NAMES", help="Execution providers, e.g. cpu,openvino; repeatable. Without it, cpu."
        ),
    ] = None,
    threads: Annotated[
        list[str] | None,
        typer.Option(
            "--threads",
            metavar="COUNTS",
            help="Of the runtime, e.g. 1,4,0; repeatable. 0: all cores; without it, these, and 1 for timing.",
        ),
    ] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(
            "--batch", metavar="SIZES", help="Batches to time, e.g. 1,8, along axis 0; repeatable. Without it, one sample."
        ),
    ] = None,
    warm_up: Annotated[int, typer.Option("--warm-up", min=0, help="Runs before those that are timed.")] = 2,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0, help="Of timing for each row; 10 to 1,000 rounds in any case.")
    ] = 3.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the order in which runs are timed.")] = 0,
    custom_op_library: CustomOps = None,
    report: ReportFile = None,
    image_size: Size = None,
    image_mean: Mean = None,
    image_std: Std = None,
    image_scale: Scale = 1 / 255,
    image_layout: Layout = "NCHW",
    image_order: Order = "RGB",
    force: Force = False,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Compare a quantized model with its float model: accuracy in three columns, latency, kernels, size."""
    from onnxq.report import comparison_lines, comparison_tables, to_plain_json

    images = _images(image_size, image_mean, image_std, image_scale, image_layout, image_order)
    read = {"a model to compare": reference, "a model": quantized, "the --data": data, **_libraries(custom_op_library)}
    _check_overwrites({"the report": report}, read)
    _check_report(report, force)
    with _progress(quiet or json_) as progress:
        found = onnxq.validate(
            reference, quantized, data, metric=metric, max_drop=max_drop, min_speedup=min_speedup,
            max_samples=max_samples, images=images, provider=_parts(provider) or "cpu",
            threads=_numbers("--threads", threads) or 0, batch=_numbers("--batch", batch) or None, warm_up=warm_up,
            seconds=seconds, seed=seed, custom_op_library=custom_op_library, progress=progress,
        )  # fmt: skip
    if report is not None:
        _write(report, to_plain_json(found))
    if json_:
        typer.echo(to_plain_json(found), nl=False)
    elif not quiet:
        for table in comparison_tables(found):
            _console().print(table)
        for line in comparison_lines(found):
            _console().print(line, highlight=False)
    _exit_on(found.missed_gates)


def _parts(given: list[str] | None) -> list[str]:
    """What an option that is repeatable, and takes commas too, was given."""
    return [part.strip() for text in given or [] for part in text.split(",")]


def _numbers(option: str, given: list[str] | None) -> list[int]:
    try:
        return [int(part) for part in _parts(given)]
    except ValueError as error:
        raise RecipeError(f"{option} is {','.join(given or [])[:80]}; it takes whole numbers, e.g. 1,8") from error


@app.command(epilog="Example: onnxq inspect model.int8.onnx")
def inspect(
    model: Annotated[Path, typer.Argument(help="Any ONNX model.")],
    custom_op_library: CustomOps = None,
    json_: Json = False,
) -> None:
    """What the runtime runs in integers and in float, by count and by work, and why it does not fuse each Q or DQ left."""
    from onnxq import runtime
    from onnxq.report import inspection_page

    runtime.register_custom_ops(custom_op_library)
    parts, plain = inspection_page(model)
    if json_:
        typer.echo(json.dumps(plain, indent=1))
        return
    for part in parts:
        _console().print(part, highlight=False, markup=False)  # names may look like markup


@app.command(epilog="Example: onnxq passes fuse-conv-batchnorm")
def passes(name: Annotated[str | None, typer.Argument(help="A pass, to read what it does.")] = None) -> None:
    """List the passes in running order, or print what one does."""
    import inspect as python

    from onnxq.errors import nearest
    from onnxq.passes import PASSES

    if name is None:
        for known, kind in PASSES.items():
            typer.echo(f"{known:24s} {(kind.__doc__ or '').splitlines()[0]}")
    elif name in PASSES:
        typer.echo(f"{name}\n\n{python.cleandoc(PASSES[name].__doc__ or '')}")
    else:
        raise RecipeError(f"unknown pass {name}; {nearest(name, PASSES)}")


@app.command(epilog="Example: onnxq check model.int8.onnx --target tensorrt")
def check(
    model: Annotated[Path, typer.Argument(help="Any quantized ONNX model.")],
    target: Annotated[str, typer.Option("--target", help="What it is to obey: see onnxq targets.")],
    json_: Json = False,
) -> None:
    """Say where a quantized model, whoever made it, does not obey a target. Exit code 1 if it does not."""
    from onnxq.report import check_parts, to_json

    found = onnxq.check(model, target)
    if json_:
        typer.echo(to_json({"model": str(model), "target": target, "violations": found}), nl=False)
    else:
        for part in check_parts(model.name, target, found):
            _console().print(part, highlight=False, markup=False)
    if found:
        raise typer.Exit(1)


@app.command(epilog="Example: onnxq targets tensorrt")
def targets(name: Annotated[str | None, typer.Argument(help="A target, to read all of it.")] = None) -> None:
    """List the targets that a model can be placed for and what each demands, or print one in full."""
    from onnxq.report import target_lines, targets_table

    if name is None:
        _console().print(targets_table())
    for line in target_lines(name) if name is not None else ():
        _console().print(line, highlight=False, markup=False)


def main() -> None:
    """The command: errors are one message and an exit code, never a traceback. To be told to end is as an interrupt."""
    with suppress(ValueError):  # in a thread
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # typer gives back what a command exits with, and does not raise it
        code = app(prog_name="onnxq", standalone_mode=False) or 0
        if code == INTERRUPTED:  # so do some versions with an interrupt
            raise KeyboardInterrupt
        sys.exit(code)
    except OnnxqError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", INTERRUPTED)
    except MemoryError:
        _fail("out of memory; use fewer --threads, or a machine with more", 2)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            _fail(_usage(error), 2)
        if isinstance(error, OSError):
            _fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part is not None), 2)
        if isinstance(error, typer.Abort):
            _fail("aborted; nothing was written", INTERRUPTED)
        _fail(f"an error of onnxq's own, please report it: {type(error).__name__}: {error}", 2)


def _fail(message: str, code: int) -> NoReturn:
    print(f"onnxq: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _usage(error: Any) -> str:
    """What the command line got wrong, and where to read what it takes."""
    context = getattr(error, "ctx", None)
    message = error.format_message().strip().rstrip(".") or "no command was given"
    return message if context is None else f"{message}; see {context.command_path} --help"


def _exit_on(missed: list[str]) -> None:
    for gate in missed:
        print(f"onnxq: {gate}", file=sys.stderr)
    if missed:
        raise typer.Exit(1)


def _console() -> Console:
    from rich.console import Console

    return Console(soft_wrap=True)


@contextmanager
def _progress(silent: bool) -> Iterator[Progress | None]:
    """A bar on standard error for each long piece of work; nothing when that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """How many are done in a second, of late."""

        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.1f}/s" if speed < 100 else f"{speed:.0f}/s")

    console = Console(stderr=True)
    if silent or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description:18s}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


def _images(size: str | None, mean: str | None, std: str | None, scale: float, layout: str, order: str) -> ImageOptions:
    from onnxq.images import ImageOptions

    def numbers(text: str | None, key: str) -> tuple[float, ...] | None:
        try:
            return None if text is None else tuple(float(part) for part in text.split(","))
        except ValueError as error:
            raise RecipeError(
                f"--{key} is {text}; it takes one number, or one for each channel, e.g. 0.5,0.5,0.5"
            ) from error

    shape = None
    if size is not None:
        parts = size.lower().split("x")
        if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise RecipeError(f"--image-size is {size}; it takes HEIGHTxWIDTH, e.g. 224x224")
        shape = (int(parts[0]), int(parts[1]))
    return ImageOptions(shape, numbers(mean, "image-mean"), numbers(std, "image-std"), scale, layout, order)


def _check_overwrites(written: dict[str, Path | None], read: dict[str, str | Path | None]) -> None:
    """Refuse, --force or not, to write over what is read, or over what else is written."""
    others = {what: Path(place) for what, place in {**read, **written}.items() if place}
    for what, path in written.items():
        for other, place in others.items():
            if path is not None and what != other and _same(path, place):
                raise OutputError(f"{what} {path} is {other}; give another name")


def _libraries(paths: list[Path] | None) -> dict[str, Path]:
    """The custom op libraries as `_check_overwrites` takes them."""
    return {f"the --custom-op-library {path}": path for path in paths or []}


def _same(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve() or (path.exists() and other.exists() and path.samefile(other))


def _check_report(path: Path | None, force: bool) -> None:
    from onnxq.files import check_writable

    if path is not None:
        check_writable(path, force)


def _write(path: Path, text: str) -> None:
    from onnxq.files import write_whole

    write_whole(path, text.encode())
