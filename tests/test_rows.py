"""Merges of some tokens, of padded sequences, of any number of states a row; and results of another dtype."""

from dataclasses import replace

import numpy as np
import pytest
from running import on_host, same
from states import tnd

import rau
from rau import rows
from rau.state import AttentionState
from rau.testing.reference.eight_bits import EXPONENTS as EIGHT_BITS
from rau.testing.reference.eight_bits import nearest_codes, numbers_of

T = 6
CHOICES = {
    "slice": slice(0, 3), "step": slice(1, 6, 2), "numbers": [1, 4, 5], "unordered": np.array([5, 0], np.int32),
    "shuffled": [1, 3, 2, 4],
    "mask": np.array([0, 1, 0, 0, 1, 1], bool), "bools": [False, True, True, False, False, False], "none": [], "all": slice(None),
}  # fmt: skip
EMPTY = (0.0, -np.inf, 0.0)


def chosen(tokens):
    mask = np.zeros(T, bool)
    mask[tokens if not isinstance(tokens, list) or tokens else slice(0, 0)] = True
    return mask


def states(lanes=1, dtype="float32"):
    return [tnd(T, 2, 8, lanes=lanes, dtype=dtype, seed=seed) for seed in range(3)]


def of(backend, state):
    return AttentionState(*(backend.asarray(np.array(part)) for part in state))


def spoiled(state, mask):
    """With NaN in the rows that nobody may read."""
    parts = [np.array(part) for part in state]
    for part in parts:
        part[~mask] = np.nan
    return AttentionState(*parts)


@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("tokens", CHOICES.values(), ids=CHOICES)
def test_of_some_tokens_the_others_keep_their_bits(any_backend, tokens, lanes):
    backend, mask = rau.registry.get(any_backend), chosen(tokens)
    first, *later = states(lanes)
    merged = rau.merge_states([first, *later], layout="TND")
    expected = [np.where(mask[:, None, None], new, old) for new, old in zip(merged, first)]
    how = {"layout": "TND", "tokens": tokens, "backend": any_backend}

    def given():
        return [of(backend, first), *(of(backend, spoiled(state, mask)) for state in later)]

    same(on_host(backend, rau.merge_states(given(), **how)), expected)
    alone = rau.merge_states(given(), **how, statistics=False)
    np.testing.assert_array_equal(backend.to_numpy(alone), expected[0])
    for place in (None, 0, 1):  # in new arrays, and on any of the states
        into = given()
        out = of(backend, tnd(T, 2, 8, lanes=lanes, seed=9)) if place is None else into[place]
        result = rau.merge_states(into, **how, out=out)
        assert all(got is its for got, its in zip(result, out))
        same(on_host(backend, result), expected)


def test_the_vendors_call_takes_them_too(backend):
    prev, cur, _ = states(8)
    prev, cur = (AttentionState(np.repeat(state.attn_out, 8, -1), *state[1:]) for state in (prev, cur))  # D = 64
    whole = rau.ring_attention_update(*prev, *cur, [0, T], "TND", backend=backend)
    some = rau.ring_attention_update(*prev, *cur, [0, T], "TND", tokens=[1, 4], backend=backend)
    for new, old, got in zip(whole, prev, some):
        np.testing.assert_array_equal(got[[1, 4]], new[[1, 4]])
        np.testing.assert_array_equal(got[[0, 2, 3, 5]], old[[0, 2, 3, 5]])


REAL, SLOTS, MASK = [0, 2, 2, 3], [0, 4, 4, 6], np.array([1, 1, 0, 0, 1, 0], bool)


@pytest.mark.parametrize("real, slots, mask", [
    (REAL, SLOTS, MASK), ([0, 4], [0, 6], np.arange(T) < 4), ([0, 0], [0, 6], np.zeros(T, bool)), ([0, 6], [0, 6], np.ones(T, bool)),
], ids=["gaps", "end", "empty", "full"])  # fmt: skip
def test_padding_is_neither_read_nor_written(any_backend, real, slots, mask):
    backend = rau.registry.get(any_backend)
    whole = rau.merge_states(states(), layout="TND")
    how = {"layout": "TND", "cu_seqlens_padded": slots, "actual_seq_qlen": real, "backend": any_backend}
    given = [of(backend, spoiled(state, mask)) for state in states()]
    expected = [np.where(mask[:, None, None], new, value) for new, value in zip(whole, EMPTY)]
    same(on_host(backend, rau.merge_states(given, **how)), expected)
    into = tnd(T, 2, 8, lanes=1, seed=9)
    kept = [np.where(mask[:, None, None], new, old) for new, old in zip(whole, into)]
    same(on_host(backend, rau.merge_states(given, **how, out=of(backend, into))), kept)
    rau.merge_states(given, **how, out=given[0])  # in place
    same(on_host(backend, given[0]), [np.where(mask[:, None, None], new, np.nan) for new in whole])


def test_any_number_of_states_a_row(any_backend):
    backend, indptr = rau.registry.get(any_backend), [0, 2, 2, 3, 6]
    pool = states()[0]
    merged = on_host(backend, rau.merge_states(of(backend, pool), layout="TND", indptr=np.array(indptr), backend=any_backend))
    for row, (begin, end) in enumerate(zip(indptr, indptr[1:])):
        if begin == end:
            assert all((part[row] == value).all() for part, value in zip(merged, EMPTY))
        else:
            expected = rau.merge_states([[part[k : k + 1] for part in pool] for k in range(begin, end)], layout="TND")
            same([part[row : row + 1] for part in merged], expected)


@pytest.mark.parametrize("own", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_another_dtype_is_rounded_once(any_backend, own, dtype):
    """A float32 result holds what a narrower one is rounded from: the merge of the same numbers in float32."""
    pytest.importorskip("ml_dtypes")
    backend = rau.registry.get(any_backend)
    given = [of(backend, state) for state in states(dtype=own)]
    wide = on_host(backend, rau.merge_states(given, layout="TND", dtype="float32", backend=any_backend))
    same(
        wide, rau.merge_states([state._replace(attn_out=state.attn_out.astype("f4")) for state in states(dtype=own)], layout="TND")
    )
    merged = on_host(backend, rau.merge_states(given, layout="TND", dtype=dtype, backend=any_backend))
    assert wide[0].dtype == np.float32 and merged[0].dtype == np.dtype(dtype)
    same(merged, [wide[0].astype(dtype), *wide[1:]])
    same(on_host(backend, rau.merge_states(given, layout="TND", backend=any_backend)), [wide[0].astype(own), *wide[1:]])


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_eight_bits_are_the_nearest_number(any_backend, dtype):
    """At every number of the format, every middle of two, and the float32 numbers beside them."""
    pytest.importorskip("ml_dtypes")
    backend, numbers = rau.registry.get(any_backend), numbers_of(dtype)
    edges = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2]).astype(np.float32)
    tried = np.concatenate([edges, np.nextafter(edges, np.float32(np.inf)), np.nextafter(edges, np.float32(-1))])
    tried = np.concatenate([tried, -tried, np.float32([np.inf, -np.inf, np.nan, 3e38, -1e-45, 464, 465, 61440, 1.97])])
    state = AttentionState(tried.reshape(1, 1, -1), np.zeros((1, 1, 1), np.float32), np.ones((1, 1, 1), np.float32))
    how = {"layout": "TND", "dtype": dtype, "statistics": False, "backend": any_backend}
    codes = backend.to_numpy(rau.merge_states([of(backend, state)], **how)).view(np.uint8).ravel()
    known = ~np.isnan(tried)
    np.testing.assert_array_equal(codes[known], nearest_codes(tried, dtype)[known])
    assert (codes[~known] >= len(numbers) + (dtype == "float8_e5m2")).all()  # NaN, of which there are several

    scales = np.float32([3.0, 1e-3])  # one a head, in a layout that folds them
    two = AttentionState(np.concatenate([tried, tried]).reshape(1, 1, -1), np.zeros((1, 2, 1, 1), np.float32),
                         np.ones((1, 2, 1, 1), np.float32))  # fmt: skip
    how["layout"] = "SBH"
    codes = backend.to_numpy(rau.merge_states([of(backend, two)], **how, scale=backend.asarray(scales))).view(np.uint8)
    with np.errstate(over="ignore"):
        products = np.concatenate([tried * scale for scale in scales])
    known = ~np.isnan(products)
    np.testing.assert_array_equal(codes.ravel()[known], nearest_codes(products, dtype)[known])


@pytest.mark.parametrize("given", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_tokens_that_are_not_merged_are_scaled_and_rounded_too(any_backend, dtype, given):
    pytest.importorskip("ml_dtypes")
    backend, mask, scale = rau.registry.get(any_backend), chosen([1, 4]), np.float32([300.0, 1e-2])
    made = states(dtype=given)
    merged = rau.merge_states(made, layout="TND", dtype="float32").attn_out
    wide = np.where(mask[:, None, None], merged, made[0].attn_out.astype(np.float32))
    how = {"layout": "TND", "tokens": [1, 4], "dtype": dtype, "scale": backend.asarray(scale), "backend": any_backend}
    fresh = rau.merge_states([of(backend, state) for state in made], **how)
    into = of(backend, AttentionState(wide.astype(dtype), *made[2][1:]))
    rau.merge_states([of(backend, state) for state in made], **how, out=into)
    for result in (fresh, into):
        codes = backend.to_numpy(result.attn_out).view(np.uint8)
        np.testing.assert_array_equal(codes, nearest_codes(wide * scale[:, None], dtype))
    padded = {**how, "cu_seqlens_padded": [0, 4, T], "actual_seq_qlen": [0, 1, 3]}
    del padded["tokens"]
    result = rau.merge_states([of(backend, state) for state in made], **padded)
    real = chosen([0, 4, 5])
    codes = backend.to_numpy(result.attn_out).view(np.uint8)
    merged = rau.merge_states(made, layout="TND", dtype="float32").attn_out
    np.testing.assert_array_equal(codes, nearest_codes(np.where(real[:, None, None], merged, 0) * scale[:, None], dtype))


@pytest.mark.parametrize("tokens", [None, [1, 4]], ids=["all", "some"])
@pytest.mark.parametrize("dtype", [*EIGHT_BITS, "float16"])
def test_pairs_are_merged_to_another_dtype_too(any_backend, dtype, tokens):
    pytest.importorskip("ml_dtypes")
    backend, how = rau.registry.get(any_backend), {"layout": "TND", "backend": any_backend, "tokens": tokens}
    asked = {"dtype": dtype, "scale": 300.0 if dtype in EIGHT_BITS else None}
    named = {"base": "2", "lse_layout": "NT"}
    lses = [np.ascontiguousarray(state.softmax_max[..., 0].T) for state in states()]
    outs = [state.attn_out for state in states()]

    def pairs():
        return [(backend.asarray(out.copy()), backend.asarray(lse.copy())) for out, lse in zip(outs, lses, strict=True)]

    made = [AttentionState.from_lse(*pair, layout="TND", **named) for pair in pairs()]
    expected = backend.to_numpy(rau.merge_states(made, **how, **asked, statistics=False))
    lse = backend.to_numpy(rau.merge_lse(pairs(), **how, **named)[1])
    same([backend.to_numpy(part) for part in rau.merge_lse(pairs(), **how, **named, **asked)], [expected, lse])
    for given in (pairs(), pairs()):
        out = backend.asarray(np.ones(expected.shape, expected.dtype)), given[0][1]  # the log-sum-exp in place
        result = rau.merge_lse(given, **how, **named, **asked, out=out)
        assert result[0] is out[0] and result[1] is out[1]
        same([backend.to_numpy(part) for part in result], [expected, lse])
    for wrong, message in (({"dtype": "int8"}, "dtype = 'int8'"), ({"scale": 2.0}, "scale is given for an output of float32")):
        given = pairs()
        with pytest.raises(rau.RauError, match=message):
            rau.merge_lse(given, **how, **named, **wrong, out=given[0])
        same([backend.to_numpy(part) for part in given[0]], [outs[0], lses[0]])


@pytest.mark.parametrize(
    "asked", [{"tokens": [1, 4]}, {"tokens": slice(2, 5)}, {"cu_seqlens_padded": SLOTS}], ids=["rows", "slice", "padded"]
)
@pytest.mark.parametrize("layout", ["BSND", "BNSD", "SBH"])
def test_other_layouts_have_no_axis_of_tokens_alone(layout, asked):
    with pytest.raises(rau.OptionError, match=r"expected layout \"TND\" with token-major statistics. Pass slices"):
        rau.merge_states(states(), REAL, layout, **asked)


WRONG = {  # what is asked, and what the message says
    "twice": ({"tokens": [1, 1]}, "names 1 more than once"),
    "a mask of ints": ({"tokens": np.array([1, 0, 1, 0, 1, 1])}, "It looks like a mask: pass it as bools"),
    "bools and numbers": ({"tokens": [True, 2, 0]}, "tokens holds 2, of type int"),
    "beyond": ({"tokens": [0, 6]}, r"tokens\[1\] = 6; expected numbers of tokens, from 0 to 5"),
    "negative": ({"tokens": [-1]}, r"tokens\[0\] = -1"),
    "fraction": ({"tokens": [1.5]}, "has dtype float64"),
    "word": ({"tokens": "front"}, "is of type str"),
    "short mask": ({"tokens": [True]}, "a mask of 1 bools, for T = 6 tokens"),
    "backwards": ({"tokens": slice(3, 0, -1)}, "walks backwards"),
    "two axes": ({"tokens": np.zeros((2, 2), int)}, r"has shape \(2, 2\)"),
    "ragged": ({"tokens": [[1], 2]}, r"tokens holds \[1\], of type list; expected a slice, a mask"),
    "both": ({"tokens": [1], "cu_seqlens_padded": [0, 6]}, "expected one of them"),
    "no lengths": ({"cu_seqlens_padded": [0, 6]}, "actual_seq_qlen is None; padded sequences expect"),
    "too long": ({"cu_seqlens_padded": [0, 6], "actual_seq_qlen": [0, 7]}, "sequence 0 has 7 tokens and its slot 6"),
    "slots end": ({"cu_seqlens_padded": [0, 5], "actual_seq_qlen": [0, 3]}, r"cu_seqlens_padded = \[0, 5\]: it ends at 5"),
    "not as many": ({"cu_seqlens_padded": [0, 6], "actual_seq_qlen": [0, 3, 3]}, "of 2 sequences and cu_seqlens_padded of 1"),
    "packed": ({"tokens": [1], "softmax_layout": "SBH", "actual_seq_qlen": [0, 6]}, "reorder_softmax"),
    "int8": ({"dtype": "int8"}, "dtype = 'int8', for outputs of float32; expected one of float32"),
    "wider": ({"dtype": "float64"}, "expected one of float32"),
    "scale": ({"scale": 2.0}, "scale is given for an output of float32"),
    "scales": ({"dtype": "float8_e5m2", "scale": np.ones(3, np.float32)}, r"has shape \(3,\)"),
    "scale's dtype": ({"dtype": "float8_e5m2", "scale": np.ones(2)}, "a numpy array of float64"),
    "no scale": ({"dtype": "float8_e5m2", "scale": True}, "scale is of type bool"),
    "out's dtype": ({"dtype": "float16", "out": states()[2]}, "out.attn_out has dtype float32; expected float16"),
    "indptr and out": ({"indptr": [0, 6], "out": states()[2]}, "expected it without them"),
    "states of indptr": ({"indptr": [0, 6]}, "expected one triple"),
}  # fmt: skip


@pytest.mark.parametrize("asked, message", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_and_nothing_is_written(asked, message):
    before = states()
    given = states()
    with pytest.raises(rau.ConstraintError, match=message):
        rau.merge_states(given, **{"layout": "TND", "out": None if "scale" in asked else given[0], **asked})
    for state, its in zip(given, before):
        same(state, its)


def test_values_are_looked_at_of_the_rows_alone():
    given = [spoiled(state, MASK) for state in states()]
    rau.merge_states(given, REAL, "TND", cu_seqlens_padded=SLOTS, check="values")
    for tokens in ([0, 2], [2, 0], slice(2, 4), np.arange(T) == 2):  # the token, by its number in what was given
        with pytest.raises(rau.ConstraintError, match=r"\[value-max\] states\[0..2\].softmax_max\[2, 0, 0\] = nan"):
            rau.merge_states(given, layout="TND", tokens=tokens, check="values")


LAYS = [{"lse_layout": lay, "base": base} for lay in ("TN", "NT") for base in "e2"]


@pytest.mark.parametrize("how", LAYS, ids=lambda how: "-".join(how.values()))
@pytest.mark.parametrize("tokens", [CHOICES["slice"], CHOICES["mask"]], ids=["slice", "mask"])
def test_pairs_of_some_tokens(any_backend, tokens, how):
    """Also in base 2, where a log-sum-exp would not survive the way to a state and back."""
    backend, mask = rau.registry.get(any_backend), chosen(tokens)
    how = {"layout": "TND", **how, "backend": any_backend}
    flip = np.transpose if how["lse_layout"] == "NT" else np.asarray
    given = [(state.attn_out, np.ascontiguousarray(flip(state.softmax_max[..., 0]))) for state in states()[:2]]
    here = [tuple(backend.asarray(part.copy()) for part in pair) for pair in given]
    whole = [backend.to_numpy(part) for part in rau.merge_lse(here, **how)]
    bad = [np.array(part) for part in given[1]]
    bad[0][~mask], flip(bad[1])[~mask] = np.nan, np.nan
    expected = [np.where(mask[:, None, None], whole[0], given[0][0]), np.where(flip(mask[:, None]), whole[1], given[0][1])]

    def pairs():
        return [tuple(backend.asarray(part.copy()) for part in pair) for pair in (given[0], bad)]

    for place in ("fresh", "out", 0, 1):
        into = pairs()
        out = {"fresh": None, "out": pairs()[1]}.get(place) if isinstance(place, str) else into[place]
        result = rau.merge_lse(into, **how, tokens=tokens, out=out)
        assert out is None or all(got is its for got, its in zip(result, out))
        same([backend.to_numpy(part) for part in result], expected)


def test_padded_pairs_and_log_sum_exps_alone(any_backend):
    backend = rau.registry.get(any_backend)
    how = {"layout": "TND", "lse_layout": "TN", "base": "2", "backend": any_backend}
    pairs = [tuple(backend.asarray(part) for part in (state.attn_out, state.softmax_max[..., 0].copy())) for state in states()]
    out, lse = (backend.to_numpy(part) for part in rau.merge_lse(pairs, **how))
    padded = rau.merge_lse(pairs, **how, actual_seq_qlen=REAL, cu_seqlens_padded=SLOTS)
    same([backend.to_numpy(part) for part in padded],
         [np.where(MASK[:, None, None], out, 0), np.where(MASK[:, None], lse, -np.inf).astype(np.float32)])  # fmt: skip
    for real, mask in ((REAL, MASK), ([0, 3], np.arange(T) < 3)):
        slots = SLOTS if real is REAL else [0, T]
        into = tuple(backend.asarray(np.full_like(part, 7)) for part in (out, lse))
        rau.merge_lse(pairs, **how, actual_seq_qlen=real, cu_seqlens_padded=slots, out=into)
        same([backend.to_numpy(part) for part in into], [np.where(mask[:, None, None], out, 7), np.where(mask[:, None], lse, 7)])
    none, alone = rau.merge_lse([(None, pair[1]) for pair in pairs], base="2", backend=any_backend)
    assert none is None
    np.testing.assert_array_equal(backend.to_numpy(alone), lse)
    with pytest.raises(rau.ShapeError, match=r"pairs\[1\]\[1\] has shape \(3, 2\) and dtype float32; expected those of"):
        rau.merge_lse([(None, pairs[0][1]), (None, pairs[1][1][:3])], base="2")
    with pytest.raises(rau.ShapeError, match="the pairs have no outputs"):
        rau.merge_lse([(None, pairs[0][1])], base="2", out=(None, pairs[1][1]))


def ring_of(backend, name, layout="TND", **how):
    return rau.StreamingMerge(layout, like=of(backend, tnd(T, 2, 8, lanes=1)), backend=name, **how)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("tokens", CHOICES.values(), ids=CHOICES)
def test_a_ring_takes_a_partial_state_of_some_tokens(any_backend, tokens, dtype):
    """As many tokens as are chosen, in their order."""
    backend = rau.registry.get(any_backend)
    places = np.arange(T)[tokens if not isinstance(tokens, list) or tokens else slice(0, 0)]
    first, cur, last = states(dtype=dtype)
    ring = ring_of(backend, any_backend)
    expected = rau.StreamingMerge("TND")
    for made, state in ((ring, of(backend, first)), (expected, first)):
        made.update(*state)
    ring.update(*of(backend, [part[places] for part in cur]), tokens=tokens)
    for place in places:  # one by one, where they lie
        rows = [part[place : place + 1] for part in expected.running]
        rau.merge_states([rows, [part[place : place + 1] for part in cur]], layout="TND", out=rows, backend="numpy")
    for made, state in ((ring, of(backend, last)), (expected, last)):
        made.update(*state)
    same(on_host(backend, ring.result()), expected.result())
    wrong = of(backend, [part[:1] for part in cur])
    if len(places) != 1:
        with pytest.raises(rau.ShapeError, match=r"softmax_max|attn_out"):
            ring.update(*wrong, tokens=tokens)
        same(on_host(backend, ring.result()), expected.result())


def test_a_ring_of_padded_sequences(any_backend):
    """Halves are halves of the slots, whose fronts are filled first."""
    backend, real, slots = rau.registry.get(any_backend), [0, 3, 3], [0, 4, 6]
    mask = np.array([1, 1, 1, 0, 0, 0], bool)
    ring = ring_of(backend, any_backend, actual_seq_qlen=real, cu_seqlens_padded=slots)
    whole, back, front = (tnd(count, 2, 8, lanes=1, seed=seed) for seed, count in enumerate((T, T // 2, T // 2)))
    ring.update(*of(backend, spoiled(whole, mask)))
    ring.update(*of(backend, spoiled(back, np.array([1, 0, 0], bool))), tokens="back")  # of tokens 2 and 3, and 5
    ring.update(*of(backend, spoiled(front, np.array([1, 1, 0], bool))), tokens="front")  # of tokens 0 and 1, and 4
    expected = rau.StreamingMerge("TND", like=whole)
    expected.update(*[part[mask] for part in whole], tokens=mask)
    expected.update(*[part[[0]] for part in back], tokens=[2])
    expected.update(*[part[:2] for part in front], tokens=[0, 1])
    same(on_host(backend, ring.result()), expected.result())
    assert all((part[3:] == value).all() for part, value in zip(on_host(backend, ring.result()), EMPTY))
    with pytest.raises(rau.ShapeError, match=r"attn_out has shape \(3, 2, 8\)"):
        ring.update(*of(backend, front))
    with pytest.raises(rau.OptionError, match="cu_seqlens_padded is given with"):
        rau.StreamingMerge("SBH", actual_seq_qlen=real, cu_seqlens_padded=slots)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_a_ring_ends_in_eight_bits(any_backend, dtype):
    pytest.importorskip("ml_dtypes")
    backend = rau.registry.get(any_backend)
    ring = ring_of(backend, any_backend)
    ring.update(*of(backend, states()[0]))
    scale = np.float32([300.0, 1e9])
    made = backend.to_numpy(ring.result(dtype, backend.asarray(scale)).attn_out)
    np.testing.assert_array_equal(made.view(np.uint8), nearest_codes(states()[0].attn_out * scale[:, None], dtype))
    with pytest.raises(rau.OptionError, match="scale is given for an output of float16"):
        ring.result("float16", 2.0)


@pytest.mark.parametrize("tokens", [CHOICES["slice"], CHOICES["mask"]], ids=["slice", "mask"])
def test_out_may_stand_on_the_first_state_the_other_way_round(any_backend, tokens):
    """Its maximum where the sums are to be, and its sums where the maxima are."""
    backend, mask = rau.registry.get(any_backend), chosen(tokens)
    first, other = states()[:2]
    merged = rau.merge_states([first, other], layout="TND")
    expected = [np.where(mask[:, None, None], new, old) for new, old in zip(merged, first)]
    prev, cur = of(backend, first), of(backend, other)
    out = (backend.asarray(np.zeros_like(first.attn_out)), prev.softmax_sum, prev.softmax_max)
    same(on_host(backend, rau.merge_states([prev, cur], layout="TND", tokens=tokens, out=out, backend=any_backend)), expected)


def test_what_does_not_go_together_is_refused():
    pairs = [(None, state.softmax_max[..., 0]) for state in states()[:2]]
    with pytest.raises(rau.OptionError, match="pairs have no outputs"):
        rau.merge_lse(pairs, "TND", base="e", lse_layout="TN", tokens=[1])
    with pytest.raises(rau.OptionError, match="indptr is given with actual_seq_qlen"):
        rau.merge_states(states()[0], [0, 99], "TND", indptr=[0, 2, 6])
    with pytest.raises(rau.ConstraintError, match=r"indptr = \[0, 2, 4\]: it ends at 4") as caught:
        rau.merge_states(states()[0], layout="TND", indptr=[0, 2, 4])
    assert "padding" not in str(caught.value)
    ring = rau.StreamingMerge("TND", like=states()[0], actual_seq_qlen=REAL, cu_seqlens_padded=SLOTS)
    with pytest.raises(rau.OptionError, match="in a ring of padded sequences"):
        ring.update(*(part[:2] for part in states()[1]), tokens=[2, 3])
    with pytest.raises(rau.OptionError, match="scale = 1000"):
        rau.merge_states(states(), layout="TND", dtype="float8_e5m2", scale=10**400)


class OfRuns(type(rau.registry.get("numpy"))):
    """Takes runs of tokens, and cannot leave statistics out; or refuses, once it is asked."""

    capabilities = replace(rau.registry.get("numpy").capabilities, without_statistics=False)
    refuses = False

    def merge(self, problem, states, out):
        if self.refuses:
            raise rau.UnsupportedError("not today")
        return super().merge(problem, states, out)


def test_a_backend_of_runs_that_cannot_leave_statistics_out():
    expected = rau.merge_states(states(), layout="TND", tokens=[1, 4]).attn_out
    alone = rau.merge_states(states(), layout="TND", tokens=[1, 4], statistics=False, backend=OfRuns())
    np.testing.assert_array_equal(alone, expected)


def test_a_backend_that_refuses_leaves_out_as_it_was():
    refusing, out = OfRuns(), tnd(T, 2, 8, lanes=1, seed=9)
    refusing.refuses = True
    with pytest.raises(rau.UnsupportedError, match="not today"):
        rau.merge_states(states(), layout="TND", tokens=[1, 4], out=out, backend=refusing)
    same(out, tnd(T, 2, 8, lanes=1, seed=9))


@pytest.mark.parametrize("into", [False, True])
def test_the_tokens_of_pairs_are_looked_for_once(into, monkeypatch):
    """A mask on a device is waited for each time."""
    seen = []
    bind_tokens = rows.bind_tokens
    monkeypatch.setattr(rows, "bind_tokens", lambda *given: seen.append(given[1]) or bind_tokens(*given))
    pair = np.ones((4, 2, 8), "f4"), np.zeros((4, 2), "f4")
    mask = np.array([True, False, True, True])
    out = [part.copy() for part in pair] if into else None
    rau.merge_lse([pair, pair], "TND", base="e", lse_layout="TN", tokens=mask, out=out)
    assert len(seen) == 1 and seen[0] is mask
