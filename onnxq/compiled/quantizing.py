"""The loops of kernels.py that tell what rounding costs, and that round."""

from __future__ import annotations

import numpy as np
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from onnxq.compiled.places import at_float32, at_float64, on_stack, part

PIECE = 512  # elements, a multiple of 8
piece, eight = on_stack(4 * PIECE), on_stack(8 * 8)


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


@part
def squared_error(lower, upper, count, rmin, rmax, levels, total):
    total[:] = 0.0
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


@part
def energies(rows, found):
    for r in range(rows.shape[0]):
        total, peak = 0.0, 0.0
        for k in range(rows.shape[1]):
            w = np.float64(rows[r, k])
            total += w * w
            peak = max(peak, abs(w))
        found[0, r], found[1, r] = total, peak


@part
def rounding_errors(rows, scale, low, high, total):
    off, sums = carray(at_float32(piece()), (PIECE,)), carray(at_float64(eight()), (8,))
    for c in range(rows.shape[0]):
        s, a, b = scale[c], low[c], high[c]
        sums[:] = 0.0
        for start in range(0, rows.shape[1], PIECE):
            x = rows[c, start : start + PIECE]
            for k in range(x.size):
                off[k] = np.rint(min(max(x[k] / s, a), b)) * s - x[k]
            add_squares(off[: x.size], sums)
        total[c] = np.float64(0)
        for k in range(8):
            total[c] += sums[k]


@part
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
