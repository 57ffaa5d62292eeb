"""Execution providers that come as packages of their own, which onnxruntime loads at run time.

A package says where its library is; the library is registered once in a process, and sessions are then made for the
provider's devices.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import onnxruntime as ort

from onnxq.errors import RecipeError

_registering = threading.Lock()
_registered: set[str] = set()


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
    """Whether a provider that is available knows a device of this machine. A package that fails is left to `add` to tell."""
    plugin = PLUGINS.get(provider)
    if plugin is None or not find_spec(plugin.module):
        return True
    try:
        return bool(_devices(provider, import_module(plugin.module)))
    except Exception:
        return True


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

    Raises RecipeError where the provider's package is here and cannot be used.
    """
    plugin = PLUGINS.get(provider)
    if plugin is None or not find_spec(plugin.module):
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
