"""The cuda backend on a GPU: values, streams, graphs, waiting, sizes. `pytest -m gpu` fails without one."""

import os
import warnings
from weakref import WeakKeyDictionary
from zlib import crc32

import pytest

import rau
from rau import registry
from rau.testing.cases import Case, generated, named
from rau.testing.comparison import same_bits
from rau.testing.conformance import check_backend
from rau.testing.differential import run_differential

if "cuda" in os.environ.get("RAU_TEST_BACKENDS", ""):
    import torch
else:
    torch = pytest.importorskip("torch", reason="torch is not installed and cuda was not asked for")

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def cuda(request):
    """The backend."""
    if not torch.cuda.is_available():
        message = "torch finds no CUDA device"
        pytest.fail(message) if request.config.option.markexpr == "gpu" else pytest.skip(message)
    from rau.backends.cuda_ import CudaBackend

    if "cuda" not in registry.names():  # a source tree that is not installed
        registry.register(CudaBackend)
    return registry.get("cuda")


def state(seed, S=300, B=2, N=4, D=128, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(seed)
    out = torch.randn(S, B, N * D, generator=generator, device="cuda").to(dtype)
    maximum = torch.randn(B, N, S, 1, generator=generator, device="cuda").repeat(1, 1, 1, 8)
    total = (torch.rand(B, N, S, 1, generator=generator, device="cuda") + 1).repeat(1, 1, 1, 8)
    return rau.AttentionState(out, maximum, total)


def copy(state):
    return rau.AttentionState(*(part.clone() for part in state))


def last_rows(state):
    return rau.AttentionState(state.attn_out[-64:], state.softmax_max[:, :, -64:], state.softmax_sum[:, :, -64:])


def equal(one, other):
    return all(map(torch.equal, one, other))


# ---- values -------------------------------------------------------------------------------------------------------


PARTS = 12  # of the cases: most of their time goes by compiling kernels, which processes can share (pytest-xdist)


def part_of(cases, part):
    """Those of a kernel are in one part."""

    def its(case):
        kernel = case.dtype, case.cur_dtype, case.states, case.lanes, case.head_dim
        return crc32(repr(kernel).encode()) % PARTS

    return [case for case in cases if its(case) == part]


@pytest.mark.parametrize("part", range(PARTS))
def test_the_same_bits_as_cython(cuda, part):
    report = run_differential(["cython", cuda], part_of([*named(), *generated(2, 2000)], part))
    assert report.passed, str(report)


@pytest.mark.parametrize("part", range(PARTS))
def test_the_same_bits_with_more_rows_a_program(cuda, monkeypatch, part):
    """As on a device that runs two programs at once: there few rows are many."""
    monkeypatch.setattr(cuda, "_at_once", 2)
    monkeypatch.setattr(cuda, "_plans", WeakKeyDictionary())
    report = run_differential(["cython", cuda], part_of(generated(3, 300), part))
    assert report.passed, str(report)


def test_conformance(cuda):
    report = check_backend(cuda, cases=[Case(id="one", tokens=40)])
    assert report.passed, str(report)


def test_large_and_in_place(cuda):
    """Millions of rows, where the exponential's last bit would show; in place, where a late reader would."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        prev, cur = state(0, S=16384, N=32, dtype=dtype), state(1, S=16384, N=32, dtype=dtype)
        fresh = rau.ring_attention_update(*prev, *cur, backend="cuda")
        host = [rau.AttentionState(*(part.cpu() for part in each)) for each in (prev, cur)]
        reference = rau.ring_attention_update(*host[0], *host[1], backend="cython")
        assert equal([part.cpu() for part in fresh], reference)
        for _ in range(5):
            again = copy(prev)
            assert equal(rau.ring_attention_update(*again, *cur, out=again, backend="cuda"), fresh)


def test_beyond_32_bits(cuda):
    """An element whose offset is above 2**31, and a stride that is."""
    if torch.cuda.mem_get_info()[0] < 32 << 30:
        pytest.skip("needs 32 GiB of free memory")
    S, N, D = (1 << 17) + 3, 128, 128  # 2**31 elements and some
    prev = state(0, S=S, B=1, N=N)
    cur = rau.AttentionState(prev.attn_out.flip(0), prev.softmax_max.flip(2), prev.softmax_sum.flip(2))
    result = rau.ring_attention_update(*prev, *cur, out=prev._replace(attn_out=torch.empty_like(prev.attn_out)))
    expected = rau.ring_attention_update(*last_rows(state(0, S=S, B=1, N=N)), *last_rows(cur), backend="torch")
    assert equal(last_rows(result), expected)
    del prev, cur, result
    wide = torch.zeros(2, (1 << 31) + 8 * N * D, dtype=torch.bfloat16, device="cuda")
    views = [wide[:, k * N * D : (k + 1) * N * D].unsqueeze(1) for k in range(3)]  # token stride above 2**31
    for view in views[:2]:
        view.normal_()
    stats = [state(k, S=2, B=1, N=N)[1:] for k in range(3)]
    far = rau.ring_attention_update(views[0], *stats[0], views[1], *stats[1], out=(views[2], *stats[2]))
    near = rau.ring_attention_update(views[0].contiguous(), *stats[0], views[1].contiguous(), *stats[1])
    assert equal(far, near)


@pytest.mark.parametrize("lengths", [[5, 1 << 62, -(1 << 62), 12], [12, 12, 12, 12], [(1 << 63) - 1] * 4, [7], [-9]])
def test_lengths_that_nobody_looked_at(lengths):
    parts = [torch.ones(12, 3, 64, device="cuda"), *torch.ones(2, 12, 3, 8, device="cuda")]
    rau.ring_attention_update(*parts, *parts, torch.tensor(lengths, device="cuda"), "TND", softmax_layout="SBH")
    torch.cuda.synchronize()


def test_every_float32_is_rounded_by_the_device_as_by_integers():
    """The interpreter's tests round to bfloat16 by integers, a device by an instruction of its own."""
    from triton import jit
    from triton import language as tl

    from rau.backends.cuda_kernel import _narrow

    @jit
    def count(first, differences, SIZE: tl.constexpr):
        bits = (first + tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)).to(tl.uint32)
        values = bits.to(tl.float32, bitcast=True)
        device = _narrow(values, tl.bfloat16, False)
        integers = _narrow(values, tl.bfloat16, True)
        differ = device.to(tl.uint16, bitcast=True) != integers.to(tl.uint16, bitcast=True)
        both_nan = (device.to(tl.float32) != device.to(tl.float32)) & (values != values)
        tl.atomic_add(differences, tl.sum((differ & (both_nan == 0)).to(tl.int32)))

    differences = torch.zeros(1, dtype=torch.int32, device="cuda")
    for eighth in range(8):
        count[(1 << 19,)](eighth << 29, differences, SIZE=1024)
    assert int(differences) == 0


# ---- how it runs --------------------------------------------------------------------------------------------------

LENGTHS = [0, 100, 100, 300]


def calls():
    """Calls that are to work without waiting, and inside a graph."""
    prev, cur, more = state(0), state(1), state(2)
    packed = [rau.AttentionState(*(torch.rand(300, 4, n, device="cuda") for n in (64, 8, 8))) for _ in range(2)]
    lengths = torch.tensor(LENGTHS, device="cuda")
    return {
        "update": lambda: rau.ring_attention_update(*prev, *cur),
        "merge": lambda: rau.merge_states([prev, cur, more]),
        "packed": lambda: rau.ring_attention_update(*packed[0], *packed[1], lengths, "TND", softmax_layout="SBH"),
    }


@pytest.mark.parametrize("name", ["update", "merge", "packed"])
def test_a_graph(name):
    call = calls()[name]
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    for part in result:
        part.zero_()
    graph.replay()
    assert equal(result, expected)


def test_first_use_in_a_graph():
    """What has not been compiled yet is, while the graph is being captured."""
    states = [state(seed, D=40, dtype=torch.float64) for seed in range(5)]
    states = [rau.AttentionState(part[0], *(stat.double()[..., :1].contiguous() for stat in part[1:])) for part in states]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = rau.merge_states(states)
    graph.replay()
    assert equal(result, rau.merge_states(states, backend="torch"))


def test_a_graph_refuses_lengths_on_the_host():
    parts = [torch.rand(300, 4, n, device="cuda") for n in (64, 8, 8)]
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        parts[0].add_(1)  # an empty graph is worth a warning
        with pytest.raises(rau.UnsupportedError, match="as a tensor of int64 on cuda:0"):
            rau.ring_attention_update(*parts, *parts, LENGTHS, "TND", softmax_layout="SBH")


@pytest.mark.parametrize("name", ["update", "merge", "packed", "host lengths"])
def test_nothing_waits_for_the_device(name):
    parts = [torch.rand(300, 4, n, device="cuda") for n in (64, 8, 8)]

    def on_host():
        return rau.ring_attention_update(*parts, *parts, LENGTHS, "TND", softmax_layout="SBH")

    call = calls().get(name, on_host)
    call()  # compiles
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "a prototype feature"
            torch.cuda.set_sync_debug_mode("error")
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream():
    """Inputs that are still being made on another stream than the default one."""
    prev, cur = state(0), state(1)
    expected = rau.ring_attention_update(*prev, *cur)
    torch.cuda.synchronize()
    late = rau.AttentionState(*(torch.zeros_like(part) for part in prev))
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        for target, part in zip(late, prev, strict=True):
            target.copy_(part)
        result = rau.ring_attention_update(*late, *cur)
        assert equal(result, expected)


def test_no_memory_beside_the_result():
    prev, cur = state(0, S=8192), state(1, S=8192)
    rau.ring_attention_update(*prev, *cur, out=prev)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rau.ring_attention_update(*prev, *cur, out=prev)
    assert torch.cuda.max_memory_allocated() == before


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    there = [rau.AttentionState(*(part.to("cuda:1") for part in state(seed))) for seed in range(2)]
    here = rau.ring_attention_update(*state(0), *state(1))
    result = rau.ring_attention_update(*there[0], *there[1])
    assert not same_bits([part.float().cpu().numpy() for part in result], [part.float().cpu().numpy() for part in here])


def test_gradients():
    leaves = [part.float().requires_grad_() for part in (*state(0), *state(1))]
    result = rau.ring_attention_update(*leaves)
    result.attn_out.square().sum().backward()
    host = [leaf.detach().cpu().requires_grad_() for leaf in leaves]
    rau.ring_attention_update(*host).attn_out.square().sum().backward()
    for mine, its in zip(leaves, host, strict=True):
        torch.testing.assert_close(mine.grad.cpu(), its.grad)


def test_a_call_like_an_earlier_one_is_not_checked_again(monkeypatch):
    """Which takes the host longer than all else; on another device, or across two, it is another call."""
    from rau import constraints

    prev, cur = state(0), state(1)
    expected = rau.ring_attention_update(*prev, *cur)

    def bind(*arguments, **options):
        raise AssertionError("checked again")

    monkeypatch.setattr(constraints, "bind", bind)
    assert equal(rau.ring_attention_update(*copy(prev), *copy(cur)), expected)
    for changed in (prev._replace(softmax_max=prev.softmax_max.cpu()), rau.AttentionState(*(part.cpu() for part in prev))):
        with pytest.raises(AssertionError, match="checked again"):
            rau.ring_attention_update(*changed, *cur)
