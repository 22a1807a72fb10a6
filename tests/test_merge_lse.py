"""merge_lse: pairs (attn_out, lse) merged as FlashInfer's and vLLM's users have them, in place too."""

from dataclasses import replace

import numpy as np
import pytest
from running import on_host, same

import rau
from rau.backends.numpy_ import NumPyBackend
from rau.state import AttentionState

FORMS = {  # shapes of an output and of its log-sum-exp; S = T = 5, N = 4
    ("SBH", None): ((5, 2, 24), (2, 4, 5)),
    ("SBH", "BSN"): ((5, 2, 24), (2, 5, 4)),
    ("TND", "TN"): ((5, 4, 6), (5, 4)),
    ("TND", "NT"): ((5, 4, 6), (4, 5)),
    ("BSND", None): ((2, 5, 4, 6), (2, 4, 5)),
    ("BNSD", "BSN"): ((2, 4, 5, 6), (2, 5, 4)),
}


def pairs(form, count, dtype="float32", infinity=-np.inf):
    """With rows that have keys in some pairs, and in none."""
    made = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        shape, lse_shape = FORMS[form]
        lse = (rng.normal(size=lse_shape) * 5).astype("float64" if dtype == "float64" else "float32")
        lse[rng.random(lse_shape) < 0.2] = infinity
        lse.flat[0] = infinity
        attn_out = rng.normal(size=shape).astype("float32" if dtype == "bfloat16" else dtype)
        if dtype == "bfloat16":
            import ml_dtypes

            attn_out = attn_out.astype(ml_dtypes.bfloat16)
        made.append((attn_out, lse))
    return made


def of(backend, given):
    return [tuple(backend.asarray(part.copy()) for part in pair) for pair in given]


def host(backend, pair):
    return on_host(backend, AttentionState(*pair, pair[1]))[:2]


@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("form", FORMS)
def test_it_is_from_lse_merge_states_and_lse(any_backend, form, dtype, base):
    """Fresh, into other arrays, and in place on any of the pairs."""
    backend = rau.registry.get(any_backend)
    how = {"layout": form[0], "lse_layout": form[1], "base": base}
    for count in (1, 3):
        given = pairs(form, count, dtype)
        states = [AttentionState.from_lse(*pair, **how) for pair in of(backend, given)]
        merged = rau.merge_states(states, layout=form[0], backend=any_backend)
        expected = host(backend, (merged.attn_out, merged.lse(**how)))
        same(host(backend, rau.merge_lse(of(backend, given), **how, backend=any_backend)), expected)
        outs = [of(backend, [tuple(np.full_like(part, 7) for part in given[0])])[0]]
        for place in (None, *range(count)):
            mine = of(backend, given)
            out = outs[0] if place is None else mine[place]
            result = rau.merge_lse(mine, **how, backend=any_backend, out=out)
            assert result[0] is out[0] and result[1] is out[1]
            same(host(backend, out), expected)
            for k, pair in enumerate(mine):
                if k != place:
                    same(host(backend, pair), host(backend, of(backend, given)[k]))


def test_rows_whose_empty_sides_are_positive_infinities(backend):
    form = "TND", "NT"
    how = {"layout": "TND", "lse_layout": "NT", "base": "e", "backend": backend}
    expected = rau.merge_lse(pairs(form, 2), **how)
    same(rau.merge_lse(pairs(form, 2, infinity=np.inf), **how, inf_is_empty=True), expected)
    given = pairs(form, 2, infinity=np.inf)
    rau.merge_lse(given, **how, inf_is_empty=True, out=given[0])
    same(given[0], expected)


def test_a_running_pair(backend):
    """A ring of pairs in place, within what is said of it."""
    how = {"layout": "TND", "lse_layout": "TN", "base": "e"}
    given = pairs(("TND", "TN"), 6)
    exact = rau.merge_lse([(out.astype("f8"), lse.astype("f8")) for out, lse in given], **how)
    run = given[0]
    for pair in given[1:]:
        rau.merge_lse([run, pair], **how, out=run, backend=backend)
    size = np.abs(np.where(np.isfinite(exact[1]), exact[1], 0)).max()
    np.testing.assert_allclose(run[0], exact[0], atol=6 * (size + 4) * 2.0**-24 * 10)
    np.testing.assert_allclose(run[1], exact[1], rtol=0, atol=6 * size * 2.0**-24)


GOOD = {"layout": "TND", "lse_layout": "TN", "base": "e"}



@pytest.mark.parametrize(
    ("given", "changed", "rules", "says"),
    [
        ([], {}, ("states",), "merge_lse: [states] pairs is empty; expected a list of pairs (attn_out, lse), at least one."),
        (None, {}, ("states",), "pairs is None; expected a list of pairs"),
        (pairs(("TND", "TN"), 1)[0], {}, ("states",), "pairs is one pair of arrays; expected a list of pairs (attn_out, lse): pass"),
        ([(1, 2, 3)], {}, ("states",), "pairs[0] has 3 items; expected a pair (attn_out, lse). States are for rau.merge_states."),
        (None, {"base": "10"}, ("base", "states"), "pairs is None"),
        ("two", {"base": "10"}, ("base",), "base = '10'"),
        ("two", {"lse_layout": None}, ("lse-layout",), "lse_layout is None"),
        ("two", {"lse_layout": "NT"}, ("shape-stats",) * 2, "pairs[1][1] has shape (5, 4); for pairs[1][0] of shape"),
        ("two", {"out": np.zeros((5, 4, 6), "f4")}, ("out",), "; expected a pair (attn_out, lse)."),
        ("two", {"out": (np.zeros((5, 4, 6), "f4"), np.zeros((4, 5), "f4"))}, ("shape-stats",), "out[1] has shape (4, 5)"),
        ("two", {"out": (np.zeros((5, 4, 6), "f4"), np.zeros((5, 4), "f8"))}, ("out-dtype",), "out[1] has dtype float64; expected float32"),
        ("two", {"out": (np.zeros((5, 4, 6), "f4"), np.zeros(4, "f4"))}, ("rank",), "out[1] has shape (4,); lse_layout"),
        ("two", {"out": (np.zeros((5, 4, 7), "f4"), np.zeros((5, 4), "f4"))}, ("out-shape",), "out[0] has shape (5, 4, 7)"),
        ("two", {"out": (np.frombuffer(bytes(480), "f4").reshape(5, 4, 6), np.zeros((5, 4), "f4"))}, ("out-writable",),
         "out[0] is read-only"),
        ("two", {"out": (np.zeros((5, 4, 6), "f4"), np.broadcast_to(np.zeros((), "f4"), (5, 4)))}, ("out-writable",),
         "out[1] is read-only"),
        ("two", {"backend": "nobody"}, None, "nobody"),
        ("two", {"heads": 3}, ("heads",) * 2, "pairs[1][0] has N = 4 heads"),
        ([pairs(("TND", "TN"), 1)[0][::-1]], {}, ("rank",), "pairs[0][0] has shape (5, 4); layout \"TND\" expects (T, N, D). "
         "The pair seems to be swapped."),
        (list(zip(*pairs(("TND", "TN"), 3))), {}, ("states",), "merge_lse: [states] pairs is a list of outputs and one of "
         "log-sum-exps, as it seems; expected a list of pairs (attn_out, lse): pass list(zip(*pairs))."),
        ([(*pairs(("TND", "TN"), 1)[0], np.zeros((5, 4), "f4"))] * 2, {}, ("states",) * 2, "pairs[0] has 3 items"),
        (AttentionState(1, 2, 3), {}, ("states",), "pairs is an AttentionState; expected a list of pairs (attn_out, lse). States"),
        (pairs(("TND", "TN"), 1) * 65537, {}, ("states",), "pairs has 65537 pairs; expected a list of pairs (attn_out, lse), at "
         "most 65536."),
    ],
)  # fmt: skip
def test_what_is_refused(given, changed, rules, says):
    given = pairs(("TND", "TN"), 2) if given == "two" else given
    out = changed.get("out")
    before = [part.copy() for part in out] if isinstance(out, tuple) else []
    with pytest.raises(rau.RauError) as caught:
        rau.merge_lse(given, **GOOD | changed)
    assert rules is None or caught.value.rules == rules
    assert says in str(caught.value)
    if before:
        same(out, before)


def test_what_a_backend_does_not_take_is_described_as_it_was_given():
    """Not as the outputs without elements by which the log-sum-exps are merged first."""
    class Small(NumPyBackend):
        name, capabilities = "small", replace(NumPyBackend.capabilities, max_heads=1)

    given = pairs(("TND", "TN"), 2)
    before = [part.copy() for part in given[0]]
    with pytest.raises(rau.UnsupportedError, match=r"N=4, D=6,.* N = 4 > 1"):
        rau.merge_lse(given, **GOOD, out=given[0], backend=Small())
    same(given[0], before)


@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("role", [0, 1])
@pytest.mark.parametrize("other", [(0, 0), (0, 1), (1, 0), (1, 1), "out"])
def test_what_is_written_into_meets_no_part_of_what_is_given(other, role, base):
    """To base 2 as well, where the states' maxima are arrays of their own."""
    memory = np.zeros(6 * 4 * 6, "f4")
    given = [list(pair) for pair in pairs(("TND", "TN"), 2)]
    out = [np.zeros((5, 4, 6), "f4"), np.zeros((5, 4), "f4")]

    def placed(array, start):
        view = memory[start : start + array.size].reshape(array.shape)
        view[...] = array
        return view

    name = "out[0]" if other == "out" else f"pairs[{other[0]}][{other[1]}]"
    if other == "out":
        out = [placed(out[0], 0), placed(out[1], 4)]
        role = 1
    else:
        given[other[0]][other[1]] = placed(given[other[0]][other[1]], 0)
        out[role] = memory[4 : 4 + out[role].size].reshape(out[role].shape)
    before = memory.copy()
    with pytest.raises(rau.ConstraintError) as caught:
        rau.merge_lse(given, **GOOD | {"base": base}, out=out)
    assert f"out[{role}] shares memory with {name}; expected separate memory" in str(caught.value)
    np.testing.assert_array_equal(memory, before)


@pytest.mark.parametrize("base", ["e", "2"])
def test_all_places_of_a_pair(base):
    """The output on one pair's, the log-sum-exp on another's."""
    expected = rau.merge_lse(pairs(("TND", "TN"), 3), **GOOD | {"base": base})
    for first in range(3):
        for second in range(3):
            given = pairs(("TND", "TN"), 3)
            out = given[first][0], given[second][1]
            rau.merge_lse(given, **GOOD | {"base": base}, out=out)
            same(out, expected)


@pytest.mark.parametrize("base", ["e", "2"])
def test_it_is_one_softmax(base, backend):
    rng = np.random.default_rng(3)
    scores, values = rng.normal(size=(5, 30)) * 9, rng.normal(size=(30, 6))
    given = []
    for keys in (slice(0, 11), slice(11, 12), slice(12, 30)):
        p = np.exp(scores[:, keys] - scores.max())
        lse = (np.log(p.sum(1)) + scores.max()) / (1 if base == "e" else np.log(2))
        given.append(((p @ values[keys] / p.sum(1, keepdims=True))[:, None].astype("f4"), lse[:, None].astype("f4")))
    out, lse = rau.merge_lse(given, **GOOD | {"base": base}, backend=backend)
    p = np.exp(scores - scores.max(1, keepdims=True))
    np.testing.assert_allclose(out[:, 0], p @ values / p.sum(1, keepdims=True), atol=1e-5)
    natural = scores.max(1) + np.log(p.sum(1))
    np.testing.assert_allclose(lse[:, 0], natural / (1 if base == "e" else np.log(2)), atol=1e-5)


def test_nothing_fails_once_an_output_is_written(monkeypatch):
    """All that takes memory comes before."""
    from rau.arrays.numpy_ import NumPyKind

    order = []
    merge = rau.registry.get("numpy").merge
    monkeypatch.setattr(rau.registry.get("numpy"), "merge", lambda problem, *rest: order.append(problem.D) or merge(problem, *rest))
    lse = AttentionState.lse
    monkeypatch.setattr(AttentionState, "lse", lambda *state, **how: order.append("lse") or lse(*state, **how))
    assign = NumPyKind.assign
    monkeypatch.setattr(NumPyKind, "assign", lambda *given: order.append("assign") or assign(*given))
    given = pairs(("TND", "TN"), 2)
    rau.merge_lse(given, **GOOD, out=given[0], backend="numpy")
    assert order == [0, "lse", 6, "assign"]


def test_tensors_of_inference_and_without_memory():
    torch = pytest.importorskip("torch")
    expected = rau.merge_lse(pairs(("TND", "TN"), 2), **GOOD)
    with torch.inference_mode():
        given = [tuple(map(torch.tensor, pair)) for pair in pairs(("TND", "TN"), 2)]
    rau.merge_lse(given, **GOOD, out=given[0])
    same([part.numpy() for part in given[0]], expected)
    meta = [tuple(part.to("meta") for part in pair) for pair in given]
    assert rau.merge_lse(meta, **GOOD, out=meta[0], backend="torch")[1].shape == (5, 4)
    graph = torch.compile(lambda given: rau.merge_lse(given, **GOOD, out=given[0]), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="out is given, and torch traces the call; .* or call it outside of the graph"):
        graph([tuple(part.clone() for part in pair) for pair in given])


@pytest.mark.parametrize(("wrong", "words"), [({"base": ...}, "merge_lse: .base. base is missing"), ({"lse_layout": None}, "lse-layout")])
def test_a_compiler_that_may_not_break_the_graph_shows_the_words(wrong, words):
    torch = pytest.importorskip("torch")
    given = [tuple(map(torch.tensor, pair)) for pair in pairs(("TND", "TN"), 2)]
    options = {name: value for name, value in (GOOD | wrong).items() if value is not ...}
    with pytest.raises(Exception, match=words):
        torch.compile(lambda given: rau.merge_lse(given, **options), fullgraph=True, backend="eager")(given)


def test_a_pair_of_another_shape_is_named():
    first, second = pairs(("TND", "TN"), 1)[0], pairs(("TND", "NT"), 1)[0]
    with pytest.raises(rau.ShapeError, match=r"pairs\[1\]\[1\] has shape \(4, 5\)"):
        rau.merge_lse([first, second], **GOOD)
    with pytest.raises(rau.DTypeError, match=r"pairs\[1\]\[0\] has dtype float64 and pairs\[0\]\[0\] float32"):
        rau.merge_lse([first, pairs(("TND", "TN"), 1, "float64")[0]], **GOOD)


def test_a_gradient_to_outputs_and_log_sum_exps():
    torch = pytest.importorskip("torch")
    given = [tuple(torch.from_numpy(part) for part in pair) for pair in pairs(("TND", "TN"), 2, "float64")]

    def by(function):
        arrays = [[part.clone().requires_grad_() for part in pair] for pair in given]
        out, lse = function(arrays)
        total = (out**2).sum() + torch.where(lse.isfinite(), lse, 0.0).sum()
        return [out, lse, *torch.autograd.grad(total, [part for pair in arrays for part in pair])]

    def by_hand(arrays):
        lses = torch.stack([pair[1] for pair in arrays])
        lse = lses.logsumexp(0)
        weights = torch.where(lse.isfinite(), (lses - lse).exp(), 0.0)
        return sum(weight[..., None] * pair[0] for weight, pair in zip(weights, arrays, strict=True)), lse

    mine = by(lambda arrays: rau.merge_lse(arrays, **GOOD))
    traced = by(torch.compile(lambda arrays: rau.merge_lse(arrays, **GOOD), fullgraph=True, backend="eager"))
    for one, other in zip(mine, traced, strict=True):
        assert torch.equal(one, other)
    alive = given[0][1].isfinite() & given[1][1].isfinite()
    for one, other in zip(mine, by(by_hand), strict=True):
        torch.testing.assert_close(one[alive], other[alive])
    arrays = [tuple(part.clone().requires_grad_() for part in pair) for pair in given]
    with pytest.raises(rau.UnsupportedError, match="out is given"):
        rau.merge_lse(arrays, **GOOD, out=tuple(part.clone() for part in given[0]))


def test_pairs_of_two_libraries_are_told(backend):
    torch = pytest.importorskip("torch")
    first, second = pairs(("TND", "TN"), 2)
    with pytest.raises(rau.DTypeError, match=r"pairs\[1\]\[0\] is a torch array and pairs\[0\]\[0\] a numpy one"):
        rau.merge_lse([first, tuple(map(torch.from_numpy, second))], **GOOD, out=first, backend=backend)
