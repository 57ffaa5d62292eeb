"""Reading ahead: files that take long to decode are read by several threads, before they are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from onnxq import cores

T = TypeVar("T")
R = TypeVar("R")


MOST_BYTES = 1 << 28  # of what waits to be asked for


def read_ahead(load: Callable[[T], R], items: Iterable[T], size: Callable[[R], int]) -> Iterator[R]:
    """`load` of each item, in their order; what it raises comes at the place of its item. `size` is in bytes.

    As many as there are cores are loaded at once, and no more than those ahead, or fewer where they are large; but few at
    first, as often the first few are all that is read.
    """
    left, most = iter(items), cores.usable()
    under_way: deque[Future[R]] = deque()
    window = 1
    with ThreadPoolExecutor(most, "onnxq-reader") as pool:
        try:
            while True:
                under_way.extend(pool.submit(load, item) for item in islice(left, window - len(under_way)))
                if not under_way:
                    return
                found = under_way.popleft().result()
                window = max(1, min(2 * window, most, MOST_BYTES // max(1, size(found))))
                under_way.extend(pool.submit(load, item) for item in islice(left, window - len(under_way)))
                yield found
        finally:
            for future in under_way:
                future.cancel()
