"""Grouping: which tensors are held at once, under a limit of memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx

from onnxq.collector import Axes, computed
from onnxq.data import Sample
from onnxq.equalization import Scaled
from onnxq.feeds import Feed


def grouped(proto: onnx.ModelProto, axes: Axes, scaled: Mapping[str, Scaled], sample: Sample, limit: int) -> list[Axes]:
    """The tensors in groups of at most `limit` bytes for this sample, in their order; at least one tensor in each."""
    known = _sizes_of(proto, computed(axes, scaled), sample.feed)
    sizes = {name: known[scaled[name].of if name in scaled else name] for name in axes}
    groups: list[dict[str, int | None]] = [{}]
    filled = 0
    for name, axis in axes.items():
        if groups[-1] and filled + sizes[name] > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = axis
        filled += sizes[name]
    return list(groups)


def _sizes_of(proto: onnx.ModelProto, names: Iterable[str], feed: Feed) -> dict[str, float]:
    """Bytes of each of these tensors when the model runs on this feed; inf where shape inference does not tell."""
    twin = onnx.ModelProto()
    twin.CopyFrom(proto)
    for info in twin.graph.input:
        given = feed.get(info.name)
        if isinstance(given, np.ndarray):
            kind = onnx.helper.np_dtype_to_tensor_dtype(given.dtype)
            info.CopyFrom(onnx.helper.make_tensor_value_info(info.name, kind, given.shape))
    inferred = onnx.shape_inference.infer_shapes(twin, data_prop=True).graph
    found = dict.fromkeys(names, float("inf"))
    for info in [*inferred.value_info, *inferred.output, *inferred.input]:
        dims = info.type.tensor_type.shape.dim
        if info.name in found and info.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            width = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type).itemsize
            found[info.name] = float(width * np.prod([d.dim_value for d in dims], dtype=np.int64))
    return found
