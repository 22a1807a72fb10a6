"""Known mistakes: what implementations of the operator get wrong, each in a few lines of NumPy.

One list for two uses: ``python -m rau diagnose`` looks for the mistake that reproduces an observed output, and the
tests of the conformance kit make each into a backend that it must catch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from rau.state import AttentionState
from rau.testing.diagnosis.steps import (
    Array,
    Steps,
    flushed_exp,
    in_float32_range,
    summed,
    to_bfloat16,
    to_float16,
)

Make: TypeAlias = Callable[[Steps], AttentionState | None]


class Mistake(NamedTuple):
    """One known mistake."""

    name: str
    wrong: str  # what it does, in a sentence
    change: str  # what to do about it
    # Each returns a wrong result, or None where the call leaves no room for it: the first makes the mistake as a whole, the
    # others a part of it each.
    makes: tuple[Make, ...]

    def __call__(self, rows: Steps) -> AttentionState | None:
        """Make it as a whole."""
        with np.errstate(all="ignore"):
            return self.makes[0](rows)

    def results(self, rows: Steps) -> list[AttentionState]:
        """Make it in every way."""
        with np.errstate(all="ignore"):
            return [result for result in (make(rows) for make in self.makes) if result is not None]


MISTAKES: dict[str, Mistake] = {}
_LANE_0 = "Read lane 0, and find out what wrote statistics whose lanes differ."
_STATISTICS = "Keep softmax_max and softmax_sum in float32, whatever the dtype of the outputs."
_WEIGHTS = "Keep the weights in float32 and round the output once, at the end."
_WRITTEN = "See whether the result is written, and read, where it is expected."
_LAST = "Look at the end of the loop over tokens: cumulative lengths are exclusive ends."


def known(wrong: str, change: str, into: dict[str, Mistake] = MISTAKES) -> Callable[[Make], Make]:
    """Enter a mistake, under the name of the function that makes it."""

    def enter(make: Make) -> Make:
        name = make.__name__.replace("_", "-")
        into[name] = Mistake(name, wrong, change, (make,))
        return make

    return enter


def part_of(name: str, into: dict[str, Mistake] = MISTAKES) -> Callable[[Make], Make]:
    """Enter another way of making a mistake."""

    def enter(make: Make) -> Make:
        into[name] = into[name]._replace(makes=(*into[name].makes, make))
        return make

    return enter


@known(
    "The statistics are packed per sequence and were read token-major.",
    "Statistic of token t and head n of a sequence that starts at t0 with S tokens: row t0*N + n*S + (t - t0). For rau "
    'pass softmax_layout="SBH"; rau.reorder_softmax(..., to="TND") makes token-major copies.',
)
def packed_read_as_token_major(rows: Steps) -> AttentionState | None:
    return rows.reading("TND").merge() if rows.packed else None


@known(
    "The statistics are token-major and were read as packed per sequence, which is how the vendor's kernels read them.",
    "Statistic of token t and head n: row t*N + n. If the statistics are packed after all, as npu_fusion_attention emits "
    'them, say so: softmax_layout="SBH".',
)
def token_major_read_as_packed(rows: Steps) -> AttentionState | None:
    return rows.reading("SBH").merge() if rows.lengths is not None and not rows.packed else None


@known(
    "Natural statistics were taken to be in base 2: there is exp2 where exp should be.",
    "exp(x) is exp2(x * log2(e)). If the statistics are logarithms to base 2 (FlashInfer's are), convert them first: "
    'AttentionState.from_lse(..., base="2").',
)
def base_2_instead_of_e(rows: Steps) -> AttentionState | None:
    return rows.merge(lambda x: np.exp2(x))


@known(
    "The exponent was multiplied by log2(e) and then put into exp, not exp2: converted twice.",
    'Use exp with natural statistics as they are. A natural log-sum-exp is AttentionState.from_lse(..., base="e").',
)
def base_e_converted_twice(rows: Steps) -> AttentionState | None:
    return rows.merge(lambda x: flushed_exp(x * np.log2(np.e)))


@known(
    "The output is right; instead of max and sum, its log-sum-exp was returned, with a sum of 1.",
    "It is the same state. Return m = max(m_prev, m_cur) and l, or compare m + log(l).",
)
def log_sum_exp_instead_of_max_and_sum(rows: Steps) -> AttentionState | None:
    factors = rows.factors()
    lse = rows.maximum + np.log(rows.total(factors))
    return rows.store(rows.combine(rows.weights(factors)), lse, np.ones_like(lse))


@known(
    "The sums are left out, as in a widespread copy of the formula: l_cur from l, and both from the output.",
    "l = l_prev * exp(m_prev - m) + l_cur * exp(m_cur - m); each output's weight is its own term of that sum, over l.",
)
def sums_left_out(rows: Steps) -> AttentionState | None:
    bare = np.where(rows.live, flushed_exp(rows.maxima - rows.maximum), 0.0)
    total = summed(np.stack([rows.factors()[0], *bare[1:]]))
    return rows.store(rows.combine(_over(bare, total, rows)), rows.maximum, total)


def _over(factors: Array, total: Array, rows: Steps) -> Array:
    """Divide by l, where there is anything: what comes of empty sides is another mistake."""
    return np.where(rows.live, factors / total, 0.0).astype(rows.stats_dtype)


@known(
    "l is right, but the sums are left out of the weights of the outputs.",
    "Weight o_prev with l_prev * exp(m_prev - m) / l, and o_cur with l_cur * exp(m_cur - m) / l.",
)
def sums_left_out_of_the_output(rows: Steps) -> AttentionState | None:
    total = rows.total(rows.factors())
    bare = np.where(rows.live, flushed_exp(rows.maxima - rows.maximum), 0.0)
    return rows.store(rows.combine(_over(bare, total, rows)), rows.maximum, total)


@known(
    "The outputs are added up with their weights, but not divided by l.",
    "attn_out is normalised, in and out: divide by l = l_prev * exp(m_prev - m) + l_cur * exp(m_cur - m).",
)
def not_normalised(rows: Steps) -> AttentionState | None:
    factors = rows.factors()
    return rows.store(rows.combine(factors.astype(rows.stats_dtype)), rows.maximum, rows.total(factors))


@known(
    "The sides are swapped: o_prev has cur's weight and o_cur prev's.",
    "Weight o_prev with l_prev * exp(m_prev - m) / l.",
)
def sides_swapped(rows: Steps) -> AttentionState | None:
    factors = rows.factors()
    return rows.store(rows.combine(rows.weights(factors)[::-1]), rows.maximum, rows.total(factors))


@known("The statistics were rounded to float16.", _STATISTICS)
def statistics_in_float16(rows: Steps) -> AttentionState | None:
    return _with_statistics(rows, to_float16)


@known("The statistics were rounded to bfloat16.", _STATISTICS)
def statistics_in_bfloat16(rows: Steps) -> AttentionState | None:
    return _with_statistics(rows, to_bfloat16)


def _with_statistics(rows: Steps, narrow: Callable[[Array], Array]) -> AttentionState:
    rows = rows.having(narrow(rows.maxima), narrow(rows.sums))
    factors = rows.factors()
    return rows.store(rows.combine(rows.weights(factors)), rows.maximum, narrow(rows.total(factors)))


@known("The weights were rounded to float16.", _WEIGHTS)
def weights_in_float16(rows: Steps) -> AttentionState | None:
    return _with_weights(rows, to_float16)


@known("The weights were rounded to bfloat16.", _WEIGHTS)
def weights_in_bfloat16(rows: Steps) -> AttentionState | None:
    return _with_weights(rows, to_bfloat16)


def _with_weights(rows: Steps, narrow: Callable[[Array], Array]) -> AttentionState:
    factors = rows.factors()
    weights = narrow(rows.weights(factors)).astype(rows.stats_dtype)
    return rows.store(rows.combine(weights), rows.maximum, rows.total(factors))


@known(
    "The weights are exp(lse_i - lse), and the log-sum-exps were rounded to float32: they do not sum to 1.",
    "That rounding changes all weights of a row, by up to abs(lse) * 2**-24 of each. Divide a_i = l_i * exp(m_i - m) by "
    "what they add up to, l = a_1 + ... + a_K.",
)
def weights_do_not_sum_to_1(rows: Steps) -> AttentionState | None:
    each = np.where(rows.live, _log_sum_exps(rows), -np.inf)
    whole = np.logaddexp.reduce(each, axis=0).astype(rows.stats_dtype)
    weights = np.where(rows.live, np.exp(each - whole), 0.0).astype(rows.stats_dtype)
    return rows.store(rows.combine(weights), rows.maximum, rows.total(rows.factors()))


def _log_sum_exps(rows: Steps) -> Array:
    """Rounded as they are stored. In float64 otherwise, whatever the rows are in: that rounding is large enough to tell."""
    exact = rows.maxima.astype(np.float64) + np.log(rows.sums.astype(np.float64))
    return exact.astype(rows.stats_dtype).astype(np.float64)


_NARROW = {"float16": to_float16, "bfloat16": to_bfloat16}


@known(
    "The running output was rounded to 16 bits after every update.",
    "Keep it in float32 and round once, after the last: rau.StreamingMerge does, and rau.merge_states merges all at once.",
)
def rounded_at_every_hop(rows: Steps) -> AttentionState | None:
    narrow = _NARROW.get(rows.dtype.name)
    if narrow is None or len(rows.states) < 3:
        return None
    output, maximum, total = rows.outputs[0], rows.maxima[0], rows.sums[0]
    for k in range(1, len(rows.states)):
        pair = rows.having(np.stack([maximum, rows.maxima[k]]), np.stack([total, rows.sums[k]]))
        pair.outputs = [output, rows.outputs[k]]
        factors = pair.factors()
        output = narrow(pair.combine(pair.weights(factors)))
        maximum, total = pair.maximum, pair.total(factors).astype(rows.stats_dtype)
    return rows.store(output, maximum, total)


@known(
    "Weights, products and sums of the outputs were all rounded to the output's 16 bits.",
    "Widen the outputs to float32, and round once, at the end.",
)
def elements_in_16_bits(rows: Steps) -> AttentionState | None:
    narrow = _NARROW.get(rows.dtype.name)
    if narrow is None:
        return None
    factors = rows.factors()
    return rows.store(rows.combine(narrow(rows.weights(factors)), narrow), rows.maximum, rows.total(factors))


@known(
    "The result was cut off to 16 bits, not rounded.",
    "Round to nearest even: add half a unit in the last place before the low bits go; ties go to the even neighbour.",
)
def truncated(rows: Steps) -> AttentionState | None:
    if rows.dtype.name not in ("float16", "bfloat16"):
        return None
    factors = rows.factors()
    output = rows.combine(rows.weights(factors))
    if rows.dtype.name == "bfloat16":
        cut = (output.view(np.uint32) & 0xFFFF0000).view(np.float32)
    else:
        nearest = output.astype(np.float16)
        too_far = np.abs(nearest.astype(np.float32)) > np.abs(output)
        cut = np.where(too_far, np.nextafter(nearest, np.float16(0)), nearest).astype(np.float32)
    return rows.store(np.where(np.isnan(output), output, cut), rows.maximum, rows.total(factors))


@known(
    "Element d was weighted by the statistics of lane d mod 8, as the vendor's kernel does, and the lanes differ.",
    _LANE_0,
)
def lane_by_element(rows: Steps) -> AttentionState | None:
    if not _lanes_differ(rows):
        return None
    every = rows.having(*rows.lanes)
    factors = every.factors()
    lane = np.arange(rows.outputs[0].shape[1]) % rows.lanes[0].shape[-1]
    return rows.store(rows.combine(every.weights(factors)[..., lane]), every.maximum, every.total(factors))


@known("The last lane of the statistics was read.", _LANE_0)
def last_lane(rows: Steps) -> AttentionState | None:
    return rows.having(*(part[..., -1:] for part in rows.lanes)).merge() if _lanes_differ(rows) else None


@known("The mean over the lanes of the statistics was taken.", _LANE_0)
def mean_of_lanes(rows: Steps) -> AttentionState | None:
    if not _lanes_differ(rows):
        return None
    return rows.having(*(part.mean(axis=-1, keepdims=True) for part in rows.lanes)).merge()


def _lanes_differ(rows: Steps) -> bool:
    return any(((part != part[..., :1]) & ~np.isnan(part)).any() for part in rows.lanes)


@known(
    "No maximum is subtracted: exp(m_prev) and exp(m_cur) overflow, or vanish, in float32.",
    "Subtract m = max(m_prev, m_cur) before exponentiating.",
)
def no_max_subtraction(rows: Steps) -> AttentionState | None:
    factors = np.where(rows.live, in_float32_range(rows.sums * in_float32_range(np.exp(rows.maxima))), 0.0)
    total = rows.total(np.where(factors == 0, 0.0, factors * np.exp(-rows.maximum)))
    return rows.store(rows.combine(rows.weights(factors)), rows.maximum, total)


@known(
    "The maximum is stale: prev's is kept, even where cur's is larger.",
    "m = max(m_prev, m_cur), in both exponentials and in the result.",
)
def stale_max(rows: Steps) -> AttentionState | None:
    stale = np.where(rows.live[0], rows.maxima[0], rows.maximum)
    factors = np.where(rows.live, in_float32_range(rows.sums * in_float32_range(np.exp(rows.maxima - stale))), 0.0)
    return rows.store(rows.combine(rows.weights(factors)), stale, rows.total(factors))


@known(
    "The running sum was not rescaled to the new maximum: exp(m_prev - m) is missing.",
    "l_prev, and o_prev's weight with it, take the factor exp(m_prev - m).",
)
def prev_not_rescaled(rows: Steps) -> AttentionState | None:
    factors = rows.factors()
    factors[0] = np.where(rows.live[0], rows.sums[0], 0.0)
    return rows.store(rows.combine(rows.weights(factors)), rows.maximum, rows.total(factors))


@known("The last token of each sequence is left as it was in prev.", _LAST)
def last_token_dropped(rows: Steps) -> AttentionState | None:
    factors, last = rows.factors(), rows.last_tokens()[:, None]
    return rows.store(
        np.where(last, rows.outputs[0], rows.combine(rows.weights(factors))),
        np.where(last, rows.maxima[0], rows.maximum),
        np.where(last, rows.sums[0], rows.total(factors)),
    )


@known("The last token of each sequence was never written, and is zero.", _LAST)
def last_token_zero(rows: Steps) -> AttentionState | None:
    factors, last = rows.factors(), rows.last_tokens()[:, None]
    parts = rows.combine(rows.weights(factors)), rows.maximum, rows.total(factors)
    return rows.store(*(np.where(last, 0, part) for part in parts))


@known(
    "What an empty side holds leaks: 0 * NaN, -inf - (-inf) and 0 / 0 are NaN, and -0.0 + 0 has lost its sign. So does the "
    "vendor's operator, of which two empty sides come as NaN.",
    "A side with sum 0 or max -inf is empty: return the other one as it is, and 0, -inf, 0 where both are. Leave out "
    "products with a weight of 0.",
)
def empty_sides_not_guarded(rows: Steps) -> AttentionState | None:
    maximum, factors = _unguarded(rows)
    weights = (factors / summed(factors)).astype(rows.stats_dtype)
    return rows.store(all_products(rows, weights), maximum, summed(factors))


@part_of("empty-sides-not-guarded")
def _two_empty_sides(rows: Steps) -> AttentionState | None:
    factors = rows.factors()
    output = np.where(rows.live.any(axis=0), rows.combine(rows.weights(factors)), np.nan)
    return rows.store(output, rows.maximum, rows.total(factors))


@part_of("empty-sides-not-guarded")
def _what_is_behind(rows: Steps) -> AttentionState | None:
    factors = rows.factors()
    return rows.store(all_products(rows, rows.weights(factors)), rows.maximum, rows.total(factors))


def _unguarded(rows: Steps) -> tuple[Array, Array]:
    maximum = rows.maxima.max(axis=0)
    return maximum, rows.sums * np.exp(rows.maxima - maximum)


def all_products(rows: Steps, weights: Array) -> Array:
    """Add up, a weight of 0 times whatever there is included: NaN for NaN, and the sign of -0.0 is lost."""
    result, *others = (weight * output for weight, output in zip(weights, rows.outputs, strict=True))
    for product in others:
        result = result + product
    return result


@known(
    "The update is o - sigmoid(lse_cur - lse) * (o - o_cur), which is NaN where both sides are empty, as -inf - (-inf) is, "
    "and reads what an empty side holds: large numbers there cancel what is right.",
    "A side with sum 0 or max -inf is empty: return the other one as it is, and 0, -inf, 0 where both are. Elsewhere add "
    "the two products, o_prev * (a / l) + o_cur * (b / l).",
)
def sigmoid_form(rows: Steps) -> AttentionState | None:
    output, (lse, *others) = rows.outputs[0], _log_sum_exps(rows)
    for part, its in zip(rows.outputs[1:], others, strict=True):
        weight = (1 / (1 + np.exp(lse - its))).astype(rows.stats_dtype)
        output = output - weight * (output - part)
        lse = (lse + np.logaddexp(0.0, its - lse)).astype(rows.stats_dtype).astype(np.float64)
    maximum, factors = _unguarded(rows)
    return rows.store(output, maximum, summed(factors))


@known("Nothing was merged: prev was returned.", _WRITTEN)
def prev_returned(rows: Steps) -> AttentionState | None:
    return rows.states[0] if len(rows.states) > 1 else None


@known("Nothing was merged: cur was returned.", _WRITTEN)
def cur_returned(rows: Steps) -> AttentionState | None:
    if len(rows.states) == 1:
        return None
    return rows.store(rows.outputs[-1], rows.maxima[-1], rows.sums[-1])
