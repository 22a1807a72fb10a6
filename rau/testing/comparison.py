"""Compare two results, or one with the oracle's: the same bits, or how far apart as a share of the error that is allowed.

The rule of this room: it sees numbers, and neither the case nor the backend that they came from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rau.layouts import FIELDS
from rau.testing.reference.log_sum_exp import state_lse
from rau.testing.reference.oracle import Expected, once_stored, widen
from rau.testing.reference.row_weights import FORMATS

_SLAB = 2**18


@dataclass(frozen=True)
class Comparison:
    """The verdict on one result.

    Attributes
    ----------
    passed : bool
        Whether nothing is wrong.
    attn_share, sum_share : float
        Largest error of attn_out and softmax_sum (of the log-sum-exp, where the kernel keeps that) as a share of its bound;
        1.0 is the limit. Infinity where a bit was not kept that had to be, NaN or infinity is in the wrong place, or shape
        or dtype is wrong. NaN where the array was not there to be judged.
    problems : tuple of str
        What is wrong, one sentence each: where it is worst, what was found, and what was expected.
    """

    passed: bool
    attn_share: float
    sum_share: float
    problems: tuple[str, ...]

    def __str__(self) -> str:
        both = ("attn_out", self.attn_share), ("softmax_sum", self.sum_share)
        shares = ", ".join(f"{name} {share:.2f}" for name, share in both if not math.isnan(share)) + " of the bound"
        return f"right: {shares}" if self.passed else "\n  ".join((f"wrong: {shares}", *self.problems))


def compare(actual: Sequence[Any], expected: Expected, *, tolerance: float = 1.0) -> Comparison:
    """Judge the result of a merge against the oracle.

    Parameters
    ----------
    actual : (attn_out, softmax_max, softmax_sum)
        The result, as NumPy arrays.
    expected : Expected
        What :func:`rau.testing.oracle` says of the same states.
    tolerance : float, default 1.0
        How many times the bound still counts as right, for a kernel that declares itself less accurate. The half unit of
        storing in 16 bits is not multiplied.

    Returns
    -------
    Comparison
        Shares are of the bound itself, whatever `tolerance` is.

    Notes
    -----
    softmax_max must be equal; zeros of either sign count as equal. NaN must appear where NaN is expected and
    nowhere else. An infinity is right where it is expected, and where the exact value, or one within the
    bound of it, lies beyond the format's range. The lanes of a statistic must be equal bit for bit.

    Examples
    --------
    >>> import numpy as np
    >>> from rau.testing import compare, oracle
    >>> stats = np.ones((1, 1, 2, 8), np.float32)
    >>> state = (np.ones((2, 1, 4), np.float32), stats, stats)
    >>> expected = oracle([state, state])
    >>> print(compare((state[0], stats, 2 * stats), expected))
    right: attn_out 0.00, softmax_sum 0.00 of the bound
    >>> compare((state[0], stats, stats), expected).passed
    False
    """
    attn, maximum, total = (np.asarray(array) for array in actual)
    problems: list[str] = []
    attn_share = sum_share = np.inf
    target: tuple[Any, Any, Any]
    if _fits(problems, "attn_out", attn, expected.attn_out, expected.dtype):
        target = expected.attn_out, expected._attn_low, expected.attn_error
        attn_share = _worst(problems, "attn_out", attn, target, tolerance)
    named = ("softmax_max", maximum, expected.softmax_max), ("softmax_sum", total, expected.softmax_sum)
    fits = [_fits(problems, name, its, exact, expected.stats_dtype) for name, its, exact in named]
    if expected.lse is not None:
        if all(fits):
            target = expected.lse, 0.0, expected.lse_bound
            sum_share = _worst(problems, "log-sum-exp", state_lse(maximum, total), target, tolerance)
    else:
        if fits[0]:
            _check_equal(problems, maximum, np.where(expected.free, maximum, expected.softmax_max))
        if fits[1]:
            target = expected.softmax_sum, expected._sum_low, expected.sum_bound
            sum_share = _worst(problems, "softmax_sum", total, target, tolerance)
    for (name, its, _), fit in zip(named, fits, strict=True):
        if fit:
            _check_lanes(problems, name, its)
    return Comparison(not problems, float(attn_share), float(sum_share), tuple(problems))


def shares(
    actual: np.ndarray, exact: np.ndarray, low: Any, error: np.ndarray, dtype: str, tolerance: float = 1.0
) -> np.ndarray:
    """Return how far off each number is, as a share of what it may be: all float64 and of one shape, `low` perhaps a float.

    `low` is what `exact` has beyond float64; `error` is that of the arithmetic, which `tolerance` multiplies; storing in
    `dtype` adds what it may on top.
    """
    with np.errstate(all="ignore"):
        bound = once_stored(tolerance * error, exact, dtype)
        share = np.abs((actual - exact) - low) / bound
        exactly = bound == 0
        if exactly.any():
            same = (actual == exact) & (np.signbit(actual) == np.signbit(exact))
            share = np.where(exactly, np.where(same, 0.0, np.inf), share)
        special = ~(np.isfinite(actual) & np.isfinite(exact))
        if special.any():
            right = (actual == exact) | (np.isnan(actual) & np.isnan(exact))
            # With exponents unbounded, a right result within the bound would be 2^(largest + 1) or more.
            beyond = np.abs(exact) / 2 + bound / 2 >= 2.0 ** FORMATS[dtype].exponent
            right |= np.isinf(actual) & beyond & (np.signbit(actual) == np.signbit(exact))
            share = np.where(special, np.where(right, 0.0, np.inf), share)
        return np.where(bound == np.inf, 0.0, share)


def _fits(problems: list[str], name: str, actual: np.ndarray, exact: np.ndarray, dtype: str) -> bool:
    before = len(problems)
    if actual.shape != exact.shape:
        problems.append(f"{name} has shape {actual.shape}; expected {exact.shape}")
    if actual.dtype.name != dtype:
        problems.append(f"{name} has dtype {actual.dtype.name}; expected {dtype}")
    return len(problems) == before


def _worst(
    problems: list[str], name: str, actual: np.ndarray, target: tuple[Any, Any, Any], tolerance: float
) -> float:
    """Find the largest share of the bound, and report what is too far off; target: exact, low, error."""
    shape, dtype, worst, furthest, place, wrong = actual.shape, actual.dtype.name, 0.0, 0.0, 0, 0
    exact, low, error = (np.broadcast_to(array, shape).reshape(-1) for array in target)
    actual = actual.reshape(-1)
    for start in range(0, actual.size, _SLAB):  # small temporaries
        slab = slice(start, start + _SLAB)
        numbers = widen(actual[slab]), exact[slab], low[slab], error[slab], dtype
        share = shares(*numbers)
        worst = max(worst, float(share.max()))
        if tolerance != 1:
            share = shares(*numbers, tolerance)
        wrong += int(np.count_nonzero(share > 1))
        if share.max() > furthest:
            furthest, place = float(share.max()), start + int(share.argmax())
    if wrong:
        here = slice(place, place + 1)
        limit = float(once_stored(tolerance * error[here], exact[here], dtype)[0])
        at = "" if tolerance == 1 else f" at tolerance {tolerance:g}"
        rule = f"off by {furthest:.3g} times the bound{at}, {limit:.3g}" if limit else "to be kept bit for bit"
        problems.append(
            f"{_at(name, np.unravel_index(place, shape))} is {widen(actual[here])[0]:.9g}, expected {exact[place]:.9g}, "
            f"{rule}; {wrong} of {actual.size} are wrong"
        )
    return worst


def _check_equal(problems: list[str], actual: np.ndarray, exact: np.ndarray) -> None:
    got = widen(actual)
    differs = ~((got == exact) | (np.isnan(got) & np.isnan(exact)))
    if differs.any():
        where = np.unravel_index(int(differs.argmax()), differs.shape)
        problems.append(
            f"{_at('softmax_max', where)} is {got[where]:.9g}, expected {exact[where]:.9g}; "
            f"{np.count_nonzero(differs)} of {got.size} are wrong"
        )


def _check_lanes(problems: list[str], name: str, actual: np.ndarray) -> None:
    bits = _bits(actual)
    differs = (bits != bits[..., :1]) & ~(np.isnan(actual) & np.isnan(actual[..., :1]))
    if differs.any():
        where = tuple(map(int, np.unravel_index(int(differs.argmax()), differs.shape)))
        lane_0 = (*where[:-1], 0)
        problems.append(
            f"{_at(name, where)} is {actual[where]:.9g}, lane 0 {actual[lane_0]:.9g}; "
            "the lanes must be equal"
        )


def _at(name: str, where: Sequence[Any]) -> str:
    return f"{name}[{', '.join(str(int(i)) for i in where)}]"


def same_bits(one: Sequence[Any], other: Sequence[Any]) -> list[str]:
    """Compare two attention states bit for bit.

    Parameters
    ----------
    one, other : AttentionState
        NumPy arrays, in equal layouts.

    Returns
    -------
    list of str
        What differs: the first differing element of each array; empty if nothing differs. Any NaN equals any NaN, and a
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
