"""PassManager on a subject that is no ONNX graph: a list of numbers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from onnxq.errors import PassError, RecipeError
from onnxq.passmanager import UNPROVABLE, Pass, PassManager


@dataclass
class Numbers:
    values: list[int]
    refusals: list[tuple[str, str]] = field(default_factory=list)

    def fork(self) -> Numbers:
        return Numbers(list(self.values), list(self.refusals))


@dataclass(frozen=True)
class DropZeros(Pass):
    """Given: zeros. Result: none."""

    name: ClassVar[str] = "drop-zeros"

    def apply(self, model: Numbers) -> int:
        before = len(model.values)
        model.values = [v for v in model.values if v]
        return before - len(model.values)


@dataclass(frozen=True)
class SplitEven(Pass):
    """Given: 2n. Result: n, n."""

    name: ClassVar[str] = "split-even"
    smallest: int = 2

    def apply(self, model: Numbers) -> int:
        for k, v in enumerate(model.values):
            if v % 2 == 0 and v >= self.smallest:
                model.values[k : k + 1] = [v // 2, v // 2]
                return 1
            if v % 2:
                model.refusals.append((str(v), "odd"))
        return 0


@dataclass(frozen=True)
class LoseTheLast(Pass):
    """Wrong: drops a number, once."""

    name: ClassVar[str] = "lose-the-last"

    def apply(self, model: Numbers) -> int:
        if len(model.values) > 3:
            model.values.pop()
            return 1
        return 0


@dataclass(frozen=True)
class Restless(Pass):
    """Always claims to have worked."""

    name: ClassVar[str] = "restless"

    def apply(self, model: Numbers) -> int:
        return 1


def same_sum(before: Numbers, after: Numbers) -> str | None:
    return None if sum(before.values) == sum(after.values) else f"the sum was {sum(before.values)}, is {sum(after.values)}"


def no_negatives(subject: Numbers) -> None:
    if any(v < 0 for v in subject.values):
        raise PassError("a number is negative")


MANAGER = PassManager(no_negatives, same_sum)


def test_once_runs_every_pass_one_time_and_proves_and_rolls_back_all_the_same() -> None:
    found, records = MANAGER.run_exact(Numbers([8, 1]), [SplitEven()], once=True)
    assert found.values == [4, 4, 1]
    assert [(r.name, r.rewrites) for r in records] == [("split-even", 1)]
    found, records = MANAGER.run_exact(Numbers([8, 1, 1]), [SplitEven(), LoseTheLast()], once=True)
    assert found.values == [4, 4, 1, 1]
    assert [r.name for r in records if r.rolled_back] == ["lose-the-last"]


def test_exact_passes_run_until_none_finds_work() -> None:
    result, records = MANAGER.run_exact(Numbers([0, 8, 3]), [SplitEven(), DropZeros()])
    assert sorted(result.values) == [1] * 8 + [3]
    counts = {r.name: r.rewrites for r in records}
    assert counts == {"split-even": 7, "drop-zeros": 1}


def test_the_refusals_of_the_last_round_are_recorded() -> None:
    _, records = MANAGER.run_exact(Numbers([3]), [SplitEven()])
    assert records[0].refusals == (("3", "odd"),)


def test_a_wrong_pass_is_found_rolled_back_and_the_others_kept() -> None:
    result, records = MANAGER.run_exact(Numbers([0, 0, 4, 1, 6]), [DropZeros(), LoseTheLast(), SplitEven()])
    assert sum(result.values) == 11
    assert 0 not in result.values
    (undone,) = [r for r in records if r.rolled_back]
    assert undone.name == "lose-the-last"
    assert undone.rolled_back == "the sum was 11, is 5"


def test_a_subject_that_differs_from_itself_keeps_its_passes_and_is_recorded() -> None:
    manager = PassManager(no_negatives, lambda before, after: "differs")
    result, records = manager.run_exact(Numbers([1, 0]), [DropZeros()])
    assert result.values == [1]
    assert records[-1].name == UNPROVABLE
    assert records[-1].refusals == (("model", "differs"),)


def test_passes_that_never_rest_are_an_error_that_names_them() -> None:
    with pytest.raises(PassError, match="restless last"):
        MANAGER.run_exact(Numbers([1]), [Restless()])


def test_verify_runs_after_every_pass_that_changed_something() -> None:
    seen: list[str] = []
    manager = PassManager(no_negatives, same_sum, lambda name, subject: seen.append(name))
    manager.run(Numbers([0, 2]), [DropZeros(), DropZeros(), SplitEven()])
    assert seen == ["drop-zeros", "split-even"]

    def never(subject: Numbers) -> None:
        raise PassError("malformed")

    with pytest.raises(PassError, match="after pass drop-zeros: malformed"):
        PassManager(never, same_sum).run(Numbers([0]), [DropZeros()])


def test_options_are_checked_by_their_annotations() -> None:
    assert SplitEven.with_options({"smallest": 4}) == SplitEven(smallest=4)
    with pytest.raises(RecipeError, match="no option small; did you mean smallest"):
        SplitEven.with_options({"small": 4})
    with pytest.raises(RecipeError, match="it takes a int"):
        SplitEven.with_options({"smallest": "four"})


def test_it_imports_neither_onnx_nor_onnxruntime() -> None:
    code = (
        "import sys, onnxq.passmanager; print(sorted(m for m in sys.modules if m.startswith('onnx') and 'onnxq' not in m))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
