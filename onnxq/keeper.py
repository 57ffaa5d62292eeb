"""Keeper: what is collected so far, on its way into a checkpoint and onto the progress bar."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping

from onnxq.calibration import Calibration
from onnxq.collecting import Collecting
from onnxq.collector import Job
from onnxq.data import Sample
from onnxq.errors import CalibrationError, OutputError
from onnxq.feeds import hash_of_feed

Indexed = tuple[int, Sample]
CHECKPOINT_SECONDS = 30.0


class Changed(Exception):
    """The data is not what it was when a part of it was collected: a source may give it in another order each time."""


class Keeper:
    """What is collected so far, on its way into a checkpoint and onto the progress bar."""

    def __init__(self, job: Job, how: Collecting, total: int | None, left_out: Mapping[int, str]) -> None:
        self.found = job.empty()
        self.found.source_hash = how.source_hash
        self.found.cones = {name: how.cones[name] for name in job.axes if name in how.cones}
        self._progress, self._total = how.progress, total
        self._path = None if how.checkpoint is None else how.checkpoint / f"{job.digest}.calib"
        self._written = how.written
        self._saved = time.monotonic()
        self._known: dict[int, str] = {}  # the samples that the checkpoint holds
        if self._path is not None and self._path.is_file():
            try:
                self.found = Calibration.load(self._path)
            except CalibrationError as error:
                raise CalibrationError(
                    f"the checkpoint {self._path} cannot be read ({error.__cause__ or error}); remove it to start over"
                ) from error
            self._written.append(self._path)
            self._known = dict(self.found.feeds)
        elif how.begun is not None:
            self.found.absorb(how.begun)
        self.found.skipped.update(left_out)
        self._begun = {k: d for k, d in self.found.feeds.items() if k not in self._known}
        self._done_before = len(self.found.feeds) + len(self.found.skipped)

    def unread(self, items: Iterable[Indexed]) -> Iterator[Indexed]:
        """The samples that are not done.

        Raises CalibrationError where the data is not what a checkpoint is of, Changed where it is not what was begun with.
        """
        seen = set()
        for index, sample in items:
            seen.add(index)
            known = self._known.get(index)
            if index in self._begun:
                if self._begun[index] != hash_of_feed(sample.feed):
                    raise Changed
            elif known is None and index not in self.found.skipped:
                yield index, sample
            elif known is not None and known != hash_of_feed(sample.feed):
                raise CalibrationError(
                    f"{sample.where} is not what it was when {self._path} was written; remove that file to start over"
                )
        if not self._begun.keys() <= seen:
            raise Changed
        if not self._known.keys() <= seen:
            raise CalibrationError(
                f"{self._path} holds {len(self._known.keys() - seen)} samples that the data does not have now; "
                "remove that file to start over"
            )

    def show(self, more: int = 0) -> None:
        """Tell how many samples are done: those that were found when the work began, and more."""
        if self._progress is not None:
            self._progress("calibrating", self._done_before + more, self._total)

    @property
    def is_due(self) -> bool:
        return self._path is not None and time.monotonic() - self._saved > CHECKPOINT_SECONDS

    def save(self) -> None:
        """Write the checkpoint. The work goes on without it where the disk is full, and says so at the end."""
        if self._path is None or not self.found.feeds:
            return
        self._saved = time.monotonic()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self.found.save(self._path)
            self._written.append(self._path)
        except (OSError, OutputError) as error:
            self.found.notes.append(
                f"the checkpoint {self._path} could not be written ({error}); the work went on without it"
            )
            self._path = None
