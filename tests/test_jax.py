"""JAX: its arrays by the compiled core without a copy, traced by jit, vmap and grad, in a ring of devices, and by jax.numpy."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from patience import LIMIT

import rau
from rau.backends import Backend, Capabilities
from rau.backends.cython_ import CythonBackend
from rau.backends.jax_ import JaxBackend, JaxNumpyBackend
from rau.errors import BackendUnavailableError, ConstraintError, UnsupportedError
from rau.testing import check_backend
from rau.testing.cases import Case
from rau.testing.conformance.autograd import MASK, ways_of_rows
from rau.testing.reference.gradients import gradients_of_rows

ROOT = Path(__file__).parent.parent
asked = {"jax", "jax_numpy"} & {name.strip() for name in os.environ.get("RAU_TEST_BACKENDS", "").split(",")}
if asked or importlib.util.find_spec("jax"):
    import jax
    import jax.numpy as jnp

    from rau.backends import jax_, jax_ffi
else:
    jax = None
needs_jax = pytest.mark.skipif(jax is None, reason="JAX is not installed and was not asked for")
CORE = rau.registry.get("cython") if rau.registry.status()[0].available else None
if CORE is None:
    assert os.environ.get("RAU_EXPECT_NO_CORE"), "no compiled core; set RAU_EXPECT_NO_CORE=1 where that is meant to be"
needs_core = pytest.mark.skipif(CORE is None, reason="no compiled core, as RAU_EXPECT_NO_CORE says")


def numbers(**case):
    return Case(**{"id": "jax", "tokens": 6, "heads": 3, "head_dim": 8, "statistics": "empty", **case}).fill()


def of_jax(state):
    return rau.AttentionState(*map(JaxBackend.asarray.__get__(object()), state))


def same(found, expected):
    for mine, its in zip(found, expected, strict=True):
        mine, its = np.asarray(mine), np.asarray(its)
        assert (mine.dtype, mine.shape, mine.tobytes()) == (its.dtype, its.shape, its.tobytes())


def test_rau_imports_no_jax():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, rau; rau.registry.status; sys.exit(bool({'jax', 'jaxlib'} & set(sys.modules)))"], check=False
    )
    assert done.returncode == 0


def test_where_jax_is_missing_the_message_has_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    for backend in (JaxBackend, JaxNumpyBackend):
        with pytest.raises(BackendUnavailableError, match=r"JAX is missing: pip install .*\[jax\]"):
            backend()


# ------------------------------------------------------------------------------------------------------- bits and memory

CALLS = {
    "SBH float32": ({}, {}),
    "SBH float16": ({"dtype": "float16"}, {}),
    "BSND bfloat16": ({"dtype": "bfloat16", "layout": "BSND", "batch": 2}, {}),
    "BNSD float64, 1 lane": ({"dtype": "float64", "layout": "BNSD", "lanes": 1, "batch": 2}, {}),
    "bfloat16 into float32": ({"cur_dtype": "bfloat16"}, {}),
    "5 states": ({"states": 5}, {}),
    "TND": ({"layout": "TND", "lengths": (6,)}, {}),
    "TND packed": ({"layout": "TND", "softmax_layout": "SBH", "lengths": (4, 0, 2)}, {"actual_seq_qlen": [0, 4, 4, 6], "softmax_layout": "SBH"}),
    "output alone": ({"states": 3}, {"statistics": False}),
    "no row": ({"tokens": 0}, {}),
    "subnormal": ({}, {}),
}  # fmt: skip


@needs_jax
@needs_core
@pytest.mark.parametrize("name", CALLS)
def test_the_bits_of_the_core_eagerly_and_under_jit(name):
    case, options = CALLS[name]
    states = numbers(**case)
    options = {"layout": case.get("layout", "SBH"), **options}
    if name == "subnormal":  # which XLA itself would make 0
        states = [state._replace(attn_out=(state.attn_out * np.float32(2.0**-140)), softmax_sum=state.softmax_sum * 0 + 1) for state in states]
        assert np.count_nonzero((states[0].attn_out != 0) & (np.abs(states[0].attn_out) < 2.0**-126)) > 9

    def merge(states):
        merged = rau.merge_states(states, **options)
        return merged if options.get("statistics", True) else (merged,)

    expected = merge(states)
    own = list(map(of_jax, states))
    eagerly, traced = merge(own), jax.jit(merge)(own)
    assert all(isinstance(part, jax.Array) for part in (*eagerly, *traced))
    same(eagerly, expected)
    same(traced, expected)
    if name == "no row":
        return
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), own, own[::-1]) if "cur_dtype" not in case else None
    if stacked:
        both = jax.vmap(merge)(stacked)
        same([part[0] for part in both], expected)
        same([part[1] for part in both], merge(states[::-1]))


@needs_jax
@needs_core
def test_nothing_is_copied(monkeypatch):
    """The core is given the addresses that JAX has, and what it writes is what JAX then has; under jit too."""
    seen = []
    merge = CythonBackend.merge

    def watched(core, problem, states, out):
        result = merge(core, problem, states, out)
        seen.append([part.ctypes.data for state in (*states, result) for part in state])
        return result

    monkeypatch.setattr(CythonBackend, "merge", watched)  # XLA calls the first instance, which may be no longer the registry's
    states = list(map(of_jax, numbers(tokens=300, dtype="bfloat16")))
    given = [part.unsafe_buffer_pointer() for state in states for part in state]
    merged = rau.merge_states(states)
    assert seen.pop() == [*given, *(part.unsafe_buffer_pointer() for part in merged)]
    traced = jax.jit(rau.merge_states)(states)
    assert seen.pop() == [*given, *(part.unsafe_buffer_pointer() for part in traced)]


@needs_jax
@needs_core
def test_a_result_is_where_its_inputs_are_and_bound_to_a_device_only_if_they_are():
    states = list(map(of_jax, numbers()))
    assert not rau.merge_states(states).attn_out.committed
    bound = [rau.AttentionState(*(jax.device_put(part, jax.devices()[0]) for part in state)) for state in states]
    assert rau.merge_states(bound).attn_out.committed


if jax is not None:

    class Jitted(JaxBackend):
        """Whatever the kit calls, through XLA."""

        name = "jitted"

        def merge(self, problem, states, out):
            return rau.AttentionState(*jax.jit(lambda states: tuple(super(Jitted, self).merge(problem, states, None)))(states))


@needs_jax
@needs_core
def test_the_conformance_kit():
    report = check_backend("jax")
    assert report.passed, str(report)
    assert len(report.succeeded) > 600
    assert {excluded.message for excluded in report.excluded} == {
        "it does not write into arrays that are given: leave out=None", "it takes no torch tensors",
    }  # fmt: skip


@needs_jax
@needs_core
@pytest.mark.parametrize("cases", ["tnd/*", "outputs/*"])
def test_the_conformance_kit_under_jit(cases):
    report = check_backend(Jitted, select=cases)
    assert report.passed, str(report)
    assert len(report.succeeded) > 30


@needs_jax
@pytest.mark.parametrize(
    ("wide", "cases"), [("float64", "statistics/*"), ("float64", "outputs/*"), ("float32", "statistics/*-float32")]
)
def test_jax_numpy_keeps_its_tolerance(wide, cases, monkeypatch):
    """The kit, with the rows of a device that has float64 and of one that has not."""
    monkeypatch.setattr(jax_, "_wide", getattr(np, wide))
    report = check_backend("jax_numpy", select=cases)
    assert report.passed, str(report)
    assert len(report.succeeded) > 10


@needs_jax
def test_no_stack_left_is_no_device_without_float64(monkeypatch):
    """Nor is it kept for one: rows would be in float32 from then on."""

    def deep(array):
        raise RecursionError

    monkeypatch.setattr(jax_, "_wide", None)
    with monkeypatch.context() as patched, pytest.raises(RecursionError):
        patched.setattr(jax, "block_until_ready", deep)
        jax_.wide()
    assert jax_.wide() is np.float64


@needs_jax
@pytest.mark.parametrize("layout", ["SBH", "BNSD", "TND"])
@pytest.mark.parametrize("packed", [False, True])
def test_jax_numpy_under_jit(layout, packed):
    if packed and layout != "TND":
        return
    states = numbers(layout=layout, softmax_layout="SBH" if packed else "TND", lengths=(4, 2), batch=1 if layout == "TND" else 2)
    options = {"layout": layout, "softmax_layout": "SBH", "actual_seq_qlen": [0, 4, 6]} if packed else {"layout": layout}
    expected = rau.merge_states(states, **options)
    found = jax.jit(lambda states: rau.merge_states(states, **options, backend="jax_numpy"))(list(map(of_jax, states)))
    for mine, its in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-6, atol=1e-6)


@needs_jax
def test_jax_numpy_has_one_program_whatever_the_lengths(monkeypatch):
    """Compiled anew for every set of lengths, a training run would compile at each step, and keep all of it."""
    traces, own = [], jax_._merged
    monkeypatch.setattr(jax_, "_merged", lambda *given: traces.append(given) or own(*given))
    backend = jax_.JaxNumpyBackend()
    for lengths in ([0, 4, 6], [0, 1, 6], [0, 2, 3, 6], [0, 6]):
        states = numbers(layout="TND", softmax_layout="SBH", lengths=tuple(np.diff(lengths)), batch=1)
        options = {"layout": "TND", "softmax_layout": "SBH", "actual_seq_qlen": lengths}
        expected = rau.merge_states(states, **options)
        found = rau.merge_states(list(map(of_jax, states)), **options, backend=backend)
        for mine, its in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, its, rtol=1e-6, atol=1e-6)
        jax.grad(lambda one, other: rau.merge_states([one, other], **options, backend=backend).attn_out.sum())(
            *map(of_jax, states)
        )
    assert len(traces) == 1


# -------------------------------------------------------------------------------------------------------------- gradients


def naively(states):
    """The formulas of the merge, as they stand in every paper: (attn_out, max, sum) of states in layout "BNSD", 1 lane."""
    outs, maxima, sums = (jnp.stack(parts) for parts in zip(*states, strict=True))
    top = maxima.max(0)
    shares = sums * jnp.exp(maxima - top)
    return (shares / shares.sum(0) * outs).sum(0), top, shares.sum(0)


def weighted(merge, how):
    """A number that depends on all of a result, in its own way on each element."""

    def loss(states):
        merged = merge(states)
        parts = [part for part in merged if part is not None]
        return sum((jnp.cos(jnp.arange(part.size).reshape(part.shape) + k) * part**2).sum() for k, part in enumerate(parts))

    return jax.jit(loss) if how == "jit" else loss


def merged64(states):
    return rau.merge_states(states, layout="BNSD")


@needs_jax
@needs_core
@pytest.mark.parametrize("backend", ["jax", "jax_numpy"])
@pytest.mark.parametrize("how", ["eager", "jit"])
def test_gradients_and_those_of_gradients(how, backend):
    """Against JAX's own differentiation of the formulas, in float64, where all states have keys; one weight is tied."""
    with jax.enable_x64(True), rau.use_backend(backend):
        states = numbers(layout="BNSD", dtype="float64", lanes=1, states=3, statistics="ordinary", tokens=2, heads=2, head_dim=3)
        states[1].softmax_max[0, 0, 0] = states[0].softmax_max[0, 0, 0] = 9.0
        own = list(map(of_jax, states))
        found, expected = (jax.grad(weighted(merge, how))(own) for merge in (merged64, naively))
        for mine, its in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(mine, its, rtol=1e-10, atol=1e-12)

        if how == "eager":
            return  # the same functions; each of their many operations would be compiled by itself

        def slope(merge):
            return lambda states: sum((part**2).sum() for part in jax.tree.leaves(jax.grad(weighted(merge, how))(states)))

        found, expected = (jax.jit(jax.grad(slope(merge)))(own) for merge in (merged64, naively))
        for mine, its in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(mine, its, rtol=1e-8, atol=1e-10)


@needs_jax
@needs_core
def test_gradients_of_float32_where_the_program_has_no_float64():
    """They have the inputs' dtypes, and go to lane 0; empty rows, and what stands behind them, give zeros and no NaN."""
    assert not jax.config.jax_enable_x64
    states = numbers(layout="TND", softmax_layout="SBH", lengths=(4, 2), dtype="bfloat16")
    states[0].softmax_sum[:2] = 0  # packed: of the first head all four tokens of the first sequence, of the second head two
    states[0].attn_out[:4, 0] = states[0].attn_out[:2, 1] = np.nan
    own = list(map(of_jax, states))
    options = {"layout": "TND", "softmax_layout": "SBH", "actual_seq_qlen": np.array([0, 4, 6])}

    def loss(states, statistics):
        merged = rau.merge_states(states, **options, statistics=statistics)
        return (merged.attn_out if statistics else merged).astype(jnp.float32).sum()

    found = jax.grad(loss)(own, True)
    for state, grads in zip(own, found, strict=True):
        for part, grad in zip(state, grads, strict=True):
            assert (grad.dtype, grad.shape) == (part.dtype, part.shape)
            assert np.isfinite(np.asarray(grad, np.float32)).all()
        assert not np.asarray(grads.softmax_max)[..., 1:].any()
        assert np.asarray(grads.softmax_sum)[..., 0].any()
    assert not np.asarray(found[0].softmax_sum)[:2].any()
    same(jax.tree.leaves(jax.grad(loss)(own, False)), jax.tree.leaves(found))


@needs_jax
@needs_core
@pytest.mark.parametrize("base", ["e", "2"])
def test_gradients_through_log_sum_exps(base):
    """A softmax over all keys is the merge of softmaxes over parts of them, and so are their gradients."""
    rng = np.random.default_rng(0)
    scores, values = jnp.asarray(rng.standard_normal((2, 3, 4, 10)), jnp.float32), jnp.asarray(rng.standard_normal((2, 3, 10, 5)), jnp.float32)

    def whole(scores, values):
        return (jax.nn.softmax(scores) @ values, jax.nn.logsumexp(scores, -1))

    def parts(scores, values):
        unit = np.float32(np.log(2) if base == "2" else 1)
        pairs = [whole(scores[..., cut], values[:, :, cut]) for cut in (slice(0, 3), slice(3, 10))]
        out, lse = rau.merge_lse([(out, lse / unit) for out, lse in pairs], "BNSD", base=base)
        return out, lse * unit

    for how in ("eager", "jit"):
        found, expected = (jax.grad(weighted(lambda x: attend(*x), how))((scores, values)) for attend in (parts, whole))
        for mine, its in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, its, rtol=2e-5, atol=2e-5)


# --------------------------------------------------------------------------------------------------------- all other calls


def others(states, backend_of=None):
    """What is asked of a merge besides, each a function of states in layout "TND" with 8 lanes."""
    how = {"layout": "TND", "lse_layout": "TN", "base": "2"}
    mask = np.array([1, 0, 1, 1, 0, 1], bool)
    scale = states[0].softmax_max[0, :, 0]  # a number for each head
    return {
        "tokens": lambda s: rau.merge_states(s, layout="TND", tokens=mask),
        "padded": lambda s: rau.merge_states(s, [0, 2, 4], "TND", cu_seqlens_padded=[0, 3, 6]),
        "indptr": lambda s: rau.merge_states(s[0], layout="TND", indptr=[0, 2, 2, 5, 6]),
        "dtype": lambda s: rau.merge_states(s, layout="TND", dtype="bfloat16"),
        "eight bits": lambda s: rau.merge_states(s, layout="TND", dtype="float8_e4m3fn", scale=scale),
        "stacked": lambda s: rau.merge_states([type(x)(*x) for x in s], layout="TND"),
        "sink": lambda s: rau.add_sink(s[0], s[1].softmax_max[0, :, 0], "TND"),
        "packed sink": lambda s: rau.add_sink(s[0], s[1].softmax_max[0, :, 0], "TND", softmax_layout="SBH", actual_seq_qlen=[0, 4, 6]),
        "reorder": lambda s: [rau.reorder_softmax(s[0].softmax_max, [0, 4, 6], to=to) for to in ("TND", "SBH")],
        "padded lse": lambda s: rau.AttentionState.from_lse(
            s[0].attn_out[:4], s[1].softmax_max[:4, :, 0].reshape(2, 2, 3), base="e", layout="TND", lse_layout="BSN", actual_seq_qlen=[0, 2, 4]
        ),
        "from_lse": lambda s: rau.AttentionState.from_lse(s[0].attn_out, s[0].softmax_max[..., 0], inf_is_empty=True, lanes=8, **how),
        "from_max_sum": lambda s: rau.AttentionState.from_max_sum(*s[0], base="2", layout="TND", stats_layout="TN"),
        "merge_lse of some": lambda s: rau.merge_lse([(x.attn_out, x.softmax_max[..., 0]) for x in s], tokens=mask, **how),
        "log-sum-exps alone": lambda s: rau.merge_lse([(None, x.softmax_max[..., 0]) for x in s], **how)[1:],
    }  # fmt: skip


@needs_jax
@needs_core
@pytest.mark.parametrize("name", others(numbers(layout="TND")))
def test_every_other_call_gives_what_it_gives_of_numpy_arrays(name):
    """The same bits; where a logarithm is taken, or an exponential by XLA's fused operations, within its last places."""
    states = numbers(layout="TND", lengths=(6,))
    own = list(map(of_jax, states))
    expected = others(states)[name](states)
    call = others(own)[name]
    for found in (call(own), jax.jit(call)(own) if name != "eight bits" else jax.jit(lambda s: others(s)[name](s))(own)):
        for mine, its in zip(found, expected, strict=True):
            assert isinstance(mine, jax.Array)
            assert (mine.dtype, mine.shape) == (its.dtype, its.shape)
            np.testing.assert_allclose(np.asarray(mine, np.float32), np.asarray(its, np.float32), rtol=3e-7, atol=1e-30)
    if name not in ("from_lse", "from_max_sum", "merge_lse of some", "log-sum-exps alone"):
        same(call(own), expected)


@needs_jax
@needs_core
def test_a_running_state_is_new_after_each_update():
    states = numbers(dtype="bfloat16", states=3, tokens=6)
    rings = rau.StreamingMerge(), rau.StreamingMerge()
    before = []
    for k, state in enumerate(states):
        for ring, its in zip(rings, (state, of_jax(state)), strict=True):
            if k == 1:
                its = rau.AttentionState(its[0][3:], its[1][:, :, 3:], its[2][:, :, 3:])
            ring.update(*its, tokens="back" if k == 1 else None)
        before.append((rings[1].running, [np.array(part) for part in rings[1].running]))
    same(rings[1].result("bfloat16"), rings[0].result("bfloat16"))
    for running, values in before:  # what somebody has taken of it stays what it was
        same(running, values)


# --------------------------------------------------------------------------------------------------------------- refusals


def two():
    return [of_jax(state) for state in numbers(layout="TND", lengths=(6,))]


def traced(call):
    return lambda: jax.jit(call)(two())


REFUSED = {
    "out": (lambda: rau.merge_states(two(), layout="TND", out=two()[0]), ConstraintError,
            r"\[out-writable\] out is given, and JAX arrays cannot be written into; expected None"),
    "out of a pair": (lambda: rau.merge_lse([(s[0], s[1][..., 0]) for s in two()], "TND", base="e", lse_layout="TN", out=(two()[0][0], two()[0][1][..., 0])),
                      ConstraintError, r"\[out-writable\] out is given, and JAX arrays cannot be written into"),
    "out of some tokens": (lambda: rau.merge_states(two(), layout="TND", tokens=[1], out=two()[0]), ConstraintError, "cannot be written into"),
    "out, traced": (traced(lambda s: rau.merge_states(s, layout="TND", out=s[0])), UnsupportedError, "out is given, and JAX traces the call"),
    "values, traced": (traced(lambda s: rau.merge_states(s, layout="TND", check="values")), UnsupportedError,
                       'read while JAX traces .* Leave check at "metadata"'),
    "lengths, traced": (lambda: jax.jit(lambda s, n: rau.merge_states(s, n, "TND"))(two(), jnp.array([0, 6])), UnsupportedError,
                        "pass lengths, tokens and indptr as lists or NumPy arrays"),
    "tokens, traced": (lambda: jax.jit(lambda s, n: rau.merge_states(s, layout="TND", tokens=n))(two(), jnp.array([0, 5])), UnsupportedError,
                       "pass lengths, tokens and indptr as lists or NumPy arrays"),
    "streaming, traced": (traced(lambda s: rau.StreamingMerge("TND").update(*s[0])), UnsupportedError,
                          "a running state that changes has no place in what is traced. Merge by rau.ring_attention_update"),
    "NumPy among them": (lambda: rau.merge_states([two()[0], numbers(layout="TND", lengths=(6,))[1]], layout="TND"), ConstraintError,
                         "is a numpy array and .* a jax one; expected one kind"),
    "NumPy among tracers": (traced(lambda s: rau.merge_states([s[0], numbers(layout="TND", lengths=(6,))[1]], layout="TND")), ConstraintError,
                            r"a ndarray among JAX arrays; .* Convert it with jax.numpy.asarray"),
    "another backend": (lambda: rau.merge_states(two(), layout="TND", backend="cython"), UnsupportedError, "jax:Array is not one of numpy:ndarray"),
    "another backend, traced": (traced(lambda s: rau.merge_states(s, layout="TND", backend="cython")), UnsupportedError, "jax:Array is not one of"),
    "shapes, traced": (traced(lambda s: rau.merge_states([s[0], [x[:-1] for x in s[1]]], layout="TND")), ConstraintError, r"\[shape-match\]"),
    "a whole of a class": (lambda: rau.merge_attention(two()[0][0], [], print, print, base="e"), ConstraintError, "expected a torch tensor"),
}  # fmt: skip


@needs_jax
@needs_core
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_and_the_error_says_what_to_do(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


@needs_jax
@needs_core
@pytest.mark.parametrize(("state", "field"), [(0, 0), (1, 2)])
def test_an_array_that_was_donated(state, field):
    states = two()
    states[state][field].delete()
    with pytest.raises(ConstraintError, match="has been deleted or donated; expected an array that has its values"):
        rau.merge_states(states, layout="TND")


@needs_jax
@needs_core
def test_lengths_and_log_sum_exps_of_another_dtype():
    """The advice has JAX's own methods, and can be followed."""
    states, lengths = two(), jnp.array([0, 6])
    with pytest.raises(ConstraintError) as caught:
        rau.merge_states(states, lengths, "TND", softmax_layout="SBH", profile="mindspore")
    assert "expected int64. Pass numpy.asarray(actual_seq_qlen).astype(numpy.int64)." in str(caught.value)
    rau.merge_states(states, np.asarray(lengths).astype(np.int64), "TND", softmax_layout="SBH")
    narrow = states[0][1].astype("bfloat16")[..., 0]
    with pytest.raises(ConstraintError) as caught:
        rau.AttentionState.from_lse(states[0][0], narrow, base="e", layout="TND", lse_layout="TN")
    assert "or pass lse.astype(numpy.float32), at the price" in str(caught.value)
    rau.AttentionState.from_lse(states[0][0], narrow.astype(np.float32), base="e", layout="TND", lse_layout="TN")
    lengths.delete()
    with pytest.raises(ConstraintError, match="actual_seq_qlen has been deleted or donated"):
        rau.merge_states(states, lengths, "TND", softmax_layout="SBH")


@needs_jax
@needs_core
def test_what_goes_wrong_while_xla_runs_the_program_is_told(monkeypatch):
    monkeypatch.setattr(CythonBackend, "merge", lambda *arguments: 1 / 0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="ZeroDivisionError: division by zero"):
        jax.block_until_ready(jax.jit(lambda s: rau.merge_states(s, layout="TND"))(two()))


@needs_jax
def test_another_major_version_of_the_interface_is_refused():
    version = jax_ffi._Version(0, None, 1, 0)
    api = jax_ffi._Api(version=version)
    frame = jax_ffi._Frame(api=jax_ffi.ctypes.pointer(api))
    with pytest.raises(RuntimeError, match=r"jaxlib has version 1.0 of XLA's foreign functions; expected 0\.\*"):
        jax_ffi._introduce(frame)


# ------------------------------------------------------------------------------------------------------- several devices

SHARDED = """
import jax, json, numpy as np, rau
from jax.sharding import Mesh, NamedSharding, PartitionSpec
states = [rau.AttentionState(*(jax.numpy.full(shape, k, "float32") for shape in ((8, 2, 4), (8, 2, 1), (8, 2, 1)))) for k in (1, 2)]
mesh, split = Mesh(jax.devices(), ("x",)), PartitionSpec("x")
spread = [jax.tree.map(lambda part: jax.device_put(part, NamedSharding(mesh, split)), state) for state in states]
told = {}
try:
    rau.merge_states(spread, layout="TND")
except rau.errors.ConstraintError as error:
    told["spread"] = str(error)
there = [jax.tree.map(lambda part: jax.device_put(part, jax.devices()[2]), state) for state in states]
merged = rau.merge_states(there, layout="TND")
told["device"] = merged.attn_out.device.id
try:
    rau.merge_states([there[0], jax.tree.map(lambda part: jax.device_put(part, jax.devices()[1]), states[1])], layout="TND")
except rau.errors.ConstraintError as error:
    told["two"] = str(error)
def whole(first, second):
    return tuple(rau.merge_states([first, second], layout="TND"))
replicated = jax.shard_map(whole, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split)
alone = [np.asarray(part) for part in rau.merge_states([jax.tree.map(lambda part: part[:2], states[0]), jax.tree.map(lambda part: part[:2], states[1])], layout="TND")]
mixed = jax.jit(replicated)(jax.tree.map(lambda part: part[:2], states[0]), states[1])
told["mixed"] = all(np.array_equal(np.asarray(part)[2 * k : 2 * k + 2], its) for part, its in zip(mixed, alone) for k in range(4))
grads = jax.jit(jax.grad(lambda *s: sum(part.sum() for part in replicated(*s)), (0, 1)))(jax.tree.map(lambda part: part[:2], states[0]), states[1])
told["finite"] = all(bool(np.isfinite(part).all()) for grad in grads for part in grad)
print(json.dumps(told))
"""


def on_four_devices(*command):
    kept = {name: value for name, value in os.environ.items() if name != "RAU_BACKEND"}
    kept |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=LIMIT, env=kept, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_jax
@needs_core
def test_arrays_on_several_devices():
    told = json.loads(on_four_devices("-c", SHARDED))
    assert "is spread over 4 devices; expected one. Call rau inside of jax.shard_map" in told["spread"]
    assert told["device"] == 2
    assert "cpu:1" in told["two"]
    assert "cpu:2" in told["two"]
    assert told["mixed"]
    assert told["finite"]


@needs_jax
@needs_core
def test_the_ring_in_shard_map():
    """The example judges itself, by attention in one piece in float64; here, that it does not judge nothing."""
    printed = on_four_devices("examples/ring_attention_jax.py", "--causal", "--tokens", "64", "--heads", "2", "--head-dim", "16")
    assert [line.split("  ")[0].strip() for line in printed.splitlines()] == ["rau", "as its authors wrote it", "4 devices, 64 tokens, causal"]
    errors = [float(word) for line in printed.splitlines()[:2] for word in line.split() if "e-" in word]
    assert len(errors) == 8
    assert all(0 < error < 1e-5 for error in errors)


@needs_jax
@pytest.mark.parametrize("backend", [pytest.param("jax", marks=needs_core), "jax_numpy"])
@pytest.mark.parametrize("way", ["tokens", "padding", "indptr", "a sink"])
def test_gradients_go_to_the_rows_that_were_merged(way, backend):
    """As the kit's check of tensors: sixteen roundings, of a size without signs."""
    merge, made = ways_of_rows(backend)[way]
    states = numbers(layout="TND", tokens=9, lengths=(4, 5), qlen="array", lanes=1, statistics="ordinary")
    for part, empty in zip(states[1], (np.nan, -np.inf, 0), strict=True):
        part[~MASK], part[0] = np.nan, empty
    logits = np.array([0.5, -1, 2], np.float32)
    rng = np.random.default_rng(4)
    g, h = (rng.integers(-16, 17, (len(made), 3, *more)) / 8 for more in ((8,), ()))
    sink = np.zeros((1, 3, 8)), logits.reshape(1, 3, 1), np.ones((1, 3, 1))
    wanted = gradients_of_rows([*states, sink], made, g, h)
    alive = np.array([t for t, parts in enumerate(made) if parts])

    def loss(one, other, sink):
        attn_out, maximum, total = merge(one, other, sink)
        lse = maximum[alive, :, 0] + jnp.log(total[alive, :, 0])
        return (attn_out * np.float32(g)).sum() + (lse * np.float32(h)[alive]).sum()

    found = jax.grad(loss, (0, 1, 2))(*map(of_jax, states), jnp.asarray(logits))
    arrays = [*found[0], *found[1], found[2][None, :, None]]
    for k, (array, (expected, size)) in enumerate(zip(arrays, [*wanted[0], *wanted[1], wanted[2][1]], strict=True)):
        its = np.asarray(array, np.float64)
        its = its if k in (0, 3) else its.sum(-1)
        assert (np.abs(its - expected) <= 16 * 2.0**-24 * size).all(), (k, np.abs(its - expected).max())


class Keeps(Backend):
    """A kernel of JAX's arrays that keeps a log-sum-exp; TND, one lane."""

    name = "keeps"
    capabilities = Capabilities(
        array_types=("jax:Array",), layouts=("TND",), lanes=(1,), dtypes=("float32",), mixed=False, out=False, statistics="lse"
    )

    def update(self, problem, prev, cur, out):
        lses = jnp.stack([state.softmax_max + jnp.log(state.softmax_sum) for state in (prev, cur)])
        outs = jnp.stack([prev.attn_out, cur.attn_out])
        return rau.AttentionState((jax.nn.softmax(lses, 0) * outs).sum(0), jax.nn.logsumexp(lses, 0), jnp.ones_like(lses[0]))


@needs_jax
def test_gradients_of_a_kernel_that_keeps_a_log_sum_exp():
    """Of the maximum alone too, in whose place it is, and none of the sum, which is 1."""
    states = numbers(layout="TND", lengths=(6,), qlen="array", lanes=1, statistics="ordinary")
    rng = np.random.default_rng(5)
    upstream = [np.float32(rng.integers(-16, 17, part.shape) / 8) for part in states[0]]

    def slope(merge):
        def loss(one, other):
            return sum((part * its).sum() for part, its in zip(merge(one, other), upstream, strict=True))

        return jax.grad(loss, (0, 1))(*map(of_jax, states))

    with rau.registry.provisionally(Keeps()):
        found = slope(lambda one, other: rau.merge_states([one, other], layout="TND", backend="keeps"))
    expected = slope(lambda one, other: Keeps().update(None, one, other, None))
    for mine, its in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, its, rtol=0, atol=2**-16)  # both in float32: some 32 roundings of terms up to 8
