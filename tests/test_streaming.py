"""StreamingMerge: whole updates, slices and halves give the bits of a chain of updates, in every layout and backend."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from running import Chain, half, joined, laid_out, on_host, own, partial, same

import rau
from rau.testing import compare, oracle


def takes(name, dtype="float32", layout="SBH", lanes=8):
    """Skip what a backend does not take."""
    capabilities = rau.registry.get(name).capabilities
    if dtype not in capabilities.dtypes or layout not in capabilities.layouts or lanes not in capabilities.lanes:
        pytest.skip(f"{name} does not take {dtype} in {layout} with {lanes} lanes")
    return rau.registry.get(name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("layout", ["SBH", "BSND", "BNSD"])
def test_any_history_of_slices_and_halves(any_backend, layout, dtype):
    backend = takes(any_backend, dtype, layout)
    B, S, N, D = 2, 12, 3, 8
    ring, chain = rau.StreamingMerge(layout, backend=any_backend), Chain(B, S, N, D, dtype)
    history = [None, slice(3, 9), "back", None, slice(1, None, 3), "front", slice(5, 5), slice(-4, 100)]
    for seed, tokens in enumerate(history):
        where = slice(None) if tokens is None else half(tokens, S) if isinstance(tokens, str) else tokens
        cur = partial(B, len(range(S)[where]), N, D, dtype, seed)
        ring.update(*own(backend, laid_out(cur, layout)), tokens=tokens)
        chain.update(cur, where)
        same(on_host(backend, ring.result()), laid_out(chain.state, layout))


HISTORIES = st.lists(st.sampled_from([None, "front", "back"]), max_size=4)
LENGTHS = st.lists(st.integers(0, 4).map(lambda n: 2 * n), max_size=6)


@settings(max_examples=40)
@given(lengths=LENGTHS, history=HISTORIES, packed=st.booleans(), dtype=st.sampled_from(["float32", "bfloat16", "float64"]),
       heads=st.integers(1, 3), lanes=st.sampled_from([8, 1]))  # fmt: skip
@example(lengths=[], history=["front"], packed=True, dtype="float32", heads=2, lanes=8)
@example(lengths=[0, 0], history=["back"], packed=False, dtype="float32", heads=2, lanes=8)
@example(lengths=[4, 4, 0, 2, 2, 8], history=["back", "front", None], packed=True, dtype="bfloat16", heads=2, lanes=8)
@example(lengths=[4, 4, 0, 2, 2, 8], history=["back", "front", None], packed=False, dtype="float32", heads=3, lanes=1)
def test_any_history_of_halves_of_sequences(any_backend, lengths, history, packed, dtype, heads, lanes):
    backend = rau.registry.get(any_backend)
    if lanes not in backend.capabilities.lanes or dtype not in backend.capabilities.dtypes:
        return
    D = 4
    ends = np.cumsum([0, *lengths])
    ring = rau.StreamingMerge("TND", actual_seq_qlen=ends, softmax_layout="SBH" if packed else "TND", backend=any_backend)
    nothing = [np.zeros((0, heads, D), dtype=partial(1, 1, 1, 1, dtype).attn_out.dtype)]
    nothing += [np.zeros((0, heads, lanes), dtype="float64" if dtype == "float64" else "float32")] * 2
    chains = [Chain(1, S, heads, D, dtype, lanes) for S in lengths]
    for seed, tokens in enumerate([None, *history]):
        parts = []
        for index, (S, chain) in enumerate(zip(lengths, chains, strict=True)):
            where = slice(None) if tokens is None else half(tokens, S)
            cur = partial(1, len(range(S)[where]), heads, D, dtype, 100 * seed + index, lanes=lanes)
            chain.update(cur, where)
            parts.append(laid_out(cur, "TND", packed))
        ring.update(*own(backend, joined([nothing, *parts])), tokens=tokens)
    result = on_host(backend, ring.result())
    expected = joined([(part.astype(mine.dtype) for part, mine in zip(nothing, result, strict=True)),
                       *(laid_out(chain.state, "TND", packed) for chain in chains)])  # fmt: skip
    same(result, expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_each_update_keeps_within_the_bound(any_backend, dtype):
    backend = takes(any_backend, dtype)
    states = [laid_out(partial(2, 7, 2, 16, dtype, seed), "SBH") for seed in range(9)]
    ring = rau.StreamingMerge(backend=any_backend)
    ring.update(*own(backend, states[0]))
    for cur in states[1:]:
        before = on_host(backend, ring.result())
        ring.update(*own(backend, cur))
        comparison = compare(on_host(backend, ring.result()), oracle([before, cur]), tolerance=backend.capabilities.tolerance)
        assert comparison.passed, comparison.problems


@pytest.mark.parametrize("n", [2, 4, 8, 64])
def test_the_whole_stream_keeps_within_the_bound_of_its_docstring(any_backend, n):
    backend = takes(any_backend, "bfloat16")
    states = [laid_out(partial(1, 16, 2, 16, "bfloat16", seed, awkward=False), "SBH") for seed in range(n)]
    ring = rau.StreamingMerge(backend=any_backend)
    for state in states:
        ring.update(*own(backend, state))
    expected = oracle(states)
    per_state = 2.0**-24 * backend.capabilities.tolerance
    magnitude = oracle([rau.AttentionState(np.abs(s.attn_out.astype("f4")), *s[1:]) for s in states]).attn_out
    off = np.abs(on_host(backend, ring.result()).attn_out - np.asarray(expected.attn_out, "f8"))
    assert (off <= 4 * (n - 1) * per_state * np.asarray(magnitude, "f8")).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_partial_comes_back_bit_for_bit_and_empty_rows_as_the_neutral_element(any_backend, dtype):
    backend = takes(any_backend, dtype)
    cur = partial(2, 9, 2, 8, dtype, 4)
    chain = Chain(2, 9, 2, 8, dtype)
    chain.update(cur)
    ring = rau.StreamingMerge(backend=any_backend)
    ring.update(*own(backend, laid_out(cur, "SBH")))
    result = on_host(backend, ring.result(dtype))
    empty = (cur.softmax_sum == 0) | np.isneginf(cur.softmax_max)
    assert empty.any()
    assert not empty.all()
    assert (result.softmax_sum[empty] == 0).all()
    assert np.isneginf(result.softmax_max[empty]).all()
    attn_out = result.attn_out.reshape(9, 2, 2, 8).swapaxes(0, 1)
    rows = empty[..., 0].swapaxes(1, 2)
    assert (attn_out[rows].view(f"u{attn_out.itemsize}") == 0).all()
    bits = f"u{attn_out.itemsize}"
    np.testing.assert_array_equal(attn_out[~rows].view(bits), cur.attn_out[~rows].view(bits))


def test_the_result_is_rounded_once_and_is_a_copy(any_backend):
    backend = takes(any_backend, "bfloat16")
    ring = rau.StreamingMerge(backend=any_backend)
    for seed in range(3):
        ring.update(*own(backend, laid_out(partial(1, 8, 2, 8, "bfloat16", seed, awkward=False), "SBH")))
    wide = on_host(backend, ring.result())
    narrow = {name: on_host(backend, ring.result(name)) for name in ("float16", "bfloat16", "float32")}
    for name, state in narrow.items():
        assert state.attn_out.dtype.name == name
        same(state, (wide.attn_out.astype(state.attn_out.dtype), *wide[1:]))
    kept = ring.result()
    before = on_host(backend, kept)
    ring.update(*own(backend, laid_out(partial(1, 8, 2, 8, "bfloat16", 9), "SBH")))
    same(on_host(backend, kept), before)
    assert not np.array_equal(on_host(backend, ring.result()).attn_out, before.attn_out)


@pytest.mark.parametrize("dtype", [np.float16, np.dtype("float16"), "float16"], ids=repr)
def test_dtypes_are_taken_as_numpy_names_them(backend, dtype):
    ring = rau.StreamingMerge(backend=backend)
    ring.update(*laid_out(partial(1, 2, 1, 4), "SBH"))
    assert ring.result(dtype).attn_out.dtype == np.float16


def test_like_gives_the_shape_and_none_of_the_values(any_backend):
    backend = takes(any_backend, "bfloat16")
    like = own(backend, laid_out(partial(2, 6, 2, 8, "bfloat16"), "SBH"))
    ring, chain = rau.StreamingMerge(like=like, backend=any_backend), Chain(2, 6, 2, 8)
    same(on_host(backend, ring.result()), laid_out(chain.state, "SBH"))
    cur = partial(2, 3, 2, 8, "bfloat16", 1)
    ring.update(*own(backend, laid_out(cur, "SBH")), tokens="back")
    chain.update(cur, slice(3, 6))
    same(on_host(backend, ring.result()), laid_out(chain.state, "SBH"))


def test_like_of_sequences(any_backend):
    backend = takes(any_backend, layout="TND")
    ends = [0, 4, 10]
    like = joined([laid_out(partial(1, S, 2, 64), "TND") for S in (4, 6)])
    ring = rau.StreamingMerge("TND", actual_seq_qlen=ends, like=own(backend, like), backend=any_backend)
    cur = [partial(1, S, 2, 64, seed=S) for S in (2, 3)]
    ring.update(*own(backend, joined([laid_out(part, "TND") for part in cur])), tokens="front")
    result = on_host(backend, ring.result())
    for first, part in zip((0, 4), cur, strict=True):
        chain = Chain(1, part.attn_out.shape[1], 2, 64)
        chain.update(part)
        size = part.attn_out.shape[1]
        same((x[first : first + size] for x in result), laid_out(chain.state, "TND"))
        assert (result.softmax_sum[first + size : first + 2 * size] == 0).all()


@pytest.mark.parametrize("layout", ["SBH", "TND"])
def test_partials_may_be_strided_and_read_only_and_are_left_alone(backend, layout):
    wide = laid_out(partial(2, 8, 2, 16, seed=1), layout)
    strided = rau.AttentionState(np.repeat(wide[0], 2, 0)[::2], *(np.repeat(x, 2, -2)[..., ::2, :] for x in wide[1:]))
    shared = rau.AttentionState(wide[0], *(np.broadcast_to(x[..., :1], x.shape) for x in wide[1:]))  # as from_lse gives them
    same(strided, wide)
    for array in (*strided, *wide):
        array.flags.writeable = False
    results = []
    for cur in (wide, strided, shared):
        ring = rau.StreamingMerge(layout, backend=backend)
        for tokens in (None, None):
            ring.update(*cur, tokens=tokens)
        half_cur = laid_out(partial(2, 4, 2, 16, seed=2), layout)
        if layout == "SBH":
            ring.update(*half_cur, tokens="back")
        results.append(ring.result())
    for result in results[1:]:
        same(result, results[0])


def test_a_strided_packed_half(backend):
    cur = [laid_out(partial(1, S, 2, 16, seed=S), "TND", packed=True) for S in (2, 6)]
    first = joined([laid_out(partial(1, 2 * S, 2, 16, seed=9), "TND", packed=True) for S in (2, 6)])
    cur = joined(cur)
    apart = rau.AttentionState(cur[0], *(np.repeat(x.reshape(-1, 8), 2, 0)[::2].reshape(x.shape) for x in cur[1:]))
    # Rows of packed statistics twice as far apart as they need be, and heads of the output too.
    lanes = [np.zeros((*x.shape[:-1], 16), "f4") for x in cur[1:]]
    for wide, x in zip(lanes, cur[1:], strict=True):
        wide[..., :8] = x
    spread = rau.AttentionState(np.repeat(cur[0], 2, 1)[:, ::2], *(wide[..., :8] for wide in lanes))
    results = []
    for each in (cur, apart, spread):
        ring = rau.StreamingMerge("TND", actual_seq_qlen=[0, 4, 16], softmax_layout="SBH", backend=backend)
        ring.update(*first)
        ring.update(*each, tokens="back")
        results.append(ring.result())
    for result in results[1:]:
        same(result, results[0])


def test_partials_of_all_the_narrower_dtypes_may_be_mixed(backend):
    ring, chain = rau.StreamingMerge(backend=backend), Chain(1, 4, 2, 8)
    for seed, dtype in enumerate(["float16", "bfloat16", "float32", "float16"]):
        cur = partial(1, 4, 2, 8, dtype, seed)
        ring.update(*laid_out(cur, "SBH"))
        chain.update(cur)
    same(ring.result(), laid_out(chain.state, "SBH"))


def test_ten_thousand_sequences_in_halves_are_one_call_of_the_core(monkeypatch):
    pytest.importorskip("rau._core")
    core = rau.registry.get("cython")
    calls = []
    kernel = core._merge
    monkeypatch.setattr(core, "_merge", lambda table, *rest: (calls.append(len(table)), kernel(table, *rest)))
    lengths = 2 * np.random.default_rng(0).integers(0, 4, size=10_000)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    T = int(ends[-1])
    whole, part = (laid_out(partial(1, size, 2, 8, "bfloat16", size), "TND") for size in (T, T // 2))
    ring = rau.StreamingMerge("TND", actual_seq_qlen=ends, softmax_layout="SBH", backend="cython")
    ring.update(*whole)
    calls.clear()
    ring.update(*part, tokens="front")
    assert calls == [10_000]


@pytest.mark.parametrize("layout", ["SBH", "BSND", "BNSD", "TND", "packed"])
def test_no_update_after_the_first_allocates_or_copies(layout):
    """Measured: all that Python and NumPy allocate, while the core itself has a scratch of fixed size."""
    pytest.importorskip("rau._core")
    packed = layout == "packed"
    layout = "TND" if packed else layout
    ends = {"actual_seq_qlen": [0, 512, 4096]} if layout == "TND" else {}
    ring = rau.StreamingMerge(layout, softmax_layout="SBH" if packed else "TND", backend="cython", **ends)
    whole, part = (laid_out(partial(1, S, 4, 64, "bfloat16", awkward=False), layout, packed) for S in (4096, 2048))
    ring.update(*whole)
    places = [array.__array_interface__["data"] for array in ring.running]
    ring.update(*part, tokens="back")  # what is imported and remembered at the first time
    size = sum(array.nbytes for array in ring.running)
    for tokens, cur in ((None, whole), ("front", part), ("back", part)):
        tracemalloc.start()
        try:
            ring.update(*cur, tokens=tokens)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 20_000 < size / 200
    assert places == [array.__array_interface__["data"] for array in ring.running]


def test_the_lengths_are_copied():
    ends = np.array([0, 4, 8])
    ring = rau.StreamingMerge("TND", actual_seq_qlen=ends)
    ends[:] = 0
    ring.update(*laid_out(partial(2, 4, 1, 4), "TND"))
    ring.update(*laid_out(partial(2, 2, 1, 4), "TND"), tokens="back")


def test_without_lengths_token_major_is_one_sequence(backend):
    ring, chain = rau.StreamingMerge("TND", backend=backend), Chain(1, 6, 2, 8)
    for tokens, S in ((None, 6), ("back", 3)):
        cur = partial(1, S, 2, 8, seed=S)
        ring.update(*laid_out(cur, "TND"), tokens=tokens)
        chain.update(cur, slice(None) if tokens is None else half(tokens, 6))
    same(ring.result(), laid_out(chain.state, "TND"))


def test_use_backend_is_asked_at_every_update():
    ring = rau.StreamingMerge()
    ring.update(*laid_out(partial(1, 2, 1, 4), "SBH"))
    with rau.use_backend("numpy"):
        ring.update(*laid_out(partial(1, 2, 1, 4), "SBH"))
    with pytest.raises(rau.UnknownBackendError), rau.use_backend("no-such-backend"):
        ring.update(*laid_out(partial(1, 2, 1, 4), "SBH"))


def test_it_says_what_it_holds():
    ring = rau.StreamingMerge("BSND", backend="numpy")
    assert repr(ring) == 'StreamingMerge(layout="BSND", backend=\'numpy\'), no state yet'
    ring.update(*laid_out(partial(1, 4, 2, 8), "BSND"))
    first, *rest = repr(ring).split("\n")
    assert first == 'StreamingMerge(layout="BSND", backend=\'numpy\'), its running AttentionState'
    assert rest[0] == "  attn_out     float32 (1, 4, 2, 8), numpy on cpu" and len(rest) == 3
    ring._running.broken = True
    assert ", broken off in an update, its running" in repr(ring)
