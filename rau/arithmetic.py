"""The arithmetic of a merge, which every backend follows bit for bit: written here in what NumPy, torch and JAX spell alike.

Rows are computed in float64 and rounded once, elements in the dtype of the weights, left to right, nothing fused. The kernels in C
(rau/csrc/weigh.h, merge.h) and Triton (rau/backends/cuda_kernel.py) do the same operations in the same order.

The exponential is made of IEEE operations, since those of the libraries differ in the last bit. exp(x) for x <= 0 is
2**k * exp(r) with k = round(x * LOG2_E) and r = (x - k * LN2_HIGH) - k * LN2_LOW, hence abs(r) <= 0.34657362; k * LN2_HIGH is
exact. exp(r) is a polynomial in Horner's order, every step p * r + c. Below UNDERFLOW the result is 0, NaN stays NaN.

What goes in is a difference of two maxima, which is rounded itself. So the rounding error comes along: with d + lost the exact
difference and q = exp(d), the exponential of the difference is q + q * lost. Where maxima lie hundreds apart, the error of d alone
would cost hundreds of units in the last place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rau.layouts import LAYOUTS

LOG2_E = float.fromhex("0x1.71547652b82fep+0")
ROUND = float.fromhex("0x1.8p52")  # added and subtracted, it rounds to the nearest integer
LN2_HIGH = float.fromhex("0x1.62e42feep-1")
LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
# Minimax in the relative error, from the highest degree, by Sollya: fpminimax(exp(x), 11, [|D...|], [-ln2/2, ln2/2], relative)
# with the last two held at 1. One term less than Taylor's polynomial of the same accuracy, hence one rounding less.
COEFFICIENTS = tuple(
    map(
        float.fromhex,
        """
        0x1.ad92c81f74ea2p-26 0x1.28adf7a9a959ep-22 0x1.71df18fbb1812p-19 0x1.a0199963c408ap-16 0x1.a01a012fec32ap-13
        0x1.6c16c18475a28p-10 0x1.1111111126b37p-7 0x1.55555555506cp-5 0x1.55555555554fep-3 0x1.000000000000ap-1 0x1p0 0x1p0
        """.split(),
    )
)
UNDERFLOW = -708.0
# Relative errors, in units of 2**-53, proven by proofs/: of q, and of q + q * lost against the exponential of d + lost.
BOUND = 1.71
DIFFERENCE_BOUND = 2.42


def library(array: Any) -> Any:
    """The library of an array: numpy, torch or jax.numpy."""
    if isinstance(array, np.ndarray):
        return np
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return torch
    import jax.numpy  # is there, since its array is

    return jax.numpy


def cast(array: Any, dtype: Any) -> Any:
    """Convert an array to a dtype of its library; the array itself where it has it."""
    if not isinstance(array, np.ndarray):
        return array.to(dtype) if hasattr(array, "to") else array.astype(dtype)
    with np.errstate(all="ignore"):  # beyond float32 it is infinite, of which torch does not speak either
        return array.astype(dtype, copy=False)


def _filled(array: Any, mask: Any, value: float) -> Any:
    """Replace some elements of an array that nobody else has; in place where its library writes into arrays."""
    if isinstance(array, np.ndarray):
        np.copyto(array, value, where=mask)
        return array
    return array.masked_fill_(mask, value) if hasattr(array, "masked_fill_") else library(array).where(mask, value, array)


def difference(a: Any, b: Any) -> tuple[Any, Any]:
    """Subtract float64 arrays, and find what the rounding lost (Knuth's TwoSum).

    The two add up to a - b exactly, where that is finite; otherwise the second may be anything.

    Examples
    --------
    >>> difference(np.array([2.0**-60]), np.array([1.0]))
    (array([-1.]), array([8.67361738e-19]))
    """
    d = a - b
    back = d - a
    return d, (a - (d - back)) - (b + back)


def exp_nonpositive(x: Any, lost: Any = None) -> Any:
    """exp(x + lost) of float64 arrays of one shape, for x <= 0 or NaN and `lost` below its last place; 0 below -708.

    Its relative error is at most 1.71 * 2**-53 without `lost`, 2.42 * 2**-53 with it (and 2**-1075), as proofs/ proves.

    Examples
    --------
    >>> exp_nonpositive(np.array([0.0, -1.0, -800.0]))
    array([1.        , 0.36787944, 0.        ])
    """
    xp = library(x)
    r = xp.where(x >= UNDERFLOW, x, 0.0)
    shifted = r * LOG2_E
    shifted += ROUND
    k = shifted - ROUND
    r -= k * LN2_HIGH
    r -= k * LN2_LOW
    p = xp.full_like(r, COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        p *= r
        p += coefficient
    # The low bits of `shifted` hold k: made an exponent, they are 2**k, without a library's ldexp.
    p *= ((shifted.view(xp.int64) + 1023) << 52).view(xp.float64)
    if lost is not None:
        p += p * lost
    return xp.where(xp.isnan(x), x, xp.where(x < UNDERFLOW, 0.0, p))


class Weighed(NamedTuple):
    """The rows of a merge of K states; arrays of float64 and one shape, unless said otherwise."""

    live: list[Any]  # of bool: which rows of each state are not empty
    alone: Any  # of bool: rows with a single live state
    exponentials: list[Any]  # exp(m_i - m); 0 for an empty side
    weights: list[Any]  # dtype of the statistics: share of each state in the output; 0 where it is not to be read
    maximum: Any  # merged statistics, not yet rounded
    total: Any


def weigh(
    maxima: Sequence[Any], sums: Sequence[Any], wide: Any = None, exponential: Callable[..., Any] = exp_nonpositive
) -> Weighed:
    """Merge the statistics of K states, row by row; arrays of float32 or float64, of one shape.

    With m the largest maximum of the live sides: a_i = l_i * exp(m_i - m), l = a_1 + a_2 + ..., w_i = a_i / l. A side is empty
    where its sum is 0 or its maximum -inf.

    On a device that lacks them, rows are computed in another dtype than float64, by another exponential: not the same bits.
    """
    xp, stats_dtype = library(sums[0]), sums[0].dtype
    m, l = ([cast(part, wide or xp.float64) for part in parts] for parts in (maxima, sums))
    live = [(li != 0) & (mi != -np.inf) for mi, li in zip(m, l, strict=True)]
    maximum = xp.full_like(m[0], -np.inf)
    for mi, alive in zip(m, live, strict=True):
        maximum = xp.where(alive, xp.maximum(maximum, mi), maximum)  # both libraries' keep NaN
    e = [xp.where(alive, exponential(*difference(mi, maximum)), 0.0) for mi, alive in zip(m, live, strict=True)]
    a = [xp.where(alive, li * ei, 0.0) for li, ei, alive in zip(l, e, live, strict=True)]
    total, scaled = xp.zeros_like(maximum), xp.zeros_like(maximum)
    for ai in a:
        total = total + ai
        scaled = scaled + ai * 2.0**-64
    # Finite sums may add up beyond float64; scaled by a power of two their shares are still right.
    huge = xp.isinf(total)
    alone = xp.stack(live).sum(0) == 1
    weights = []
    for ai, alive in zip(a, live, strict=True):
        share = xp.where(huge, ai * 2.0**-64 / scaled, ai / total)
        weights.append(cast(xp.where(alive, xp.where(alone, 1.0, share), 0.0), stats_dtype))
    for li, alive in zip(l, live, strict=True):
        total = xp.where(alone & alive, li, total)  # comes back as it is, even where its numbers are infinite or NaN
    return Weighed(live, alone, e, weights, maximum, total)


def merge_rows(weights: Sequence[Any], rows: Sequence[Any]) -> Any:
    """Add up the weighted rows of K states: weights of shape (...,), rows (..., D) and of their dtype or one that widens to it.

    Left to right. In place of the product of a weight 0 stands -0.0, which adds nothing to anything, not even to -0.0: neither
    NaN nor the sign of a zero comes out of a side that does not count. One temporary of the output's size for each state after the
    first.
    """
    xp, result = library(weights[0]), None
    for weight, row in zip(weights, rows, strict=True):
        term = row * weight[..., None]
        term = _filled(term, (weight == 0)[..., None], -0.0)
        if result is None:
            result = term
        else:
            result += term
    assert result is not None
    return _filled(result, xp.stack([weight == 0 for weight in weights]).all(0)[..., None], 0.0)


def merge_smoothly(
    maxima: Sequence[Any], sums: Sequence[Any], rows: Sequence[Any], weighed: Weighed, keeps_lse: bool = False
) -> tuple[Any, Any, Any]:
    """The merge as torch and JAX can differentiate it, any number of times: out of place, all of it in the dtype of `weighed`.

    Statistics of shape (...,), rows (..., D); `weighed` is what :func:`weigh` says of them, in which nothing is differentiated:
    which weights are 0. Returns the output, the maximum and the sum; if `keeps_lse`, as a backend that keeps a log-sum-exp has
    them: that in the place of the maximum, and 1.

    Notes
    -----
    What is not to be read (empty sides, outputs of weight 0) is replaced by harmless numbers before it is computed with:
    selected away behind that, its infinities would come back as 0 * inf.
    """
    xp, wide = library(weighed.total), weighed.total.dtype
    read = xp.stack(weighed.weights) != 0
    shared = read & ~weighed.alone  # a side that is alone has weight 1, whatever its statistics
    live = xp.stack(weighed.live)
    scale = xp.where(xp.isinf(weighed.total), 2.0**-64, 1.0)  # as in `weigh`
    m = xp.where(live, cast(xp.stack(maxima), wide), -np.inf)
    l = xp.where(live, cast(xp.stack(sums), wide), 0.0)
    maximum = xp.amax(m, 0)  # equal ones share its gradient
    a = l * xp.exp(xp.where(live, m - maximum, -np.inf))
    part = xp.where(shared, a * scale, 0.0)
    whole = xp.where(shared.any(0), part.sum(0), 1.0)
    weights = xp.where(shared, part / whole, cast(read, wide))[..., None]
    values = xp.where(read[..., None], cast(xp.stack(rows), wide), 0.0)
    total = a.sum(0)
    if keeps_lse:
        maximum, total = maximum + xp.log(xp.where(total == 0, 1.0, total)), xp.ones_like(total)
    return (weights * values).sum(0), maximum, total


def scaled(attn_out: Any, scale: Any, largest: float, layout: str, heads: int) -> Any:
    """Scale a float32 output, by one number or by one a head, and limit it to the range of a format.

    One rounding, that of the product; infinities become the largest numbers, and NaN stays NaN.
    """
    shape, axes = tuple(attn_out.shape), LAYOUTS[layout]
    with np.errstate(all="ignore"):
        if scale is not None:
            rows, behind = attn_out, 1  # axes behind that of the heads
            if axes.attn_head is None:
                rows = attn_out.reshape(*shape[:-1], heads, shape[-1] // max(heads, 1))
            else:
                behind = len(shape) - 1 - axes.attn_head
            if getattr(scale, "shape", ()) not in ((), (1,)):
                scale = scale.reshape(-1, *(1,) * behind)
            attn_out = (rows * scale).reshape(shape)
        return attn_out.clip(-largest, largest)
