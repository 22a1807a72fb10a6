"""Array kinds: all that rau asks of an array, whichever library made it.

The validator reads shape, dtype, device, strides and address through a kind and knows no library. Types
are recognised by name, so that nothing is imported to find out.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import numpy as np

from rau.errors import DTypeError
from rau.memory import Memory, address, aligned

try:
    from rau._core import signature
except ImportError:  # not compiled: every call takes the validator

    def signature(arrays: Sequence[Any], inputs: int) -> bytes | None:
        """Describe no call."""
        return None


_NUMPY_NAMES: dict[np.dtype, str] = {}
_TYPE_NAMES: dict[type, tuple[str, ...]] = {}
SIGNIFICANT = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}  # bits
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


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
        """Return the lowest address touched and the one after the highest; equal where only its library knows, or there is none."""

    def memory(self, array: Any) -> Memory:
        """Return exactly where the array lies."""

    def regular_copy(self, array: Any) -> Any:
        """Return a C-contiguous, aligned copy."""

    def to_numpy(self, array: Any) -> np.ndarray:
        """Return the values as a NumPy array, on the host."""

    def signature(self, arrays: Sequence[Any], inputs: int) -> Hashable | None:
        """Describe the arrays of a call, the last ones to write into, for :mod:`rau.remembered`; None: not plain."""

    def full(self, like: Any, shape: tuple[int, ...], dtype: str, value: float) -> Any:
        """Return a new array beside `like`, on its device, every element of it `value`."""

    def cast(self, array: Any, dtype: str) -> Any:
        """Return a C-contiguous copy, each element rounded once to nearest even."""


class NumPyKind:
    """NumPy arrays; bfloat16 as ml_dtypes has it, recognised by its name."""

    name = "numpy"

    def dtype(self, array: np.ndarray) -> str:
        dtype = array.dtype
        name = _NUMPY_NAMES.get(dtype)
        if name is None:
            name = dtype.name if dtype.isnative else f"{dtype.name} (byte-swapped)"
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

    def to_numpy(self, array: np.ndarray) -> np.ndarray:
        return array

    def signature(self, arrays: Sequence[Any], inputs: int) -> bytes | None:
        return signature(arrays, inputs)

    def full(self, like: Any, shape: tuple[int, ...], dtype: str, value: float) -> np.ndarray:
        array = aligned(shape, dtype, np.zeros)  # zeros cost nothing until touched
        if value:
            array.fill(value)
        return array

    def cast(self, array: np.ndarray, dtype: str) -> np.ndarray:
        if dtype == "bfloat16":
            try:
                import ml_dtypes
            except ImportError as error:
                raise DTypeError(
                    "[dtype-attn] NumPy has bfloat16 by ml_dtypes alone: pip install ml_dtypes", ("dtype-attn",)
                ) from error
            dtype = ml_dtypes.bfloat16
        with np.errstate(over="ignore"):
            return array.astype(dtype, order="C")


class ForeignKind:
    """Arrays of a plugin's own type: only shape, dtype and device are asked for, by attribute.

    Strides and memory are the plugin's own business: such arrays count as contiguous, writable and
    not overlapping.
    """

    def __init__(self, name: str) -> None:
        self.name = name

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

    def signature(self, arrays: Sequence[Any], inputs: int) -> None:
        return None

    def full(self, like: Any, shape: tuple[int, ...], dtype: str, value: float) -> Any:
        raise NotImplementedError("its backend makes such arrays")

    def cast(self, array: Any, dtype: str) -> Any:
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
            f"[array] NumPy cannot read the values of a {self.name} array, as checking them takes; expected it to have "
            '__array__. Leave check at "metadata", and pass actual_seq_qlen as a list.',
            ("array",),
        ) from cause


_KINDS: dict[type, Kind] = {np.ndarray: NumPyKind()}
_HOLDERS = {
    "DTensor": "this rank's part of it, its .to_local()",
    "NestedTensor": 'its .values(), in layout "TND"',
}


def type_names(cls: type) -> tuple[str, ...]:
    """Name a type and its bases as capabilities spell them.

    Parameters
    ----------
    cls : type

    Returns
    -------
    tuple of str

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
    """Find the kind of an array by its type.

    Parameters
    ----------
    array : object

    Returns
    -------
    Kind or None
        None where the object is no array that any backend takes. Masked arrays are none: their mask
        would be lost. Tensors that hold others are none: torch would split what must stay together.
    """
    kind = _KINDS.get(type(array))
    if kind is None:
        kind = _find(array)
    return kind


def described(value: object) -> str:
    """Word what somebody passed, for messages.

    Parameters
    ----------
    value : object

    Returns
    -------
    str

    Examples
    --------
    >>> described(None), described([1]), described(np.float32(1))
    ('None', 'of type list', 'of type numpy.float32')
    """
    if value is None:
        return "None"
    return f"of type {type_names(type(value))[0].replace(':', '.').removeprefix('builtins.')}"


def not_an_array(name: str, value: object) -> str:
    """Word the message about an argument that is no array.

    Parameters
    ----------
    name : str
        The argument's.
    value : object

    Returns
    -------
    str
    """
    hint = in_its_place(value)
    if isinstance(value, np.ma.MaskedArray):
        hint = " A mask would be lost: fill it first; an empty row has softmax_sum 0."
    return f"{name} is {described(value)}; expected an array (NumPy, or of a kind that a backend takes).{hint}"


def in_its_place(value: object) -> str:
    """Word what to pass in the place of what is no array of a kind that a backend takes.

    Parameters
    ----------
    value : object

    Returns
    -------
    str
        To be appended to a message; empty where nobody knows.
    """
    if isinstance(value, (list, tuple)):
        return " Convert it with numpy.asarray(..., dtype=...)."
    if isinstance(value, np.ma.MaskedArray):
        return " A mask would be lost: fill it first."
    if part := tensor_inside(type(value)):
        return f" Pass {part}."
    if type(value).__module__.partition(".")[0] == "cupy":
        return " Convert it with cupy.asnumpy(...)."
    if hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, np.generic):
        return " Convert it with numpy.asarray(...)."  # JAX, MLX, TensorFlow
    return ""


def tensor_inside(cls: type) -> str:
    """Word what is to be passed of a torch tensor that holds others; empty for any other type.

    Parameters
    ----------
    cls : type

    Returns
    -------
    str
    """
    return _HOLDERS.get(cls.__name__, "") if cls.__module__.startswith("torch.") else ""


def swapped(dtype: str) -> str:
    """Word what to do with a dtype whose bytes are in the other order; empty for any other."""
    return " Convert it to native byte order: a.astype(a.dtype.newbyteorder('='))." if "byte-swapped" in dtype else ""


def another_dtype(name: str, kind: str, dtype: str, wanted: str) -> str:
    """Word how statistics, or a log-sum-exp, come to the dtype that they should have, and what that costs.

    Parameters
    ----------
    name : str
        The argument's.
    kind : str
        Of its array.
    dtype, wanted : str

    Returns
    -------
    str
        To be appended to a message; empty where there is no such way.

    Notes
    -----
    With p significant bits the logarithm of a state's weight is off by up to d = abs(m) * 2**-p, that of a sum by 2**-p. The
    derivative of a weight w_i by the logarithms is w_i * (1 - w_i) and -w_i * w_j: 2 * w_i * (1 - w_i) <= 1/2 in all.
    """
    has, needs = SIGNIFICANT.get(dtype), SIGNIFICANT.get(wanted)
    if has is None or needs is None:
        return swapped(dtype)
    how = f"{name}.astype(numpy.{wanted})" if kind == "numpy" else f"{name}.{'float' if wanted == 'float32' else 'double'}()"
    if SIGNIFICANT["float32"] <= has < needs:
        return f" Pass {how}, which is exact."
    bits = min(has, needs)
    off = f"weights are off by up to {'' if name.endswith('sum') else f'abs({name}) * '}2**-{bits + 1}"
    if has > needs:
        return f" Pass {how}: {off}."
    autocast = ", with autocast off" if kind == "torch" else ""
    return f" Compute it in {wanted}{autocast}; or pass {how}, at the price of {bits} significant bits: {off}."


def _find(array: Any) -> Kind | None:
    cls = type(array)
    if issubclass(cls, np.ma.MaskedArray):
        return None
    if issubclass(cls, np.ndarray):
        return _KINDS[np.ndarray]
    for name, its in (("torch:Tensor", "TorchKind"), ("mindspore.common.tensor:Tensor", "MindSporeKind")):
        if name in type_names(cls):
            if tensor_inside(cls):
                return None
            from rau import frameworks

            _KINDS[cls] = kind = getattr(frameworks, its)()
            return kind
    from rau import registry

    names = registry.array_types()
    for name in type_names(cls):
        if name in names and hasattr(array, "shape") and hasattr(array, "dtype"):
            return ForeignKind(name)
    return None
