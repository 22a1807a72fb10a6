"""Partial attention: against a plain softmax, and merged by the oracle against attention to all the keys."""

from __future__ import annotations

import builtins

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rau.testing import exact_attention, oracle, partial_attention

DTYPES = ["float16", "bfloat16", "float32", "float64"]
# Half a unit in the last place of an output below 4; float32's is drowned by the statistics'.
ROUNDING = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-22, "float64": 2.0**-48}


def plain(q, k, v, visible):
    """Attention of one head as the textbook has it; q, k, v are (tokens, D)."""
    scores = np.where(visible, q @ k.T / np.sqrt(q.shape[1]), -np.inf)
    p = np.exp(scores)
    return p @ v / p.sum(axis=1, keepdims=True), scores.max(axis=1), np.log(p.sum(axis=1))


def inputs(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal((3, *shape))


@pytest.mark.parametrize("causal", [False, True])
def test_against_a_plain_softmax(causal):
    q, k, v = inputs(7, 2, 3, 4)
    visible = np.tril(np.ones((7, 7), bool)) if causal else True
    exact = exact_attention(q, k, v, causal=causal)
    single = partial_attention(q, k, v, causal=causal)
    assert exact.attn_out.shape == (7, 2, 12) and exact.softmax_max.shape == (2, 3, 7, 8)
    for b in range(2):
        for n in range(3):
            out, maximum, lse = plain(q[:, b, n], k[:, b, n], v[:, b, n], visible)
            assert np.allclose(exact.attn_out[:, b, 4 * n : 4 * n + 4], out, rtol=0, atol=1e-14)
            assert np.allclose(exact.softmax_max[b, n, :, 7], maximum, rtol=1e-14)
            assert np.allclose(
                exact.softmax_max[b, n, :, 0] + np.log(exact.softmax_sum[b, n, :, 3]), lse, atol=1e-14
            )
    assert single.softmax_max.dtype == single.softmax_sum.dtype == single.attn_out.dtype == np.float32
    assert np.array_equal(single.softmax_max, exact.softmax_max.astype(np.float32))
    # The sum makes up for what the rounding of the maximum lost.
    lse = single.softmax_max + np.log(single.softmax_sum.astype(np.float64))
    assert np.allclose(lse, exact.softmax_max + np.log(exact.softmax_sum), rtol=0, atol=1e-7)
    for stats in single[1:]:
        assert stats.flags.owndata and (stats == stats[..., :1]).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["SBH", "BSND", "BNSD"])
def test_partials_merge_to_the_whole(layout, dtype, causal):
    shape, token = {"SBH": ((30, 2, 3, 8), 0), "BSND": ((2, 30, 3, 8), 1), "BNSD": ((2, 3, 30, 8), 2)}[layout]
    q, k, v = inputs(*shape)
    parts = []
    for places in np.array_split(np.arange(30), 4):
        key, value = np.take(k, places, token), np.take(v, places, token)
        parts.append(
            partial_attention(q, key, value, causal=causal, layout=layout, key_positions=places, dtype=dtype)
        )
    assert parts[0].attn_out.dtype.name == dtype
    merged = oracle(parts, layout=layout)
    exact = exact_attention(q, k, v, causal=causal, layout=layout)
    assert exact.attn_out.shape == parts[0].attn_out.shape
    assert np.abs(merged.attn_out - exact.attn_out).max() <= 1.01 * ROUNDING[dtype]
    assert np.allclose(merged.softmax_max, exact.softmax_max, rtol=1e-7)


def test_zig_zag_slices_merge_to_the_whole():
    q, k, v = inputs(32, 1, 2, 8)
    order = np.random.default_rng(5).permutation(32)
    for ring in ([order[:5], order[5:6], order[6:]], [np.r_[0:4, 28:32], np.r_[4:8, 24:28], np.r_[8:24]]):
        # Queries in any order too, as the rank that holds them has them.
        mine = np.r_[20:32, 0:20]
        parts = [
            partial_attention(q[mine], k[own], v[own], causal=True, query_positions=mine, key_positions=own,
                              dtype="float64")
            for own in ring
        ]  # fmt: skip
        exact = exact_attention(q, k, v, causal=True).attn_out[mine]
        assert np.abs(oracle(parts).attn_out - exact).max() < 1e-13


def test_rows_that_see_no_key_are_empty():
    q, k, v = inputs(6, 1, 1, 4)
    state = partial_attention(q, k[4:], v[4:], causal=True, key_positions=np.array([4, 5]))
    assert not state.attn_out[:4].any() and state.attn_out[4:].all()
    assert np.isneginf(state.softmax_max[0, 0, :4]).all() and not state.softmax_sum[0, 0, :4].any()
    nothing = partial_attention(q, k[:0], v[:0])
    assert (
        not nothing.attn_out.any()
        and np.isneginf(nothing.softmax_max).all()
        and not nothing.softmax_sum.any()
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("softmax_layout", ["TND", "SBH"])
def test_unequal_sequences(softmax_layout, causal):
    ends, heads, dim = [0, 5, 5, 6, 17], 3, 8  # one of them without tokens
    q, k, v = inputs(17, heads, dim)
    parts = []
    for rank in range(3):
        places = [np.array_split(np.arange(b - a), 3)[rank] for a, b in zip(ends, ends[1:])]
        tokens = np.concatenate([a + own for a, own in zip(ends, places)])
        lengths = {"actual_seq_qlen": ends, "actual_seq_kvlen": np.cumsum([0, *map(len, places)])}
        parts.append(
            partial_attention(q, k[tokens], v[tokens], causal=causal, layout="TND",
                              softmax_layout=softmax_layout, key_positions=np.concatenate(places),
                              dtype="float64", **lengths)
        )  # fmt: skip
    merged = oracle(parts, ends, "TND", softmax_layout=softmax_layout)
    exact = exact_attention(
        q, k, v, causal=causal, layout="TND", softmax_layout=softmax_layout, actual_seq_qlen=ends
    )
    assert np.abs(merged.attn_out - exact.attn_out).max() < 1e-13
    assert np.allclose(merged.softmax_sum, exact.softmax_sum, rtol=1e-13)
    # Each sequence on its own, where there is nothing to get wrong.
    for a, b in zip(ends, ends[1:]):
        alone = exact_attention(q[a:b, None], k[a:b, None], v[a:b, None], causal=causal)
        assert np.allclose(
            exact.attn_out[a:b].reshape(b - a, 1, heads * dim), alone.attn_out, rtol=0, atol=1e-14
        )
        own = exact.softmax_max[a:b]
        if softmax_layout == "SBH":
            own = own.reshape(-1, 8)[: (b - a) * heads].reshape(heads, b - a, 8).swapaxes(0, 1)
        assert np.allclose(own, alone.softmax_max[0].swapaxes(0, 1), rtol=1e-14)


def test_inputs_in_16_bits_widen():
    q, k, v = inputs(5, 1, 2, 4).astype(ml_dtypes.bfloat16)
    wide = exact_attention(*(x.astype(np.float64) for x in (q, k, v)))
    assert np.array_equal(exact_attention(q, k, v).attn_out, wide.attn_out)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=64), min_size=1, max_size=20))
def test_rounding_to_bfloat16_is_one_rounding(values):
    # With one key the output is its value. ml_dtypes would go by way of float32: wrong for 1 + 2^-8 + 2^-40.
    v = np.array(
        [1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8 - 2.0**-40, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 3.4e38, *values]
    )
    got = partial_attention(np.zeros((1, 1, 1, v.size)), np.zeros((1, 1, 1, v.size)), v.reshape(1, 1, 1, -1),
                            dtype="bfloat16").attn_out[0, 0]  # fmt: skip
    assert got[:5].astype(float).tolist() == [1 + 2.0**-7, 1.0, 1.0, 1 + 2.0**-6, np.inf]
    for value, rounded in zip(v, got):
        assert rounded == nearest_bfloat16(value) or (np.isnan(value) and np.isnan(rounded))


def nearest_bfloat16(value):
    """By definition: on the grid of 8 bits, ties to even; infinite from half a unit above the largest on."""
    if not np.isfinite(value) or value == 0 or abs(value) > 1e39:
        return value * np.inf if abs(value) > 1e39 else value
    unit = 2.0 ** max(np.frexp(value)[1] - 8, -133)
    rounded = np.rint(value / unit) * unit  # powers of two: exact; rint ties to even
    return np.copysign(np.inf, value) if abs(rounded) >= 2.0**128 else rounded


def test_bfloat16_without_ml_dtypes(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "ml_dtypes":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="pip install ml_dtypes"):
        partial_attention(*inputs(2, 1, 1, 4), dtype="bfloat16")


WRONG = {
    'q has shape (4, 1, 8); expected (S, B, N, D) in layout "SBH"; split the hidden axis': {
        "q": np.ones((4, 1, 8))
    },
    "q has dtype int64; expected one of float16": {"q": np.ones((4, 1, 2, 4), int)},
    "k has shape (4, 1, 3, 4), q (4, 1, 2, 4); expected them to differ in axis 0": {
        "k": np.ones((4, 1, 3, 4))
    },
    "v has shape (5, 1, 2, 4); expected that of k, (4, 1, 2, 4)": {"v": np.ones((5, 1, 2, 4))},
    "dtype is 'float8'; expected the name of one of float16, bfloat16, float32, float64": {"dtype": "float8"},
    "layout is 'BSH'; expected one of SBH, BSND, BNSD, TND": {"layout": "BSH"},
    "softmax_layout is 'NTD'; expected one of TND, SBH": {"softmax_layout": "NTD"},
    "key_positions has shape (3,) and dtype int64; expected integers of shape (4,)": {
        "key_positions": np.arange(3)
    },
    "query_positions has shape (4,) and dtype float64; expected integers": {
        "query_positions": np.arange(4.0)
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_teach(message):
    arguments = {name: np.ones((4, 1, 2, 4)) for name in "qkv"} | WRONG[message]
    with pytest.raises(ValueError) as caught:
        partial_attention(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({}, 'layout "TND" needs actual_seq_qlen: cumulative lengths in tokens, non-decreasing from 0 to 6'),
        ({"actual_seq_qlen": [2, 4]}, "these look like lengths, pass [0, *np.cumsum(lengths)]"),
        ({"actual_seq_qlen": [0, 4, 2, 6]}, "actual_seq_qlen is [0, 4, 2, 6]; expected cumulative lengths"),
        (
            {"actual_seq_qlen": [0.0, 6.0]},
            "actual_seq_qlen has shape (2,) and dtype float64; expected 1-D integers",
        ),
        (
            {"actual_seq_qlen": [0, 6], "actual_seq_kvlen": [0, 3, 6]},
            "actual_seq_kvlen has 2 sequences, actual_seq_qlen 1; expected as many",
        ),
    ],
)
def test_errors_about_lengths_teach(lengths, message):
    with pytest.raises(ValueError) as caught:
        partial_attention(*inputs(6, 2, 4), layout="TND", **lengths)
    assert message in str(caught.value)
