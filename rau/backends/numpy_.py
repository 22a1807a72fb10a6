"""The NumPy backend: rows by their places in memory, through the arithmetic that every backend follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from rau.arithmetic import merge_rows, weigh
from rau.arrays import HOST_ARRAYS, kind_of
from rau.backends import AttentionState, Backend, Capabilities, Problem
from rau.layouts import ATTN, HEADS, MAX, SUM, TOKENS, row_index

_ELEMENTS = 1 << 18  # elements merged at a time: their float32 copies stay in the cache


def computed(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Convert elements, bfloat16 as uint16, to the type they are computed in, float32 or float64; exact."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float64 if dtype == "float64" else np.float32, copy=False)


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round elements to the type they are stored in, bfloat16 as uint16, once, to nearest even."""
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)
    return values.astype(dtype, copy=False)


class _Rows:
    """The rows of one array, wherever they lie: `length` elements from each start of an index on."""

    def __init__(self, array: Any, starts: np.ndarray, length: int) -> None:
        kind = kind_of(array)
        assert kind is not None  # the validator has seen to that
        array = kind.host_view(array)
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
    capabilities = Capabilities(array_types=HOST_ARRAYS, halves=True, runs=True, without_statistics=True)

    def update(
        self, problem: Problem, prev: AttentionState, cur: AttentionState, out: AttentionState | None
    ) -> AttentionState:
        return self.merge(problem, (prev, cur), out)

    def merge(self, problem: Problem, states: Sequence[AttentionState], out: AttentionState | None) -> AttentionState:
        if out is None:
            out = AttentionState(*problem.result())
        if not (problem.D or problem.statistics):
            return out  # nothing to write, however many rows there are
        table = problem.blocks
        assert table is not None
        head_dim, last = problem.D, len(states)
        maxima = [_Rows(s[1], row_index(table, k, MAX), 1) for k, s in enumerate(states)]
        sums = [_Rows(s[2], row_index(table, k, SUM), 1) for k, s in enumerate(states)]
        rows = [_Rows(s[0], row_index(table, k, ATTN), head_dim) for k, s in enumerate(states)]
        dtypes = [problem.dtype, *[problem.cur_dtype] * (last - 1)]
        out_rows = _Rows(out[0], row_index(table, last, ATTN), head_dim)

        if problem.statistics:
            out_maximum = _Rows(out[1], row_index(table, last, MAX), problem.lanes)
            out_sum = _Rows(out[2], row_index(table, last, SUM), problem.lanes)
        step = max(_ELEMENTS // max(head_dim, 1), 1)
        with np.errstate(all="ignore"):
            for start in range(0, int(table[:, TOKENS] @ table[:, HEADS]), step):
                chunk = slice(start, start + step)
                weighed = weigh([m[chunk][:, 0] for m in maxima], [l[chunk][:, 0] for l in sums])
                if head_dim:
                    wide = [computed(row[chunk], dtype) for row, dtype in zip(rows, dtypes, strict=True)]
                    out_rows[chunk] = stored(merge_rows(weighed.weights, wide), problem.dtype)
                if problem.statistics:
                    out_maximum[chunk] = weighed.maximum[:, None]
                    out_sum[chunk] = weighed.total[:, None]
        return out
