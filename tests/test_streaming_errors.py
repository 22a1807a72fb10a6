"""What StreamingMerge refuses, its words, and that nothing is written before."""

import sys

import numpy as np
import pytest
from running import laid_out, partial, same

import rau


def sbh(S=6, dtype="float32", seed=0, **options):
    return laid_out(partial(2, S, 2, 4, dtype, seed, **options), "SBH")


def tnd(S=6, packed=False, dtype="float32"):
    return laid_out(partial(2, S, 2, 64, dtype), "TND", packed)


def ring_of(state, layout="SBH", **options):
    ring = rau.StreamingMerge(layout, **options)
    ring.update(*state)
    return ring


OPTIONS = [
    ({"layout": "BSH"}, rau.LayoutError, "layout", "layout = 'BSH'; expected one of"),
    ({"softmax_layout": "DNT"}, rau.LayoutError, "softmax-layout", "softmax_layout = 'DNT'"),
    ({"profile": "hopper"}, rau.OptionError, "profile", "profile = 'hopper'"),
    ({"check": "all"}, rau.OptionError, "check", "check = 'all'"),
    ({"layout": "BSND", "profile": "mindspore"}, rau.LayoutError, "layout-profile", 'profile "mindspore" knows'),
    ({"layout": "TND", "softmax_layout": "SBH"}, rau.ConstraintError, "packed-qlen-required", "actual_seq_qlen is None"),
    ({"layout": "TND", "profile": "mindspore"}, rau.ConstraintError, "tnd-qlen-required", "actual_seq_qlen is None"),
    ({"layout": "TND", "actual_seq_qlen": [0, 5, 3]}, rau.ConstraintError, "tnd-qlen-cumulative", "it decreases from 5"),
    ({"layout": "TND", "actual_seq_qlen": [0.0, 5.0]}, rau.DTypeError, "qlen-dtype", "holds 0.0"),
    ({"like": np.zeros(3)}, rau.ShapeError, "states", "like is of type numpy.ndarray; expected an AttentionState"),
    ({"like": sbh()[:2]}, rau.ShapeError, "states", "like is of type tuple; expected an AttentionState"),
    ({"like": (None, *sbh()[1:])}, rau.DTypeError, "array", "like.attn_out is None"),
    ({"like": (sbh(awkward=False)[0].astype("i4"), *sbh()[1:])}, rau.DTypeError, "dtype-attn", "like.attn_out has dtype int32"),
]


@pytest.mark.parametrize(("options", "error", "rule", "says"), OPTIONS)
def test_an_option_is_refused_at_once(options, error, rule, says):
    with pytest.raises(error) as caught:
        rau.StreamingMerge(**options)
    assert caught.value.rules == (rule,)
    assert str(caught.value).startswith(f"StreamingMerge: [{rule}] ")
    assert says in str(caught.value)


WRONG = {
    "another shape": (
        sbh(5), {}, rau.ShapeError, "attn_out has shape (5, 2, 8); expected that of the running attn_out, (6, 2, 8).",
    ),
    "other heads": (
        laid_out(partial(2, 6, 4, 2), "SBH"), {}, rau.ShapeError,
        "softmax_max has shape (2, 4, 6, 8); for the running attn_out",
    ),
    "other lanes": (
        sbh(lanes=2), {}, rau.ShapeError, "softmax_max has shape (2, 2, 6, 2); for the running attn_out of shape (6, 2, 8)",
    ),
    "float64 into float32": (
        sbh(dtype="float64"), {}, rau.DTypeError,
        "attn_out has dtype float64 and the running attn_out float32; expected the same",
    ),
    "a part of another length": (
        sbh(4), {"tokens": "back"}, rau.ShapeError,
        "attn_out has shape (4, 2, 8); expected that of the running attn_out at `tokens`, (3, 2, 8).",
    ),
    "a slice of another length": (
        sbh(4), {"tokens": slice(0, 3)}, rau.ShapeError,
        "attn_out has shape (4, 2, 8); expected that of the running attn_out at",
    ),
    "an unknown half": (
        sbh(3), {"tokens": "middle"}, rau.OptionError,
        "tokens is 'middle'; expected a slice, \"front\" or \"back\", the halves of every sequence.",
    ),
    "a list of tokens": (sbh(2), {"tokens": [0, 1]}, rau.OptionError, "tokens is of type list; expected a slice,"),
    "an array of tokens": (
        sbh(2), {"tokens": np.arange(2)}, rau.OptionError, "tokens is of type numpy.ndarray; expected a slice,",
    ),
    "an index": (sbh(1), {"tokens": 3}, rau.OptionError, "tokens is of type int; expected a slice,"),
    "a slice of no ints": (sbh(3), {"tokens": slice(0.5, 3)}, rau.OptionError, "tokens = slice(0.5, 3, None): slice indices"),
    "a slice of arrays": (
        sbh(3), {"tokens": slice(np.arange(2), None)}, rau.OptionError, "expected a slice of ints.",
    ),
    "a step of 0": (sbh(3), {"tokens": slice(0, 3, 0)}, rau.OptionError, "tokens = slice(0, 3, 0): slice step cannot be zero"),
    "backwards": (
        sbh(6), {"tokens": slice(None, None, -1)}, rau.OptionError,
        "tokens = slice(None, None, -1) walks backwards; expected a positive step.",
    ),
    "no array": ((None, *sbh()[1:]), {}, rau.DTypeError, "attn_out is None; expected an array"),
    "a sum of another shape": (
        (*sbh()[:2], sbh(5)[2]), {}, rau.ShapeError, "softmax_sum has shape (2, 2, 5, 8); for the running",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=lambda name: name.replace(" ", "-"))
def test_a_wrong_update_is_refused_and_writes_nothing(backend, case):
    state, options, error, says = WRONG[case]
    ring = ring_of(sbh(), backend=backend)
    before = ring.result()
    with pytest.raises(error) as caught:
        ring.update(*state, **options)
    assert says in str(caught.value)
    assert str(caught.value).startswith("StreamingMerge.update: ")
    same(ring.result(), before)
    ring.update(*sbh(seed=1))  # and it goes on


def test_odd_sequences_have_no_halves():
    with pytest.raises(rau.ShapeError) as caught:
        ring_of(sbh(7)).update(*sbh(3), tokens="front")
    assert str(caught.value) == (
        'StreamingMerge.update: [tokens-odd] tokens = "front", and every sequence has 7 tokens; expected even lengths. Pad '
        "the sequences, or choose the tokens by a slice (not where statistics are packed)."
    )
    ring = ring_of(tnd(), "TND", actual_seq_qlen=[0, 4, 7, 12])
    with pytest.raises(rau.ShapeError) as caught:
        ring.update(*tnd(3), tokens="back")
    assert 'tokens = "back", and sequence 1 (tokens 4 to 7) has 3 tokens, and 1 more are odd' in str(caught.value)
    assert caught.value.rules == ("tokens-odd",)


@pytest.mark.parametrize("tokens", [slice(0, 6), [1, 2]], ids=str)
def test_packed_statistics_have_halves_alone(tokens):
    ring = ring_of(tnd(), "TND", softmax_layout="SBH", actual_seq_qlen=[0, 12])
    with pytest.raises(rau.OptionError, match='packed statistics expect "front" or "back".*reorder_softmax'):
        ring.update(*tnd(3), tokens=tokens)


def test_tokens_are_refused_that_nobody_has():
    with pytest.raises(rau.OptionError, match=r"tokens is of type int; expected a slice, a mask of 12 bools, or the numbers"):
        ring_of(tnd(), "TND", actual_seq_qlen=[0, 12]).update(*tnd(3), tokens=3)
    with pytest.raises(rau.OptionError, match=r"tokens is of type list; expected a slice, \"front\""):
        ring_of(sbh(), "SBH").update(*sbh(3), tokens=[1, 2, 3])


@pytest.mark.parametrize("tokens", ["front", slice(0, 3), slice(0, 6)], ids=str)
def test_the_first_update_covers_all_tokens(tokens):
    ring = rau.StreamingMerge()
    with pytest.raises(rau.ShapeError) as caught:
        ring.update(*sbh(), tokens=tokens)
    assert caught.value.rules == ("first-update",)
    assert "like=" in str(caught.value)
    assert ring.running is None
    ring.update(*sbh(), tokens=slice(None))  # all of them
    same(ring.result(), ring_of(sbh()).result())


def test_there_is_no_result_before_an_update():
    with pytest.raises(rau.ShapeError) as caught:
        rau.StreamingMerge().result()
    assert caught.value.rules == ("first-update",)
    assert str(caught.value).startswith("StreamingMerge.result: [first-update] there is no state yet; expected an update")


@pytest.mark.parametrize(
    "dtype", ["float64", "int32", np.int8, "no-dtype", object(), 3], ids=lambda dtype: str(dtype).partition(" at ")[0]
)
def test_the_result_has_a_dtype_of_attention(dtype):
    with pytest.raises(rau.DTypeError) as caught:
        ring_of(sbh()).result(dtype)
    assert caught.value.rules == ("dtype-attn",)
    assert "for outputs of float32; expected one of float32, float16, bfloat16, float8_e4m3fn, float8_e5m2." in str(caught.value)


def test_bfloat16_of_numpy_arrays_takes_ml_dtypes(monkeypatch):
    ring = ring_of(sbh())
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(rau.DTypeError, match="pip install ml_dtypes"):
        ring.result("bfloat16")
    assert ring.result("float16").attn_out.dtype == "f2"


def test_a_float64_state_stays_one():
    ring = ring_of(sbh(dtype="float64"))
    assert ring.result("float64").attn_out.dtype == "f8"
    with pytest.raises(rau.DTypeError, match="for outputs of float64; expected one of float64"):
        ring.result("float32")
    with pytest.raises(rau.DTypeError, match="attn_out has dtype float32 and the running attn_out float64"):
        ring.update(*sbh())


@pytest.mark.parametrize("field", range(3))
def test_a_view_of_the_running_state_is_no_partial_state(backend, field):
    ring = ring_of(sbh(), backend=backend)
    before = ring.result()
    for tokens, cur in ((None, sbh()), ("back", sbh(3))):
        taken = list(cur)
        taken[field] = ring.running[field] if tokens is None else (
            ring.running[0][:3] if field == 0 else ring.running[field][:, :, 1:4]
        )  # fmt: skip
        with pytest.raises(rau.ShapeError) as caught:
            ring.update(*taken, tokens=tokens)
        assert caught.value.rules == ("out-overlap",)
        assert f"{rau.AttentionState._fields[field]} shares memory with the running state" in str(caught.value)
    same(ring.result(), before)
    ring.update(*ring.result())


def test_a_failed_first_update_leaves_nothing_behind():
    ring = rau.StreamingMerge()
    with pytest.raises(rau.ShapeError):
        ring.update(*sbh()[:2], sbh(5)[2])
    assert ring.running is None
    ring.update(*sbh(3))


def test_lengths_that_do_not_end_at_all_tokens():
    with pytest.raises(rau.ConstraintError, match="it ends at 10"):
        ring_of(tnd(), "TND", actual_seq_qlen=[0, 10])


@pytest.mark.parametrize("at", [0, 1, 2])
def test_the_profile_holds_each_partial_state_to_its_limits(at):
    good = laid_out(partial(2, 6, 2, 64, "bfloat16"), "TND")
    bad = laid_out(partial(2, 6, 2, 32, "bfloat16"), "TND")
    ring = rau.StreamingMerge("TND", actual_seq_qlen=[0, 6, 12], profile="mindspore")
    for _ in range(at):
        ring.update(*good)
    with pytest.raises(rau.ConstraintError) as caught:
        ring.update(*bad)
    assert ("tnd-head-dim-64" if at == 0 else "shape-match") in caught.value.rules


def test_values_are_checked_on_request_and_of_the_partial_state_alone():
    nan = sbh(awkward=False)
    nan.softmax_max[0, 0, 0] = np.nan
    ring = ring_of(nan)
    with pytest.raises(rau.ConstraintError) as caught:
        rau.StreamingMerge(check="values").update(*nan)
    assert caught.value.rules == ("value-max",)
    ring = rau.StreamingMerge(check="values")
    infinite = sbh(awkward=False)
    infinite.softmax_sum[:] = np.float32(3e38)
    for _ in range(3):
        ring.update(*infinite)
    assert np.isinf(ring.result().softmax_sum).any()  # which is no business of the check
    before = ring.result()
    half = sbh(3, awkward=False)
    half.softmax_sum[0, 1, 2] = -1
    with pytest.raises(rau.ConstraintError) as caught:
        ring.update(*half, tokens="back")
    assert caught.value.rules == ("value-sum",)
    assert "softmax_sum" in str(caught.value)
    same(ring.result(), before)
