"""The one door to onnxruntime: sessions, and what the runtime makes of a graph."""

from __future__ import annotations

import ctypes
import math
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from onnxq import cores, providers
from onnxq.errors import ModelError, RecipeError, nearest
from onnxq.feeds import Value
from onnxq.proto import folder_of, tensor_type_of
from onnxq.store import WeightStore, stored

Feed = Mapping[str, Value]
CPU = providers.CPU
VERSION = ort.__version__
THREADS_OF = {"OpenVINOExecutionProvider": "num_of_threads"}  # providers with threads of their own, and the option for them
CONTRIB = "com.microsoft"  # the domain of onnxruntime's own ops beyond ONNX
LARGEST_IN_MEMORY = 1 << 24  # bytes of a model that is handed over as one message; protobuf refuses those of 2 GB
SOURCE_PLACE = re.compile(r"/\S+\.(?:cc|h):\d+ ")  # as in "/onnxruntime_src/onnxruntime/core/graph/graph.cc:1587 "
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
UNPACKED = {"session.disable_prepacking": "1"}  # no second copy of the weights, for a session that runs little
TAKING_TURNS = {"session.force_spinning_stop": "1"}  # for the threads of a session that waits not to slow down the others
UNKNOWN_OP = re.compile(r"Fatal error: (.+):(.+)\(-?\d+\) is not a registered function/op")
EMULATED = {"session.disable_quant_qdq": "1"}  # Q and DQ run as they are written, in float: 32-bit-accumulating hardware

custom_op_libraries: list[str] = []  # of this process: every session knows their ops
_registering = threading.Lock()  # a worker of a cluster has several threads, and no session takes a library twice


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a model: its name, numpy dtype (None: no array at all), and dimensions (None: any).

    Of a sequence they are those of its arrays. bfloat16, which numpy lacks, is given and taken as float32.
    """

    name: str
    dtype: np.dtype | None
    shape: tuple[int | None, ...] | None
    is_sequence: bool = False
    is_optional: bool = False


class Session:
    """A loaded model. `run` takes and gives arrays by name."""

    def __init__(
        self,
        model: onnx.ModelProto | str | Path,
        *,
        threads: int = 0,
        provider: str = CPU,
        config: Mapping[str, str] | None = None,
        optimize: bool = True,
        fold: bool = True,
        profile: Path | None = None,
    ) -> None:
        """Without `fold`, constants are computed at each run: weights behind a DequantizeLinear stay integers in memory.

        Where a `profile` is given, a path that its file's begins with, each call of a kernel is noted; see `end_profile`.
        Raises ModelError where the model does not load, and RecipeError where the provider cannot be used on this machine.
        """
        options = _options(threads, config or {})
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        own = {THREADS_OF[provider]: str(threads)} if threads and provider in THREADS_OF else {}
        try:
            with _loadable(model, options) as source:
                named = providers.add(options, provider, own)
                self._session = ort.InferenceSession(
                    source,
                    options,
                    providers=named,
                    disabled_optimizers=[] if fold else ["ConstantFolding"],
                    enable_fallback=0,
                )
        except RecipeError:
            raise
        except Exception as error:  # onnxruntime raises a class of its own for each status code
            name = f"{model}" if isinstance(model, (str, Path)) else "the model"
            raise ModelError(f"onnxruntime cannot load {name}: {first_line(error)}") from error
        if named and provider not in self._session.get_providers():  # the CPU instead, which onnxruntime only logs
            raise providers.unusable(provider)
        self._session.disable_fallback()  # a provider that fails in a run is an error too
        self.inputs = [_info(i) for i in self._session.get_inputs()]
        self.outputs = [_info(o) for o in self._session.get_outputs()]
        self._outputs = _Outputs(self._session)

    def run(self, feed: Feed, where: str = "a sample") -> dict[str, Any]:
        """Every output by its name. Entries of the feed that are no inputs are left out; `where` is for messages."""
        wanted = {i.name: feed[i.name] for i in self.inputs if i.name in feed}
        try:
            return self._outputs(wanted)
        except Exception as error:
            raise run_error(error, where) from error

    def end_profile(self) -> Path:
        """The file of the profile, which is whole now: a list of events as JSON."""
        return Path(self._session.end_profiling())


def run_error(error: BaseException, where: str) -> ModelError:
    """What to tell of a run that failed."""
    return ModelError(
        f"onnxruntime cannot run the model on {where}: {first_line(error)}; check this sample against the model's inputs"
    )


class _Outputs:
    """Runs a session: feed -> every output by its name.

    onnxruntime takes and gives no arrays of bfloat16, so these go by their bits.
    """

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._names = [o.name for o in session.get_outputs()]
        ends = [*session.get_inputs(), *session.get_outputs()]
        self._bfloat16 = {end.name for end in ends if end.type == "tensor(bfloat16)"}

    def __call__(self, feed: Feed) -> dict[str, Any]:
        if not self._bfloat16:
            return dict(zip(self._names, self._session.run(None, feed), strict=True))
        given = {
            name: _from_float32(v) if name in self._bfloat16 else ort.OrtValue.ortvalue_from_numpy(np.asarray(v, order="C"))
            for name, v in feed.items()
        }
        results = dict(zip(self._names, self._session.run_with_ort_values(None, given), strict=True))
        return {name: _to_float32(r) if name in self._bfloat16 else r.numpy() for name, r in results.items()}


def _from_float32(array: np.ndarray) -> ort.OrtValue:
    halves = array.astype(onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16), order="C")
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(halves.view(np.uint16), onnx.TensorProto.BFLOAT16)


def _to_float32(value: ort.OrtValue) -> np.ndarray:
    content = ctypes.string_at(value.data_ptr(), 2 * math.prod(value.shape()))
    return (np.frombuffer(content, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(value.shape())


def register_custom_ops(paths: str | Path | Iterable[str | Path] | None) -> None:
    """Let every session that this process makes from now on know the ops of these shared libraries; None adds none.

    Raises RecipeError where there is no such file, where it cannot be loaded, and where it registers no ops.
    """
    for path in (paths,) if isinstance(paths, (str, Path)) else paths or ():
        library = str(Path(path).resolve())  # workers may run in another folder
        with _registering:
            if library not in custom_op_libraries:
                _check_library(library, path)
                custom_op_libraries.append(library)


def _check_library(library: str, given: str | Path) -> None:
    if not Path(library).is_file():
        raise RecipeError(f"there is no library of custom ops at {given}; give the path of a shared library, a file")
    try:
        ort.SessionOptions().register_custom_ops_library(library)
    except Exception as error:
        if "symbol RegisterCustomOps" in str(error):
            raise RecipeError(
                f"{given} is a library without custom ops: it has no function RegisterCustomOps; give one that is built as "
                "onnxruntime's documentation on custom operators says"
            ) from error
        why = first_line(error).rpartition(" with error: ")[2]
        raise RecipeError(
            f"{given} cannot be loaded as a library of custom ops: {why}; give a shared library that is built for this "
            "system, and see that the libraries that it needs are here"
        ) from error


def _options(threads: int, config: Mapping[str, str]) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what matters is raised; the log only repeats it
    for library in custom_op_libraries:
        options.register_custom_ops_library(library)
    options.intra_op_num_threads = cores.threads_for(threads)
    for key, text in config.items():
        options.add_session_config_entry(key, text)
    return options


class _loadable:
    """What InferenceSession accepts: bytes of a model, or the path of a file.

    The options are told where the weights are that are not in the model; large ones are put on disk first.
    """

    def __init__(self, model: onnx.ModelProto | str | Path, options: ort.SessionOptions) -> None:
        self._model = model
        if isinstance(model, onnx.ModelProto):
            if model.ByteSize() > LARGEST_IN_MEMORY:
                self._store = WeightStore()  # until the model is loaded
                self._model = model = stored(model, None, self._store)
            folder = folder_of(model)
            if folder is not None:
                options.add_session_config_entry(WEIGHTS_FOLDER, str(folder))

    def __enter__(self) -> bytes | str:
        return self._model.SerializeToString() if isinstance(self._model, onnx.ModelProto) else str(self._model)

    def __exit__(self, *_: object) -> None:
        self._store = None


def _info(argument: Any) -> TensorInfo:
    kinds = {"bfloat16": "float32", "float": "float32", "double": "float64", "string": "object"}
    kind, is_optional = _inside(argument.type, "optional")
    kind, is_sequence = _inside(kind, "seq")
    kind, is_array = _inside(kind, "tensor")
    try:
        dtype = np.dtype(kinds.get(kind, kind)) if is_array else None
    except TypeError:
        dtype = None
    shape = tuple(d if isinstance(d, int) and d > 0 else None for d in argument.shape or ())
    is_known = argument.shape is not None and not is_optional and not is_sequence  # of these it tells no shape
    return TensorInfo(argument.name, dtype, shape if is_known else None, is_sequence, is_optional)


def _inside(kind: str, wrapper: str) -> tuple[str, bool]:
    """What a type is of, as in seq(tensor(float)), and whether it is of that kind at all."""
    is_of = kind.startswith(f"{wrapper}(")
    return (kind[len(wrapper) + 1 : -1] if is_of else kind), is_of


def as_declared(inputs: Sequence[TensorInfo], proto: onnx.ModelProto) -> list[TensorInfo]:
    """The inputs with the shapes that the model gives, where onnxruntime calls one of unknown rank a scalar.

    Of sequences and Optionals it tells none.
    """
    shapes = {}
    for info in proto.graph.input:
        kind = tensor_type_of(info.type)
        known = tuple(d.dim_value if d.dim_value > 0 else None for d in kind.shape.dim)
        shapes[info.name] = known if kind.HasField("shape") else None
    return [replace(i, shape=shapes.get(i.name, i.shape)) for i in inputs]


def first_line(error: BaseException) -> str:
    """What onnxruntime says, without the place in its sources and the signature of the function that said it.

    Of an op that it does not know, what would make it known.
    """
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    place = SOURCE_PLACE.search(text)
    if place is not None:
        start = max(text.find("(", place.end()), 0)
        depth, end = 0, start
        for end in range(start, len(text)):
            depth += (text[end] == "(") - (text[end] == ")")
            if depth == 0:
                break
        message = text[end + 1 :].removeprefix(" const").strip()
        text = text[: place.start()] + message if message else text
    unknown = UNKNOWN_OP.search(text)
    if unknown is not None and unknown[1] != CONTRIB:
        return f"it knows no op {unknown[2]} of domain {unknown[1]}; give --custom-op-library the library that has it"
    return text[:300]


def evaluate(proto: onnx.ModelProto, feed: Feed | None = None) -> dict[str, Any]:
    """The outputs of a model that is run once, on one thread, without graph optimizations."""
    options = _options(1, {})
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        with _loadable(proto, options) as source:
            session = ort.InferenceSession(source, options, providers=[CPU])
        names = [o.name for o in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(feed or {})), strict=True))
    except Exception as error:
        raise ModelError(f"onnxruntime cannot evaluate a part of the model: {first_line(error)}") from error


def exposed(proto: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """A copy of the model with these tensors as further outputs."""
    twin = onnx.ModelProto()
    twin.CopyFrom(proto)
    present = {o.name for o in twin.graph.output}
    for name in names:
        if name not in present:
            twin.graph.output.append(onnx.ValueInfoProto(name=name))
            present.add(name)
    return twin


def optimized(model: onnx.ModelProto | str | Path, provider: str = CPU) -> onnx.ModelProto:
    """The graph that onnxruntime runs, at the EXTENDED level: integer nodes keep the name of their float node."""
    with optimized_in_folder(model, provider) as (proto, _):
        return proto


@contextmanager
def optimized_in_folder(
    model: onnx.ModelProto | str | Path, provider: str = CPU, *, fused: bool = True
) -> Iterator[tuple[onnx.ModelProto, Path]]:
    """The same, and the folder that holds its larger weights meanwhile; or what it is before Q and DQ are fused."""
    level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED if fused else ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        save_optimized(model, path, provider, level)
        yield onnx.load(path, load_external_data=False), Path(folder)


def save_optimized(
    model: onnx.ModelProto | str | Path,
    path: Path,
    provider: str = CPU,
    level: ort.GraphOptimizationLevel = ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
) -> None:
    """Write the graph that onnxruntime runs here, its larger weights in a file beside it."""
    options = _options(1, UNPACKED)
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "4096")
    try:
        with _loadable(model, options) as source:
            ort.InferenceSession(source, options, providers=[provider])
    except Exception as error:
        raise ModelError(f"onnxruntime cannot load the model: {first_line(error)}") from error


def check_provider(name: str) -> str:
    """The provider's full name; `cpu`, `openvino` and the like are understood. Raises RecipeError when it cannot be used."""
    here = {short_name(p): p for p in providers.available()}
    wanted = short_name(name.strip())
    if wanted not in here:
        known = next((p for p in providers.PLUGINS.values() if p.extra == wanted), None)
        hint = f"install onnxq[{known.extra}]" if known is not None else nearest(wanted, here)
        every = "" if hint.startswith("valid") else f" The providers here: {', '.join(sorted(here))}"
        raise RecipeError(f"onnxruntime {ort.__version__} here has no provider {name}; {hint}{every}")
    providers.add(ort.SessionOptions(), here[wanted], {})  # raises before any work is done
    return here[wanted]


def short_name(provider: str) -> str:
    """The name of an execution provider as it is given: cpu, openvino, cuda."""
    return provider.lower().removesuffix("executionprovider")


def has_provider(name: str) -> bool:
    """Whether onnxruntime has a provider here, by its full name, and a device for it."""
    return name in providers.available() and providers.has_device(name)


def on_provider(model: onnx.ModelProto | str | Path, provider: str) -> tuple[int, dict[str, int]] | None:
    """(nodes that a provider takes, the ops that are left to others and how many); None where this version does not tell."""
    if not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
        return None
    options = _options(1, {"session.record_ep_graph_assignment_info": "1"})
    try:
        with _loadable(model, options) as source:
            named = providers.add(options, provider, {})
            session = ort.InferenceSession(source, options, providers=named, enable_fallback=0)
    except Exception as error:
        raise ModelError(f"onnxruntime cannot load the model on {provider}: {first_line(error)}") from error
    taken, left = 0, dict[str, int]()
    for part in session.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            if part.ep_name == provider:
                taken += 1
            else:
                left[node.op_type] = left.get(node.op_type, 0) + 1
    return taken, left
