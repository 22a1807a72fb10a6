"""The oracle: what a merge of attention states is, in extended precision, and how far one may be from it.

It shares no code with any backend, nor with the layouts and the validator of the package: geometry is plain
transposes, packed statistics are a plain loop over the sequences, and arithmetic is double-double. So it can
judge all of them. It does not validate: give it calls that are valid.

Error bounds follow from the operator's arithmetic, not from a guessed tolerance. With u = 2^-24, e = 2^-53,
weights w_i = a_i / l, a_i = l_i exp(m_i - m), and K live states in the row:

- The row is computed in float64. The difference m_i - m is kept with its own rounding error, and its exponential is
  good to 2.42 e (proofs/ has the proof; 2^-1075 more, which is 0.7 e near -708), the product with l_i to another e:
  a_i is good to g_i = 3.42 e (4.12 e), and exact for the largest maximum, where the exponential is 1.
- The sum l takes K - 1 additions: it is off by at most sum(abs(a_j) (g_j + (K - 1) e)), and by half a unit in
  the last place more when it is stored in float32.
- The weight shares its own a_i with l, so g_i counts abs(1 - w_i) times, the other g_j abs(w_j) times; the
  additions count A = sum(abs(a_j)) / abs(l) times (1 unless sums are negative), the division once.
- An element takes the rounding of the weight to float32, a product and K - 1 additions: K + 1 roundings of u.
  Where weights or products are subnormal, 2^-150 abs(o_i) a weight and 2^-150 a product come on top.
- A 16-bit result is rounded once more: half a unit in the last place of its format. A backend's tolerance is about its
  arithmetic and multiplies all but this: rows in float32 are no reason to round badly. (The half unit of a sum is
  float32's, in which such rows are computed: that is multiplied.)
- float64 problems keep the weights in float64: a product and K - 1 additions, K roundings of e, and the
  subnormal terms at 2^-1074 (twice what they are, because float64 cannot hold 2^-1075).

A kernel that keeps a log-sum-exp has other roundings, and another bound: :mod:`rau.testing.reference.log_sum_exp`. One that
does not promise some property of the contract is given what that costs, by :data:`ALLOWANCES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from rau.testing.reference import doubledouble as dd
from rau.testing.reference.log_sum_exp import log_sum_exp_rows
from rau.testing.reference.row_weights import (
    FORMATS,
    RowWeights,
    exact_weights,
    half_ulp,
)

_SLAB = 2**17  # elements: a handful of float64 temporaries of this size stay in the cache


@dataclass(frozen=True, eq=False)
class Expected:
    """The exact merge of some states, and how far from it a backend may be.

    Attributes
    ----------
    attn_out : ndarray of float64, shape of the first state's attn_out
        Exact output, rounded to float64 only.
    softmax_max, softmax_sum : ndarray of float64, shape of the first state's statistics
        Exact statistics, equal in all lanes.
    attn_error, sum_bound : ndarray of float64, shapes of `attn_out` and `softmax_sum`
        Largest error allowed; for attn_out, before it is stored in 16 bits. This is what a tolerance multiplies. 0 means
        bit for bit, including the sign of a zero, but any NaN is as good as another. Infinity means that the contract
        promises nothing here, and any value will do.
    dtype, stats_dtype : str
        Names of the dtypes that the output and the statistics must have.
    lse, lse_bound : ndarray of float64, shape of the statistics without lanes, or None
        For a kernel that keeps a log-sum-exp: the exact one, natural, and the largest error allowed. The two statistics are
        then judged as this one number.
    free : ndarray of bool, broadcast to the statistics
        Where nothing is promised about the statistics: there the bounds are infinite.
    """

    attn_out: np.ndarray
    softmax_max: np.ndarray
    softmax_sum: np.ndarray
    attn_error: np.ndarray
    sum_bound: np.ndarray
    dtype: str
    stats_dtype: str
    lse: np.ndarray | None = None
    lse_bound: np.ndarray | None = None
    free: np.ndarray | bool = False
    # What the exact values have beyond float64; an infinity or NaN has nothing.
    _attn_low: np.ndarray | float = field(repr=False, default=0.0)
    _sum_low: np.ndarray | float = field(repr=False, default=0.0)

    @property
    def attn_bound(self) -> np.ndarray:
        """Largest error allowed for attn_out as it is stored; float64, shape of `attn_out`."""
        return once_stored(self.attn_error, self.attn_out, self.dtype)

    def where_wider(self, other: Expected) -> Expected:
        """Ask for this only where `other`, of the same call, allows more: everywhere else anything will do."""

        def asked(mine: np.ndarray | None, its: np.ndarray | None) -> Any:
            return None if mine is None else np.where(mine == its, np.inf, mine)

        return replace(
            self, attn_error=asked(self.attn_error, other.attn_error), sum_bound=asked(self.sum_bound, other.sum_bound),
            lse_bound=asked(self.lse_bound, other.lse_bound), free=~(np.asarray(other.free) & ~np.asarray(self.free)),
        )  # fmt: skip


def once_stored(error: np.ndarray, exact: np.ndarray, dtype: str) -> np.ndarray:
    """Add what storing may to an error of the arithmetic: half a unit in the last place in 16 bits, but 0 stays."""
    if FORMATS[dtype].precision >= FORMATS["float32"].precision:  # the arithmetic's last rounding is that of storing
        return error
    return np.where(error == 0, 0.0, error + half_ulp(np.abs(exact) + error, dtype))


def oracle(
    states: Sequence[Sequence[Any]],
    actual_seq_qlen: Any = None,
    layout: str = "SBH",
    *,
    softmax_layout: str = "TND",
    statistics: str = "max_sum",
    lse_base: str = "e",
    unpromised: Sequence[str] = (),
) -> Expected:
    """Merge attention states in extended precision, with a bound on the error of each number.

    Parameters
    ----------
    states : sequence of (attn_out, softmax_max, softmax_sum)
        One or more states, as NumPy arrays. attn_out is float16, bfloat16, float32 or float64, (S, B, N*D) in
        layout "SBH", (B, S, N, D) in "BSND", (B, N, S, D) in "BNSD", (T, N, D) in "TND"; a later state may be
        16-bit where the first is float32. The statistics are float32 (float64 with a float64 output),
        (B, N, S, lanes), in "TND" (T, N, lanes), with 8 lanes or 1; lane 0 is read.
    actual_seq_qlen : sequence of int or ndarray of int64, shape (sequences + 1,), optional
        Cumulative sequence lengths; read only where the statistics are packed.
    layout : {"SBH", "TND", "BSND", "BNSD"}, default "SBH"
    softmax_layout : {"TND", "SBH"}, default "TND"
        Order of the statistics in layout "TND": token-major, or packed per sequence.
    statistics : {"max_sum", "lse"}, default "max_sum"
        What the kernel keeps of a row: what :class:`rau.backends.Capabilities` says of it, as the next two.
    lse_base : {"e", "2"}, default "e"
    unpromised : sequence of str, optional
        Keys of :data:`rau.backends.PROPERTIES`.

    Returns
    -------
    Expected

    Notes
    -----
    Every number follows the formula, except where the contract rules otherwise. Empty states are ignored, and a
    single live state comes back bit for bit. NaN and infinite statistics give what the contract's table says.
    The exponential is 0 below -708. If a weight rounds to 0, its product is skipped, so that neither NaN
    nor the sign of a zero leaks out of it; within 2^-20 of that threshold (2^-150), either answer is right.
    A sum that overflows is stored as infinity, and the output still follows the formula.

    Where sums of mixed sign cancel so far that the new sum has no correct digits, or make the arithmetic
    overflow on the way, nothing is promised about the output: its bound is infinite.

    Examples
    --------
    >>> import numpy as np
    >>> stats = np.zeros((1, 1, 2, 8), np.float32)
    >>> one = (np.ones((2, 1, 4), np.float32), stats, stats + 1)
    >>> two = (np.full((2, 1, 4), 5, np.float32), stats, stats + 3)
    >>> expected = oracle([one, two])
    >>> expected.attn_out[0, 0]
    array([4., 4., 4., 4.])
    >>> float(expected.softmax_sum[0, 0, 0, 0]), bool(expected.attn_bound.max() < 1e-6)
    (4.0, True)
    """
    if not states:
        raise ValueError("there are no states; expected one or more")
    outputs, maxima, sums = zip(*(map(np.asarray, state) for state in states), strict=True)
    shape, stats_shape = outputs[0].shape, maxima[0].shape
    order = row_order(shape, stats_shape, actual_seq_qlen, layout, softmax_layout)
    flat_max, flat_sum = (
        np.stack([widen(part[..., 0]).ravel()[order] for part in parts]) for parts in (maxima, sums)
    )
    flat_out = [part.reshape(order.size, part.size // max(1, order.size)) for part in outputs]
    dtype, double = outputs[0].dtype.name, outputs[0].dtype.name == "float64"

    attn_shape = flat_out[0].shape
    attn, attn_error = np.empty(attn_shape), np.empty(attn_shape)
    attn_low = np.empty(attn_shape) if double else None
    stats = {name: np.empty(order.size) for name in ("maximum", "total", "total_low", "total_bound")}
    keeps_lse = statistics == "lse"
    lse, lse_bound, free = np.empty(order.size), np.zeros(order.size), np.zeros(order.size, bool)
    step = max(1, min(_SLAB // max(1, attn_shape[1]), _SLAB // len(states)))
    with np.errstate(all="ignore"):
        for start in range(0, order.size, step):
            slab = slice(start, start + step)
            rows = exact_weights(flat_max[:, slab], flat_sum[:, slab], double=double, flushes=not keeps_lse)
            for name, column in stats.items():
                column[slab] = getattr(rows, name)
            parts = [widen(part[slab]) for part in flat_out]
            if keeps_lse:
                rows, lse[slab], lse_bound[slab] = log_sum_exp_rows(
                    rows, flat_max[:, slab], flat_sum[:, slab], base=lse_base, double=double
                )
            value, low, bound = _merge_elements(parts, rows, dtype)
            for name in unpromised:
                allowed = ALLOWANCES[name](Slab(parts, rows, flat_max[:, slab], flat_sum[:, slab], double))
                bound = bound + allowed.elements + np.where(allowed.nothing, np.inf, 0.0)[..., None]
                lse_bound[slab] += allowed.lse
                free[slab] |= allowed.nothing
            attn[slab], attn_error[slab] = value, bound
            if attn_low is not None:
                attn_low[slab] = low

    def in_call_order(column: np.ndarray) -> np.ndarray:
        ordered = np.empty_like(column)
        ordered[order] = column
        return np.broadcast_to(ordered.reshape(*stats_shape[:-1], 1), stats_shape)

    return Expected(
        attn_out=attn.reshape(shape),
        softmax_max=in_call_order(stats["maximum"]),
        softmax_sum=in_call_order(stats["total"]),
        attn_error=attn_error.reshape(shape),
        sum_bound=in_call_order(np.where(free, np.inf, stats["total_bound"])),
        dtype=dtype,
        stats_dtype=maxima[0].dtype.name,
        lse=in_call_order(lse)[..., 0] if keeps_lse else None,
        lse_bound=in_call_order(np.where(free, np.inf, lse_bound))[..., 0] if keeps_lse else None,
        free=in_call_order(free),
        _attn_low=attn_low.reshape(shape) if attn_low is not None else 0.0,
        _sum_low=in_call_order(stats["total_low"]),
    )


def widen(array: np.ndarray) -> np.ndarray:
    """Convert exactly to float64; bfloat16 by its bits, so that no library for it is needed."""
    if array.dtype.name == "bfloat16":
        array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # of a signalling NaN, which is a NaN like any other
        return array.astype(np.float64)


def row_order(
    shape: tuple[int, ...], stats_shape: tuple[int, ...], actual_seq_qlen: Any, layout: str, softmax_layout: str
) -> np.ndarray:
    """For each row in the order in which the output has them, the place of its statistics."""
    if layout not in ("SBH", "BSND", "BNSD", "TND") or softmax_layout not in ("TND", "SBH"):
        raise ValueError(
            f"layout is {layout!r}, softmax_layout {softmax_layout!r}; expected SBH, BSND, BNSD or TND, and TND or SBH"
        )
    places = np.arange(int(np.prod(stats_shape[:-1])))
    if layout == "SBH":  # rows (S, B, N), statistics (B, N, S)
        return places.reshape(stats_shape[:-1]).transpose(2, 0, 1).ravel()
    if layout == "BSND":  # rows (B, S, N), statistics (B, N, S)
        return places.reshape(stats_shape[:-1]).transpose(0, 2, 1).ravel()
    if layout == "BNSD" or softmax_layout == "TND":
        return places
    if actual_seq_qlen is None:
        raise ValueError('statistics packed per sequence (softmax_layout="SBH") need actual_seq_qlen')
    heads = shape[1]
    rows = places.reshape(shape[:2])
    ends = [int(end) for end in actual_seq_qlen]
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        own = np.arange(start * heads, end * heads).reshape(heads, end - start)
        rows[start:end] = own.T
    return rows.ravel()


def _merge_elements(parts: list[np.ndarray], rows: RowWeights, dtype: str) -> tuple[np.ndarray, Any, np.ndarray]:
    """Merge a slab of elements, K arrays (rows, D) of float64, with the weights of their rows.

    Exact values come back as sums of two float64 numbers, value and low (0.0 unless the problem is float64), with their
    bound before they are stored.
    """
    double = dtype == "float64"
    value = np.full_like(parts[0], -0.0)  # the sum of nothing: -0.0 + x is x, whatever zero x may be
    bound = np.repeat(rows.floor[:, None], value.shape[1], axis=1)
    for i, part in enumerate(parts):
        finite = np.isfinite(part)
        size = np.abs(part)
        if not finite.all():
            size[~finite] = 0
            bound[~finite & rows.unsure[i][:, None]] = np.inf
        size *= rows.slope[i][:, None]
        bound += size
        product = rows.weight[i][:, None] * part
        product[rows.skipped[i]] = -0.0
        value += product
    low: Any = 0.0
    if double:
        exact, low, usable = _merge_in_double_double(parts, rows)
        value = np.where(usable, exact, value)
        low = np.where(usable, low, 0.0)
    if rows.mixed.any():
        # Sums of mixed sign make weights above 1: products may overflow although the result does not.
        reach = np.zeros(value.shape)
        for part, weight, skipped in zip(parts, rows.weight, rows.skipped, strict=True):
            reach += np.where(np.isfinite(part) & ~skipped[:, None], np.abs(weight[:, None] * part), 0)
        limit = 2.0 ** FORMATS["float64" if double else "float32"].exponent
        bound[rows.mixed[:, None] & (reach >= limit)] = np.inf
    zero = value == 0
    if zero.any():
        # Zero times anything is exact, and so is the sign of the sum of zeros.
        for part, skipped in zip(parts, rows.skipped, strict=True):
            zero &= (part == 0) | skipped[:, None]
        unsure = np.logical_or.reduce(rows.unsure)
        bound[zero & np.isfinite(bound) & ~unsure[:, None]] = 0
    value[rows.empty] = 0.0
    bound[rows.verbatim] = 0
    return value, low, bound


def _merge_in_double_double(parts: list[np.ndarray], rows: RowWeights) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum weight times output in double-double, on mantissas, so that nothing overflows or underflows.

    With value and low comes where they are usable: elsewhere IEEE arithmetic on special values, or on zeros, decides.
    """
    usable = np.ones(parts[0].shape, bool)
    any_product = np.zeros(parts[0].shape, bool)
    terms: list[tuple[dd.HighLow, np.ndarray]] = []
    for i, part in enumerate(parts):
        counts = ~rows.skipped[i][:, None]
        usable &= ~counts | (np.isfinite(part) & np.isfinite(rows.weight[i])[:, None])
        mantissa, exponent = np.frexp(np.where(counts & np.isfinite(part), part, 0))
        any_product |= mantissa != 0
        weight = rows.mantissa[0][i][:, None], rows.mantissa[1][i][:, None]
        product = dd.multiply(weight, (mantissa, np.zeros_like(mantissa)))
        terms.append((product, np.where(mantissa == 0, -(10**6), exponent + rows.exponent[i][:, None])))
    top = np.maximum.reduce([exponent for _, exponent in terms])
    total: dd.HighLow = (np.zeros_like(parts[0]), np.zeros_like(parts[0]))
    for (high, low), exponent in terms:
        shift = np.maximum(exponent - top, -2000)
        total = dd.add(total, (np.ldexp(high, shift), np.ldexp(low, shift)))
    return np.ldexp(total[0], top), np.ldexp(total[1], top), usable & any_product


@dataclass(frozen=True, eq=False)
class Slab:
    """Some rows: the outputs of K states, (R, D) each, their weights, and their statistics, (K, R)."""

    parts: list[np.ndarray]
    rows: RowWeights
    maxima: np.ndarray
    sums: np.ndarray
    double: bool

    @property
    def live(self) -> np.ndarray:
        """Which sides are not empty, (K, R)."""
        return (self.sums != 0) & (self.maxima != -np.inf)


class Allowance(NamedTuple):
    """What is added to a bound: to that of elements, to that of a log-sum-exp, and where nothing is asked, by rows."""

    elements: Any = 0.0
    lse: Any = 0.0
    nothing: Any = False


def _behind_no_weight(slab: Slab) -> Allowance:
    more: Any = 0.0
    for part, skipped, unsure in zip(slab.parts, slab.rows.skipped, slab.rows.unsure, strict=True):
        more = more + np.where((skipped | unsure)[:, None] & ~np.isfinite(part), np.inf, 0.0)
    return Allowance(elements=more)


def _of_any_weight(slab: Slab) -> Allowance:
    """Of o - w (o - o_i), where w = 1 / (1 + e): what is taken off is rounded as large as both outputs are, or is infinite.

    The addition, the quotient (4 u), the difference and the product; that of e counts only as much as the other side. The
    log-sum-exp that goes with it is lse - logsigmoid(lse - lse_i), where the difference is rounded, and its sum with the
    logarithm, as far apart as the two may be.
    """
    u = 2.0**-53 if slab.double else 2.0**-24
    sizes = [np.where(np.isnan(part), 0.0, np.abs(part)) for part in slab.parts]
    each = np.where(slab.live, slab.maxima + np.log(np.where(slab.live, slab.sums, 1.0)), np.nan)
    apart = np.fmax.reduce(each) - np.fmin.reduce(each)
    return Allowance(7 * u * np.sum(sizes, axis=0), 2 * u * (1 + np.where(np.isnan(apart), 0.0, apart)))


def _of_nothing_subnormal(slab: Slab) -> Allowance:
    """What is below the smallest normal number may be 0: an output, a weight, their product or sum; a sum, as of an empty side."""
    least = np.finfo(np.float64 if slab.double else np.float32).tiny
    sizes = np.sum([np.where(np.isfinite(part), np.abs(part), 0.0) for part in slab.parts], axis=0)
    lost = (slab.live & (np.abs(slab.sums) < least)).any(axis=0)
    return Allowance(elements=np.where(sizes == 0, 0.0, least * (sizes + 2 * len(slab.parts) + 1)), nothing=lost)


# What a kernel is allowed that does not promise a property of rau.backends.PROPERTIES.
ALLOWANCES: dict[str, Callable[[Slab], Allowance]] = {
    "one-empty": lambda slab: Allowance(nothing=slab.live.any(axis=0) & ~slab.live.all(axis=0)),
    "two-empty": lambda slab: Allowance(nothing=slab.rows.empty),
    "payload": _behind_no_weight,
    "small-weights": _of_any_weight,
    "infinity": lambda slab: Allowance(nothing=(slab.live & (np.isposinf(slab.maxima) | np.isposinf(slab.sums))).any(axis=0)),
    "nan": lambda slab: Allowance(nothing=(slab.live & (np.isnan(slab.maxima) | np.isnan(slab.sums))).any(axis=0)),
    "signed-zero": lambda slab: Allowance(elements=2.0**-1074),
    "subnormal": _of_nothing_subnormal,
}
