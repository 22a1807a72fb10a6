"""Array kinds: all that rau asks of an array, whichever library made it.

The validator reads shape, dtype, device, strides and address through a kind and knows no library. Types
are recognised by name, so that nothing is imported to find out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import numpy as np

from rau.arrays.foreign import ForeignKind
from rau.arrays.memory import Memory
from rau.arrays.mindspore_ import MindSporeKind
from rau.arrays.numpy_ import NumPyKind
from rau.arrays.torch_ import TorchKind, tensor_inside

_TYPE_NAMES: dict[type, tuple[str, ...]] = {}
HOST_ARRAYS = ("numpy:ndarray", "torch:Tensor", "mindspore.common.tensor:Tensor")  # those with a `host_view`
# Each names further types of arrays, as "module:qualname": the registry of backends adds itself, since plugins bring their own.
foreign_types: list[Callable[[], set[str]]] = []


class Kind(Protocol):
    """What rau needs to know about the arrays of one library."""

    name: str

    def dtype(self, array: Any) -> str:
        """Return the dtype's name, such as "bfloat16"; not a plain name where it is not native."""

    def device(self, array: Any) -> str:
        """Return where the array lives, such as "cpu" or "cuda:0"."""

    def readable(self, array: Any) -> bool:
        """Tell whether the values are at hand, without waiting for a device."""

    def contiguous(self, array: Any) -> bool:
        """Tell whether the array is C-contiguous and aligned to its items."""

    def strides(self, array: Any) -> tuple[int, ...] | None:
        """Return the strides in elements, or None where they are not whole elements."""

    def writable(self, array: Any) -> bool:
        """Tell whether the array may be written to."""

    def will_write(self, out: Any) -> None:
        """Tell the library that a backend is about to write into a state of its arrays, behind its back."""

    def extent(self, array: Any) -> tuple[int, int]:
        """Return the lowest address touched and the one after the highest; equal where there is none that we know."""

    def memory(self, array: Any) -> Memory:
        """Return exactly where the array lies."""

    def regular_copy(self, array: Any) -> Any:
        """Return a C-contiguous, aligned copy."""

    def to_numpy(self, array: Any) -> np.ndarray:
        """Return the values as a NumPy array on the host; bfloat16 as ml_dtypes has it."""

    def from_numpy(self, array: np.ndarray) -> Any:
        """Turn a NumPy array into one of the library's, on the host and of the same memory where that can be."""

    def host_view(self, array: Any) -> np.ndarray:
        """See an array in host memory as NumPy's, bfloat16 as uint16."""

    def signature(self, arrays: Sequence[Any], inputs: int) -> Hashable | None:
        """Describe the arrays of a call, the last ones to write into, for :mod:`rau.constraints.cache`; None: not plain."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Allocate an array in host memory, C-contiguous, without values."""

    def full(self, like: Any, shape: tuple[int, ...], dtype: str, value: float) -> Any:
        """Return a new array beside `like`, on its device, every element of it `value`."""

    def cast(self, array: Any, dtype: str) -> Any:
        """Return a C-contiguous copy, each element rounded once to nearest even."""


_KINDS: dict[type, Kind] = {np.ndarray: NumPyKind()}


def type_names(cls: type) -> tuple[str, ...]:
    """Name a type and its bases as capabilities spell them.

    Examples
    --------
    >>> type_names(bool)
    ('builtins:bool', 'builtins:int', 'builtins:object')
    """
    names = _TYPE_NAMES.get(cls)
    if names is None:
        names = _TYPE_NAMES[cls] = tuple(f"{base.__module__}:{base.__qualname__}" for base in cls.__mro__)
    return names


def kind_of(array: Any) -> Kind | None:
    """Find the kind of an array by its type; None for an object that is no array which any backend takes.

    Masked arrays are none: their mask would be lost. Tensors that hold others are none: torch would split what must stay
    together.
    """
    kind = _KINDS.get(type(array))
    if kind is None:
        kind = _find(array)
    return kind


def _find(array: Any) -> Kind | None:
    cls = type(array)
    if issubclass(cls, np.ma.MaskedArray):
        return None
    if issubclass(cls, np.ndarray):
        return _KINDS[np.ndarray]
    names = type_names(cls)
    if "torch:Tensor" in names:
        if tensor_inside(cls):
            return None
        kind = _KINDS[cls] = TorchKind()
        return kind
    if "mindspore.common.tensor:Tensor" in names:
        kind = _KINDS[cls] = MindSporeKind()
        return kind
    known = set().union(*(types() for types in foreign_types))
    for name in names:
        if name in known and hasattr(array, "shape") and hasattr(array, "dtype"):
            return ForeignKind(name)
    return None
