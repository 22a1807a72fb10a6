"""What the validator lets through: limits at their last good value, check levels, strides, `out`, empty calls."""

import itertools

import numpy as np
import pytest
from states import NAMES, arguments, bits, sbh, state, tnd

import rau
from rau.constraints import Options, bind
from rau.constraints.profiles import unified_buffer_bytes
from rau.constraints.rules import RULES


def rules_of(call):
    """Ids of the rules that a call breaks; none where it runs."""
    try:
        call()
    except rau.ConstraintError as error:
        return error.rules
    return ()


def tnd_rules(N, D, dtype, profile):
    given = arguments(tnd, T=2, N=N, D=D, dtype=dtype)
    return rules_of(lambda: rau.ring_attention_update(**given, layout="TND", actual_seq_qlen=[0, 2], profile=profile))


# ------------------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    ("dtype", "D", "most"),
    [("float32", 128, 42), ("float32", 64, 78), ("float16", 128, 64), ("float16", 64, 112), ("bfloat16", 128, 64)],
)
def test_the_buffer_rule_at_its_boundary(dtype, D, most):
    assert tnd_rules(most, D, dtype, "mindspore") == ()
    assert tnd_rules(most + 1, D, dtype, "mindspore") == ("tnd-unified-buffer",)
    assert tnd_rules(most + 1, D, dtype, "cann-v2") == ()
    assert tnd_rules(most + 1, D, dtype, "portable") == ()


@pytest.mark.parametrize(("dtype", "N", "D", "itemsize"), [("float32", 60, 87, 4), ("float16", 50, 171, 2)])
def test_the_last_byte_of_the_buffer_may_be_used(dtype, N, D, itemsize):
    assert unified_buffer_bytes(N, D, itemsize) == 192 * 1024
    assert unified_buffer_bytes(N, D + 1, itemsize) > 192 * 1024
    assert tnd_rules(N, D, dtype, "mindspore") == ("tnd-head-dim-64",)
    assert tnd_rules(N, D + 1, dtype, "mindspore") == ("tnd-head-dim-64", "tnd-unified-buffer")


@pytest.mark.parametrize(
    ("N", "D", "expected"),
    [
        (256, 64, ()),
        (257, 64, ("tnd-heads-256",)),
        (1, 768, ()),
        (1, 769, ("tnd-head-dim-64", "tnd-head-dim-768")),
        (1, 832, ("tnd-head-dim-768",)),
        (257, 833, ("tnd-head-dim-64", "tnd-heads-256", "tnd-head-dim-768")),
    ],
)
def test_the_limits_of_cann_v2(N, D, expected):
    assert tnd_rules(N, D, "float32", "cann-v2") == expected
    assert tnd_rules(N, D, "float32", "portable") == ()


@pytest.mark.parametrize("profile", ["mindspore", "cann-v2", "portable"])
@pytest.mark.parametrize("D", [1, 22, 128, 12816])
def test_sbh_limits_no_head_dimension(D, profile):
    assert rules_of(lambda: rau.ring_attention_update(**arguments(sbh, S=1, D=D), profile=profile)) == ()


@pytest.mark.parametrize("profile", ["mindspore", "cann-v2", "portable"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_of_the_profiles(dtype, profile):
    expected = "portable" in profile or dtype != "float64"
    broken = rules_of(lambda: rau.ring_attention_update(**arguments(dtype=dtype), profile=profile))
    assert (broken == ()) == expected


@pytest.mark.parametrize(
    ("given", "layout", "rule"),
    [
        (arguments(lanes=1), "SBH", "lanes"),
        (arguments() | {"cur_attn_out": sbh(dtype="bfloat16")[0]}, "SBH", "dtype-match"),
        (arguments() | {"cur_attn_out": sbh(dtype="float16")[0]}, "SBH", "dtype-match"),
        (dict(zip(NAMES, 2 * state((2, 4, 3, 5), (2, 3, 4, 8)), strict=True)), "BSND", "layout-profile"),
        (dict(zip(NAMES, 2 * state((2, 3, 4, 5), (2, 3, 4, 8)), strict=True)), "BNSD", "layout-profile"),
    ],
    ids=["1 lane", "bfloat16 into float32", "float16 into float32", "BSND", "BNSD"],
)
def test_what_portable_takes_beyond_the_vendors(given, layout, rule):
    result = rau.ring_attention_update(**given, layout=layout, profile="portable")
    assert [part.shape for part in result] == [given[name].shape for name in NAMES[:3]]
    for profile in ("mindspore", "cann-v2"):
        with pytest.raises(rau.ConstraintError) as caught:
            rau.ring_attention_update(**given, layout=layout, profile=profile)
        assert caught.value.rules == (rule,)
        assert 'profile="portable"' in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    "qlen",
    [[0, 8], (0, 3, 8), [0, 0, 3, 3, 8, 8], np.array([0, 8]), [np.int32(0), np.int64(8)], list(range(9))],
    ids=str,
)
def test_lengths_that_are_taken(qlen):
    given = arguments(tnd)
    assert rules_of(lambda: rau.ring_attention_update(**given, layout="TND", actual_seq_qlen=qlen)) == ()
    packed = rules_of(
        lambda: rau.ring_attention_update(**given, layout="TND", actual_seq_qlen=qlen, softmax_layout="SBH")
    )
    assert packed == ()


def test_lengths_do_not_change_token_major_results():
    given = arguments(tnd) | {"layout": "TND", "profile": "portable"}
    results = [
        bits(rau.ring_attention_update(**given, actual_seq_qlen=qlen))
        for qlen in ([0, 8], [0, 1, 1, 5, 8], np.array([0, 2, 8], "int32"), None)
    ]
    assert results == results[:1] * 4


def test_lengths_and_their_order_mean_nothing_outside_tnd():
    given = arguments()
    expected = bits(rau.ring_attention_update(**given))
    given["prev_softmax_max"] = given["prev_softmax_max"][:, ::-1].copy()[:, ::-1]  # packed, it would be refused
    options = {"actual_seq_qlen": "nonsense", "softmax_layout": "SBH"}
    assert bits(rau.ring_attention_update(**given, **options)) == expected


@pytest.mark.parametrize("dtype", ["float64", "int16", "uint32", "bool"])
def test_portable_lengths_are_integers_of_two_sizes(dtype):
    given = arguments(tnd) | {"layout": "TND", "profile": "portable"}
    broken = rules_of(lambda: rau.ring_attention_update(**given, actual_seq_qlen=np.array([0, 8], dtype)))
    assert broken == ("qlen-dtype",)


# ------------------------------------------------------------------------------------------------------ check levels

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "index", "value", "check", "rule", "says"),
    [
        ("prev_softmax_max", (1, 2, 3, 5), 9.0, "values", "value-lanes",
         "prev_softmax_max[1, 2, 3, 5] = 9.0; expected that of lane 0: the lanes of one token and head are equal."),
        ("cur_softmax_sum", (0, 1, 0, 7), 0.5, "values", "value-lanes", None),
        ("prev_softmax_max", (0, 1, 2, ...), NAN, "values", "value-max",
         "prev_softmax_max[0, 1, 2, 0] = nan; expected a finite number, or -inf for a row without keys. "
         "(8 such elements)"),
        ("cur_softmax_max", (1, 0, 3, ...), INF, "values", "value-max", None),
        ("cur_softmax_sum", (1, 0, 3, ...), -0.5, "values", "value-sum",
         "cur_softmax_sum[1, 0, 3, 0] = -0.5; expected a number that is not negative. (8 such elements)"),
        ("prev_softmax_sum", (0, 0, 0, ...), NAN, "values", "value-sum", None),
        ("prev_softmax_max", (0, 0, 1, ...), -1.0, "document", "document-max-positive",
         "prev_softmax_max[0, 0, 1, 0] = -1.0; expected a positive number, as the reference page says (real maxima are "
         'often negative: check="values"). (8 such elements)'),
        ("prev_softmax_max", (0, 0, 1, ...), 0.0, "document", "document-max-positive", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("strided", [False, True])
def test_values(name, index, value, check, rule, says, strided):
    given = arguments()
    for other in NAMES:
        if other.endswith("max"):
            given[other] = np.abs(given[other])
        if strided and "softmax" in other:
            given[other] = np.repeat(given[other], 2, axis=-1)[..., ::2]
    for level in ("metadata", "values", "document"):
        assert rules_of(lambda: rau.ring_attention_update(**given, check=level)) == ()
    given[name][index] = value
    with pytest.raises(rau.ConstraintError) as caught:
        rau.ring_attention_update(**given, check=check)
    assert (type(caught.value), caught.value.rules) == (RULES[rule].error, (rule,) * len(caught.value.rules))
    if says:
        assert str(caught.value) == f"ring_attention_update: [{rule}] {says}"
    assert rules_of(lambda: rau.ring_attention_update(**given)) == ()
    if check == "document":
        assert rules_of(lambda: rau.ring_attention_update(**given, check="values")) == ()


def test_values_that_are_right():
    """Empty rows, minus zero, an infinite sum, one lane."""
    given = arguments(lanes=1)
    given["prev_softmax_max"][0, 0], given["prev_softmax_sum"][0, 1] = -INF, 0.0
    given["cur_softmax_sum"][1, 0], given["cur_softmax_sum"][1, 1] = -0.0, INF
    assert rules_of(lambda: rau.ring_attention_update(**given, check="values", profile="portable")) == ()


def test_the_first_of_several_values_is_named():
    given = arguments()
    given["prev_softmax_max"][0, 0, 0, 6:] += 1
    with pytest.raises(rau.ConstraintError, match=r"prev_softmax_max\[0, 0, 0, 6\] = .*\(2 such elements\)$"):
        rau.ring_attention_update(**given, check="values")
    given = arguments()
    given["cur_softmax_sum"][1, 2, 3] = given["cur_softmax_sum"][1, 0, 1] = -2
    with pytest.raises(rau.ConstraintError, match=r"cur_softmax_sum\[1, 0, 1, 0\] = -2\.0.*\(16 such elements\)$"):
        rau.ring_attention_update(**given, check="values")
    given["prev_softmax_max"][...] = NAN
    with pytest.raises(rau.ConstraintError) as caught:
        rau.ring_attention_update(**given, check="values")
    assert caught.value.rules == ("value-max", "value-sum")


# ------------------------------------------------------------------------------------------------------- empty calls

EMPTY = [
    *[("SBH", {"S": 3, "B": 2, "N": 2, "D": 8, **zero}) for zero in ({"S": 0}, {"B": 0}, {"N": 0}, {"D": 0})],
    ("SBH", {"S": 0, "B": 0, "N": 0, "D": 0}),
    *[("TND", {"T": 8, "N": 2, "D": 64, **zero}) for zero in ({"T": 0}, {"N": 0}, {"D": 0})],
]


@pytest.mark.parametrize(("layout", "sizes"), EMPTY, ids=str)
@pytest.mark.parametrize("order", ["TND", "SBH"])
def test_a_dimension_of_length_0(layout, sizes, order, backend):
    make, qlen = (sbh, None) if layout == "SBH" else (tnd, [0, 0] if sizes["T"] == 0 else [0, 0, 5, 8])
    options = {"actual_seq_qlen": qlen, "layout": layout, "softmax_layout": order, "backend": backend}
    given = arguments(make, **sizes)
    out = rau.AttentionState(*(np.empty_like(given[name]) for name in NAMES[:3]))
    prev = tuple(given[name].copy() for name in NAMES[:3])
    problem = rau.explain(**given, **options).problem
    assert (problem.N, problem.D) == (sizes["N"], sizes["D"] if sizes["N"] else given["prev_attn_out"].shape[-1])
    for result in (
        rau.ring_attention_update(**given, **options, check="values"),
        rau.ring_attention_update(**given, **options, out=out),
        rau.merge_states([prev, make(**sizes), make(**sizes)], **options),
        rau.ring_attention_update(*prev, *prev, **options, out=prev),
    ):
        assert [(part.shape, part.dtype) for part in result] == [(part.shape, part.dtype) for part in prev]


@pytest.mark.parametrize(("make", "options"), [(sbh, {}), (tnd, {"layout": "TND", "actual_seq_qlen": [0, 5, 8]})])
def test_statistics_are_merged_even_without_outputs(make, options, backend):
    given = arguments(make)
    expected = rau.ring_attention_update(**given, **options, backend=backend)
    given |= {name: given[name][..., :0] for name in (NAMES[0], NAMES[3])}
    result = rau.ring_attention_update(**given, **options, backend=backend)
    assert result.attn_out.shape == given["prev_attn_out"].shape
    assert bits(result[1:]) == bits(expected[1:])


def test_no_tokens_and_no_sequences(backend):
    given = arguments(tnd, T=0)
    for qlen in ([0], [0, 0, 0], np.zeros(1, "int64")):
        result = rau.ring_attention_update(**given, layout="TND", actual_seq_qlen=qlen, backend=backend)
        assert [part.shape for part in result] == [(0, 2, 64), (0, 2, 8), (0, 2, 8)]


@pytest.mark.parametrize(("layout", "axis"), list(itertools.product(["BSND", "BNSD"], range(4))))
def test_a_dimension_of_length_0_in_four_axes(layout, axis, backend):
    sizes = [2, 3, 4, 5]
    sizes[axis] = 0
    b, s, n, d = sizes
    one = state((b, s, n, d) if layout == "BSND" else (b, n, s, d), (b, n, s, 8))
    result = rau.ring_attention_update(*one, *one, layout=layout, profile="portable", backend=backend)
    assert [part.shape for part in result] == [part.shape for part in one]


@pytest.mark.parametrize("make", [sbh, tnd])
def test_one_token(make, backend):
    given = arguments(make, **({"S": 1} if make is sbh else {"T": 1}))
    options = {"layout": "TND", "actual_seq_qlen": [0, 0, 1]} if make is tnd else {}
    result = rau.ring_attention_update(**given, **options, backend=backend)
    highest = np.maximum(given["prev_softmax_max"], given["cur_softmax_max"])
    np.testing.assert_array_equal(result.softmax_max, highest)


# --------------------------------------------------------------------------------------------------------- no copies


def test_inputs_are_copied_only_where_no_kernel_can_stream_them():
    given = list(arguments().values())
    given[0] = np.repeat(given[0], 2, axis=-1)[..., ::2]
    given[1] = given[1][:, ::-1]  # statistics: any strides will do
    given[2] = np.repeat(given[2], 2, axis=-1)[..., ::2]
    given[3] = given[3][::-1]
    misaligned = np.zeros(given[4].nbytes + 1, "u1")[1:].view("f4").reshape(given[4].shape)
    misaligned[...] = given[4]
    given[4] = misaligned
    problem, (prev, cur) = bind(
        "", (given[:3], given[3:]), lambda k, f: "", None, Options("SBH", "TND", "mindspore", "metadata"), None
    )
    kept = [mine is its for mine, its in zip([*prev, *cur], given, strict=True)]
    assert kept == [False, True, True, True, False, True]
    assert bits([*prev, *cur]) == bits(given)
    assert not problem.in_place


def test_an_axis_of_length_1_has_no_stride():
    """H = 1: its rows are contiguous, whatever the last stride says."""
    given = arguments(N=1, D=1)
    expected = rau.ring_attention_update(**given)

    def apart(array):
        return np.repeat(array, 4, axis=-1)[..., ::3][..., :1]

    for name in (NAMES[0], NAMES[3]):
        given[name] = apart(given[name])
        assert given[name].strides[-1] == 12
    out = [apart(expected[0]), *(np.zeros_like(part) for part in expected[1:])]
    assert bits(rau.ring_attention_update(**given, out=out)) == bits(expected)
    arrays = list(given.values())
    _, (prev, _) = bind(
        "", (arrays[:3], arrays[3:]), lambda k, f: "", None, Options("SBH", "TND", "mindspore", "metadata"), None
    )
    assert prev[0] is arrays[0]
