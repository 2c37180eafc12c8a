"""Random numbers that are the same everywhere, for ever."""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8

Item = TypeVar("Item")


class Dice:
    """Random draws for item `index` under `seed`, the same whatever was drawn for other items.

    They are made from the raw bits of a generator, which NumPy promises to keep; its distributions may change with
    its version.
    """

    def __init__(self, seed: int, index: int) -> None:
        self.bits = np.random.PCG64(np.random.SeedSequence([seed, index]))

    def between(self, low: int | float, high: int | float) -> float:
        """A number of [low, high)."""
        return low + (high - low) * (self.bits.random_raw() >> 11) * 2.0**-53

    def between_logs(self, low: int | float, high: int | float) -> float:
        """A number whose logarithm is uniform: as many from 10 to 20 as from 20 to 40."""
        return math.exp(self.between(math.log(low), math.log(high)))

    def integer(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return math.floor(self.between(low, high + 1))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.between(0, 1) < probability

    def pick(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.integer(0, len(items) - 1)]

    def bytes(self, *shape: int) -> UInt8[np.ndarray, "..."]:
        """Bytes, each value as likely as any other."""
        count = math.prod(shape)
        words = np.asarray(self.bits.random_raw(-(-count // 8)), np.uint64)
        return words.astype("<u8").view(np.uint8)[:count].reshape(shape)
