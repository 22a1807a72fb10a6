"""Kernels that return (out, lse): adapted in a few lines, judged by a bound of their own and by what they promise."""

import inspect
import json
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from lse_kernels import KERNELS, NUMPY, Base2, Guarded, Sigmoid, Strideless, TorchWeights, Weights

import rau
from rau import AttentionState
from rau.__main__ import main
from rau.backends import PROPERTIES, Capabilities
from rau.backends.lse import LSEBackend
from rau.backends.numpy_ import NumPyBackend
from rau.testing.cases import Case, generated, named
from rau.testing.comparison import compare
from rau.testing.conformance import check_backend
from rau.testing.reference.oracle import ALLOWANCES, oracle

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")


@pytest.mark.parametrize(
    "kernel",
    [*KERNELS, *(pytest.param(kernel, marks=needs_torch) for kernel in (TorchWeights, Strideless))],
    ids=lambda kernel: kernel.name,
)
def test_what_is_right_in_its_own_way_passes(kernel):
    # What is in memory is the same matter for all of them.
    numbers = ("dtype/", "layout/", "outputs/", "states/", "statistics/", "tnd/")
    cases = [case for case in named() if kernel is Guarded or case.id.startswith(numbers)]
    report = check_backend(kernel, cases=[*cases, *generated(0, 40)])
    assert report.passed, str(report)
    assert ("K = 8 > 4 states" in str(report)) == (kernel.capabilities.max_states == 4)


@pytest.mark.parametrize("kernel", [Weights, Sigmoid], ids=lambda kernel: kernel.name)
def test_an_adapter_takes_ten_lines(kernel):
    code = inspect.getsource(kernel).replace(f'    """{kernel.__doc__}"""\n', "")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10


# Axes


@pytest.mark.parametrize("lse_layout", ["TN", "NT", "BNS", "BSN"])
@pytest.mark.parametrize("axes", ["TND", "BSND", "BNSD"])
@pytest.mark.parametrize(("layout", "order"), [("SBH", "TND"), ("BSND", "TND"), ("BNSD", "TND"), ("TND", "TND"), ("TND", "SBH")])
def test_the_kernel_sees_its_own_axes(layout, order, axes, lse_layout):
    """Whatever the call's are: contiguous log-sum-exps, and the same numbers back in their places."""
    if len(axes) != len(lse_layout) + 1:
        return
    sizes = {"T": 12 if layout == "TND" else 36, "B": 3, "S": 12, "N": 4, "D": 16}
    if layout == "TND":
        sizes |= {"B": 1}
    if layout == "SBH":  # in which order tokens lie makes no difference to them
        sizes |= {"B": 12, "S": 3}

    class Seen(LSEBackend):
        name = "seen"
        capabilities = Capabilities(array_types=NUMPY, statistics="lse")

        def merge_lse(self, prev_out, prev_lse, cur_out, cur_lse):
            assert prev_out.shape == cur_out.shape == tuple(sizes[axis] for axis in axes)
            assert prev_lse.shape == cur_lse.shape == tuple(sizes[axis] for axis in lse_layout)
            assert prev_lse.flags.c_contiguous and prev_lse.dtype == np.float32
            return cur_out, cur_lse

    Seen.layout, Seen.lse_layout = axes, lse_layout
    case = Case(id="axes", layout=layout, softmax_layout=order, batch=3, tokens=12, lengths=(5, 0, 7), heads=4, head_dim=16)
    states = case.fill()
    given = [state._replace(softmax_sum=np.ones_like(state.softmax_sum)) for state in states]
    assert all(map(np.array_equal, case.call(given, None, Seen()), given[1]))


def test_axes_that_do_not_go_together_are_refused():
    with pytest.raises(TypeError, match="layout = 'TND', lse_layout = 'BNS'; expected TND with TN or NT; BSND"):
        type("Mixed", (LSEBackend,), {"lse_layout": "BNS"})


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda out, lse: out, "returned a ndarray; expected (out, lse)"),
        (lambda out, lse: (lse, out), "returned arrays of shapes (12, 3) and (12, 3, 8); expected (out, lse) of shapes (12, 3, 8)"),
        (
            lambda out, lse: (out, lse.T),
            'and (3, 12); expected (out, lse) of shapes (12, 3, 8) and (12, 3), the axes "TND" and "TN"',
        ),
        (lambda out, lse: (out, 1.0), "and (); expected (out, lse)"),
    ],
    ids=["one", "swapped", "transposed", "number"],
)
def test_what_a_kernel_returns_is_looked_at(result, words):
    """As many elements in other axes are no less wrong; and nothing is written."""

    class Odd(LSEBackend):
        name, capabilities = "odd", Capabilities(array_types=NUMPY, statistics="lse")

        def merge_lse(self, prev_out, prev_lse, cur_out, cur_lse):
            return result(prev_out, prev_lse)

    case = Case(id="odd", layout="TND", tokens=12, lengths=(12,), heads=3)
    states, out = case.fill(), case.fill()[0]
    before = [part.copy() for part in out]
    with pytest.raises(rau.RauError) as caught:
        case.call(states, out, Odd())
    assert 'backend "odd": its kernel ' in str(caught.value) and words in str(caught.value)
    assert all(map(np.array_equal, out, before))


def test_it_agrees_with_the_conversions_of_a_state():
    """What the kernel is given, and what becomes of what it returns, are AttentionState.lse and from_lse."""
    given = []

    class Seen(Base2):
        def merge_lse(self, prev_out, prev_lse, cur_out, cur_lse):
            given.append((prev_lse, cur_lse))
            return prev_out, prev_lse

    case = Case(id="agrees", layout="TND", tokens=12, lengths=(12,), heads=3)
    states, how = case.fill(), {"base": "2", "layout": "TND", "lse_layout": "NT"}
    result = case.call(states, None, Seen())
    assert all(np.array_equal(its, state.lse(**how)) for its, state in zip(given[0], states, strict=True))
    expected = AttentionState.from_lse(states[0].attn_out, states[0].lse(**how), **how, lanes=8)
    assert all(map(np.array_equal, result, expected))


def test_rows_without_an_element_still_have_a_log_sum_exp():
    """Kernels that take none are given rows of their own: some of Triton's make blocks of as many elements as a row has."""

    class Blocks(Base2):
        name = "blocks"
        capabilities = replace(Base2.capabilities, head_dim_multiple=8)

        def merge_lse(self, prev_out, prev_lse, cur_out, cur_lse):
            assert prev_out.shape[-1] % 8 == 0 < prev_out.shape[-1]
            return super().merge_lse(prev_out, prev_lse, cur_out, cur_lse)

    assert check_backend(Blocks(), select="none/head_dim").passed
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(5, 4, 8)).astype("f4"), rng.normal(size=(5, 4)).astype("f4")) for _ in range(2)]
    how = {"base": "e", "layout": "TND", "lse_layout": "TN", "backend": Blocks()}
    expected = rau.merge_lse(pairs, **how)
    assert all(map(np.array_equal, rau.merge_lse(pairs, **how, out=pairs[0]), expected))


# The bound


def judged(states, observed, **kind):
    return compare(observed, oracle(states, layout="BSND", statistics="lse", **kind))


def lse_states(size):
    """Two states of so large log-sum-exps, near one another; every second row of the second is empty."""
    rng, states = np.random.default_rng(3), []
    for k in range(2):
        lse = np.float32(size + rng.normal(0, 3, (1, 4, 64)))
        lse = np.where(k * (np.arange(64) % 2) == 1, np.float32(-np.inf), lse)
        stats = lse[..., None].repeat(8, axis=-1)
        states.append(AttentionState(rng.standard_normal((1, 64, 4, 32), np.float32), stats, np.ones_like(stats)))
    return states


@pytest.mark.parametrize("size", [0.0, 10.0, 1000.0, 1e5])
def test_the_bound_is_neither_too_tight_nor_loose(size):
    """Weights exp(lse_i - lse) in float32 use up a good part of it, however large a log-sum-exp is; times 8, they do not fit."""
    states = lse_states(size)
    one, other = (state.softmax_max[..., 0] for state in states)
    with np.errstate(invalid="ignore"):
        lse = np.maximum(one, other) + np.log1p(np.exp(-np.abs(one - other)))
    weights = [np.exp(part - lse).swapaxes(1, 2)[..., None] for part in (one, other)]
    output = weights[0] * states[0].attn_out + weights[1] * states[1].attn_out
    stats = lse[..., None].repeat(8, axis=-1)
    comparison = judged(states, (output, stats, np.ones_like(stats)))
    assert comparison.passed and comparison.attn_share > 0.1 and comparison.sum_share > 0.1, str(comparison)
    exact = oracle(states, layout="BSND", statistics="lse")
    beyond = np.float32(exact.attn_out + 8 * (output - exact.attn_out))
    assert not judged(states, (beyond, stats, np.ones_like(stats))).passed


def test_a_side_that_is_alone_comes_back_as_well_as_if_its_log_sum_exp_were_small():
    """Its weight is exp(0), however large a unit in the last place of the log-sum-exp is."""
    alone = [np.asarray(state.softmax_max[0, :, 1::2, 0] == -np.inf) for state in lse_states(1e5)]
    assert not alone[0].any() and alone[1].all()
    errors = [oracle(lse_states(size), layout="BSND", statistics="lse").attn_error[:, 1::2] for size in (0.0, 1e5)]
    assert (errors[1] <= 2 * errors[0]).all()  # what the logarithm may be off by is stored, too: no more than that


def test_a_log_sum_exp_and_a_maximum_with_its_sum_are_the_same_state():
    states = Case(id="same", layout="BSND", batch=2, tokens=9, heads=3, statistics="empty").fill()
    result = rau.ring_attention_update(*states[0], *states[1], layout="BSND", profile="portable")
    for base in ("e", "2"):
        assert judged(states, result, lse_base=base).passed
        how = {"base": base, "layout": "BSND", "lse_layout": "BNS"}
        assert judged(states, AttentionState.from_lse(result.attn_out, result.lse(**how), **how, lanes=8), lse_base=base).passed
    wrong = result._replace(softmax_sum=result.softmax_sum * np.float32(1 + 2**-12))
    assert "log-sum-exp[" in str(judged(states, wrong))


# What is not promised


def rows(stats):
    return stats[..., None]


def empty(lses):
    return np.stack([np.isneginf(lse) for lse in lses])


class Broken(Guarded):
    """A kernel that lacks one property, and no other."""

    def merge_lse_states(self, outs, lses):
        out, lse = super().merge_lse_states(outs, lses)
        return self.spoil(outs, lses, out, lse)


class OneEmpty(Broken):
    name = "one-empty"

    def spoil(self, outs, lses, out, lse):
        some = empty(lses).any(axis=0) & ~empty(lses).all(axis=0)
        return np.where(rows(some), np.nan, out), np.where(some, np.nan, lse)


class TwoEmpty(Broken):
    name = "two-empty"

    def spoil(self, outs, lses, out, lse):
        return np.where(rows(empty(lses).all(axis=0)), np.nan, out), lse


class Payload(Broken):
    name = "payload"

    def spoil(self, outs, lses, out, lse):
        for part, its in zip(outs, lses, strict=True):
            none = rows(np.exp(its - np.where(np.isneginf(lse), 0, lse)) == 0) & ~rows(empty(lses).all(axis=0))
            out = np.where(none & ~np.isfinite(part.astype(out.dtype)), np.nan, out)
        return out, lse


class SmallWeights(Broken):
    name = "small-weights"

    def spoil(self, outs, lses, out, lse):
        live = ~empty(lses).any(axis=0) & ~np.isinf(np.maximum.reduce(lses)) & (len(outs) == 2)
        prev, cur = outs[0].astype(out.dtype), outs[-1].astype(out.dtype)
        weight = rows(1 / (1 + np.exp(lses[0] - lses[-1])))
        counts = rows(live) & (weight != 0) & (weight != 1) & (prev != 0)
        return np.where(counts, prev - weight * (prev - cur), out), lse


class Infinity(Guarded):
    name = "infinity"

    def merge_lse_states(self, outs, lses):
        return super().merge_lse_states(outs, [np.where(lse == np.inf, np.float32(-np.inf), lse) for lse in lses])


class NaN(Guarded):
    name = "nan"

    def merge_lse_states(self, outs, lses):
        return super().merge_lse_states(outs, [np.where(np.isnan(lse), np.float32(1), lse) for lse in lses])


class SignedZero(Broken):
    name = "signed-zero"

    def spoil(self, outs, lses, out, lse):
        return out + np.float32(0), lse


class Subnormal(NumPyBackend):
    """Of a kernel that keeps a log-sum-exp it is not asked for: that one's bound has room for it."""

    name = "subnormal"
    capabilities = replace(NumPyBackend.capabilities, array_types=NUMPY, halves=False, runs=False)

    def merge(self, problem, states, out):
        result = super().merge(problem, states, out)
        small = np.abs(result.attn_out) < np.finfo(np.float32).tiny
        result.attn_out[small] = np.copysign(np.float32(0), result.attn_out[small])
        return result


LACKING = {kernel.name: kernel for kernel in (OneEmpty, TwoEmpty, Payload, SmallWeights, Infinity, NaN, SignedZero, Subnormal)}


def test_every_property_has_its_allowance_and_a_kernel_that_lacks_it():
    assert PROPERTIES.keys() == ALLOWANCES.keys() == LACKING.keys()


def declared(kernel, *names):
    return type(kernel.__name__, (kernel,), {"capabilities": replace(kernel.capabilities, dtypes=("float32",), unpromised=names)})


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_property_is_asked_for_unless_it_is_not_promised(name):
    """Then it is tried by itself; and the others are still asked for."""
    lacking = LACKING[name]
    cases = [case for case in named() if case.id.startswith(("statistics/", "outputs/"))]  # it takes few to see it
    assert check_backend(declared(lacking), cases=cases, select="*s/*").failures
    report = check_backend(declared(lacking, name), cases=cases)
    assert report.passed, str(report)
    assert report.unpromised.keys() == {name} and report.unpromised[name]
    assert f"does not promise {name} ({PROPERTIES[name]}); does it: no: " in str(report)
    covers = {"payload": ("one-empty", "small-weights")}  # what stands behind an empty side in named cases
    others = [other for other in PROPERTIES if other != name and other not in covers.get(name, ())]
    assert check_backend(declared(lacking, *others), cases=cases, select="*s/*").failures
    does = check_backend(declared(Guarded, name), select="unpromised/*")
    assert does.unpromised == {name: []} and "does it: yes" in str(does)


@pytest.mark.parametrize("name", PROPERTIES)
def test_each_lacks_one_property_alone(name):
    for other in PROPERTIES:
        report = check_backend(declared(LACKING[name], name, other), select=f"unpromised/{other}")
        assert bool(report.unpromised[other]) == (other == name), str(report)


class Off(Broken):
    name = "off"

    def spoil(self, outs, lses, out, lse):
        nothing = empty(lses).all(axis=0)
        return np.where(rows(nothing), out, out + np.float32(0.5)), np.where(nothing, lse, lse + np.float32(0.5))


def test_a_property_is_asked_for_where_it_matters_alone():
    report = check_backend(declared(Off, "two-empty"), select="unpromised/*")
    assert report.unpromised == {"two-empty": []}
    assert check_backend(Off, select="layout/SBH").failures


@needs_torch
def test_strides_are_tried_without_the_copy():
    assert not check_backend(TorchWeights, select="unpromised/*").unpromised.get("strides")
    report = check_backend(Strideless, select="unpromised/strides")
    assert "strides (outputs need not be contiguous); does it: no" in str(report)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("statistics", "max", "statistics = 'max'; expected 'max_sum' or 'lse'"),
        ("lse_base", 2, "lse_base = 2; expected 'e' or '2'"),
        ("contiguous", 1, "contiguous = 1; expected True or False"),
        ("max_states", 1, "max_states = 1; expected an int, at least 2"),
        ("unpromised", ["nan"], r"unpromised = \['nan'\]; expected a tuple of str"),
        ("unpromised", ("empty",), r"unpromised = \('empty',\); expected some of one-empty, two-empty, payload"),
    ],
)
def test_capabilities_that_are_none_are_refused(field, value, words):
    with pytest.raises(TypeError, match=words):
        Capabilities(array_types=NUMPY, **{field: value})


# The page


def test_the_matrix(capsys):
    names = ["lse_kernels:Guarded", "lse_kernels:Weights", "lse_kernels:Sigmoid"]
    assert main(["matrix", "--backends", *names, "--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    assert list(kernels) == ["guarded", "weights", "sigmoid"]
    assert [kernels[name]["two-empty"]["word"] for name in kernels] == ["yes", "NO", "NO"]
    assert [kernels[name]["one-empty"]["promised"] for name in kernels] == [True, True, False]
    assert [kernels[name]["states"]["word"] for name in kernels] == ["at once", "in pairs", "in pairs"]
    assert all(0 < float(kernels["weights"][f"error, {dtype}"]["word"]) <= 1 for dtype in ("float16", "float32", "float64"))
    assert all(row["layouts"]["word"] == "5 of 5" for row in kernels.values())


def test_a_broken_promise_is_told(tmp_path, capsys):
    if find_spec("rich") is None:
        pytest.skip("rich is not installed")
    assert main(["matrix", "--backends", "test_lse_backends:TwoEmpty", "--report", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "BROKEN PROMISE: two-empty: two-empty: attn_out[" in text
    page = (tmp_path / "index.html").read_text()
    assert "BROKEN PROMISE" in page and "two-empty" in page and "http" not in page.replace("http-equiv", "")


def test_what_was_found_is_told_where_the_page_cannot_be_written(tmp_path, capsys):
    if find_spec("rich") is None:
        pytest.skip("rich is not installed")
    (tmp_path / "index.html").mkdir()
    assert main(["matrix", "--backends", "lse_kernels:Guarded", "--report", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert "two-empty" in told.out and "Is a directory" in told.err


@needs_torch
@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
def test_gradients_of_a_kernel_that_keeps_a_log_sum_exp(again):
    """Its result has the log-sum-exp where others have the maximum; through both, the log-sum-exp has one gradient."""
    import torch

    def state(seed):
        generator = torch.Generator().manual_seed(seed)
        parts = (torch.randn(3, 2, n, generator=generator, dtype=torch.float64) for n in (4, 1, 1))
        return [part.abs() + 1 if k == 2 else part for k, part in enumerate(parts)]

    leaves = [part.requires_grad_() for seed in (0, 1) for part in state(seed)]
    weights = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def loss(merge):
        out, maximum, total = merge([leaves[:3], leaves[3:]])
        value = (out * weights).sum() + (maximum + total.log()).square().sum()
        grads = torch.autograd.grad(value, leaves, create_graph=again)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves) if again else grads

    def plainly(states):
        lses = torch.stack([(maximum + total.log()) for _, maximum, total in states])
        outs = torch.stack([out for out, *_ in states])
        return (lses.softmax(0) * outs).sum(0), lses.logsumexp(0), torch.ones_like(lses[0])

    with rau.registry.provisionally(TorchWeights()):
        found = loss(lambda states: rau.merge_states(states, layout="TND", backend="torch-weights"))
        with rau.use_backend("torch-weights"):
            unnamed = loss(lambda states: rau.merge_states(states, layout="TND"))
    for one, other, expected in zip(found, unnamed, loss(plainly), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(one, other)


@needs_torch
def test_the_matrix_tells_gradients(capsys):
    assert main(["matrix", "--backends", "lse_kernels:TorchWeights", "lse_kernels:Strideless", "--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    assert [row["gradients"]["word"] for row in kernels.values()] == ["yes", "NO"]
    assert [row["strides"]["word"] for row in kernels.values()] == ["yes", "NO"]
