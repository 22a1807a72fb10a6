"""merge_states: any number of states in one pass, in a list or stacked, with the same bits everywhere."""

import tracemalloc

import numpy as np
import pytest
from conftest import BACKENDS
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


# ------------------------------------------------------------------------------------------------- 1 lane beside 8


def one_lane(state):
    return state._replace(softmax_max=state.softmax_max[..., :1].copy(), softmax_sum=state.softmax_sum[..., :1].copy())


@pytest.mark.parametrize("layout", ["SBH", "BNSD", "TND", "packed"])
@pytest.mark.parametrize("lanes", [(1, 8), (8, 1), (8, 1, 8)])
def test_states_of_1_and_8_lanes_are_merged_together(any_backend, lanes, layout):
    """The bits of 8 lanes everywhere; the result has the first state's lanes, or those of `out`."""
    backend = rau.registry.get(any_backend)
    call = options("TND" if layout == "packed" else layout, layout == "packed") | {"backend": any_backend}
    parts = states(len(lanes), call["layout"], packed=layout == "packed")
    expected = on_host(backend, rau.merge_states([own(backend, part) for part in parts], **call))
    mixed = [own(backend, one_lane(part) if its == 1 else part) for part, its in zip(parts, lanes, strict=True)]
    result = rau.merge_states(mixed, **call)
    assert result.softmax_max.shape[-1] == result.softmax_sum.shape[-1] == lanes[0]
    same(on_host(backend, result), expected if lanes[0] == 8 else one_lane(expected))
    for into in (expected, one_lane(expected)):
        out = own(backend, rau.AttentionState(*map(np.zeros_like, into)))
        assert rau.merge_states(mixed, out=out, **call).softmax_sum is out.softmax_sum
        same(on_host(backend, out), into)


def test_unequal_lanes_are_seen_beside_1_lane():
    """Though only one of them is given to the backend."""
    first, second = states(2)
    unequal = second.softmax_max.copy()
    unequal[0, 1, 2, 5] += 1
    with pytest.raises(rau.ConstraintError, match=r"states\[1\]\.softmax_max\[0, 1, 2, 5\]") as caught:
        rau.merge_states([one_lane(first), second._replace(softmax_max=unequal)], check="values")
    assert "value-lanes" in caught.value.rules


def test_a_lane_of_an_input_is_no_place_for_1_lane():
    """Lane 1 is not read, and yet part of an input; with lane 0 its lanes would no longer be equal."""
    first, second = states(2)
    for lane in (slice(0, 1), slice(1, 2)):
        out = first._replace(softmax_max=first.softmax_max[..., lane], softmax_sum=first.softmax_sum[..., lane])
        with pytest.raises(rau.ConstraintError, match="out.softmax_max shares memory with states.0..softmax_max"):
            rau.merge_states([first, second], out=out)


def test_in_place_on_a_later_state_of_other_lanes(backend):
    first, second = states(2)
    expected = rau.merge_states([first, second], backend=backend)
    rau.merge_states([one_lane(first), second], out=second, backend=backend)
    same(second, expected)


def test_a_ring_takes_1_lane_after_8_and_8_after_1(any_backend):
    backend = rau.registry.get(any_backend)
    parts = states(3)
    expected = rau.StreamingMerge(backend=any_backend)
    for part in parts:
        expected.update(*own(backend, part))
    for lanes in ((1, 8, 1), (8, 1, 8)):
        ring = rau.StreamingMerge(backend=any_backend)
        for part, its in zip(parts, lanes, strict=True):
            ring.update(*own(backend, one_lane(part) if its == 1 else part))
        whole = on_host(backend, expected.result())
        same(on_host(backend, ring.result()), whole if lanes[0] == 8 else one_lane(whole))


# -------------------------------------------------------------------------------------------------- the output alone


@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("K", [1, 2, 3, 20])
def test_the_output_alone_is_that_of_the_state(any_backend, K, dtype, lanes):
    backend = rau.registry.get(any_backend)
    for layout in ("SBH", "packed"):
        call = options("TND" if layout == "packed" else layout, layout == "packed") | {"backend": any_backend}
        parts = states(K, call["layout"], dtype, layout == "packed")
        if lanes == 1:
            parts = list(map(one_lane, parts))
        mine = [own(backend, part) for part in parts]
        expected = rau.merge_states(mine, **call)
        fresh = rau.merge_states(mine, statistics=False, **call)
        out = own(backend, parts[0]._replace(attn_out=np.full_like(parts[0].attn_out, 7))).attn_out
        assert rau.merge_states(mine, statistics=False, out=out, **call) is out
        place = mine[0].attn_out
        assert rau.merge_states(mine, statistics=False, out=place, **call) is place
        for alone in (fresh, out, place):
            same(on_host(backend, expected._replace(attn_out=alone)), on_host(backend, expected))


@pytest.mark.skipif("cython" not in BACKENDS, reason="others compute in temporaries")
def test_no_statistics_are_allocated():
    parts = [rau.AttentionState(np.zeros((1 << 12, 1, 16), "f4"), *(np.ones((1, 16, 1 << 12, 8), "f4") for _ in range(2)))] * 2
    tracemalloc.start()
    try:
        out = rau.merge_states(parts, statistics=False, backend="cython")
        assert tracemalloc.get_traced_memory()[1] < out.nbytes + 8192
    finally:
        tracemalloc.stop()


class Whole(rau.backends.Backend):
    """Knows nothing of merges without statistics, and would fail without arrays for them."""

    name = "whole"
    capabilities = rau.backends.Capabilities(array_types=("numpy:ndarray",))

    def update(self, problem, prev, cur, out):
        assert problem.statistics
        assert out is None or all(isinstance(part, np.ndarray) for part in out)
        return rau.registry.get("numpy").update(problem, prev, cur, out)


@pytest.mark.parametrize("K", [1, 2, 3])
def test_a_backend_that_writes_statistics_is_given_arrays_for_them(K):
    parts = states(K)
    expected = rau.merge_states(parts, backend=Whole())
    out = np.zeros_like(expected.attn_out)
    for given in (None, out):
        result = rau.merge_states(parts, statistics=False, out=given, backend=Whole())
        np.testing.assert_array_equal(result, expected.attn_out)
    assert result is out


@pytest.mark.parametrize(
    ("given", "rules", "says"),
    [
        ({"out": states(1)[0]}, ("out",), "out has 3 items; without statistics expected one array, for the output: pass out=state"),
        ({"out": states(1)[0].attn_out[:4]}, ("out-shape",), "out has shape (4, 2, 16); expected (5, 2, 16)"),
        ({"statistics": 0}, ("statistics",), "statistics is"),
        ({"statistics": None}, ("statistics",), "statistics is None; expected True, or False for the output alone"),
        ({"statistics": True, "out": states(1)[0].attn_out}, ("out",), "out is"),
    ],
)
def test_what_an_output_alone_cannot_be(given, rules, says):
    with pytest.raises(rau.ConstraintError) as caught:
        rau.merge_states(states(2), **{"statistics": False} | given)
    assert caught.value.rules == rules
    assert says in str(caught.value)


def test_an_output_alone_does_not_overlap():
    memory = np.zeros((6, 2, 16), "f4")
    first, second = states(2)
    first = first._replace(attn_out=memory[:5])
    with pytest.raises(rau.ConstraintError, match=r"out shares memory with states\[0\]\.attn_out"):
        rau.merge_states([first, second], statistics=False, out=memory[1:])


def test_the_output_alone_has_its_gradient_and_its_place_in_a_graph():
    torch = pytest.importorskip("torch")
    parts = [own(rau.registry.get("torch"), laid_out(partial(2, 5, 2, 8, "float64", seed, awkward=False), "SBH"))
             for seed in range(2)]  # fmt: skip

    def merged(*arrays, **call):
        return rau.merge_states([arrays[:3], arrays[3:]], **call)

    grads = []
    for function in (
        lambda *arrays: merged(*arrays).attn_out,
        lambda *arrays: merged(*arrays, statistics=False),
        torch.compile(lambda *arrays: merged(*arrays, statistics=False), fullgraph=True, backend="eager"),
    ):
        arrays = [part.clone().requires_grad_() for state in parts for part in state]
        out = function(*arrays)
        out.square().sum().backward()
        grads.append([out, *(array.grad for array in arrays)])
    assert all(torch.equal(mine, its) for other in grads[1:] for mine, its in zip(grads[0], other, strict=True))
