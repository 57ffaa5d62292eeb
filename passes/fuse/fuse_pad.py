"""fuse-pad"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.graph import Graph, Node, input_at, value
from onnxq.model import Model
from onnxq.passmanager import Pass

READERS = ("Conv", "MaxPool", "AveragePool")


@dataclass(frozen=True)
class FusePad(Pass):
    """Fold a spatial Pad into the Conv or pool after it.

    Given:   %1 = Pad(%0, [0, 0, 1, 1, 0, 0, 1, 1]);  %2 = Conv(%1, W) {pads=[0, 0, 0, 0]}
    Result:  %2 = Conv(%0, W) {pads=[1, 1, 1, 1]}
    Given:   %1 = Pad(%0, ...);  %2 = AveragePool(%1) {no pads}
    Result:  %2 = AveragePool(%0) {pads, count_include_pad=1}
    Given:   %1 = Pad(%0, ..., -inf, or 0 after a Relu);  %2 = MaxPool(%1)
    Result:  %2 = MaxPool(%0) {pads}
    Refused: the Pad reflects or repeats, crops, pads batch or channels, or pads with another value; its result is used
             elsewhere or is a graph output; the pool already pads, rounds up, or gives indices; a window would lie wholly in
             the padding, as that of a dilated pool may.
    """

    name: ClassVar[str] = "fuse-pad"

    def apply(self, model: Model) -> int:
        graph, fused = model.graph, 0
        for pad in reversed(graph.find("Pad")):  # of two in a row, the second first
            reader = graph.sole_consumer(pad.outputs[0])
            if reader is None or reader.op not in READERS or reader.domain or reader.inputs[0] is not pad.outputs[0]:
                continue
            pads = _pads(pad)
            if pads is None:
                model.refuse(pad, "it does not pad by known, non-negative amounts with a constant")
                continue
            why = _refusal(graph, pad, reader, pads)
            if why:
                model.refuse(pad, why)
                continue
            rank = len(pads) // 2
            spatial = rank - 2
            old = reader.attrs.get("pads", [0] * (2 * spatial))
            begins, ends = pads[2:rank], pads[rank + 2 :]
            reader.attrs["pads"] = [int(a + b) for a, b in zip(old, [*begins, *ends], strict=True)]
            reader.attrs.pop("auto_pad", None)
            if reader.op == "AveragePool":
                reader.attrs["count_include_pad"] = 1
            graph.set_input(reader, 0, pad.inputs[0])
            graph.remove(pad)
            fused += 1
        return fused


def _pads(pad: Node) -> list[int] | None:
    """The begins of all axes, then the ends; None unless they are constant and none is negative."""
    if pad.attrs.get("mode", "constant") != "constant":
        return None
    if "pads" in pad.attrs:
        pads = [int(p) for p in pad.attrs["pads"]]
    else:
        amounts, axes = value(input_at(pad, 1)), input_at(pad, 3)
        if amounts is None or (axes is not None and value(axes) is None):
            return None
        pads = [int(p) for p in amounts]
        if axes is not None:
            shape = pad.inputs[0].shape
            if shape is None:
                return None
            full, chosen = [0] * (2 * len(shape)), [int(a) % len(shape) for a in np.asarray(value(axes))]
            for k, axis in enumerate(chosen):
                full[axis], full[axis + len(shape)] = pads[k], pads[k + len(chosen)]
            pads = full
    return pads if min(pads) >= 0 else None


def _refusal(graph: Graph, pad: Node, reader: Node, pads: list[int]) -> str:
    rank = len(pads) // 2
    filler = pad.attrs.get("value", 0.0)
    if (given := input_at(pad, 2)) is not None:
        values = value(given)
        if values is None:
            return "its padding value is computed"
        filler = float(values.reshape(-1)[0])
    if rank < 3 or any(pads[:2]) or any(pads[rank : rank + 2]):
        return "it pads batch or channels"
    if reader.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return f"{reader.name} pads by auto_pad"
    if reader.op == "Conv":
        return "" if filler == 0 else f"it pads with {filler}, a Conv with 0"
    kernel = [int(k) for k in reader.attrs["kernel_shape"]]
    if any(reader.attrs.get("pads", [])) or reader.attrs.get("ceil_mode", 0):
        return f"{reader.name} pads already, or rounds up"
    if len(reader.outputs) > 1 and (graph.readers(reader.outputs[1]) or graph.is_captured(reader.outputs[1])):
        return f"the indices that {reader.name} gives are used"
    if any(d != 1 for d in reader.attrs.get("dilations", [])) or any(
        p >= k for p, k in zip(pads[2:rank] + pads[rank + 2 :], kernel * 2, strict=True)
    ):
        return "a window would lie wholly in the padding"
    if reader.op == "AveragePool":
        return "" if filler == 0 else f"it pads with {filler}, an AveragePool with 0"
    maker = graph.producer(pad.inputs[0])
    if filler == -np.inf or (filler == 0 and maker is not None and maker.op == "Relu" and not maker.domain):
        return ""
    return f"it pads with {filler}, which a MaxPool would not ignore"
