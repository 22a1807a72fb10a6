"""Known mistakes of kernels that take and return a log-sum-exp. Those of :mod:`.mistakes` are theirs too, but for some.

What they are made on is :meth:`Steps.keeping_lse`: log-sum-exps as maxima, sums of 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from rau.state import AttentionState
from rau.testing.diagnosis.mistakes import (
    MISTAKES,
    Mistake,
    all_products,
    known,
    part_of,
)
from rau.testing.diagnosis.steps import Array, Steps, to_bfloat16, to_float16

_OWN: dict[str, Mistake] = {}  # one of a name that MISTAKES has replaces that
# Of sums, which are all 1; of lanes, of which there is one; and one that the bound of a log-sum-exp allows.
_NOT_THEIRS = (
    "base-e-converted-twice", "log-sum-exp-instead-of-max-and-sum", "sums-left-out", "sums-left-out-of-the-output",
    "lane-by-element", "last-lane", "mean-of-lanes", "weights-do-not-sum-to-1",
)  # fmt: skip
_LN2 = np.log(2.0)
_GUARD = (
    "A log-sum-exp of -inf is a row without keys: return the other side as it is, and 0 and -inf where both are. Leave out "
    "products with a weight of 0."
)
_AXES = "Say in which axes the kernel has it: AttentionState.from_lse(..., lse_layout=...), or LSEBackend.lse_layout."
_FLOAT32 = "Keep the log-sum-exp in float32, whatever the dtype of the outputs: its error is one of all weights."


def mistakes_with_lse() -> dict[str, Mistake]:
    """Return the mistakes that a kernel with a log-sum-exp may make, by name."""
    return {name: mistake for name, mistake in (MISTAKES | _OWN).items() if name not in _NOT_THEIRS}


def _merged(rows: Steps) -> Array:
    return rows.combine(rows.weights(rows.factors()))


def _lse(rows: Steps) -> Array:
    """The right one, (R, 1)."""
    total = rows.total(rows.factors())
    return np.where(total == 0, -np.inf, rows.maximum + np.log(total))


def _in_base(rows: Steps, scale: float) -> AttentionState:
    """Take log-sum-exps for `scale` times what they are, and give back one of the same kind."""
    scaled = rows.having(rows.maxima * scale, rows.sums)
    return scaled.store_lse(_merged(scaled), _lse(scaled) / scale)


@known(
    "A natural log-sum-exp was read as one of base 2: there is exp2 and log2 where exp and log should be.",
    'FlashAttention, PyTorch and vLLM return natural logarithms, FlashInfer logarithms to base 2: Capabilities(lse_base="e"), '
    'AttentionState.from_lse(..., base="e"), or multiply by log2(e) before and by ln(2) after.',
    _OWN,
)
def base_2_instead_of_e(rows: Steps) -> AttentionState | None:
    return _in_base(rows, _LN2)


@known(
    "A log-sum-exp of base 2 was read as a natural one: there is exp and log where exp2 and log2 should be.",
    'FlashInfer returns logarithms to base 2: Capabilities(lse_base="2"), AttentionState.from_lse(..., base="2"), or multiply '
    "by ln(2) before and by log2(e) after.",
    _OWN,
)
def base_e_instead_of_2(rows: Steps) -> AttentionState | None:
    return _in_base(rows, 1 / _LN2)


@known(
    "The output is right, but the logarithm of the sum is to the other base: log where log2 should be, or the reverse.",
    "To base 2 it is m + log2(sum of 2**(lse_i - m)), to base e it is m + log(sum of exp(lse_i - m)).",
    _OWN,
)
def logarithm_to_the_other_base(rows: Steps) -> AttentionState | None:
    return _with_logarithm(rows, _LN2)


@part_of("logarithm-to-the-other-base", _OWN)
def _log2_of_natural(rows: Steps) -> AttentionState | None:
    return _with_logarithm(rows, 1 / _LN2)


def _with_logarithm(rows: Steps, times: float) -> AttentionState:
    total = rows.total(rows.factors())
    return rows.store_lse(_merged(rows), np.where(total == 0, -np.inf, rows.maximum + times * np.log(total)))


def _read_as_transposed(row_of: Array) -> Array:
    """Where a kernel that expects heads first reads the log-sum-exp of each row, where tokens are first."""
    batch, tokens, heads = row_of.shape
    source = np.empty(row_of.size, np.int64)
    source[row_of.swapaxes(1, 2).reshape(batch, tokens * heads)] = row_of.reshape(batch, tokens * heads)
    return source


def _transposed(by_batch: bool, inverse: bool, returned: bool, rows: Steps) -> AttentionState | None:
    source = _read_as_transposed(rows.row_of(by_batch))
    if inverse:
        source = np.argsort(source)
    if (source == np.arange(source.size)).all():
        return None
    if returned:
        return rows.store_lse(_merged(rows), _lse(rows)[source])
    other = rows.having(rows.maxima[:, source], rows.sums[:, source])
    return rows.store_lse(_merged(other), _lse(rows))  # which it writes where it reads: they are right


@known("The log-sum-exp is (T, N), and was read as (N, T), or the reverse; or (B, S, N) for (B, N, S).", _AXES, _OWN)
def log_sum_exp_transposed(rows: Steps) -> AttentionState | None:
    return _transposed(True, False, False, rows)


@known("The output is right, but the log-sum-exp came back transposed.", _AXES, _OWN)
def log_sum_exp_returned_transposed(rows: Steps) -> AttentionState | None:
    return _transposed(True, False, True, rows)


for _by_batch, _inverse in ((True, True), (False, False), (False, True)):
    part_of("log-sum-exp-transposed", _OWN)(partial(_transposed, _by_batch, _inverse, False))
    part_of("log-sum-exp-returned-transposed", _OWN)(partial(_transposed, _by_batch, _inverse, True))


def _padded(heads_first: bool, read_heads_first: bool, pad: float, rows: Steps) -> AttentionState | None:
    if rows.lengths is None or len(rows.lengths) < 3:
        return None
    row_of, lengths = rows.row_of()[0], np.diff(rows.lengths)
    padded = np.full((len(lengths), lengths.max(), row_of.shape[1]), -1)
    for i, length in enumerate(lengths):
        padded[i, :length] = row_of[rows.lengths[i] : rows.lengths[i + 1]]
    held = (padded.swapaxes(1, 2) if heads_first else padded).ravel()[: row_of.size]
    source = np.empty(row_of.size, np.int64)
    source[(row_of.T if read_heads_first else row_of).ravel()] = held
    if heads_first == read_heads_first and (source == np.arange(source.size)).all():
        return None
    lse = np.where(source[:, None] < 0, pad, rows.maxima[:, source])
    other = rows.having(lse, np.where(lse == -np.inf, 0.0, 1.0))
    return rows.store_lse(_merged(other), _lse(rows))


@known(
    "The log-sum-exp is padded to the longest sequence, (B, N, S), as some calls for sequences of different lengths return it, "
    "and was read as if tokens followed one another.",
    'Pass lse_layout="BNS" and actual_seq_qlen to AttentionState.from_lse.',
    _OWN,
)
def log_sum_exp_padded(rows: Steps) -> AttentionState | None:
    return _padded(True, True, -np.inf, rows)


for _first, _read in ((True, True), (True, False), (False, True), (False, False)):
    for _pad in (-np.inf, np.inf, 0.0):
        part_of("log-sum-exp-padded", _OWN)(partial(_padded, _first, _read, _pad))


def _narrowed(rows: Steps, narrow: Callable[[Array], Array]) -> AttentionState:
    other = rows.having(narrow(rows.maxima), rows.sums)
    return rows.store_lse(_merged(other), narrow(_lse(other)))


@known("The log-sum-exp was rounded to float16.", _FLOAT32, _OWN)
def statistics_in_float16(rows: Steps) -> AttentionState | None:
    return _narrowed(rows, to_float16)


@known("The log-sum-exp was rounded to bfloat16.", _FLOAT32, _OWN)
def statistics_in_bfloat16(rows: Steps) -> AttentionState | None:
    return _narrowed(rows, to_bfloat16)


@known(
    "The update is o - sigmoid(lse_cur - lse) * (o - o_cur), which is NaN where both sides are empty, as -inf - (-inf) is, "
    "and reads what an empty side holds: large numbers there cancel what is right.",
    _GUARD + " Elsewhere add the two products.",
    _OWN,
)
def sigmoid_form(rows: Steps) -> AttentionState | None:
    return _sigmoid(rows, lambda lse, its: lse + np.logaddexp(0.0, its - lse))


@part_of("sigmoid-form", _OWN)
def _with_logaddexp(rows: Steps) -> AttentionState | None:
    return _sigmoid(rows, np.logaddexp)


def _sigmoid(rows: Steps, together: Callable[[Array, Array], Array]) -> AttentionState:
    output, lse = rows.outputs[0], rows.maxima[0].astype(np.float64)
    for part, its in zip(rows.outputs[1:], rows.maxima[1:].astype(np.float64), strict=True):
        weight = (1 / (1 + np.exp(lse - its))).astype(rows.stats_dtype)
        output = output - weight * (output - part)
        lse = together(lse, its).astype(rows.stats_dtype).astype(np.float64)
    return rows.store_lse(output, lse)


@known("What an empty side holds leaks: 0 * NaN and -inf - (-inf) are NaN.", _GUARD, _OWN)
def empty_sides_not_guarded(rows: Steps) -> AttentionState | None:
    return _unguarded(rows, two_empty=True, behind=True)


@part_of("empty-sides-not-guarded", _OWN)
def _two_empty_sides(rows: Steps) -> AttentionState | None:
    return _unguarded(rows, two_empty=True, behind=False)


@part_of("empty-sides-not-guarded", _OWN)
def _what_is_behind(rows: Steps) -> AttentionState | None:
    return _unguarded(rows, two_empty=False, behind=True)


def _unguarded(rows: Steps, *, two_empty: bool, behind: bool) -> AttentionState:
    weights = rows.weights(rows.factors())
    output = all_products(rows, weights) if behind else rows.combine(weights)
    nothing = ~rows.live.any(axis=0) & two_empty
    return rows.store_lse(np.where(nothing, np.nan, output), np.where(nothing, np.nan, _lse(rows)))


@known(
    "The log-sum-exp is clamped, or a running maximum starts, at a finite number: an empty side counts, and two of them give "
    "the mean of what they hold.",
    _GUARD + " Start from -inf.",
    _OWN,
)
def log_sum_exp_clamped(rows: Steps) -> AttentionState | None:
    return _clamped(-5e4, rows)


def _clamped(least: float, rows: Steps) -> AttentionState:
    other = rows.having(np.maximum(rows.maxima, least), np.ones_like(rows.sums))
    return rows.store_lse(_merged(other), _lse(other))


for _least in (-1e4, -1e9, -1e20, -1e30, float(np.finfo(np.float32).min)):
    part_of("log-sum-exp-clamped", _OWN)(partial(_clamped, _least))


@known(
    "The factor of an empty side is 1, as if it had the row's maximum: exp(-inf - m) was not taken, or guarded the wrong way.",
    _GUARD,
    _OWN,
)
def empty_side_not_rescaled(rows: Steps) -> AttentionState | None:
    empty = ~rows.live & rows.live.any(axis=0)
    other = rows.having(np.where(empty, rows.maximum, rows.maxima), np.where(empty, 1.0, rows.sums))
    return rows.store_lse(_merged(other), _lse(other))
