"""Ways an array may lie in memory: the same values, seen through views that kernels get wrong."""

from __future__ import annotations

import mmap
import sys
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

PLACEMENTS = ("contiguous", "offset", "strided", "half", "padded", "transposed", "reversed", "broadcast", "gapped")
PACKED_PLACEMENTS = ("contiguous", "offset", "broadcast")  # packed rows must be evenly spaced
OUT_PLACEMENTS = ("contiguous", "offset", "strided", "half", "padded", "transposed", "reversed")

_FAR = 2**31  # elements from one token to the next: more than 32 bits count to, signed after one, unsigned after two
_GUARD = 0xA5  # a byte that no result happens to be made of


class Placed(NamedTuple):
    """A view and the memory around it."""

    view: np.ndarray
    memory: np.ndarray | None  # uint8, all of it; None where it is too much to look at

    def guards_intact(self) -> bool:
        """Tell whether the memory that the view does not reach still holds what `place` left there."""
        if self.memory is None:
            return True
        kept = self.view.copy()
        self.view.view(_bits(self.view)).fill(np.frombuffer(bytes([_GUARD]) * self.view.itemsize, _bits(self.view))[0])
        intact = bool((self.memory == _GUARD).all())
        self.view[...] = kept
        return intact


def _bits(array: np.ndarray) -> np.dtype[Any]:
    return np.dtype(f"u{array.itemsize}")


def place(values: np.ndarray, placement: str, token_axis: int = 0) -> Placed:
    """Put values into fresh memory in one of several ways, with a guard pattern in the rest of it.

    "contiguous"; "offset" by one element from any alignment; "strided": every other token (`token_axis`) of a larger array;
    "half": the second half of a sequence twice as long; "padded": rows of a wider array; "transposed": the first two axes
    swapped in memory; "reversed": tokens backwards; "broadcast": the last axis has stride 0 (statistics only); "gapped": the
    last axis is not contiguous; "far": tokens lie so far apart that their offsets need 64 bits, in memory that is reserved
    and never touched (OSError where the system does not reserve so much).
    """
    shape, dtype = values.shape, values.dtype

    def room(of: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        memory = np.full(int(np.prod(of)) * dtype.itemsize, _GUARD, np.uint8)
        return memory, memory.view(dtype).reshape(of)

    def tokens(own: slice) -> tuple[slice, ...]:
        return tuple(own if axis == token_axis else slice(None) for axis in range(len(shape)))

    def longer(times: int) -> tuple[int, ...]:
        return tuple(times * n if axis == token_axis else n for axis, n in enumerate(shape))

    if placement == "contiguous":
        memory, view = room(shape)
    elif placement == "offset":
        memory, flat = room((values.size + 1,))
        view = flat[1:].reshape(shape)
    elif placement == "strided":
        memory, wide = room(longer(2))
        view = wide[tokens(slice(None, None, 2))]
    elif placement == "reversed":
        memory, forwards = room(shape)
        view = forwards[tokens(slice(None, None, -1))]
    elif placement == "half":
        memory, long = room(longer(2))
        view = long[tokens(slice(shape[token_axis], None))]
    elif placement == "padded":
        memory, view = room((*shape[:-1], shape[-1] + 3))
        view = view[..., : shape[-1]]
    elif placement == "transposed":
        memory, view = room((shape[1], shape[0], *shape[2:]))
        view = view.swapaxes(0, 1)
    elif placement == "broadcast":
        memory, view = room((*shape[:-1], 1))
        view[...] = values[..., :1]
        return Placed(np.broadcast_to(view, shape), memory)
    elif placement == "gapped":
        memory, view = room((*shape[:-1], 2 * shape[-1]))
        view = view[..., ::2]
    elif placement == "far":
        return Placed(_far(values, token_axis), None)
    else:
        raise ValueError(f"placement {placement!r} is not one of {', '.join(PLACEMENTS)}, far")
    view[...] = values
    return Placed(view, memory)


def _far(values: np.ndarray, token_axis: int) -> np.ndarray:
    """Put three tokens or fewer far apart; wherever an offset of 32 bits wraps to is reserved as well, and zero."""
    reach = _FAR * values.itemsize
    if not hasattr(mmap, "MAP_PRIVATE") or 4 * reach > sys.maxsize:
        raise OSError("this system does not reserve so much memory without taking it")
    untaken = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # named from Python 3.13 on
    reserved = np.frombuffer(
        mmap.mmap(-1, 4 * reach, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | untaken), values.dtype
    )
    strides = list(values.strides)
    strides[token_axis] = reach
    view = as_strided(reserved[_FAR:], values.shape, strides)
    view[...] = values
    return view
