"""Array kinds: all that rau asks of an array, whichever library made it.

The validator reads shape, dtype, device, strides and address through a kind and knows no library. Types
are recognised by name, so that nothing is imported to find out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import numpy as np

from rau.arrays import jax_
from rau.arrays.foreign import ForeignKind
from rau.arrays.memory import Memory
from rau.arrays.mindspore_ import MindSporeKind
from rau.arrays.numpy_ import NumPyKind
from rau.arrays.torch_ import TorchKind, tensor_inside
from rau.errors import shown

HOST_ARRAYS = ("numpy:ndarray", "torch:Tensor", "mindspore.common.tensor:Tensor")  # those with a `host_view`
# Each names further types of arrays, as "module:qualname": the registry of backends adds itself, since plugins bring their own.
foreign_types: list[Callable[[], set[str]]] = []


class Kind(Protocol):
    """What rau needs to know about the arrays of one library."""

    name: str

    def plain(self, array: Any) -> Any:
        """See the array as one of the library's own class, in the same memory."""

    def fault(self, array: Any) -> str:
        """Say why the array is no memory to be read, and what to pass; empty where it is, or only a device knows."""

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

    def assign(self, array: Any, values: Any) -> None:
        """Write values of the array's own shape and dtype into it; nothing is allocated."""

    def take(self, array: Any, rows: slice | np.ndarray, axis: int = 0) -> Any:
        """Return some rows along an axis: a view for a slice, else a copy."""

    def put(self, array: Any, rows: slice | np.ndarray, values: Any, axis: int = 0) -> Any:
        """Write values to some rows along an axis, as part of a graph where there is one; return the array, JAX another one."""

    def lanes(self, stats: Any, lanes: int) -> Any:
        """See statistics with a number of lanes, each of them lane 0."""

    def to_numpy(self, array: Any) -> np.ndarray:
        """Return the values as a NumPy array on the host; bfloat16 as ml_dtypes has it."""

    def from_numpy(self, array: np.ndarray) -> Any:
        """Turn a NumPy array into one of the library's, on the host and of the same memory where that can be."""

    def host_view(self, array: Any) -> np.ndarray:
        """See an array in host memory as NumPy's, bfloat16 as uint16."""

    def signature(self, arrays: Sequence[Any], inputs: int) -> Hashable | None:
        """Describe the arrays of a call, the last ones to write into, for :mod:`rau.constraints.cache`; None: not plain."""

    def allocator(self, shape: tuple[int, ...], dtype: str) -> Callable[[], Any]:
        """Return what allocates such arrays in host memory, C-contiguous, without values."""

    def full(self, like: Any, shape: tuple[int, ...], dtype: str, value: float) -> Any:
        """Return a new array beside `like`, on its device, every element of it `value`."""

    def cast(self, array: Any, dtype: str) -> Any:
        """Return a C-contiguous copy, each element rounded once to nearest even."""


# Classes of the libraries themselves. Others come and go: what is kept of them would never be given back.
_KINDS: dict[type, Kind] = {np.ndarray: NumPyKind()}
_LIBRARIES: dict[str, Callable[[], Kind]] = {
    "torch:Tensor": TorchKind, "mindspore.common.tensor:Tensor": MindSporeKind, **dict.fromkeys(jax_.CLASSES, jax_.JaxKind),
}  # fmt: skip


def type_names(cls: type) -> tuple[str, ...]:
    """Name a type and its bases as capabilities spell them.

    Examples
    --------
    >>> type_names(bool)
    ('builtins:bool', 'builtins:int', 'builtins:object')
    """
    if cls is np.ndarray:
        return _NUMPY
    names = tuple(f"{base.__module__}:{base.__qualname__}" for base in cls.__mro__)
    its_own = any([name in jax_.CLASSES and _own(name) is base for name, base in zip(names, cls.__mro__)])
    return (jax_.NAME, *names) if its_own else names


def _own(name: str) -> Any:
    """Find a class that is in use by its name, "module:qualname"."""
    module, _, own = name.partition(":")
    return getattr(sys.modules.get(module), own, None)


_NUMPY = ("numpy:ndarray", "builtins:object")


def kind_of(array: Any) -> Kind | None:
    """Find the kind of an array by its type; None for an object that is no array which any backend takes.

    Masked arrays are none: their mask would be lost. Tensors that hold others are none: torch would split what must stay
    together.
    """
    try:
        kind = _KINDS[type(array)] if type(array) in _KINDS else None  # and no get(), as rau.constraints.cache says
    except Exception:  # a metaclass with a hash of its own
        return None
    return _find(array) if kind is None else kind


def looks_like_array(value: Any) -> bool:
    """Tell whether something has a shape and a dtype; what it does when it is asked is no matter."""
    try:
        return hasattr(value, "shape") and hasattr(value, "dtype")
    except Exception:
        return False


def summary(array: Any) -> str:
    """Say what an array is, and none of its numbers: dtype, shape, library and device; anything else is shown.

    >>> summary(np.zeros((2, 3), np.float32)), summary(None)
    ('float32 (2, 3), numpy on cpu', 'None')
    """
    try:
        kind = kind_of(array)
        if kind is None:
            return (
                shown(array) if not looks_like_array(array) else f"{array.dtype} {tuple(array.shape)}, {type(array).__qualname__}"
            )
        grad = ", requires grad" if getattr(array, "requires_grad", False) else ""
        return f"{kind.dtype(array)} {tuple(array.shape)}, {kind.name} on {kind.device(array)}{grad}"
    except Exception:  # of its own making
        return f"a {type(array).__qualname__}"


def plain(array: Any) -> Any:
    """See an array as one of its library's own class, in the same memory; what a subclass says of itself counts for nothing."""
    kind = None if type(array) is np.ndarray else kind_of(array)
    return array if kind is None else kind.plain(array)


def _find(array: Any) -> Kind | None:
    cls = type(array)
    if issubclass(cls, np.ma.MaskedArray):
        return None
    if issubclass(cls, np.ndarray):
        return _KINDS[np.ndarray]
    names = type_names(cls)
    for name, make in _LIBRARIES.items():
        if name in names:
            library = _own(name)
            if library is None or not issubclass(cls, library) or tensor_inside(cls):
                return None  # it bears the name, and is another one
            kind = make()
            if cls is library:
                _KINDS[cls] = kind
            return kind
    known = set().union(*(types() for types in foreign_types))
    for name in names:
        if name in known and looks_like_array(array):
            return ForeignKind(name)
    return None
