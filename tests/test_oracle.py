"""The oracle against exact arithmetic in decimals, its bounds, and what compare() must catch."""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from decimal import Decimal, getcontext, localcontext

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rau.testing import compare, oracle
from rau.testing.reference import doubledouble

U, E = 2.0**-24, 2.0**-53
NAN, INF = math.nan, math.inf
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def state(out, maximum, total, dtype=np.float32, lanes=8):
    """A state of one head and one batch entry: out is (rows, D), the statistics are (rows,)."""
    stats = np.float64 if dtype == np.float64 else np.float32
    out = np.atleast_2d(np.asarray(out, np.float64)).astype(dtype)
    maximum, total = (np.asarray(x, np.float64).reshape(1, 1, -1, 1).astype(stats) for x in (maximum, total))
    return out[:, None, :], np.repeat(maximum, lanes, -1), np.repeat(total, lanes, -1)


def recipe(states):
    """The operator's arithmetic, word for word, on states made by `state`: what a right backend returns."""
    dtype = states[0][0].dtype
    compute = np.float64 if dtype == np.float64 else np.float32
    stats = states[0][1].dtype
    m = [s[1][0, 0, :, 0].astype(np.float64) for s in states]
    l = [s[2][0, 0, :, 0].astype(np.float64) for s in states]
    live = [(li != 0) & (mi != -INF) for mi, li in zip(m, l)]
    with np.errstate(all="ignore"):
        top = np.full(m[0].shape, -INF)
        for mi, alive in zip(m, live):
            top = np.where(alive, np.maximum(top, mi), top)
        a = [np.where(alive, li * exponential(mi, top), 0) for mi, li, alive in zip(m, l, live)]
        total = sum(a[1:], a[0])
        huge = np.isinf(total)  # float64 sums may overflow; their shares are still right
        shares = [np.where(huge, ai * 2.0**-64 / sum(aj * 2.0**-64 for aj in a), ai / total) for ai in a]
        alone = sum(live[1:], live[0].astype(int)) == 1
        weights = [np.where(alone, 1.0, share).astype(compute) for share in shares]
        out = np.zeros(states[0][0][:, 0].shape, compute)
        begun = np.zeros(len(out), bool)
        for s, w, alive in zip(states, weights, live):
            used = alive & (w != 0)
            term = w[:, None] * s[0][:, 0].astype(compute)
            out = np.where(used[:, None], np.where(begun[:, None], out + term, term), out)
            begun |= used
        for li, alive in zip(l, live):
            total = np.where(alone & alive, li, total)
        top, total = (np.repeat(x.astype(stats)[None, None, :, None], 8, -1) for x in (top, total))
        return out.astype(dtype)[:, None], top, total


MINIMAX = (
    "0x1.ad92c81f74ea2p-26 0x1.28adf7a9a959ep-22 0x1.71df18fbb1812p-19 0x1.a0199963c408ap-16 0x1.a01a012fec32ap-13 "
    "0x1.6c16c18475a28p-10 0x1.1111111126b37p-7 0x1.55555555506cp-5 0x1.55555555554fep-3 0x1.000000000000ap-1 0x1p0 0x1p0"
)


def exponential(m, top):
    """The operator's exponential of m - top, with what the difference loses."""
    x = m - top
    back = x - m
    lost = (m - (x - back)) - (top + back)
    safe = np.where(x >= -708, x, 0.0)
    k = (safe * float.fromhex("0x1.71547652b82fep+0") + 1.5 * 2**52) - 1.5 * 2**52
    r = (safe - k * float.fromhex("0x1.62e42feep-1")) - k * float.fromhex("0x1.a39ef35793c76p-33")
    p = np.zeros_like(r)
    for coefficient in MINIMAX.split():
        p = p * r + float.fromhex(coefficient)
    q = np.ldexp(p, k.astype(np.int64))
    return np.where(x < -708, 0.0, np.where(np.isnan(x), x, q + q * lost))


def exact_row(maxima, sums, outs):
    """Formula of the operator for live states, in 120 digits: output, sum, weights."""
    with localcontext() as context:
        context.prec, context.Emin, context.Emax = 120, -(10**6), 10**6
        top = max(Decimal(float(m)) for m in maxima)
        a = [Decimal(float(l)) * (Decimal(float(m)) - top).exp() for m, l in zip(maxima, sums)]
        total = sum(a)
        weights = [x / total for x in a]
        return sum(w * Decimal(float(o)) for w, o in zip(weights, outs)), total, weights


def test_double_double_exponential_against_decimals():
    rng = np.random.default_rng(0)
    tiny, multiples = -(10.0 ** -(20 * rng.random(50))), -np.arange(60) * math.log(2) / 2
    x = np.concatenate([-745 * rng.random(300), tiny, np.arange(-745.0, 1.0, 11.0), multiples])
    low = x * 2.0**-54 * rng.uniform(-1, 1, x.size)
    high, rest, exponent = doubledouble.exponential((x, low))
    with localcontext() as context:
        context.prec = 70
        for i in range(x.size):
            truth = (Decimal(float(x[i])) + Decimal(float(low[i]))).exp()
            got = (Decimal(float(high[i])) + Decimal(float(rest[i]))) * Decimal(2) ** int(exponent[i])
            assert abs(got / truth - 1) < Decimal(2) ** -100


@pytest.mark.parametrize("name", ["add", "subtract", "multiply", "divide"])
def test_double_double_operations_against_decimals(name):
    rng = np.random.default_rng(1)
    a, b = (doubledouble.two_sum(rng.uniform(0.5, 1, 200), 2.0**-54 * rng.random(200)) for _ in range(2))
    if name == "subtract":
        result = doubledouble.add(a, (-b[0], -b[1]))
    else:
        result = getattr(doubledouble, name)(a, b)
    with localcontext() as context:
        context.prec = 70
        for i in range(200):
            p, q, got = (Decimal(float(x[0][i])) + Decimal(float(x[1][i])) for x in (a, b, result))
            truth = {"add": p + q, "subtract": p - q, "multiply": p * q, "divide": p / q}[name]
            assert abs(got / truth - 1) < Decimal(2) ** -98


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_oracle_against_decimals(dtype, count, monkeypatch):
    rng = np.random.default_rng(count)
    states = [
        state(rng.standard_normal((20, 3)), 20 * rng.standard_normal(20), rng.random(20) + 0.1, dtype)
        for _ in range(count)
    ]
    expected = oracle(states)
    monkeypatch.setattr(getcontext(), "prec", 120)
    digits = Decimal(10) ** (-28 if dtype == np.float64 else -14)
    for row in range(20):
        maxima, sums = ([s[i][0, 0, row, 0] for s in states] for i in (1, 2))
        for d in range(3):
            out, total, _ = exact_row(maxima, sums, [s[0][row, 0, d] for s in states])
            low = expected._attn_low[row, 0, d] if dtype == np.float64 else 0
            got = Decimal(float(expected.attn_out[row, 0, d])) + Decimal(float(low))
            assert abs(got - out) <= digits * (1 + abs(out))
        got = Decimal(float(expected.softmax_sum[0, 0, row, 3])) + Decimal(
            float(expected._sum_low[0, 0, row, 3])
        )
        assert abs(got / total - 1) < Decimal(10) ** -28
        assert expected.softmax_max[0, 0, row, 5] == max(maxima)


def test_bound_of_two_float32_states_is_the_documented_one():
    rng = np.random.default_rng(0)
    outs, maxima, sums = rng.standard_normal((2, 50)), rng.standard_normal((2, 50)), 1 + rng.random((2, 50))
    states = [state(outs[k][:, None], maxima[k], sums[k]) for k in range(2)]
    expected = oracle(states)
    for row in range(50):
        values = [float(s[0][row, 0, 0]) for s in states]
        _, _, weights = exact_row(
            [s[1][0, 0, row, 0] for s in states], [s[2][0, 0, row, 0] for s in states], values
        )
        terms = sum(float(w) * abs(o) for w, o in zip(weights, values))
        bound = 3 * U * terms + 2.0**-149 + 2.0**-150 * sum(map(abs, values))
        assert bound <= expected.attn_bound[row, 0, 0] <= bound * (1 + 2.0**-22)


def test_subnormal_term_of_the_bound():
    expected = oracle([state([[2.0**-149]], 0, 1), state([[0.0]], 0, 1)])
    assert expected.attn_bound[0, 0, 0] == pytest.approx(2.0**-149, rel=1e-6)
    # A weight of about e^-100, which is subnormal in float32, on an output of 2^100.
    expected = oracle([state([[0.0]], 0, 1), state([[2.0**100]], -100, 1)])
    weight = math.exp(-100)
    assert expected.attn_bound[0, 0, 0] == pytest.approx(2.0**-50 + 3 * U * weight * 2.0**100, rel=1e-6)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_bound_of_k_states(count):
    states = [state([[1.0]], 0, 1) for _ in range(count)]
    assert oracle(states).attn_bound[0, 0, 0] == pytest.approx((count + 1) * U, rel=1e-6)
    # In float64: additions of the sum, division, product, additions; the exponentials are exact here.
    states = [state([[1.0]], 0, 1, np.float64) for _ in range(count)]
    assert oracle(states).attn_bound[0, 0, 0] == pytest.approx(2 * count * E, rel=1e-6)
    # Only the live ones count.
    states = [state([[1.0]], 0, 1), state([[1.0]], 0, 1), *[state([[9.0]], -INF, 1) for _ in range(count)]]
    assert oracle(states).attn_bound[0, 0, 0] == pytest.approx(3 * U, rel=1e-6)


def test_bound_of_two_float64_states_is_about_eight_units():
    expected = oracle([state([[1.0]], 0, 1, np.float64), state([[1.0]], -1.5, 1, np.float64)])
    assert 4 * E < expected.attn_bound[0, 0, 0] < 8.7 * E


@pytest.mark.parametrize(("dtype", "half_ulp"), [(np.float16, 2.0**-11), (ml_dtypes.bfloat16, 2.0**-8)])
def test_bound_in_16_bits_adds_half_a_unit(dtype, half_ulp):
    states = [state([[1.0]], 0, 1, dtype), state([[1.25]], 0, 1, dtype)]
    assert oracle(states).attn_bound[0, 0, 0] == pytest.approx(half_ulp + 3 * U * 1.125, rel=1e-6)


def test_bound_of_the_sum_is_half_a_unit_in_the_last_place():
    assert oracle([state(1, 0, 1), state(1, 0, 2)]).sum_bound[0, 0, 0, 0] == pytest.approx(2 * U, rel=1e-6)
    tiny = 2.0**-149  # a subnormal sum is half a unit off at most, too
    assert oracle([state(1, 0, tiny), state(1, -1, tiny)]).sum_bound[0, 0, 0, 0] == pytest.approx(
        tiny / 2, rel=1e-6
    )


SILENT = {
    # name: two (out, max, sum), then the (out, max, sum) that the contract wants
    "both empty": ((7, -INF, 3), (NAN, 5, 0), (0, -INF, 0)),
    "both empty, sum -0": ((7, 1, -0.0), (NAN, NAN, 0), (0, -INF, 0)),
    "one empty by max": ((NAN, -INF, NAN), (2, -3, 4), (2, -3, 4)),
    "one empty by sum": ((INF, NAN, 0), (-0.0, 3, -4), (-0.0, 3, -4)),
    "one empty, live holds NaN": ((1, -INF, 1), (NAN, NAN, NAN), (NAN, NAN, NAN)),
    "one empty, live holds infinities": ((1, 9, 0), (-INF, INF, INF), (-INF, INF, INF)),
    "a max is NaN": ((1, NAN, 1), (2, 0, 1), (NAN, NAN, NAN)),
    "a max is NaN, the other +inf": ((1, NAN, 1), (2, INF, 1), (NAN, NAN, NAN)),
    "a sum is NaN": ((1, 3, NAN), (2, 4, 1), (NAN, 4, NAN)),
    "a sum is NaN behind a max of +inf": ((1, INF, NAN), (2, 4, 1), (NAN, INF, NAN)),
    "a max is +inf": ((1, INF, 1), (2, 4, 1), (NAN, INF, NAN)),
    "both maxima are +inf": ((1, INF, 1), (2, INF, 1), (NAN, INF, NAN)),
    "a sum is +inf": ((1, 3, INF), (2, 4, 1), (NAN, 4, INF)),
    "a sum is +inf, its factor 0": ((1, -710, INF), (2, 0, 1), (NAN, 0, NAN)),
    "a sum is +inf, its factor tiny": ((1, -707, INF), (2, 0, 1), (NAN, 0, INF)),
    "sums of both infinities": ((1, 0, INF), (2, 0, -INF), (NAN, 0, NAN)),
    "the new sum exceeds float32": ((1, 0, 3e38), (2, 0, 3e38), (1.5, 0, INF)),
    "a sum is negative": ((1, 0, -1), (2, 0, 3), (2.5, 0, 2)),
    "both sums are negative": ((1, 0, -1), (2, 0, -3), (1.75, 0, -4)),
    "a new sum of 0 by cancellation": ((1, 0, -1), (2, 0, 1), (NAN, 0, 0)),
    "cancellation, infinite without NaN": ((-1, 0, -1), (2, 0, 1), (INF, 0, 0)),
    "a weight rounds to 0, NaN behind it": ((NAN, -110, 1), (2, 0, 1), (2, 0, 1)),
    "a weight rounds to 0, infinity behind it": ((INF, -750, 1), (2, 0, 1), (2, 0, 1)),
    "a weight rounds to 0, the other holds -0.0": ((5, -110, 1), (-0.0, 0, 1), (-0.0, 0, 1)),
    "a weight is subnormal, NaN behind it": ((NAN, -100, 1), (2, 0, 1), (NAN, 0, 1)),
    "infinity in an element": ((INF, 0, 1), (2, 0, 1), (INF, 0, 2)),
    "infinities of both signs in an element": ((INF, 0, 1), (-INF, 0, 1), (NAN, 0, 2)),
    "infinity behind a negative sum": ((INF, 0, -1), (2, 0, 3), (-INF, 0, 2)),
    "NaN in an element": ((NAN, 0, 1), (2, 0, 1), (NAN, 0, 2)),
    "zeros of both signs": ((-0.0, 0, 1), (0.0, 0, 1), (0.0, 0, 2)),
    "negative zeros": ((-0.0, 0, 1), (-0.0, 0, 1), (-0.0, 0, 2)),
}


FLOAT32_ONLY = ("exceeds", "rounds to 0", "subnormal")  # float64 has these thresholds elsewhere


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, np.float32) for case in SILENT]
    + [(case, np.float64) for case in SILENT if not any(word in case for word in FLOAT32_ONLY)],
)
def test_where_the_reference_is_silent(case, dtype, swapped):
    sides, wanted = list(SILENT[case][:2]), SILENT[case][2]
    if swapped:
        sides.reverse()
    # A second element stays ordinary: nothing spills over. So does a second row.
    states = [state([[out, 1.0], [1.0, 1.0]], [m, 0], [l, 1], dtype) for out, m, l in sides]
    expected = oracle(states)
    right = state([[wanted[0], 1.0], [1.0, 1.0]], [wanted[1], 0], [wanted[2], 2], dtype)
    if case in ("both empty", "both empty, sum -0"):
        right[0][0, 0, 1] = 0
    elif np.isnan(wanted[2]) or (np.isinf(wanted[2]) and "exceeds" not in case) or "cancellation" in case:
        right[0][0, 0, 1] = NAN if case != "one empty, live holds infinities" else 1
        if case == "one empty, live holds NaN":
            right[0][0, 0, 1] = 1
    assert compare(right, expected).passed, compare(right, expected)
    assert compare(recipe(states), expected).passed, compare(recipe(states), expected)
    wrong = [array.copy() for array in right]
    wrong[0][0, 0, 0] = 0.123
    assert not compare(wrong, expected).passed
    # The rule for K states: empty sides are ignored wherever they stand.
    nothing = state([[NAN, NAN], [5, 5]], [-INF, 3], [1, 0], dtype)
    assert compare(right, oracle([nothing, states[0], nothing, states[1], nothing])).passed


def test_float64_sum_that_overflows_is_infinite_and_its_output_right():
    expected = oracle([state([[1.0]], 0, 1.5e308, np.float64), state([[4.0]], 0, 0.75e308, np.float64)])
    assert expected.softmax_sum[0, 0, 0, 0] == INF
    assert expected.attn_out[0, 0, 0] == 2.0
    assert expected.attn_bound[0, 0, 0] < 1e-14


def test_float64_extremes():
    # Outputs next to overflow, and weights far below the smallest float64: on mantissas, nothing is lost.
    big = 1.7e308
    expected = oracle([state([[big]], 0, 1, np.float64), state([[big]], 0, 3, np.float64)])
    assert expected.attn_out[0, 0, 0] == big
    assert np.isfinite(expected.attn_bound).all()
    expected = oracle([state([[1.0]], 1e308, 1, np.float64), state([[NAN]], -1e308, 1, np.float64)])
    assert (expected.attn_out[0, 0, 0], expected.softmax_sum[0, 0, 0, 0]) == (1.0, 1.0)


def test_around_the_threshold_of_skipping_either_answer_is_right():
    # Sums 2^-149 and 2: the weight is 2^-150, which rounds to 0. With NaN behind it, on either side of it.
    def expected_of(total):
        return oracle([state([[NAN]], 0, 2.0**-149), state([[3.0]], 0, total)])

    skipped, read = state([[3.0]], 0, 2.0), state([[NAN]], 0, 2.0)
    assert compare(skipped, expected_of(2.0)).passed
    assert compare(read, expected_of(2.0)).passed
    above, below = expected_of(2.0 - 2**-18), expected_of(2.0 + 2**-18)
    assert np.isnan(above.attn_out[0, 0, 0]) and below.attn_out[0, 0, 0] == 3.0
    assert not compare(read, below).passed and not compare(skipped, above).passed


def test_hopeless_cancellation_promises_nothing_of_the_output():
    expected = oracle([state([[1.0]], 0, 1), state([[2.0]], 0, -1), state([[3.0]], -80, 1)])
    assert expected.attn_bound[0, 0, 0] == INF
    assert np.isfinite(expected.sum_bound[0, 0, 0, 0])


def test_overflow_to_infinity_is_right_at_the_threshold_only():
    def share(value, exact_sum):
        expected = oracle(
            [state([[65504.0]], 0, 1, np.float16), state([[65504.0]], 0, exact_sum, np.float16)]
        )
        return compare(state([[value]], 0, 1 + exact_sum, np.float16), expected).attn_share

    assert share(65504.0, 1) <= 1
    assert share(INF, 1) == INF
    # Negative sums extrapolate: 65504 * 3 - 65440 * 2 = 65632, which float16 cannot hold.
    expected = oracle([state([[65504.0]], 0, 3, np.float16), state([[65440.0]], 0, -2, np.float16)])
    assert compare(state([[INF]], 0, 1, np.float16), expected).passed
    assert not compare(state([[-INF]], 0, 1, np.float16), expected).passed
    assert not compare(state([[65504.0]], 0, 1, np.float16), expected).passed


hostile = st.one_of(
    st.floats(-30, 30, width=32),
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from(
        [0.0, -0.0, 1.0, -1.0, NAN, INF, -INF, -103.5, -104.0, -708.0, -709.0, 2.0**-149, 2.0**-126, 3e38]
    ),
)
rows_of = st.integers(2, 5).flatmap(
    lambda count: st.lists(st.tuples(hostile, hostile, hostile, hostile), min_size=count, max_size=count)
)


@settings(max_examples=400, deadline=None)
@given(st.lists(rows_of, min_size=1, max_size=1), st.sampled_from(DTYPES))
def test_right_arithmetic_is_within_the_bound_on_hostile_states(rows, dtype):
    with np.errstate(all="ignore"):
        states = [state([[a, b]], m, l, dtype) for a, b, m, l in rows[0]]
        comparison = compare(recipe(states), oracle(states))
    assert comparison.passed, comparison


def hostile_numbers(rng, count, dtype, what):
    """Ordinary numbers, any bits at all, and what is special; maxima close together, sums mostly positive."""
    bits = rng.integers(0, 2**64, count, dtype=np.uint64)
    anything = bits.view(np.float64)
    if dtype != np.float64:
        anything = (bits >> np.uint64(32)).astype(np.uint32).view(np.float32).astype(np.float64)
    ordinary = rng.uniform(-30, 30, count)
    special = [0.0, -0.0, 1.0, -1.0, NAN, INF, -INF, -103.97, -104.0, -708.0, -708.0000000001, -709.0,
               65504.0, 2.0**-149, 2.0**-126, 3e38, -3e38, 2.0**-1074, 1e308, -1e308, 1.5e-300]  # fmt: skip
    pools = [ordinary, anything, np.rint(ordinary / 10), rng.choice(special, count),
             ordinary * 10.0 ** rng.integers(-45, 38, count)]  # fmt: skip
    numbers = np.choose(rng.choice(5, count, p=[0.4, 0.1, 0.2, 0.15, 0.15]), pools)
    return np.where(rng.random(count) < 0.7, np.abs(numbers), numbers) if what == "sums" else numbers


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("dtype", DTYPES)
def test_right_arithmetic_is_within_the_bound_on_many_hostile_rows(dtype, seed):
    rng = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        states = [
            state(
                hostile_numbers(rng, 6000, dtype, "outputs").reshape(2000, 3),
                hostile_numbers(rng, 2000, dtype, "maxima"),
                hostile_numbers(rng, 2000, dtype, "sums"),
                dtype,
            )
            for _ in range(2 + seed % 4)
        ]
        expected = oracle(states)
        comparison = compare(recipe(states), expected)
    assert comparison.passed, comparison
    assert np.isfinite(expected.attn_bound).mean() > 0.95  # few of them promise nothing


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(2, 9),
    st.sampled_from(DTYPES),
    st.sampled_from([0.1, 3.0, 40.0, 300.0]),
)
def test_right_arithmetic_is_within_the_bound_on_many_rows(seed, count, dtype, spread):
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.uniform(-30, 30, count)) if dtype == np.float32 else np.ones(count)
    states = [
        state(s * rng.standard_normal((200, 5)), spread * rng.standard_normal(200),
              np.exp(rng.uniform(-20, 20, 200)), dtype)
        for s in scale
    ]  # fmt: skip
    comparison = compare(recipe(states), oracle(states))
    assert comparison.passed, comparison
    if spread < 300:  # there one state has nearly all the weight of nearly every row, and nothing is rounded
        assert comparison.attn_share > 0.1 and comparison.sum_share > 0.1  # the bounds are not idle


def test_bound_is_sharp():
    rng = np.random.default_rng(0)
    states = [
        state(rng.standard_normal((4000, 16)), rng.standard_normal(4000), 1 + rng.random(4000))
        for _ in range(2)
    ]
    assert 0.7 < compare(recipe(states), oracle(states)).attn_share <= 1


def layouts():
    """How (T, N, D) outputs and (T, N, 8) statistics become those of (layout, softmax_layout)."""
    ends, heads, dim = [0, 3, 3, 4, 12], 2, 3

    def pack(stats):
        parts = [stats[a:b].swapaxes(0, 1).reshape(-1, 8) for a, b in zip(ends, ends[1:])]
        return np.concatenate(parts).reshape(stats.shape)

    def by_batch(x):  # three sequences of four tokens
        return x.reshape(3, 4, *x.shape[1:])

    def by_head(x):
        return by_batch(x).swapaxes(1, 2)

    def by_token(x):
        return by_batch(x).swapaxes(0, 1).reshape(4, 3, heads * dim)

    forms = {
        ("TND", "TND"): (lambda o: o, lambda s: s),
        ("TND", "SBH"): (lambda o: o, pack),
        ("SBH", "TND"): (by_token, by_head),
        ("BSND", "TND"): (by_batch, by_head),
        ("BNSD", "TND"): (by_head, by_head),
    }
    return ends, heads, dim, forms


@pytest.mark.parametrize("form", layouts()[3])
def test_layouts_agree(form):
    ends, heads, dim, forms = layouts()
    rng = np.random.default_rng(0)
    plain = []
    for _ in range(3):
        out = rng.standard_normal((12, heads, dim)).astype(np.float32)
        stats = [np.repeat(rng.random((12, heads, 1)).astype(np.float32), 8, -1) for _ in range(2)]
        plain.append((out, *stats))
    attn, stats = forms[form]
    # As strided views: what is stored elsewhere reads the same.
    states = [tuple(np.ascontiguousarray(f(x)) for f, x in zip((attn, stats, stats), s)) for s in plain]
    expected = oracle(states, ends, form[0], softmax_layout=form[1])
    reference = oracle(plain, None, "TND")
    assert np.array_equal(expected.attn_out, attn(reference.attn_out))
    assert np.array_equal(expected.attn_bound, attn(reference.attn_bound))
    for name in ("softmax_max", "softmax_sum", "sum_bound"):
        assert np.array_equal(getattr(expected, name), stats(np.ascontiguousarray(getattr(reference, name))))


def test_one_lane_and_mixed_precision():
    wide, narrow = state([[1.0, 2.0]], 0, 1, lanes=1), state([[3.0, 4.0]], 0, 1, ml_dtypes.bfloat16, lanes=1)
    expected = oracle([wide, narrow])
    assert (expected.dtype, expected.stats_dtype, expected.softmax_max.shape) == (
        "float32",
        "float32",
        (1, 1, 1, 1),
    )
    assert expected.attn_out.tolist() == [[[2.0, 3.0]]]


@pytest.mark.parametrize(
    "shapes", [((0, 2, 6), (2, 3, 0, 8)), ((2, 1, 0), (1, 3, 2, 8)), ((2, 1, 0), (1, 0, 2, 8))]
)
def test_empty_problems(shapes):
    out, stats = np.ones(shapes[0], np.float32), np.ones(shapes[1], np.float32)
    expected = oracle([(out, stats, stats)] * 2)
    assert expected.attn_out.shape == shapes[0] and expected.softmax_sum.shape == shapes[1]
    assert compare((out, stats, 2 * stats), expected).passed


def test_calls_that_nothing_can_be_made_of():
    one = state([[1.0]], 0, 1)
    for arguments, options, message in (
        (([],), {}, "there are no states"),
        (([one], None, "BSH"), {}, "layout is 'BSH'"),
        (([one], None, "TND"), {"softmax_layout": "NTD"}, "softmax_layout 'NTD'"),
        (([one], None, "TND"), {"softmax_layout": "SBH"}, "need actual_seq_qlen"),
    ):
        with pytest.raises(ValueError, match=message):
            oracle(*arguments, **options)


@pytest.fixture
def judged():
    """Packed TND states, the oracle's answer, and a right result."""
    rng = np.random.default_rng(3)
    ends, shape = [0, 5, 12, 12, 20], (20, 3, 4)
    states = []
    for _ in range(2):
        stats = [np.repeat(rng.standard_normal((20, 3, 1)).astype(np.float32), 8, -1) for _ in range(2)]
        states.append((rng.standard_normal(shape).astype(np.float32), stats[0], np.abs(stats[1]) + 1))
    expected = oracle(states, ends, "TND", softmax_layout="SBH")
    right = [
        expected.attn_out.astype(np.float32),
        *(x.astype(np.float32) for x in (expected.softmax_max, expected.softmax_sum)),
    ]
    assert compare(right, expected).passed
    return states, ends, expected, right


def test_compare_catches_a_wrong_lane(judged):
    _, _, expected, right = judged
    for which, name in ((1, "softmax_max"), (2, "softmax_sum")):
        wrong = [array.copy() for array in right]
        wrong[which][7, 1, 5] = np.nextafter(wrong[which][7, 1, 5], np.float32(9))
        comparison = compare(wrong, expected)
        assert not comparison.passed
        assert f"{name}[7, 1, 5]" in str(comparison)


def test_compare_catches_a_nan_that_leaks(judged):
    _, _, expected, right = judged
    right[0][3, 2, 1] = NAN
    comparison = compare(right, expected)
    assert comparison.attn_share == INF and "attn_out[3, 2, 1] is nan" in comparison.problems[0]


def test_compare_catches_a_nan_that_is_missing():
    expected = oracle([state([[NAN]], 0, 1), state([[1.0]], 0, 1)])
    assert not compare(state([[0.5]], 0, 2), expected).passed
    assert compare(state([[NAN]], 0, 2), expected).passed


def test_compare_catches_sign_errors(judged):
    _, _, expected, right = judged
    right[0][0, 0, 0] *= -1
    assert not compare(right, expected).passed


def test_compare_catches_a_lost_sign_of_zero():
    expected = oracle([state([[-0.0]], 0, 1), state([[1.0]], -INF, 1)])
    assert not compare(state([[0.0]], 0, 1), expected).passed
    assert compare(state([[-0.0]], 0, 1), expected).passed


def test_compare_lets_a_max_of_zero_have_either_sign():
    expected = oracle([state([[1.0]], -0.0, 1), state([[1.0]], -0.0, 1)])
    assert compare(state([[1.0]], 0.0, 2), expected).passed


def test_compare_catches_swapped_outputs(judged):
    states, ends, expected, _ = judged
    swapped = [(states[1][0], *states[0][1:]), (states[0][0], *states[1][1:])]
    got = oracle(swapped, ends, "TND", softmax_layout="SBH")
    assert not compare(
        [x.astype(np.float32) for x in (got.attn_out, got.softmax_max, got.softmax_sum)], expected
    ).passed


def test_compare_catches_a_dropped_last_token(judged):
    states, _, expected, right = judged
    right[0][-1] = states[0][0][-1]
    assert not compare(right, expected).passed


def test_compare_catches_packed_statistics_read_as_token_major(judged):
    states, ends, expected, _ = judged
    got = oracle(states, ends, "TND", softmax_layout="TND")
    result = [x.astype(np.float32) for x in (got.attn_out, got.softmax_max, got.softmax_sum)]
    comparison = compare(result, expected)
    assert comparison.attn_share > 1e5 and comparison.sum_share <= 1  # the trap: max and sum are right


def test_compare_catches_a_wrong_shape_and_dtype(judged):
    _, _, expected, right = judged
    assert "shape (20, 12)" in str(compare([right[0].reshape(20, 12), *right[1:]], expected))
    comparison = compare([right[0], right[1], right[2].astype(np.float64)], expected)
    assert "softmax_sum has dtype float64; expected float32" in str(comparison)
    assert comparison.sum_share == INF


def test_compare_catches_truncation_instead_of_rounding():
    rng = np.random.default_rng(0)
    states = [
        state(rng.standard_normal((50, 8)), np.zeros(50), np.ones(50), ml_dtypes.bfloat16) for _ in range(2)
    ]
    expected = oracle(states)
    truncated = (
        (expected.attn_out.astype(np.float32).view(np.uint32) >> 16)
        .astype(np.uint16)
        .view(ml_dtypes.bfloat16)
    )
    assert 1 < compare((truncated, *recipe(states)[1:]), expected).attn_share <= 2
    assert compare(recipe(states), expected).passed


def test_compare_with_a_declared_tolerance():
    states = [state([[1.0]], 0, 1), state([[1.0]], 0, 1)]
    off = state([[1 + 4 * U]], 0, 2)
    assert not compare(off, oracle(states)).passed
    comparison = compare(off, oracle(states), tolerance=2)
    assert comparison.passed and comparison.attn_share == pytest.approx(4 / 3, rel=1e-3)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_tolerance_is_the_arithmetics_and_not_that_of_storing_in_16_bits(dtype):
    rng = np.random.default_rng(0)
    states = [state(rng.standard_normal((50, 8)), np.zeros(50), np.ones(50), dtype) for _ in range(2)]
    expected, (right, *stats) = oracle(states), recipe(states)
    arithmetic = oracle([state(s[0][:, 0].astype(np.float32), np.zeros(50), np.ones(50)) for s in states]).attn_bound
    for away in (-39.9, 0, 39.9):  # off by less than 40 bounds, then rounded
        stored = (expected.attn_out + away * arithmetic).astype(dtype)
        assert compare((stored, *stats), expected, tolerance=40).passed
    # The next number on the other side of the exact one: not twice the bound away, and no arithmetic leads there.
    size = np.abs(right.astype(np.float64))
    towards = np.where(size == 0, 0, np.where(size < np.abs(expected.attn_out), 1, -1))
    comparison = compare(((right.view(np.uint16) + towards).astype(np.uint16).view(dtype), *stats), expected, tolerance=40)
    assert not comparison.passed and 1 < comparison.attn_share <= 2
    assert " times the bound at tolerance 40, " in comparison.problems[0]


def test_what_a_tolerance_lets_overflow_may_be_infinite():
    near = float(np.finfo(np.float32).max) * (1 - 10 * U)
    states = [state([[near]], 0, 1), state([[near]], 0, 1)]
    beyond, stats = np.full((1, 1, 1), INF, np.float32), recipe(states)[1:]
    assert not compare((beyond, *stats), oracle(states)).passed
    assert compare((beyond, *stats), oracle(states), tolerance=40).passed
    assert not compare((-beyond, *stats), oracle(states), tolerance=40).passed


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_what_a_tolerance_allows_is_rounded_where_it_leads(dtype):
    """Of terms that cancel nothing is left but the error, and half a unit in the last place is that of the error."""
    states = [state([[1.0]], 0, 1, dtype), state([[-1.0]], 0, 1, dtype)]
    expected, stats = oracle(states), recipe(states)[1:]
    furthest = 40 * 3 * U
    for share in np.linspace(-1, 1, 201):
        stored = np.array([[[share * furthest]]]).astype(dtype)
        assert compare((stored, *stats), expected, tolerance=40).passed
    assert not compare((np.array([[[1.02 * furthest]]]).astype(dtype), *stats), expected, tolerance=40).passed


def test_the_module_is_cheap_and_needs_no_test_tools():
    code = (
        "import sys, rau.testing; before = set(sys.modules); rau.testing.compare, rau.testing.oracle;"
        "assert 'rau.testing.reference.oracle' not in before;"
        "assert callable(rau.testing.oracle) and callable(rau.testing.compare);"
        "assert not {'pytest', 'hypothesis', 'ml_dtypes'} & set(sys.modules);"
        "print(dir(rau.testing))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {'compare', 'oracle', 'partial_attention'} <= set(ast.literal_eval(done.stdout))
