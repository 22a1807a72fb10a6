"""StreamingMerge through backends that can do less than ours: update alone, no mixed dtypes, not in place, own arrays."""

import sys
import types

import numpy as np
import pytest
from running import Chain, half, joined, laid_out, on_host, own, partial, same

import rau
from plugins import LOOPBACK
from rau.backends import Backend, Capabilities


def only_update(**capabilities):
    """A backend of NumPy arrays that has nothing but `update`, and notes what it is asked."""

    class Only(Backend):
        name = "only"

        def __init__(self):
            self.calls = []

        def update(self, problem, prev, cur, out):
            self.calls.append(problem)
            assert not self.capabilities.limits_broken(problem)
            return rau.registry.get("numpy").update(problem, prev, cur, out)

    Only.capabilities = Capabilities(array_types=("numpy:ndarray",), **capabilities)
    return Only()


def loopback():
    module = types.ModuleType("rau_loopback")
    exec(LOOPBACK, module.__dict__)
    sys.modules["rau_loopback"] = module
    return module.LoopbackBackend()


LESS = {
    "update alone": only_update,
    "no mixed dtypes": lambda: only_update(mixed=False),
    "not in place": lambda: only_update(in_place=False),
    "SBH and TND": lambda: only_update(layouts=("SBH", "TND")),
    "BNSD and TND, neither mixed nor in place": lambda: only_update(layouts=("BNSD", "TND"), mixed=False, in_place=False),
    "halves, but not in place": lambda: only_update(in_place=False, halves=True),
    "arrays of its own": loopback,
}
LENGTHS = (4, 4, 0, 6, 6, 6, 2)
ENDS = np.cumsum([0, *LENGTHS])


@pytest.fixture(params=LESS, ids=lambda name: name.replace(" ", "-"))
def less(request):
    instance = LESS[request.param]()
    with rau.registry.provisionally(instance):
        yield instance
    sys.modules.pop("rau_loopback", None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [False, True], ids=["token-major", "packed"])
def test_halves_of_sequences(less, packed, dtype):
    ring = rau.StreamingMerge("TND", actual_seq_qlen=ENDS, softmax_layout="SBH" if packed else "TND", backend=less)
    chains = [Chain(1, S, 3, 8, dtype) for S in LENGTHS]
    for seed, tokens in enumerate([None, "back", "front", None, "back"]):
        parts = []
        for index, (S, chain) in enumerate(zip(LENGTHS, chains, strict=True)):
            where = slice(None) if tokens is None else half(tokens, S)
            cur = partial(1, len(range(S)[where]), 3, 8, dtype, 10 * seed + index)
            chain.update(cur, where)
            parts.append(laid_out(cur, "TND", packed))
        ring.update(*own(less, joined(parts)), tokens=tokens)
    expected = joined([laid_out(chain.state, "TND", packed) for chain in chains])
    same(on_host(less, ring.result()), expected)
    narrow = on_host(less, ring.result("bfloat16"))
    same(narrow, (expected.attn_out.astype(narrow.attn_out.dtype), *expected[1:]))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_slices(less, dtype):
    layout = less.capabilities.layouts[0]
    ring, chain = rau.StreamingMerge(layout, backend=less), Chain(2, 9, 2, 8)
    for seed, tokens in enumerate([None, slice(2, 7), slice(0, 9, 4), None]):
        where = slice(None) if tokens is None else tokens
        cur = partial(2, len(range(9)[where]), 2, 8, dtype, seed)
        ring.update(*own(less, laid_out(cur, layout)), tokens=tokens)
        chain.update(cur, where)
    same(on_host(less, ring.result()), laid_out(chain.state, layout))


def test_a_run_of_equal_sequences_is_one_call():
    backend = only_update()
    ring = rau.StreamingMerge("TND", actual_seq_qlen=ENDS, softmax_layout="SBH", backend=backend)
    ring.update(*laid_out(partial(1, 28, 2, 8), "TND"))
    backend.calls.clear()
    ring.update(*laid_out(partial(1, 14, 2, 8), "TND"), tokens="back")
    assert [(call.layout, call.B, call.S, call.in_place) for call in backend.calls] == [
        ("BSND", 2, 2, True), ("BSND", 3, 3, True), ("BSND", 1, 1, True),
    ]  # fmt: skip


@pytest.mark.parametrize("layout", ["SBH", "BSND", "BNSD"])
@pytest.mark.parametrize("packed", [False, True], ids=["token-major", "packed"])
def test_a_backend_without_halves_is_given_views(layout, packed):
    backend = only_update(layouts=("TND", layout))
    addresses = []
    update = backend.update

    def noting(problem, prev, cur, out):
        addresses.append([part.__array_interface__["data"][0] for part in (*prev, *cur)])
        assert all(mine is its for mine, its in zip(prev, out, strict=True))
        return update(problem, prev, cur, out)

    backend.update = noting
    ring = rau.StreamingMerge("TND", actual_seq_qlen=[0, 4, 8, 10], softmax_layout="SBH" if packed else "TND", backend=backend)
    ring.update(*laid_out(partial(1, 10, 2, 8), "TND"))
    cur = laid_out(partial(1, 5, 2, 8), "TND")
    addresses.clear()
    ring.update(*cur, tokens="front")
    for array, places in zip((*ring.running, *cur), zip(*addresses, strict=True), strict=True):
        low = array.__array_interface__["data"][0]
        assert all(low <= place < low + array.nbytes for place in places)


def test_a_backend_that_takes_neither_halves_nor_a_batch_says_so():
    backend = only_update(layouts=("TND",))
    ring = rau.StreamingMerge("TND", actual_seq_qlen=[0, 4], backend=backend)
    ring.update(*laid_out(partial(1, 4, 2, 8), "TND"))
    refused = "does not take halves of TND sequences .Capabilities.halves., and it takes no layout with a batch"
    with pytest.raises(rau.UnsupportedError, match=refused):
        ring.update(*laid_out(partial(1, 2, 2, 8), "TND"), tokens="front")


def test_nothing_is_written_when_one_of_several_calls_is_refused():
    backend = only_update(limits=lambda problem: ["B = 1"] if problem.B == 1 and problem.layout != "TND" else [])
    ring = rau.StreamingMerge("TND", actual_seq_qlen=ENDS, backend=backend)
    ring.update(*laid_out(partial(1, 28, 2, 8), "TND"))
    before = ring.result()
    backend.calls.clear()
    with pytest.raises(rau.UnsupportedError, match=r'backend "only" does not take Problem\(layout=.BSND.*: B = 1'):
        ring.update(*laid_out(partial(1, 14, 2, 8), "TND"), tokens="front")
    assert not backend.calls
    same(ring.result(), before)


def test_a_state_is_broken_where_the_second_of_several_calls_is_refused():
    backend = only_update()
    ring = rau.StreamingMerge("TND", actual_seq_qlen=[0, 2, 6], backend=backend)
    ring.update(*laid_out(partial(1, 6, 2, 8), "TND"))
    first, given = backend.update, []

    def update(*call):
        given.append(call)
        if len(given) == 2:
            raise rau.UnsupportedError("not this one")
        return first(*call)

    backend.update = update
    with pytest.raises(rau.UnsupportedError, match="not this one"):
        ring.update(*laid_out(partial(1, 3, 2, 8), "TND"), tokens="front")
    assert len(given) == 2
    with pytest.raises(rau.UnsupportedError, match="an earlier update was stopped while it wrote"):
        ring.result()


def test_a_first_update_that_is_refused_leaves_no_state():
    backend = only_update(limits=lambda problem: ["it does not like it"] if problem.in_place else [])
    ring = rau.StreamingMerge(backend=backend)
    with pytest.raises(rau.UnsupportedError, match="it does not like it"):
        ring.update(*laid_out(partial(1, 4, 2, 8), "SBH"))
    assert ring.running is None


def test_a_backend_that_refuses_says_so_before_there_is_a_state():
    ring = rau.StreamingMerge(backend=only_update(dtypes=("float16",)))
    with pytest.raises(rau.UnsupportedError, match="dtype float32 is not one of float16"):
        ring.update(*laid_out(partial(1, 4, 2, 8, "float16"), "SBH"))
    assert ring.running is None
