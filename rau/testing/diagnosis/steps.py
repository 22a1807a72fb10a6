"""A right merge in plain steps, row by row in NumPy: what known mistakes are made of, by replacing one step.

Independent of every backend. Slow and short.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from rau.layouts import LAYOUTS
from rau.state import AttentionState
from rau.testing.reference.doubledouble import two_sum
from rau.testing.reference.oracle import row_order, widen

Array: TypeAlias = np.ndarray


def flushed_exp(x: Array) -> Array:
    """Return exp(x), 0 below -708 as the contract has it."""
    return np.where(x < -708.0, 0.0, np.exp(x))


def summed(parts: Array) -> Array:
    """Add up, left to right, along the first axis."""
    total = np.zeros_like(parts[0])
    for part in parts:
        total = total + part
    return total


def in_float32_range(values: Array) -> Array:
    """Let overflow and vanish what float32 cannot hold, and round nothing: that would be another mistake."""
    return np.where(values > np.finfo(np.float32).max, np.inf, np.where(values < 2.0**-149, 0.0, values))


def to_float16(values: Array) -> Array:
    """Round to float16; the dtype stays."""
    return values.astype(np.float16).astype(values.dtype)


def to_bfloat16(values: Array) -> Array:
    """Round to bfloat16, to nearest even, from float32 or by way of it; the dtype stays."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000).view(np.float32)
    return np.where(np.isnan(values), np.nan, rounded).astype(values.dtype)


class Steps:
    """A call as R rows, one for each token and head: the NumPy arrays of K states, and how they are laid out."""

    lse_base = ""  # that of the log-sum-exp which is kept in place of maximum and sum

    def __init__(self, states: Sequence[Sequence[Any]], actual_seq_qlen: Any, layout: str, softmax_layout: str) -> None:
        self.states = [AttentionState(*map(np.asarray, state)) for state in states]  # as they were given
        self.layout = layout
        self.packed = layout == "TND" and softmax_layout == "SBH"  # the statistics are in TND's packed order
        self.lengths = None if layout != "TND" or actual_seq_qlen is None else np.asarray(actual_seq_qlen)
        first = self.states[0]
        self.dtype, self.stats_dtype = first.attn_out.dtype, first.softmax_max.dtype
        self.shape, self.stats_shape = first.attn_out.shape, first.softmax_max.shape
        self._read("SBH" if self.packed else "TND")
        wide = np.float64 if self.dtype == np.float64 else np.float32
        size = (len(self._places), first.attn_out.size // max(len(self._places), 1))
        # K outputs (R, D), widened to float32, or to float64 in a float64 call
        self.outputs = [widen(state.attn_out).astype(wide).reshape(size) for state in self.states]

    def _read(self, softmax_layout: str) -> None:
        self._places = row_order(self.shape, self.stats_shape, self.lengths, self.layout, softmax_layout)
        flat = (-1, self.stats_shape[-1]) if self.stats_shape[-1] else (0, 0)
        maxima, sums = (
            np.stack([widen(state[part]).reshape(flat)[self._places] for state in self.states]) for part in (1, 2)
        )
        self.lanes = maxima, sums  # all lanes of both: (K, R, lanes) of float64; those below are lane 0, (K, R, 1)
        self.maxima, self.sums = maxima[..., :1], sums[..., :1]

    def reading(self, softmax_layout: str) -> Steps:
        """Return the same call with its statistics taken, and left, in another order."""
        other = copy.copy(self)
        other._read(softmax_layout)
        return other

    def having(self, maxima: Array, sums: Array) -> Steps:
        """Return the same call with other statistics."""
        other = copy.copy(self)
        other.maxima, other.sums = maxima, sums
        return other

    def keeping_lse(self, base: str) -> Steps:
        """Return the same call with log-sum-exps, rounded in their base, as maxima, and sums of 1."""
        scale = np.log(2.0) if base == "2" else 1.0
        natural = np.where(self.live, self.maxima + np.log(self.sums), -np.inf)
        lse = ((natural / scale).astype(self.stats_dtype).astype(np.float64) * scale).astype(self.maxima.dtype)
        other = self.having(lse, np.where(lse == -np.inf, 0, 1).astype(lse.dtype))
        other.lanes, other.lse_base = (other.maxima, other.sums), base
        return other

    @property
    def live(self) -> Array:
        """Which sides are not empty, (K, R, 1)."""
        return (self.sums != 0) & (self.maxima != -np.inf)

    @property
    def maximum(self) -> Array:
        """The new maximum m, (R, 1)."""
        return np.where(self.live, self.maxima, -np.inf).max(axis=0)

    def factors(self, exp: Callable[[Array], Array] = flushed_exp) -> Array:
        """Return a_i = l_i * exp(m_i - m), 0 for an empty side; what the difference loses by rounding is added."""
        difference, lost = two_sum(self.maxima, -self.maximum)
        factor = exp(difference)
        factor = np.where(np.isfinite(lost), factor + factor * lost, factor)
        return np.where(self.live, self.sums * factor, 0.0)

    def total(self, factors: Array) -> Array:
        """Return l, the sum of the a_i; that of a single live side is its own."""
        alone = self.live.sum(axis=0) == 1
        return np.where(alone, summed(np.where(self.live, self.sums, 0.0)), summed(factors))

    def weights(self, factors: Array) -> Array:
        """Return a_i / l, rounded to the statistics' precision; 1 for a single live side, 0 for an empty one."""
        alone = self.live.sum(axis=0) == 1
        small = factors * 2.0**-64  # sums of float64 may overflow; scaled, their shares are still right
        shares = np.where(np.isinf(summed(factors)), small / summed(small), factors / summed(factors))
        weights = np.where(self.live, np.where(alone, 1.0, shares), 0.0)
        return weights.astype(self.stats_dtype)

    def combine(self, weights: Array, rounded: Callable[[Array], Array] = lambda values: values) -> Array:
        """Add up weight times output in the outputs' precision, or rounded further; a weight of 0 leaves its side out."""
        result = np.zeros_like(self.outputs[0])
        started = np.zeros(result.shape, bool)
        for weight, output in zip(weights, self.outputs, strict=True):
            term = rounded((weight * output).astype(result.dtype))
            used = np.broadcast_to(weight != 0, result.shape)
            result = np.where(used, np.where(started, rounded(result + term), term), result)
            started = started | used
        return result

    def merge(self, exp: Callable[[Array], Array] = flushed_exp) -> AttentionState:
        """Merge, right if the exponential is."""
        factors = self.factors(exp)
        return self.store(self.combine(self.weights(factors)), self.maximum, self.total(factors))

    def store(self, output: Array, maximum: Array, total: Array) -> AttentionState:
        """Round rows (R, D) and statistics (R, 1), or (R, lanes), once, and put them where they belong."""
        if self.lse_base == "2":  # a rounded one is no longer one of a natural logarithm: the sum keeps what that loses
            lse = np.where(total == 0, -np.inf, maximum + np.log(total))
            maximum = lse.astype(self.stats_dtype)
            total = np.where(np.isfinite(lse), np.exp(lse - maximum), 1.0)
        stats = []
        for part in (maximum, total):
            stored = np.empty((len(self._places), self.stats_shape[-1]), self.stats_dtype)
            stored[self._places] = part
            stats.append(stored.reshape(self.stats_shape))
        return AttentionState(output.astype(self.dtype).reshape(self.shape), *stats)

    def store_lse(self, output: Array, lse: Array) -> AttentionState:
        """Round and put away rows with their natural log-sum-exp, (R, 1), in place of a maximum and a sum."""
        return self.store(output, lse, np.where(lse == -np.inf, 0.0, 1.0))

    def row_of(self, by_batch: bool = True) -> Array:
        """Return each row's number by its batch entry, token and head, (B, S, N); or all tokens as of one entry, (1, T, N)."""
        rows: Array = np.arange(len(self._places))
        if self.layout == "TND":
            return rows.reshape(1, *self.shape[:2])
        axes = LAYOUTS[self.layout]
        last = len(self.shape)
        its_axes = (axes.attn_batch, axes.attn_token, last if axes.attn_head is None else axes.attn_head)
        sizes = tuple(self.stats_shape[axis] for axis in (axes.stats_batch, axes.stats_token, axes.stats_head) if axis is not None)
        order = np.argsort([axis for axis in its_axes if axis is not None])  # of batch, token and head, as the output has them
        rows = rows.reshape([sizes[axis] for axis in order])
        by_entry: Array = rows.transpose(np.argsort(order))
        if by_batch:
            return by_entry
        tokens_first = rows if order[-1] == 2 else by_entry  # heads side by side: tokens in the order of the output
        return tokens_first.reshape(1, sizes[0] * sizes[1], sizes[2])

    def last_tokens(self) -> Array:
        """Return a mask of the rows of each sequence's, or batch entry's, last token."""
        shape = (*self.shape[:2], self.stats_shape[1]) if LAYOUTS[self.layout].attn_head is None else self.shape[:-1]
        mask = np.zeros(shape, bool)
        if self.lengths is not None:
            mask[self.lengths[1:][np.diff(self.lengths) > 0] - 1] = True
        elif mask.size:
            mask[(slice(None),) * LAYOUTS[self.layout].attn_token + (-1,)] = True
        return mask.ravel()
