"""AttentionState from and to log-sum-exp, and the two orders of TND statistics."""

import decimal
import itertools
import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from states import bits, sbh, tnd

import rau
from rau import AttentionState, reorder_softmax

INF, NAN = float("inf"), float("nan")
LN2 = decimal.Context(prec=60).ln(2)
HARD = [0.0, -0.0, 1.0, -1.0, 2.0, 1e-30, -1e-30, 1e-45, 0.1, 1.44, 88.7, -745.1, 12345.678, 3e38, -3e38]
TND = {"layout": "TND", "lse_layout": "TN"}
finite = st.floats(-(2.0**127), 2.0**127, width=32) | st.sampled_from(HARD)


def exact(number):
    return decimal.Decimal(float(number))


def tokens(lse, dtype="float32"):
    """One token of one head for each number, in layout TND."""
    lse = np.asarray(lse, "float64" if dtype == "float64" else "float32").reshape(-1, 1)
    return np.ones((len(lse), 1, 4), dtype), lse


# ---------------------------------------------------------------------------------------------------------- from_lse

FORMS = {  # layout, lse_layout: attn_out's shape and lse's for B, S, N, D = 2, 3, 4, 5 (or T = 3)
    ("SBH", None): ((3, 2, 20), (2, 4, 3)),
    ("SBH", "BNS"): ((3, 2, 20), (2, 4, 3)),
    ("SBH", "BSN"): ((3, 2, 20), (2, 3, 4)),
    ("TND", "TN"): ((3, 4, 5), (3, 4)),
    ("TND", "NT"): ((3, 4, 5), (4, 3)),
    ("BSND", None): ((2, 3, 4, 5), (2, 4, 3)),
    ("BSND", "BSN"): ((2, 3, 4, 5), (2, 3, 4)),
    ("BNSD", None): ((2, 4, 3, 5), (2, 4, 3)),
    ("BNSD", "BSN"): ((2, 4, 3, 5), (2, 3, 4)),
}


def in_order(lse, lse_layout):
    """With the axes of the statistics, (B, N, S) or (T, N)."""
    return lse.swapaxes(-1, -2) if lse_layout in ("BSN", "NT") else lse


@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float32", "float64"])
@pytest.mark.parametrize(("layout", "lse_layout"), FORMS)
def test_from_lse_multiplies_nothing_by_8(layout, lse_layout, dtype, base, lanes):
    shape, lse_shape = FORMS[layout, lse_layout]
    lse = np.arange(math.prod(lse_shape), dtype="float64" if dtype == "float64" else "float32").reshape(lse_shape)
    attn_out = np.zeros(shape, dtype)
    number = {} if lanes == 1 else {"lanes": lanes}  # 1 is the default
    state = AttentionState.from_lse(attn_out, lse, base=base, layout=layout, lse_layout=lse_layout, **number)
    assert state.attn_out is attn_out
    rows = in_order(lse, lse_layout)
    for stats in state[1:]:
        assert stats.shape == (*rows.shape, lanes)
        assert stats.dtype == lse.dtype
        assert lanes == 1 or stats.strides[-1] == 0
        assert stats[..., 0].flags.c_contiguous == rows.flags.c_contiguous
        assert not stats.flags.writeable
    if base == "e":
        assert np.shares_memory(state.softmax_max, lse)
        assert state.softmax_max.strides[:-1] == rows.strides
        np.testing.assert_array_equal(state.softmax_max, np.repeat(rows[..., None], lanes, axis=-1))
        assert (state.softmax_sum == 1).all()
    back = state.lse(base=base, layout=layout, lse_layout=lse_layout)
    np.testing.assert_array_equal(back, lse) if base == "e" else np.testing.assert_allclose(back, lse, 1e-6)
    # As it is, it can be merged.
    merged = rau.merge_states([state, state], layout=layout)
    got = merged.lse(base=base, layout=layout, lse_layout="TN" if layout == "TND" else "BNS")
    np.testing.assert_allclose(got, rows + (math.log(2) if base == "e" else 1), 1e-6)


@pytest.mark.parametrize("layout", ["SBH", "TND", "BSND", "BNSD"])
def test_no_size_changes_what_axes_mean(layout):
    """Not S = N and not T = N, where no shape tells: a default, a name and the want of one are alike at every size."""
    B, N, D = 2, 3, 4
    for S in (N - 1, N, N + 1):
        shape = {"SBH": (S, B, N * D), "TND": (S, N, D), "BSND": (B, S, N, D), "BNSD": (B, N, S, D)}[layout]
        rows = np.arange(B * S * N, dtype="float32").reshape(B, N, S)  # of head n and token s, whatever the layout
        if layout == "TND":
            rows = rows[0].T
        attn_out = np.zeros(shape, "f4")
        for lse_layout in ("TN", "NT") if layout == "TND" else ("BNS", "BSN", None):
            how = {"base": "e", "layout": layout, "lse_layout": lse_layout}
            state = AttentionState.from_lse(attn_out, in_order(rows, lse_layout), **how)
            np.testing.assert_array_equal(state.softmax_max[..., 0], rows)
            np.testing.assert_array_equal(state.lse(**how), in_order(rows, lse_layout))
        if layout == "TND":
            for call in (
                lambda: AttentionState.from_lse(attn_out, rows, base="e", layout="TND"),
                lambda: AttentionState.from_lse(attn_out, rows.T, base="e", layout="TND"),
                lambda: state.lse(base="e", layout="TND"),
            ):
                with pytest.raises(rau.OptionError) as caught:
                    call()
                assert str(caught.value).partition(": ")[2] == (
                    '[lse-layout] lse_layout is None; layout "TND" expects the axes of lse by name: "TN" for (T, N) '
                    '(FlashInfer), "NT" for (N, T) (vLLM, FlashAttention\'s varlen calls).'
                )


@pytest.mark.parametrize(("layout", "lse_layout"), FORMS)
def test_the_number_of_query_heads_is_checked_in_every_layout(layout, lse_layout):
    """Of SBH above all, where key heads of grouped queries pass for fewer query heads with longer rows."""
    shape, lse_shape = FORMS[layout, lse_layout]
    attn_out, lse = np.zeros(shape, "f4"), np.zeros(lse_shape, "f4")
    how = {"base": "e", "layout": layout, "lse_layout": lse_layout}
    assert bits(AttentionState.from_lse(attn_out, lse, **how, heads=4)) == bits(AttentionState.from_lse(attn_out, lse, **how))
    AttentionState.from_lse(attn_out, lse, **how, heads=np.int64(4))
    grouped = lse[:, :2] if lse_layout in ("TN", None, "BNS") else lse[..., :2] if lse_layout == "BSN" else lse[:2]
    if layout == "SBH":
        AttentionState.from_lse(attn_out, grouped, **how)  # unseen
    with pytest.raises(rau.ShapeError, match="Its 2 heads seem to be the key heads of grouped-query attention"):
        AttentionState.from_lse(attn_out, grouped, **how, heads=4)
    with pytest.raises(rau.ShapeError, match="heads = 2"):
        AttentionState.from_lse(attn_out, lse, **how, heads=2)


def peak(call):
    """Bytes that a call has allocated at most, arrays of NumPy included; its second time, when all is loaded."""
    call()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("base", ["e", "2"])
def test_lanes_of_stride_0_are_copied_nowhere(base, backend):
    """Not by from_lse, not by the validator, not by a backend: merged into `out`, they cost what whole lanes cost.

    A sum of ones is written out, without lanes.
    """
    shape, rows = (1, 16, 1 << 12, 8), 16 << 12
    attn_out, lse = np.zeros(shape, np.float32), np.zeros((1, 1 << 12, 16), np.float32)
    options = {"base": base, "layout": "BNSD", "lse_layout": "BSN", "lanes": 8}
    state = AttentionState.from_lse(attn_out, lse, **options)
    whole = AttentionState(attn_out, *map(np.ascontiguousarray, state[1:]))
    out = AttentionState(*map(np.empty_like, whole))
    if base == "e":
        assert peak(lambda: AttentionState.from_lse(attn_out, lse, **options)) < 4 * rows + 4096
    cost = {
        name: peak(lambda states=states: rau.merge_states(states, layout="BNSD", out=out, backend=backend))
        for name, states in (("views", [state] * 3), ("whole", [whole] * 3))
    }
    assert abs(cost["views"] - cost["whole"]) < rows, cost
    if backend == "cython":
        assert cost["views"] < 8192, cost


@pytest.mark.parametrize("layout", ["BSND", "TND"])
@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("lanes", [1, 8])
def test_what_from_lse_makes_is_no_out_and_one_line_says_what_to_do(lanes, base, layout):
    """Whichever call it is, and not six rules; where one array alone is such a view, of that one."""
    shape = (3, 4, 5) if layout == "TND" else (1, 3, 4, 5)
    out, lse = np.ones(shape, "f4"), np.zeros((3, 4) if layout == "TND" else (1, 3, 4), "f4")
    lse_layout = "TN" if layout == "TND" else "BSN"
    run = AttentionState.from_lse(out, lse, base=base, layout=layout, lse_layout=lse_layout, lanes=lanes)
    own = AttentionState(*(np.zeros(part.shape, "f4") for part in run))
    portable = {"layout": layout, "profile": "portable"}
    for call, name in (
        (lambda out: rau.merge_states([run, run], layout=layout, out=out), "merge_states"),
        (lambda out: rau.ring_attention_update(*run, *run, **portable, out=out), "ring_attention_update"),
    ):
        one_of_them = own._replace(softmax_sum=run.softmax_sum)
        for wrong, which in ((run, "out.softmax_max and out.softmax_sum have"), (one_of_them, "out.softmax_sum has")):
            with pytest.raises(rau.ShapeError) as caught:
                call(wrong)
            assert str(caught.value) == (
                f"{name}: [out-writable] {which} lanes of stride 0, as AttentionState.from_lse makes them; expected arrays that "
                "may be written to. To merge in place, use rau.merge_lse(..., out=pair) of pairs (attn_out, lse), or a "
                "rau.StreamingMerge."
            )
        call(own)
        if lanes == 1:  # whose stride is 0 as well, and which may be written to
            spread = [np.zeros((*part.shape[:-1], 2), "f4")[..., :1] for part in run[1:]]
            call(AttentionState(own[0], *(part[..., 0][..., None] for part in spread)))


@given(st.lists(finite, min_size=1, max_size=20))
def test_base_2_against_decimal(numbers):
    attn_out, lse = tokens(numbers)
    state = AttentionState.from_lse(attn_out, lse, base="2", **TND)
    for number, m, total in zip(lse[:, 0], state.softmax_max[:, 0, 0], state.softmax_sum[:, 0, 0], strict=True):
        natural = exact(number) * LN2
        assert m == np.float32(float(natural))
        lost = natural - exact(m)
        lost = lost.exp() if abs(lost) <= 64 else 1
        assert abs(exact(total) - lost) <= decimal.Decimal(2) ** -23 + abs(natural) * decimal.Decimal(2) ** -51 * lost


@given(st.lists(finite | st.sampled_from([INF, -INF, NAN]), min_size=1, max_size=20))
def test_round_trips(numbers):
    attn_out, lse = tokens(numbers)
    for base in ("e", "2"):
        state = AttentionState.from_lse(attn_out, lse, base=base, **TND)
        back = state.lse(base=base, **TND)
        if base == "e":
            np.testing.assert_array_equal(back, lse)
        else:
            size = np.abs(lse)
            small, large = size < 2, np.isfinite(lse) & (size > 2.0**30)
            assert (np.abs(back[small] - lse[small]) <= 2.0**-23).all()
            assert (np.abs(back[large] - lse[large]) <= np.spacing(size[large])).all()
            np.testing.assert_array_equal(back[~(small | large)], lse[~(small | large)])
            assert np.isfinite(state.softmax_sum).all()
            assert (state.softmax_sum > 0).all()


@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_minus_infinity_is_the_empty_row(base, dtype):
    attn_out, lse = tokens([-INF, 0.5], dtype)
    state = AttentionState.from_lse(attn_out, lse, base=base, **TND)
    assert (state.softmax_max[0] == -INF).all()
    assert (state.softmax_sum[0] > 0).all()
    attn_out[0] = NAN
    other = AttentionState.from_lse(np.full_like(attn_out, 3), np.zeros_like(lse), base=base, **TND)
    assert (rau.merge_states([state, other], layout="TND").attn_out[0] == 3).all()
    assert state.lse(base=base, **TND).tolist()[0] == [-INF]


@pytest.mark.parametrize("base", ["e", "2"])
def test_plus_infinity_is_the_empty_row_on_request(base):
    attn_out, lse = tokens([INF, -INF, NAN, 0.5])
    before = lse.copy()
    state = AttentionState.from_lse(attn_out, lse, base=base, **TND, inf_is_empty=True)
    np.testing.assert_array_equal(lse, before)
    np.testing.assert_array_equal(state.softmax_max[:2], -INF)
    assert np.isnan(state.softmax_max[2]).all()
    np.testing.assert_array_equal(state.lse(base=base, **TND)[:, 0], np.float32([-INF, -INF, NAN, 0.5]))
    as_it_is = AttentionState.from_lse(attn_out, lse, base=base, **TND)
    assert (as_it_is.softmax_max[0] == INF).all()


@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=20))
def test_round_trip_of_float64(numbers):
    attn_out, lse = tokens(numbers, "float64")
    for base in ("e", "2"):
        back = AttentionState.from_lse(attn_out, lse, base=base, **TND).lse(base=base, **TND)
        if base == "e":
            np.testing.assert_array_equal(back, lse)
        else:
            assert (np.abs(back - lse) <= 2.0**-51 * np.abs(lse)).all()


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float32"])
@given(st.lists(st.floats(-(2.0**35), 2.0**35) | st.floats(-100, 100) | st.sampled_from(HARD), min_size=1, max_size=20))
def test_a_float64_log_sum_exp_beside_a_narrower_output(dtype, numbers):
    """The sum keeps what the rounding of the maximum loses."""
    attn_out, lse = np.ones((len(numbers), 1, 4), dtype), np.array(numbers).reshape(-1, 1)
    for base in ("e", "2"):
        state = AttentionState.from_lse(attn_out, lse, base=base, **TND)
        assert [part.dtype for part in state[1:]] == [np.float32] * 2
        for number, m, total in zip(lse[:, 0], state.softmax_max[:, 0, 0], state.softmax_sum[:, 0, 0], strict=True):
            natural = exact(number) * (LN2 if base == "2" else 1)
            assert m == np.float32(float(natural))
            two = decimal.Decimal(2)
            allowed = two**-24 if abs(number) <= 2.0**30 else exact(np.spacing(np.abs(m))) / 2
            if base == "2":
                allowed += abs(exact(number)) * two**-52
            assert abs(exact(m) + exact(total).ln() - natural) <= allowed


def test_a_float64_log_sum_exp_is_worth_it():
    """At 10,000 the weights of two states are off by 1e-4 where their log-sum-exps are rounded to float32."""
    rng = np.random.default_rng(0)
    lse = 1e4 + rng.uniform(-1, 1, (2, 500, 1))
    true = 1 / (1 + np.exp(lse[1] - lse[0]))
    outs = np.array([1, 0], "f4")[:, None, None, None].repeat(500, 1)
    errors = []
    for dtype in ("f8", "f4"):
        states = [AttentionState.from_lse(o, one.astype(dtype), base="e", **TND) for o, one in zip(outs, lse, strict=True)]
        errors.append(np.abs(rau.merge_states(states, layout="TND").attn_out[..., 0] - true).max())
    assert errors[0] <= 3 * 2.0**-24 < 1e-4 < errors[1] < 1e4 * 2.0**-24


def test_special_numbers_of_a_float64_log_sum_exp():
    attn_out, lse = np.ones((5, 1, 4), "f4"), np.array([[-INF], [INF], [NAN], [1e300], [-1e300]])
    for base in ("e", "2"):
        state = AttentionState.from_lse(attn_out, lse, base=base, **TND)
        np.testing.assert_array_equal(state.softmax_max[:, 0, 0], np.float32([-INF, INF, NAN, INF, -INF]))
        assert (state.softmax_sum == 1).all()
        state = AttentionState.from_lse(attn_out, lse, base=base, **TND, inf_is_empty=True)
        np.testing.assert_array_equal(state.softmax_max[:2], -INF)


def test_float64_keeps_its_precision():
    attn_out, lse = tokens([0.1, -300.7, 1e5], "float64")
    for base in ("e", "2"):
        state = AttentionState.from_lse(attn_out, lse, base=base, **TND)
        assert state.softmax_max.dtype == np.float64
        for number, m in zip(lse[:, 0], state.softmax_max[:, 0, 0], strict=True):
            natural = exact(number) * (LN2 if base == "2" else 1)
            assert abs(exact(m) - natural) <= abs(natural) * decimal.Decimal(2) ** -52


# --------------------------------------------------------------------------------------------------------------- lse


@given(
    st.lists(st.tuples(finite, st.floats(2.0**-126, 2.0**127, width=32)), min_size=1, max_size=20),
    st.sampled_from("e2"),
)
def test_lse_against_decimal(rows, base):
    stats = np.array(rows, "float32")[:, :, None, None]
    got = AttentionState(None, stats[:, 0], stats[:, 1]).lse(base=base, **TND)
    assert got.dtype == np.float32
    for (m, total), number in zip(stats[:, :, 0, 0], got[:, 0], strict=True):
        true = exact(m) + exact(total).ln()
        if base == "2":
            true /= LN2
        if abs(true) > exact(np.finfo(np.float32).max):  # -3e38 in base e is beyond float32 in base 2
            assert abs(number) in (INF, np.finfo(np.float32).max)
            continue
        # Half a unit in the last place, and what float64 loses where m and log(l) cancel.
        allowed = exact(np.spacing(np.abs(number))) * decimal.Decimal("0.500001")
        assert abs(exact(number) - true) <= allowed + abs(exact(m)) * decimal.Decimal(2) ** -52


def test_lse_of_special_rows():
    rows = [(-INF, 0), (-INF, 5), (3, 0), (3, -0.0), (NAN, 0), (-INF, NAN), (INF, 1), (NAN, 1), (0, INF), (0, -1)]
    stats = np.array(rows, "float32")[:, :, None, None]
    got = AttentionState(None, stats[:, 0], stats[:, 1]).lse(base="e", **TND)[:, 0].tolist()
    assert got[:6] == [-INF] * 6
    assert math.isnan(got[7])
    assert math.isnan(got[9])
    assert [got[6], got[8]] == [INF, INF]


@pytest.mark.parametrize("lanes", [8, 1])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lse_of_every_layout(lanes, dtype):
    sum_, log = {"float32": (1e-6, "f4"), "float64": (1e-15, "f8")}[dtype]
    for state, how in ((sbh(lanes=lanes, dtype=dtype), {"layout": "SBH"}), (tnd(lanes=lanes, dtype=dtype), TND)):
        expected = state.softmax_max[..., 0] + np.log(state.softmax_sum[..., 0])
        got = state.lse(base="e", **how)
        assert got.dtype == log
        np.testing.assert_allclose(got, expected, rtol=sum_, atol=sum_)
        np.testing.assert_allclose(state.lse(base="2", **how), expected / math.log(2), rtol=sum_, atol=sum_)


QLEN = [0, 0, 3, 3, 4, 8, 8]


def test_lse_of_packed_statistics():
    state = tnd(N=3)
    packed = state._replace(
        softmax_max=packed_by_hand(state.softmax_max, QLEN), softmax_sum=packed_by_hand(state.softmax_sum, QLEN)
    )
    options = {"base": "e", **TND}
    expected = state.lse(**options)
    assert bits([packed.lse(**options, softmax_layout="SBH", actual_seq_qlen=QLEN)]) == bits([expected])
    assert bits([packed.lse(**options)]) != bits([expected])


# ------------------------------------------------------------------------------------------------------------ orders


def packed_by_hand(stats, qlen):
    """Token-major to packed: sequence after sequence, each as (N, S_i)."""
    rows = []
    for first, end in itertools.pairwise(qlen):
        for head in range(stats.shape[1]):
            for token in range(first, end):
                rows.append(stats[token, head])
    return np.array(rows, dtype=stats.dtype).reshape(stats.shape)


@given(st.lists(st.integers(0, 4), max_size=5), st.integers(0, 3), st.sampled_from([None, 0, 1, 8]))
def test_reorder_against_loops(lengths, heads, lanes):
    qlen = [0, *np.cumsum(lengths).tolist()]
    shape = (qlen[-1], heads) if lanes is None else (qlen[-1], heads, lanes)
    stats = np.arange(math.prod(shape)).reshape(shape)
    before = stats.copy()
    packed = reorder_softmax(stats, qlen, to="SBH")
    np.testing.assert_array_equal(packed, packed_by_hand(stats, qlen))
    np.testing.assert_array_equal(reorder_softmax(packed, np.array(qlen, "int32"), to="TND"), stats)
    np.testing.assert_array_equal(reorder_softmax(reorder_softmax(stats, qlen, to="TND"), qlen, to="SBH"), stats)
    assert not np.shares_memory(packed, stats)
    np.testing.assert_array_equal(stats, before)


@pytest.mark.parametrize("dtype", ["float64", "int8", "bool", ">f4", ml_dtypes.bfloat16, object])
def test_reorder_any_dtype(dtype):
    stats = np.arange(24).reshape(8, 3).astype(dtype)
    packed = reorder_softmax(stats, QLEN, to="SBH")
    assert packed.dtype == stats.dtype
    np.testing.assert_array_equal(packed, packed_by_hand(stats, QLEN))


def test_reorder_takes_arrays_as_they_lie():
    stats = np.arange(8 * 3 * 8.0).reshape(8, 3, 8)
    expected = packed_by_hand(stats, QLEN)
    np.testing.assert_array_equal(
        reorder_softmax(stats.transpose(2, 0, 1).copy().transpose(1, 2, 0), QLEN, to="SBH"), expected
    )
    np.testing.assert_array_equal(reorder_softmax(np.broadcast_to(stats[..., :1], stats.shape), QLEN, to="SBH")[..., 0],
                                  expected[..., 0])  # fmt: skip
    matrix = reorder_softmax(stats[..., 0].view(np.matrix), QLEN, to="SBH")
    np.testing.assert_array_equal(matrix, expected[..., 0])
    assert type(matrix) is np.ndarray


def test_packed_and_token_major_calls_say_the_same():
    prev, cur = tnd(N=3, seed=1), tnd(N=3, seed=2)
    options = {"layout": "TND", "actual_seq_qlen": QLEN}
    expected = rau.ring_attention_update(*prev, *cur, **options)
    packed = [(a, packed_by_hand(m, QLEN), packed_by_hand(s, QLEN)) for a, m, s in (prev, cur)]
    result = rau.ring_attention_update(*packed[0], *packed[1], **options, softmax_layout="SBH")
    assert bits([result.attn_out]) == bits([expected.attn_out])
    assert bits(result[1:]) == bits(packed_by_hand(part, QLEN) for part in expected[1:])


# -------------------------------------------------------------------------------------------------------- real use


@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize(("layout", "lse_layout"), FORMS)
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_merging_parts_is_softmax_over_all_keys(layout, lse_layout, base, parts, backend):
    """The part of each rank is computed with the base's own exponential, as its kernel would."""
    b, s, n, d, keys = (1 if layout == "TND" else 2), 3, 4, 5, 40
    rng = np.random.default_rng(parts)
    scores, values = rng.normal(0, 3, (b, n, s, keys)), rng.normal(size=(b, n, keys, d))
    scores[:, 0, 1, : keys // parts] = -INF  # a row that sees nothing of the first part
    scores[:, 0, 1, -1] = 0.0

    def attend(chosen):
        with np.errstate(all="ignore"):
            sums = np.exp(scores[..., chosen]).sum(-1)
            out = np.exp(scores[..., chosen]) @ values[:, :, chosen] / sums[..., None]
            return out, np.log(sums) if base == "e" else np.log2(sums)

    order = {"SBH": (2, 0, 1, 3), "TND": (0, 2, 1, 3), "BSND": (0, 2, 1, 3), "BNSD": (0, 1, 2, 3)}[layout]
    shape, lse_shape = FORMS[layout, lse_layout]

    def state(chosen):
        out, lse = attend(chosen)
        if lse_layout in ("BSN", "TN"):
            lse = lse.swapaxes(1, 2)
        out, lse = out.transpose(order).reshape(shape), lse.reshape(lse_shape)
        return out.astype("float32"), np.ascontiguousarray(lse, "float32")

    options = {"base": base, "layout": layout}
    partials = [state(part) for part in np.array_split(np.arange(keys), parts)]
    states = [AttentionState.from_lse(out, lse, **options, lse_layout=lse_layout) for out, lse in partials]
    merged = rau.merge_states(states, layout=layout, backend=backend)
    out, lse = state(np.arange(keys))
    np.testing.assert_allclose(merged.attn_out, out, rtol=0, atol=2e-6)
    np.testing.assert_allclose(merged.lse(**options, lse_layout=lse_layout), lse, rtol=0, atol=2e-6)


# ------------------------------------------------------------------------------------------------------- from_max_sum


@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("given", [None, 1, 8])
@pytest.mark.parametrize(("layout", "stats_layout"), FORMS)
def test_a_kernels_own_maximum_and_sum(layout, stats_layout, given, base):
    """With no lanes, 1 or 8; a sum of 1 is a log-sum-exp; the sum scales with what is given."""
    shape, rows_shape = FORMS[layout, stats_layout]
    rng = np.random.default_rng(0)
    attn_out, maximum = np.zeros(shape, "f4"), rng.normal(size=rows_shape).astype("f4") * 9
    how = {"base": base, "layout": layout}

    def with_lanes(rows):
        return rows if given is None else np.repeat(rows[..., None], given, -1)

    ones, total = np.ones_like(maximum), rng.uniform(1, 9, rows_shape).astype("f4")
    state = AttentionState.from_max_sum(attn_out, with_lanes(maximum), with_lanes(ones), stats_layout=stats_layout, **how)
    assert bits(state) == bits(AttentionState.from_lse(attn_out, maximum, lse_layout=stats_layout, **how))
    for lanes in (1, 8):
        arrays = with_lanes(maximum), with_lanes(total)
        state = AttentionState.from_max_sum(attn_out, *arrays, stats_layout=stats_layout, lanes=lanes, **how)
        assert state.attn_out is attn_out
        rows = in_order(total, stats_layout)
        assert state.softmax_sum.shape == state.softmax_max.shape == (*rows.shape, lanes)
        assert not (state.softmax_sum.flags.writeable or state.softmax_max.flags.writeable)
        if base == "e":
            assert all(np.shares_memory(mine, its) for mine, its in zip(state[1:], arrays, strict=True))
        else:
            np.testing.assert_allclose(state.softmax_sum[..., 0], rows, rtol=2.0**-23 * 32)
        back = np.exp(in_order(maximum, stats_layout).astype("f8") * (1 if base == "e" else math.log(2))) * rows
        mine = np.exp(state.softmax_max.astype("f8")) * state.softmax_sum
        np.testing.assert_allclose(mine, np.repeat(back[..., None], lanes, -1), rtol=2.0**-23)


def test_a_kernel_that_computes_by_exp2():
    """Two parts of some keys by exp2 of scores that were multiplied by log2(e), as fused kernels do it."""
    rng = np.random.default_rng(1)
    scores, values = rng.normal(size=(5, 30)) * 40, rng.normal(size=(30, 4))

    def part(keys):
        two = (scores[:, keys] * math.log2(math.e)).astype("f4").astype("f8")
        m = two.max(1, keepdims=True)
        p = np.exp2(two - m)
        out = (p @ values[keys] / p.sum(1, keepdims=True)).astype("f4")
        return AttentionState.from_max_sum(out[:, None], m.astype("f4"), p.sum(1, keepdims=True).astype("f4"), base="2",
                                           layout="TND", stats_layout="TN")  # fmt: skip

    merged = rau.merge_states([part(slice(0, 11)), part(slice(11, 30))], layout="TND")
    p = np.exp(scores - scores.max(1, keepdims=True))
    np.testing.assert_allclose(merged.attn_out[:, 0], p @ values / p.sum(1, keepdims=True), atol=3e-5)


def test_rows_without_keys_stay_empty_and_infinities_stay():
    maximum = np.array([-np.inf, 3, np.inf, np.nan, 5], "f4")[:, None]
    total = np.array([1, 0, 2, 3, np.inf], "f4")[:, None]
    state = AttentionState.from_max_sum(np.zeros((5, 1, 2), "f4"), maximum, total, base="2", layout="TND", stats_layout="TN")
    np.testing.assert_array_equal(state.softmax_max[[0, 2, 3], 0, 0], maximum[[0, 2, 3], 0])
    np.testing.assert_array_equal(state.softmax_sum[:, 0, 0], total[:, 0])
    assert state.lse(base="e", layout="TND", lse_layout="TN")[:2].tolist() == [[-np.inf], [-np.inf]]


@pytest.mark.parametrize(
    ("changed", "rules", "says"),
    [
        ({"stats_layout": None}, ("lse-layout",), 'stats_layout is None; layout "TND" expects the axes of the statistics by name'),
        ({"stats_layout": "HN"}, ("lse-layout",), "stats_layout = 'HN'; expected one of \"TN\", \"NT\""),
        ({"stats_layout": "NT"}, ("shape-stats",) * 2, 'softmax_sum has shape (3, 4); for attn_out of shape (3, 4, 5), layout '
         '"TND" expects (N, T) = (4, 3). It looks like (T, N): pass stats_layout="TN".'),
        ({"base": None}, ("base",), "base = None"),
        ({"softmax_sum": np.ones((3, 4), "f8")}, ("dtype-stats",), "softmax_sum has dtype float64; expected that of "
         "softmax_max."),
        ({"softmax_sum": np.ones((3, 4), "f2")}, ("dtype-stats",), "softmax_sum has dtype float16; expected one of float32"),
        ({"softmax_max": np.ones((3, 4, 7), "f4")}, ("rank",), "softmax_max has shape (3, 4, 7); stats_layout \"TN\" expects"),
        ({"softmax_sum": None}, ("array",), "softmax_sum is None"),
        ({"lanes": 2}, ("lanes",), "lanes = 2; expected 1, or 8 for a call in a vendor's profile."),
        ({"heads": 3}, ("heads",), "expected heads = 3"),
    ],
)  # fmt: skip
def test_what_from_max_sum_refuses(changed, rules, says):
    arguments = {
        "attn_out": np.zeros((3, 4, 5), "f4"), "softmax_max": np.zeros((3, 4), "f4"), "softmax_sum": np.ones((3, 4), "f4"),
        "base": "2", "layout": "TND", "stats_layout": "TN",
    } | changed  # fmt: skip
    with pytest.raises(rau.ConstraintError) as caught:
        AttentionState.from_max_sum(**arguments)
    assert caught.value.rules == rules
    assert says in str(caught.value)


@pytest.mark.parametrize("base", ["e", "2"])
def test_sums_that_float32_does_not_have(base):
    """Of a float64 sum the logarithm counts: beside a float32 output it goes into the maximum."""
    sums = np.array([1e-60, 1e60, 1e300, 1e-300, 0.0, 2.0])[:, None]
    maximum = np.full((6, 1), 200.0)
    how = {"layout": "TND", "stats_layout": "TN", "base": base}
    state = AttentionState.from_max_sum(np.ones((6, 1, 2), "f4"), maximum, sums, **how)
    lse = 200 * (1 if base == "e" else math.log(2)) + np.log(np.where(sums == 0, 1, sums))
    mine = state.lse(base="e", layout="TND", lse_layout="TN")
    assert mine[4, 0] == -np.inf
    np.testing.assert_allclose(np.delete(mine, 4, 0), np.delete(lse, 4, 0), rtol=2.0**-23)
    assert (state.softmax_sum[[5], 0, 0] > 1).all(), "an ordinary one stays a sum"


def test_a_state_shows_what_its_arrays_are_and_not_their_numbers():
    class Mine(AttentionState):
        pass

    stats = np.ones((1, 2, 600, 8), np.float32)
    state = AttentionState(np.ones((600, 1, 8), "f2"), stats, stats)
    said = (
        "AttentionState\n  attn_out     float16 (600, 1, 8), numpy on cpu\n  softmax_max  float32 (1, 2, 600, 8), numpy on cpu\n"
        "  softmax_sum  float32 (1, 2, 600, 8), numpy on cpu"
    )
    assert repr(state) == str(state) == said
    assert repr(Mine(*state)) == said.replace("AttentionState", "Mine")
    assert repr(AttentionState(1, None, [2.0])).split() == "AttentionState attn_out 1 softmax_max None softmax_sum [2.0]".split()

    class Hostile:
        dtype, shape = "float32", 3  # which is none

    assert repr(AttentionState(Hostile(), stats, stats)).split("\n")[1].endswith("Hostile")


def test_a_number_of_heads_may_be_of_few_bits():
    out, lse = np.ones((2, 1, 600), np.float32), np.zeros((1, 200, 2), np.float32)
    for heads in (np.uint8(200), np.int64(200)):
        assert rau.AttentionState.from_lse(out, lse, base="e", heads=heads).softmax_max.shape == (1, 200, 2, 1)
