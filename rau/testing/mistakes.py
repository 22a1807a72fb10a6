"""Known mistakes: what implementations of the operator get wrong, each in a few lines of NumPy.

One list for two uses: ``python -m rau diagnose`` looks for the mistake that reproduces an observed output, and the
tests of the conformance kit make each into a backend that it must catch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from rau.state import AttentionState
from rau.testing.plain import Array, Rows, add, exponential, in_float32_range, to_bfloat16, to_float16

Make: TypeAlias = Callable[[Rows], AttentionState | None]


class Mistake(NamedTuple):
    """One known mistake.

    Attributes
    ----------
    name : str
    wrong : str
        What it does, in a sentence.
    change : str
        What to do about it.
    make : callable
        Returns the wrong result of `Rows`, or None where the call leaves no room for the mistake.
    """

    name: str
    wrong: str
    change: str
    make: Make

    def __call__(self, rows: Rows) -> AttentionState | None:
        with np.errstate(all="ignore"):
            return self.make(rows)


MISTAKES: dict[str, Mistake] = {}
_LANE_0 = "Read lane 0; and find out who wrote statistics whose lanes differ."
_STATISTICS = "Keep softmax_max and softmax_sum in float32, whatever the dtype of the outputs."
_WEIGHTS = "Keep the weights in float32 and round the output once, at the end."
_WRITTEN = "See whether the result is written, and read, where it is expected."
_LAST = "Look at the end of the loop over tokens: cumulative lengths are exclusive ends."


def _known(wrong: str, change: str) -> Callable[[Make], Make]:
    def enter(make: Make) -> Make:
        name = make.__name__.replace("_", "-")
        MISTAKES[name] = Mistake(name, wrong, change, make)
        return make

    return enter


@_known(
    "The statistics are packed per sequence and were read token-major.",
    "Statistic of token t and head n of a sequence that starts at t0 with S tokens: row t0*N + n*S + (t - t0). For rau "
    'pass softmax_layout="SBH"; rau.reorder_softmax(..., to="TND") makes token-major copies.',
)
def packed_read_as_token_major(rows: Rows) -> AttentionState | None:
    return rows.reading("TND").merge() if rows.packed else None


@_known(
    "The statistics are token-major and were read as packed per sequence, which is how the vendor's kernels read them.",
    "Statistic of token t and head n: row t*N + n. If the statistics are packed after all, as npu_fusion_attention emits "
    'them, say so: softmax_layout="SBH".',
)
def token_major_read_as_packed(rows: Rows) -> AttentionState | None:
    return rows.reading("SBH").merge() if rows.lengths is not None and not rows.packed else None


@_known(
    "Natural statistics were taken to base 2: exp2 stands where exp should.",
    "exp(x) is exp2(x * log2(e)). If the statistics are logarithms to base 2 (FlashInfer's are), convert them first: "
    'AttentionState.from_lse(..., base="2").',
)
def base_2_instead_of_e(rows: Rows) -> AttentionState | None:
    return rows.merge(lambda x: np.exp2(x))


@_known(
    "The exponent was multiplied by log2(e) and then put into exp, not exp2: converted twice.",
    'Use exp with natural statistics as they are. A natural log-sum-exp is AttentionState.from_lse(..., base="e").',
)
def base_e_converted_twice(rows: Rows) -> AttentionState | None:
    return rows.merge(lambda x: exponential(x * np.log2(np.e)))


@_known(
    "The output is right; instead of max and sum its log-sum-exp came back, with a sum of 1.",
    "It is the same state. Return m = max(m_prev, m_cur) and l, or compare m + log(l).",
)
def log_sum_exp_instead_of_max_and_sum(rows: Rows) -> AttentionState | None:
    factors = rows.factors()
    lse = rows.maximum + np.log(rows.total(factors))
    return rows.store(rows.combine(rows.weights(factors)), lse, np.ones_like(lse))


@_known(
    "The sums are left out as in a widespread copy of the formula: l_cur out of l, and both out of the output.",
    "l = l_prev * exp(m_prev - m) + l_cur * exp(m_cur - m); each output's weight is its own term of that sum, over l.",
)
def sums_left_out(rows: Rows) -> AttentionState | None:
    bare = np.where(rows.live, exponential(rows.maxima - rows.maximum), 0.0)
    total = bare[0] * rows.sums[0] + add(bare[1:]) if len(bare) > 1 else bare[0] * rows.sums[0]
    return rows.store(rows.combine((bare / total).astype(rows.stats_dtype)), rows.maximum, total)


@_known(
    "l is right, but the sums are left out of the weights of the outputs.",
    "Weight o_prev with l_prev * exp(m_prev - m) / l, and o_cur with l_cur * exp(m_cur - m) / l.",
)
def sums_left_out_of_the_output(rows: Rows) -> AttentionState | None:
    total = rows.total(rows.factors())
    bare = np.where(rows.live, exponential(rows.maxima - rows.maximum), 0.0)
    return rows.store(rows.combine((bare / total).astype(rows.stats_dtype)), rows.maximum, total)


@_known(
    "The outputs are added up with their weights, but not divided by l.",
    "attn_out is normalised, in and out: divide by l = l_prev * exp(m_prev - m) + l_cur * exp(m_cur - m).",
)
def not_normalised(rows: Rows) -> AttentionState | None:
    factors = rows.factors()
    return rows.store(rows.combine(factors.astype(rows.stats_dtype)), rows.maximum, rows.total(factors))


@_known(
    "The sides are swapped: o_prev has cur's weight and o_cur prev's.",
    "Weight o_prev with l_prev * exp(m_prev - m) / l.",
)
def sides_swapped(rows: Rows) -> AttentionState | None:
    factors = rows.factors()
    return rows.store(rows.combine(rows.weights(factors)[::-1]), rows.maximum, rows.total(factors))


@_known("The statistics were rounded to float16.", _STATISTICS)
def statistics_in_float16(rows: Rows) -> AttentionState | None:
    return _with_statistics(rows, to_float16)


@_known("The statistics were rounded to bfloat16.", _STATISTICS)
def statistics_in_bfloat16(rows: Rows) -> AttentionState | None:
    return _with_statistics(rows, to_bfloat16)


def _with_statistics(rows: Rows, narrow: Callable[[Array], Array]) -> AttentionState:
    rows = rows.having(narrow(rows.maxima), narrow(rows.sums))
    factors = rows.factors()
    return rows.store(rows.combine(rows.weights(factors)), rows.maximum, narrow(rows.total(factors)))


@_known("The weights were rounded to float16.", _WEIGHTS)
def weights_in_float16(rows: Rows) -> AttentionState | None:
    return _with_weights(rows, to_float16)


@_known("The weights were rounded to bfloat16.", _WEIGHTS)
def weights_in_bfloat16(rows: Rows) -> AttentionState | None:
    return _with_weights(rows, to_bfloat16)


def _with_weights(rows: Rows, narrow: Callable[[Array], Array]) -> AttentionState:
    factors = rows.factors()
    weights = narrow(rows.weights(factors)).astype(rows.stats_dtype)
    return rows.store(rows.combine(weights), rows.maximum, rows.total(factors))


@_known(
    "Weights, products and sums of the outputs were all rounded to the output's 16 bits.",
    "Widen the outputs to float32, and round once, at the end.",
)
def elements_in_16_bits(rows: Rows) -> AttentionState | None:
    if rows.dtype.name not in ("float16", "bfloat16"):
        return None
    narrow = to_float16 if rows.dtype.name == "float16" else to_bfloat16
    factors = rows.factors()
    result = np.zeros_like(rows.outputs[0])
    for weight, output in zip(narrow(rows.weights(factors)), rows.outputs, strict=True):
        result = np.where(weight != 0, narrow(result + narrow(weight * output)), result)
    return rows.store(result, rows.maximum, rows.total(factors))


@_known(
    "The result was cut off to 16 bits, not rounded.",
    "Round to nearest even: add half a unit in the last place before the low bits go; ties go to the even neighbour.",
)
def truncated(rows: Rows) -> AttentionState | None:
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


@_known(
    "Element d was weighted by the statistics of lane d mod 8, as the vendor's kernel does, and the lanes differ.",
    _LANE_0,
)
def lane_by_element(rows: Rows) -> AttentionState | None:
    if not _lanes_differ(rows):
        return None
    every = rows.having(*rows.lanes)
    factors = every.factors()
    lane = np.arange(rows.outputs[0].shape[1]) % rows.lanes[0].shape[-1]
    return rows.store(rows.combine(every.weights(factors)[..., lane]), every.maximum, every.total(factors))


@_known("The last lane of the statistics was read.", _LANE_0)
def last_lane(rows: Rows) -> AttentionState | None:
    return rows.having(*(part[..., -1:] for part in rows.lanes)).merge() if _lanes_differ(rows) else None


@_known("The mean over the lanes of the statistics was taken.", _LANE_0)
def mean_of_lanes(rows: Rows) -> AttentionState | None:
    if not _lanes_differ(rows):
        return None
    return rows.having(*(part.mean(axis=-1, keepdims=True) for part in rows.lanes)).merge()


def _lanes_differ(rows: Rows) -> bool:
    return any(((part != part[..., :1]) & ~np.isnan(part)).any() for part in rows.lanes)


@_known(
    "No maximum is subtracted: exp(m_prev) and exp(m_cur) overflow, or vanish, in float32.",
    "Subtract m = max(m_prev, m_cur) before exponentiating.",
)
def no_max_subtraction(rows: Rows) -> AttentionState | None:
    factors = np.where(rows.live, in_float32_range(rows.sums * in_float32_range(np.exp(rows.maxima))), 0.0)
    total = rows.total(np.where(factors == 0, 0.0, factors * np.exp(-rows.maximum)))
    return rows.store(rows.combine(rows.weights(factors)), rows.maximum, total)


@_known(
    "The maximum is stale: prev's is kept, also where cur's is larger.",
    "m = max(m_prev, m_cur), in both exponentials and in the result.",
)
def stale_max(rows: Rows) -> AttentionState | None:
    stale = np.where(rows.live[0], rows.maxima[0], rows.maximum)
    factors = np.where(rows.live, in_float32_range(rows.sums * in_float32_range(np.exp(rows.maxima - stale))), 0.0)
    return rows.store(rows.combine(rows.weights(factors)), stale, rows.total(factors))


@_known(
    "The running sum was not rescaled to the new maximum: exp(m_prev - m) is missing.",
    "l_prev, and o_prev's weight with it, take the factor exp(m_prev - m).",
)
def prev_not_rescaled(rows: Rows) -> AttentionState | None:
    factors = rows.factors()
    factors[0] = np.where(rows.live[0], rows.sums[0], 0.0)
    return rows.store(rows.combine(rows.weights(factors)), rows.maximum, rows.total(factors))


@_known("The last token of each sequence is left as it was in prev.", _LAST)
def last_token_dropped(rows: Rows) -> AttentionState | None:
    factors, last = rows.factors(), rows.last_tokens()[:, None]
    return rows.store(
        np.where(last, rows.outputs[0], rows.combine(rows.weights(factors))),
        np.where(last, rows.maxima[0], rows.maximum),
        np.where(last, rows.sums[0], rows.total(factors)),
    )


@_known("The last token of each sequence was never written, and is zero.", _LAST)
def last_token_zero(rows: Rows) -> AttentionState | None:
    factors, last = rows.factors(), rows.last_tokens()[:, None]
    parts = rows.combine(rows.weights(factors)), rows.maximum, rows.total(factors)
    return rows.store(*(np.where(last, 0, part) for part in parts))


@_known(
    "What stands behind an empty side leaks: 0 * NaN, or -inf - (-inf), is NaN.",
    "A side with sum 0 or max -inf is empty: return the other one as it is, and 0, -inf, 0 where both are.",
)
def empty_sides_not_guarded(rows: Rows) -> AttentionState | None:
    maximum = rows.maxima.max(axis=0)
    factors = rows.sums * np.exp(rows.maxima - maximum)
    weights = (factors / add(factors)).astype(rows.stats_dtype)
    output = add(np.stack([weight * part for weight, part in zip(weights, rows.outputs, strict=True)]))
    return rows.store(output, maximum, add(factors))


@_known("Nothing was merged: prev came back.", _WRITTEN)
def prev_returned(rows: Rows) -> AttentionState | None:
    return rows.states[0] if len(rows.states) > 1 else None


@_known("Nothing was merged: cur came back.", _WRITTEN)
def cur_returned(rows: Rows) -> AttentionState | None:
    if len(rows.states) == 1:
        return None
    return rows.store(rows.outputs[-1], rows.maxima[-1], rows.sums[-1])
