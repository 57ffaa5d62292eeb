"""Pass, PassRecord, PassManager: rewrites of a value in order, checked, and for exact ones proved.

Nothing here knows ONNX. A subject is anything with `fork()` (an independent twin) and `refusals` (a list that passes
append to); what `verify` and `prove` mean is handed in.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, Self, TypeVar, get_type_hints

from onnxq.errors import PassError, RecipeError, nearest

MOST_ROUNDS = 50
UNPROVABLE = "unprovable"


class Subject(Protocol):
    refusals: list[tuple[str, str]]

    def fork(self) -> Self: ...


S = TypeVar("S", bound=Subject)


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite of a model. Fields are its options; the docstring shows Given, Result and Refused."""

    name: ClassVar[str]

    @abstractmethod
    def apply(self, model: Any) -> int:
        """Rewrite in place; the number of rewrites made, 0 when nothing is left to do."""

    @classmethod
    def with_options(cls, options: dict[str, Any]) -> Self:
        """The pass with these options. Raises RecipeError that names an unknown option or an ill-typed value."""
        hints = get_type_hints(cls)
        valid = {f.name for f in fields(cls)}
        for key, given in options.items():
            if key not in valid:
                hint = nearest(key, valid) if valid else "it has no options"
                raise RecipeError(f"pass {cls.name} has no option {key}; {hint}")
            wanted = hints[key]
            if wanted is float and isinstance(given, int) and not isinstance(given, bool):
                continue
            if isinstance(wanted, type) and (not isinstance(given, wanted) or (wanted is int and given is True)):
                raise RecipeError(f"option {key} of pass {cls.name} is {given!r}; it takes a {wanted.__name__}")
        return cls(**options)


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: rewrites made, refusals as (where, why), seconds taken; `rolled_back` says why it was undone."""

    name: str
    rewrites: int
    refusals: tuple[tuple[str, str], ...]
    seconds: float
    rolled_back: str = ""


class PassManager:
    """Runs passes over a subject.

    verify(subject) raises PassError where the subject is malformed; it runs after every pass that changed something.
    prove(before, after) is None where both compute the same, else a sentence on the difference; prove(x, x) tells whether x
    computes the same twice.
    after_pass(name, subject) sees the subject after every pass that changed it (dumps).
    """

    def __init__(
        self,
        verify: Callable[[Any], None],
        prove: Callable[[Any, Any], str | None],
        after_pass: Callable[[str, Any], None] | None = None,
    ) -> None:
        self._verify = verify
        self._prove = prove
        self._after_pass = after_pass

    def run(self, subject: Subject, passes: Sequence[Pass]) -> list[PassRecord]:
        """Each pass once, in order."""
        return [self._apply(p, subject) for p in passes]

    def run_exact(self, subject: S, passes: Sequence[Pass], *, once: bool = False) -> tuple[S, list[PassRecord]]:
        """The passes, over and over until none has anything left to do, or once; the result is proved equal to what came in.

        On a mismatch the guilty pass is found by bisection, left out, and the rest run again from the start. A subject that
        differs from itself cannot be proved; the record UNPROVABLE says so, and every pass is kept.
        """
        origin, left_out = subject.fork(), {}
        while True:
            kept = [p for p in passes if p.name not in left_out]
            history, records = self._run_to_fixed_point(subject, kept, 1 if once else MOST_ROUNDS)
            records += [PassRecord(name, 0, (), 0.0, why) for name, why in left_out.items()]
            difference = self._prove(origin, subject) if history else None
            if difference is None:
                return subject, records
            itself = self._prove(origin, origin)
            if itself is not None:
                return subject, [*records, PassRecord(UNPROVABLE, 0, (("model", itself),), 0.0)]
            guilty, why = self._bisect(origin, history, difference)
            left_out[guilty.name] = why
            subject = origin.fork()

    def _run_to_fixed_point(
        self, subject: Subject, passes: Sequence[Pass], rounds: int
    ) -> tuple[list[Pass], list[PassRecord]]:
        history: list[Pass] = []
        total: dict[str, PassRecord] = {}
        for _ in range(rounds):
            changed = False
            for p in passes:
                record = self._apply(p, subject)
                before = total.get(p.name, PassRecord(p.name, 0, (), 0.0))
                total[p.name] = PassRecord(
                    p.name, before.rewrites + record.rewrites, record.refusals, before.seconds + record.seconds
                )
                if record.rewrites:
                    changed = True
                    history.append(p)
            if not changed or rounds == 1:
                return history, list(total.values())
        busy = history[-1].name if history else "none"
        raise PassError(f"the passes still find work after {MOST_ROUNDS} rounds, {busy} last; leave it out in a recipe")

    def _bisect(self, origin: Subject, history: Sequence[Pass], difference: str) -> tuple[Pass, str]:
        """The first pass of the history after which the result differs from the origin."""
        good, bad = 0, len(history)
        while bad - good > 1:
            middle = (good + bad) // 2
            replay = origin.fork()
            for p in history[:middle]:
                self._apply(p, replay)
            found = self._prove(origin, replay)
            if found is None:
                good = middle
            else:
                bad, difference = middle, found
        return history[bad - 1], difference

    def _apply(self, p: Pass, subject: Subject) -> PassRecord:
        subject.refusals.clear()
        start = time.perf_counter()
        rewrites = p.apply(subject)
        seconds = time.perf_counter() - start
        if rewrites:
            try:
                self._verify(subject)
            except PassError as error:
                raise PassError(f"after pass {p.name}: {error}") from error
            if self._after_pass is not None:
                self._after_pass(p.name, subject)
        return PassRecord(p.name, rewrites, tuple(subject.refusals), seconds)
