"""Collecting: how samples are to be collected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

from onnxq.calibration import Calibration
from onnxq.collector import Nonfinite
from onnxq.exposure import OptimizedGraphs

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Collecting:
    """How samples are collected.

    `threads` of the runtime work on each sample; 0: all cores are divided among the samples that are under way at once.
    `executor` is an Executor, or a function that makes one, which is needed to go on after a worker of a process pool died.
    `memory_limit` bounds, in bytes, the activations that are held at once: where tensors cannot be counted while the model
    runs, they are then collected in groups.
    `checkpoint` is a folder for progress; what is collected there is gone on with.
    """

    threads: int = 0
    on_nonfinite: Nonfinite = "error"
    memory_limit: int | None = None
    checkpoint: Path | None = None
    executor: Executor | Callable[[], Executor] | None = None
    progress: Progress | None = None
    source_hash: str = ""
    cones: Mapping[str, str] = field(default_factory=dict)  # of the tensors, see cones.py
    begun: Calibration | None = None  # what was collected before of some of the samples, of the same tensors
    graphs: OptimizedGraphs = field(default_factory=OptimizedGraphs)  # shared with what is made of this by `replace`
    left_out: Mapping[int, str] = field(default_factory=dict)  # samples that are not to be counted, and why
    written: list[Path] = field(default_factory=list)  # the checkpoints, shared with what is made of this by `replace`

    def clear(self) -> None:
        """Remove the checkpoints, once all that they are for is done."""
        for path in self.written:
            path.unlink(missing_ok=True)
        if self.checkpoint is not None and self.checkpoint.is_dir() and not any(self.checkpoint.iterdir()):
            self.checkpoint.rmdir()
