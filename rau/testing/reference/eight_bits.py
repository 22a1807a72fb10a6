"""Outputs of eight bits, as OCP's OFP8 specification (revision 1.0) has the formats: by what their bits mean, and by a search."""

from __future__ import annotations

import numpy as np

EXPONENTS = {"float8_e4m3fn": (4, 7), "float8_e5m2": (5, 15)}  # bits of the exponent, and its bias


def numbers_of(dtype: str) -> np.ndarray:
    """All finite numbers of a format that are not negative, in the order of their codes.

    Examples
    --------
    >>> numbers_of("float8_e4m3fn")[[1, 8, -1]].tolist()  # the smallest, the smallest that is normal, the largest
    [0.001953125, 0.015625, 448.0]
    """
    bits, bias = EXPONENTS[dtype]
    fraction = 7 - bits
    numbers = []
    for code in range(128):
        exponent, rest = code >> fraction, code & ((1 << fraction) - 1)
        if (dtype == "float8_e4m3fn" and code == 127) or (dtype == "float8_e5m2" and exponent == 31):
            break
        numbers.append(np.ldexp(rest + (0 if exponent == 0 else 1 << fraction), max(exponent, 1) - bias - fraction))
    return np.array(numbers)


def nearest_codes(values: np.ndarray, dtype: str) -> np.ndarray:
    """Codes of the nearest numbers, of the even code where two are as near, of the largest number for all beyond it.

    Parameters
    ----------
    values : ndarray, float32 or float64, any shape
    dtype : {"float8_e4m3fn", "float8_e5m2"}

    Returns
    -------
    ndarray, uint8, shape of `values`
        127, or 255, for NaN.
    """
    numbers = numbers_of(dtype)
    size = np.abs(values.astype(np.float64))
    above = np.searchsorted(numbers, np.fmin(size, numbers[-1]))
    below = np.maximum(above - 1, 0)
    middle = (numbers[above] + numbers[below]) / 2
    code = np.where((size > middle) | ((size == middle) & (above % 2 == 0)), above, below)
    code = np.where(size >= numbers[-1], len(numbers) - 1, np.where(size == 0, 0, code))
    return np.where(np.isnan(values), 127, code).astype(np.uint8) | np.where(np.signbit(values), 128, 0).astype(np.uint8)
