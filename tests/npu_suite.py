"""The ascend backend on the stand-in device. test_ascend.py runs this in a process of its own, see stand_in_npu.py."""

import numpy as np
import pytest
import stand_in_npu
import torch
from interop_recipes import check_all
from stand_in_npu import CALLS, ORDERS

import rau
from rau import registry, torch_op
from rau.backends.ascend_ import AscendBackend
from rau.testing import check_backend, compare, oracle, partial_attention
from rau.testing.comparison import same_bits

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
GRAPH_OF = torch_op.graph_of
CUMULATIVE = [0, 20, 21, 21, 64]


@pytest.fixture(autouse=True)
def plain_tensors(monkeypatch):
    """A real NPU tensor is a plain torch.Tensor: only compile, export and gradients make an operator of a call."""
    monkeypatch.setattr(torch_op, "graph_of", lambda states: None)


@pytest.fixture(params=["torch_npu", "mindspeed"])
def vendor(request):
    """Each operator in turn: torch_npu's own, or MindSpeed's beside a torch_npu without it."""
    stand_in_npu.use(request.param)
    registry.refresh()
    if "ascend" not in registry.names():  # a source tree that is not installed
        registry.register(AscendBackend)
    CALLS.clear()
    return request.param


def on_npu(state):
    backend = registry.get("ascend")
    return rau.AttentionState(*(backend.asarray(np.ascontiguousarray(part)) for part in state))


def on_host(state):
    return rau.AttentionState(*(registry.get("ascend").to_numpy(part) for part in state))


def attention(order, seed=0, dtype="float32", heads=8, head_dim=64):
    """Two halves of the keys of four sequences, 64 tokens in all, one of them empty; some queries see one half only."""
    rng = np.random.default_rng(seed)
    q, k, v = rng.standard_normal((3, CUMULATIVE[-1], heads, head_dim))
    states = []
    for half in range(2):
        mine = [range(start, end)[half::2] for start, end in zip(CUMULATIVE, CUMULATIVE[1:], strict=False)]
        keys = np.concatenate([np.array(part, int) for part in mine])
        where = np.concatenate([np.array(part, int) - start for part, start in zip(mine, CUMULATIVE, strict=False)])
        ends = np.concatenate([[0], np.cumsum([len(part) for part in mine])])
        states.append(
            partial_attention(
                q, k[keys], v[keys], causal=True, layout="TND", softmax_layout=order, actual_seq_qlen=CUMULATIVE,
                actual_seq_kvlen=ends, key_positions=where, dtype=dtype,
            )
        )  # fmt: skip
    return states


def test_conformance(vendor, monkeypatch):
    """Every case that the chip takes, against the oracle, in both orders of the statistics."""
    # As for plain tensors, but that those which want a gradient are given one.
    wants = lambda states: any(part.requires_grad for state in states for part in state)  # noqa: E731
    monkeypatch.setattr(torch_op, "graph_of", lambda states: GRAPH_OF(states) if wants(states) else None)
    report = check_backend(AscendBackend())
    assert report.passed, "\n".join(f"{failure.id}: {failure.message}" for failure in report.failures)
    assert len(report.succeeded) > 200


def test_states_of_other_libraries(vendor):
    assert not check_all(AscendBackend())


@pytest.mark.parametrize("order", ["TND", "SBH"])
def test_either_order_of_the_statistics_comes_back_as_it_went_in(vendor, order):
    prev, cur = attention(order)
    ORDERS.clear()
    for lengths in (CUMULATIVE, torch.tensor(CUMULATIVE).to("npu")):
        result = rau.ring_attention_update(*on_npu(prev), *on_npu(cur), lengths, "TND", softmax_layout=order)
        expected = oracle([prev, cur], CUMULATIVE, "TND", softmax_layout=order)
        comparison = compare(on_host(result), expected, tolerance=AscendBackend.capabilities.tolerance)
        assert comparison.passed and comparison.attn_share < 4, comparison
    assert all(part.device == torch.device("npu:0") for part in result)
    names = {name for name, _ in CALLS}
    assert ("npu.npu_ring_attention_update.default" in names) == (vendor == "torch_npu")
    assert ("mindspeed" in names) == (vendor == "mindspeed")
    assert ORDERS == ([{"TND": "TND", "SBH": ""}[order]] * 2 if vendor == "torch_npu" else [])


def test_the_trap(vendor):
    """What the two orders are about: taking one for the other leaves the statistics right and ruins the output."""
    prev, cur = attention("SBH")
    right = on_host(rau.ring_attention_update(*on_npu(prev), *on_npu(cur), CUMULATIVE, "TND", softmax_layout="SBH"))
    wrong = on_host(rau.ring_attention_update(*on_npu(prev), *on_npu(cur), CUMULATIVE, "TND", softmax_layout="TND"))
    assert np.array_equal(right.softmax_max, wrong.softmax_max)
    np.testing.assert_allclose(right.softmax_sum, wrong.softmax_sum, rtol=1e-6)
    assert np.abs(right.attn_out - wrong.attn_out).max() > 0.1


def hostile(order, dtype="float32"):
    """States with rows that the vendor's operator gets wrong, and what the contract says of them."""
    prev, cur = (rau.AttentionState(*(part.copy() for part in state)) for state in attention("TND", dtype=dtype))
    for stats in (*prev[1:], *cur[1:]):
        stats[...] = np.where(np.isfinite(stats), np.abs(stats) + 1, 1)
    prev.softmax_sum[3, 1] = 0  # prev empty, garbage behind it
    prev.attn_out[3, 1] = np.nan
    cur.attn_out[3, 1, :4] = [-0.0, np.inf, np.nan, 5]
    cur.softmax_max[20, 2] = -np.inf  # cur empty
    cur.attn_out[20, 2] = np.inf
    prev.softmax_sum[40, 7] = -0.0  # both
    cur.softmax_max[40, 7] = -np.inf
    prev.attn_out[40, 7] = cur.attn_out[40, 7] = np.nan
    prev.softmax_max[50, 0] = -1e30  # not empty, but without weight
    prev.attn_out[50, 0] = np.nan
    if order == "SBH":
        prev, cur = (
            rau.AttentionState(state[0], *(rau.reorder_softmax(part, CUMULATIVE, to="SBH") for part in state[1:]))
            for state in (prev, cur)
        )
    return prev, cur


@pytest.mark.parametrize("order", ["TND", "SBH"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_that_the_vendor_gets_wrong_are_mended(vendor, order, dtype):
    prev, cur = hostile(order, dtype)
    # The operator alone: not a number wherever something was behind an empty side.
    parts = map(torch.from_numpy, (*prev, *cur))
    alone = stand_in_npu.kernel(*parts, torch.tensor(CUMULATIVE), "TND", order)
    assert alone[0][3, 1].isnan().all() and alone[0][40, 7].isnan().all() and alone[0][50, 0].isnan().all()

    result = on_host(rau.ring_attention_update(*on_npu(prev), *on_npu(cur), CUMULATIVE, "TND", softmax_layout=order))
    reference = rau.ring_attention_update(*prev, *cur, CUMULATIVE, "TND", softmax_layout=order, backend="numpy")
    for row in ((3, 1), (20, 2), (40, 7), (50, 0)):
        assert not same_bits([result.attn_out[row]] * 3, [reference.attn_out[row]] * 3), row
    assert not same_bits([result.softmax_max] * 3, [reference.softmax_max] * 3)
    assert np.array_equal(result.softmax_sum == 0, reference.softmax_sum == 0)
    assert not result.attn_out[40, 7].any() and np.isinf(result.softmax_max).sum() == 8


def test_in_place_and_out(vendor):
    prev, cur = attention("SBH")
    fresh = on_host(rau.ring_attention_update(*on_npu(prev), *on_npu(cur), CUMULATIVE, "TND", softmax_layout="SBH"))
    for target in (0, 1, None):
        states = on_npu(prev), on_npu(cur)
        out = on_npu([np.zeros_like(part) for part in prev]) if target is None else states[target]
        result = rau.ring_attention_update(*states[0], *states[1], CUMULATIVE, "TND", softmax_layout="SBH", out=out)
        assert all(mine is its for mine, its in zip(result, out, strict=True))
        assert not same_bits(on_host(result), fresh)


def test_nothing_waits_for_the_device_and_nothing_large_is_made(vendor):
    for order in ("TND", "SBH"):
        prev, cur = map(on_npu, attention(order))
        lengths = torch.tensor(CUMULATIVE).to("npu")
        CALLS.clear()
        rau.ring_attention_update(*prev, *cur, lengths, "TND", softmax_layout=order, out=prev)
        assert all(name != "to the host" for name, _ in CALLS)
        large = [name for name, size in CALLS if size >= prev.attn_out.numel()]
        assert large == ["npu.npu_ring_attention_update.default" if vendor == "torch_npu" else "mindspeed"]


@pytest.mark.parametrize("K", [1, 3, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_states_stay_on_the_device(vendor, K, dtype):
    states = [state for seed in range(3) for state in attention("TND", seed, dtype)][:K]
    own = [on_npu(state) for state in states]
    CALLS.clear()
    for out in (None, on_npu([np.zeros_like(part) for part in states[0]])):
        result = rau.merge_states(own, layout="TND", out=out)
        assert all(name != "to the host" for name, _ in CALLS)
        comparison = compare(on_host(result), oracle(states, CUMULATIVE, "TND"), tolerance=40)
        assert comparison.passed, comparison
        CALLS.clear()


def test_the_vendors_tensors_are_run_by_it_unasked(vendor):
    prev, cur = attention("TND")
    explanation = rau.explain(*on_npu(prev), *on_npu(cur), CUMULATIVE, "TND")
    assert (explanation.selected, explanation.origin) == ("ascend", "automatic")
    assert str(next(one for one in explanation.verdicts if one.name == "ascend")) == (
        "ascend: within its limits; takes these arrays"
    )


def test_limits_are_those_of_the_operators_that_are_there(vendor):
    out, stats = np.ones((2, 256, 768), np.float32), np.ones((2, 256, 8), np.float32)
    state = on_npu((out, stats, stats))
    call = {"actual_seq_qlen": [0, 2], "layout": "TND", "profile": "cann-v2"}
    assert (on_host(rau.ring_attention_update(*state, *state, **call)).softmax_sum == 2).all()
    wide = on_npu((np.ones((2, 1, 832), np.float32), stats[:, :1], stats[:, :1]))
    with pytest.raises(rau.UnsupportedError, match=r"has D = 832; the limit is 768\."):
        rau.ring_attention_update(*wide, *wide, **call | {"profile": "mindspore"}, backend="ascend")
    # NumPy's arrays on the same machine are judged by the same limits.
    verdicts = rau.explain(out, stats, stats, out, stats, stats, **call | {"profile": "portable"}).verdicts
    assert next(one.limits for one in verdicts if one.name == "ascend") == []


def test_no_tokens(vendor):
    for order in ("TND", "SBH"):
        state = on_npu((np.zeros((0, 2, 64), np.float32), *[np.zeros((0, 2, 8), np.float32)] * 2))
        result = rau.ring_attention_update(*state, *state, [0], "TND", softmax_layout=order)
        assert result.attn_out.shape == (0, 2, 64) and result.attn_out is not state.attn_out


def test_lengths_of_int32_on_the_device(vendor):
    prev, cur = attention("SBH")
    lengths = torch.tensor(CUMULATIVE, dtype=torch.int32).to("npu")
    call = {"layout": "TND", "softmax_layout": "SBH", "profile": "portable"}
    result = rau.ring_attention_update(*on_npu(prev), *on_npu(cur), lengths, **call)
    assert compare(on_host(result), oracle([prev, cur], CUMULATIVE, "TND", softmax_layout="SBH"), tolerance=40).passed


def test_a_wrong_keyword_is_refused_by_the_dispatcher():
    """So a wrong name in the adapter would have failed every test here."""
    state = [torch.ones(4, 1, 16).to("npu"), *[torch.ones(1, 2, 4, 8).to("npu")] * 2]
    with pytest.raises(RuntimeError, match="Unknown keyword argument 'layout'"):
        torch.ops.npu.npu_ring_attention_update(*state, *state, layout="SBH")
    with pytest.raises(RuntimeError, match="at most 6 argument|takes 6 positional|positional"):
        torch.ops.npu.npu_ring_attention_update(*state, *state, None, "SBH")


@pytest.mark.parametrize("order", ["", "SBH", "TND"])
def test_compat_is_the_same_call_as_torch_npu(order):
    stand_in_npu.use("torch_npu")
    registry.refresh()
    if "ascend" not in registry.names():
        registry.register(AscendBackend)
    import torch_npu

    prev, cur = map(on_npu, attention(order or "SBH"))
    lengths = torch.tensor(CUMULATIVE).to("npu")
    options = {"actual_seq_qlen": lengths, "input_layout": "TND", "input_softmax_layout": order}
    theirs = torch_npu.npu_ring_attention_update(*prev, *cur, **options)
    ours = rau.compat.npu_ring_attention_update(*prev, *cur, **options)
    assert type(ours) is tuple and len(ours) == 3
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(mine.held, its.held)


def test_gradients_are_ours(vendor, monkeypatch):
    """No vendor has one: the forward runs on the chip's operator, the backward on ATen."""
    monkeypatch.setattr(torch_op, "graph_of", GRAPH_OF)
    prev, cur = attention("TND")
    inputs = [part.clone().requires_grad_() for state in (prev, cur) for part in map(torch.from_numpy, state)]
    own = [part.detach().to("npu").requires_grad_() for part in inputs]
    CALLS.clear()
    for leaves in (inputs, own):
        rau.ring_attention_update(*leaves, CUMULATIVE, "TND").attn_out.square().sum().backward()
    assert any("ring_attention_update" in name or name == "mindspeed" for name, _ in CALLS)
    for one, other in zip(inputs, own, strict=True):
        torch.testing.assert_close(other.grad.held, one.grad, rtol=1e-4, atol=1e-5)
