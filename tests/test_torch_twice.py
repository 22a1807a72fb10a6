"""Gradients of gradients, by create_graph=True: against finite differences, and a merge in torch's own words."""

import os
import warnings

import pytest

import rau
from rau.state import AttentionState

if "torch" in os.environ.get("RAU_TEST_BACKENDS", ""):
    import torch  # asked for: its absence is a failure
else:
    torch = pytest.importorskip("torch", reason="torch is not installed and was not asked for")

from rau import torch_op

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
INF, NAN = torch.inf, torch.nan
LENGTHS = [0, 1, 1, 3]
SHAPES = {  # of 3 tokens, 2 heads of 2
    "SBH": ((3, 1, 4), (1, 2, 3)),
    "BSND": ((1, 3, 2, 2), (1, 2, 3)),
    "BNSD": ((1, 2, 3, 2), (1, 2, 3)),
    "TND": ((3, 2, 2), (3, 2)),
}


def leaves(K=2, layout="SBH", lanes=1, dtype=torch.float64, seed=0):
    """The arrays of K states, each requiring grad."""
    generator = torch.Generator().manual_seed(seed)
    shape, rows = SHAPES[layout]
    stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    parts = []
    for _ in range(K):
        out, maximum = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, (*rows, 1)))
        total = torch.rand((*rows, 1), generator=generator, dtype=torch.float64) + 0.5
        parts += [out.to(dtype), *(part.to(stats_dtype).repeat_interleave(lanes, -1) for part in (maximum, total))]
    return [part.requires_grad_() for part in parts]


def merge(*parts, layout="SBH", **options):
    if layout == "TND":
        options["actual_seq_qlen"] = LENGTHS
    return rau.merge_states([parts[k : k + 3] for k in range(0, len(parts), 3)], layout=layout, **options)


def plainly(*parts):
    """The merge of states in layout SBH without empty rows, as anybody would write it in torch."""
    outputs, maxima, sums = (torch.stack(parts[field::3]) for field in range(3))
    maximum = maxima.amax(0)
    shares = sums * (maxima - maximum).exp()
    total = shares.sum(0)
    weights = (shares / total).squeeze(-1).permute(0, 3, 1, 2).unsqueeze(-1)  # (K, S, B, N, 1)
    return (weights * outputs.unflatten(-1, (2, -1))).sum(0).flatten(-2), maximum, total


def empty(parts, *rows):
    """Leave rows of the statistics without keys, by a maximum of -inf, with what must not be read behind it."""
    with torch.no_grad():
        for k, row in rows:
            parts[3 * k + 1][row], parts[3 * k + 2][row] = -INF, NAN
    return parts


def nth(function, inputs, order):
    """The derivatives by the inputs of a number made of the function's results; of a number made of those; and so on."""
    generator = torch.Generator().manual_seed(5)
    results = function(*inputs)
    for _ in range(order):
        factors = [torch.randn(part.shape, generator=generator, dtype=part.dtype) for part in results]
        value = sum((part * factor).sin().sum() for part, factor in zip(results, factors, strict=True))
        results = torch.autograd.grad(value, inputs, create_graph=True)
    return results


# ---- right ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "order", "K"),
    [("SBH", "TND", 2), ("SBH", "TND", 3), ("BSND", "TND", 2), ("BNSD", "TND", 2), ("TND", "TND", 2), ("TND", "SBH", 2),
     ("TND", "SBH", 3)],
)  # fmt: skip
def test_gradgradcheck(layout, order, K):
    """All inputs, all outputs; a row that only one state has seen, one that all but one have, one that none has."""
    first, second, third = (0, 0, 0), (0, 1, 1), (0, 1, 2)
    if layout == "TND":
        first, second, third = (0, 0), (1, 1), (2, 1)
    rows = [(0, first), (1, second), *((k, third) for k in range(K))]
    parts = empty(leaves(K, layout), *rows, *((k, first) for k in range(2, K)))
    assert torch.autograd.gradgradcheck(lambda *inputs: tuple(merge(*inputs, layout=layout, softmax_layout=order)), parts)


def test_gradgradcheck_of_the_update_with_eight_lanes():
    def call(*inputs):
        return tuple(rau.ring_attention_update(*inputs, profile="portable"))

    parts = leaves(lanes=8)
    one_row = [part[:1, :, :2] if part.ndim == 3 else part[:, :1, :1] for part in parts]
    assert torch.autograd.gradgradcheck(call, [part.detach().clone().requires_grad_() for part in one_row])
    for grad in nth(call, parts, 2)[1::3]:
        assert grad[..., 0].all() and not grad[..., 1:].any()  # lane 0 is the one that is read


@pytest.mark.parametrize("base", ["e", "2"])
def test_gradgradcheck_from_lse_to_lse(base):
    def pipe(out, lse, cur_out, cur_lse):
        merged = rau.merge_states([AttentionState.from_lse(*pair, base=base) for pair in ((out, lse), (cur_out, cur_lse))])
        return merged.attn_out, merged.lse(base=base)

    parts = [part.detach().squeeze(-1).requires_grad_() for k, part in enumerate(leaves()) if k % 3 < 2]
    assert torch.autograd.gradgradcheck(pipe, parts)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_derivatives_are_those_of_a_merge_in_torchs_own_words(K, order):
    parts = leaves(K)
    for one, other in zip(nth(merge, parts, order), nth(plainly, parts, order), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_gradient_times_what_it_is_taken_by():
    """Detached weights, or inputs, would make these wrong without a word: 12 and 1/16."""
    x = torch.full((1, 1, 2), 2.0, dtype=torch.float64, requires_grad=True)
    one, two = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (1.0, 2.0))
    both = rau.ring_attention_update(x, one, two, x, two, one, profile="portable").attn_out  # x, whatever the weights
    (gradient,) = torch.autograd.grad((both**3).sum(), x, create_graph=True)
    assert torch.autograd.grad((gradient * x).sum(), x)[0].allclose(torch.tensor(36.0, dtype=torch.float64))

    l = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(1, 1, 2, dtype=torch.float64)
    out = rau.ring_attention_update(ones, one, l, 0 * ones, one, one, profile="portable").attn_out  # l / (l + 1), twice
    (gradient,) = torch.autograd.grad(out[0, 0, 0], l, create_graph=True)
    assert gradient.item() == pytest.approx(1 / 16)
    assert torch.autograd.grad(gradient * l, l)[0].item() == pytest.approx(1 / 16 - 3 * 2 / 64)


def test_one_tensor_in_two_places():
    """It has the gradients of both places, once."""
    x, m, l, _, n, k = leaves()
    inputs = [x, m, l, n, k]
    grads = [nth(lambda *_, function=function: function(x, m, l, x, n, k), inputs, 2) for function in (merge, plainly)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("field", range(3))
@pytest.mark.parametrize("output", range(3))
def test_some_inputs_and_some_outputs(field, output):
    parts = leaves()
    for k, part in enumerate(parts):
        part.requires_grad_(k == 3 + field)
    grads = []
    for function in (merge, plainly):
        result = function(*parts)[output]
        if not result.requires_grad:  # the sum, say, by an output
            assert function is plainly
            grads.append([torch.zeros_like(parts[3 + field])] * 2)
            continue
        value = (result**3).sum()
        (first,) = torch.autograd.grad(value, parts[3 + field], create_graph=True)
        second = torch.zeros_like(first)
        if first.requires_grad:
            (second,) = torch.autograd.grad((first**2).sum(), parts[3 + field])
        grads.append([first, second])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_hessian_vector_products_and_gradient_penalties():
    parts = leaves()
    vector = torch.randn(parts[1].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    products = []
    penalties = []
    for function in (merge, plainly):

        def loss(maximum, function=function):
            return (function(parts[0], maximum, *parts[2:])[0] ** 2).sum()

        products.append(torch.autograd.functional.hvp(loss, parts[1], vector)[1])
        products.append(torch.autograd.functional.hessian(loss, parts[1]))
        grads = torch.autograd.grad((function(*parts)[0] ** 2).sum(), parts, create_graph=True)
        penalty = (torch.cat([grad.flatten() for grad in grads]).norm() - 1) ** 2
        penalties.append(torch.autograd.grad(penalty, parts))
    for one, other in ((products[0], products[2]), (products[1], products[3]), *zip(*penalties, strict=True)):
        assert other.any()
        torch.testing.assert_close(one, other)


# ---- rows of every kind -----------------------------------------------------------------------------------------------


def test_empty_sides_have_zeros_and_disturb_nobody():
    """By a sum of 0 too, with infinities and NaN in all that is not to be read."""
    parts = leaves()
    with torch.no_grad():
        for k, row in ((0, (0, 0, 0)), (1, (0, 1, 1)), (0, (0, 0, 2)), (1, (0, 0, 2))):
            parts[3 * k + 1][row], parts[3 * k + 2][row] = (INF, 0) if k else (-INF, INF)
        parts[0][0, 0, :2], parts[3][1, 0, 2:] = INF, NAN
        parts[0][2, 0, :2], parts[3][2, 0, :2] = NAN, NAN
    for order in (1, 2, 3):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Anomaly Detection has been enabled")
            with torch.autograd.detect_anomaly():  # not even on the way is there a NaN
                grads = nth(lambda *inputs: merge(*inputs)[::2], parts, order)  # the sine of a maximum of -inf is NaN
        assert all(grad.isfinite().all() for grad in grads)
        for k, row in ((0, (0, 0, 0)), (1, (0, 1, 1)), (0, (0, 0, 2)), (1, (0, 0, 2))):
            assert not grads[3 * k + 1][row].any() and not grads[3 * k + 2][row].any()
            assert not grads[3 * k].unflatten(-1, (2, 2))[row[2], 0, row[1]].any()
        live = leaves()  # of a row that both have seen, nothing has changed
        if order < 3:
            for one, other in zip(grads, nth(lambda *inputs: merge(*inputs)[::2], live, order), strict=True):
                where = (1, 0, slice(0, 2)) if one.ndim == 3 else (0, 0, 1)
                torch.testing.assert_close(one[where], other[where])


def test_an_infinite_sum_that_is_alone_comes_back_and_so_does_its_gradient():
    parts = empty(leaves(), (1, (0, 0, 0)))
    with torch.no_grad():
        parts[2][0, 0, 0] = INF
    again = torch.autograd.grad((merge(*parts)[0] ** 3).sum(), parts, create_graph=True)
    assert torch.equal(again[0][0, 0, :2], 3 * parts[0][0, 0, :2] ** 2)
    (second,) = torch.autograd.grad(again[0].sum(), parts[0])
    assert torch.equal(second[0, 0, :2], 6 * parts[0][0, 0, :2])


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 150), (torch.float64, 800)])
def test_an_output_of_weight_0_is_not_read(dtype, gap):
    parts = leaves(3, dtype=dtype)
    with torch.no_grad():
        for k in (1, 2):
            parts[3 * k + 1].copy_(parts[1] - gap)
        parts[3].fill_(NAN)
        parts[6].fill_(INF)
    for order in (1, 2):
        grads = nth(merge, parts, order)
        assert all(grad.isfinite().all() for grad in grads)
        assert grads[0].any() and not grads[3].any() and not grads[6].any()
    # What has weight 0 is no part of the output, in whatever it is differentiated by.
    first = torch.autograd.grad(merge(*parts)[0].sum(), parts, create_graph=True)
    assert not any(grad.abs().max() > 1e-6 for grad in first[1:3]) and not any(grad.any() for grad in first[4:])


def test_ties():
    """Equal maxima share the gradient of the maximum; the output does not depend on how."""
    parts = leaves(3)
    with torch.no_grad():
        parts[4].copy_(parts[1])
        parts[7].copy_(parts[1])
        parts[7][0, 0, 0] -= 1
    first, again = (torch.autograd.grad([part.sin().sum() for part in merge(*parts)], parts, create_graph=graph)
                    for graph in (False, True))  # fmt: skip
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(one, other)
    (of_maximum,) = torch.autograd.grad(merge(*parts)[1].sum(), parts[7], create_graph=True)
    assert of_maximum[0, 0, 0] == 0 and of_maximum[0, 1].allclose(torch.tensor(1 / 3, dtype=torch.float64))
    assert torch.autograd.gradgradcheck(lambda *inputs: merge(*inputs)[0], parts)


@pytest.mark.parametrize("size", [1.2e308, 3e-320])
def test_sums_that_add_up_beyond_float64_or_are_next_to_nothing(size):
    parts = leaves()
    with torch.no_grad():
        for k in (0, 1):
            parts[3 * k + 1].zero_()
            parts[3 * k + 2].fill_(size)
    first, again = (torch.autograd.grad((merge(*parts)[0] ** 2).sum(), parts, create_graph=graph) for graph in (False, True))
    for one, other in zip(first[::3], again[::3], strict=True):
        torch.testing.assert_close(one, other)
    (second,) = torch.autograd.grad(again[0].sum(), parts[0])
    assert torch.equal(second, torch.full_like(second, 0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lanes", [1, 8])
def test_the_first_derivative_is_the_same_either_way_but_for_rounding(lanes, dtype):
    parts = empty(leaves(3, lanes=lanes, dtype=dtype), (0, (0, 0, 0)), (1, (0, 1, 1)))
    result = merge(*parts)
    upstream = [torch.randn_like(part) for part in result]
    first, again = (torch.autograd.grad(result, parts, upstream, create_graph=graph, retain_graph=True)
                    for graph in (False, True))  # fmt: skip
    for one, other in zip(first, again, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        unit = torch.finfo(one.dtype).eps
        torch.testing.assert_close(one, other, rtol=2 * unit, atol=16 * torch.finfo(upstream[1].dtype).eps)


# ---- the first derivative's own way -----------------------------------------------------------------------------------


def test_without_create_graph_no_graph_is_made(monkeypatch):
    monkeypatch.setattr(torch_op, "_gradients_in_a_graph", None)
    parts = leaves()
    result = merge(*parts)
    with torch.enable_grad():
        grads = torch.autograd.grad(result[0].sum(), parts, retain_graph=True)
    assert not any(grad.requires_grad for grad in grads)
    with pytest.raises(TypeError):
        torch.autograd.grad(result[0].sum(), parts, create_graph=True)
