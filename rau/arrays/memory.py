"""Where arrays lie: addresses, overlap, alignment."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Memory", "address", "aligned"]

try:
    from rau._core import address
except ImportError:  # not compiled: the same number, more slowly

    def address(array: np.ndarray) -> int:
        """Return the address of an array's first element."""
        return array.__array_interface__["data"][0]


# Keeps the overlap solver's worst case, which is exponential, below about a tenth of a second.
_MOST_WORK: Any = 1_000_000


def aligned(shape: tuple[int, ...], dtype: Any, make: Any = np.empty) -> np.ndarray:
    """Allocate a C-contiguous array whose first element stands at a multiple of 64 bytes; a view of memory that it keeps.

    NumPy's own stand at 16 modulo 64, and vectors of 64 bytes that cross cache lines are stored more slowly.

    Examples
    --------
    >>> address(aligned((3, 5), np.float32)) % 64
    0
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = make(size + 64, np.uint8)
    start = -address(memory) % 64
    return memory[start : start + size].view(dtype).reshape(shape)


class Memory(NamedTuple):
    """Where an array lies; strides in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    def extent(self) -> tuple[int, int]:
        """Lowest address touched and the one after the highest; equal where the array is empty."""
        if 0 in self.shape:
            return self.address, self.address
        reach = [(length - 1) * step for length, step in zip(self.shape, self.strides, strict=True)]
        low = self.address + sum(step for step in reach if step < 0)
        return low, self.address + sum(step for step in reach if step > 0) + self.itemsize

    def same_view(self, other: Memory) -> bool:
        """Tell whether both name the same elements in the same order; an axis of length 1 has no stride."""
        same = (self.address, self.shape, self.itemsize) == (other.address, other.shape, other.itemsize)
        return same and all(
            mine == its or length == 1
            for length, mine, its in zip(self.shape, self.strides, other.strides, strict=True)
        )

    @property
    def __array_interface__(self) -> dict[str, Any]:
        # For NumPy's overlap solver alone, which looks at addresses and never at what is there.
        return {
            "version": 3,
            "typestr": f"|V{self.itemsize}",
            "data": (self.address, True),
            "shape": self.shape,
            "strides": self.strides,
        }

    def overlaps(self, other: Memory) -> bool:
        """Decide exactly whether the two share a byte; True as well where that takes too long."""
        (low, high), (its_low, its_high) = self.extent(), other.extent()
        if high <= its_low or its_high <= low:
            return False
        try:
            return np.shares_memory(np.asarray(self), np.asarray(other), max_work=_MOST_WORK)
        except (np.exceptions.TooHardError, OverflowError):
            return True

    def overlaps_itself(self) -> bool:
        """Decide exactly whether two of its elements share a byte; True as well where that takes too long."""
        if 0 in self.shape:
            return False
        # Nearly always each stride steps over all that the smaller ones reach.
        reach = self.itemsize
        for step, length in sorted((abs(s), n) for n, s in zip(self.shape, self.strides, strict=True) if n > 1):
            if step < reach:
                break
            reach += step * (length - 1)
        else:
            return False
        # Two elements differ first on some axis, and what they share does not depend on the indices before it.
        for axis, (length, step) in enumerate(zip(self.shape, self.strides, strict=True)):
            shape, strides = self.shape[axis + 1 :], self.strides[axis + 1 :]
            first = Memory(self.address, shape, strides, self.itemsize)
            later = Memory(self.address + step, (length - 1, *shape), (step, *strides), self.itemsize)
            if first.overlaps(later):
                return True
        return False
