"""The loops of kernels.py that count tensors."""

from __future__ import annotations

import numpy as np
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from onnxq.compiled import NO_MEMORY, TABLES
from onnxq.compiled.places import (
    allot,
    at_float32,
    at_float64,
    at_int16,
    at_int32,
    at_int64,
    at_uint16,
    at_uint32,
    at_uint64,
    bits_of,
    floats,
    is_there,
    loop_of,
    part,
    release,
)
from onnxq.compiled.vectors import (
    WIDE,
    count_elements,
    count_halves,
    ends_of_vectors,
    look_over,
    span_rows,
    span_some,
    span_squeeze,
    squeeze,
    sum_rows,
    sum_some,
)

FIRST_KEY, LAST_KEY, NO_MAGNITUDE = -(1 << 31), (1 << 31) - 1, (1 << 32) - 1
INFINITY = 0x7F800000
LOWEST_BIT = -200  # of an ExactSum, the first of its limbs of 32 bits
LIMBS = 14  # of it
WIDTH = 47  # an element is a number of up to 2^47 units, so that the sum of MOST_ROWS of them fits an int64
HIGHEST_UNIT = -126 - WIDTH  # of elements below 2^(e - 126), e being the exponent that the largest is written with
MARGIN = 2  # what comes may be so many times 2 as large as what was seen: sums begin before it is known how large it is
PEEK = 512  # elements that tell of the others
LEAST_IN_ONE_PASS = 256  # elements of a row; what is made ready for one pass takes as long as those
MOST_ROWS = 1 << 15
MOST_ADDITIONS = 8  # to a limb that is handed out
MOST_IN_CACHE = 1 << 15  # elements, for the things that are done with them one after another
MOST_LEVELS = 7  # of sums, each of elements' digits below the units of the one before it: 2^-149 is the last
call_observe_at, call_drain_at = loop_of("observe_at", 18), loop_of("drain_at", 8)


@part
def key(bits):  # each step in 32 bits: numba would widen them, and a vector would hold half as many
    a = np.int32(bits)
    return np.int32(a ^ np.int32(np.int32(a >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@part
def element(ordered):  # of a key; both zeros are 0
    return np.int32(key(ordered)).view(np.float32) + np.float32(0)


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
def likely_unit(bits):  # of sums of elements that begin with these
    largest = np.uint32(0)
    for k in range(min(bits.size, PEEK)):
        largest = max(largest, np.uint32(bits[k] & np.uint32(0x7FFFFFFF)))
    return min(max(1, np.int64(largest) >> 23), 254) + MARGIN + HIGHEST_UNIT


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


@part
def count_bins(bins, tables):
    whole = bins.size // 16 * 16
    count_halves(bins.ctypes.data, whole // 4, tables.ctypes.data, tables.strides[0])
    for k in range(whole, bins.size):
        tables[k % TABLES, bins[k]] += np.uint32(1)


@part
def count_bits(bits, tables):
    whole = bits.size // 8 * 8
    count_elements(bits.ctypes.data, whole // 2, tables.ctypes.data, tables.strides[0])
    for k in range(whole, bits.size):
        tables[k % TABLES, bits[k] >> np.uint32(16)] += np.uint32(1)


@part
def count_squeezed(bits, tables, bins):  # as `count_bits`; how many are not in bin 0, or -1 where that is slow to tell
    whole = bits.size // WIDE * WIDE
    number = squeeze(bits.ctypes.data, whole // WIDE, bins.ctypes.data)
    if number >= 0:
        count_bins(bins[:number], tables)
        tables[0, 0] += np.uint32(whole - number)
        count_bits(bits[whole:], tables)
    return number


@part
def span_and_count_squeezed(bits, ends, tables, bins, waiting, spare):  # of whole vectors; `waiting` bins are counted
    place, stride = tables.ctypes.data, tables.strides[0]
    number, counted = span_squeeze(
        bits.ctypes.data, bits.size // WIDE, ends, spare.ctypes.data, bins.ctypes.data, waiting, place, stride
    )
    if number >= 0:
        count_bins(bins[counted:waiting], tables)
        tables[0, 0] += np.uint32(bits.size - number)
    return number


@part
def are_few_zeros(number, size):  # of elements, when so many are not; then it takes less to count them with the others
    return 4 * number > 3 * size


@part
def uncount(block, lanes, own, least, most, tables):  # what is no channel's; as a rule it is one value, all zeros
    rows, one = block.size // lanes, np.uint32(1)
    for lane in range(own, lanes):
        low, high = least[lane], most[lane]
        for k in range(lane, least.size, lanes):
            low, high = min(low, least[k]), max(high, most[k])
        if low == high:
            tables[lane % TABLES, np.uint32(key(low)) >> np.uint32(16)] -= np.uint32(rows)
            continue
        for k in range(lane, block.size, lanes):
            tables[lane % TABLES, block[k] >> np.uint32(16)] -= one


@part
def digits_below(x, unit, level, rest):  # what is less than the units of all levels above this one
    for k in range(x.size):
        rest[k] = x[k]
    for above in range(level):
        anchor = anchor_of(unit - above * (WIDTH + 1))
        for k in range(x.size):
            rest[k] = rest_of(rest[k], anchor)


@part
def settle(sums, lanes, number, unit, sign, total, channel, whole):  # of `number` elements to each; adds < 2^49 to a limb
    own, base = whole.size, np.uint64(number) * np.float64(anchor_of(unit)).view(np.uint64)
    whole[:] = -base
    for row in range(0, sums.size, lanes):
        some = sums[row : row + own]
        for c in range(own):
            whole[c] += some[c]
    if sign < 0:
        for c in range(own):
            whole[c] = -whole[c]
    first = unit - LOWEST_BIT
    for step in range(4):  # in pieces of 18 bits, so that each fits an int64 after its shift
        limb, place = (first + 18 * step) >> 5, (first + 18 * step) & 31
        row = total[limb, channel : channel + own]
        for c in range(own):
            piece = np.int64(whole[c]) >> (18 * step)
            if step < 3:
                piece &= 0x3FFFF
            row[c] += piece << place
    sums[:] = np.uint64(0)


@part
def settle_both(sums, lower, lanes, number, number_lower, unit, sign, total, channel, whole):  # in units, and below them
    if number:
        settle(sums, lanes, number, unit, sign, total, channel, whole)
    if number_lower:
        settle(lower, lanes, number_lower, unit - (WIDTH + 1), sign, total, channel, whole)


@part
def carry(limbs):
    for k in range(limbs.shape[0] - 1):
        row, next_row = limbs[k], limbs[k + 1]
        for c in range(limbs.shape[1]):
            above = row[c] >> 32
            row[c] -= above << 32
            next_row[c] += above


@part
def any_of(tables, start):
    found = np.uint32(0)
    for j in range(TABLES):
        row = tables[j, start : start + 128]
        for k in range(128):
            found |= row[k]
    return found != 0


@part
def move(tables, start, row, sign):
    end = start + 128
    a, b, c, d = tables[0, start:end], tables[1, start:end], tables[2, start:end], tables[3, start:end]
    flip = np.int64(sign) >> 63  # which takes a number to its negative, less one
    for k in range(128):
        number = np.int64(np.uint32(np.uint32(a[k] + b[k]) + np.uint32(c[k] + d[k])))
        row[k] += (number ^ flip) - flip
    for j in range(TABLES):
        tables[j, start:end] = np.uint32(0)


@part
def drain_at(counts, stride, span, pages, places, capacity, used, sign):
    tables, seen = carray(at_uint32(counts), (TABLES, stride)), carray(at_int64(span), (3,))
    slots, rows = carray(at_int16(pages), (512,)), carray(at_int64(places), (capacity, 128))
    ends = (seen[1] & 0x7FFFFFFF, ~seen[0] & 0x7FFFFFFF)  # the largest magnitudes above and below zero
    sides = (seen[1] >= 0, seen[0] < 0)  # that there are elements on
    first = ((seen[2] + 1) & 0x7FFFFFFF) >> 23
    for side in range(2):
        if not sides[side]:
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
def drain(tables, seen, slots, rows, used, sign):
    return call_drain_at((
        tables.ctypes.data, tables.shape[1], seen.ctypes.data, slots.ctypes.data, rows.ctypes.data, rows.shape[0], used,
        sign,
    ))  # fmt: skip


@part
def reach(least, most, near, lanes, own):  # the largest magnitude, and the least but zero
    low, high, small = ends_of_vectors(least.ctypes.data, most.ctypes.data, near.ctypes.data)
    if own < lanes or least.size != WIDE:
        low, high = np.int32(LAST_KEY), np.int32(FIRST_KEY)
        for row in range(0, least.size, lanes):
            below, above = least[row : row + own], most[row : row + own]
            for c in range(own):
                low, high = min(low, below[c]), max(high, above[c])
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
def look_at_row(bits, values, anchor, tables, least, most, near, sums):  # its keys' ends, least magnitude, sum; all counted
    least[:], most[:], near[:], sums[:] = np.int32(LAST_KEY), np.int32(FIRST_KEY), np.uint32(NO_MAGNITUDE), np.uint64(0)
    ends, whole = (least.ctypes.data, most.ctypes.data, near.ctypes.data), bits.size // WIDE * WIDE
    place, stride = tables.ctypes.data, tables.strides[0]
    look_over(bits.ctypes.data, whole // WIDE, 4 * WIDE, ends, sums.ctypes.data, anchor, place, stride)
    count_bits(bits[whole:], tables)
    add(values[whole:], sums, anchor)
    low, high, small = span_of(bits[whole:])
    total = np.uint64(0)
    for k in range(WIDE):
        low, high, small, total = min(low, least[k]), max(high, most[k]), min(small, near[k]), total + sums[k]
    return low, high, small, total


@part
def observe_rows(x, first, low, high, total, tables, seen, sign):  # channel by channel, the elements of one being neighbours
    rows, channels = x.shape[1], low.size
    most = max(1, MOST_IN_CACHE // rows)  # channels that are taken together
    bits, values, number = bits_of(x), floats(x), x.shape[0]
    room = min(rows, MOST_IN_CACHE)
    memory = allot((8 * most, 8 * room, 8 * most, 2 * (MOST_IN_CACHE + WIDE), 4 * WIDE, 4 * WIDE, 4 * WIDE, 8 * WIDE))
    if not is_there(memory):
        release(memory)
        return False
    sums, rest = carray(at_uint64(memory[0]), (most,)), carray(at_float64(memory[1]), (room,))
    whole, bins = carray(at_uint64(memory[2]), (most,)), carray(at_uint16(memory[3]), (MOST_IN_CACHE + WIDE,))
    lows, highs = carray(at_int32(memory[4]), (WIDE,)), carray(at_int32(memory[5]), (WIDE,))
    nears, parts = carray(at_uint32(memory[6]), (WIDE,)), carray(at_uint64(memory[7]), (WIDE,))
    smallest, start, additions = np.uint32(NO_MAGNITUDE), 0, 0
    few_zeros, turn, guess = False, 0, likely_unit(bits)
    while start < bits.size:
        block = start // rows
        channel = (first + block) % channels
        if not channel and block and start % rows == 0:
            carry(total)
        count_of = min(most, number - block, channels - channel)
        length = min(rows - start % rows, MOST_IN_CACHE)  # of each
        into = total[:, channel : channel + count_of]
        end, found = start + count_of * length, -1
        if not few_zeros or turn % 8 == 0:
            found = count_squeezed(bits[start:end], tables, bins)
            few_zeros = are_few_zeros(found, end - start) if found >= 0 else few_zeros
        turn += 1
        in_one_pass = found < 0 and length >= LEAST_IN_ONE_PASS
        if found < 0 and not in_one_pass:
            count_bits(bits[start:end], tables)
        largest, small, anchor = np.int64(0), np.uint32(NO_MAGNITUDE), anchor_of(guess)
        for k in range(count_of):
            at, up_to = start + k * length, start + (k + 1) * length
            if in_one_pass:
                a, b, near, sums[k] = look_at_row(
                    bits[at:up_to], values[at:up_to], anchor, tables, lows, highs, nears, parts
                )
            else:
                a, b, near = span_of(bits[at:up_to])
            low[channel + k], high[channel + k] = min(low[channel + k], a), max(high[channel + k], b)
            largest, small = max(largest, np.int64(b), -1 - np.int64(a)), min(small, near)
        smallest = min(smallest, small)
        if largest < INFINITY:  # else such an array has no sum
            unit, digit = max(1, largest >> 23) + HIGHEST_UNIT, max(1, (np.int64(small) + 1) >> 23) - 150
            is_summed, next_guess = in_one_pass and unit <= guess, unit + MARGIN
            unit, guess = guess if is_summed else unit, next_guess
            for level in range(MOST_LEVELS):
                own = unit - level * (WIDTH + 1)
                if level and own + WIDTH + 1 <= digit:
                    break
                anchor, above = anchor_of(own), anchor_of(own + WIDTH + 1)
                for k in range(count_of):
                    row = values[start + k * length : start + (k + 1) * length]
                    if level == 0:
                        sums[k] = sums[k] if is_summed else sum_of(row, anchor)
                    elif level == 1:
                        sums[k] = sum_of_rest(row, above, anchor)
                    else:
                        digits_below(row, unit, level, rest)
                        sums[k] = sum_of(rest[:length], anchor)
                settle(sums[:count_of], count_of, length, own, sign, total, channel, whole[:count_of])
                additions += 1
                if additions == MOST_ADDITIONS:
                    carry(into)
                    additions = 0
        start = end
    seen[2] = min(seen[2], np.int64(smallest))
    release(memory)
    return True


@part
def span_vectors(source, number, width, least, most, near):  # of so many rows; all by their addresses
    for k in range(0, width, WIDE):
        ends = (least + 4 * k, most + 4 * k, near)
        if k + WIDE <= width:
            span_rows(source + 4 * k, number, 4 * width, ends, (), WIDE)
        else:
            span_some(source + 4 * k, number, 4 * width, ends, (), width - k)


@part
def sum_vectors(source, number, width, sums, anchors):
    for k in range(0, width, WIDE):
        if k + WIDE <= width:
            sum_rows(source + 4 * k, number, 4 * width, (sums + 8 * k,), anchors, WIDE)
        else:
            sum_some(source + 4 * k, number, 4 * width, (sums + 8 * k,), anchors, width - k)


@part
def look_over_vectors(source, number, width, least, most, near, sums, anchor, tables, stride):  # all three in one pass
    for k in range(0, width, WIDE):
        ends = (least + 4 * k, most + 4 * k, near)
        if k + WIDE <= width:
            look_over(source + 4 * k, number, 4 * width, ends, sums + 8 * k, anchor, tables, stride)
            continue
        span_some(source + 4 * k, number, 4 * width, ends, (), width - k)
        sum_some(source + 4 * k, number, 4 * width, (sums + 8 * k,), (anchor,), width - k)
        for row in range(number):
            place = source + 4 * (row * width + k)
            count_bits(carray(at_uint32(place), (width - k,)), carray(at_uint32(tables), (TABLES, stride // 4)))


@part
def observe_blocks(x, first, low, high, total, tables, seen, sign):  # block by block, the channels of one being neighbours
    rows, lanes, channels = x.shape[1], x.shape[2], low.size
    together = 1  # rows that make up whole vectors, of few lanes
    while lanes < WIDE and together * lanes % WIDE and 2 * together <= rows:
        together += together
    blocks, width = (channels + lanes - 1) // lanes, together * lanes
    room = (width + WIDE - 1) // WIDE * WIDE  # of vectors
    step = together * max(32, MOST_IN_CACHE // width)  # rows that stay in the cache
    step = min(step, rows)
    some = step * lanes
    memory = allot((
        4 * room, 4 * room, 4 * WIDE, 8 * room, 8 * room, 8 * width, 2 * (some + WIDE), 2 * (some + WIDE), 8 * width,
        8 * room, 4 * blocks, 8 * lanes,
    ))  # fmt: skip
    if not is_there(memory):
        release(memory)
        return False
    least, most = carray(at_int32(memory[0]), (room,)), carray(at_int32(memory[1]), (room,))
    near, last = carray(at_uint32(memory[2]), (WIDE,)), carray(at_uint64(memory[5]), (width,))
    sums, lower = carray(at_uint64(memory[3]), (room,)), carray(at_uint64(memory[4]), (room,))
    bins, spare = carray(at_uint16(memory[6]), (some + WIDE,)), carray(at_uint16(memory[7]), (some + WIDE,))
    waiting = 0  # bins, of the block before, which are counted while there is something else to do
    rest = carray(at_float64(memory[8]), (width,))
    uncarried = carray(at_int32(memory[10]), (blocks,))
    sums[:], lower[:], last[:], uncarried[:] = np.uint64(0), np.uint64(0), np.uint64(0), np.int32(0)
    before = carray(at_uint64(memory[9]), (room,))  # the sums, should they have begun in units that are too small
    ends, into_sums = (least.ctypes.data, most.ctypes.data, near.ctypes.data), sums.ctypes.data
    place, stride = tables.ctypes.data, tables.strides[0]
    few_zeros, turn, guess = False, 0, likely_unit(bits_of(x[:1, : 1 + PEEK // lanes]))
    for b in range(x.shape[0]):
        channel = (first + b) % blocks * lanes
        own = min(lanes, channels - channel)
        whole, into = carray(at_uint64(memory[11]), (own,)), total[:, channel : channel + own]
        least[:], most[:], near[:] = np.int32(LAST_KEY), np.int32(FIRST_KEY), np.uint32(NO_MAGNITUDE)
        unit, since, since_lower, additions = 0, 0, 0, 2  # of the sums; rows in them, in two levels; to the limbs
        for start in range(0, rows, step):
            end = min(rows, start + step)
            block, values = bits_of(x[b, start:end]), floats(x[b, start:end])
            number, source = block.size // width, block.ctypes.data  # of rows of vectors
            odd, found, is_summed = number * width, -1, False
            if since and since + (end - start) > MOST_ROWS:
                settle_both(sums[:width], lower[:width], lanes, since, since_lower, unit, sign, total, channel, whole)
                since, since_lower, additions = 0, 0, additions + 2
            unit = unit if since else guess
            if not few_zeros or turn % 8 == 0:
                if width == WIDE:
                    found = span_and_count_squeezed(block[:odd], ends, tables, bins, waiting, spare)
                    if found >= 0:
                        bins, spare, waiting = spare, bins, found
                        count_bits(block[odd:], tables)
                else:
                    found = count_squeezed(block, tables, spare)
                    if found >= 0:
                        span_vectors(source, number, width, *ends)
                few_zeros = are_few_zeros(found, block.size) if found >= 0 else few_zeros
            if found < 0:
                for k in range(room):
                    before[k] = sums[k]
                look_over_vectors(source, number, width, *ends, into_sums, anchor_of(unit), place, stride)
                count_bits(block[odd:], tables)
                is_summed = True
            turn += 1
            near[0] = min(near[0], span(block[odd:], least, most))
            if own < lanes:
                uncount(block, lanes, own, least[:width], most[:width], tables)
            largest, smallest = reach(least[:width], most[:width], near, lanes, own)
            seen[2] = min(seen[2], smallest - 1)
            exponent, digit = max(1, largest >> 23), max(1, smallest >> 23) - 150  # the last digit of the least element
            if is_summed and (largest >= INFINITY or exponent + HIGHEST_UNIT > unit):
                for k in range(room):
                    sums[k] = before[k]
                is_summed = False
            if largest >= INFINITY:  # such an array has no sum
                continue
            if since and exponent + HIGHEST_UNIT > unit:
                settle_both(sums[:width], lower[:width], lanes, since, since_lower, unit, sign, total, channel, whole)
                since, since_lower, additions = 0, 0, additions + 2
            guess = exponent + HIGHEST_UNIT + MARGIN
            unit = unit if since or is_summed else guess
            since += end - start
            anchor, below = anchor_of(unit), anchor_of(unit - (WIDTH + 1))
            if not is_summed:
                sum_vectors(source, number, width, into_sums, (anchor,))
            add(values[odd:], sums, anchor)
            if unit > digit:
                since_lower += end - start
                sum_vectors(source, number, width, lower.ctypes.data, (anchor, below))
                add_rest(values[odd:], lower, anchor, below)
            level = 2
            while unit - (level - 1) * (WIDTH + 1) > digit:
                anchor = anchor_of(unit - level * (WIDTH + 1))
                for k in range(0, block.size, width):
                    part_of = values[k : k + width]
                    digits_below(part_of, unit, level, rest)
                    add(rest[: part_of.size], last, anchor)
                settle(last, lanes, end - start, unit - level * (WIDTH + 1), sign, total, channel, whole)
                level, additions = level + 1, additions + 1
        settle_both(sums[:width], lower[:width], lanes, since, since_lower, unit, sign, total, channel, whole)
        uncarried[channel // lanes] += additions
        if uncarried[channel // lanes] > MOST_ADDITIONS:
            carry(into)
            uncarried[channel // lanes] = 0
        lows, highs = low[channel : channel + own], high[channel : channel + own]
        for row in range(0, width, lanes):
            ends_below, ends_above = least[row : row + own], most[row : row + own]
            for c in range(own):
                lows[c], highs[c] = min(lows[c], ends_below[c]), max(highs[c], ends_above[c])
    count_bins(bins[:waiting], tables)
    release(memory)
    return True


@part
def observe_at(
    data, number, rows, lanes, first, is_new, lows, highs, channels, totals, counts, stride, span, pages, places, capacity,
    used, sign,
):  # fmt: skip
    x = carray(at_float32(data), (number, rows, lanes))
    low, high = carray(at_int32(lows), (channels,)), carray(at_int32(highs), (channels,))
    total, seen = carray(at_int64(totals), (LIMBS, channels)), carray(at_int64(span), (3,))
    tables = carray(at_uint32(counts), (TABLES, stride))
    if is_new:
        low[:], high[:] = np.int32(LAST_KEY), np.int32(FIRST_KEY)
    if number * rows * lanes * channels == 0:
        return used
    if lanes == 1:
        is_done = observe_rows(x, first, low, high, total, tables, seen, sign)
    else:
        is_done = observe_blocks(x, first, low, high, total, tables, seen, sign)
    if not is_done:
        return NO_MEMORY
    for c in range(channels):
        seen[0], seen[1] = min(seen[0], np.int64(low[c])), max(seen[1], np.int64(high[c]))
    return call_drain_at((counts, stride, span, pages, places, capacity, used, sign))


@part
def observe(x, first, is_new, low, high, total, tables, seen, slots, rows, used, sign):
    return call_observe_at((
        x.ctypes.data, x.shape[0], x.shape[1], x.shape[2], first, is_new, low.ctypes.data, high.ctypes.data, low.size,
        total.ctypes.data, tables.ctypes.data, tables.shape[1], seen.ctypes.data, slots.ctypes.data, rows.ctypes.data,
        rows.shape[0], used, sign,
    ))  # fmt: skip


@part
def ends(low, high, found):
    least, most = np.int32(LAST_KEY), np.int32(FIRST_KEY)
    for c in range(low.size):
        least, most = min(least, low[c]), max(most, high[c])
    found[0], found[1] = element(least), element(most)


@part
def widen(low, high, minimum, maximum):
    for c in range(low.size):
        minimum[c] = min(minimum[c], element(low[c]))
        maximum[c] = max(maximum[c], element(high[c]))
