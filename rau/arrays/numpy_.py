"""NumPy's arrays; bfloat16 as ml_dtypes has it, recognised by its name and never imported to find out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from rau.arrays.memory import Memory, address, aligned
from rau.errors import DTypeError

try:
    from rau._core import signature
except ImportError:  # not compiled: every call takes the validator

    def signature(arrays: Sequence[Any], inputs: int) -> bytes | None:
        """Describe no call."""
        return None


ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
NARROW = tuple(name for name, size in ITEMSIZE.items() if size < 4)  # merged in float32, and rounded once more where stored
EIGHT_BITS = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}  # results alone, and the largest number of each
# What NumPy has only through ml_dtypes, and as which integers it is seen without.
BITS = {"bfloat16": "uint16", **dict.fromkeys(EIGHT_BITS, "uint8")}
_NUMPY_NAMES: dict[np.dtype, str] = {}
_DTYPES: dict[str, Any] = {name: np.dtype(name) for name in ITEMSIZE if name not in BITS}
LARGE = 1 << 18  # elements: a smaller array stays in the cache, where its place does not matter


def named_dtype(name: str) -> np.dtype[Any]:
    """Find the NumPy dtype of a name; what NumPy lacks is ml_dtypes'."""
    if name in BITS:
        try:
            import ml_dtypes  # noqa: F401 - NumPy then knows the name
        except ImportError as error:
            raise ImportError(f"{name} NumPy arrays need ml_dtypes: pip install ml_dtypes") from error
    return np.dtype(name)


class NumPyKind:
    """NumPy arrays; bfloat16 as ml_dtypes has it, recognised by its name."""

    name = "numpy"

    def plain(self, array: np.ndarray) -> np.ndarray:
        return array if type(array) is np.ndarray else np.ndarray.view(array, np.ndarray)

    def fault(self, array: np.ndarray) -> str:
        return ""

    def dtype(self, array: np.ndarray) -> str:
        dtype = array.dtype
        name = _NUMPY_NAMES.get(dtype)
        if name is None:
            name = dtype.name if dtype.isnative else f"{dtype.name} (byte-swapped)"
            if dtype.isbuiltin or name in BITS:  # of structured ones there is no end
                _NUMPY_NAMES[dtype] = name
        return name

    def device(self, array: np.ndarray) -> str:
        return "cpu"

    def readable(self, array: np.ndarray) -> bool:
        return True

    def contiguous(self, array: np.ndarray) -> bool:
        flags = array.flags
        return bool(flags.c_contiguous and flags.aligned)

    def strides(self, array: np.ndarray) -> tuple[int, ...] | None:
        itemsize = array.itemsize
        if not array.flags.aligned or any(step % itemsize for step in array.strides):
            return None
        return tuple(step // itemsize for step in array.strides)

    def writable(self, array: np.ndarray) -> bool:
        return array.flags.writeable

    def will_write(self, out: Any) -> None:
        pass

    def extent(self, array: np.ndarray) -> tuple[int, int]:
        if array.flags.c_contiguous:
            low = address(array)
            return low, low + array.nbytes
        return self.memory(array).extent()

    def memory(self, array: np.ndarray) -> Memory:
        return Memory(address(array), array.shape, array.strides, array.itemsize)

    def regular_copy(self, array: np.ndarray) -> np.ndarray:
        return np.array(array, order="C", copy=True, subok=False)

    def assign(self, array: np.ndarray, values: np.ndarray) -> None:
        array[...] = values

    def take(self, array: np.ndarray, rows: slice | np.ndarray, axis: int = 0) -> np.ndarray:
        return array[(slice(None),) * axis + (rows,)]

    def put(self, array: np.ndarray, rows: slice | np.ndarray, values: np.ndarray, axis: int = 0) -> np.ndarray:
        array[(slice(None),) * axis + (rows,)] = values
        return array

    def lanes(self, stats: np.ndarray, lanes: int) -> np.ndarray:
        return np.broadcast_to(stats[..., :1], (*stats.shape[:-1], lanes))

    def to_numpy(self, array: np.ndarray) -> np.ndarray:
        return array

    def from_numpy(self, array: np.ndarray) -> np.ndarray:
        return array

    def host_view(self, array: np.ndarray) -> np.ndarray:
        bits = BITS.get(array.dtype.name)
        return array if bits is None else array.view(bits)

    def signature(self, arrays: Sequence[Any], inputs: int) -> bytes | None:
        return signature(arrays, inputs)

    def allocator(self, shape: tuple[int, ...], dtype: str) -> Callable[[], np.ndarray]:
        own = _DTYPES.get(dtype, dtype)  # bfloat16 by its name, which NumPy knows since there is an input of it
        return partial(aligned if math.prod(shape) > LARGE else np.empty, shape, own)

    def full(self, like: Any, shape: tuple[int, ...], dtype: str, value: float) -> np.ndarray:
        array = aligned(shape, dtype, np.zeros)  # zeros cost nothing until touched
        if value:
            array.fill(value)
        return array

    def cast(self, array: np.ndarray, dtype: str) -> np.ndarray:
        try:
            own = named_dtype(dtype)
        except ImportError as error:
            raise DTypeError(f"[dtype-attn] {error}", ("dtype-attn",)) from error
        copy = self.allocator(array.shape, own.name)()
        with np.errstate(all="ignore"):
            np.copyto(copy, array, casting="unsafe")
        return copy
