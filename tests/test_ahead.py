"""ahead.py: what is read ahead comes in order, and not much of it in vain."""

from __future__ import annotations

import threading
import time

import pytest

from onnxq import ahead, cores
from onnxq.ahead import read_ahead


@pytest.fixture(autouse=True)
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable", lambda: 4)


def small(_: int) -> int:
    return 1


def test_items_come_in_their_order_whichever_is_loaded_first() -> None:
    def load(k: int) -> int:
        time.sleep(0.02 if k % 3 == 0 else 0)
        return -k

    assert list(read_ahead(load, range(20), small)) == [-k for k in range(20)]
    assert list(read_ahead(load, [], small)) == []


def test_as_many_are_loaded_at_once_as_there_are_cores() -> None:
    together = threading.Barrier(4)

    def load(k: int) -> int:
        if k >= 8:
            together.wait(10)  # an error if the four do not come together
        return k

    assert list(read_ahead(load, range(16), small)) == list(range(16))


def test_few_are_loaded_in_vain() -> None:
    loaded: list[int] = []
    reading = read_ahead(lambda k: loaded.append(k) or k, range(100), small)
    assert loaded == []
    assert [next(reading), next(reading)] == [0, 1]
    reading.close()  # type: ignore[attr-defined]
    assert len(loaded) <= 6


def test_large_items_are_not_many_at_once() -> None:
    under_way, most, lock = [0], [0], threading.Lock()

    def load(k: int) -> int:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        return k

    for k in read_ahead(load, range(12), lambda _: ahead.MOST_BYTES // 2):
        with lock:
            under_way[0] -= 1
        time.sleep(0.005)
        assert k < 12
    assert most[0] <= 3  # with the one that was asked for


def test_an_error_comes_at_its_place() -> None:
    def load(k: int) -> int:
        if k in (3, 5):
            raise ValueError(k)
        return k

    reading = read_ahead(load, range(9), small)
    assert [next(reading) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="3"):
        next(reading)
