"""The memory that the op `count_input` works on: what a node of it is told by, and a tally, see tally.py."""

import numpy as np

OP = np.dtype([
    (name, np.int64)
    for name in ("first", "number", "lanes", "input", "data", "info", "kind", "rank", "dims", "release")
])  # fmt: skip
HEADER = np.dtype([(name, np.int64) for name in ("records", "tables", "stride", "seen", "ask", "asks_always", "failed")])
RECORD = np.dtype([
    (name, np.int64)
    for name in (
        "by_channel", "axis", "blocked", "channels", "low", "high", "minimum", "maximum", "total", "uncarried", "factors",
        "number", "slots", "rows", "capacity", "used", "size",
    )
])  # fmt: skip
TAKE, GROW = 0, 1  # what Python is asked for: to take in an array, or more rows for the pages
FINE, BUSY, FAILED = 0, 1, 2  # `failed` of a header: busy until an array is counted, so that an exception leaves it so
