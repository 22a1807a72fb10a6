"""Host memory of every kind of array: what the cython and numpy backends need of it, without copies."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from rau.arrays import kind_of
from rau.arrays.memory import Memory, aligned
from rau.arrays.mindspore_ import settled
from rau.backends import AttentionState, Problem

_LARGE = 1 << 18  # elements: a smaller array stays in the cache, where its place does not matter
_DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in ("float16", "float32", "float64")}
_DTYPES["bfloat16"] = np.dtype("uint16")  # NumPy has none of its own
HOST_ARRAYS = ("numpy:ndarray", "torch:Tensor", "mindspore.common.tensor:Tensor")


def fresh(problem: Problem, like: AttentionState) -> AttentionState:
    """Allocate a result.

    Torch's and MindSpore's too is NumPy's memory: NumPy asks the system for huge pages and torch does not, which
    decides what a large fresh output costs.

    Parameters
    ----------
    problem : Problem
    like : AttentionState
        The first input state: its kind and dtypes are the result's.

    Returns
    -------
    AttentionState
    """
    empty = aligned if problem.T * problem.N * problem.D > _LARGE else np.empty
    if problem.kind == "numpy":
        return AttentionState(
            empty(problem.shape, like.attn_out.dtype),
            empty(problem.stats_shape, like.softmax_max.dtype),
            empty(problem.stats_shape, like.softmax_sum.dtype),
        )
    library = sys.modules[problem.kind]
    from_numpy = library.Tensor.from_numpy if problem.kind == "mindspore" else library.from_numpy
    stats_dtype, stats_shape = _DTYPES[problem.stats_dtype], problem.stats_shape
    attn_out = from_numpy(empty(problem.shape, _DTYPES[problem.dtype]))
    if problem.dtype == "bfloat16":
        attn_out = attn_out.view(library.bfloat16)
    return AttentionState(
        attn_out, from_numpy(empty(stats_shape, stats_dtype)), from_numpy(empty(stats_shape, stats_dtype))
    )


class _Borrowed:
    """Memory of a tensor, for NumPy to see; it keeps the tensor."""

    def __init__(self, array: Any, memory: Memory, dtype: str) -> None:
        self.array = array
        self.__array_interface__ = {
            "version": 3,
            "typestr": np.dtype(dtype).str,
            "data": (memory.address, False),
            "shape": memory.shape,
            "strides": memory.strides,
        }


def as_numpy(array: Any) -> np.ndarray:
    """See an array as NumPy's; bfloat16 as uint16.

    Parameters
    ----------
    array : ndarray, or torch's or MindSpore's Tensor on the CPU

    Returns
    -------
    ndarray
        The same memory.
    """
    if isinstance(array, np.ndarray):
        return array.view(np.uint16) if array.dtype.name == "bfloat16" else array
    kind = kind_of(array)
    if kind is not None and kind.name == "mindspore":  # whose asnumpy copies what is strided, and knows no bfloat16
        dtype = kind.dtype(array)
        return np.asarray(_Borrowed(array, kind.memory(settled(array)), "uint16" if dtype == "bfloat16" else dtype))
    torch = sys.modules["torch"]
    array = array.detach()
    return (array.view(torch.uint16) if array.dtype == torch.bfloat16 else array).numpy()
