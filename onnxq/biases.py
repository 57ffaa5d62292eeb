"""Biases: what a layer gives on average, and adding to the bias that makes up for it."""

from __future__ import annotations

import numpy as np

from onnxq.graph import Node, input_at, value
from onnxq.model import Derived, Model
from onnxq.numerics import Array
from onnxq.rows import rows_of_weight


def means_of_input(model: Model, node: Node) -> Array | None:
    """The mean of each channel that a layer reads, where its bias can make up for what errors of the weight make of it."""
    if node.op == "MatMul" and model.bias_of(node) is None:
        return None
    sketch = model.calibration.sketches.get(node.inputs[0].name) if model.calibration else None
    found = None if sketch is None else sketch.along(1 if node.op == "Conv" else -1, len(node.inputs[0].shape or ()))
    return None if found is None else found.mean


def mean_output(node: Node, weight: Array, mean: Array) -> Array:
    """What the layer gives, by output channel, for an input that is everywhere its channels' mean."""
    rows = rows_of_weight(node, weight)  # (groups, M / group, kernel positions x C / group)
    groups = len(rows)
    by_group = mean.reshape(groups, -1)
    positions = rows.shape[2] // by_group.shape[1]
    shift = np.einsum("gmk,gk->gm", rows, np.tile(by_group, (1, positions)))
    return shift.reshape(-1)


def add_to_bias(model: Model, node: Node, shift: Array) -> None:
    graph = model.graph
    reader, index = model.bias_of(node) or (node, 2)
    old = input_at(reader, index)
    before = np.zeros_like(shift) if old is None else np.asarray(value(old), np.float64)
    bias = graph.constant(f"{node.name}_bias", (before + shift).astype(np.float32))
    spec = Derived(node.inputs[0].name, node.inputs[1].name) if old is None else model.specs.get(old.name)
    if old is None and "beta" in node.attrs:
        node.attrs["beta"] = 1.0  # of no effect without a bias until now
    graph.set_input(reader, index, bias)
    if old is not None and not old.outputs:
        model.specs.pop(old.name, None)
    if spec is None or model.target.float_bias:
        return
    model.specs[bias.name] = spec
    model.quantized_inputs.add((reader.name, index))
