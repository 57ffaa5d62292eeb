"""ExactSum: sums of floating-point numbers that no order of additions changes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from onnxq import kernels

LIMBS, LIMB_BITS, LOWEST_BIT = 14, 32, -200  # a fixed-point number of 448 bits: multiples of 2^-200 up to 2^247
MOST_UNCARRIED = 4096  # additions of less than 2^50 to a limb that an int64 holds


class ExactSum:
    """Sums of float64 vectors, exact, so that no order of additions changes a bit. One number for each channel."""

    def __init__(self, limbs: np.ndarray) -> None:
        self.limbs = limbs  # (channels, LIMBS) int64; once carried, all but the top limb in [0, 2^32)
        self._uncarried = 0

    @classmethod
    def zeros(cls, channels: int) -> ExactSum:
        return cls(np.zeros((channels, LIMBS), np.int64))

    def add(self, values: np.ndarray) -> None:
        """Add one float64 to each channel; digits below 2^-200 are dropped."""
        kernels.exact_add(self.limbs, np.ascontiguousarray(values, np.float64), LOWEST_BIT)
        self._uncarried += 1
        if self._uncarried == MOST_UNCARRIED:
            self.carry()

    def add_numpy(self, values: np.ndarray) -> None:
        """What `add` does, in plain numpy: the oracle of the compiled kernel."""
        mantissa, exponent = np.frexp(values)
        digits = np.ldexp(mantissa, 53).astype(np.int64)  # value = digits * 2^(exponent - 53)
        shift = exponent - 53 - LOWEST_BIT
        digits = np.where(shift < 0, digits >> np.minimum(-shift, 63), digits)
        shift = np.maximum(shift, 0)
        limb, bit = shift // LIMB_BITS, shift % LIMB_BITS
        rows = np.arange(len(values))
        for part in range(3):  # 53 digits as 18 + 18 + 17, so that each fits an int64 after a shift of up to 31 + 4
            piece = digits >> (18 * part) if part == 2 else (digits >> (18 * part)) & 0x3FFFF
            place = bit + 18 * part
            self.limbs[rows, limb + place // LIMB_BITS] += piece << (place % LIMB_BITS)
        self.carry()

    def merge(self, other: ExactSum) -> None:
        other.carry()
        self.carry()
        self.limbs += other.limbs
        self.carry()

    def carry(self) -> None:
        """Bring the limbs into the one form that a number has."""
        self._uncarried = 0
        for k in range(LIMBS - 1):
            carry = self.limbs[:, k] >> LIMB_BITS
            self.limbs[:, k] -= carry << LIMB_BITS
            self.limbs[:, k + 1] += carry

    def values(self) -> np.ndarray:
        """The sums, each rounded once to float64."""
        self.carry()
        unit = Fraction(1, 2**-LOWEST_BIT)
        return np.array([float(sum(int(v) << (LIMB_BITS * k) for k, v in enumerate(row)) * unit) for row in self.limbs])
