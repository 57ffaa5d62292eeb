"""ExactSum: sums of floating-point numbers that no order of additions changes."""

from __future__ import annotations

import numpy as np

from onnxq import kernels

LIMBS, LIMB_BITS, LOWEST_BIT = 14, 32, -200  # a fixed-point number of 448 bits: multiples of 2^-200 up to 2^247
TOP_BIT = LIMB_BITS * (LIMBS - 1)  # of the units, where the top limb begins, which has the sign
MOST_UNCARRIED = 1 << 10  # additions of less than 2^52 to a limb, so that an int64 holds them


class ExactSum:
    """Sums of floating-point numbers, exact, so that no order of additions changes a bit. One number for each channel."""

    def __init__(self, limbs: np.ndarray) -> None:
        self._limbs = limbs  # (LIMBS, channels) int64; once carried, all but the top limb in [0, 2^32)
        self._uncarried = 0

    @classmethod
    def zeros(cls, channels: int) -> ExactSum:
        return cls(np.zeros((LIMBS, channels), np.int64))

    def open(self) -> np.ndarray:
        """The limbs (LIMBS, channels), for the caller to add something of at most 2^52 to each, once."""
        self._uncarried += 1
        return self.carried() if self._uncarried > MOST_UNCARRIED else self._limbs

    @property
    def memory(self) -> np.ndarray:
        """The limbs, always the same array."""
        return self._limbs

    def carried(self) -> np.ndarray:
        """The limbs in the one form that a number has, (LIMBS, channels)."""
        kernels.carry(self._limbs)
        self._uncarried = 0
        return self._limbs

    def add_numpy(self, values: np.ndarray) -> None:
        """Add rows of float64 (n, C), in plain numpy: the oracle of the kernel; digits below 2^-200 are dropped."""
        for start in range(0, len(values), MOST_UNCARRIED):
            self._add_some(values[start : start + MOST_UNCARRIED])
            self.carried()

    def _add_some(self, values: np.ndarray) -> None:
        mantissa, exponent = np.frexp(values)
        digits = np.ldexp(mantissa, 53).astype(np.int64)  # value = digits * 2^(exponent - 53)
        shift = exponent - 53 - LOWEST_BIT
        digits = np.where(shift < 0, digits >> np.minimum(-shift, 63), digits)
        shift = np.maximum(shift, 0)
        limb, bit = shift // LIMB_BITS, shift % LIMB_BITS
        channels = np.broadcast_to(np.arange(values.shape[1]), values.shape)
        for part in range(3):  # 53 digits as 18 + 18 + 17, so that each fits an int64 after a shift of up to 31 + 4
            piece = digits >> (18 * part) if part == 2 else (digits >> (18 * part)) & 0x3FFFF
            place = bit + 18 * part
            np.add.at(self._limbs, (limb + place // LIMB_BITS, channels), piece << (place % LIMB_BITS))

    def merge(self, other: ExactSum) -> None:
        limbs = self.open()
        limbs += other.carried()

    def of_all(self) -> ExactSum:
        """One number: the sum over the channels."""
        return ExactSum(self.carried().sum(1, keepdims=True))

    def values(self) -> np.ndarray:
        """The sums, each rounded once to float64."""
        limbs = self.carried()
        below = np.ascontiguousarray(limbs[:-1].T.astype("<u4"))
        numbers = (
            int.from_bytes(low.tobytes(), "little") + (int(top) << TOP_BIT)
            for low, top in zip(below, limbs[-1], strict=True)
        )
        return np.array([number / (1 << -LOWEST_BIT) for number in numbers])  # the division of two ints rounds once
