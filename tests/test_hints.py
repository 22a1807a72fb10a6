"""Refusals whose advice, followed to the letter, gives the right value."""

import functools
import inspect
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from states import tnd

import rau
from rau import AttentionState
from rau.compat.ring_flash_attention import flatten_varlen_lse
from rau.layouts import LAYOUTS, OTHER_LAYOUTS, OTHER_LSE_LAYOUTS

B, S, N, D = 2, 2, 2, 64  # alike, so that no shape gives a wrong layout away


def refusal(call):
    """The message of a call that is refused."""
    with pytest.raises(rau.RauError) as caught:
        call()
    return str(caught.value)


def parts(batch=B, seed=0):
    """Two states as (B, N, S, D) and (B, N, S, 8)."""
    rng = np.random.default_rng(seed)
    shape = (batch, N, S, 1)
    return [
        (
            rng.standard_normal((batch, N, S, D), "f4"),
            rng.standard_normal(shape, "f4").repeat(8, -1),
            rng.uniform(1, 9, shape).astype("f4").repeat(8, -1),
        )
        for _ in range(2)
    ]


# ----------------------------------------------------------------------------------------------------------- layouts

# Where the axes of (B, N, S, D) go in the layouts of other libraries, by their own documents; H is the hidden size here
# where D does not follow, and else their letter of the heads.
AXES = {
    **dict.fromkeys(("BSHD", "BTHD", "BLHD", "BTND", "BTNH", "BMHK", "bshd"), "bsnd"),
    **dict.fromkeys(("BHSD", "BHTD", "BHLD", "BNTD", "BNTH", "bhsd"), "bnsd"),
    **dict.fromkeys(("SBHD", "SBND", "sbhd"), "sbnd"),
    **dict.fromkeys(("BSH", "BTH", "bsh"), "bs(nd)"),
    **dict.fromkeys(("THD", "NHD", "thd"), "snd"),
    **dict.fromkeys(("HND", "NTD", "HTD"), "nsd"),
    "TH": "s(nd)", "sbh": "sb(nd)", "Bnsd": "bnsd",
}  # fmt: skip
MEANT = {"bsnd": "BSND", "bnsd": "BNSD", "sbnd": "SBH", "bs(nd)": "BSND", "snd": "TND", "s(nd)": "TND", "sb(nd)": "SBH"}


def arranged(attn_out, axes):
    """A (B, N, S, D) array with other axes; without b, of its first entry."""
    array, given = (attn_out, "bnsd") if "b" in axes else (attn_out[0], "nsd")
    array = array.transpose([given.index(letter) for letter in axes.replace("(nd)", "nd")])
    return array.reshape(*array.shape[:-2], -1) if "(" in axes else array


def test_every_name_is_tried():
    assert set(OTHER_LAYOUTS) <= set(AXES)
    assert not set(OTHER_LAYOUTS) & set(LAYOUTS)


@pytest.mark.parametrize("name", AXES)
def test_the_layout_of_another_library(name):
    """The hint names the layout with these axes, and says how to get there."""
    axes = AXES[name]
    batch = B if "b" in axes else 1
    given = parts(batch)
    expected = rau.merge_states(given, layout="BNSD").attn_out
    arrays = [arranged(state[0], axes) for state in given]
    states = [(array, *state[1:]) for array, state in zip(arrays, given, strict=True)]
    text = refusal(lambda: rau.merge_states(states, layout=name))
    assert refusal(lambda: rau.StreamingMerge(name)).partition("layout = ")[2] == text.partition("layout = ")[2]
    named = re.search(r'Did you mean "(\w+)"', text)
    assert (named and named[1]) == MEANT.get(axes)
    layout = named[1] if named else re.search(r'as "(\w+)"', text)[1]
    how = re.search(r"attn_out\.\w+\(.*?\)", text)
    followed = []
    for array, (_, *stats) in zip(arrays, given, strict=True):
        if layout == "TND":  # "with statistics (T, N, 8)"
            stats = [part[0].swapaxes(0, 1) for part in stats]
        names = {"attn_out": array, "B": batch, "S": S, "T": S, "N": N, "D": D}
        followed.append((eval(how[0], names) if how else array, *stats))
    merged = rau.merge_states(followed, layout=layout).attn_out
    ours = {"SBH": "sb(nd)", "TND": "snd", "BSND": "bsnd", "BNSD": "bnsd"}[layout]
    np.testing.assert_array_equal(merged, arranged(expected, ours))


LSE_AXES = {
    **dict.fromkeys(("BHS", "BHT", "BHL", "BNT", "bhs"), "bns"),
    **dict.fromkeys(("BSH", "BTH", "BLH", "BTN", "bsn"), "bsn"),
    **dict.fromkeys(("TH", "NH", "tn"), "sn"),
    **dict.fromkeys(("HT", "HN", "nt"), "ns"),
}


def test_every_name_of_a_log_sum_exp_is_tried():
    assert set(OTHER_LSE_LAYOUTS) <= set(LSE_AXES)


@pytest.mark.parametrize("name", LSE_AXES)
def test_the_log_sum_exp_of_another_library(name):
    axes = LSE_AXES[name]
    lse = np.arange(B * N * S, dtype="f4").reshape(B, N, S)
    attn_out, layout = np.zeros((B, N, S, D), "f4"), "BNSD"
    if "b" not in axes:
        lse, attn_out, layout = lse[0], np.zeros((S, N, D), "f4"), "TND"
    given = lse.swapaxes(-1, -2) if axes.endswith("sn") else lse
    how = {"base": "e", "layout": layout}
    text = refusal(lambda: AttentionState.from_lse(attn_out, given, **how, lse_layout=name))
    ours = re.search(r'Did you mean "(\w+)"', text)[1]
    state = AttentionState.from_lse(attn_out, given, **how, lse_layout=ours)
    np.testing.assert_array_equal(state.lse(**how, lse_layout="NT" if layout == "TND" else "BNS"), lse)


def test_a_padded_log_sum_exp_passed_as_the_message_says():
    """Of torch's and FlashAttention's varlen calls where they pad: (sequences, N, longest)."""
    rows = np.arange(8, dtype="f4").reshape(2, 4)  # (N, T)
    lse = np.full((2, 2, 3), np.nan, "f4")
    lse[0], lse[1, :, :1] = rows[:, :3], rows[:, 3:]
    out = np.zeros((4, 2, 4), "f4")
    with pytest.raises(rau.ShapeError) as caught:
        AttentionState.from_lse(out, lse, base="e", layout="TND", lse_layout="NT")
    advice = re.search(r'with lse_layout="(\w+)" and (\w+)\.', str(caught.value))
    state = AttentionState.from_lse(out, lse, base="e", layout="TND", lse_layout=advice[1], **{advice[2]: [0, 3, 4]})
    np.testing.assert_array_equal(state.softmax_max[..., 0], rows.T)


# ----------------------------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize("real", [[0, 16, 48], [0, 5], [0, *range(1, 12)], [0, 16, 16, 20]], ids=str)
def test_a_padded_buffer_is_a_sequence_more(real):
    """In layout TND with packed statistics; the real tokens come out as they would without the padding."""
    T, packed = 64, {"layout": "TND", "softmax_layout": "SBH"}
    rng = np.random.default_rng(1)
    token_major = [
        (rng.standard_normal((T, N, D), "f4"), *(rng.uniform(1, 9, (T, N, 1)).astype("f4") for _ in range(2)))
        for _ in range(2)
    ]
    states = []
    for out, *stats in token_major:  # as a kernel packs them: the real sequences, and then whatever stands in the buffer
        whole = [*real, T]
        states.append((out, *(rau.reorder_softmax(part, whole, to="SBH") for part in stats)))
    text = refusal(lambda: rau.merge_states(states, real, **packed))
    assert "lengths themselves" not in text
    advice = re.search(r"pass it as a sequence of its own: (.*)\.$", text)[1]
    followed = eval(advice, {"numpy": np, "actual_seq_qlen": real})
    merged = rau.merge_states(states, followed, **packed)
    expected = rau.merge_states([tuple(part[: real[-1]] for part in state) for state in token_major], layout="TND")
    np.testing.assert_array_equal(merged.attn_out[: real[-1]], expected.attn_out)
    for part, its in zip(merged[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(rau.reorder_softmax(part, [*real, T], to="TND")[: real[-1]], its)


def test_lengths_themselves():
    """What is not cumulative and adds up to T is told so, and the sums that the hint gives are the right ones."""
    stats = np.arange(64 * N, dtype="f4").reshape(64, N)
    text = refusal(lambda: rau.reorder_softmax(stats, [16, 32, 16], to="TND"))
    assert "padding" not in text
    np.testing.assert_array_equal(eval(re.search(r"here (.*)\.$", text)[1]), [0, 16, 48, 64])


def calls_with_lengths(state, pair):
    """Every call that takes cumulative lengths, by theirs; token-major statistics of 8 tokens where nothing else is said."""
    how = {"layout": "TND", "profile": "portable"}
    pairs, of_lse = [pair, pair], {"base": "e", "layout": "TND", "lse_layout": "TN"}
    return {
        "actual_seq_qlen": [
            lambda n: rau.ring_attention_update(*state, *state, n, "TND"),
            lambda n: rau.ring_attention_update(*state, *state, n, **how),
            lambda n: rau.merge_states([state] * 2, n, "TND", softmax_layout="SBH"),
            lambda n: rau.StreamingMerge("TND", actual_seq_qlen=n, softmax_layout="SBH"),
            lambda n: rau.add_sink(state, state[1][0, :, 0], "TND", softmax_layout="SBH", actual_seq_qlen=n),
            lambda n: AttentionState(*state).lse(**of_lse, softmax_layout="SBH", actual_seq_qlen=n),
            lambda n: rau.reorder_softmax(state[1], n, to="TND"),
            lambda n: rau.merge_states([state] * 2, n, "TND", cu_seqlens_padded=[0, 4, 8]),
            lambda n: rau.merge_lse(pairs, **of_lse, actual_seq_qlen=n, cu_seqlens_padded=[0, 4, 8]),
        ],
        "cu_seqlens_padded": [
            lambda n: rau.merge_states([state] * 2, [0, 1, 2], "TND", cu_seqlens_padded=n),
            lambda n: rau.StreamingMerge("TND", actual_seq_qlen=[0, 1, 2], cu_seqlens_padded=n),
        ],
        "indptr": [lambda n: rau.merge_states(state, layout="TND", indptr=n)],
        "cu_seqlens": [lambda n: flatten_varlen_lse(pair[1].reshape(2, 2, 4), n)],
        "actual_seq_qlen of the vendor's": [lambda n: rau.compat.npu_ring_attention_update(
            *state, *state, actual_seq_qlen=n, input_layout="TND")],
    }  # fmt: skip


def lengths_are_converted_as_said(state, pair, make, names):
    """Lengths of another integer type are refused with what to pass; that is taken."""
    for name, calls in calls_with_lengths(state, pair).items():
        for call in calls:
            given = make([0, 4, 8])
            text = refusal(lambda call=call, given=given: call(given))
            advice = re.search(r"Pass (.*?)\.( |$)", text)[1]
            call(eval(advice, {name.partition(" ")[0]: given, **names}))


@pytest.mark.parametrize("dtype", ["int16", "uint32", "uint8", ">i8"])
def test_lengths_of_another_integer_type(dtype):
    state = tnd()
    lengths_are_converted_as_said(state, (state[0], state[1][..., 0]), lambda n: np.array(n, dtype), {"numpy": np})


def test_lengths_of_int32_where_the_vendor_has_int64():
    """FlashAttention's, in other words."""
    state, lengths = tnd(), np.array([0, 3, 8], np.int32)
    text = refusal(lambda: rau.ring_attention_update(*state, *state, lengths, "TND"))
    assert text == (
        "ring_attention_update: [qlen-dtype] actual_seq_qlen has dtype int32; expected int64. Pass "
        'actual_seq_qlen.astype(numpy.int64). profile="portable" takes int32 too.'
    )
    rau.ring_attention_update(*state, *state, lengths, "TND", profile="portable")
    text = refusal(lambda: rau.compat.npu_ring_attention_update(
        *state, *state, actual_seq_qlen=lengths, input_layout="TND"))  # fmt: skip
    assert text.endswith("expected int64. Pass actual_seq_qlen.astype(numpy.int64).")  # it has no profile
    text = refusal(lambda: rau.reorder_softmax(state[1], lengths.astype("f4"), to="TND"))
    assert text.endswith("actual_seq_qlen has dtype float32; expected int64 or int32.")


# -------------------------------------------------------------------------------------------------------------- base


def test_a_forgotten_base():
    """Which there are, and whose: nobody should have to guess, since a wrong one gives wrong numbers and no error."""
    out, lse = np.ones((1, 1, 4), "f4"), np.zeros((1, 1, 1), "f4")
    state = AttentionState.from_lse(out, lse, base="e")
    calls = {
        "AttentionState.from_lse": (AttentionState.from_lse, out, lse),
        "AttentionState.from_max_sum": (AttentionState.from_max_sum, out, lse, lse),
        "AttentionState.lse": (state.lse,),
        "merge_lse": (rau.merge_lse, [(out, lse)]),
        "merge_attention": (rau.merge_attention, out, [(out, out)], print, print),
    }
    for name, (call, *arguments) in calls.items():
        with pytest.raises(rau.OptionError) as caught:
            call(*arguments)
        assert str(caught.value) == (
            f'{name}: [base] base is missing, and has no default; expected "e" or "2". Natural logarithms: FlashAttention, '
            "PyTorch, vLLM. Base 2: FlashInfer."
        )
        assert caught.value.rules == ("base",)
        base = inspect.signature(call).parameters["base"]  # as help() and editors show it
        assert (base.kind, base.default) == (base.KEYWORD_ONLY, base.empty)


def test_a_state_taken_for_a_pair():
    """Python's own words, which nobody can change, and where one finds what to write instead."""
    state = AttentionState.from_lse(np.ones((1, 1, 4), "f4"), np.zeros((1, 1, 1), "f4"), base="e")
    with pytest.raises(ValueError, match="unpack") as caught:
        out, lse = rau.merge_states([state])
    said = str(caught.value).partition(" (")[0]
    for page in (rau.merge_states.__doc__, *(Path(__file__).parents[1].joinpath("docs", f"{name}.md").read_text()
                                             for name in ("interop", "migration"))):  # fmt: skip
        text = " ".join(page.split())
        assert f"{said} (expected 2)" in text and "merge_lse" in text and "lse(base=...)" in text


# ------------------------------------------------------------------------------------------------------------ dtypes


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("base", ["e", "2"])
def test_a_log_sum_exp_of_16_bits_and_its_price(dtype, base):
    """Followed, the cast gives weights that are off by no more than the message says, and by not much less somewhere."""
    rng = np.random.default_rng(0)
    rows, K = 20_000, 3
    scores = rng.uniform(-1, 1, (K, rows)) + rng.uniform(-60, 60, rows)
    outs = np.eye(K, dtype="f4")[:, None, None].repeat(rows, 1)  # the merged output is the weights
    narrow = (scores / (np.log(2) if base == "2" else 1)).astype(dtype)[..., None]
    how = {"base": base, "layout": "TND", "lse_layout": "TN"}
    text = refusal(lambda: AttentionState.from_lse(outs[0], narrow[0], **how))
    cast, exponent = re.search(r"or pass (lse\..*?), at the price", text)[1], int(re.search(r"abs\(lse\) \* 2\*\*(-\d+)", text)[1])
    states = [AttentionState.from_lse(o, eval(cast, {"lse": lse, "numpy": np}), **how) for o, lse in zip(outs, narrow, strict=True)]
    weights = rau.merge_states(states, layout="TND").attn_out[:, 0].T
    true = np.exp(scores - scores.max(0))
    true /= true.sum(0)
    price = np.abs(scores / (np.log(2) if base == "2" else 1)).max(0) * 2.0**exponent
    share = (np.abs(weights - true) / price).max()
    assert 0.4 < share <= 1, share


@pytest.mark.parametrize("field", [1, 2])
@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float64"])
def test_statistics_of_another_dtype_and_their_price(dtype, field):
    rng = np.random.default_rng(1)
    rows, K = 5000, 3
    scores, sums = rng.uniform(-1, 1, (K, rows)) + rng.uniform(-60, 60, rows), rng.uniform(1, 2, (K, rows))
    wrong = (scores if field == 1 else sums).astype(dtype)
    if field == 1:
        sums = sums.astype("f4").astype("f8")
    else:
        scores = scores.astype("f4").astype("f8")
    outs = np.eye(K, dtype="f4")[:, None, None].repeat(rows, 1)
    stats = [[part[k][:, None, None].astype("f4") for part in (scores, sums)] for k in range(K)]
    for k in range(K):
        stats[k][field - 1] = wrong[k][:, None, None]
    text = refusal(lambda: rau.merge_states([(o, *s) for o, s in zip(outs, stats, strict=True)], layout="TND"))
    name = ("softmax_max", "softmax_sum")[field - 1]
    cast = re.search(rf"[Pp]ass ({name}\.astype\(.*?\))", text)[1]
    price = eval(re.search(r"off by up to (.*?)\.", text)[1], {name: np.maximum(np.abs(scores).max(0), 1e-300), "abs": np.abs})
    for each in stats:
        each[field - 1] = eval(cast, {name: each[field - 1], "numpy": np})
    weights = rau.merge_states([(o, *s) for o, s in zip(outs, stats, strict=True)], layout="TND").attn_out[:, 0].T
    true = np.exp(scores - scores.max(0)) * sums
    true /= true.sum(0)
    rounding = 3 * 2.0**-24  # of the merge itself
    assert (np.abs(weights - true) <= price + rounding).all()


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("base", ["e", "2"])
def test_a_kernel_that_reuses_its_buffers(base):
    """Only the last part is left in them; copied, as the message says, all of them are."""
    how = {"base": base, "layout": "TND", "lse_layout": "TN"}
    out, lse = np.empty((3, N, D), "f4"), np.empty((3, N), "f4")

    def kernel(part):
        rng = np.random.default_rng(part)
        out[...], lse[...] = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
        return out, lse

    states = [AttentionState.from_lse(*kernel(part), **how) for part in range(3)]
    rau.merge_states(states, layout="TND")  # whether it was meant, no shape tells
    assert refusal(lambda: rau.merge_states(states, layout="TND", check="values")) == (
        "merge_states: [value-memory] states[1..2].attn_out is in the same memory as states[0].attn_out, and some rows have "
        "seen keys in both states; expected separate memory for each. A kernel that writes into one buffer has overwritten "
        "the earlier state: copy that before the next call."
    )
    assert refusal(lambda: rau.ring_attention_update(*states[0], *states[1], layout="TND", profile="portable", check="values")) \
        .startswith("ring_attention_update: [value-memory] cur_attn_out is in the same memory as prev_attn_out, and")  # fmt: skip
    followed = [AttentionState.from_lse(*map(np.copy, kernel(part)), **how) for part in range(3)]
    merged = rau.merge_states(followed, layout="TND", check="values")
    ring = rau.StreamingMerge("TND", check="values")  # which is done with a state before the next one comes
    for part in range(3):
        ring.update(*AttentionState.from_lse(*kernel(part), **how))
    np.testing.assert_allclose(merged.attn_out, ring.result().attn_out, atol=1e-6)


@pytest.mark.parametrize("rows", [{}, {"tokens": slice(1, 3)}, {"tokens": [0, 2]}])
def test_a_buffer_that_is_used_again_after_a_part_without_keys(rows):
    """As under a causal mask, where the first part is empty: it may share its memory, and the others may not."""
    stats, buffer = np.ones((3, N, 8), "f4"), np.ones((3, N, D), "f4")
    empty, seen = (buffer, stats * -np.inf, stats * 0), (buffer, stats, stats)
    call = functools.partial(rau.merge_states, layout="TND", check="values", **rows)
    call([empty, seen, empty])
    assert "states[2].attn_out is in the same memory as states[1].attn_out" in refusal(lambda: call([empty, seen, seen]))


def test_a_layout_in_the_place_of_the_lengths():
    """Layouts that read no lengths would let it pass, and a call that is like an earlier one as well."""
    state = np.ones((3, 1, N * D), "f4"), np.ones((1, N, 3, 8), "f4"), np.ones((1, N, 3, 8), "f4")
    rau.merge_states([state, state])
    text = refusal(lambda: rau.merge_states([state, state], "BSND"))
    assert text == ("merge_states: [qlen-dtype] actual_seq_qlen is \"BSND\"; expected cumulative lengths or None. A layout is passed by "
                    "name, layout=\"BSND\", or after the lengths.")  # fmt: skip


def test_one_state_twice_is_the_same_mistake():
    state = [part[0].swapaxes(0, 1) for part in parts(1)[0]]
    text = refusal(lambda: rau.merge_states([state, state], layout="TND", check="values"))
    assert "[value-memory] states[1].attn_out is in the same memory as states[0].attn_out" in text


def test_what_may_lie_in_one_place():
    """Rows that one of the states has no keys in, and outputs without elements."""
    out, maximum, total = (part[0].swapaxes(0, 1) for part in parts(1)[0])
    first, second = total.copy(), total.copy()
    first[0], second[1:] = 0, 0  # a buffer whose rows several kernels have filled
    options = {"layout": "TND", "check": "values"}
    merged = rau.merge_states([(out, maximum, first), (out, maximum, second)], **options)
    np.testing.assert_array_equal(merged.attn_out, out)
    nothing = (out[..., :0], maximum, total)
    rau.merge_states([nothing, nothing], **options)
    half = np.concatenate([out, out])
    rau.merge_states([(half[:2], maximum, total), (half[2:], maximum, total)], **options)  # neighbours
    strided = np.repeat(out, 2, axis=-1)[..., ::2]  # which no kernel can stream: the validator copies it
    text = refusal(lambda: rau.merge_states([(strided, maximum, total)] * 2, **options))
    assert "[value-memory]" in text


# ------------------------------------------------------------------------------------------- arrays of other libraries


def imitation(module, name):
    """An array type of a library that is not here."""

    def init(self, values):
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    methods = {"__init__": init, "__array__": lambda self, dtype=None, copy=None: self.values}
    return type(name, (), {**methods, "__module__": module})


@pytest.mark.parametrize(
    ("module", "name", "convert"),
    [
        ("jaxlib._jax", "ArrayImpl", "numpy.asarray(...)"),
        ("mlx.core", "array", "numpy.asarray(...)"),
        ("cupy", "ndarray", "cupy.asnumpy(...)"),
    ],
)
def test_an_array_of_another_library(module, name, convert):
    its, state = imitation(module, name), parts(1)[0]
    state = (state[0][0], *(part[0] for part in state[1:]))  # in TND with T = N
    own = [its(part) for part in state]
    how = {"base": "e", "layout": "TND", "lse_layout": "TN"}
    calls = {
        "merge_states": lambda: rau.merge_states([own, own], layout="TND"),
        "ring_attention_update": lambda: rau.ring_attention_update(*own, *own),
        "StreamingMerge.update": lambda: rau.StreamingMerge("TND").update(*own),
        "AttentionState.from_lse": lambda: AttentionState.from_lse(own[0], its(state[1][..., 0]), **how),
        "AttentionState.lse": lambda: AttentionState(*own).lse(**how),
        "reorder_softmax": lambda: rau.reorder_softmax(own[1], its(np.array([0, 2])), to="TND"),
    }
    for call, refused in calls.items():
        text = refusal(refused)
        assert text.startswith(f"{call}: ")
        rules = text.count("[array] ") + text.count("[qlen-dtype] ")
        assert rules == {"AttentionState.from_lse": 2, "AttentionState.lse": 2, "reorder_softmax": 2}.get(call, rules) > 0
        assert text.count(f"is of type {module}.{name}; expected an") == rules
        assert text.count(f" Convert it with {convert}.") == rules
    assert "states[0..1].softmax_sum" in refusal(calls["merge_states"])
    if convert.startswith("numpy"):
        followed = [eval(convert.replace("...", "part"), {"numpy": np, "part": part}) for part in own]
        np.testing.assert_array_equal(
            rau.merge_states([followed] * 2, layout="TND").attn_out, rau.merge_states([state] * 2, layout="TND").attn_out
        )


# --------------------------------------------------------------------------------------- what is forgotten, or swapped


def test_a_forgotten_layout_is_recognised_by_the_shapes():
    """Each advice, followed to the letter, is a call that runs."""
    rng = np.random.default_rng(0)
    out, lse = rng.standard_normal((2, 6, 3, 8), "f4"), rng.standard_normal((2, 3, 6), "f4")
    shapes = {
        'layout="TND"': (out[0], lse[0].T),
        'layout="TND", lse_layout="TN"': (out[0], lse[0].T),
        'layout="TND", lse_layout="NT"': (out[0], lse[0]),
        'layout="BSND"': (out, lse),
        'layout="BNSD"': (out.swapaxes(1, 2), lse),
        'layout="BSND", lse_layout="BSN"': (out, lse.swapaxes(1, 2)),
    }
    for advice, pair in shapes.items():
        how = dict(re.findall(r'(\w+)="(\w+)"', advice))
        if advice != 'layout="TND"':
            assert re.search(rf"They fit (.* or )?{advice}( or |\.)", refusal(lambda: AttentionState.from_lse(*pair, base="e")))
            AttentionState.from_lse(*pair, base="e", **how)
            assert re.search(rf"They fit (.* or )?{advice}( or |\.)", refusal(lambda: rau.merge_lse([pair, pair], base="e")))
            rau.merge_lse([pair, pair], base="e", **how)
        if "lse_layout" not in how:
            state = AttentionState(pair[0], pair[1][..., None], pair[1][..., None])
            assert refusal(lambda: rau.merge_states([state, state])).endswith(f". They fit {advice}.")
            assert refusal(lambda: rau.StreamingMerge().update(*state)).endswith(f". They fit {advice}.")
            rau.merge_states([state, state], **how)
    assert "They fit" not in refusal(lambda: AttentionState.from_lse(out[0], lse[0][:2], base="e"))
    wide = AttentionState(out, *(lse[..., None].repeat(8, -1),) * 2)
    assert 'They fit layout="BSND" in profile="portable".' in refusal(lambda: rau.ring_attention_update(*wide, *wide))


def test_a_swapped_pair_is_recognised_in_every_layout():
    rng = np.random.default_rng(0)
    for layout, out, lse in (("SBH", (6, 1, 16), (1, 2, 6)), ("BSND", (1, 6, 2, 8), (1, 2, 6))):
        out, lse = rng.standard_normal(out, "f4"), rng.standard_normal(lse, "f4")
        assert refusal(lambda: AttentionState.from_lse(lse, out, base="e", layout=layout)).endswith(
            " The pair seems to be swapped."
        )
        rau.merge_lse([(out, lse)], layout, base="e")
        half = out.astype("f2")
        said = refusal(lambda: rau.merge_lse([(out, lse), (lse, half)], layout, base="e"))
        assert "the pair seems to be swapped, since pairs[1][1] has dtype float16." in said and "Compute it" not in said


def test_a_state_is_not_three_arrays():
    state = AttentionState(*parts(1)[0])
    text = refusal(lambda: rau.StreamingMerge("BNSD").update(state))
    assert "attn_out is of type rau.state.AttentionState of 3 items, and nothing else is given" in text and "Pass *state" in text
    assert "*AttentionState.from_lse(" in refusal(lambda: rau.StreamingMerge("BNSD").update((state[0], state[1])))
    said = refusal(lambda: rau.StreamingMerge("BNSD").update(state[0], state[1]))
    assert said == (
        "StreamingMerge.update: [states] two arrays are given; expected three. Of an output and its log-sum-exp pass "
        "*AttentionState.from_lse(out, lse, base=...)."
    )
    rau.StreamingMerge("BNSD").update(*state)
    with pytest.raises(rau.DTypeError, match="softmax_max is None"):
        rau.StreamingMerge("BNSD").update(state[0])
