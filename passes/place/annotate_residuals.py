"""annotate-residuals"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.graph import Node, Tensor, Variable, is_float32
from onnxq.model import Model, Observed
from onnxq.numerics import PerTensor
from onnxq.passmanager import Pass


@dataclass(frozen=True)
class AnnotateResiduals(Pass):
    """Where a layer's kernel adds another tensor to its sum, let the Add after it read that tensor in integers.

    Given:   %1 = Conv(%0, W);  %2 = Add(%1, %3)                                   Conv annotated; only the Add reads %1
    Result:  specs: %3 observed; the Add reads it quantized, and %1 in float
    Refused: the target's kernels add nothing; no input of the Add is a layer's that nothing else reads; the other input is a
             constant or not known to be float32; the Add is excluded by the user.

    Where both inputs are layers' the first is taken into a kernel, the second is read in integers.
    """

    name: ClassVar[str] = "annotate-residuals"

    def apply(self, model: Model) -> int:
        if not model.target.adds:
            return 0
        annotated = 0
        for add in model.graph.find("Add"):
            index = _other(model, add)
            if index is None:
                model.refuse(add, "no input is a layer's alone, or the other is no float32 activation")
                continue
            if (add.name, index) in model.quantized_inputs or add.name in model.excluded | model.slower | model.unplaced:
                continue
            spec = Observed(model.target.activation_type, PerTensor(), model.target.activation_symmetric)
            model.specs.setdefault(add.inputs[index].name, spec)
            model.quantized_inputs.add((add.name, index))
            model.planned.add(add.name)
            annotated += 1
        return annotated


def _other(model: Model, add: Node) -> int | None:
    """Which input of an Add is not the one that goes into a layer's kernel; None where none goes."""
    for index in (0, 1):
        other = add.inputs[1 - index]
        if _is_layers_alone(model, add.inputs[index], add) and isinstance(other, Variable) and is_float32(other):
            return 1 - index
    return None


def _is_layers_alone(model: Model, tensor: Tensor, add: Node) -> bool:
    maker = model.graph.producer(tensor)
    return maker is not None and maker.name in model.planned and model.graph.sole_consumer(tensor) is add
