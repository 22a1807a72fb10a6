"""Host memory of every kind of array: what the cython and numpy backends need of it, without copies."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from rau.backends import AttentionState, Problem


def fresh(problem: Problem, like: AttentionState) -> AttentionState:
    """Allocate a result.

    Torch's too is NumPy's memory: NumPy asks the system for huge pages and torch does not, which decides what a large
    fresh output costs.

    Parameters
    ----------
    problem : Problem
    like : AttentionState
        The first input state: its kind and dtypes are the result's.

    Returns
    -------
    AttentionState
    """
    if problem.kind == "numpy":
        return AttentionState(
            np.empty(problem.shape, like.attn_out.dtype),
            np.empty(problem.stats_shape, like.softmax_max.dtype),
            np.empty(problem.stats_shape, like.softmax_sum.dtype),
        )
    torch = sys.modules["torch"]
    if problem.dtype == "bfloat16":  # which NumPy does not have
        attn_out = torch.from_numpy(np.empty(problem.shape, np.uint16)).view(torch.bfloat16)
    else:
        attn_out = torch.from_numpy(np.empty(problem.shape, problem.dtype))
    stats = (torch.from_numpy(np.empty(problem.stats_shape, problem.stats_dtype)) for _ in range(2))
    return AttentionState(attn_out, *stats)


def as_numpy(array: Any) -> np.ndarray:
    """See an array as NumPy's; bfloat16 as uint16.

    Parameters
    ----------
    array : ndarray or Tensor on the CPU

    Returns
    -------
    ndarray
        The same memory.
    """
    if isinstance(array, np.ndarray):
        return array.view(np.uint16) if array.dtype.name == "bfloat16" else array
    torch = sys.modules["torch"]
    array = array.detach()
    return (array.view(torch.uint16) if array.dtype == torch.bfloat16 else array).numpy()
