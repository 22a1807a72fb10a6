"""merge_states: any number of states in one pass, in a list or stacked, with the same bits everywhere."""

import numpy as np
import pytest
from running import laid_out, on_host, own, partial, same

import rau
from rau.testing import compare, oracle

SHAPES = "(K, S, B, H), (K, B, N, S, 8), (K, B, N, S, 8) with K >= 1."


def states(K, layout="SBH", dtype="float32", packed=False):
    return [laid_out(partial(2, 5, 2, 8, dtype, seed), layout, packed) for seed in range(K)]


def stacked(states):
    return rau.AttentionState(*(np.stack(parts) for parts in zip(*states, strict=True)))


def options(layout, packed):
    if layout != "TND":
        return {"layout": layout}
    return {"layout": layout, "actual_seq_qlen": [0, 5, 10], "softmax_layout": "SBH" if packed else "TND"}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("K", [1, 2, 3, 7, 64, 133])
def test_any_number_of_states_within_the_bound_and_with_the_same_bits(any_backend, K, dtype):
    backend = rau.registry.get(any_backend)
    if dtype not in backend.capabilities.dtypes:
        pytest.skip(f"{any_backend} does not take {dtype}")
    parts = states(K, dtype=dtype)
    result = on_host(backend, rau.merge_states([own(backend, part) for part in parts], backend=any_backend))
    comparison = compare(result, oracle(parts), tolerance=backend.capabilities.tolerance)
    assert comparison.passed, comparison.problems
    if backend.capabilities.tolerance == 1:
        same(result, rau.merge_states(parts, backend="numpy"))


@pytest.mark.parametrize("layout", ["SBH", "BSND", "BNSD", "TND", "packed"])
@pytest.mark.parametrize("K", [1, 3, 64])
def test_stacked_arrays_are_so_many_states(any_backend, K, layout):
    backend = rau.registry.get(any_backend)
    call = options("TND" if layout == "packed" else layout, layout == "packed")
    parts = states(K, call["layout"], packed=layout == "packed")
    expected = rau.merge_states(parts, backend="numpy", **call)
    stack = own(backend, stacked(parts))
    for given in (stack, tuple(stack), list(stack)):
        result = on_host(backend, rau.merge_states(given, backend=any_backend, **call))
        if backend.capabilities.tolerance == 1:
            same(result, expected)
    out = own(backend, rau.AttentionState(*map(np.zeros_like, expected)))
    assert rau.merge_states(stack, out=out, backend=any_backend, **call).attn_out is out.attn_out
    same(on_host(backend, out), on_host(backend, rau.merge_states(stack, backend=any_backend, **call)))


def test_stacked_arrays_are_seen_where_they_are(monkeypatch):
    """As views: nothing of their size is allocated but the result."""
    backend = rau.registry.get("numpy")
    merge, given = backend.merge, []
    monkeypatch.setattr(backend, "merge", lambda problem, states, out: (given.extend(states), merge(problem, states, out))[1])
    stack = stacked(states(3))
    rau.merge_states(stack, backend="numpy")
    assert len(given) == 3
    for k, state in enumerate(given):
        for mine, its in zip(state, stack, strict=True):
            assert np.shares_memory(mine, its[k])


def test_three_states_in_a_tuple_are_no_stack():
    parts = states(3)
    same(rau.merge_states(tuple(parts)), rau.merge_states(parts))
    same(rau.merge_states(tuple(map(tuple, parts))), rau.merge_states(parts))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (states(1)[0], "states is one AttentionState; expected a list of AttentionStates, "),
        (stacked(states(2))._replace(softmax_sum=states(1)[0].softmax_sum), "(2, 2, 2, 5, 8), (2, 2, 5, 8); if stacked"),
        (stacked(states(2))._replace(softmax_sum=stacked(states(3)).softmax_sum), SHAPES),
        (rau.AttentionState(*(part[:0] for part in stacked(states(2)))), SHAPES),
        (stacked([stacked(states(2))]), SHAPES),
    ],
)  # fmt: skip
def test_a_wrong_stack_is_refused(given, says):
    with pytest.raises(rau.ShapeError) as caught:
        rau.merge_states(given)
    assert caught.value.rules == ("states",)
    assert says in str(caught.value)


def test_what_is_wrong_inside_a_stack_is_named():
    with pytest.raises(rau.DTypeError, match=r"states\[0\]\.attn_out has dtype int32"):
        rau.merge_states(stacked(states(2))._replace(attn_out=np.zeros((2, 5, 2, 16), "i4")))
    with pytest.raises(rau.LayoutError, match="layout = 'SHB'"):
        rau.merge_states(stacked(states(2)), layout="SHB")
    with pytest.raises(rau.DTypeError, match=r"states\[0\]\.softmax_max is None"):
        rau.merge_states(states(1)[0]._replace(softmax_max=None))


def test_a_compiled_stack_has_a_gradient():
    torch = pytest.importorskip("torch")
    parts = [laid_out(partial(2, 5, 2, 8, "float64", seed, awkward=False), "SBH") for seed in range(3)]
    stack = own(rau.registry.get("torch"), stacked(parts))
    compiled = torch.compile(lambda *stack: rau.merge_states(stack).attn_out, fullgraph=True, dynamic=True, backend="eager")
    eager = [part.clone().requires_grad_() for part in stack]
    traced = [part.clone().requires_grad_() for part in stack]
    result, again = rau.merge_states(rau.AttentionState(*eager)).attn_out, compiled(*traced)
    assert torch.equal(result, again)
    for output in (result, again):
        (output**2).sum().backward()
    for mine, its in zip(eager, traced, strict=True):
        assert torch.equal(mine.grad, its.grad)
    same([result.detach().numpy()], rau.merge_states(parts)[:1])
