"""collection.py: the same statistics bit for bit wherever they are collected; what happens when something goes wrong."""

from __future__ import annotations

import gc
import multiprocessing
import os
import platform
import signal
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

import onnxq.collection
from onnxq import executors, memory
from onnxq.calibration import Calibration, merge, merged
from onnxq.collecting import Collecting
from onnxq.collection import collect
from onnxq.collector import Collector
from onnxq.data import Sample
from onnxq.errors import CalibrationError, DataError, OutputError, RecipeError
from onnxq.grouping import grouped

NET = onnx.parser.parse_model(
    """<ir_version: 9, opset_import: ["" : 17]>
    net (float[N, 3, M] x) => (float[N, 3, M] y) { a = Relu (x) b = Sqrt (a) c = Neg (b) y = Add (a, c) }"""
)
AXES = {"x": 1, "a": None, "b": 1, "y": None}


def samples(count: int = 40, seed: int = 0) -> list[Sample]:
    """Feeds of every other size."""
    rng = np.random.default_rng(seed)
    sizes = [(int(rng.integers(1, 4)), 3, int(rng.integers(1, 90))) for _ in range(count)]
    return [Sample({"x": rng.standard_normal(s).astype(np.float32)}, None, f"file {k}") for k, s in enumerate(sizes)]


@pytest.fixture
def content(tmp_path: Path) -> Callable[[Calibration], bytes]:
    """The bytes of the file that a calibration makes."""

    def read(found: Calibration) -> bytes:
        found.save(tmp_path / "x.calib")
        return (tmp_path / "x.calib").read_bytes()

    return read


def test_processes_change_nothing(content: Callable[[Calibration], bytes]) -> None:
    alone = collect(NET, AXES, samples(), Collecting(threads=1))
    spread = collect(NET, AXES, samples(), Collecting(threads=1, executor=executors.processes(2)))
    assert content(alone) == content(spread)


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_change_nothing(workers: int, content: Callable[[Calibration], bytes]) -> None:
    alone = collect(NET, AXES, samples(), Collecting(threads=1))
    with ThreadPoolExecutor(workers) as pool:
        assert content(alone) == content(collect(NET, AXES, samples(), Collecting(threads=1, executor=pool)))


@pytest.mark.usefixtures("held")
def test_groups_of_tensors_change_nothing(content: Callable[[Calibration], bytes]) -> None:
    feeds = samples()
    assert len(grouped(NET, AXES, {}, feeds[0], feeds[0].feed["x"].nbytes * 2)) == 2
    alone = collect(NET, AXES, feeds, Collecting(threads=1))
    for limit in (1, feeds[0].feed["x"].nbytes * 2, 10**9):
        assert content(alone) == content(collect(NET, AXES, feeds, Collecting(threads=1, memory_limit=limit)))


@pytest.mark.slow
def test_a_worker_that_is_killed_changes_nothing(content: Callable[[Calibration], bytes]) -> None:
    pools: list[Executor] = []

    def make() -> Executor:
        pools.append(executors.processes(2)())
        return pools[-1]

    def killing() -> Iterator[Sample]:
        for k, sample in enumerate(samples()):
            if k == 30:
                os.kill(next(iter(pools[0]._processes)), signal.SIGKILL)  # type: ignore[attr-defined]
            yield sample

    alone = collect(NET, AXES, samples(), Collecting(threads=1))
    spread = collect(NET, AXES, killing(), Collecting(threads=1, executor=make))
    assert len(pools) > 1
    assert content(alone) == content(spread)


@pytest.mark.slow
def test_workers_that_die_while_there_is_nothing_to_do_change_nothing(content: Callable[[Calibration], bytes]) -> None:
    pools: list[Executor] = []

    def make() -> Executor:
        pools.append(executors.processes(1)())
        return pools[-1]

    def killing() -> Iterator[Sample]:
        for k, sample in enumerate(samples()):
            if k == 24 and len(pools) == 1:
                for process in list(pools[0]._processes):  # type: ignore[attr-defined]
                    os.kill(process, signal.SIGKILL)
                time.sleep(1.0)
            yield sample

    alone = collect(NET, AXES, samples(), Collecting(threads=1))
    assert content(alone) == content(collect(NET, AXES, killing(), Collecting(threads=1, executor=make)))
    assert len(pools) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_dask_cluster_with_a_worker_killed_changes_nothing(content: Callable[[Calibration], bytes]) -> None:
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    alone = collect(NET, AXES, samples(), Collecting(threads=1))
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:

        def killing() -> Iterator[Sample]:
            for k, sample in enumerate(samples()):
                if k == 30:
                    os.kill(next(iter(cluster.workers.values())).process.pid, signal.SIGKILL)
                yield sample

        with executors.dask(cluster.scheduler_address) as pool:
            spread = collect(NET, AXES, killing(), Collecting(threads=1, executor=pool))
    assert content(alone) == content(spread)


@pytest.mark.parametrize("workers", ["at work", "told to end", "killed while they answer"])
def test_an_interrupt_ends_workers_at_once_and_keeps_what_they_gave(workers: str) -> None:
    """As a terminal and a cluster's scheduler send it, which tell all processes to end."""
    pools: list[Any] = []

    def make() -> Executor:
        pools.append(executors.processes(2)())
        return pools[-1]

    seen: list[int] = []

    def interrupted() -> Iterator[Sample]:
        for k, sample in enumerate(samples(80)):
            if k == 40:
                if workers == "told to end":
                    for process in list(pools[0]._processes):
                        os.kill(process, signal.SIGTERM)
                if workers == "killed while they answer":
                    for process in list(pools[0]._processes):
                        os.kill(process, signal.SIGSTOP)
                    time.sleep(0.2)
                    os.write(pools[0]._result_queue._writer.fileno(), struct.pack("!i", 1000) + b"the first bytes")
                raise KeyboardInterrupt
            yield sample

    how = Collecting(threads=1, executor=make, progress=lambda _, count, __: seen.append(count))
    with pytest.raises(KeyboardInterrupt) as stop:
        collect(NET, AXES, interrupted(), how)
    partial: Calibration = stop.value.partial  # type: ignore[attr-defined]
    assert partial.samples >= seen[-1] >= 8  # what came back last is in it, and was not shown
    assert not multiprocessing.active_children()


class Silent(Executor):
    """Threads of an executor that does not tell how many there are."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2)

    def submit(self, *arguments: Any, **options: Any) -> Any:
        return self._pool.submit(*arguments, **options)

    def shutdown(self, *arguments: Any, **options: Any) -> None:
        self._pool.shutdown(*arguments, **options)


def test_an_interrupt_keeps_what_came_back_while_samples_were_read() -> None:
    def interrupted() -> Iterator[Sample]:
        for k, sample in enumerate(samples(80)):
            if k % 8 == 0:
                time.sleep(0.3)  # in which what was handed out before is done
            if k == 24:
                raise KeyboardInterrupt
            yield sample

    with Silent() as pool, pytest.raises(KeyboardInterrupt) as stop:
        collect(NET, AXES, interrupted(), Collecting(threads=1, executor=pool))
    assert stop.value.partial.samples == 24  # type: ignore[attr-defined]


def test_an_executor_that_gives_up_or_takes_no_more_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    given_up: Future[Any] = Future()
    given_up.cancel()
    pool = Silent()
    pool.shutdown()
    with pytest.raises(CalibrationError, match=r"takes no more samples \(RuntimeError: cannot schedule"):
        collect(NET, AXES, samples(), Collecting(threads=1, executor=pool))
    monkeypatch.setattr(pool, "submit", lambda *_: given_up)
    with pytest.raises(CalibrationError, match=r"gave up file 0 and the 7 samples after it: .*gone"):
        collect(NET, AXES, samples(), Collecting(threads=1, executor=pool))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_cluster_without_workers_is_not_waited_for_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    monkeypatch.setattr(executors, "WORKERS_SECONDS", 1.0)
    monkeypatch.setattr(onnxq.shards, "DEATH_SECONDS", 0.5)
    monkeypatch.setattr(onnxq.shards, "ALONE_SECONDS", 1.0)
    with distributed.LocalCluster(n_workers=0, dashboard_address=None) as cluster:
        with (
            pytest.raises(RecipeError, match=r"has no workers; start some with: dask worker tcp://"),
            executors.dask(cluster.scheduler_address),
        ):
            pass
        cluster.scale(1)
        monkeypatch.setattr(executors, "WORKERS_SECONDS", 60.0)
        with executors.dask(cluster.scheduler_address) as pool:
            cluster.scale(0)
            cluster.sync(cluster._correct_state)
            with pytest.raises(CalibrationError, match="has had no workers for 1 s; start some again"):
                collect(NET, AXES, samples(), Collecting(threads=1, executor=pool))


def test_workers_that_are_killed_leave_no_files_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pool = executors.processes(1)()
    written = Path(pool.submit(tempfile.mkdtemp).result())
    assert tmp_path in written.parents
    assert written.exists()
    executors.end(pool)
    del pool
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_an_executor_without_a_factory_says_how_to_go_on() -> None:
    pool = executors.processes(1)()

    def killing() -> Iterator[Sample]:
        for k, sample in enumerate(samples()):
            if k == 20:
                os.kill(next(iter(pool._processes)), signal.SIGKILL)  # type: ignore[attr-defined]
            yield sample

    with pool, pytest.raises(CalibrationError, match=r"a worker died while it ran file .*--memory-limit"):
        collect(NET, AXES, killing(), Collecting(threads=1, executor=pool))


def test_a_pool_is_looked_at_only_when_it_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Executor] = []
    monkeypatch.setattr(onnxq.shards, "end_if_stuck", looked.append)
    monkeypatch.setattr(onnxq.shards, "DEATH_SECONDS", 60.0)
    with ThreadPoolExecutor(2) as pool:
        collect(NET, AXES, samples(), Collecting(threads=1, executor=pool))
    assert looked == []


def test_a_worker_that_dies_while_it_answers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxq.shards, "DEATH_SECONDS", 0.5)
    pool: Any = executors.processes(2)()

    def killing() -> Iterator[Sample]:
        for k, sample in enumerate(samples()):
            if k == 20:
                for process in pool._processes:
                    os.kill(process, signal.SIGSTOP)  # so that nothing comes after a part of an answer
                time.sleep(0.2)
                os.write(pool._result_queue._writer.fileno(), struct.pack("!i", 1000) + b"the first bytes of an answer")
                os.kill(next(iter(pool._processes)), signal.SIGKILL)
            yield sample

    with pool, pytest.raises(CalibrationError, match="a worker died while it ran"):
        collect(NET, AXES, killing(), Collecting(threads=1, executor=pool))


@pytest.mark.parametrize("stop_at", [1, 17, 39])
def test_an_interrupted_run_goes_on(
    stop_at: int, tmp_path: Path, content: Callable[[Calibration], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> Iterator[Sample]:
        for k, sample in enumerate(samples()):
            if k == stop_at:
                raise KeyboardInterrupt
            yield sample

    how = Collecting(threads=1, checkpoint=tmp_path / "progress")
    with pytest.raises(KeyboardInterrupt) as stop:
        collect(NET, AXES, interrupted(), how)
    assert stop.value.partial.samples == stop_at  # type: ignore[attr-defined]
    assert len(list((tmp_path / "progress").glob("*.calib"))) == 1
    runs: list[int] = []
    add = Collector.add
    monkeypatch.setattr(Collector, "add", lambda self, k, sample, part: runs.append(k) or add(self, k, sample, part))
    resumed = collect(NET, AXES, samples(), how)
    assert len(runs) == 40 - stop_at
    how.clear()
    assert not (tmp_path / "progress").exists()
    assert content(resumed) == content(collect(NET, AXES, samples(), Collecting(threads=1)))


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    how = Collecting(threads=1, checkpoint=tmp_path / "progress")
    collect(NET, AXES, samples(3), how)
    (path,) = (tmp_path / "progress").glob("*.calib")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CalibrationError, match=rf"the checkpoint {path} cannot be read \(.*\); remove it to start over$"):
        collect(NET, AXES, samples(3), how)


@pytest.mark.usefixtures("held")
def test_groups_that_are_done_are_not_collected_again(tmp_path: Path, content: Callable[[Calibration], bytes]) -> None:
    """Interrupted in the second of two groups: the partial calibration would lack tensors, the checkpoint goes on."""
    readings: list[int] = []

    def interrupted() -> Iterator[Sample]:
        readings.append(0)
        for k, sample in enumerate(samples()):
            if len(readings) == 3 and k == 9:  # the first reading is a look at one sample, the second the first group
                raise KeyboardInterrupt
            yield sample

    class Again:
        def __iter__(self) -> Iterator[Sample]:
            return interrupted()

    how = Collecting(threads=1, checkpoint=tmp_path / "progress", memory_limit=samples()[0].feed["x"].nbytes * 2)
    with pytest.raises(KeyboardInterrupt) as stop:
        collect(NET, AXES, Again(), how)
    assert stop.value.partial is None  # type: ignore[attr-defined]
    assert sorted(Calibration.load(p).samples for p in (tmp_path / "progress").glob("*.calib")) == [9, 40]
    assert content(collect(NET, AXES, samples(), how)) == content(collect(NET, AXES, samples(), Collecting(threads=1)))


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    how = Collecting(threads=1, checkpoint=tmp_path)

    def broken() -> Iterator[Sample]:
        yield from samples(5)
        raise DataError("file 5 is damaged")

    with pytest.raises(DataError, match="damaged") as stop:
        collect(NET, AXES, broken(), how)
    assert stop.value.partial.samples == 5  # type: ignore[attr-defined]
    with pytest.raises(CalibrationError, match=r"file 0 is not what it was when .*; remove that file to start over"):
        collect(NET, AXES, samples(8, seed=1), how)


def test_a_checkpoint_of_more_data_is_refused(tmp_path: Path) -> None:
    how = Collecting(threads=1, checkpoint=tmp_path)
    collect(NET, AXES, samples(8), how)
    with pytest.raises(CalibrationError, match="holds 3 samples that the data does not have now"):
        collect(NET, AXES, samples(8)[:5], how)


def test_another_policy_is_another_collection(tmp_path: Path) -> None:
    feeds = spoilt(7, np.nan)
    with ThreadPoolExecutor(1) as pool:
        for executor in (None, pool):
            how = Collecting(threads=1, checkpoint=tmp_path, executor=executor)
            assert collect(NET, AXES, feeds, replace(how, on_nonfinite="ignore")).samples == 40
            assert collect(NET, AXES, feeds, replace(how, on_nonfinite="skip")).samples == 39
            with pytest.raises(CalibrationError, match="NaN in tensor x at file 7"):
                collect(NET, AXES, feeds, how)


def test_a_failure_of_one_collection_is_not_one_of_the_next() -> None:
    feeds = spoilt(3, np.nan)[:5]
    feeds[4] = Sample(
        {"x": np.zeros((2, 2), np.float32)}, None, "file 4"
    )  # fails in the run, before file 3 is seen to be bad
    with ThreadPoolExecutor(1) as pool:
        how = Collecting(threads=1, executor=pool)
        with pytest.raises(ValueError, match="file"):
            collect(NET, AXES, feeds, how)
        assert collect(NET, AXES, samples(), how).samples == 40


def test_energies_that_are_no_numbers_are_the_least() -> None:
    found = collect(NET, AXES, spoilt(7, np.nan), Collecting(threads=1, on_nonfinite="ignore"))
    assert all(np.isfinite(list(found.energies.values())))
    assert found.feeds[7] not in found.energies


def test_samples_that_are_left_out_from_the_start_are_not_counted() -> None:
    found = collect(NET, AXES, samples(), Collecting(threads=1, left_out={2: "NaN in another tensor"}))
    assert found.samples == 39
    assert found.skipped == {2: "NaN in another tensor"}


def test_a_full_disk_does_not_stop_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Calibration, path: Path) -> None:
        raise OutputError(f"{path} cannot be written: No space left on device")

    monkeypatch.setattr(onnxq.keeper, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(Calibration, "save", full)
    found = collect(NET, AXES, samples(), Collecting(threads=1, checkpoint=tmp_path))
    assert found.samples == 40
    (note,) = found.notes
    assert "No space left on device" in note
    assert "went on without it" in note


def spoilt(at: int, value: float) -> list[Sample]:
    feeds = samples()
    feeds[at].feed["x"][0, 0, 0] = value
    return feeds


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_spoilt_sample_is_left_out_whole(
    value: float, workers: int, limit: int | None, request: pytest.FixtureRequest, content: Callable[[Calibration], bytes]
) -> None:
    if limit is not None:
        request.getfixturevalue("held")
    with ThreadPoolExecutor(max(1, workers)) as pool:
        how = Collecting(threads=1, on_nonfinite="skip", executor=pool if workers else None, memory_limit=limit)
        found = collect(NET, AXES, spoilt(7, value), how)
    what = "NaN" if np.isnan(value) else "infinity"
    assert found.skipped == {7: f"{what} in tensor x at file 7"}
    assert found.samples == 39
    assert f"1 samples were left out, the first for {what} in tensor x" in found.notes[0]
    sound = [(k, s) for k, s in enumerate(samples()) if k != 7]
    expected = collect(NET, AXES, [s for _, s in sound], Collecting(threads=1))
    for name, sketch in found.sketches.items():
        sketch.series = dict(enumerate(sketch.series[k] for k, _ in sound))
        one, other = sketch.to_arrays(), expected.sketches[name].to_arrays()
        assert all(np.array_equal(one[k], other[k]) for k in other)


def test_elements_that_are_not_finite_can_be_ignored() -> None:
    found = collect(NET, AXES, spoilt(7, np.inf), Collecting(threads=1, on_nonfinite="ignore"))
    assert found.samples == 40
    assert (found.sketches["x"].inf_count, found.sketches["y"].nan_count) == (1, 1)
    assert np.isfinite(found.sketches["x"].maximum)


def test_nothing_is_left_where_every_sample_is_spoilt() -> None:
    feeds = [Sample({"x": np.full((1, 3, 2), np.nan, np.float32)}, None, "only")]
    with pytest.raises(CalibrationError, match=r"every sample was left out, the first for NaN in tensor x at only"):
        collect(NET, AXES, feeds, Collecting(on_nonfinite="skip"))


def test_merged_parts_equal_the_whole() -> None:
    feeds = samples()
    whole = collect(NET, AXES, feeds, Collecting(threads=1))
    parts = [collect(NET, AXES, part, Collecting(threads=1)) for part in (feeds[:13], feeds[13:14], feeds[14:])]
    for order in (parts, parts[::-1]):
        joined = merged(order)
        assert joined.samples == 40
        assert joined.probe_hashes == whole.probe_hashes
        assert joined.energies == whole.energies
        for name, sketch in whole.sketches.items():
            one, other = sketch.to_arrays(), joined.sketches[name].to_arrays()
            assert all(np.array_equal(one[k], other[k]) for k in one if k != "series")
            assert sorted(sketch.series.values()) == sorted(joined.sketches[name].series.values())
    one, other = merged(parts), merged(parts[::-1])
    for name in AXES:
        assert one.sketches[name].series == other.sketches[name].series


def test_files_that_do_not_go_together_are_named(tmp_path: Path) -> None:
    paths = [tmp_path / "a.calib", tmp_path / "b.calib"]
    for path in paths:
        collect(NET, AXES, samples(2), Collecting(source_hash=path.name)).save(path)
    with pytest.raises(CalibrationError, match=r"b\.calib was made from another model than .*a\.calib"):
        merge(paths)


def test_parts_that_do_not_go_together_are_refused() -> None:
    feeds = samples(6)
    part = collect(NET, AXES, feeds[:3], Collecting(source_hash="m", cones=dict.fromkeys(AXES, "c")))
    with pytest.raises(CalibrationError, match="calibration 2 shares 1 of its 2 feeds"):
        merged([part, collect(NET, AXES, feeds[2:4], Collecting(source_hash="m", cones=dict.fromkeys(AXES, "c")))])
    with pytest.raises(CalibrationError, match="calibration 2 was made from another model"):
        merged([part, collect(NET, AXES, feeds[4:], Collecting(source_hash="n"))])
    with pytest.raises(CalibrationError, match="no tensor in common"):
        merged([part, collect(NET, AXES, feeds[4:], Collecting(source_hash="m", cones=dict.fromkeys(AXES, "d")))])


def test_what_parts_do_not_hold_alike_is_left_out() -> None:
    feeds = samples(6)
    one = collect(NET, AXES, feeds[:3], Collecting(cones={"x": "c", "a": "c", "b": "c", "y": "c"}))
    other = collect(NET, {"x": 1, "a": None, "b": 1}, feeds[3:], Collecting(cones={"x": "c", "a": "c", "b": "d"}))
    joined = merged([one, other])
    assert joined.cones == {"x": "c", "a": "c"}
    assert list(joined.sketches) == ["x", "a"]


def test_a_cluster_that_is_not_there_is_said() -> None:
    pytest.importorskip("distributed", reason="distributed is not installed")
    with pytest.raises(RecipeError, match=r"there is no Dask scheduler at nonsense"), executors.dask("nonsense"):
        pass


def test_memory_that_was_freed_is_given_back_where_the_c_library_can() -> None:
    """On glibc: blocks below the size that is mapped apart stay in the process when they are freed."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("this C library has no malloc_trim")
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1])  # noqa: E731
    blocks = [b"x" * (60_000 + k) for k in range(2_000)]
    keep, full = blocks[-1], resident()
    del blocks
    memory.give_back()
    assert resident() < full - 100_000_000 // 4096
    assert keep
