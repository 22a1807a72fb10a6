"""Torch tensors: the zero-copy way through the core, the ATen backend, gradients, operators, compile and export."""

import os
import subprocess
import sys

import numpy as np
import pytest
from patience import LIMIT

import rau
from rau.testing.cases import Case, generated
from rau.testing.comparison import same_bits

if "torch" in os.environ.get("RAU_TEST_BACKENDS", ""):
    import torch  # asked for: its absence is a failure
else:
    torch = pytest.importorskip("torch", reason="torch is not installed and was not asked for")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def tensor(array):
    if any(step < 0 for step in array.strides) or not array.flags.writeable:
        array = array.copy()  # torch knows neither
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array(tensor):
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def state(S=5, B=2, N=3, D=8, dtype=torch.float64, seed=0, lanes=1, grad=False):
    generator = torch.Generator().manual_seed(seed)
    stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.randn(S, B, N * D, generator=generator, dtype=torch.float64).to(dtype)
    maximum = torch.randn(B, N, S, 1, generator=generator, dtype=torch.float64).to(stats_dtype)
    total = (torch.rand(B, N, S, 1, generator=generator, dtype=torch.float64) + 1).to(stats_dtype)
    parts = [out, maximum.repeat(1, 1, 1, lanes), total.repeat(1, 1, 1, lanes)]
    return rau.AttentionState(*(part.requires_grad_(grad) for part in parts))


# ---- values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "cython", "numpy", None])
def test_the_same_bits_as_numpy_arrays(backend):
    for case in generated(77, 400):
        reference = case.make().run("cython")
        call = case.make()
        converted = {}

        def own(part, converted=converted):
            return converted.setdefault(id(part), tensor(part))

        states = [rau.AttentionState(*map(own, each)) for each in call.states]
        out = None if call.out is None else tuple(own(placed.view) for placed in call.out)
        with torch.no_grad():
            result = case.call(states, out, backend)
        assert all(type(part) is torch.Tensor for part in result)
        if out is not None:
            assert all(part is target for part, target in zip(result, out, strict=True)), case
        assert not same_bits(reference, [array(part) for part in result]), case


def test_a_plain_cpu_tensor_runs_on_the_core_without_a_copy():
    prev, cur = state(dtype=torch.bfloat16, lanes=8), state(dtype=torch.bfloat16, lanes=8, seed=1)
    explanation = rau.explain(*prev, *cur)
    assert (explanation.selected, explanation.origin) == ("cython", "automatic")
    result = rau.ring_attention_update(*prev, *cur, out=prev)
    assert result.attn_out is prev.attn_out


@pytest.mark.parametrize("tokens", [5, 5_000], ids=["small", "large"])
def test_fresh_results_are_beside_their_inputs_whatever_the_default_device_is(tokens):
    prev, cur = (state(tokens, dtype=torch.float32, seed=seed) for seed in (0, 1))
    expected = rau.merge_states([prev, cur])
    with torch.device("meta"):
        merged = rau.merge_states([prev, cur])
    for got, wanted in zip(merged, expected):
        assert torch.equal(got, wanted) and got.is_contiguous() and got.stride() == torch.empty(got.shape).stride()


def test_fresh_results_own_their_memory():
    result = rau.ring_attention_update(*state(lanes=8, dtype=torch.float32), *state(lanes=8, dtype=torch.float32, seed=1))
    kept = result.attn_out.clone()
    del result
    again = rau.ring_attention_update(*state(lanes=8, dtype=torch.float32), *state(lanes=8, dtype=torch.float32, seed=1))
    assert torch.equal(kept, again.attn_out)


def test_mixed_kinds_are_refused():
    prev, cur = state(lanes=8, dtype=torch.float32), state(lanes=8, dtype=torch.float32)
    with pytest.raises(rau.DTypeError, match="cur_attn_out is a numpy array and prev_attn_out a torch one"):
        rau.ring_attention_update(*prev, cur.attn_out.numpy(), *cur[1:])


def test_a_call_like_the_last_one_but_for_one_thing():
    """Calls that have passed are recognised when they come again; these are not the same ones."""
    prev, cur, out = (state(dtype=torch.float32, lanes=8, seed=seed) for seed in range(3))

    def same(one, other):
        return all(map(torch.equal, one, other))

    expected = rau.ring_attention_update(*prev, *cur)
    for _ in range(2):
        assert same(rau.ring_attention_update(*prev, *cur, out=out), expected)
    turned = prev.attn_out.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous() and same(rau.ring_attention_update(turned, *prev[1:], *cur), expected)
    wrong = {
        "dtype-match": {"cur": (cur.attn_out.view(torch.int32), *cur[1:])},
        "array-device": {"cur": (cur.attn_out.to("meta"), *cur[1:])},
        "out-overlap": {"out": (out.attn_out, out.softmax_max, out.softmax_max)},
        "out-shape": {"out": (out.attn_out[:-1], *out[1:])},
    }
    for rule, change in wrong.items():
        given = {"cur": cur, "out": out} | change
        with pytest.raises(rau.ConstraintError) as error:
            rau.ring_attention_update(*prev, *given["cur"], out=given["out"])
        assert rule in error.value.rules, rule
    rau.ring_attention_update(*prev, *cur, out=prev)
    assert same(prev, expected)


def test_lazily_negated_views():
    """The memory of such a view holds its numbers with the other sign."""
    prev, cur = (state(dtype=torch.float32, lanes=8, seed=seed) for seed in range(2))
    expected = rau.ring_attention_update(*prev, *cur)
    view = torch._neg_view(-prev.attn_out)
    for backend in ("cython", "numpy", "torch"):
        result = rau.ring_attention_update(view, *prev[1:], *cur, backend=backend)
        assert all(map(torch.equal, result, expected))
    with pytest.raises(rau.ShapeError, match="out.attn_out is read-only"):
        rau.ring_attention_update(*prev, *cur, out=prev._replace(attn_out=view))


@pytest.mark.parametrize("reach", ["by all but one element", "by one"])
@pytest.mark.parametrize("after", [False, True])
def test_overlapping_outputs_are_refused(after, reach):
    prev, cur, good = (state(lanes=8, dtype=torch.float32, seed=seed) for seed in range(3))
    rau.ring_attention_update(*prev, *cur, out=good)  # what is like it but for the overlap is not this call
    size = prev.attn_out.numel()
    flat = torch.zeros(size + 1 if reach == "by all but one element" else 2 * size - 1)
    parts = [part.view_as(prev.attn_out) for part in (flat[:size], flat[-size:])]
    mine, other = parts if after else parts[::-1]
    with pytest.raises(rau.ShapeError, match="out.attn_out shares memory with prev_attn_out"):
        rau.ring_attention_update(mine, *prev[1:], *cur, out=good._replace(attn_out=other))


def test_meta_tensors_give_meta_tensors():
    prev = rau.AttentionState(*(part.to("meta") for part in state(lanes=8, dtype=torch.float32)))
    assert rau.explain(*prev, *prev).selected == "torch"


@pytest.mark.parametrize("lengths", [[0, 9, 3, 12], [5, 1 << 62, -(1 << 62), 12], [0, 0, 0, 0], [12, 12, 12, 12]])
def test_lengths_on_a_device_cannot_reach_outside(lengths):
    """The rows that packed statistics are gathered from stay inside, whatever the unread lengths say."""
    from rau.backends.torch_ import packed_rows

    rows = packed_rows(torch.tensor(lengths), 12, 3, torch.device("cpu"))
    assert rows.shape == (36,) and int(rows.min()) >= 0 and int(rows.max()) < 36


# ---- gradients -------------------------------------------------------------------------------------------------


def leaves(*states):
    return [part.detach().clone().requires_grad_() for each in states for part in each]


@pytest.mark.parametrize("backend", ["torch", "cython", None])
def test_gradcheck_of_six_inputs_and_three_outputs(backend):
    def call(*inputs):
        return tuple(rau.ring_attention_update(*inputs, profile="portable", backend=backend))

    assert torch.autograd.gradcheck(call, leaves(state(), state(seed=1)))


def test_gradcheck_with_eight_lanes_reads_lane_0():
    prev, cur = leaves(state(lanes=8)), leaves(state(lanes=8, seed=1))
    result = rau.ring_attention_update(*prev, *cur, profile="portable")
    sum(part.sum() for part in result).backward()
    one = leaves(state()), leaves(state(seed=1))
    expected = rau.ring_attention_update(*one[0], *one[1], profile="portable")
    (expected[0].sum() + 8 * expected[1].sum() + 8 * expected[2].sum()).backward()
    for wide, narrow in zip([*prev, *cur], [*one[0], *one[1]], strict=True):
        if wide.shape == narrow.shape:
            torch.testing.assert_close(wide.grad, narrow.grad)
        else:
            torch.testing.assert_close(wide.grad[..., :1], narrow.grad)
            assert not wide.grad[..., 1:].any()


@pytest.mark.parametrize("order", ["TND", "SBH"])
def test_gradcheck_in_tnd(order):
    lengths = [0, 3, 3, 7]

    def tnd(seed):
        generator = torch.Generator().manual_seed(seed)
        parts = [torch.randn(7, 2, 4, generator=generator), torch.randn(7, 2, 1, generator=generator)]
        return [part.double().requires_grad_() for part in (*parts, torch.rand(7, 2, 1, generator=generator) + 1)]

    def call(*inputs):
        return tuple(
            rau.ring_attention_update(*inputs, lengths, "TND", softmax_layout=order, profile="portable")
        )

    assert torch.autograd.gradcheck(call, [*tnd(0), *tnd(1)])


@pytest.mark.parametrize("K", [1, 2, 3, 5])
def test_gradcheck_through_merge_states(K):
    def call(*inputs):
        return tuple(rau.merge_states([inputs[k : k + 3] for k in range(0, len(inputs), 3)]))

    assert torch.autograd.gradcheck(call, leaves(*(state(S=3, seed=seed) for seed in range(K))))


def test_ties_share_the_gradient_of_the_maximum():
    prev, cur = leaves(state()), leaves(state(seed=1))
    with torch.no_grad():
        cur[1].copy_(prev[1])
    rau.ring_attention_update(*prev, *cur, profile="portable").softmax_max.sum().backward()
    assert (prev[1].grad == 0.5).all() and (cur[1].grad == 0.5).all()
    # With both maxima moved together, the output and the sum change as if there were one of them.
    weights = torch.randn(5, 2, 24, dtype=torch.float64)

    def call(both):
        result = rau.ring_attention_update(prev[0].detach(), both, prev[2].detach(), cur[0].detach(), both,
                                           cur[2].detach(), profile="portable")  # fmt: skip
        return (result.attn_out * weights).sum(), result.softmax_sum

    assert torch.autograd.gradcheck(call, prev[1].detach().clone().requires_grad_())


def test_empty_rows_have_gradients_of_zero_and_do_not_disturb_others():
    prev, cur = leaves(state()), leaves(state(seed=1))
    with torch.no_grad():
        prev[1][0, 0, 0] = -torch.inf  # prev empty
        prev[0][0, 0, :8] = torch.nan  # ... with NaN behind it
        cur[2][0, 1, 1] = 0  # cur empty
        prev[2][1, 1, 2] = cur[2][1, 1, 2] = 0  # both
    result = rau.ring_attention_update(*prev, *cur, profile="portable")
    upstream = torch.randn(5, 2, 24, dtype=torch.float64)
    ((result.attn_out * upstream).sum() + result.softmax_sum.sum()).backward()
    assert all(torch.isfinite(part.grad).all() for part in (*prev, *cur))
    assert not prev[0].grad[0, 0, :8].any() and torch.equal(cur[0].grad[0, 0, :8], upstream[0, 0, :8])
    assert prev[1].grad[0, 0, 0] == 0 and prev[2].grad[0, 0, 0] == 0
    assert cur[2].grad[0, 0, 0] == 1 and cur[1].grad[0, 0, 0] == 0  # alone: the sum comes back as it is
    assert not prev[0].grad[2, 1, 8:16].any() and not cur[0].grad[2, 1, 8:16].any()

    # The rows that see both sides have the gradient they have without any empty row around.
    def ordinary(*inputs):
        return rau.ring_attention_update(*inputs, profile="portable").attn_out[3:]

    assert torch.autograd.gradcheck(ordinary, [part.detach().nan_to_num(0, 0, 0).requires_grad_() for part in (*prev, *cur)])


def test_gradients_of_16_bits_are_close_to_those_of_float64():
    wide = [part.requires_grad_() for k in range(2) for part in (p.detach() for p in state(seed=k))]
    half = [
        (part.detach().to(torch.bfloat16) if k % 3 == 0 else part.detach().float()).requires_grad_()
        for k, part in enumerate(wide)
    ]
    for inputs in (wide, half):
        rau.ring_attention_update(*inputs, profile="portable").attn_out.sum().backward()
    for one, other in zip(wide, half, strict=True):
        assert other.grad.dtype == other.dtype
        torch.testing.assert_close(one.grad, other.grad.double(), rtol=0.05, atol=0.05)


def test_what_is_saved_for_the_backward_is_the_inputs_alone():
    prev, cur = leaves(state(lanes=8)), leaves(state(lanes=8, seed=1))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda part: saved.append(part) or part, lambda part: part):
        rau.ring_attention_update(*prev, *cur, profile="portable")
    own = {part.data_ptr() for part in (*prev, *cur)}
    assert sum(part.nbytes for part in saved if part.data_ptr() not in own) == 0


def test_out_with_gradients_is_refused():
    prev, cur = leaves(state()), state(seed=1)
    with pytest.raises(rau.UnsupportedError, match="out is given, and an input requires grad"):
        rau.ring_attention_update(*prev, *cur, profile="portable", out=tuple(part.detach().clone() for part in cur))
    with torch.no_grad():
        rau.ring_attention_update(*prev, *cur, profile="portable", out=tuple(part.detach().clone() for part in cur))


def test_forward_mode_is_refused():
    prev, cur = state(), state(seed=1)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(prev.attn_out, torch.ones_like(prev.attn_out))
        with pytest.raises(rau.UnsupportedError, match="forward-mode AD is not implemented"):
            rau.ring_attention_update(dual, *prev[1:], *cur, profile="portable")


@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap])
def test_functorch_is_refused(transform):
    prev, cur = state(), state(seed=1)

    def loss(out):
        return rau.ring_attention_update(out, *prev[1:], *cur, profile="portable").attn_out.sum()

    with pytest.raises(rau.UnsupportedError, match="functorch transforms .* are not implemented"):
        transform(loss)(prev.attn_out)


# ---- operators, compile, export -----------------------------------------------------------------------------------


def test_opcheck():
    arguments = (*state(lanes=8, grad=True), *state(lanes=8, seed=1, grad=True), None, "SBH", "TND", "portable", "metadata", None)
    rau.ring_attention_update(*state(grad=True), *state(), profile="portable")  # loads the operators
    torch.library.opcheck(torch.ops.rau.ring_attention_update.default, arguments)
    states = [state(grad=True), state(seed=1), state(seed=2)]
    columns = [list(column) for column in zip(*states, strict=True)]
    torch.library.opcheck(torch.ops.rau.merge_states.default, (*columns, None, "SBH", "TND", "portable", "metadata", True, None))


def graph_targets(graph_module):
    return [str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"]


def test_compile_makes_one_operator_and_dynamic_shapes_work():
    graphs = []

    def collect(graph_module, _):
        graphs.append(graph_module)
        return graph_module.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=collect)
    def step(prev, cur):
        return rau.ring_attention_update(*prev, *cur)

    for S in (5, 9, 4):
        prev, cur = state(S=S, dtype=torch.float32, lanes=8), state(S=S, dtype=torch.float32, lanes=8, seed=1)
        result = step(prev, cur)
        assert isinstance(result, rau.AttentionState)
        eager = rau.ring_attention_update(*prev, *cur)
        assert all(torch.equal(one, other) for one, other in zip(result, eager, strict=True))
    assert len(graphs) == 1
    assert sum("rau" in target for target in graph_targets(graphs[0])) == 1


def test_inductor_with_gradients():
    @torch.compile(fullgraph=True)
    def loss(*inputs):
        return (rau.ring_attention_update(*inputs, profile="portable").attn_out * 2).sum()

    compiled, eager = leaves(state(), state(seed=1)), leaves(state(), state(seed=1))
    loss(*compiled).backward()
    (rau.ring_attention_update(*eager, profile="portable").attn_out * 2).sum().backward()
    for one, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_use_backend_is_honoured_at_run_time(caplog):
    @torch.compile(fullgraph=True, backend="eager")
    def step(prev, cur):
        return rau.ring_attention_update(*prev, *cur, profile="portable")

    prev, cur = state(), state(seed=1)
    step(prev, cur)
    for name in ("numpy", "torch", "cython"):
        with rau.use_backend(name), caplog.at_level("DEBUG", logger="rau"):
            caplog.clear()
            step(prev, cur)
        assert [record.getMessage() for record in caplog.records] == [
            f"ring_attention_update: backend {name} (use_backend)"
        ]


def test_a_bad_shape_fails_at_trace_time_with_our_message():
    @torch.compile(fullgraph=True, backend="eager")
    def step(prev, cur):
        return rau.ring_attention_update(*prev, *cur, profile="portable")

    with pytest.raises(Exception, match="cur_softmax_sum has shape"):
        step(state(), state(seed=1)._replace(softmax_sum=torch.ones(2, 3, 4, 1, dtype=torch.float64)))


def test_bad_lengths_fail_at_run_time_with_our_message():
    @torch.compile(fullgraph=True, backend="eager")
    def step(prev, cur, lengths):
        return rau.ring_attention_update(*prev, *cur, lengths, "TND")

    parts = [torch.ones(6, 2, 64), torch.ones(6, 2, 8), torch.ones(6, 2, 8)]
    step(parts, parts, torch.tensor([0, 2, 6]))
    with pytest.raises(rau.ConstraintError, match="it looks like the lengths|looks like the lengths themselves"):
        step(parts, parts, torch.tensor([2, 2, 2]))


def test_export_keeps_the_operator():
    class Step(torch.nn.Module):
        def forward(self, prev, cur):
            return rau.ring_attention_update(*prev, *cur, profile="portable")

    prev, cur = tuple(state()), tuple(state(seed=1))
    program = torch.export.export(Step(), (prev, cur))
    assert sum("rau.ring_attention_update" in target for target in graph_targets(program.graph_module)) == 1
    eager = rau.ring_attention_update(*prev, *cur, profile="portable")
    assert all(torch.equal(one, other) for one, other in zip(program.module()(prev, cur), eager, strict=True))


def test_a_backend_object_has_no_place_in_a_graph():
    with pytest.raises(rau.UnsupportedError, match="expected a name"):
        rau.ring_attention_update(*state(grad=True), *state(), profile="portable", backend=rau.registry.get("numpy"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_flushed_subnormals_change_nothing_in_the_core(dtype):
    """torch.set_flush_denormal is a mode of the thread; the core's workers set their own."""
    case = Case(id=f"flush/{dtype}", tokens=300, heads=4, head_dim=64, dtype=str(dtype)[6:], outputs="tiny")
    reference = case.make().run("cython")
    call = case.make()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        result = call.run("cython")
    finally:
        torch.set_flush_denormal(False)
    assert not same_bits(reference, result)


# ------------------------------------------------------------------------------------------------------------- threads

BESIDE = """
import threading
import {first}
import {second}
import numpy as np
from rau.testing import same_bits
from states import sbh

cases = [(sbh(3000, 1, 4, 64, seed=k), sbh(3000, 1, 4, 64, seed=9)) for k in range(3)]
matrix = torch.arange(400.0 * 400).reshape(400, 400).remainder(7)
merged, product = [rau.ring_attention_update(*prev, *cur, backend="numpy") for prev, cur in cases], (matrix @ matrix).tolist()
rau.set_num_threads(2)
torch.set_num_threads(2)
wrong = []
def work(k):
    for _ in range(10):
        prev, cur = cases[k]
        wrong.extend(same_bits(rau.ring_attention_update(*prev, *cur, backend="cython"), merged[k]))
        wrong.extend([] if (matrix @ matrix).tolist() == product else ["torch"])
threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(wrong)
"""


@pytest.mark.parametrize("order", [("rau", "torch"), ("torch", "rau")], ids=" first, ".join)
def test_two_openmp_runtimes_in_one_process(order):
    """torch brings its own beside the core's; whoever comes first, three threads that call both neither hang nor change bits."""
    pytest.importorskip("rau._core", reason="test_packaging.py fails where it should be there")
    code = BESIDE.format(first=order[0], second=order[1])
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=os.environ | {"PYTHONPATH": path})
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
