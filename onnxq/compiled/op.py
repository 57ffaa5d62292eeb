"""An op of onnxruntime's that counts what it reads, see tally.py: `count_input`, with the memory that it works on."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import carray  # pyright: ignore[reportPrivateImportUsage]
from numba.core import cgutils, types
from numba.extending import intrinsic

from onnxq.compiled.counting import LIMBS, carry, drain, ends, observe, widen

COUNTING = "eebb867a70d9aeda"  # XXH3 of counting.py, for numba to compile anew when that changes
part = numba.njit(nogil=True)  # is compiled into the functions that call it, and not read from the cache by itself
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
FLOAT = 1  # as ONNX numbers the types of elements
TAKE, GROW = 0, 1  # what Python is asked for: to take in an array, or more rows for the pages
FINE, BUSY, FAILED = 0, 1, 2  # `failed` of a header: busy until an array is counted, so that an exception leaves it so
MOST_LANES = 1 << 16  # of an array with its channels last, and
MOST_AT_ONCE = 1 << 18  # elements, as pages.py has them
SCALED_AT_ONCE = 1 << 15  # for them to stay in the cache
MOST_UNCARRIED = 512  # arrays in a total, besides those that Python adds


def at(kind) -> Any:  # what gives the place in memory of an address
    pointer = types.CPointer(numba.from_dtype(np.dtype(kind)))

    @intrinsic
    def place(typing, address):
        def code(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(pointer))

        return pointer(types.int64), code

    return place


at_op, at_header, at_record = at(OP), at(HEADER), at(RECORD)
at_float32, at_uint16, at_int16, at_int32, at_int64 = at("f4"), at("u2"), at("i2"), at("i4"), at("i8")


def calling() -> Any:  # what calls a C function of some int64, by its address
    @intrinsic
    def call(typing, function, arguments):
        def code(context, builder, signature, values):
            word = ir.IntType(64)
            kind = ir.FunctionType(word, [word] * len(arguments))
            place = builder.inttoptr(values[0], kind.as_pointer())
            return builder.call(place, cgutils.unpack_tuple(builder, values[1]))

        return types.int64(types.int64, arguments), code

    return call


call = calling()


@part
def product(numbers):
    found = 1
    for n in numbers:
        found *= n
    return found


@part
def scale(x, first, factors, made):  # blocks of channels, see Blocks, times factors (C,); `first` is the number of the first
    blocks, rows, lanes = x.shape
    of_all = (factors.size + lanes - 1) // lanes
    row = np.ones(lanes, np.float32)
    for b in range(blocks):
        start = (first + b) % of_all * lanes
        own = min(lanes, factors.size - start)
        row[:own] = factors[start : start + own]
        if lanes == 1:
            factor = row[0]
            for r in range(rows):
                made[b, r, 0] = x[b, r, 0] * factor
        else:
            for r in range(rows):
                for lane in range(lanes):
                    made[b, r, lane] = x[b, r, lane] * row[lane]


@part
def add_in(x, first, is_new, header, records, place):  # what Pages.count does
    record = records[place]
    channels = record.channels
    tables = carray(at_uint16(header.tables), (8, header.stride))
    seen = carray(at_int64(header.seen), (3,))
    low = carray(at_int32(record.low), (channels,))
    high = carray(at_int32(record.high), (channels,))
    total = carray(at_int64(record.total), (LIMBS, channels))
    slots = carray(at_int16(record.slots), (512,))
    rows = carray(at_int64(record.rows), (record.capacity, 128))
    if record.uncarried == MOST_UNCARRIED:
        carry(total)
        records[place].uncarried = 0
    records[place].uncarried += 1
    used = observe(x, first, is_new, low, high, total, tables, seen, slots, rows, record.used, 1)
    while used < 0:
        call(header.ask, (GROW, place, 0, 0, 0, 0))
        if header.failed == FAILED:
            return
        capacity = records[place].capacity
        rows = carray(at_int64(records[place].rows), (capacity, 128))
        used = drain(tables, seen, slots, rows, records[place].used, 1)
    records[place].used = used


@part
def take(values, dims, lanes, header, records, place):  # whether the array was counted here; Python does the rest
    record = records[place]
    if record.by_channel and not -dims.size <= record.axis < dims.size:
        return False
    count, inner, width, channels = 1, values.size, 1, 1  # of blocks, rows, lanes, see Blocks
    size = values.size
    if record.blocked:
        size = size // dims[1] * record.blocked
        if record.by_channel:
            inner, width, channels = product(dims[2:]), lanes, record.blocked
            count = values.size // (inner * width)
        elif record.blocked % lanes:
            return False
    elif record.by_channel:
        axis = record.axis % dims.size
        channels, inner = dims[axis], product(dims[axis + 1 :])
        count = values.size // inner
        if inner == 1:
            count, inner, width = 1, values.size // channels, channels
    if channels != record.channels or width > MOST_LANES:
        return False
    most = MOST_AT_ONCE
    if record.factors:
        owned = 0 if dims.size < 2 else record.blocked if record.blocked else dims[1]
        if owned != record.number or (record.by_channel and record.axis % dims.size != 1):
            return False
        if not record.by_channel:
            inner, width = product(dims[2:]), lanes if record.blocked else 1
            count = values.size // (inner * width)
        most = SCALED_AT_ONCE
    factors = carray(at_float32(record.factors), (record.number,))
    block = inner * width
    together, rows = max(1, most // block), min(inner, max(1, most // width))
    made = np.empty(together * rows * width if record.factors else 0, np.float32)
    for k in range(0, count, together):
        number = min(together, count - k)
        for row in range(0, inner, rows):
            some = min(rows, inner - row)
            start = k * block + row * width
            x = values[start : start + number * some * width].reshape(number, some, width)
            if record.factors:
                scaled = made[: x.size]
                scale(x, k, factors, scaled.reshape(x.shape))
                x = scaled.reshape(x.shape) if record.by_channel else scaled.reshape(1, x.size, 1)
            add_in(x, k, k == 0 and row == 0, header, records, place)
    if header.failed != FAILED:
        records[place].size = size
    return True


@part
def count_one(own, context, headers):
    found = np.empty(1, np.int64)
    answer = found.ctypes.data
    records = carray(at_record(headers[0].records), (own.first + own.number,))
    call(own.input, (context, 0, answer))
    value = found[0]
    call(own.info, (value, answer))
    info = found[0]
    found[0] = 0  # the kind has 32 bits
    call(own.kind, (info, answer))
    kind = found[0]
    call(own.rank, (info, answer))
    dims = np.empty(found[0], np.int64)
    call(own.dims, (info, dims.ctypes.data, dims.size))
    call(own.release, (info,))
    size = product(dims)
    if not size:
        return
    call(own.data, (value, answer))
    for k in range(own.first, own.first + own.number):
        done = False
        if kind == FLOAT and not headers[0].asks_always:
            done = take(carray(at_float32(found[0]), (size,)), dims, own.lanes, headers[0], records, k)
        if not done and headers[0].failed != FAILED:
            call(headers[0].ask, (TAKE, k, kind, found[0], dims.size, dims.ctypes.data))
        if headers[0].failed == FAILED:
            return


@numba.cfunc("void(int64, int64)", cache=True)
def count_input(op, context):
    own = carray(at_op(op), (1,))[0]
    found = np.empty(1, np.int64)
    answer = found.ctypes.data
    call(own.input, (context, 1, answer))
    call(own.data, (found[0], answer))
    headers = carray(at_header(carray(at_int64(found[0]), (1,))[0]), (1,))
    if headers[0].failed == FINE:
        headers[0].failed = BUSY
        count_one(own, context, headers)
        if headers[0].failed == BUSY:
            headers[0].failed = FINE


RECORDS = numba.from_dtype(RECORD)[::1]


@numba.njit(types.boolean(RECORDS, types.float64[:, ::1]), cache=True)
def ends_of(records, found):
    is_finite = True
    for k in range(records.size):
        record = records[k]
        if not record.size:
            found[k, 0], found[k, 1] = np.inf, -np.inf
            continue
        low = carray(at_int32(record.low), (record.channels,))
        high = carray(at_int32(record.high), (record.channels,))
        found[k, 0], found[k, 1] = ends(low, high)
        is_finite &= np.isfinite(found[k, 0]) and np.isfinite(found[k, 1])
    return is_finite


@numba.njit(types.void(RECORDS), cache=True)
def widen_by(records):
    for k in range(records.size):
        record = records[k]
        if record.size and record.minimum:
            low = carray(at_int32(record.low), (record.channels,))
            high = carray(at_int32(record.high), (record.channels,))
            minimum = carray(at_float32(record.minimum), (record.channels,))
            maximum = carray(at_float32(record.maximum), (record.channels,))
            widen(low, high, minimum, maximum)
