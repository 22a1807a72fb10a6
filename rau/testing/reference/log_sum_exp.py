"""The bound of kernels that keep a log-sum-exp: what float32 rows of that kind can lose, by adding up their roundings.

With u = 2^-24 (2^-53 where statistics are float64), s_i = m_i + log(l_i) the log-sum-exp of state i, s that of the row,
w_i = exp(s_i - s) its weight, g_i = s - s_i, and K states. All errors here are of logarithms, hence relative ones of
weights; the kernel's base b matters where its log-sum-exp L = s / ln(b) is rounded, by half a unit in its last place.

- In: L_i is rounded, d_i = ln(b) half_ulp(L_i), on top of the five float64 roundings of m + log(l), over ln(b). Other
  sides' errors move a weight as far as they have one themselves: log w_i by log(1 + sum over j != i of
  w_j (exp(d_i + d_j) - 1)) at most, and s by log(1 + sum of w_j (exp(d_j) - 1)).
- A factor exp(L_i - M), M the largest L: the difference takes u, the exponential's argument is multiplied by a rounded
  log2(e), which takes 2 u; being an argument, all of this counts g_i times. The exponential to base 2 itself is good to two
  units in the last place, 4 u (CUDA's exp2f and PTX's ex2.approx; the C libraries' are better). One that runs over the
  states rescales what it has at every step, by one more exponential and product: (K - 1) 5 u + 3 g_i u in all.
- Their sum S has the mean of that, and K - 1 additions.
- Its logarithm, by PTX's lg2.approx, is off by 2^-22, absolutely or relatively, and converted by a rounded ln(2):
  (4 ln(2) + 6 log(S)) u. M + log(S) is stored once: half a unit in the last place, but never more than log(S), since M
  itself can be stored. log(S) is s - M.
- A weight is exp(L_i - L), of that L, or a factor over S, the quotient good to 4 u (CUDA's __fdividef). The bound adds up what
  either form takes: the factor, the logarithm, L as it is stored, the quotient.
- An element takes a product for each state, K - 1 additions, and where it runs over the states K - 1 products more and one
  at the end: 2 K roundings. Numbers below 2^-126 may be flushed to 0, weights as well as products (ftz). The rounding to
  16 bits is added as for every kernel.
- Back: in base 2, m = s rounded to float32 and l keeps what m has lost, rounded to float32; above 2^30, m alone is left.
  The exact s is itself computed in float64, with five roundings of each s_i and four for each addition.

Where errors are not small (maxima of 1e8 and more), the bound grows with them, to infinity where no digit is promised. A
row in which a sum is negative has no log-sum-exp, and one beyond float32's range in base 2 has an infinite one: nothing is
promised of these either.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from rau.testing.reference.row_weights import FORMATS, RowWeights, half_ulp

_EXPONENTIAL = 4.0  # each in units of u; the module says where they come from
_ARGUMENT = 3.0
_LOGARITHM = 4.0 * math.log(2.0), 6.0
_QUOTIENT = 4.0
_E = 2.0**-53
_SPLIT = 2.0**30  # up to there, a sum keeps what a maximum's rounding loses


class LogSumExpRows(NamedTuple):
    """What a kernel with a log-sum-exp may make of R rows of K states; arrays of float64 (R,) where nothing else is said."""

    weights: RowWeights  # with the bounds of such a kernel
    lse: np.ndarray  # natural; -inf for an empty row
    bound: np.ndarray


def log_sum_exp_rows(rows: RowWeights, maxima: np.ndarray, sums: np.ndarray, *, base: str, double: bool) -> LogSumExpRows:
    """Bound rows whose exact weights are known; statistics (K, R) of float64."""
    dtype = "float64" if double else "float32"
    precision, _, largest = FORMATS[dtype]
    u, count, scale = 2.0**-precision, len(maxima), math.log(2.0) if base == "2" else 1.0
    live = ~((sums == 0) | (maxima == -np.inf))
    each = np.where(live, maxima + np.log(np.where(live, sums, 1.0)), -np.inf)  # s_i
    usual = live.any(axis=0) & (np.isfinite(each) | ~live).all(axis=0)
    top = np.where(usual, each.max(axis=0), 0.0)
    below = np.where(live & usual, top - each, np.inf)
    log_s = np.where(usual, np.log(np.exp(-below).sum(axis=0)), 0.0)
    lse, gap = top + log_s, below + log_s
    weight = np.exp(-gap)

    def stored(natural: np.ndarray) -> np.ndarray:
        return scale * half_ulp(np.abs(natural) / scale, dtype)

    converted = 5 * _E * np.where(live & usual, np.abs(maxima) + np.abs(np.log(np.abs(np.where(live, sums, 1.0)))), 0.0)
    given = np.where(live & usual, stored(each) + converted, 0.0)
    of_input = np.log1p(_moved(gap, given).sum(axis=0))
    of_weight = np.stack([
        np.log1p(sum((_moved(gap[j], given[i] + given[j]) for j in range(count) if j != i), np.zeros(lse.shape)))
        for i in range(count)
    ])  # fmt: skip
    factor = (count - 1 or 1) * (_EXPONENTIAL + 1) * u + _ARGUMENT * u * np.where(live & usual, gap, 0.0)
    computed = (weight * factor).sum(axis=0) + (count - 1) * u + (_LOGARITHM[0] + _LOGARITHM[1] * log_s) * u
    of_result = computed + np.minimum(stored(lse), log_s + computed)
    own = (weight * converted).sum(axis=0) + 4 * count * _E * (1 + np.abs(lse))
    back = np.where(np.abs(lse) < _SPLIT, u, half_ulp(np.abs(lse), dtype)) if base == "2" else 0.0
    bound = of_input + of_result + own + back

    off = of_weight + factor + of_result + _QUOTIENT * u
    roundings = 2 * count * u * (1 + 2 * count * u)
    slope = np.exp(off - gap) * roundings + _moved(gap, off)
    tiny = 2.0 ** (2 - largest)  # the smallest normal number, twice over; below, a weight or a product may be flushed
    slope = np.where(live & usual, slope + tiny, 0.0)
    # A weight is surely counted if it is normal, and surely 0 below half the smallest subnormal number.
    may_vanish = gap + off >= (largest - 1) * math.log(2.0)
    surely_gone = gap - off > (largest + precision) * math.log(2.0)
    nothing = (live & (sums < 0)).any(axis=0)
    nothing |= (live & usual & (np.abs(each) / scale >= 2.0**largest)).any(axis=0)
    nothing |= (live.sum(axis=0) == 1) & ~usual  # alone, but NaN or infinite: kept, or NaN
    lost = ~np.isfinite(slope).all(axis=0)  # the statistics are so large that no digit of the weights is left
    weights = rows._replace(
        slope=np.where(lost, 0.0, slope), floor=np.where(nothing | lost, np.inf, np.where(usual, count * tiny, 0.0)),
        unsure=live & usual & ~rows.skipped & may_vanish | live & usual & rows.skipped & ~surely_gone,
        verbatim=~usual & ~nothing, mixed=np.zeros_like(rows.mixed),
    )  # fmt: skip
    beyond = nothing | (live & np.isposinf(each)).any(axis=0)  # +inf, or the NaN that comes of it
    lse = np.where(usual, lse, np.where(live.any(axis=0), np.nan, -np.inf))
    return LogSumExpRows(weights, lse, np.where(beyond, np.inf, np.where(usual, bound, 0.0)))


def _moved(gap: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Return exp(-gap) * (exp(by) - 1), whatever the two are; 0 for an infinite gap."""
    small = np.minimum(by, 1.0)
    return np.where(np.isinf(gap), 0.0, np.where(by < 1.0, np.exp(-gap) * np.expm1(small), np.exp(by - gap) - np.exp(-gap)))


def state_lse(maximum: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Return the natural log-sum-exp of a state's statistics, lane 0; float64."""
    with np.errstate(all="ignore"):
        m, l = maximum[..., 0].astype(np.float64), total[..., 0].astype(np.float64)
        return np.where((l == 0) | (m == -np.inf), -np.inf, m + np.log(l))
