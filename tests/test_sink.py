"""add_sink: one more logit of each head, in every layout and order, against one softmax in float64."""

import numpy as np
import pytest
from running import laid_out, on_host, own, same

import rau

B, S, N, D, KEYS = 2, 3, 4, 8, 10
INF = float("inf")
SINK = np.array([0.7, -INF, 3e38, -3e38], np.float32)
ORDERS = [("SBH", "TND"), ("TND", "TND"), ("TND", "SBH"), ("BSND", "TND"), ("BNSD", "TND")]


def attention(seed=0):
    """Scores (B, N, S, keys), of which row 1 of head 0 sees none, and values; in float64."""
    rng = np.random.default_rng(seed)
    scores, values = rng.normal(size=(B, N, S, KEYS)) * 3, rng.normal(size=(B, N, KEYS, D))
    scores[:, 0, 1] = -INF
    return scores, values


def softmax(scores, values, sink=None):
    """The output (B, S, N, D) and the log-sum-exp (B, N, S); a sink as one more column, of value 0, if there is one."""
    if sink is not None:
        scores = np.concatenate([scores, np.broadcast_to(sink.astype("f8")[:, None, None], (B, N, S, 1))], -1)
        values = np.concatenate([values, np.zeros((B, N, 1, D))], 2)
    m = np.maximum(scores.max(-1, keepdims=True), -1e300)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.exp(scores - m)
        out = np.nan_to_num(p / p.sum(-1, keepdims=True)) @ values
        return out.swapaxes(1, 2), m[..., 0] + np.log(p.sum(-1))


def state(scores, values, layout="BSND", order="TND", dtype="float32", lanes=1):
    out, lse = softmax(scores, values)
    stats = "float64" if dtype == "float64" else "float32"
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    made = rau.AttentionState.from_lse(out.astype(dtype), lse.astype(stats), base="e", layout="BSND", lanes=lanes)
    return laid_out(made, layout, order == "SBH")


def how(layout, order):
    return {"layout": layout, "softmax_layout": order, "actual_seq_qlen": [0, S, B * S] if order == "SBH" else None}


def added(backend, given, sink, **options):
    """add_sink on a backend's own arrays."""
    instance = rau.registry.get(backend)
    return on_host(instance, rau.add_sink(own(instance, given), instance.asarray(sink), **options, backend=backend))


def log_sum_exp(result, layout, order):
    return result.lse(base="e", **how(layout, order), lse_layout="TN" if layout == "TND" else "BNS")


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize(("layout", "order"), ORDERS)
def test_it_is_one_softmax_with_one_more_logit(layout, order, lanes, dtype, any_backend):
    scores, values = attention()
    stats, tolerance = {"float32": ("f4", 3e-6), "float64": ("f8", 1e-13), "bfloat16": ("f4", 2.0**-7)}[dtype]
    given, sink = state(scores, values, layout, order, dtype, lanes), SINK.astype(stats)
    result = added(any_backend, given, sink, **how(layout, order))
    out, lse = softmax(scores, values, sink)
    expected = laid_out(rau.AttentionState(out, lse[..., None], lse[..., None]), layout)
    np.testing.assert_allclose(np.asarray(result.attn_out, "f8"), expected.attn_out, rtol=0, atol=tolerance)
    got = log_sum_exp(result, layout, order)
    np.testing.assert_allclose(got, expected.softmax_max[..., 0], rtol=1e-14 if dtype == "float64" else 4e-7)
    for mine, its in zip(result, given, strict=True):
        assert (mine.shape, mine.dtype) == (its.shape, its.dtype)
    assert (result.softmax_sum == result.softmax_sum[..., :1]).all()


@pytest.mark.parametrize(("layout", "order"), ORDERS)
def test_no_sink_changes_no_bit_and_a_row_without_keys_is_all_sink(layout, order, any_backend):
    given = state(*attention(), layout, order, lanes=8)
    empty = given.softmax_max == -INF
    assert empty.any()
    result = added(any_backend, given, np.full(N, -INF, "f4"), **how(layout, order))
    same(result, given._replace(softmax_sum=np.where(empty, np.float32(0), given.softmax_sum)))
    nothing = rau.AttentionState(np.full_like(given[0], np.nan), np.full_like(given[1], -INF), np.ones_like(given[2]))
    result = added(any_backend, nothing, SINK, **how(layout, order))
    assert not result.attn_out.any()
    lse = log_sum_exp(result, layout, order)
    np.testing.assert_array_equal(lse, np.broadcast_to(SINK if layout == "TND" else SINK[:, None], lse.shape))


def test_at_the_end_of_a_ring_it_counts_once(backend):
    """The order of merging and adding is no matter; added to each part it counts once a part, which is something else."""
    scores, values = attention()
    sink = np.array([0.7, 1.2, -0.3, 2.0], "f4")
    parts = [state(scores[..., keys], values[..., keys, :]) for keys in (slice(4), slice(4, None))]
    expected = softmax(scores, values, sink)[0]

    def apart(result):
        return np.abs(result.attn_out - expected).max()

    assert apart(rau.add_sink(rau.merge_states(parts, layout="BSND", backend=backend), sink, "BSND", backend=backend)) < 3e-6
    first = rau.add_sink(parts[0], sink, "BSND", backend=backend)
    assert apart(rau.merge_states([first, parts[1]], layout="BSND", backend=backend)) < 3e-6
    each = [rau.add_sink(part, sink, "BSND", backend=backend) for part in parts]
    assert apart(rau.merge_states(each, layout="BSND", backend=backend)) > 0.1


def test_it_is_a_merge_with_a_state_as_large_as_a_row(monkeypatch):
    """With views of the sink, of stride 0, and no second output."""
    import rau.sink as home

    seen = []
    call = home.dispatch
    monkeypatch.setattr(home, "dispatch", lambda name, states, *rest: seen.append(states[1]) or call(name, states, *rest))
    sink = np.zeros(N, "f4")
    rau.add_sink(state(*attention(), "SBH", lanes=8), sink)
    (its,) = seen
    assert np.shares_memory(its.softmax_max, sink)
    assert its.attn_out.strides == (0, 0, 4) and its.softmax_max.strides == its.softmax_sum.strides == (0, 4, 0, 0)


def test_not_finite_sinks_follow_the_rules_of_statistics(backend):
    given, sink = state(*attention()), np.array([INF, np.nan, 0, 0], "f4")
    result = rau.add_sink(given, sink, "BSND", backend=backend)
    assert np.isnan(result.attn_out[:, 0, :2]).all() and np.isfinite(result.attn_out[:, :, 2:]).all()
    assert (result.softmax_max[:, 0] == INF).all() and np.isnan(result.softmax_max[:, 1]).all()
    with pytest.raises(rau.ConstraintError) as caught:
        rau.add_sink(given, sink, "BSND", check="values", backend=backend)
    assert set(caught.value.rules) == {"value-max"} and "add_sink: [value-max] sink[0] = inf" in str(caught.value)


GOOD = {"state": state(*attention()), "sink": np.zeros(N, "f4"), "layout": "BSND"}
PACKED = {"state": state(*attention(), "TND", "SBH"), "layout": "TND", "softmax_layout": "SBH"}


@pytest.mark.parametrize(
    ("changed", "rules", "says"),
    [
        ({"sink": np.zeros(3, "f4")}, ("heads",), "sink has shape (3,); expected (N,) = (4,), a number for each query head."),
        ({"sink": np.zeros((N, 1), "f4")}, ("heads",), "sink has shape (4, 1)"),
        ({"sink": np.zeros(N)}, ("dtype-stats",), "sink has dtype float64; expected float32. Pass sink.astype(numpy.float32)"),
        ({"sink": np.zeros(N, "f2")}, ("dtype-stats",), "expected float32. Pass sink.astype(numpy.float32), which is exact."),
        ({"sink": [0.0] * N}, ("array",), "sink is of type list; expected an array"),
        ({"state": GOOD["state"][:2]}, ("states",), "state has 2 items; expected an AttentionState"),
        ({"state": None}, ("states",), "state is None; expected an AttentionState"),
        ({"layout": "THD"}, ("layout",), 'Did you mean "TND"?'),
        ({"layout": "TND"}, ("rank",), 'state.softmax_max has shape (2, 4, 3, 1); layout "TND" expects (T, N, 8 or 1).'),
        ({"softmax_layout": "BNS"}, ("softmax-layout",), "softmax_layout = 'BNS'"),
        ({"check": "all"}, ("check",), "check = 'all'"),
        ({"state": GOOD["state"]._replace(softmax_sum=np.ones((2, 4, 4, 1), "f4"))}, ("shape-stats",), "state.softmax_sum has shape"),
        ({"state": GOOD["state"]._replace(softmax_max=np.ones((2, 4, 4, 1), "f4"))}, ("shape-stats",), "state.softmax_max has shape"),
        (PACKED, ("packed-qlen-required",), "actual_seq_qlen is None; packed statistics expect"),
        (PACKED | {"actual_seq_qlen": [0, 5]}, ("tnd-qlen-cumulative",), "expected a non-decreasing sequence from 0 to T = 6"),
    ],
)  # fmt: skip
def test_what_is_refused(changed, rules, says):
    with pytest.raises(rau.ConstraintError) as caught:
        rau.add_sink(**GOOD | changed)
    assert caught.value.rules == rules
    assert str(caught.value).startswith("add_sink: [") and says in str(caught.value)
    assert "state" not in changed or "sink has" not in str(caught.value)


@pytest.mark.parametrize(("layout", "order"), [("BNSD", "TND"), ("TND", "SBH")])
def test_a_gradient_to_the_sink_and_to_the_state(layout, order):
    """Against that of one softmax in float64, by torch's own operations; compiled, the same bits."""
    torch = pytest.importorskip("torch")
    scores, values = (torch.from_numpy(part) for part in attention())
    scores = scores.nan_to_num(neginf=-3.0)
    sink = torch.tensor([0.7, -INF, 3.0, -2.0], dtype=torch.float64)
    upstream = torch.from_numpy(np.random.default_rng(1).normal(size=(B, N, S, D)))

    def gradients(function):
        leaves = [part.clone().requires_grad_() for part in (scores, values, sink)]
        out, lse = function(*leaves)
        return torch.autograd.grad((out * upstream).sum() + (lse**2).sum(), leaves)

    def tokens(part):  # (B, N, S, ...) to (T, N, ...), or to packed rows
        return part.transpose(1, 2).flatten(0, 1)

    def ours(scores, values, sink):
        out, lse = scores.softmax(-1) @ values, scores.logsumexp(-1)
        how_ = how(layout, order)
        if layout == "TND":
            stats = rau.reorder_softmax(tokens(lse), how_["actual_seq_qlen"], to="SBH")[..., None]
            merged = rau.add_sink((tokens(out), stats, torch.ones_like(stats)), sink, **how_)
            lse = log_sum_exp(merged, layout, order).unflatten(0, (B, S)).transpose(1, 2)
            return merged.attn_out.unflatten(0, (B, S)).transpose(1, 2), lse
        merged = rau.add_sink(rau.AttentionState.from_lse(out, lse, base="e", layout=layout), sink, **how_)
        return merged.attn_out, merged.lse(base="e", layout=layout)

    def one_softmax(scores, values, sink):
        scores = torch.cat([scores, sink[:, None, None].expand(B, N, S, 1)], -1)
        values = torch.cat([values, values.new_zeros(B, N, 1, D)], 2)
        return scores.softmax(-1) @ values, scores.logsumexp(-1)

    mine = gradients(ours)
    for got, expected in zip(mine, gradients(one_softmax), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    if layout == "BNSD":
        for got, expected in zip(gradients(torch.compile(ours, fullgraph=True, backend="eager")), mine, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-15, atol=0)
