"""Log-sum-exp: the layouts in which kernels hand it out, and what it has to do with a state's statistics.

Written once for arrays of NumPy, torch and JAX, which spell alike nearly all that is used here.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from rau.arithmetic import cast, exp_nonpositive, library
from rau.arrays.torch_ import packed_rows, places_in_sequences
from rau.layouts import SUM, block_terms, numbered, row_index

_SWAPPED = ("BSN", "NT")  # the others have the axes of the statistics
_LN2 = math.log(2.0)


def arranged(lse: Any, lse_layout: str) -> Any:
    """See a log-sum-exp with the axes of the statistics, or with those of `lse_layout`; it is its own inverse."""
    return lse.swapaxes(-1, -2) if lse_layout in _SWAPPED else lse


def joined(lse: Any, lse_layout: str, lengths: Any, tokens: int) -> Any:
    """Gather a log-sum-exp that is padded to the longest sequence, "BNS" or "BSN", into one of shape (T, N)."""
    lse = arranged(lse, lse_layout)
    if library(lse) is not sys.modules.get("torch"):
        sequence, place = numbered(np.diff(lengths))
    else:
        _, sequence, place = places_in_sequences(lengths, tokens, lse.device)
        place = place.clamp_(0, max(lse.shape[-1] - 1, 0))  # whatever lengths on a device contain
    return lse[sequence, :, place]


def statistics(maximum: Any, total: Any, dtype: str, base: str, lanes: int) -> tuple[Any, Any]:
    """Turn rows' maximum to some base, and their sum, into statistics of shape (*maximum.shape, lanes) and `dtype`.

    A `total` of None is that of a log-sum-exp, 1. Views of stride 0 along the lanes; for base "e" and the dtype of the
    arguments they are views of these. A sum of ones is written out, a number for each row: four bytes buy a state whose
    arrays are all walked alike.
    """
    xp = library(maximum)
    own = getattr(xp, dtype)
    if total is None:
        total = xp.ones_like(maximum, dtype=own)
    if base == "2" or maximum.dtype != own:  # what the rounding of the maximum loses, the sum keeps
        natural = cast(maximum, xp.float64)
        if base == "2":
            natural = natural * _LN2
        if total.dtype != own:  # and might be infinite or 0 there, though its logarithm is an ordinary number
            fraction, exponent = xp.frexp(total)
            far = xp.isfinite(total) & (abs(exponent) > 64)
            total = xp.where(far, fraction, total)
            natural = xp.where(far, natural + cast(exponent, xp.float64) * _LN2, natural)
        maximum = cast(natural, own)
        finite = xp.isfinite(natural)
        lost = xp.where(finite, natural, 0.0) - cast(xp.where(finite, maximum, 0.0), xp.float64)
        lost = xp.where(abs(lost) <= 64, lost, 0.0)  # beyond 2**30 a step of float32 is too much for l
        # What the maximum lost by rounding has no gradient: with it the two parts of one number would cancel.
        total = cast(cast(total, xp.float64) * exp_nonpositive(_constant(lost)), own)
    shape = (*maximum.shape, lanes)
    return xp.broadcast_to(maximum[..., None], shape), xp.broadcast_to(total[..., None], shape)


def _constant(array: Any) -> Any:
    """Take an array out of its graph, if it is in one."""
    xp = library(array)
    if xp is np:
        return array
    return array.detach() if hasattr(array, "detach") else sys.modules["jax"].lax.stop_gradient(array)


def log_sum_exp(maximum: Any, total: Any, base: str) -> Any:
    """Turn rows' statistics, without lanes, into their log-sum-exp of the same shape; computed in float64, rounded once."""
    xp = library(maximum)
    empty = (total == 0) | (maximum == -math.inf)
    # Numbers that are not used are replaced before they are computed with: their gradients would be 0 * inf.
    m = xp.where(empty, 0.0, cast(maximum, xp.float64))
    l = xp.where(empty, 1.0, cast(total, xp.float64))
    result = m + xp.log(l)
    if base == "2":
        result = result / _LN2
    return cast(xp.where(empty, -math.inf, result), maximum.dtype)


def reordered(stats: Any, lengths: Any, to: str) -> Any:
    """Do what :func:`rau.reorder_softmax` says: statistics of shape (T, N, ...), lengths of shape (sequences + 1,)."""
    tokens, heads = stats.shape[:2]
    if library(stats) is sys.modules.get("torch"):
        return reordered_by(stats, packed_rows(lengths, tokens, heads, stats.device), to)
    return reordered_by(stats, packed_index(lengths, tokens, heads), to)


def packed_index(lengths: Any, tokens: int, heads: int) -> np.ndarray:
    """Tell where the statistics of rows in token-major order stand among packed ones: int64, shape (T * N,)."""
    row = (heads, 1, 1)  # strides of a (T, N, 1) array
    return row_index(block_terms("TND", True, (1, tokens, heads, 1), lengths, (row,) * 3).table(), 0, SUM)


def reordered_by(stats: Any, rows: Any, to: str) -> Any:
    """Do what :func:`reordered` does, from where the packed rows stand."""
    xp = library(stats)
    stats = np.asarray(stats) if xp is np else stats  # a subclass might index in its own way
    flat: Any = stats.reshape(stats.shape[0] * stats.shape[1], *stats.shape[2:])
    if to == "TND":
        return flat[rows].reshape(stats.shape)
    result = xp.empty_like(flat)
    if hasattr(result, "at"):  # JAX's, which nobody writes into
        result = result.at[rows].set(flat)
    else:
        result[rows] = flat
    return result.reshape(stats.shape)
