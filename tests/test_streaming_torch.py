"""StreamingMerge of torch tensors: the same bits, in place, nothing allocated, no gradients, no tracing."""

import os
import tracemalloc

import numpy as np
import pytest
from running import Chain, half, laid_out, on_host, own, partial, same

import rau

if "torch" in os.environ.get("RAU_TEST_BACKENDS", ""):
    import torch  # asked for: its absence is a failure
else:
    torch = pytest.importorskip("torch", reason="torch is not installed and was not asked for")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def tensors(state):
    return own(rau.registry.get("torch"), state)


def arrays(state):
    return on_host(rau.registry.get("torch"), state)


def sbh(S=4, dtype="float32", seed=0):
    return tensors(laid_out(partial(1, S, 2, 8, dtype, seed), "SBH"))


@pytest.mark.parametrize("backend", [None, "cython", "numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_the_same_bits_as_numpy_arrays(backend, dtype):
    ring, chain = rau.StreamingMerge("BSND", backend=backend), Chain(2, 8, 2, 8, dtype)
    for seed, tokens in enumerate([None, "back", None, "front", slice(0, 8, 3)]):
        where = half(tokens, 8) if isinstance(tokens, str) else tokens or slice(None)
        cur = partial(2, len(range(8)[where]), 2, 8, dtype, seed)
        ring.update(*tensors(cur), tokens=tokens)
        chain.update(cur, where)
    assert all(type(part) is torch.Tensor for part in ring.result())
    same(arrays(ring.result()), chain.state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float16, torch.float32], ids=str)
def test_dtypes_are_taken_as_torch_names_them(dtype):
    ring = rau.StreamingMerge()
    ring.update(*sbh())
    wide, result = ring.result(), ring.result(dtype)
    assert str(result.attn_out.dtype).endswith(str(dtype).rpartition(".")[2])
    assert torch.equal(result.attn_out.isnan(), wide.attn_out.isnan())
    assert torch.equal(result.attn_out.nan_to_num(), wide.attn_out.to(result.attn_out.dtype).nan_to_num())
    assert result.attn_out.data_ptr() != ring.running.attn_out.data_ptr()


def test_transposed_views_are_taken_where_they_are():
    """What scaled_dot_product_attention hands out is BNSD; SBH's and BSND's are views of it."""
    chain, ring = Chain(1, 8, 2, 8), rau.StreamingMerge("BSND")
    for seed, tokens in enumerate([None, "back"]):
        cur = partial(1, 8 if tokens is None else 4, 2, 8, seed=seed)
        given = tensors(laid_out(cur, "BNSD"))
        ring.update(given.attn_out.transpose(1, 2), *given[1:], tokens=tokens)
        chain.update(cur, slice(None) if tokens is None else half(tokens, 8))
    same(arrays(ring.result()), chain.state)


@pytest.mark.parametrize("softmax_layout", ["TND", "SBH"])
@pytest.mark.parametrize("tokens", [None, "front", "back"])
def test_no_update_after_the_first_allocates(tokens, softmax_layout):
    """Measured: torch's allocator by its profiler, Python and NumPy by tracemalloc."""
    pytest.importorskip("rau._core")
    ring = rau.StreamingMerge("TND", actual_seq_qlen=[0, 512, 4096], softmax_layout=softmax_layout)
    packed = softmax_layout == "SBH"
    whole, part = (
        tensors(laid_out(partial(1, S, 4, 64, "bfloat16", awkward=False), "TND", packed)) for S in (4096, 2048)
    )
    ring.update(*whole)
    cur = whole if tokens is None else part
    ring.update(*cur, tokens=tokens)
    places = [tensor.data_ptr() for tensor in ring.running]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ring.update(*cur, tokens=tokens)
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages()) < 20_000
    tracemalloc.start()
    try:
        ring.update(*cur, tokens=tokens)
        assert tracemalloc.get_traced_memory()[1] < 20_000
    finally:
        tracemalloc.stop()
    assert places == [tensor.data_ptr() for tensor in ring.running]


@pytest.mark.parametrize("field", range(3))
def test_what_requires_grad_is_refused_by_name(field):
    ring = rau.StreamingMerge()
    ring.update(*sbh())
    before = arrays(ring.result())
    cur = list(sbh(seed=1))
    cur[field].requires_grad_()
    for call in (
        lambda: ring.update(*cur),
        lambda: rau.StreamingMerge().update(*cur),
        lambda: rau.StreamingMerge(like=cur),
    ):
        with pytest.raises(
            rau.UnsupportedError, match="an input requires grad; .*Use rau.merge_states.*or call under torch.no_grad"
        ):
            call()
    same(arrays(ring.result()), before)
    with torch.no_grad():
        ring.update(*cur)
    assert not any(part.requires_grad for part in ring.result())


def test_inference_mode_is_no_matter():
    with torch.inference_mode():
        ring = rau.StreamingMerge()
        ring.update(*sbh())
        ring.update(*sbh(2), tokens="back")
        assert ring.result().attn_out.shape == (4, 1, 16)


def ring_of_two(first, second):
    ring = rau.StreamingMerge()
    ring.update(*first)
    ring.update(*second)
    return ring.result().attn_out


def test_torch_compile_breaks_its_graph_around_a_ring():
    torch._dynamo.reset()
    states = sbh(), sbh(seed=1)
    expected = ring_of_two(*states)
    assert torch.equal(torch.compile(ring_of_two, backend="eager")(*states), expected)
    ring = rau.StreamingMerge()
    ring.update(*states[0])

    def hop(ring, state):  # a caller with a graph of its own on both sides
        ring.update(*(part + 0 for part in state))
        return ring.result().attn_out * 2

    assert torch.equal(torch.compile(hop, backend="eager")(ring, states[1]), 2 * expected)
    asking = [states[0], [part.clone().requires_grad_() for part in states[1]]]
    with pytest.raises(rau.UnsupportedError, match="an input requires grad; a state"):
        torch.compile(ring_of_two, backend="eager")(*asking)


def test_a_trace_is_refused_by_name():
    torch._dynamo.reset()
    states = sbh(), sbh(seed=1)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="StreamingMerge is written in place, .* Use rau.merge_states"):
        torch.compile(ring_of_two, fullgraph=True, backend="eager")(*states)


def exported(states):
    class Ring(torch.nn.Module):
        def forward(self, *parts):
            return ring_of_two(parts[:3], parts[3:])

    return torch.export.export(Ring(), (*states[0], *states[1]), strict=False)


def transformed(states):
    return torch.func.vmap(ring_of_two)(*([part[None] for part in state] for state in states))


def forward_mode(states):
    with torch.autograd.forward_ad.dual_level():
        return ring_of_two(*states)


def of_a_subclass(states):
    class Tagged(torch.Tensor):
        pass

    return ring_of_two(states[0], [part.as_subclass(Tagged) for part in states[1]])


REASONS = {
    exported: "torch traces the call; .* Use rau.merge_states, which has both, or call it outside of the graph",
    transformed: "a transform of torch.func is at work; .* You may call it outside of the transform",
    forward_mode: "forward-mode AD is at work; .* You may call it outside of torch.autograd.forward_ad",
    of_a_subclass: "an input is a Tagged, a subclass of torch.Tensor; .* Use rau.merge_states, which has both, or pass plain tensors",
}


@pytest.mark.parametrize("call", REASONS, ids=lambda call: call.__name__)
def test_one_reason_is_given_and_it_applies(call):
    with pytest.raises(Exception, match=f"StreamingMerge.update: {REASONS[call]}") as refused:
        call((sbh(), sbh(seed=1)))
    assert "requires grad" not in str(refused.value)


def test_lengths_as_a_tensor():
    cur = [partial(2, S, 2, 8, seed=S) for S in (4, 2)]
    results = []
    for ends in ([0, 4, 8], torch.tensor([0, 4, 8])):
        ring = rau.StreamingMerge("TND", actual_seq_qlen=ends, softmax_layout="SBH")
        ring.update(*tensors(laid_out(cur[0], "TND", packed=True)))
        ring.update(*tensors(laid_out(cur[1], "TND", packed=True)), tokens="back")
        results.append(arrays(ring.result()))
    same(*results)


def test_numpy_arrays_into_a_running_state_of_tensors():
    ring = rau.StreamingMerge()
    ring.update(*sbh())
    with pytest.raises(rau.DTypeError, match="attn_out is a numpy array and the running attn_out a torch one"):
        ring.update(*arrays(sbh()))
    with pytest.raises(rau.DTypeError, match="attn_out is a numpy array and the running attn_out at `tokens` a torch one"):
        ring.update(*(np.array(part) for part in arrays(sbh(2))), tokens="front")


@pytest.mark.parametrize("tokens", [None, "back"])
def test_a_view_of_the_running_state_is_no_partial_state(tokens):
    ring = rau.StreamingMerge()
    ring.update(*sbh())
    cur = list(sbh() if tokens is None else sbh(2))
    cur[0] = ring.running.attn_out if tokens is None else ring.running.attn_out[1:3]
    with pytest.raises(rau.ShapeError, match="attn_out shares memory with the running state"):
        ring.update(*cur, tokens=tokens)
