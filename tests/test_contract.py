"""The contract's table of silent cases, row by row, in words a person can check by hand."""

import math

import numpy as np
import own_arrays
import pytest

import rau

NAN, INF = math.nan, math.inf
ELEMENTS = [1.0, -0.0, NAN, INF, 1e-45, -2.5]


def state(maximum, total, elements=ELEMENTS, dtype="float32", stats_dtype="float32"):
    """One token, one head."""
    stats = [np.full((1, 1, 1, 8), x, stats_dtype) for x in (maximum, total)]
    return rau.AttentionState(np.array(elements, dtype)[None, None], *stats)


def merge(prev, cur, backend):
    with np.errstate(all="ignore"):
        result = own_arrays.update(backend, prev, cur, profile="portable")
    attn_out, maximum, total = (np.asarray(part).ravel() for part in result)
    for lanes in (maximum, total):
        assert len(lanes) == 8 and (np.array_equal(lanes, lanes[:1].repeat(8), equal_nan=True))
    return attn_out, maximum[0], total[0]


def bits(array):
    array = np.asarray(array)
    return array.view(f"u{array.itemsize}").tolist()


EMPTY = [(5.0, 0.0), (5.0, -0.0), (NAN, 0.0), (INF, 0.0), (-INF, 0.0), (-INF, 3.0), (-INF, NAN), (-INF, INF), (-INF, -1.0)]


@pytest.mark.parametrize("one", EMPTY)
@pytest.mark.parametrize("other", EMPTY)
def test_both_sides_empty(one, other, any_backend):
    attn_out, maximum, total = merge(state(*one), state(*other), any_backend)
    assert bits(attn_out) == [0] * 6  # +0.0 everywhere
    assert maximum == -INF
    assert bits(total) == 0


LIVE = [(2.0, 3.0), (-1e30, 1e-45), (NAN, 2.0), (INF, 2.0), (1.0, INF), (1.0, NAN), (0.0, -2.0), (3e38, 3e38)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("live", LIVE)
def test_one_side_empty(live, empty, dtype, any_backend):
    """The live side comes back bit for bit, whatever it holds; NaN behind the empty one does not leak."""
    stats_dtype = "float64" if dtype == "float64" else "float32"
    kept = state(*live, dtype=dtype, stats_dtype=stats_dtype)
    gone = state(*empty, elements=[NAN, NAN, 1.0, NAN, INF, -INF], dtype=dtype, stats_dtype=stats_dtype)
    for prev, cur in ((kept, gone), (gone, kept)):
        attn_out, maximum, total = merge(prev, cur, any_backend)
        given = kept.attn_out.ravel()
        number = ~np.isnan(given)
        assert bits(attn_out[number]) == bits(given[number])
        assert np.isnan(attn_out[~number]).all()
        assert maximum == np.asarray(live[0], stats_dtype) or (math.isnan(maximum) and math.isnan(live[0]))
        assert total == np.asarray(live[1], stats_dtype) or (math.isnan(total) and math.isnan(live[1]))


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("one", "other", "maximum", "total"),
    [
        ((NAN, 2.0), (1.0, 2.0), NAN, NAN),  # a max is NaN
        ((NAN, 2.0), (INF, 2.0), NAN, NAN),
        ((NAN, NAN), (1.0, 2.0), NAN, NAN),
        ((1.0, NAN), (3.0, 2.0), 3.0, NAN),  # a sum is NaN: max by the formula
        ((1.0, NAN), (INF, 2.0), INF, NAN),
        ((INF, 2.0), (1.0, 2.0), INF, NAN),  # a max is +inf
        ((INF, 2.0), (INF, 2.0), INF, NAN),
        ((1.0, INF), (1.0, 2.0), 1.0, INF),  # a sum is +inf: the sum by the formula
        ((1.0, INF), (5.0, 2.0), 5.0, INF),
        ((1.0, INF), (1000.0, 2.0), 1000.0, NAN),  # ... which is inf * 0 here
    ],
)
def test_not_a_number_and_infinite_statistics(one, other, maximum, total, swap, any_backend):
    """Output NaN in every element, whatever the elements are."""
    sides = [state(*one, elements=[1.0] * 6), state(*other, elements=[2.0] * 6)]
    got = merge(*(reversed(sides) if swap else sides), any_backend)
    assert np.isnan(got[0]).all()
    np.testing.assert_array_equal(got[1:], (maximum, total))


def test_a_sum_beyond_float32_is_infinite_and_the_output_right(any_backend):
    attn_out, maximum, total = merge(state(1.0, 3e38, [1.0] * 6), state(1.0, 3e38, [3.0] * 6), any_backend)
    assert (attn_out == 2.0).all() and maximum == 1.0 and total == INF


def test_a_sum_beyond_float64_is_infinite_and_the_output_right(any_backend):
    sides = [state(1.0, 1.7e308, [x] * 6, "float64", "float64") for x in (1.0, 3.0)]
    attn_out, maximum, total = merge(*sides, any_backend)
    assert (attn_out == 2.0).all() and maximum == 1.0 and total == INF


def test_a_negative_sum_follows_the_formula(any_backend):
    attn_out, _, total = merge(state(0.0, 3.0, [1.0] * 6), state(0.0, -1.0, [2.0] * 6), any_backend)
    assert total == 2.0 and (attn_out == 1.0 * 1.5 + 2.0 * -0.5).all()


def test_a_sum_of_zero_by_cancellation_is_not_empty(any_backend):
    attn_out, maximum, total = merge(state(4.0, 1.0, [1.0] * 6), state(4.0, -1.0, [1.0] * 6), any_backend)
    assert np.isnan(attn_out).all()  # inf - inf
    assert maximum == 4.0 and total == 0.0


def test_a_weight_of_zero_skips_its_product(any_backend):
    """exp(-200) is 0 in float32: neither the NaN behind it nor the sign that adding a zero would lose gets through."""
    far = state(-200.0, 1.0, [NAN, 5.0, INF, 1.0, NAN, -INF])
    near = state(0.0, 1.0, [-0.0, -0.0, 1.0, NAN, 0.0, INF])
    for sides in ((far, near), (near, far)):
        attn_out, maximum, total = merge(*sides, any_backend)
        assert bits(attn_out[[0, 1, 2, 4, 5]]) == bits(near.attn_out.ravel()[[0, 1, 2, 4, 5]])
        assert math.isnan(attn_out[3])
        assert maximum == 0.0 and total == 1.0


def test_where_a_weight_rounds_to_zero(any_backend):
    """2**-150 is a tie that rounds to the even 0; anything above is the smallest subnormal."""
    # Equal maxima and sums l1 << l2: w1 = l1 / (l1 + l2), made exactly of powers of two where l2 swallows l1.
    huge = 2.0**127
    for tiny, reads in ((2.0**-24, False), (2.0**-24 * (1 + 2.0**-20), True), (2.0**-22, True)):
        # w = tiny / huge is 2**-151 .. 2**-149 of a value that float64 holds exactly.
        attn_out, _, _ = merge(state(0.0, tiny, [NAN] * 6), state(0.0, huge, [1.0] * 6), any_backend)
        assert np.isnan(attn_out).all() == (tiny / (huge + tiny) > 2.0**-150), (tiny, reads)


def test_not_a_number_in_an_element_stays_there(any_backend):
    one, other = state(0.0, 1.0, [NAN, INF, INF, 1.0, 0.0, 2.0]), state(0.0, 1.0, [1.0, 1.0, -INF, 3.0, -0.0, NAN])
    attn_out, _, _ = merge(one, other, any_backend)
    assert math.isnan(attn_out[0]) and attn_out[1] == INF and math.isnan(attn_out[2])
    assert attn_out[3] == 2.0 and bits(attn_out[4:5]) == [0] and math.isnan(attn_out[5])


def test_nothing_spills_over_to_other_rows(any_backend):
    """One hostile row between two ordinary ones changes neither."""
    rng = np.random.default_rng(0)

    def sides(hostile):
        for _ in range(2):
            out = rng.standard_normal((3, 1, 2 * 5)).astype(np.float32)
            stats = rng.uniform(1, 2, (2, 1, 2, 3, 1)).astype(np.float32).repeat(8, -1)
            if hostile:
                out[1], stats[:, :, :, 1] = NAN, NAN
            yield rau.AttentionState(out, *stats)

    rng = np.random.default_rng(0)
    clean = own_arrays.update(any_backend, *sides(False))
    rng = np.random.default_rng(0)
    dirty = own_arrays.update(any_backend, *sides(True))
    np.testing.assert_array_equal(clean.attn_out[[0, 2]], dirty.attn_out[[0, 2]])
    np.testing.assert_array_equal(clean.softmax_sum[:, :, [0, 2]], dirty.softmax_sum[:, :, [0, 2]])
    assert np.isnan(dirty.attn_out[1]).all()


def test_only_lane_0_is_read(any_backend):
    prev, cur = state(1.0, 2.0, [1.0] * 6), state(2.0, 3.0, [2.0] * 6)
    wrong = [part.copy() for part in cur]
    for part in wrong[1:]:
        part[..., 1:] = NAN
    assert [bits(a) for a in merge(prev, cur, any_backend)] == [bits(a) for a in merge(prev, wrong, any_backend)]


def test_packed_and_token_major_are_told_apart(any_backend):
    """Two sequences of 2 and 1 tokens, 2 heads: each order gives the result of the loop written for it."""
    lengths, heads = [0, 2, 3], 2
    rng = np.random.default_rng(3)
    outs = rng.standard_normal((2, 3, heads, 64)).astype(np.float32)
    maxima, sums = rng.standard_normal((2, 3, heads)).astype(np.float32), rng.uniform(1, 9, (2, 3, heads)).astype(np.float32)

    def packed(rows):  # (T, N) -> the same numbers, sequence by sequence, head by head
        flat = [rows[t, h] for a, b in zip(lengths, lengths[1:], strict=False) for h in range(heads) for t in range(a, b)]
        return np.array(flat, np.float32).reshape(3, heads, 1).repeat(8, -1)

    def token_major(rows):
        return rows[:, :, None].repeat(8, -1)

    results = {}
    for order, arrange in (("TND", token_major), ("SBH", packed)):
        sides = [(outs[k], arrange(maxima[k]), arrange(sums[k])) for k in (0, 1)]
        results[order] = own_arrays.update(any_backend, *sides, lengths, "TND", softmax_layout=order)
    np.testing.assert_array_equal(results["TND"].attn_out, results["SBH"].attn_out)
    for field in (1, 2):
        np.testing.assert_array_equal(packed(results["TND"][field][..., 0]), results["SBH"][field])
    m = np.maximum(*maxima.astype(float))
    a = [s * np.exp(x - m) for s, x in zip(sums.astype(float), maxima.astype(float), strict=True)]
    exact = sum(o.astype(float) * (ai / sum(a))[..., None] for o, ai in zip(outs, a, strict=True))
    np.testing.assert_allclose(results["SBH"].attn_out, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("K", [1, 2, 3, 8])
def test_the_neutral_element_changes_nothing(K, any_backend):
    one = state(1.5, 2.5, [1.0, -0.0, 3.0, 1e-45, -2.5, 0.0])
    neutral = state(-INF, 0.0, [NAN] * 6)
    for place in range(K):
        states = [neutral] * K
        states[place] = one
        merged = own_arrays.merge(any_backend, states)
        assert [bits(part) for part in merged] == [bits(part) for part in one]
