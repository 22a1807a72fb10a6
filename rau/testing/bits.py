"""The same bits: the strictest comparison of two results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rau.constraints import FIELDS


def same_bits(one: Sequence[Any], other: Sequence[Any]) -> list[str]:
    """Compare two attention states bit for bit.

    Parameters
    ----------
    one, other : AttentionState
        NumPy arrays, in equal layouts.

    Returns
    -------
    list of str
        What differs, the first element of each array; empty where nothing does. Any NaN equals any NaN, and a
        maximum of zero may have either sign.

    Examples
    --------
    >>> zero, minus_zero = np.zeros(1, np.float32), -np.zeros(1, np.float32)
    >>> same_bits((zero, zero, zero), (zero, minus_zero, zero))
    []
    >>> same_bits((zero, zero, zero), (minus_zero, zero, zero))
    ['attn_out[0]: 0.0 and -0.0; 1 of 1 elements differ']
    """
    found = []
    for name, mine, its in zip(FIELDS, one, other, strict=True):
        if mine.shape != its.shape or mine.dtype != its.dtype:
            found.append(f"{name}: {mine.dtype}{mine.shape} and {its.dtype}{its.shape}")
            continue
        differ = _bits(mine) != _bits(its)
        if differ.any():
            differ &= ~(np.isnan(mine) & np.isnan(its))
            if name == "softmax_max":
                differ &= mine != its
        count = int(np.count_nonzero(differ))
        if count:
            at = tuple(int(i) for i in np.unravel_index(int(np.argmax(differ)), differ.shape))
            where = ", ".join(map(str, at))
            found.append(f"{name}[{where}]: {mine[at]} and {its[at]}; {count} of {mine.size} elements differ")
    return found


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")
