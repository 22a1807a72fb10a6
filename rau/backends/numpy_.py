"""The NumPy backend: the readable statement of the arithmetic that every backend follows bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from rau.backends import AttentionState, Backend, Capabilities, Problem
from rau.backends.exponential import COEFFICIENTS, LN2_HIGH, LN2_LOW, LOG2_E, ROUND, UNDERFLOW
from rau.backends.host import HOST_ARRAYS, as_numpy, fresh
from rau.layouts import ATTN, MAX, SUM, row_index

_ELEMENTS = 1 << 18  # elements merged at a time: their float32 copies stay in the cache


def difference(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Subtract, and find what the rounding lost (Knuth's TwoSum).

    Parameters
    ----------
    a, b : ndarray of float64, one shape

    Returns
    -------
    difference, lost : ndarray of float64
        Their exact sum is a - b where that is finite; otherwise `lost` may be anything.

    Examples
    --------
    >>> difference(np.array([2.0**-60]), np.array([1.0]))
    (array([-1.]), array([8.67361738e-19]))
    """
    d = a - b
    back = d - a
    return d, (a - (d - back)) - (b + back)


def exp_nonpositive(x: np.ndarray, lost: np.ndarray | float = 0.0) -> np.ndarray:
    """The exponential of rau, see :mod:`rau.backends.exponential`.

    Parameters
    ----------
    x : ndarray of float64
        Zero, negative or NaN.
    lost : ndarray of float64, shape of `x`, optional
        What `x` has lost by rounding, less than its unit in the last place.

    Returns
    -------
    ndarray of float64, shape of `x`
        exp(x + lost), 0 where x is below -708; its relative error is at most 1.71 * 2**-53 without `lost`, 2.42 * 2**-53
        with it (and 2**-1075), as proofs/ proves.

    Examples
    --------
    >>> exp_nonpositive(np.array([0.0, -1.0, -800.0]))
    array([1.        , 0.36787944, 0.        ])
    """
    safe = np.where(x >= UNDERFLOW, x, 0.0)
    shifted = safe * LOG2_E + ROUND
    k = shifted - ROUND
    r = (safe - k * LN2_HIGH) - k * LN2_LOW
    p = np.full_like(r, COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        p = p * r + coefficient
    # The low bits of `shifted` hold k: made an exponent, they are 2**k, without a library's ldexp.
    q = p * ((shifted.view(np.int64) + 1023) << 52).view(np.float64)
    return np.where(x < UNDERFLOW, 0.0, np.where(np.isnan(x), x, q + q * lost))


def row_weights(
    maxima: Sequence[np.ndarray], sums: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Merge the statistics of K states, row by row.

    Parameters
    ----------
    maxima, sums : sequences of K ndarrays, float32 or float64, shape (rows,)

    Returns
    -------
    weights : list of K ndarrays, dtype of `sums`
        The share of each state in the output; 0 where it is not to be read.
    maximum, total : ndarray, dtype of `sums`

    Notes
    -----
    All in float64, rounded once at the end. With m the largest maximum of the live sides: a_i = l_i * exp(m_i - m),
    l = a_1 + a_2 + ..., w_i = a_i / l. A side is empty where its sum is 0 or its maximum -inf.
    """
    stats_dtype = sums[0].dtype
    m = [part.astype(np.float64) for part in maxima]
    l = [part.astype(np.float64) for part in sums]  # noqa: E741 - the field's own name
    live = [(li != 0) & (mi != -np.inf) for mi, li in zip(m, l, strict=True)]
    count = np.sum(live, axis=0)

    maximum = np.full(m[0].shape, -np.inf)
    for mi, alive in zip(m, live, strict=True):
        maximum = np.where(alive, np.maximum(maximum, mi), maximum)  # np.maximum keeps NaN
    a = [
        np.where(alive, li * exp_nonpositive(*difference(mi, maximum)), 0.0)
        for mi, li, alive in zip(m, l, live, strict=True)
    ]
    total = np.zeros_like(maximum)
    scaled = np.zeros_like(maximum)
    for ai in a:
        total = total + ai
        scaled = scaled + ai * 2.0**-64
    # Finite sums may add up beyond float64; scaled by a power of two their shares are still right.
    huge = np.isinf(total)
    weights = [np.where(huge, ai * 2.0**-64 / scaled, ai / total) for ai in a]
    # A single live side comes back as it is, even where its numbers are infinite or NaN.
    alone = count == 1
    for alive, li in zip(live, l, strict=True):
        total = np.where(alone & alive, li, total)
    weights = [np.where(alive, np.where(alone, 1.0, w), 0.0) for w, alive in zip(weights, live, strict=True)]
    return [w.astype(stats_dtype) for w in weights], maximum.astype(stats_dtype), total.astype(stats_dtype)


def merge_rows(weights: Sequence[np.ndarray], rows: Sequence[np.ndarray]) -> np.ndarray:
    """Add up the weighted rows of K states.

    Parameters
    ----------
    weights : sequence of K ndarrays, float32 or float64, shape (rows,)
    rows : sequence of K ndarrays, dtype of `weights`, shape (rows, D)

    Returns
    -------
    ndarray, dtype of `weights`, shape (rows, D)

    Notes
    -----
    Left to right, starting from the first side that has a weight: a side of weight 0 is skipped, since
    adding its product would read NaN behind it and lose the sign of -0.0.
    """
    result = np.zeros_like(rows[0])
    started = np.zeros(len(result), dtype=bool)
    for weight, row in zip(weights, rows, strict=True):
        term = weight[:, None] * row
        used = weight != 0
        result = np.where(used[:, None], np.where(started[:, None], result + term, term), result)
        started |= used
    return result


def widen(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Convert elements to the type they are computed in; exact.

    Parameters
    ----------
    bits : ndarray
        Elements; bfloat16 as uint16.
    dtype : str
        Their name.

    Returns
    -------
    ndarray of float32, or float64 where that is the dtype
    """
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float64 if dtype == "float64" else np.float32, copy=False)


def narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round elements to the type they are stored in, once, to nearest even.

    Parameters
    ----------
    values : ndarray of float32 or float64
    dtype : str

    Returns
    -------
    ndarray
        bfloat16 as uint16.
    """
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)
    return values.astype(dtype, copy=False)


class _Rows:
    """The rows of one array, wherever they lie: `length` elements from each start of an index on."""

    def __init__(self, array: Any, starts: np.ndarray, length: int) -> None:
        array = as_numpy(array)
        # Seen from its lowest address on, through windows of one row that start at every element.
        lowest = array[tuple(slice(None, None, -1 if step < 0 else 1) for step in array.strides)]
        itemsize = array.itemsize
        steps = [step // itemsize for step in array.strides]
        reach = sum(abs(step) * (count - 1) for step, count in zip(steps, array.shape, strict=True))
        shift = sum(-step * (count - 1) for step, count in zip(steps, array.shape, strict=True) if step < 0)
        windows = max(reach + 2 - length, 0) if array.size and length else 0
        self._windows = as_strided(lowest, (windows, length), (itemsize, itemsize))
        self._starts = starts + shift

    def __getitem__(self, chunk: slice) -> np.ndarray:
        return self._windows[self._starts[chunk]]

    def __setitem__(self, chunk: slice, values: np.ndarray) -> None:
        self._windows[self._starts[chunk]] = values


class NumPyBackend(Backend):
    """Runs everywhere NumPy does; several times slower than the compiled core, with the same bits."""

    name = "numpy"
    capabilities = Capabilities(array_types=HOST_ARRAYS, halves=True)

    def update(
        self, problem: Problem, prev: AttentionState, cur: AttentionState, out: AttentionState | None
    ) -> AttentionState:
        return self.merge(problem, (prev, cur), out)

    def merge(self, problem: Problem, states: Sequence[AttentionState], out: AttentionState | None) -> AttentionState:
        if out is None:
            out = fresh(problem, states[0])
        table = problem.blocks
        assert table is not None
        head_dim, last = problem.D, len(states)
        maxima = [_Rows(s[1], row_index(table, k, MAX), 1) for k, s in enumerate(states)]
        sums = [_Rows(s[2], row_index(table, k, SUM), 1) for k, s in enumerate(states)]
        rows = [_Rows(s[0], row_index(table, k, ATTN), head_dim) for k, s in enumerate(states)]
        dtypes = [problem.dtype, *[problem.cur_dtype] * (last - 1)]
        out_maximum = _Rows(out[1], row_index(table, last, MAX), problem.lanes)
        out_sum = _Rows(out[2], row_index(table, last, SUM), problem.lanes)
        out_rows = _Rows(out[0], row_index(table, last, ATTN), head_dim)

        step = max(_ELEMENTS // max(head_dim, 1), 1)
        with np.errstate(all="ignore"):
            for start in range(0, problem.T * problem.N, step):
                chunk = slice(start, start + step)
                weights, maximum, total = row_weights([m[chunk][:, 0] for m in maxima], [l[chunk][:, 0] for l in sums])
                if head_dim:
                    merged = merge_rows(weights, [widen(row[chunk], dt) for row, dt in zip(rows, dtypes, strict=True)])
                    out_rows[chunk] = narrow(merged, problem.dtype)
                out_maximum[chunk] = maximum[:, None]
                out_sum[chunk] = total[:, None]
        return out
