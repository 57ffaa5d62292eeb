"""An op of onnxruntime's that counts what it reads, see tally.py: `count_input`, with the memory that it works on."""

from __future__ import annotations

import numpy as np
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from onnxq.compiled import MOST_AT_ONCE, NO_MEMORY, TABLES
from onnxq.compiled.counting import LIMBS, carry, drain, ends, observe, widen
from onnxq.compiled.places import (
    allot,
    at,
    at_float32,
    at_int16,
    at_int32,
    at_int64,
    at_uint32,
    call,
    is_there,
    on_stack,
    part,
    release,
)
from onnxq.compiled.records import BUSY, FAILED, FINE, GROW, HEADER, OP, RECORD, TAKE

FLOAT = 1  # as ONNX numbers the types of elements
MOST_AXES = 64  # of an array
MOST_LANES = 1 << 16  # of an array with its channels last, and
SCALED_AT_ONCE = 1 << 15  # for them to stay in the cache
MOST_UNCARRIED = 512  # arrays in a total, besides those that Python adds
at_op, at_header, at_record = at(OP), at(HEADER), at(RECORD)
word, axes = on_stack(8), on_stack(8 * MOST_AXES)


@part
def product(numbers):
    found = 1
    for n in numbers:
        found *= n
    return found


@part
def scale(
    x, first, factors, row, made
):  # blocks of channels, see Blocks, times factors (C,); `first` is the number of the first
    blocks, rows, lanes = x.shape
    of_all = (factors.size + lanes - 1) // lanes
    row[:] = np.float32(1)
    for b in range(blocks):
        start = (first + b) % of_all * lanes
        own = min(lanes, factors.size - start)
        for lane in range(own):
            row[lane] = factors[start + lane]
        if lanes == 1:
            factor = row[0]
            for r in range(rows):
                made[b, r, 0] = x[b, r, 0] * factor
        else:
            for r in range(rows):
                for lane in range(lanes):
                    made[b, r, lane] = x[b, r, lane] * row[lane]


@part
def add_in(x, first, is_new, header, records, place):  # what Pages.count does; whether it was done
    record = records[place]
    channels = record.channels
    tables = carray(at_uint32(header.tables), (TABLES, header.stride))
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
    used = observe(x, first, np.int64(is_new), low, high, total, tables, seen, slots, rows, record.used, 1)
    while used < 0:
        if used == NO_MEMORY:
            return False
        call(header.ask, (GROW, place, 0, 0, 0, 0))
        if header.failed == FAILED:
            return False
        capacity = records[place].capacity
        rows = carray(at_int64(records[place].rows), (capacity, 128))
        used = drain(tables, seen, slots, rows, records[place].used, 1)
    records[place].used = used
    return True


@part
def take(values, dims, lanes, header, records, place):  # whether the array was seen to here; Python does the rest
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
    memory = allot((4 * together * rows * width, 4 * width) if record.factors else (4, 4))
    if not is_there(memory):
        header.failed = FAILED
    factors_of_row = carray(at_float32(memory[1]), (width,))
    for k in range(0, count, together):
        number = min(together, count - k)
        for row in range(0, inner, rows):
            some = min(rows, inner - row)
            start = k * block + row * width
            if header.failed == FAILED:
                break
            x = carray(at_float32(values[start:].ctypes.data), (number, some, width))
            if record.factors:
                scaled = carray(at_float32(memory[0]), x.shape)
                scale(x, k, factors, factors_of_row, scaled)
                x = scaled if record.by_channel else carray(at_float32(memory[0]), (1, x.size, 1))
            if not add_in(x, k, k == 0 and row == 0, header, records, place):
                header.failed = FAILED
    release(memory)
    if header.failed != FAILED:
        records[place].size = size
    return True


@part
def count_one(own, context, headers):
    answer = word()
    found = carray(at_int64(answer), (1,))
    records = carray(at_record(headers[0].records), (own.first + own.number,))
    call(own.input, (context, 0, answer))
    value = found[0]
    call(own.info, (value, answer))
    info = found[0]
    found[0] = 0  # the kind has 32 bits
    call(own.kind, (info, answer))
    kind = found[0]
    call(own.rank, (info, answer))
    dims = carray(at_int64(axes()), (found[0],))
    if dims.size > MOST_AXES:
        call(own.release, (info,))
        headers[0].failed = FAILED
        return
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


@part
def count_input(op, context):
    own = carray(at_op(op), (1,))[0]
    answer = word()
    found = carray(at_int64(answer), (1,))
    call(own.input, (context, 1, answer))
    call(own.data, (found[0], answer))
    headers = carray(at_header(carray(at_int64(found[0]), (1,))[0]), (1,))
    if headers[0].failed == FINE:
        headers[0].failed = BUSY
        count_one(own, context, headers)
        if headers[0].failed == BUSY:
            headers[0].failed = FINE


@part
def ends_of(records, found):
    is_finite = True
    for k in range(records.size):
        record = records[k]
        if not record.size:
            found[k, 0], found[k, 1] = np.inf, -np.inf
            continue
        low = carray(at_int32(record.low), (record.channels,))
        high = carray(at_int32(record.high), (record.channels,))
        ends(low, high, found[k])
        is_finite &= np.isfinite(found[k, 0]) and np.isfinite(found[k, 1])
    return np.int64(is_finite)


@part
def widen_by(records):
    for k in range(records.size):
        record = records[k]
        if record.size and record.minimum:
            low = carray(at_int32(record.low), (record.channels,))
            high = carray(at_int32(record.high), (record.channels,))
            minimum = carray(at_float32(record.minimum), (record.channels,))
            maximum = carray(at_float32(record.maximum), (record.channels,))
            widen(low, high, minimum, maximum)
