"""The loops of kernels.py, compiled when this module is imported, or read from where numba has cached them."""

from __future__ import annotations

import numba
import numpy as np

EXTENT = "int32[::1], int32[::1], float64[::1]"
DRAIN = "uint64[:,::1], uint8[::1], int16[::1], int64[:,::1], int64, int64"


@numba.njit("void(uint32[::1], uint64[:,::1], uint8[::1])", cache=True, nogil=True)
def count(bits, tables, touched):
    one, low, half, page = np.uint64(1 << 40), np.uint32(0xFFFF), np.uint32(16), np.uint32(23)
    whole = bits.size // 4 * 4
    for k in range(0, whole, 4):
        a, b, c, d = bits[k], bits[k + 1], bits[k + 2], bits[k + 3]
        tables[0, a >> half] += one + np.uint64(a & low)
        tables[1, b >> half] += one + np.uint64(b & low)
        tables[2, c >> half] += one + np.uint64(c & low)
        tables[3, d >> half] += one + np.uint64(d & low)
        touched[a >> page] = 1
        touched[b >> page] = 1
        touched[c >> page] = 1
        touched[d >> page] = 1
    for k in range(whole, bits.size):
        a = bits[k]
        tables[0, a >> half] += one + np.uint64(a & low)
        touched[a >> page] = 1


@numba.njit("int32[:](uint32[::1], int32, int32, int32[:])", cache=True, nogil=True)
def extremes(bits, least, most, both):
    for k in range(bits.size):
        signed = np.int32(bits[k])
        key = signed ^ ((signed >> np.int32(31)) & np.int32(0x7FFFFFFF))
        least, most = min(least, key), max(most, key)
    both[0], both[1] = least, most
    return both


@numba.njit("void(float32[::1], float64[::1])", cache=True, nogil=True)
def add(x, sums):
    whole = x.size // 8 * 8
    a, b, c, d, e, f, g, h = sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7]
    for k in range(0, whole, 8):
        a += x[k]
        b += x[k + 1]
        c += x[k + 2]
        d += x[k + 3]
        e += x[k + 4]
        f += x[k + 5]
        g += x[k + 6]
        h += x[k + 7]
    sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7] = a, b, c, d, e, f, g, h
    for k in range(whole, x.size):
        sums[k - whole] += x[k]


@numba.njit("void(float32[::1], float64[::1])", cache=True, nogil=True)
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


@numba.njit(f"int64({DRAIN})", cache=True, nogil=True)
def drain(tables, touched, slots, rows, used, sign):
    low = np.uint64((1 << 40) - 1)
    for page in range(512):
        if not touched[page]:
            continue
        slot = slots[page]
        if slot < 0:
            if used == rows.shape[0]:
                return -1
            slot = np.int16(used)
            slots[page] = slot
            used += 1
        touched[page] = 0
        mantissas = np.int64(0)
        for k in range(128):
            held = np.int64(0)
            for table in range(4):
                packed = tables[table, page * 128 + k]
                tables[table, page * 128 + k] = 0
                held += np.int64(packed >> np.uint64(40))
                mantissas += np.int64(packed & low)
            rows[slot, k] += sign * held
            mantissas += held * np.int64(k << 16)
        rows[slot, 128] += sign * mantissas
    return used


@numba.njit(f"int64(uint32[:,::1], float32[:,::1], {EXTENT}, {DRAIN})", cache=True, nogil=True)
def observe_rows(bits, x, low, high, total, tables, touched, slots, pages, used, sign):
    n, channels, sums, both = x.shape[1], low.size, np.zeros(8), np.zeros(2, np.int32)
    for row in range(x.shape[0]):
        channel = row % channels
        sums[:] = 0.0
        for start in range(0, n, 4096):  # a block stays in the cache for the three things that are done with it
            block = bits[row, start : start + 4096]
            extremes(block, low[channel], high[channel], both)
            low[channel], high[channel] = both[0], both[1]
            if total.size:
                add(x[row, start : start + 4096], sums)
            count(block, tables, touched)
        if total.size:
            total[channel] += ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]))
    return drain(tables, touched, slots, pages, used, sign)


@numba.njit(f"int64(uint32[:,::1], float32[:,::1], {EXTENT}, {DRAIN})", cache=True, nogil=True)
def observe_columns(bits, x, low, high, total, tables, touched, slots, pages, used, sign):
    for row in range(x.shape[0]):
        for c in range(low.size):
            signed = np.int32(bits[row, c])
            key = signed ^ ((signed >> np.int32(31)) & np.int32(0x7FFFFFFF))
            low[c] = min(low[c], key)
            high[c] = max(high[c], key)
        for c in range(low.size):
            total[c] += x[row, c]
        count(bits[row], tables, touched)
    return drain(tables, touched, slots, pages, used, sign)


@numba.njit("void(uint32[::1], int32[::1], int32[::1])", cache=True, nogil=True)
def span_tile(bits, least, most):
    for k in range(bits.size):
        signed = np.int32(bits[k])
        key = signed ^ ((signed >> np.int32(31)) & np.int32(0x7FFFFFFF))
        least[k] = min(least[k], key)
        most[k] = max(most[k], key)


@numba.njit("void(float32[::1], float64[::1])", cache=True, nogil=True)
def add_tile(x, sums):
    for k in range(x.size):
        sums[k] += x[k]


@numba.njit(f"int64(uint32[:,:,::1], float32[:,:,::1], int64, {EXTENT}, {DRAIN})", cache=True, nogil=True)
def observe_blocks(bits, x, first, low, high, total, tables, touched, slots, pages, used, sign):
    rows, lanes, channels = x.shape[1], x.shape[2], low.size
    together = 16 if rows >= 256 else 8  # rows, so that no addition waits for the one before it
    blocks, step, tile = (channels + lanes - 1) // lanes, 4096 // lanes, together * lanes
    least, most, sums = np.zeros(tile, np.int32), np.zeros(tile, np.int32), np.zeros(tile)
    packed = np.empty(4096, np.uint32)
    for b in range(x.shape[0]):
        channel = (first + b) % blocks * lanes
        own = min(lanes, channels - channel)
        least[:], most[:], sums[:] = np.int32(0x7FFFFFFF), np.int32(-0x80000000), 0.0
        for start in range(0, rows, step):
            end = min(rows, start + step)
            block, values = bits[b, start:end].reshape(-1), x[b, start:end].reshape(-1)
            whole = block.size // tile * tile
            for k in range(0, whole, tile):
                span_tile(block[k : k + tile], least, most)
            span_tile(block[whole:], least, most)
            if total.size:
                for k in range(0, whole, tile):
                    add_tile(values[k : k + tile], sums)
                add_tile(values[whole:], sums)
            if own == lanes:
                count(block, tables, touched)
            else:
                k = 0
                for r in range(start, end):
                    for c in range(own):
                        packed[k] = bits[b, r, c]
                        k += 1
                count(packed[:k], tables, touched)
        for row in range(together):
            for c in range(own):
                low[channel + c] = min(low[channel + c], least[row * lanes + c])
                high[channel + c] = max(high[channel + c], most[row * lanes + c])
                if total.size:
                    total[channel + c] += sums[row * lanes + c]
    return drain(tables, touched, slots, pages, used, sign)


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
