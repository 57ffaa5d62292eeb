"""The loops of kernels.py, compiled when this module is imported, or read from where numba has cached them."""

from __future__ import annotations

import numba
import numpy as np

EXTENT = "int32[::1], int32[::1], float64[::1]"
part = numba.njit(nogil=True)  # is compiled into the functions that call it, and not read from the cache by itself
COUNTS = "uint64[:,::1], int64[::1], int16[::1], int64[:,::1], int64, int64"
FIRST_KEY, LAST_KEY, NO_MAGNITUDE = -(1 << 31), (1 << 31) - 1, (1 << 32) - 1


@part
def count(bits, tables):
    one, low, half = np.uint64(1 << 40), np.uint32(0xFFFF), np.uint32(16)
    whole = bits.size // 4 * 4
    for k in range(0, whole, 4):
        a, b, c, d = bits[k], bits[k + 1], bits[k + 2], bits[k + 3]
        tables[0, a >> half] += one + np.uint64(a & low)
        tables[1, b >> half] += one + np.uint64(b & low)
        tables[2, c >> half] += one + np.uint64(c & low)
        tables[3, d >> half] += one + np.uint64(d & low)
    for k in range(whole, bits.size):
        a = bits[k]
        tables[0, a >> half] += one + np.uint64(a & low)


@part
def key(bits):
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@part
def magnitude(bits):  # less one, so that zeros are the largest
    return np.uint32(bits & np.int32(0x7FFFFFFF)) - np.uint32(1)


@part
def span(bits, least, most, near):
    for k in range(bits.size):
        a = np.int32(bits[k])
        near[k] = min(near[k], magnitude(a))
        least[k], most[k] = min(least[k], key(a)), max(most[k], key(a))


@part
def span_eight(bits, least, most, near):
    n = least.size
    for k in range(n):
        a, b = np.int32(bits[k]), np.int32(bits[k + n])
        c, d = np.int32(bits[k + 2 * n]), np.int32(bits[k + 3 * n])
        e, f = np.int32(bits[k + 4 * n]), np.int32(bits[k + 5 * n])
        g, h = np.int32(bits[k + 6 * n]), np.int32(bits[k + 7 * n])
        one = min(min(magnitude(a), magnitude(b)), min(magnitude(c), magnitude(d)))
        other = min(min(magnitude(e), magnitude(f)), min(magnitude(g), magnitude(h)))
        near[k] = min(near[k], min(one, other))
        a, b, c, d, e, f, g, h = key(a), key(b), key(c), key(d), key(e), key(f), key(g), key(h)
        least[k] = min(least[k], min(min(min(a, b), min(c, d)), min(min(e, f), min(g, h))))
        most[k] = max(most[k], max(max(max(a, b), max(c, d)), max(max(e, f), max(g, h))))


@part
def add(x, sums):
    for k in range(x.size):
        sums[k] += x[k]


@part
def add_eight(x, sums):
    n = sums.size
    for k in range(n):
        a, b = np.float64(x[k]), np.float64(x[k + n])
        c, d = np.float64(x[k + 2 * n]), np.float64(x[k + 3 * n])
        e, f = np.float64(x[k + 4 * n]), np.float64(x[k + 5 * n])
        g, h = np.float64(x[k + 6 * n]), np.float64(x[k + 7 * n])
        sums[k] += ((a + b) + (c + d)) + ((e + f) + (g + h))


@part
def add_squares(x, sums):
    whole = x.size // 8 * 8
    a, b, c, d, e, f, g, h = sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7]
    for k in range(0, whole, 8):
        a += np.float64(x[k]) * np.float64(x[k])
        b += np.float64(x[k + 1]) * np.float64(x[k + 1])
        c += np.float64(x[k + 2]) * np.float64(x[k + 2])
        d += np.float64(x[k + 3]) * np.float64(x[k + 3])
        e += np.float64(x[k + 4]) * np.float64(x[k + 4])
        f += np.float64(x[k + 5]) * np.float64(x[k + 5])
        g += np.float64(x[k + 6]) * np.float64(x[k + 6])
        h += np.float64(x[k + 7]) * np.float64(x[k + 7])
    sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7] = a, b, c, d, e, f, g, h
    for k in range(whole, x.size):
        sums[k - whole] += np.float64(x[k]) * np.float64(x[k])


@part
def any_of(t, u, v, w):
    found = np.uint64(0)
    for k in range(128):
        found |= (t[k] | u[k]) | (v[k] | w[k])
    return found != 0


@part
def empty(t, u, v, w, row, sign):
    low, half, mantissas = np.uint64((1 << 40) - 1), np.uint64(40), np.int64(0)
    for k in range(128):
        number = np.int64((t[k] >> half) + (u[k] >> half) + (v[k] >> half) + (w[k] >> half))
        row[k] += sign * number
        mantissas += np.int64((t[k] & low) + (u[k] & low) + (v[k] & low) + (w[k] & low)) + number * np.int64(k << 16)
    t[:], u[:], v[:], w[:] = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
    return mantissas


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
            start, end = page * 128, page * 128 + 128
            t, u, v, w = tables[0, start:end], tables[1, start:end], tables[2, start:end], tables[3, start:end]
            if not any_of(t, u, v, w):
                continue
            slot = slots[page]
            if slot < 0:
                if used == rows.shape[0]:
                    return -1
                slot = np.int16(used)
                slots[page] = slot
                used += 1
            rows[slot, 128] += sign * empty(t, u, v, w, rows[slot], sign)
    seen[0], seen[1], seen[2] = LAST_KEY, FIRST_KEY, NO_MAGNITUDE
    return used


@numba.njit(f"int64(uint32[:,:,::1], float32[:,:,::1], int64, {EXTENT}, {COUNTS})", cache=True, nogil=True)
def observe(bits, x, first, low, high, total, tables, seen, slots, pages, used, sign):
    rows, lanes, channels = x.shape[1], x.shape[2], low.size
    together = max(1, (64 if rows * lanes >= 1024 else 16) // lanes)  # rows, so that no addition waits for the one before it
    blocks, tile = (channels + lanes - 1) // lanes, together * lanes
    step = 8 * together * max(1, 4096 // tile)  # rows that stay in the cache for the three things that are done with them
    least, most, near = np.empty(tile, np.int32), np.empty(tile, np.int32), np.empty(tile, np.uint32)
    sums, packed = np.empty(tile), np.empty(step * lanes if channels % lanes else 0, np.uint32)
    for b in range(x.shape[0]):
        channel = (first + b) % blocks * lanes
        own = min(lanes, channels - channel)
        least[:], most[:], near[:], sums[:] = np.int32(LAST_KEY), np.int32(FIRST_KEY), np.uint32(NO_MAGNITUDE), 0.0
        for start in range(0, rows, step):
            end = min(rows, start + step)
            block, values = bits[b, start:end].reshape(-1), x[b, start:end].reshape(-1)
            if own == lanes:
                count(block, tables)
            else:
                k = 0
                for r in range(start, end):
                    for c in range(own):
                        packed[k] = bits[b, r, c]
                        k += 1
                count(packed[:k], tables)
            whole = block.size // (8 * tile) * (8 * tile)
            for k in range(0, whole, 8 * tile):
                span_eight(block[k : k + 8 * tile], least, most, near)
            for k in range(whole, block.size, tile):
                span(block[k : k + tile], least, most, near)
            if total.size:
                for k in range(0, whole, 8 * tile):
                    add_eight(values[k : k + 8 * tile], sums)
                for k in range(whole, block.size, tile):
                    add(values[k : k + tile], sums)
        for row in range(together):
            for c in range(own):
                low[channel + c] = min(low[channel + c], least[row * lanes + c])
                high[channel + c] = max(high[channel + c], most[row * lanes + c])
                if total.size:
                    total[channel + c] += sums[row * lanes + c]
        for k in range(tile):
            seen[2] = min(seen[2], np.int64(near[k]))
    for c in range(channels):
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
    both = np.empty(2, np.int32)
    found = both.view(np.float32)
    for c in range(low.size):
        both[0], both[1] = key(low[c]), key(high[c])
        minimum[c] = min(minimum[c], found[0] + np.float32(0))
        maximum[c] = max(maximum[c], found[1] + np.float32(0))


@numba.njit("void(int64[:,::1], float64[::1], int64)", cache=True)
def exact_add(limbs, values, lowest_bit):
    bits = values.view(np.int64)
    for c in range(values.size):
        exponent = (bits[c] >> 52) & 0x7FF
        digits = bits[c] & ((1 << 52) - 1)
        if exponent:
            digits |= 1 << 52
        else:
            exponent = np.int64(1)
        if bits[c] < 0:
            digits = -digits
        shift = exponent - 1075 - lowest_bit  # value = digits * 2^(exponent - 1075)
        if shift < 0:
            digits >>= min(-shift, np.int64(63))
            shift = np.int64(0)
        limb, place = shift // 32, shift % 32
        for part in range(3):  # as 18 + 18 + 17 bits, so that each fits an int64 after its shift
            piece = digits >> (18 * part)
            if part < 2:
                piece &= 0x3FFFF
            at = place + 18 * part
            limbs[c, limb + at // 32] += piece << (at % 32)


@numba.njit("void(int32[:,::1], int32[:,::1], int64[::1], int64[::1], int64[:,::1])", cache=True, nogil=True)
def excess(x, codes, channel, pair, lost):
    for k in range(channel.size):
        c, j = channel[k], 2 * pair[k]
        a, b = codes[c, j], codes[c, j + 1]
        for r in range(x.shape[1]):
            product = a * x[j, r] + b * x[j + 1, r]
            if product > 32767:
                lost[c, r] += product - 32767
            elif product < -32768:
                lost[c, r] += product + 32768


@numba.njit(
    "float64[::1](float64[::1], float64[::1], float64[::1], float64[::1], float64[::1], float64)", cache=True, nogil=True
)
def squared_error(lower, upper, count, rmin, rmax, levels):
    total = np.zeros(rmin.size)
    for c in range(rmin.size):
        scale = max((rmax[c] - rmin[c]) / levels, 1e-300)
        zero = np.rint(-rmin[c] / scale)
        low, high = -zero * scale, (levels - zero) * scale
        for k in range(lower.size):
            a, b = lower[k], upper[k]
            inner_a, inner_b = min(max(a, low), high) / scale, min(max(b, low), high) / scale
            rounded_a, rounded_b = np.rint(inner_a), np.rint(inner_b)
            off_a, off_b = inner_a - rounded_a, inner_b - rounded_b
            over_a, over_b = max(a - high, 0.0), max(b - high, 0.0)
            under_a, under_b = min(a - low, 0.0), min(b - low, 0.0)
            if b > a:
                inside = scale**3 * ((rounded_b - rounded_a) / 12 + (off_b**3 - off_a**3) / 3)
                outside = (over_b**3 - over_a**3 + under_b**3 - under_a**3) / 3
                mean = (inside + outside) / (b - a)
            else:
                mean = (off_a * scale) ** 2 + over_a**2 + under_a**2
            total[c] += max(mean, 0.0) * count[k]
    return total


@numba.njit("void(float32[:,::1], float32[::1], float32[::1], float32[::1], float64[::1])", cache=True, nogil=True)
def rounding_errors(rows, scale, low, high, total):
    off, sums = np.empty(1024, np.float32), np.zeros(8)
    for c in range(rows.shape[0]):
        s, a, b = scale[c], low[c], high[c]
        sums[:] = 0
        for start in range(0, rows.shape[1], 1024):
            x = rows[c, start : start + 1024]
            for k in range(x.size):
                off[k] = np.rint(min(max(x[k] / s, a), b)) * s - x[k]
            add_squares(off[: x.size], sums)
        total[c] = sums.sum()


CUBE = "float32[:,:,::1]"


@numba.njit(
    f"int64(int32[:,:,::1], {CUBE}, {CUBE}, {CUBE}, float32[:,::1], int32[:,::1], int32[:,::1], int32)",
    cache=True,
    nogil=True,
)
def round_block(codes, gradient, moments, change, scale, low, high, pair_limit):
    changed, columns = 0, codes.shape[2]
    for group in range(codes.shape[0]):
        for row in range(codes.shape[1]):
            own, slope, step = codes[group, row], gradient[group, row], scale[group, row]
            for k in range(columns):
                curvature = np.float64(moments[group, k, k]) * np.float64(step)
                if not curvature > 0:
                    continue
                old = own[k]
                steps = np.rint(np.float64(slope[k]) / curvature)
                new = old - np.int32(min(max(steps, -1.0), 1.0))
                new = min(max(new, low[group, row]), high[group, row])
                if pair_limit and (k ^ 1) < columns:
                    other = own[k ^ 1]
                    limit = max(pair_limit, abs(old + other))
                    new = min(max(new, -limit - other), limit - other)
                if new == old:
                    continue
                added = np.float32(new - old) * step
                own[k] = new
                change[group, row, k] += added
                for j in range(columns):
                    slope[j] += added * moments[group, k, j]
                changed += 1
    return changed
