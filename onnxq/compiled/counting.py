"""The loops of kernels.py that count tensors, and an op of onnxruntime's that runs them.

They are compiled when this module is imported, or read from where numba has cached them. The cache of a function is of this
file alone, so what is compiled into it has to be here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import carray  # pyright: ignore[reportPrivateImportUsage]
from numba.core import cgutils, types
from numba.extending import intrinsic

part = numba.njit(nogil=True)  # is compiled into the functions that call it, and not read from the cache by itself
FIRST_KEY, LAST_KEY, NO_MAGNITUDE = -(1 << 31), (1 << 31) - 1, (1 << 32) - 1
INFINITY = 0x7F800000
LOWEST_BIT = -200  # of an ExactSum, the first of its limbs of 32 bits
LIMBS = 14  # of it
WIDTH = 47  # an element is a number of up to 2^47 units, so that the sum of MOST_ROWS of them fits an int64
HIGHEST_UNIT = -126 - WIDTH  # of elements below 2^(e - 126), e being the exponent that the largest is written with
MOST_ROWS = 1 << 15
MOST_ADDITIONS = 8  # to a limb that is handed out
MOST_IN_CACHE = 1 << 13  # elements, for the three things that are done with them
MOST_LEVELS = 7  # of sums, each of elements' digits below the units of the one before it: 2^-149 is the last
WIDE = 16  # elements that are worked on at once: a vector of AVX-512, two of AVX2, four of NEON
INT32, INT64, DOUBLE = ir.IntType(32), ir.IntType(64), ir.DoubleType()
EXTENT = "int32[::1], int32[::1], int64[:,::1]"
COUNTS = "uint16[:,::1], int64[::1], int16[::1], int64[:,::1], int64, int64"


@part
def count(bits, tables, turn):
    one, half = np.uint16(1), np.uint32(16)
    whole = bits.size // 8 * 8
    for k in range(0, whole, 8):
        for j in range(8):
            tables[j, bits[k + j] >> half] += one
    for k in range(whole, bits.size):
        tables[(k + turn) % 8, bits[k] >> half] += one


@part
def key(bits):  # each step in 32 bits: numba would widen them, and a vector would hold half as many
    a = np.int32(bits)
    return np.int32(a ^ np.int32(np.int32(a >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@part
def magnitude(bits):  # less one, so that zeros are the largest
    return np.uint32(np.uint32(bits & np.uint32(0x7FFFFFFF)) - np.uint32(1))


@part
def span(bits, least, most):  # of fewer rows than make up vectors; the least magnitude
    near = np.uint32(NO_MAGNITUDE)
    for k in range(bits.size):
        a = bits[k]
        near = min(near, magnitude(a))
        least[k], most[k] = min(least[k], key(a)), max(most[k], key(a))
    return near


@part
def anchor_of(unit):  # 1.5 * 2^52 units of 2^unit: added to less than 2^51 of them, it leaves whole units
    return np.int64(((unit + 52 + 1023) << 52) | (1 << 51)).view(np.float64)


@part
def anchored(x, anchor):  # as an integer: the anchor's own, and the whole units in x
    return np.float64(np.float64(x) + anchor).view(np.uint64)


@part
def add(x, sums, anchor):
    for k in range(x.size):
        sums[k] += anchored(x[k], anchor)


@part
def rest_of(x, above):  # what is less than the units of the anchor above
    whole = np.float64(x) + above
    return np.float64(x) - (whole - above)


@part
def add_rest(x, sums, above, anchor):
    for k in range(x.size):
        sums[k] += anchored(rest_of(x[k], above), anchor)


def over_rows(kind: ir.Type, step: Callable[..., list[ir.Value]]) -> Any:
    """What goes over rows of memory, WIDE elements of each, with vectors of a kind that are in memory before and after.

    Its arguments are the address of the first element, the number of rows, the bytes from one to the next, the addresses of
    the vectors, and numbers that each step is given besides. What numba makes of loops over few rows spends more time before
    and after them than in them.
    """

    @intrinsic
    def go(typing, source, rows, stride, places, numbers):
        def code(context, builder, signature, values):
            start, (source, rows, stride) = builder.block, values[:3]
            given = [splat(builder, n) for n in cgutils.unpack_tuple(builder, values[4])]
            at = [builder.inttoptr(p, vector(kind).as_pointer()) for p in cgutils.unpack_tuple(builder, values[3])]
            loop, body, end = (builder.append_basic_block(name) for name in ("rows", "row", "end"))
            first = [builder.load(p, align=4) for p in at]
            builder.branch(loop)
            builder.position_at_end(loop)
            row, place, *held = [builder.phi(INT64), builder.phi(INT64), *(builder.phi(vector(kind)) for _ in at)]
            builder.cbranch(builder.icmp_signed("<", row, rows), body, end)
            builder.position_at_end(body)
            elements = builder.load(builder.inttoptr(place, vector(INT32).as_pointer()), align=4)
            made = step(builder, elements, held, given)
            ahead = [builder.add(row, INT64(1)), builder.add(place, stride), *made]
            for value, before, after in zip([row, place, *held], [INT64(0), source, *first], ahead, strict=True):
                value.add_incoming(before, start)
                value.add_incoming(after, body)
            builder.branch(loop)
            builder.position_at_end(end)
            for value, pointer in zip(held, at, strict=True):
                builder.store(value, pointer, align=4)
            return context.get_dummy_value()

        return types.void(source, rows, stride, places, numbers), code

    return go


def vector(kind: ir.Type) -> ir.VectorType:
    return ir.VectorType(kind, WIDE)


def splat(builder: Any, value: Any) -> ir.Value:
    """A vector of one value over and over."""
    empty = vector(value.type)(ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(empty, value, INT32(0)), empty, every(0))


def every(number: int) -> ir.Constant:
    return ir.Constant(vector(INT32), [number] * WIDE)


def span_step(b: Any, bits: ir.Value, held: list[ir.Value], _: list[ir.Value]) -> list[ir.Value]:
    """Least and largest key so far, and the least magnitude less one, see `key` and `magnitude`."""
    least, most, near = held
    keys = b.xor(bits, b.and_(b.ashr(bits, every(31)), every(0x7FFFFFFF)))
    size = b.sub(b.and_(bits, every(0x7FFFFFFF)), every(1))
    return [
        b.select(b.icmp_signed("<", keys, least), keys, least),
        b.select(b.icmp_signed(">", keys, most), keys, most),
        b.select(b.icmp_unsigned("<", size, near), size, near),
    ]


def sum_step(b: Any, bits: ir.Value, held: list[ir.Value], numbers: list[ir.Value]) -> list[ir.Value]:
    """The sums so far of `anchored(x, anchor)`, or of `anchored(rest_of(x, above), anchor)` where two numbers are given."""
    x = b.fpext(b.bitcast(bits, vector(ir.FloatType())), vector(DOUBLE))
    for above in numbers[:-1]:
        x = b.fsub(x, b.fsub(b.fadd(x, above), above))
    return [b.add(held[0], b.bitcast(b.fadd(x, numbers[-1]), vector(INT64)))]


span_rows, sum_rows = over_rows(INT32, span_step), over_rows(INT64, sum_step)


@part
def digits_below(x, unit, level, rest):  # what is less than the units of all levels above this one
    for k in range(x.size):
        rest[k] = x[k]
    for above in range(level):
        anchor = anchor_of(unit - above * (WIDTH + 1))
        for k in range(x.size):
            rest[k] = rest_of(rest[k], anchor)


@part
def settle(sums, lanes, own, number, unit, sign, total, whole):  # of `number` elements to a channel; adds < 2^49 to a limb
    base = np.uint64(number) * np.float64(anchor_of(unit)).view(np.uint64)
    for c in range(own):
        whole[c] = -base
    for row in range(0, sums.size, lanes):
        for c in range(own):
            whole[c] += sums[row + c]
    first = unit - LOWEST_BIT
    for step in range(4):  # in pieces of 18 bits, so that each fits an int64 after its shift
        limb, place = (first + 18 * step) >> 5, (first + 18 * step) & 31
        row = total[limb]
        for c in range(own):
            piece = np.int64(whole[c]) >> (18 * step)
            if step < 3:
                piece &= 0x3FFFF
            row[c] += sign * (piece << place)
    sums[:] = np.uint64(0)


@numba.njit("void(int64[:,:])", cache=True, nogil=True)
def carry(limbs):
    for k in range(limbs.shape[0] - 1):
        row, next_row = limbs[k], limbs[k + 1]
        for c in range(limbs.shape[1]):
            above = row[c] >> 32
            row[c] -= above << 32
            next_row[c] += above


@part
def any_of(tables, start):
    found = np.uint16(0)
    for j in range(8):
        row = tables[j, start : start + 128]
        for k in range(128):
            found |= row[k]
    return found != 0


@part
def move(tables, start, row, sign):
    end = start + 128
    a, b, c, d = tables[0, start:end], tables[1, start:end], tables[2, start:end], tables[3, start:end]
    e, f, g, h = tables[4, start:end], tables[5, start:end], tables[6, start:end], tables[7, start:end]
    for k in range(128):
        one = (np.uint32(a[k]) + np.uint32(b[k])) + (np.uint32(c[k]) + np.uint32(d[k]))
        other = (np.uint32(e[k]) + np.uint32(f[k])) + (np.uint32(g[k]) + np.uint32(h[k]))
        row[k] += sign * np.int64(one + other)
    for j in range(8):
        tables[j, start:end] = np.uint16(0)


@numba.njit(f"int64({COUNTS})", cache=True, nogil=True)
def drain(tables, seen, slots, rows, used, sign):
    ends = np.array([seen[1], seen[0] ^ 0x7FFFFFFF]) & 0x7FFFFFFF  # the largest magnitudes above and below zero
    is_there = np.array([seen[1] >= 0, seen[0] < 0])
    first = ((seen[2] + 1) & 0x7FFFFFFF) >> 23
    for side in range(2):
        if not is_there[side]:
            continue
        for step in range((ends[side] >> 23) + 1):
            if 0 < step < first:
                continue
            page = side * 256 + step
            if not any_of(tables, page * 128):
                continue
            slot = slots[page]
            if slot < 0:
                if used == rows.shape[0]:
                    return -1
                slot = np.int16(used)
                slots[page] = slot
                used += 1
            move(tables, page * 128, rows[slot], sign)
    seen[0], seen[1], seen[2] = LAST_KEY, FIRST_KEY, NO_MAGNITUDE
    return used


@part
def reach(least, most, near, lanes, own):  # the largest magnitude, and the least but zero
    low, high, small = np.int32(LAST_KEY), np.int32(FIRST_KEY), np.uint32(NO_MAGNITUDE)
    for row in range(0, least.size, lanes):
        for k in range(row, row + own):
            low, high = min(low, least[k]), max(high, most[k])
    for k in range(near.size):
        small = min(small, near[k])
    return max(np.int64(high), -1 - np.int64(low)), np.int64(small) + 1


@part
def span_of(bits):
    low, high, small = np.int32(LAST_KEY), np.int32(FIRST_KEY), np.uint32(NO_MAGNITUDE)
    for k in range(bits.size):
        a = bits[k]
        small = min(small, magnitude(a))
        low, high = min(low, key(a)), max(high, key(a))
    return low, high, small


@part
def sum_of(x, anchor):
    found = np.uint64(0)
    for k in range(x.size):
        found += anchored(x[k], anchor)
    return found


@part
def sum_of_rest(x, above, anchor):
    found = np.uint64(0)
    for k in range(x.size):
        found += anchored(rest_of(x[k], above), anchor)
    return found


@part
def observe_rows(x, first, low, high, total, tables, seen, sign):  # channel by channel, the elements of one being neighbours
    rows, channels = x.shape[1], low.size
    most = max(1, MOST_IN_CACHE // rows)  # channels that are taken together
    bits, values, number = x.view(np.uint32).reshape(-1), x.reshape(-1), x.shape[0]
    sums, rest, whole = np.empty(most, np.uint64), np.empty(min(rows, MOST_IN_CACHE)), np.empty(most, np.uint64)
    smallest, start, additions = np.uint32(NO_MAGNITUDE), 0, 0
    while start < bits.size:
        block = start // rows
        channel = (first + block) % channels
        if not channel and block and start % rows == 0:
            carry(total)
        count_of = min(most, number - block, channels - channel)
        length = min(rows - start % rows, MOST_IN_CACHE)  # of each
        into = total[:, channel : channel + count_of]
        end = start + count_of * length
        count(bits[start:end], tables, block)
        largest, small = np.int64(0), np.uint32(NO_MAGNITUDE)
        for k in range(count_of):
            a, b, near = span_of(bits[start + k * length : start + (k + 1) * length])
            low[channel + k], high[channel + k] = min(low[channel + k], a), max(high[channel + k], b)
            largest, small = max(largest, np.int64(b), -1 - np.int64(a)), min(small, near)
        smallest = min(smallest, small)
        if largest < INFINITY:  # else such an array has no sum
            unit, digit = max(1, largest >> 23) + HIGHEST_UNIT, max(1, (np.int64(small) + 1) >> 23) - 150
            for level in range(MOST_LEVELS):
                own = unit - level * (WIDTH + 1)
                if level and own + WIDTH + 1 <= digit:
                    break
                anchor, above = anchor_of(own), anchor_of(own + WIDTH + 1)
                for k in range(count_of):
                    row = values[start + k * length : start + (k + 1) * length]
                    if level == 0:
                        sums[k] = sum_of(row, anchor)
                    elif level == 1:
                        sums[k] = sum_of_rest(row, above, anchor)
                    else:
                        digits_below(row, unit, level, rest)
                        sums[k] = sum_of(rest[:length], anchor)
                settle(sums[:count_of], count_of, count_of, length, own, sign, into, whole)
                additions += 1
                if additions == MOST_ADDITIONS:
                    carry(into)
                    additions = 0
        start = end
    seen[2] = min(seen[2], np.int64(smallest))


@part
def observe_blocks(x, first, low, high, total, tables, seen, sign):  # block by block, the channels of one being neighbours
    rows, lanes, channels = x.shape[1], x.shape[2], low.size
    together = 1  # rows that make up whole vectors
    while together * lanes % WIDE:
        together += together
    blocks, width = (channels + lanes - 1) // lanes, together * lanes
    step = together * max(1, MOST_IN_CACHE // width)  # rows that stay in the cache for the three things done with them
    bits = x.view(np.uint32)
    least, most, near = np.empty(width, np.int32), np.empty(width, np.int32), np.empty(WIDE, np.uint32)
    sums, lower, last = np.zeros(width, np.uint64), np.zeros(width, np.uint64), np.zeros(width, np.uint64)
    rest, packed = np.empty(width), np.empty(step * lanes if channels % lanes else 0, np.uint32)
    uncarried, whole = np.zeros(blocks, np.int32), np.empty(lanes, np.uint64)
    for b in range(x.shape[0]):
        channel = (first + b) % blocks * lanes
        own = min(lanes, channels - channel)
        into = total[:, channel : channel + own]
        least[:], most[:], near[:] = np.int32(LAST_KEY), np.int32(FIRST_KEY), np.uint32(NO_MAGNITUDE)
        unit, since, since_lower, additions = 0, 0, 0, 2  # of the sums; rows in them, in two levels; to the limbs
        for start in range(0, rows, step):
            end = min(rows, start + step)
            block, values = bits[b, start:end].reshape(-1), x[b, start:end].reshape(-1)
            if own == lanes:
                count(block, tables, b)
            else:
                k = 0
                for r in range(start, end):
                    for c in range(own):
                        packed[k] = bits[b, r, c]
                        k += 1
                count(packed[:k], tables, b)
            number, source, stride = block.size // width, block.ctypes.data, 4 * width  # of vectors above each other
            odd = number * width
            for k in range(0, width, WIDE):
                places = (least.ctypes.data + 4 * k, most.ctypes.data + 4 * k, near.ctypes.data)
                span_rows(source + 4 * k, number, stride, places, ())
            near[0] = min(near[0], span(block[odd:], least, most))
            largest, smallest = reach(least, most, near, lanes, own)
            if largest >= INFINITY:  # such an array has no sum
                continue
            exponent, digit = max(1, largest >> 23), max(1, smallest >> 23) - 150  # the last digit of the least element
            if since and (unit != exponent + HIGHEST_UNIT or since + (end - start) > MOST_ROWS):
                settle(sums, lanes, own, since, unit, sign, into, whole)
                if since_lower:
                    settle(lower, lanes, own, since_lower, unit - (WIDTH + 1), sign, into, whole)
                since, since_lower, additions = 0, 0, additions + 2
            unit, since = exponent + HIGHEST_UNIT, since + (end - start)
            anchor, below = anchor_of(unit), anchor_of(unit - (WIDTH + 1))
            for k in range(0, width, WIDE):
                sum_rows(source + 4 * k, number, stride, (sums.ctypes.data + 8 * k,), (anchor,))
            add(values[odd:], sums, anchor)
            if unit > digit:
                since_lower += end - start
                for k in range(0, width, WIDE):
                    sum_rows(source + 4 * k, number, stride, (lower.ctypes.data + 8 * k,), (anchor, below))
                add_rest(values[odd:], lower, anchor, below)
            level = 2
            while unit - (level - 1) * (WIDTH + 1) > digit:
                anchor = anchor_of(unit - level * (WIDTH + 1))
                for k in range(0, block.size, width):
                    part_of = values[k : k + width]
                    digits_below(part_of, unit, level, rest)
                    add(rest[: part_of.size], last, anchor)
                settle(last, lanes, own, end - start, unit - level * (WIDTH + 1), sign, into, whole)
                level, additions = level + 1, additions + 1
        if since:
            settle(sums, lanes, own, since, unit, sign, into, whole)
        if since_lower:
            settle(lower, lanes, own, since_lower, unit - (WIDTH + 1), sign, into, whole)
        uncarried[channel // lanes] += additions
        if uncarried[channel // lanes] > MOST_ADDITIONS:
            carry(into)
            uncarried[channel // lanes] = 0
        for row in range(together):
            for c in range(own):
                low[channel + c] = min(low[channel + c], least[row * lanes + c])
                high[channel + c] = max(high[channel + c], most[row * lanes + c])
        for k in range(WIDE):
            seen[2] = min(seen[2], np.int64(near[k]))


@numba.njit(f"int64(float32[:,:,::1], int64, boolean, {EXTENT}, {COUNTS})", cache=True, nogil=True)
def observe(x, first, is_new, low, high, total, tables, seen, slots, pages, used, sign):
    if is_new:
        low[:], high[:] = np.int32(LAST_KEY), np.int32(FIRST_KEY)
    if x.shape[2] == 1:
        observe_rows(x, first, low, high, total, tables, seen, sign)
    else:
        observe_blocks(x, first, low, high, total, tables, seen, sign)
    for c in range(low.size):
        seen[0], seen[1] = min(seen[0], np.int64(low[c])), max(seen[1], np.int64(high[c]))
    return drain(tables, seen, slots, pages, used, sign)


@numba.njit("UniTuple(float64, 2)(int32[::1], int32[::1])", cache=True)
def ends(low, high):
    both = np.array([LAST_KEY, FIRST_KEY], np.int32)
    for c in range(low.size):
        both[0], both[1] = min(both[0], low[c]), max(both[1], high[c])
    both[0], both[1] = key(both[0]), key(both[1])
    found = both.view(np.float32)
    return np.float64(found[0]) + 0.0, np.float64(found[1]) + 0.0


@numba.njit("void(int32[::1], int32[::1], float32[::1], float32[::1])", cache=True)
def widen(low, high, minimum, maximum):
    zero = np.float32(0)
    for c in range(low.size):
        minimum[c] = min(minimum[c], np.int32(key(low[c])).view(np.float32) + zero)
        maximum[c] = max(maximum[c], np.int32(key(high[c])).view(np.float32) + zero)


# An op of the runtime's own that counts what it reads, see tally.py. The types are those of the memory that it works on.
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
def times(x, lanes, factors, channels, inner):  # the channels of an array, in blocks of lanes, times factors
    made = np.empty(x.size, np.float32)
    blocks = (channels + lanes - 1) // lanes
    for b in range(x.size // (inner * lanes)):
        for lane in range(lanes):
            c = b % blocks * lanes + lane
            factor = factors[c] if c < channels else np.float32(1)
            for k in range(b * inner * lanes + lane, (b + 1) * inner * lanes, lanes):
                made[k] = x[k] * factor
    return made


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
    if record.factors:
        number = 0 if dims.size < 2 else record.blocked if record.blocked else dims[1]
        if number != record.number:
            return False
        factors = carray(at_float32(record.factors), (number,))
        values = times(values, lanes if record.blocked else 1, factors, number, product(dims[2:]))
    block = inner * width
    together, rows = MOST_AT_ONCE // block, max(1, MOST_AT_ONCE // width)
    if together:
        for k in range(0, count, together):
            number = min(together, count - k)
            x = values[k * block : (k + number) * block].reshape(number, inner, width)
            add_in(x, k, k == 0, header, records, place)
    else:
        for k in range(count):
            for row in range(0, inner, rows):
                number = min(rows, inner - row)
                start = k * block + row * width
                x = values[start : start + number * width].reshape(1, number, width)
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
