"""AttentionState from and to log-sum-exp, on torch tensors: views, the bits of NumPy, gradients, compile, devices."""

import math
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_state import FORMS, HARD, QLEN, TND, finite

import rau
from rau import AttentionState, reorder_softmax
from rau.testing.comparison import same_bits

if "torch" in os.environ.get("RAU_TEST_BACKENDS", ""):
    import torch  # asked for: its absence is a failure
else:
    torch = pytest.importorskip("torch", reason="torch is not installed and was not asked for")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
INF, NAN = math.inf, math.nan
BACKENDS = ["cython", "numpy", "torch"]


def pair(layout, lse_layout, dtype=torch.float32, seed=0):
    """An output and its log-sum-exp in the shapes of FORMS."""
    generator = torch.Generator().manual_seed(seed)
    shape, lse_shape = FORMS[layout, lse_layout]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return out, torch.randn(lse_shape, generator=generator, dtype=torch.float64).mul(4).to(wide)


def numbers(lse, dtype=np.float32):
    """One token of one head for each number, in layout TND: NumPy's and torch's."""
    lse = np.array(lse, dtype).reshape(-1, 1)
    out = np.ones((len(lse), 1, 4), dtype)
    return (out, lse), (torch.from_numpy(out), torch.from_numpy(lse))


# ---- views --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("layout", "lse_layout"), FORMS)
def test_base_e_is_made_of_views(layout, lse_layout, dtype):
    attn_out, lse = pair(layout, lse_layout, dtype)
    options = {"base": "e", "layout": layout, "lse_layout": lse_layout}
    state = AttentionState.from_lse(attn_out, lse, **options, lanes=8)
    assert state.attn_out is attn_out
    assert state.softmax_max.data_ptr() == lse.data_ptr()
    rows = lse.mT if lse_layout in ("BSN", "NT") else lse
    assert state.softmax_max.stride() == state.softmax_sum.stride() == (*rows.stride(), 0)
    assert state.softmax_sum.untyped_storage().nbytes() == lse.nbytes
    assert all(part.shape == (*rows.shape, 8) and part.dtype == lse.dtype for part in state[1:])
    assert all(part.shape == (*rows.shape, 1) for part in AttentionState.from_lse(attn_out, lse, **options)[1:])
    assert torch.equal(state.lse(**options), lse)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("layout", "lse_layout"), FORMS)
def test_no_copy_on_the_way_to_a_backend(layout, lse_layout, backend, monkeypatch):
    from rau.arrays.torch_ import TorchKind

    states = [AttentionState.from_lse(*pair(layout, lse_layout, seed=seed), base="e", layout=layout, lse_layout=lse_layout)
              for seed in range(3)]  # fmt: skip
    whole = [AttentionState(*(part.contiguous() for part in state)) for state in states]
    expected = rau.merge_states(whole, layout=layout, backend=backend)
    monkeypatch.setattr(TorchKind, "regular_copy", None)  # nobody calls it
    merged = rau.merge_states(states, layout=layout, backend=backend)
    assert not same_bits([part.numpy() for part in expected], [part.numpy() for part in merged])


# ---- numbers ------------------------------------------------------------------------------------------------------


@given(st.lists(finite | st.sampled_from([INF, -INF, NAN]), min_size=1, max_size=20), st.sampled_from("e2"), st.booleans())
def test_the_bits_of_numpy(lse, base, inf_is_empty):
    arrays, tensors = numbers(lse)
    options = {"base": base, **TND, "inf_is_empty": inf_is_empty}
    one, other = AttentionState.from_lse(*arrays, **options), AttentionState.from_lse(*tensors, **options)
    assert not same_bits(one, [part.numpy() for part in other])


@given(st.lists(st.floats() | st.floats(-100, 100), min_size=1, max_size=20), st.sampled_from("e2"), st.booleans())
def test_the_bits_of_numpy_of_a_float64_log_sum_exp(lse, base, inf_is_empty):
    """Beside a float32 output."""
    out, lse = np.ones((len(lse), 1, 4), np.float32), np.array(lse).reshape(-1, 1)
    options = {"base": base, **TND, "inf_is_empty": inf_is_empty}
    one = AttentionState.from_lse(out, lse, **options)
    other = AttentionState.from_lse(torch.from_numpy(out), torch.from_numpy(lse), **options)
    assert other.softmax_sum.dtype == torch.float32
    assert not same_bits(one, [part.numpy() for part in other])


def test_the_bits_of_numpy_on_many_numbers():
    rng = np.random.default_rng(0)
    lse = np.concatenate([rng.normal(0, scale, 200_000) for scale in (1, 30, 1e4, 1e9, 1e12)])
    for dtype in (np.float32, np.float64):
        arrays, tensors = numbers(lse, dtype)
        one, other = (AttentionState.from_lse(*given, base="2", **TND) for given in (arrays, tensors))
        assert not same_bits(one, [part.numpy() for part in other])


@given(st.lists(finite | st.sampled_from([INF, -INF, NAN, *HARD]), min_size=1, max_size=20))
def test_round_trips(lse):
    _, (attn_out, lse) = numbers(lse)
    for base in ("e", "2"):
        back = AttentionState.from_lse(attn_out, lse, base=base, **TND).lse(base=base, **TND).numpy()
        given_, size = lse.numpy(), np.abs(lse.numpy())
        exactly = np.full(size.shape, True) if base == "e" else ~((size < 2) | (np.isfinite(given_) & (size > 2.0**30)))
        np.testing.assert_array_equal(back[exactly], given_[exactly])
        with np.errstate(invalid="ignore"):
            apart = np.abs(back - given_)
        small, large = ~exactly & (size < 2), ~exactly & (size >= 2)
        assert (apart[small] <= 2.0**-23).all()
        assert (apart[large] <= np.spacing(size[large])).all()


@given(
    st.lists(st.tuples(finite, st.floats(2.0**-126, 2.0**127, width=32)), min_size=1, max_size=20), st.sampled_from("e2")
)
def test_lse_is_that_of_numpy(rows, base):
    """To the last bit but one: the two have logarithms of their own, in float64."""
    stats = np.array(rows, np.float32)[:, :, None, None]
    one = AttentionState(None, stats[:, 0], stats[:, 1]).lse(base=base, **TND)
    other = AttentionState(None, *map(torch.from_numpy, (stats[:, 0], stats[:, 1]))).lse(base=base, **TND).numpy()
    both = np.isfinite(one)
    np.testing.assert_array_equal(other[~both], one[~both])
    # Where m and log(l) cancel, a unit in the last place of the logarithm is larger than one of the result.
    one, other, m = one[both], other[both], np.abs(stats[:, 0, :, 0].astype(np.float64))[both]
    assert (np.abs(other - one) <= np.spacing(np.abs(one)) + 2.0**-52 * m).all()


@pytest.mark.parametrize("base", ["e", "2"])
def test_special_rows(base):
    _, (attn_out, lse) = numbers([-INF, INF, NAN, 0.5])
    attn_out[:2] = NAN
    state = AttentionState.from_lse(attn_out, lse, base=base, **TND, inf_is_empty=True)
    back = state.lse(base=base, **TND)[:, 0].tolist()
    assert back[:2] == [-INF, -INF] and math.isnan(back[2]) and back[3] == 0.5
    other = AttentionState.from_lse(torch.full_like(attn_out, 3), torch.zeros_like(lse), base=base, **TND)
    merged = rau.merge_states([state, other], layout="TND")
    assert (merged.attn_out[:2] == 3).all() and merged.attn_out[2].isnan().all()
    as_it_is = AttentionState.from_lse(attn_out, lse, base=base, **TND).lse(base=base, **TND)
    assert as_it_is[1] == INF


def test_packed_statistics():
    stats = torch.arange(8 * 3 * 8, dtype=torch.float32).view(8, 3, 8).requires_grad_()
    for lanes in (stats, stats[..., 0], stats[..., :1].expand(8, 3, 8), stats.bool()):
        for lengths in (QLEN, torch.tensor(QLEN), torch.tensor(QLEN, dtype=torch.int32)):
            packed = reorder_softmax(lanes, lengths, to="SBH")
            assert torch.equal(packed, torch.from_numpy(reorder_softmax(lanes.detach().numpy(), QLEN, to="SBH")))
            assert torch.equal(reorder_softmax(packed, lengths, to="TND"), lanes)
    weights = torch.randn(8, 3, 8)
    (grad,) = torch.autograd.grad((reorder_softmax(stats, QLEN, to="SBH") * weights).sum(), stats)
    assert torch.equal(grad, reorder_softmax(weights, QLEN, to="TND"))
    maximum = torch.randn(8, 3, 1, dtype=torch.float64, requires_grad=True)
    total = torch.rand(8, 3, 1, dtype=torch.float64, requires_grad=True)
    packed = AttentionState(None, *(reorder_softmax(part, QLEN, to="SBH") for part in (maximum, total)))
    got = packed.lse(base="e", layout="TND", softmax_layout="SBH", actual_seq_qlen=QLEN, lse_layout="NT")
    expected = (maximum + total.log())[..., 0].mT
    torch.testing.assert_close(got, expected)
    for one, other in zip(*(torch.autograd.grad(part.sum(), [maximum, total]) for part in (got, expected)), strict=True):
        torch.testing.assert_close(one, other)


# ---- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inf_is_empty", [False, True])
@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize(("layout", "lse_layout"), [("SBH", None), ("BSND", "BSN"), ("BNSD", None), ("TND", "NT")])
def test_gradients_through_the_whole_pipe(layout, lse_layout, base, inf_is_empty):
    """From the pairs that kernels hand out to the merged output and log-sum-exp, a row without keys among them."""
    given_ = [part for seed in (1, 2) for part in pair(layout, lse_layout, torch.float64, seed)]
    given_[1].view(-1)[0] = given_[3].view(-1)[1] = INF if inf_is_empty else -INF
    for part in given_:
        part.requires_grad_()
    options = {"base": base, "layout": layout, "lse_layout": lse_layout}

    def pipe(out, lse, cur_out, cur_lse):
        pairs = ((out, lse), (cur_out, cur_lse))
        states = [AttentionState.from_lse(*each, **options, inf_is_empty=inf_is_empty) for each in pairs]
        merged = rau.merge_states(states, layout=layout)
        return merged.attn_out, merged.lse(**options)

    live = [part.isfinite() for part in given_]

    def of_live(*values):  # an infinity has no numerical gradient
        return pipe(*(torch.where(alive, value, part.detach())
                      for alive, value, part in zip(live, values, given_, strict=True)))  # fmt: skip

    values = [torch.where(alive, part.detach(), 0.0).requires_grad_() for alive, part in zip(live, given_, strict=True)]
    assert torch.autograd.gradcheck(of_live, values)
    grads = torch.autograd.grad([part.sum() for part in pipe(*given_)], given_)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_a_float64_log_sum_exp(base, dtype):
    """It arrives in float64, and is that of the float32 numbers up to their rounding."""
    how = {"base": base, **TND}
    pairs = [pair("TND", "TN", dtype, seed) for seed in (1, 2)]
    upstream, grads = torch.randn(pairs[0][0].shape).to(dtype), []
    for wide in (torch.float64, torch.float32):
        lses = [lse.to(wide).requires_grad_() for _, lse in pairs]
        states = [AttentionState.from_lse(out, lse, **how) for (out, _), lse in zip(pairs, lses, strict=True)]
        merged = rau.merge_states(states, layout="TND")
        loss = (merged.attn_out * upstream).sum() + merged.lse(**how).sum()
        grads.append(torch.autograd.grad(loss, lses))
        assert all(grad.dtype == wide for grad in grads[-1])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=1e-5, atol=1e-5)


def test_gradient_of_a_row_without_keys_is_zero():
    lse = torch.tensor([[-INF, 0.5]], dtype=torch.float64).T.requires_grad_()
    state = AttentionState.from_lse(torch.ones(2, 1, 4, dtype=torch.float64), lse, base="e", **TND)
    (grad,) = torch.autograd.grad(state.lse(base="e", **TND).nan_to_num(neginf=0).sum(), lse)
    assert grad[:, 0].tolist() == [0, 1]


def test_compile_of_the_whole_pipe():
    def pipe(out, lse, cur_out, cur_lse):
        one = AttentionState.from_lse(out, lse, base="e", layout="BNSD", inf_is_empty=True)
        other = AttentionState.from_lse(cur_out, cur_lse, base="2", layout="BNSD")
        merged = rau.merge_states([one, other], layout="BNSD")
        return merged.attn_out, merged.lse(base="2", layout="BNSD", lse_layout="BSN")

    given_ = [part.requires_grad_() for seed in (1, 2) for part in pair("BNSD", None, seed=seed)]
    compiled = torch.compile(pipe, fullgraph=True)
    results = [call(*given_) for call in (pipe, compiled)]
    torch.testing.assert_close(results[0], results[1])
    grads = [torch.autograd.grad([part.sum() for part in result], given_) for result in results]
    torch.testing.assert_close(grads[0], grads[1])


def test_compile_for_any_number_of_tokens():
    """One graph, though what the kinds remember of dtypes and types grows while it is made."""

    def pipe(*pairs):
        states = [AttentionState.from_lse(*pair, base="e", layout="TND", lse_layout="NT") for pair in pairs]
        merged = rau.merge_states(states, layout="TND")
        return merged.attn_out, merged.lse(base="e", layout="TND", lse_layout="NT")

    seen = []

    def count(graph, inputs):
        seen.append(graph)
        return graph

    compiled = torch.compile(pipe, fullgraph=True, dynamic=True, backend=count)
    for tokens in (7, 9, 12):
        pairs = [(torch.randn(tokens, 3, 8), torch.randn(3, tokens)) for _ in range(2)]
        for one, other in zip(compiled(*pairs), pipe(*pairs), strict=True):
            assert torch.equal(one, other)
    assert len(seen) == 1


# ---- kinds and devices --------------------------------------------------------------------------------------------


def test_on_their_device():
    out, lse = (part.to("meta") for part in pair("TND", "NT"))
    for base in ("e", "2"):
        options = {"base": base, "layout": "TND", "lse_layout": "NT"}
        state = AttentionState.from_lse(out, lse, **options, inf_is_empty=True)
        assert {part.device.type for part in state} == {"meta"}
        back = state.lse(**options)
        assert (back.device.type, back.shape) == ("meta", lse.shape)
        lengths = torch.tensor([0, 3], device="meta")
        back = state.lse(base=base, **TND, softmax_layout="SBH", actual_seq_qlen=lengths)
        assert (back.device.type, back.shape) == ("meta", lse.mT.shape)


def test_refused():
    out, lse = pair("BNSD", None)
    options = {"base": "e", "layout": "BNSD"}
    with pytest.raises(rau.DTypeError) as caught:
        AttentionState.from_lse(out, lse.numpy(), **options)
    assert str(caught.value) == (
        "AttentionState.from_lse: [array-kind] lse is a numpy array and attn_out a torch one; expected one kind for both. "
        "Convert one of them first."
    )
    with pytest.raises(rau.ConstraintError, match="lse is on meta and attn_out on cpu; expected one device for both"):
        AttentionState.from_lse(out, lse.to("meta"), **options)
    with pytest.raises(rau.DTypeError) as caught:
        AttentionState.from_lse(out.bfloat16(), lse.bfloat16(), **options)
    assert str(caught.value) == (
        "AttentionState.from_lse: [dtype-stats] lse has dtype bfloat16; expected one of float32, float64. Compute it in float32, "
        "with autocast off; or pass lse.float(), at the price of 8 significant bits: weights are off by up to abs(lse) * 2**-9."
    )
    with pytest.raises(rau.DTypeError, match=r"expected float64. Pass lse.double\(\), which is exact."):
        AttentionState.from_lse(out.double(), lse, **options)
    with pytest.raises(rau.ShapeError, match="It looks like \\(B, N, S\\): pass lse_layout=\"BNS\""):
        AttentionState.from_lse(out, lse, **options, lse_layout="BSN")
    state = AttentionState.from_lse(out, lse, **options)
    with pytest.raises(rau.DTypeError, match="softmax_sum is a numpy array and softmax_max a torch one"):
        state._replace(softmax_sum=state.softmax_sum.numpy()).lse(**options)
    with pytest.raises(rau.ConstraintError, match=r"actual_seq_qlen is not on the host and stats is a NumPy array;"):
        reorder_softmax(np.zeros((3, 2)), torch.tensor([0, 3], device="meta"), to="TND")


def test_lanes_of_stride_0_are_no_out():
    """One lane may be written, and is the log-sum-exp's memory."""
    how = {"base": "e", "layout": "TND", "lse_layout": "TN"}
    given = torch.ones(3, 4, 5), torch.zeros(3, 4)
    run = AttentionState.from_lse(*given, **how, lanes=8)
    with pytest.raises(rau.ShapeError, match=r"^merge_states: \[out-writable\] out\.softmax_max and out\.softmax_sum have "):
        rau.merge_states([run, run], layout="TND", out=run)
    run = AttentionState.from_lse(*given, **how)
    rau.merge_states([run, run], layout="TND", out=run)
    assert run.softmax_sum.eq(2).all()


def test_mindspore_tensors_are_refused_with_what_to_do(monkeypatch):
    class Tensor:
        shape, dtype = (3, 2), "Float32"

    Tensor.__module__, Tensor.__qualname__ = "mindspore.common.tensor", "Tensor"
    monkeypatch.setitem(sys.modules, "mindspore.common.tensor", SimpleNamespace(Tensor=Tensor))
    out, _ = pair("TND", "TN")
    with pytest.raises(rau.DTypeError) as caught:
        AttentionState.from_lse(out, Tensor(), base="e", **TND)
    assert str(caught.value) == (
        "AttentionState.from_lse: [array] lse is a mindspore array; expected an array of NumPy, torch or JAX. "
        "Convert it: lse.asnumpy()."
    )


@pytest.mark.parametrize("base", ["e", "2"])
def test_from_max_sum_on_tensors(base):
    """NumPy's bits, and a gradient to all three; that of the maximum to base 2 is ln 2 of that of the natural one."""
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(3, 4, 5)), rng.normal(size=(3, 4)) * 50, rng.uniform(1, 9, (3, 4))
    how = {"base": base, "layout": "TND", "stats_layout": "TN"}
    for dtype in ("float32", "float64"):
        numbers = [array.astype(dtype) for array in arrays]
        tensors = [torch.from_numpy(array).requires_grad_() for array in numbers]
        state = AttentionState.from_max_sum(*tensors, **how)
        for mine, its in zip(state, AttentionState.from_max_sum(*numbers, **how), strict=True):
            np.testing.assert_array_equal(mine.detach().numpy(), its)
        lse = state.lse(base="e", layout="TND", lse_layout="TN")
        grads = torch.autograd.grad(lse.sum(), tensors[1:])
        torch.testing.assert_close(grads[0], torch.full_like(grads[0], 1 if base == "e" else np.log(2)))
        torch.testing.assert_close(grads[1], 1 / tensors[2].detach())


def test_sums_that_float32_does_not_have_on_tensors():
    arrays = np.ones((4, 1, 2), "f4"), np.full((4, 1), 200.0), np.array([1e-60, 1e60, 1e300, 3.0])[:, None]
    how = {"layout": "TND", "stats_layout": "TN", "base": "2"}
    for mine, its in zip(AttentionState.from_max_sum(*map(torch.from_numpy, arrays), **how),
                         AttentionState.from_max_sum(*arrays, **how), strict=True):  # fmt: skip
        np.testing.assert_array_equal(mine.numpy(), its)


@pytest.mark.parametrize("statistics", [0, None, "no", np.False_])
def test_whether_statistics_are_wanted_is_asked_before_there_is_a_graph(statistics):
    state = [torch.ones(2, 1, 4, requires_grad=True), *(torch.ones(1, 1, 2, 1) for _ in range(2))]
    with pytest.raises(rau.OptionError, match="statistics is"):
        rau.merge_states([state], statistics=statistics)


def test_a_state_says_where_its_tensors_are():
    stats = torch.ones(1, 2, 3, 8)
    state = AttentionState(torch.ones(3, 1, 8, dtype=torch.bfloat16, device="meta"), stats.clone().requires_grad_(), stats)
    assert repr(state).split("\n")[1:3] == [
        "  attn_out     bfloat16 (3, 1, 8), torch on meta", "  softmax_max  float32 (1, 2, 3, 8), torch on cpu, requires grad"
    ]  # fmt: skip


def test_a_state_is_saved_and_loaded_without_pickled_classes(tmp_path):
    """As interop.md says."""
    stats = torch.ones(1, 2, 3, 8)
    state = AttentionState(torch.ones(3, 1, 16), stats, 2 * stats)
    torch.save(state._asdict(), tmp_path / "named.pt")
    loaded = AttentionState(**torch.load(tmp_path / "named.pt", weights_only=True))
    torch.save(state, tmp_path / "state.pt")
    with torch.serialization.safe_globals([AttentionState]):
        whole = torch.load(tmp_path / "state.pt", weights_only=True)
    assert type(whole) is AttentionState
    for mine, *others in zip(state, loaded, whole, strict=True):
        assert all(torch.equal(mine, other) for other in others)
