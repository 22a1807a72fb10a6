"""The oracle's rows: statistics into exact weights, with their error bounds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rau.testing.reference import doubledouble as dd

_E = 2.0**-53  # unit roundoff of float64
_U = 2.0**-24  # and of float32
_EXPONENTIAL = 2.42  # error of the operator's exp(m_i - m), in units of _E: proven, see proofs/
_SUBNORMAL = 0.7  # more below _NEAR_FLUSH: 2^-1075, where the difference's own error makes a subnormal term
_NEAR_FLUSH = -700.0
_FLUSH = -708.0  # below it that exponential is 0
_GONE = -3000.0  # below it nobody's weight is anything else, whatever the sums are
_NEAR = 2.0**-20  # how close to the threshold a weight may round to 0 or not


class Format(NamedTuple):
    """A floating-point format: bits of precision, exponents of the smallest and largest numbers."""

    precision: int
    smallest: int
    exponent: int


FORMATS = {
    "float16": Format(11, -24, 15),
    "bfloat16": Format(8, -133, 127),
    "float32": Format(24, -149, 127),
    "float64": Format(53, -1074, 1023),
}


def half_ulp(size: np.ndarray, dtype: str) -> np.ndarray:
    """Half a unit in the last place of a format, which is taken to go on beyond its largest number; `size`: magnitudes.

    At the bottom of float64 the answer is 2^-1074, for want of 2^-1075.

    >>> float(half_ulp(np.array(1.0), "float16")), float(half_ulp(np.array(0.0), "bfloat16")) == 2.0**-134
    (0.00048828125, True)
    """
    precision, smallest, _ = FORMATS[dtype]
    exponent = np.frexp(size)[1]  # size is in [2^(exponent - 1), 2^exponent); 0 for zero
    exponent = np.where(size == 0, smallest, exponent - precision)
    return np.ldexp(1.0, np.maximum(np.maximum(exponent, smallest) - 1, -1074))


class RowWeights(NamedTuple):
    """What the statistics of R rows of K states come to: arrays (R,) or (K, R), of float64 where nothing else is said."""

    maximum: np.ndarray  # (R,)
    total: np.ndarray  # (R,): the new sum,
    total_low: np.ndarray  # (R,): what it has beyond float64,
    total_bound: np.ndarray  # (R,): and how far from it a stored one may be
    weight: np.ndarray  # (K, R), rounded to float64; NaN where the output is to be NaN, 1 for a single live state
    mantissa: dd.HighLow  # (K, R) each: the same weights in double-double,
    exponent: np.ndarray  # (K, R), int: times powers of two
    skipped: np.ndarray  # (K, R), bool: the product does not count, as the state is empty or its weight rounds to 0
    unsure: np.ndarray  # (K, R), bool: the weight is too close to the threshold to tell whether it rounds to 0
    slope: np.ndarray  # (K, R): the bound of an element is floor + sum(slope_i * abs(o_i))
    floor: np.ndarray  # (R,)
    empty: np.ndarray  # (R,), bool: no state is live
    verbatim: np.ndarray  # (R,), bool: nothing is computed; the output is the single live state's, or zero, or NaN
    mixed: np.ndarray  # (R,), bool: sums of both signs, so that weights may exceed 1


def exact_weights(maxima: np.ndarray, sums: np.ndarray, *, double: bool, flushes: bool = True) -> RowWeights:
    """Merge the statistics (K, R) of K states; a `double` problem keeps weights, and stores sums, in float64.

    Whoever keeps maxima and sums `flushes` exponentials and what they scale; a log-sum-exp holds together what lies further
    apart.
    """
    live = ~((sums == 0) | (maxima == -np.inf))
    count = live.sum(axis=0)
    maximum = np.where(live, maxima, -np.inf).max(axis=0)  # NaN wins, as the contract has it
    regular = (count >= 2) & np.isfinite(maximum) & (np.isfinite(sums) | ~live).all(axis=0)
    to_nan = (count >= 2) & ~regular
    difference, lost = dd.two_sum(maxima, -maximum)
    flushed = difference < (_FLUSH if flushes else _GONE)

    # a_i = l_i exp(m_i - m), as a mantissa times a power of two.
    term = live & regular & ~flushed
    x = np.where(term, difference, 0), np.where(term, lost, 0)
    mantissa, exponent = np.frexp(np.where(term, sums, 0))
    high, low, power = dd.exponential(x)
    a = dd.multiply((high, low), (mantissa, np.zeros_like(mantissa)))
    exponent = exponent + power

    # Their sum, in units of 2^top, and the weights.
    top = np.where(regular, np.where(term, exponent, -(10**6)).max(axis=0), 0)
    shift = np.where(term, np.maximum(exponent - top, -5000), 0)
    scaled = np.ldexp(a[0], shift), np.ldexp(a[1], shift)
    total: dd.HighLow = (np.zeros(top.shape), np.zeros(top.shape))
    for part in zip(*scaled, strict=True):
        total = dd.add(total, part)
    nothing = total[0] == 0
    weight_mantissa = dd.divide(a, (np.where(nothing, 1, total[0]), total[1]))
    weight = np.ldexp(weight_mantissa[0], shift)

    # How far from it a float64 row may be; the oracle's module says where each term comes from.
    size, total_size = np.abs(scaled[0]), np.abs(total[0])
    of_factor = _EXPONENTIAL + np.where(x[0] < _NEAR_FLUSH, _SUBNORMAL, 0)
    inexact = np.where(x[0] == 0, 0, (of_factor + 1) * _E)
    underflow = np.ldexp(0.5, -1074 - top)  # of l_i times its exponential
    total_error = (size * (inexact + (count - 1) * _E)).sum(axis=0) + count * underflow
    relative = total_error / total_size
    spread = size.sum(axis=0) / total_size
    weight_size = np.abs(weight)
    through_total = weight_size * inexact
    own = np.abs(1 - weight) * inexact + (through_total.sum(axis=0) - through_total)
    weight_error = weight_size * (own + ((count - 1) * spread + 1) * _E)
    weight_error += underflow / total_size * (1 + count * weight_size)
    weight_error = np.where(term, weight_error / (1 - relative), 0)

    # Sums of mixed sign can cancel, or overflow on the way. Two that cancel exactly have infinite weights.
    mixed = regular & (spread > 1 + _NEAR)
    cancelled = regular & nothing & (count == 2) & (inexact == 0).all(axis=0)
    overflows = mixed & (np.ldexp(size.sum(axis=0), top) >= 2.0**1023)
    limit = 2.0 ** FORMATS["float64" if double else "float32"].exponent
    hopeless = regular & (~(relative < 0.125) | overflows | (weight_size >= limit).any(axis=0)) & ~cancelled
    weight = np.where(cancelled, np.copysign(np.inf, sums), weight)

    # From the weights to the bound of an element.
    if double:
        roundings, tiny = count * _E, 2.0**-1074
        # By exponents, as float64 cannot hold 2^-1075: of the weight, or of a_i, which may underflow first.
        scale = np.frexp(weight_mantissa[0])[1] + shift
        scale = np.minimum(scale, exponent) if flushes else scale
        rounds_to_zero, may_round_to_zero = scale < -1080, scale < -1065
    else:  # the second order in u is more than a float64's rounding, and vanishes for two states
        roundings, tiny = (count + 1) * _U * (1 + (count - 2) / 2 * _U), 2.0**-150
        rounds_to_zero = weight_size + weight_error < tiny * (1 - _NEAR)
        may_round_to_zero = weight_size - weight_error <= tiny * (1 + _NEAR)
    slope = weight_size * roundings + (weight_error + tiny) * (1 + roundings)
    slope = np.where(live & regular & ~hopeless & ~cancelled, slope, 0)
    floor = np.where(regular & ~cancelled, count * tiny * (1 + roundings), 0)
    skipped = ~live | (regular & ~cancelled & ~hopeless & (rounds_to_zero | ~term))

    # The sum as it is stored. An infinite one is the formula's: infinity, or NaN where its factor is 0.
    infinite = np.where(live & np.isinf(sums), sums, 0) * np.where(flushed, 0, 1)
    special = np.where(
        np.isfinite(maximum), np.where(live & np.isnan(sums), np.nan, infinite).sum(axis=0), np.nan
    )
    stored = np.ldexp(total[0], top)
    error = np.ldexp(total_error, top)
    total_bound = error if double else error + half_ulp(np.abs(stored) + error, "float32")
    single = count == 1
    alone = np.where(live, sums, 0).sum(axis=0)
    return RowWeights(
        maximum=maximum,
        total=np.where(regular, stored, np.where(single, alone, np.where(to_nan, special, 0))),
        total_low=np.where(regular & np.isfinite(stored), np.ldexp(total[1], top), 0),
        total_bound=np.where(regular & np.isfinite(stored), np.where(overflows, np.inf, total_bound), 0),
        weight=np.where(regular, weight, np.where(single, 1, np.nan)),
        mantissa=(np.where(regular, weight_mantissa[0], 1), np.where(regular, weight_mantissa[1], 0)),
        exponent=np.where(regular, shift, 0),
        skipped=skipped,
        unsure=regular & ~cancelled & ~skipped & may_round_to_zero,
        slope=slope,
        floor=np.where(hopeless, np.inf, floor),
        empty=count == 0,
        verbatim=~regular,
        mixed=mixed & ~cancelled,
    )
