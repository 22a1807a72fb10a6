"""Arrays of a plugin's own type, of which rau knows what they say of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rau.arrays.memory import Memory
from rau.errors import DTypeError


class ForeignKind:
    """Arrays of a plugin's own type: only shape, dtype and device are asked for, by attribute.

    Strides and memory are the plugin's own business: such arrays count as contiguous, writable and
    not overlapping.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def plain(self, array: Any) -> Any:
        return array

    def fault(self, array: Any) -> str:
        return ""

    def dtype(self, array: Any) -> str:
        return str(getattr(array.dtype, "name", array.dtype)).rpartition(".")[2]

    def device(self, array: Any) -> str:
        return str(getattr(array, "device", "cpu"))

    def readable(self, array: Any) -> bool:
        return self.device(array) == "cpu"

    def contiguous(self, array: Any) -> bool:
        return True

    def strides(self, array: Any) -> None:
        return None

    def writable(self, array: Any) -> bool:
        return True

    def will_write(self, out: Any) -> None:
        pass

    def extent(self, array: Any) -> tuple[int, int]:
        return 0, 0

    def memory(self, array: Any) -> Memory:
        raise NotImplementedError("its extent is empty, so nobody asks")

    def regular_copy(self, array: Any) -> Any:
        return array

    def assign(self, array: Any, values: Any) -> None:
        raise NotImplementedError("nobody but its backend writes to it")

    def take(self, array: Any, rows: slice | np.ndarray, axis: int = 0) -> Any:
        raise NotImplementedError("its rows are not chosen")

    def put(self, array: Any, rows: slice | np.ndarray, values: Any, axis: int = 0) -> Any:
        raise NotImplementedError("its rows are not chosen")

    def lanes(self, stats: Any, lanes: int) -> Any:
        raise NotImplementedError("nothing is known of its views")

    def signature(self, arrays: Sequence[Any], inputs: int) -> None:
        return None

    def host_view(self, array: Any) -> np.ndarray:
        raise NotImplementedError("where its memory lies, its library knows")

    def allocator(self, shape: tuple[int, ...], dtype: str) -> Any:
        raise NotImplementedError("its backend makes such arrays")

    def full(self, like: Any, shape: tuple[int, ...], dtype: str, value: float) -> Any:
        raise NotImplementedError("its backend makes such arrays")

    def cast(self, array: Any, dtype: str) -> Any:
        raise NotImplementedError("its backend makes such arrays")

    def from_numpy(self, array: np.ndarray) -> Any:
        raise NotImplementedError("its backend makes such arrays")

    def to_numpy(self, array: Any) -> np.ndarray:
        cause = None
        try:
            values = np.asarray(array)
            if values.dtype != object and values.shape == tuple(array.shape):
                return values
        except Exception as error:
            cause = error
        raise DTypeError(
            f"[array] NumPy cannot read the values of a {self.name} array, which are to be checked; expected it to have "
            '__array__. Leave check at "metadata", and pass actual_seq_qlen as a list.',
            ("array",),
        ) from cause
