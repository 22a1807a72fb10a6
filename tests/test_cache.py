"""A call that is recognised is described as the validator would have described it, and a wrong one is never recognised."""

import ml_dtypes
import numpy as np
import pytest
from states import arguments, sbh, state

import rau
from rau.call import NAMES
from rau.constraints import Options, bind, cache
from rau.problem import Problem
from rau.testing.cases import generated

pytest.importorskip("rau._core", reason="without it every call takes the validator")
UPDATE = "ring_attention_update"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(cache, "_problems", {})


def signature(states, out=None, layout="SBH", profile="mindspore", check="metadata", lengths=None):
    return cache.signature(UPDATE, states, lengths, Options(layout, "TND", profile, check), out)


def described(problem):
    seen = {name: getattr(problem, name) for name in (*Problem.__annotations__, "S")}
    return seen | {"strides": problem.strides, "blocks": problem.blocks.tolist()}


def test_equal_signatures_are_equal_problems():
    """Generated calls of every kind, each twice in other memory."""
    problems, recognised = {}, 0
    for case in (case for seed in range(12) for case in generated(seed, 125)):
        for _ in range(2):
            call = case.make()
            out = None if call.out is None else tuple(placed.view for placed in call.out)
            options = Options(case.layout, case.softmax_layout, case.profile, "metadata")
            found = cache.signature("a", call.states, case.lengths_argument(), options, out)
            if found is not None:
                problem, regular = bind("a", call.states, NAMES["merge_states"], None, options, out)
                assert all(mine is its for state, same in zip(regular, call.states, strict=True)
                           for mine, its in zip(state, same, strict=True))  # fmt: skip
                recognised += found in problems
                assert problems.setdefault(found, described(problem)) == described(problem)
    assert recognised >= 100


def test_a_second_call_takes_no_validator(monkeypatch):
    prev, cur = sbh(seed=1), sbh(seed=2)
    first = rau.ring_attention_update(*prev, *cur)
    monkeypatch.setattr("rau.constraints.bind", None)
    again = rau.ring_attention_update(*sbh(seed=1), *sbh(seed=2))
    assert all(map(np.array_equal, first, again))
    assert len(cache._problems) == 1


def outputs(make=np.empty_like):
    return rau.AttentionState(*map(make, sbh()))


UNLIKE = {
    "a dtype of the same size": ({"cur_attn_out": lambda a: a.view(np.int32)}, "dtype-match"),
    "bytes the other way round": ({"cur_softmax_sum": lambda a: a.astype(">f4")}, "dtype-stats"),
    "two bytes that are no bfloat16": ({"prev_attn_out": lambda a: a.astype(np.float16).view("V2")}, "dtype-attn"),
    "another shape of the same length": ({"cur_attn_out": lambda a: a.reshape(4, 1, 48)}, "shape-match"),
    "a mask": ({"cur_attn_out": np.ma.masked_array}, "array"),
    "a list": ({"cur_attn_out": np.ndarray.tolist}, "array"),
    "None": ({"prev_softmax_max": lambda a: None}, "array"),
}


@pytest.mark.parametrize(("changes", "rule"), UNLIKE.values(), ids=UNLIKE)
def test_what_is_alike_but_for_one_thing(changes, rule):
    given = arguments(sbh)
    rau.ring_attention_update(**given)
    rau.ring_attention_update(**given, out=outputs())
    given |= {name: change(given[name]) for name, change in changes.items()}
    for out in (None, outputs()):
        with pytest.raises(rau.ConstraintError) as error:
            rau.ring_attention_update(**given, out=out)
        assert rule in error.value.rules


def frozen(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def test_outputs_that_are_alike_but_for_one_thing():
    prev, cur, good = sbh(seed=1), sbh(seed=2), outputs()
    rau.ring_attention_update(*prev, *cur, out=good)
    large = np.empty(prev.attn_out.size + 1, np.float32)
    shifted = large[:-1].reshape(prev.attn_out.shape)
    wrong = {
        "out-writable": good._replace(softmax_sum=frozen(good.softmax_sum)),
        "out-overlap": good._replace(softmax_sum=good.softmax_max),
        "out-dtype": good._replace(attn_out=good.attn_out.view(np.int32)),
        "out": (*good, good.attn_out),
    }
    for rule, out in wrong.items():
        with pytest.raises(rau.ConstraintError) as error:
            rau.ring_attention_update(*prev, *cur, out=out)
        assert error.value.rules == (rule,)
    rau.ring_attention_update(shifted, *prev[1:], *cur, out=good._replace(attn_out=shifted))  # in place
    with pytest.raises(rau.ConstraintError, match="out-overlap"):
        rau.ring_attention_update(
            shifted, *prev[1:], *cur, out=good._replace(attn_out=large[1:].reshape(shifted.shape))
        )


@pytest.mark.parametrize("field", rau.AttentionState._fields)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("state", range(2))
def test_an_output_that_meets_an_input_by_one_element(state, after, field):
    states, good = [sbh(seed=1), sbh(seed=2)], outputs()
    rau.ring_attention_update(*states[0], *states[1], out=good)
    array = getattr(states[state], field)
    memory = np.zeros(2 * array.size - 1, np.float32)
    parts = [part.reshape(array.shape) for part in (memory[: array.size], memory[array.size - 1 :])]
    mine, other = parts if after else parts[::-1]
    mine[...] = array
    states[state] = states[state]._replace(**{field: mine})
    with pytest.raises(rau.ConstraintError, match="out-overlap"):
        rau.ring_attention_update(*states[0], *states[1], out=good._replace(**{field: other}))


def test_an_output_on_statistics_of_its_own_shape():
    """In BSND attn_out and statistics can have one shape: then their roles alone tell them apart."""
    prev, cur, out = (state((2, 3, 3, 8), (2, 3, 3, 8), seed=seed) for seed in range(3))
    options = {"layout": "BSND", "profile": "portable"}
    rau.ring_attention_update(*prev, *cur, out=out, **options)
    rau.ring_attention_update(*prev, *cur, out=(prev[0], out[1], out[2]), **options)
    with pytest.raises(rau.ConstraintError, match="out-overlap"):
        rau.ring_attention_update(*prev, *cur, out=(prev[1], out[1], out[2]), **options)


def test_in_place_is_another_call():
    prev, cur = sbh(seed=1), sbh(seed=2)
    expected = rau.ring_attention_update(*prev, *cur)
    assert signature((prev, cur), outputs()) != signature((prev, cur), prev) != signature((prev, cur))
    assert rau.ring_attention_update(*prev, *cur, out=outputs(np.zeros_like)).attn_out.any()
    rau.ring_attention_update(*prev, *cur, out=prev)
    assert all(map(np.array_equal, prev, expected))


def test_what_is_never_recognised():
    states, out = (sbh(seed=1), sbh(seed=2)), outputs()
    assert signature(states) is not None and signature(states, out) is not None
    strided = states[0]._replace(attn_out=np.zeros((4, 2, 48), np.float32)[..., ::2])
    unaligned = np.zeros(4 * 2 * 24 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(4, 2, 24)
    for odd in (strided, states[0]._replace(attn_out=unaligned)):
        assert signature((odd, states[1])) is None
    assert signature(states, layout="TND", lengths=[0, 4]) is None
    assert signature(states, layout=["SBH"]) is None and signature(states, profile=None) is None
    assert signature(states, check="values") is None
    assert signature(states, out.attn_out) is None
    assert signature(states * 9) is None, "as many states as the buffer does not hold"
    with pytest.raises(rau.ConstraintError, match="value-sum"):
        rau.ring_attention_update(*states[0], *states[1])
        rau.ring_attention_update(*states[0]._replace(softmax_sum=-states[0].softmax_sum), *states[1], check="values")


def test_profiles_and_calls_are_told_apart():
    wide = [sbh(lanes=1, seed=seed) for seed in range(2)]
    rau.ring_attention_update(*wide[0], *wide[1], profile="portable")
    with pytest.raises(rau.ConstraintError, match="lanes"):
        rau.ring_attention_update(*wide[0], *wide[1])


def test_with_and_without_statistics_are_told_apart():
    states = [sbh(seed=1), sbh(seed=2)]
    for statistics in (False, True, False):
        result = rau.merge_states(states, statistics=statistics)
        assert isinstance(result, rau.AttentionState if statistics else np.ndarray)
        assert not statistics or result.softmax_sum is not None


def test_no_array_is_kept():
    state = sbh(dtype="bfloat16")
    rau.ring_attention_update(*state, *state)
    ((problem, dtypes),) = cache._problems.values()
    assert dtypes[0] is state.attn_out.dtype and dtypes[0] == ml_dtypes.bfloat16
    assert not any(isinstance(vars(problem)[name], np.ndarray) for name in vars(problem) if name not in ("blocks", "block_terms"))


def test_as_many_as_a_program_makes():
    for tokens in range(1, 600):
        state = sbh(S=tokens, B=1, N=1, D=1)
        rau.ring_attention_update(*state, *state)
    assert 0 < len(cache._problems) <= 256
