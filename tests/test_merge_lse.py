"""merge_lse: pairs (attn_out, lse) merged as FlashInfer's and vLLM's users have them, in place too."""

import numpy as np
import pytest
from running import on_host, same

import rau
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
        ([(1, 2, 3)], {}, ("states",), "pairs[0] has 3 items; expected a list of pairs (attn_out, lse). States are for rau.merge_"),
        (None, {"base": "10"}, ("base", "states"), "pairs is None"),
        ("two", {"base": "10"}, ("base",), "base = '10'"),
        ("two", {"lse_layout": None}, ("lse-layout",), "lse_layout is None"),
        ("two", {"lse_layout": "NT"}, ("shape-stats",) * 2, "lse of pairs[1] has shape (5, 4); for attn_out of shape"),
        ("two", {"out": np.zeros((5, 4, 6), "f4")}, ("out",), "; expected a pair (attn_out, lse) of arrays to write into."),
        ("two", {"out": (np.zeros((5, 4, 6), "f4"), np.zeros((4, 5), "f4"))}, ("shape-stats",), "lse of out has shape (4, 5)"),
        ("two", {"out": (np.zeros((5, 4, 6), "f4"), np.zeros((5, 4), "f8"))}, ("out-dtype",), "lse of out has dtype float64; exp"),
        ("two", {"out": (np.zeros((5, 4, 6), "f4"), np.zeros(4, "f4"))}, ("rank",), "lse of out has shape (4,); lse_layout"),
        ("two", {"out": (np.zeros((5, 4, 7), "f4"), np.zeros((5, 4), "f4"))}, ("out-shape",), "out.attn_out has shape (5, 4, 7)"),
        ("two", {"out": (np.zeros((5, 4, 6), "f4"), np.broadcast_to(np.zeros((), "f4"), (5, 4)))}, ("out-writable",),
         "lse of out is read-only"),
        ("two", {"backend": "nobody"}, None, "nobody"),
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


@pytest.mark.parametrize("base", ["e", "2"])
def test_a_log_sum_exp_to_write_into_meets_no_part_of_another(base):
    """To base 2 as well, where the states' maxima are arrays of their own."""
    memory = np.zeros((6, 4), "f4")
    first, second = pairs(("TND", "TN"), 2)
    memory[:5] = first[1]
    given = [(first[0], memory[:5]), second]
    out = np.zeros((5, 4, 6), "f4"), memory[1:]
    with pytest.raises(rau.ConstraintError, match=r"lse of out shares memory with lse of pairs\[0\]; expected separate"):
        rau.merge_lse(given, **GOOD | {"base": base}, out=out)
    assert not out[0].any()
    np.testing.assert_array_equal(memory[:5], first[1])


def test_a_pair_of_another_shape_is_named():
    first, second = pairs(("TND", "TN"), 1)[0], pairs(("TND", "NT"), 1)[0]
    with pytest.raises(rau.ShapeError, match=r"lse of pairs\[1\] has shape \(4, 5\)"):
        rau.merge_lse([first, second], **GOOD)
    with pytest.raises(rau.DTypeError, match=r"attn_out of pairs\[1\] has dtype float64 and attn_out of pairs\[0\] float32"):
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
    with pytest.raises(rau.DTypeError, match="attn_out of pairs.1. is a torch array and attn_out of pairs.0. a numpy one"):
        rau.merge_lse([first, tuple(map(torch.from_numpy, second))], **GOOD, out=first, backend=backend)
