"""Execution providers: those built into onnxruntime, and those that come as packages of their own, loaded at run time.

A package says where its library is; the library is registered once in a process, and sessions are then made for the
provider's devices. A built-in one may lack its device or the libraries that it needs; whether it does, a session tells.
"""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import onnxruntime as ort
from onnx import TensorProto, helper

from onnxq.errors import RecipeError

CPU = "CPUExecutionProvider"
ON_CUDA = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
LOG_WARNINGS, LOG_FATAL = 2, 4  # severities of onnxruntime's log; the first is its default

_registering = threading.Lock()
_registered: set[str] = set()
_given: set[str] = set()  # built-in providers that a session has run on


@dataclass(frozen=True)
class Plugin:
    """A package that holds a provider: its module, the extra of ours that installs it, and functions that give options."""

    provider: str
    module: str
    extra: str
    paths: Mapping[str, str] = field(default_factory=dict)  # option of the provider: function of the module that gives it


PLUGINS = {
    p.provider: p
    for p in (
        Plugin("OpenVINOExecutionProvider", "onnxruntime_ep_openvino", "openvino"),
        Plugin("QNNExecutionProvider", "onnxruntime_qnn", "qnn", {"backend_path": "get_qnn_htp_path"}),
    )
}


def available() -> list[str]:
    """The providers that sessions can be made for here: those built into onnxruntime, and those of packages."""
    built_in = [p for p in ort.get_available_providers() if "." not in p]  # a plugin adds NAME.DEVICE once it is registered
    return [*built_in, *(name for name, p in PLUGINS.items() if name not in built_in and find_spec(p.module))]


def has_device(provider: str) -> bool:
    """Whether a provider that is available works on this machine. A package that fails is left to `add` to tell."""
    plugin = PLUGINS.get(provider)
    if plugin is None or not find_spec(plugin.module):
        return provider == CPU or _is_given(provider)
    try:
        return bool(_devices(provider, import_module(plugin.module)))
    except Exception:
        return True


def _is_given(provider: str) -> bool:
    """Whether a session gets a built-in provider; where a library or the device is missing, onnxruntime takes the CPU.

    What is missing it would log, which is no error here: its default log is silent meanwhile, and at its default severity
    after. What works once is taken to work.
    """
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "one_node", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8).SerializeToString()
    with _registering:
        if provider not in _given:
            ort.set_default_logger_severity(LOG_FATAL)
            try:
                with warnings.catch_warnings(action="ignore"):
                    _load_libraries(provider)
                    session = ort.InferenceSession(model, providers=[provider], enable_fallback=0)
                if provider in session.get_providers():
                    _given.add(provider)
            except Exception:  # onnxruntime raises a class of its own for each status code
                return False
            finally:
                ort.set_default_logger_severity(LOG_WARNINGS)
        return provider in _given


def _load_libraries(provider: str) -> None:
    """Load CUDA's and cuDNN's libraries out of the packages that pip installs, where the system's loader does not look."""
    if provider in ON_CUDA and hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints which it does not find
            ort.preload_dlls()


def _devices(provider: str, module: ModuleType) -> list[ort.OrtEpDevice]:
    """The devices of a package's provider, those on the CPU first: they are everywhere, and what figures are compared on."""
    with _registering:
        if provider not in _registered and provider not in ort.get_available_providers():
            ort.register_execution_provider_library(provider, module.get_library_path())
        _registered.add(provider)
    devices = [d for d in ort.get_ep_devices() if d.ep_name == provider]
    return sorted(devices, key=lambda d: d.device.type != ort.OrtHardwareDeviceType.CPU)


def add(options: ort.SessionOptions, provider: str, own: Mapping[str, str]) -> list[tuple[str, dict[str, str]]]:
    """Let a session with these options run on a provider, with `own` options; gives what is to be named when it is made.

    Raises RecipeError where the provider cannot be used on this machine.
    """
    plugin = PLUGINS.get(provider)
    if plugin is None or not find_spec(plugin.module):
        if not has_device(provider):
            raise unusable(provider)
        return [(provider, dict(own))]
    try:
        module = import_module(plugin.module)
        devices = _devices(provider, module)
        given = {key: str(getattr(module, function)()) for key, function in plugin.paths.items()}
        if devices:
            options.add_provider_for_devices(devices[:1], {**given, **own})
    except Exception as error:  # what a package does when it is imported, and onnxruntime's own classes
        raise RecipeError(
            f"provider {provider} of package {plugin.module} cannot be used: {error}; install onnxq[{plugin.extra}], "
            f"with an onnxruntime that it is built for (here: {ort.__version__})"
        ) from error
    if not devices:
        raise RecipeError(
            f"provider {provider} of package {plugin.module} knows no device of this machine: its vendor supports others; "
            "run it on one of those, or give --provider cpu"
        )
    return []


def unusable(provider: str) -> RecipeError:
    return RecipeError(
        f"onnxruntime {ort.__version__} has provider {provider} but cannot use it on this machine; see that the device, its "
        "driver and the libraries that the provider needs are here, or give --provider cpu"
    )
