"""Bad calls: the error's class, rules and words, and that nothing is written."""

import pickle

import numpy as np
import pytest
from states import NAMES, arguments, bits, sbh, tnd
from wrong_calls import ARRAYS, OPTIONS, SHAPES, Wrong, frozen
from wrong_tnd_and_out import CHIP, LENGTHS, LIMITS, OUTPUTS

import rau
from rau.constraints.rules import RULES
from rau.errors import LostRankError

TABLES = {"array": ARRAYS, "shape": SHAPES, "option": OPTIONS, "qlen": LENGTHS, "limit": LIMITS, "out": OUTPUTS}
CASES = [pytest.param(case, id=f"{kind}: {name}") for kind, table in TABLES.items() for name, case in table.items()]


def held(given):
    """What the arrays of a call hold, those to write into too."""
    out = given.get("out")
    arrays = [*given.values(), *(out if isinstance(out, tuple) else ())]
    return bits(array for array in arrays if isinstance(array, np.ndarray) and array.dtype != object)


@pytest.mark.parametrize("case", CASES)
def test_refused(case):
    given = case.arguments()
    before = held(given)
    with pytest.raises(rau.RauError) as caught:
        rau.ring_attention_update(**given)
    assert held(given) == before
    error = caught.value
    assert (type(error), error.rules) == (case.error, case.rules)
    assert isinstance(error, RuntimeError)
    if case.says:
        assert str(error) == f"ring_attention_update: [{case.rules[0]}] {case.says}"
    else:
        assert all(f"[{rule}] " in str(error) for rule in case.rules)
    # Whoever asks what a call would do hears the same.
    with pytest.raises(case.error) as caught:
        rau.explain(**case.arguments())
    assert str(caught.value) == str(error).replace("ring_attention_update: ", "explain: ", 1)


@pytest.mark.parametrize("layout", ["SBH", "TND"])
def test_without_the_edits_nothing_is_wrong(layout):
    rau.ring_attention_update(**Wrong((), Exception, layout=layout).arguments())


def test_all_that_is_wrong_is_in_one_error():
    given = arguments(tnd, T=8, N=43, D=129)
    given |= {
        "cur_attn_out": given["cur_attn_out"].astype("float16"),
        "cur_softmax_max": given["cur_softmax_max"].astype("float64"),
        "cur_softmax_sum": given["cur_softmax_sum"][:7],
        "out": rau.AttentionState(*(frozen(given[name]) for name in NAMES[:3])),
    }
    with pytest.raises(rau.RauError) as caught:
        rau.ring_attention_update(**given, layout="TND", softmax_layout="BSH", check="none")
    assert (
        str(caught.value)
        == f"""ring_attention_update: 11 rules are broken:
  [softmax-layout] softmax_layout = 'BSH'; expected one of "TND", "SBH". "TND" is token-major; \
"SBH" is packed per sequence, as the vendor's kernels emit.
  [check] check = 'none'; expected one of "metadata", "values", "document".
  [dtype-match] cur_attn_out has dtype float16 and prev_attn_out float32; expected the same dtype. profile="portable" \
merges a 16-bit state into a float32 one.
  [dtype-stats] cur_softmax_max has dtype float64; expected float32. Pass softmax_max.astype(numpy.float32): weights are off by up to \
abs(softmax_max) * 2**-25.
  [shape-stats] cur_softmax_sum has shape (7, 43, 8); for prev_attn_out of shape (8, 43, 129) and N = 43 heads, \
layout "TND" expects (T, N, 8) = (8, 43, 8).
  [tnd-head-dim-64] the last axis of prev_attn_out is D = 129; layout "TND" takes multiples of 64. {CHIP}
  [tnd-unified-buffer] prev_attn_out with N = 43, D = 129, float32 needs AlignUp(N*D, 64) * (4*6 + 8) \
+ AlignUp(N*8, 64) * 56 = 199680 bytes; the limit is 192*1024 = 196608. {CHIP}
  [tnd-qlen-required] actual_seq_qlen is None; layout "TND" expects the cumulative sequence lengths from 0 to T = 8, \
such as [0, 8] for a single sequence. profile="portable" takes token-major statistics without it.
  [out-writable] out.attn_out is read-only; expected an array that may be written to.
  [out-writable] out.softmax_max is read-only; expected an array that may be written to.
  [out-writable] out.softmax_sum is read-only; expected an array that may be written to."""
    )
    # The class is that of the first one.
    assert type(caught.value) is rau.LayoutError
    assert caught.value.rules[:3] == ("softmax-layout", "check", "dtype-match")


def test_what_needs_no_shapes_is_judged_without_them():
    with pytest.raises(rau.RauError) as caught:
        rau.ring_attention_update(None, *sbh()[1:], *sbh(), [0, 9, 8], "TND", out=3, profile="cann")
    assert caught.value.rules == ("profile", "out", "array", "tnd-qlen-cumulative")
    assert "expected a non-decreasing sequence from 0 to T." in str(caught.value)
    given = arguments(tnd)
    given["prev_softmax_max"] = given["prev_softmax_max"][0]
    given["cur_attn_out"] = given["cur_attn_out"].astype("int32")
    with pytest.raises(rau.DTypeError) as caught:
        rau.ring_attention_update(**given, layout="TND")
    assert caught.value.rules == ("dtype-match", "rank", "tnd-qlen-required")
    assert "from 0 to T. profile" in str(caught.value)


STATES = (
    "expected a list of AttentionStates, or of triples (attn_out, softmax_max, softmax_sum), or a single one whose arrays "
    "are stacked along a new first axis"
)
FROM_LSE = "AttentionState.from_lse(out, lse, base=...) makes a state from a pair (out, lse)."


@pytest.mark.parametrize(
    ("states", "rules", "says"),
    [
        ([], ["states"], f"states is empty; {STATES}."),
        (None, ["states"], f"states is None; {STATES}."),
        (sbh(), ["states"], f"states is one AttentionState; {STATES}: pass [state]."),
        (tuple(sbh()), ["states"], f"states is one AttentionState; {STATES}: pass [state]."),
        ((sbh() for _ in range(2)), ["states"], f"states is of type generator; {STATES}."),
        ([sbh(), sbh()[:2]], ["states"], f"states[1] has 2 items; {STATES}. {FROM_LSE}"),
        ([sbh(), None], ["states"], f"states[1] is None; {STATES}."),
        ([(1, 2, 3)], ["array"] * 3, None),
        ([sbh(), sbh(), sbh()._replace(attn_out=sbh(D=4)[0])], ["shape-match"],
         "states[2].attn_out has shape (4, 2, 12); expected that of states[0].attn_out, (4, 2, 24)."),
        ([sbh(), sbh(S=5)], ["shape-match", "shape-stats", "shape-stats"], None),
        ([sbh(), sbh(lanes=2)], ["shape-stats", "shape-stats"], None),
        ([sbh(), sbh()._replace(softmax_sum=sbh(lanes=1).softmax_sum)], ["shape-stats"], None),
        ([sbh(dtype="float16"), sbh()], ["dtype-match"],
         "states[1].attn_out has dtype float32 and states[0].attn_out float16; expected the same dtype."),
        ([sbh(), sbh(dtype="float16"), sbh()], ["dtype-match"],
         "states[2].attn_out has dtype float32 and states[1].attn_out float16; expected one dtype for all later states."),
        ([sbh(dtype="float64"), sbh()], ["dtype-match", "dtype-stats", "dtype-stats"], None),
    ],
)  # fmt: skip
def test_merge_states_refuses(states, rules, says):
    with pytest.raises(rau.ConstraintError) as caught:
        rau.merge_states(states)
    assert list(caught.value.rules) == rules
    assert str(caught.value).startswith("merge_states: ")
    if says:
        assert str(caught.value) == f"merge_states: [{rules[0]}] {says}"


def narrow(state):
    return state._replace(softmax_max=state.softmax_max.astype("f2"))


def test_one_mistake_in_many_states_is_said_once():
    shared = "has dtype float16; expected float32. Compute it in float32; or pass"
    states = [sbh()] * 64
    for k in (0, 1, 2, 5, 7, 62, 63):
        states[k] = narrow(states[k])
    with pytest.raises(rau.DTypeError) as caught:
        rau.merge_states(states)
    assert caught.value.rules == ("dtype-stats",)
    assert str(caught.value).startswith(f"merge_states: [dtype-stats] states[0..2, 5, 7, 62..63].softmax_max {shared} softmax_max.")
    # In both statistics, and something else in one state: three messages.
    wrong = narrow(sbh())
    states = [wrong._replace(softmax_sum=wrong.softmax_max)] * 64
    states[9] = states[9]._replace(attn_out=sbh(S=5)[0])
    with pytest.raises(rau.DTypeError) as caught:
        rau.merge_states(states)
    assert caught.value.rules == ("dtype-stats", "dtype-stats", "shape-match")
    head, *lines = str(caught.value).splitlines()
    assert head == "merge_states: 3 rules are broken:"
    assert [line.partition(" has ")[0] for line in lines] == [
        "  [dtype-stats] states[0..63].softmax_max", "  [dtype-stats] states[0..63].softmax_sum",
        "  [shape-match] states[9].attn_out",
    ]  # fmt: skip
    # Not alike: what each holds.
    states = [sbh(S=4 + k) for k in range(3)]
    with pytest.raises(rau.ShapeError) as caught:
        rau.merge_states(states)
    assert [line.partition(" has ")[0][-18:] for line in str(caught.value).splitlines()[1:]].count("states[1].attn_out") == 1
    assert "states[2].attn_out has shape (6, 2, 24)" in str(caught.value)


@pytest.mark.parametrize("n", [0, -1, 1025, 2**80, 1.5, True, np.True_, "2", None, [], np.array([1, 2])], ids=repr)
def test_set_num_threads_refuses(n):
    before = rau.get_num_threads()
    with pytest.raises(rau.OptionError) as caught:
        rau.set_num_threads(n)
    assert str(caught.value) == f"set_num_threads: n = {n!r}; expected an int from 1 to 1024."
    assert caught.value.rules == ("threads",)
    assert rau.get_num_threads() == before


@pytest.mark.parametrize("n", [1, 1024, np.int64(2), np.array(3)], ids=repr)
def test_set_num_threads_takes(n):
    before = rau.get_num_threads()
    try:
        rau.set_num_threads(n)
        assert rau.get_num_threads() == int(n)
        assert type(rau.get_num_threads()) is int
    finally:
        rau.set_num_threads(before)


@pytest.mark.parametrize(
    ("error", "parents"),
    [
        (rau.ConstraintError, [RuntimeError]),
        (rau.ShapeError, [rau.ConstraintError, RuntimeError, ValueError]),
        (rau.LayoutError, [rau.ConstraintError, RuntimeError, ValueError]),
        (rau.OptionError, [rau.ConstraintError, RuntimeError, ValueError]),
        (rau.DTypeError, [rau.ConstraintError, RuntimeError, TypeError]),
        (rau.UnknownBackendError, [ValueError]),
        (rau.BackendUnavailableError, [ImportError]),
        (rau.UnsupportedError, [NotImplementedError]),
        (LostRankError, [ConnectionError]),
    ],
)
def test_the_family(error, parents):
    assert all(issubclass(error, parent) for parent in [rau.RauError, *parents])


def test_an_error_survives_pickling():
    with pytest.raises(rau.ShapeError) as caught:
        rau.merge_states([])
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), again.rules) == (rau.ShapeError, str(caught.value), ("states",))


def test_every_rule_has_a_reason_a_source_and_an_error():
    for name, rule in RULES.items():
        assert issubclass(rule.error, rau.ConstraintError), name
        assert rule.reason, name
        assert rule.source, name
    tried = {rule for case in CASES for rule in case.values[0].rules}
    elsewhere = {  # test_constraints.py, test_state.py, test_registry.py, test_config.py and above
        "array-kind", "array-device", "states", "threads", "mode", "to", "base", "lse-layout", "heads", "value-memory",
        "statistics", "value-lanes", "value-max", "value-sum", "document-max-positive",
    }  # fmt: skip
    elsewhere |= {"first-update", "tokens", "tokens-odd"}  # test_streaming_errors.py
    elsewhere |= {"indptr", "qlen-padded", "scale"}  # test_rows.py
    elsewhere |= {"group", "timeout", "ranks", "method", "over", "attention"}  # distributed_checks.py
    assert tried | elsewhere == set(RULES)


def test_attention_to_parts_is_of_tensors_and_says_so_where_there_is_no_torch():
    q = np.ones((1, 2, 3, 4), np.float32)
    with pytest.raises(rau.ConstraintError, match="q is of type numpy.ndarray; expected a torch tensor. Where no gradient is wanted"):
        rau.merge_attention(q, [(q, q)], print, print, base="e")
