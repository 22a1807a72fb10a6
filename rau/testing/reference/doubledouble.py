"""Double-double arithmetic: twice the precision of float64, of IEEE operations on NumPy arrays only.

A number is a pair (high, low) of float64 arrays whose unevaluated sum is meant, low being at most half a
unit in the last place of high: some 106 bits. Nothing relies on ``numpy.longdouble``, which is no wider than
float64 on some machines, nor on a fused multiply-add. The caller keeps operands away from overflow and
underflow (products of mantissas, powers of two held apart); results are then good to about 2^-100.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from fractions import Fraction
from math import factorial
from typing import Any, TypeAlias

import numpy as np

Floats: TypeAlias = Any  # of float64, or a float, which broadcasts
HighLow: TypeAlias = tuple[Floats, Floats]

_SPLITTER = 2.0**27 + 1


def two_sum(a: Floats, b: Floats) -> HighLow:
    """Return a + b rounded, and what the rounding lost, exactly (Knuth).

    >>> two_sum(1.0, 2.0**-80) == (1.0, 2.0**-80)
    True
    """
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def _fast_two_sum(a: Floats, b: Floats) -> HighLow:
    """Two_sum for abs(a) >= abs(b) (Dekker)."""
    total = a + b
    return total, b - (total - a)


def _split(a: Floats) -> HighLow:
    """Cut a number into two of 26 bits (Veltkamp), so that products of the parts are exact."""
    scaled = _SPLITTER * a
    high = scaled - (scaled - a)
    return high, a - high


def two_product(a: Floats, b: Floats) -> HighLow:
    """Return a * b rounded, and what the rounding lost, exactly (Dekker).

    The factors are below 2^996 in magnitude, their product far above the subnormal numbers.

    >>> a = 1 + 2.0**-40
    >>> two_product(a, a) == (1 + 2.0**-39, 2.0**-80)
    True
    """
    product = a * b
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def add(a: HighLow, b: HighLow) -> HighLow:
    """Return a + b, good to about 2^-104 of abs(a + b) even where the two cancel."""
    high, error = two_sum(a[0], b[0])
    low, low_error = two_sum(a[1], b[1])
    high, error = _fast_two_sum(high, error + low)
    return _fast_two_sum(high, error + low_error)


def multiply(a: HighLow, b: HighLow) -> HighLow:
    """Return a * b, good to about 2^-102 of it."""
    high, error = two_product(a[0], b[0])
    return _fast_two_sum(high, error + (a[0] * b[1] + a[1] * b[0]))


def divide(a: HighLow, b: HighLow) -> HighLow:
    """Return a / b, good to about 2^-100 of it, by long division with two digits of 53 bits."""
    first = a[0] / b[0]
    taken = multiply((first, np.zeros_like(first)), b)
    rest = add(a, (-taken[0], -taken[1]))
    return _fast_two_sum(first, rest[0] / b[0])


def _pair(exact: Fraction) -> tuple[float, float]:
    high = float(exact)
    return high, float(exact - Fraction(high))


def _parts_of_ln2() -> tuple[float, float, float]:
    """Cut ln 2 into two numbers of 40 bits, whose products with an exponent are exact, and the rest."""
    with localcontext() as context:
        context.prec = 60
        rest = Fraction(Decimal(2).ln())
    parts = []
    for scale in (2**40, 2**80):
        parts.append(float(Fraction(round(rest * scale), scale)))
        rest -= Fraction(parts[-1])
    return parts[0], parts[1], float(rest)


_LN2_HIGH, _LN2_MIDDLE, _LN2_LOW = _parts_of_ln2()
# With abs(r) <= 0.35, r^14/14! is below 2^-57: from there on float64 will do. r^27/27! is below 2^-134.
_TAYLOR = [_pair(Fraction(1, factorial(n))) for n in range(27)]
_FLOAT64_FROM = 14


def exponential(x: HighLow) -> tuple[Floats, Floats, Floats]:
    """Return exp(x), x between -2000 and 2000, as (high + low) * 2^exponent, so that nothing underflows.

    The mantissa is between 0.70 and 1.42, its relative error below 2^-95. exp(x) = 2^k exp(r) with r = x - k ln 2, then the
    Taylor series of exp(r) by Horner's rule.

    >>> high, low, exponent = exponential((np.array([-1.0]), np.array([0.0])))
    >>> bool(np.ldexp(high, exponent)[0] == float.fromhex("0x1.78b56362cef38p-2"))
    True
    """
    k = np.rint(x[0] * (1 / _LN2_HIGH))
    r = add(two_sum(x[0], -k * _LN2_HIGH), two_sum(x[1], -k * _LN2_MIDDLE))
    r = add(r, (-k * _LN2_LOW, np.zeros_like(k)))
    tail = np.zeros_like(k)
    for high, _ in reversed(_TAYLOR[_FLOAT64_FROM:]):
        tail = tail * r[0] + high
    result = (tail, np.zeros_like(tail))
    for coefficient in reversed(_TAYLOR[:_FLOAT64_FROM]):
        result = add(multiply(result, r), coefficient)
    return result[0], result[1], k.astype(np.int64)
