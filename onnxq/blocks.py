"""Blocks: a tensor in the layout that onnxruntime's convolutions work in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Blocks:
    """An (N, C, H, W) tensor in blocks of channels: `values` (N * ceil(C / lanes), H * W, lanes) float32.

    Channel c of image n is lane c % lanes of block n * ceil(C / lanes) + c // lanes. Lanes beyond C are no part of it.
    """

    values: np.ndarray
    shape: tuple[int, int, int, int]

    @classmethod
    def of(cls, padded: np.ndarray, channels: int, lanes: int) -> Blocks:
        """From what the runtime gives: (N, C padded to whole blocks, H, W), the memory of which is in blocks."""
        n, c, h, w = padded.shape
        return cls(padded.reshape(n * (c // lanes), h * w, lanes), (n, channels, h, w))

    @property
    def ndim(self) -> int:
        return 4

    @property
    def size(self) -> int:
        n, c, h, w = self.shape
        return n * c * h * w

    def times(self, factors: np.ndarray) -> Blocks:
        """The same tensor with its channels times factors (C,)."""
        n, c, _, _ = self.shape
        lanes = self.values.shape[2]
        padded = np.ones(-(-c // lanes) * lanes, np.float32)
        padded[:c] = factors
        by_block = np.tile(padded.reshape(-1, 1, lanes), (n, 1, 1))
        return Blocks(self.values * by_block, self.shape)

    def plain(self) -> np.ndarray:
        """The same tensor in the layout of the model: (N, C, H, W)."""
        n, c, h, w = self.shape
        lanes = self.values.shape[2]
        apart = self.values.reshape(n, -1, h, w, lanes).transpose(0, 1, 4, 2, 3)
        return np.ascontiguousarray(apart.reshape(n, -1, h, w)[:, :c])
