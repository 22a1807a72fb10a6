"""merge_attention: the gradient of attention to all the keys, by a kernel whose log-sum-exp has none."""

import math
import os

import pytest

import rau

if "torch" in os.environ.get("RAU_TEST_BACKENDS", ""):
    import torch  # asked for: its absence is a failure
else:
    torch = pytest.importorskip("torch", reason="torch is not installed and was not asked for")

B, N, S, D, KEYS = 2, 3, 5, 8, 12
CUTS = (4, 1, 7)  # lengths of three parts of the keys


class Kernel:
    """Attention as FlashAttention 2 has it: log-sum-exps of +inf for rows without keys, a backward made of out and lse."""

    def __init__(self):
        self.seen = []

    def forward(self, q, k, v, mask):
        assert not torch.is_grad_enabled()
        scores = (q @ k.mT / math.sqrt(D)).masked_fill(~mask, -torch.inf)
        lse = scores.logsumexp(-1)
        out = scores.softmax(-1).nan_to_num() @ v
        return out, lse.masked_fill(lse == -torch.inf, torch.inf).to(torch.promote_types(q.dtype, torch.float32)), "rng state"

    def backward(self, grad_out, q, k, v, mask, out, lse):
        self.seen.append((out, lse))
        scores = (q @ k.mT / math.sqrt(D)).masked_fill(~mask, -torch.inf)
        p = (scores - lse.unsqueeze(-1)).exp().to(q.dtype)  # NaN for a row without keys whose lse is -inf
        grad_scores = p * (grad_out @ v.mT - (grad_out * out).sum(-1, keepdim=True)) / math.sqrt(D)
        return grad_scores @ k, grad_scores.mT @ q, p.mT @ grad_out, None


def inputs(dtype="float64"):
    """Row 1 sees nothing of the first part, row 3 nothing at all."""
    made = torch.Generator().manual_seed(0)
    q, k, v, upstream = (torch.randn(B, N, length, D, generator=made, dtype=torch.float64) for length in (S, KEYS, KEYS, S))
    mask = torch.rand(S, KEYS, generator=made) < 0.7
    mask[1, : CUTS[0]], mask[3] = False, False
    return [part.to(getattr(torch, dtype)).requires_grad_() for part in (q, k, v)], mask, upstream.to(getattr(torch, dtype))


def merged(q, k, v, mask, kernel, **how):
    parts = list(zip(k.split(CUTS, 2), v.split(CUTS, 2), mask.split(CUTS, 1), strict=True))
    return rau.merge_attention(q, parts, kernel.forward, kernel.backward, "BNSD", **{"base": "e", "inf_is_empty": True} | how)


def whole(q, k, v, mask):
    scores = (q @ k.mT / math.sqrt(D)).masked_fill(~mask, -1e30)  # which one softmax in one piece may do without NaN
    return scores.softmax(-1).masked_fill(~mask, 0) @ v


def test_it_is_the_gradient_of_one_softmax():
    leaves, mask, upstream = inputs()
    kernel = Kernel()
    out, lse = merged(*leaves, mask, kernel)
    expected = whole(*leaves, mask)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    mine = torch.autograd.grad(out, leaves, upstream)
    for got, wanted in zip(mine, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)
    assert len(kernel.seen) == len(CUTS)
    for its_out, its_lse in kernel.seen:
        assert torch.equal(its_out, out)
        assert torch.equal(its_lse, lse.masked_fill(lse == -torch.inf, torch.inf)) and its_lse[..., 3].eq(torch.inf).all()


def test_what_it_is_for():
    """By the kernel's own differentiation the part through the log-sum-exp is lost, and nobody says so."""
    (q, k, v), mask, upstream = inputs()
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    states = [
        rau.AttentionState.from_lse(*kernel(q, *part), base="e", layout="BNSD")
        for part in zip(k.split(CUTS, 2), v.split(CUTS, 2), strict=True)
    ]
    out = rau.merge_states(states, layout="BNSD").attn_out
    (wrong,) = torch.autograd.grad(out, q, upstream)
    (right,) = torch.autograd.grad(whole(q, k, v, torch.ones_like(mask)), q, upstream)
    assert (wrong - right).abs().max() > 0.1


def test_gradients_of_the_queries_are_added_up_in_float32():
    (q, k, v), mask, upstream = inputs("bfloat16")
    kernel, seen = Kernel(), []

    def backward(*given):
        grads = kernel.backward(*given)
        seen.append(grads[0])
        return grads

    parts = list(zip(k.split(CUTS, 2), v.split(CUTS, 2), mask.split(CUTS, 1), strict=True))
    out, lse = rau.merge_attention(q, parts, kernel.forward, backward, "BNSD", base="e", inf_is_empty=True)
    (mine,) = torch.autograd.grad(out, q, upstream)
    assert (out.dtype, lse.dtype, mine.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    one, two, three = seen
    assert torch.equal(mine, (one.float() + two.float() + three.float()).bfloat16())
    assert not torch.equal(mine, one + two + three)


def test_a_backward_that_returns_too_few_gradients_is_named():
    """Though the next part's returns one more, so that their number is right in all."""
    (q, k, v), mask, upstream = inputs()
    kernel, counts = Kernel(), iter((3, 5, 4))

    def backward(*given):
        return (*kernel.backward(*given), None)[: next(counts)]

    parts = list(zip(k.split(CUTS, 2), v.split(CUTS, 2), mask.split(CUTS, 1), strict=True))
    out, _ = rau.merge_attention(q, parts, kernel.forward, backward, "BNSD", base="e", inf_is_empty=True)
    with pytest.raises(rau.ShapeError, match="backward returned 3 gradients for q and a part of 3 items; expected 4"):
        torch.autograd.grad(out, q, upstream)


def test_a_backward_whose_gradient_would_be_broadcast_is_named():
    (q, k, v), mask, upstream = inputs()
    kernel = Kernel()
    narrow = lambda *given: (kernel.backward(*given)[0][..., :1], *kernel.backward(*given)[1:])  # noqa: E731
    out, _ = rau.merge_attention(q, [(k, v, mask)], kernel.forward, narrow, "BNSD", base="e", inf_is_empty=True)
    with pytest.raises(rau.ShapeError, match=r"backward returned a gradient of q of shape \(.*1\); expected \("):
        torch.autograd.grad(out, q, upstream)


def test_no_gradient_is_wrong_in_silence():
    leaves, mask, _ = inputs()
    out, lse = merged(*leaves, mask, Kernel())
    assert out.requires_grad and not lse.requires_grad
    with pytest.raises(rau.UnsupportedError, match="create_graph"):
        torch.autograd.grad(out.sum(), leaves[0], create_graph=True)
    with torch.no_grad():
        assert not merged(*leaves, mask, Kernel())[0].requires_grad


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled():
    leaves, mask, upstream = inputs()
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def backward(*given):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, False)

    def attention(q, k, v):
        parts = list(zip(k.split(CUTS, 2), v.split(CUTS, 2), strict=True))
        return rau.merge_attention(q, parts, forward, backward, "BNSD", base="e")[0]

    for function in (attention, torch.compile(attention, fullgraph=True, backend="aot_eager")):
        mine = torch.autograd.grad(function(*leaves), leaves, upstream)
        wanted = torch.autograd.grad(whole(*leaves, torch.ones_like(mask)), leaves, upstream)
        for got, expected in zip(mine, wanted, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


def test_what_is_refused():
    leaves, mask, _ = inputs()
    with pytest.raises(rau.ConstraintError, match=r"pairs is empty; expected a list of pairs \(attn_out, lse\)"):
        rau.merge_attention(leaves[0], [], Kernel().forward, Kernel().backward, "BNSD", base="e")
    with pytest.raises(rau.ShapeError, match=r"(?s)merge_lse: .*pairs\[0\]\[1\] has shape"):
        merged(*leaves, mask, Kernel(), lse_layout="BSN")
    kernel = Kernel()
    with pytest.raises(rau.DTypeError, match="q is of type numpy.ndarray; expected a torch tensor. Where no gradient"):
        rau.merge_attention(leaves[0].detach().numpy(), [leaves[1:]], kernel.forward, kernel.backward, "BNSD", base="e")
    for parts in (leaves[1], tuple(leaves[1:])):
        with pytest.raises(rau.ShapeError, match=r"parts is of type .*; expected a list of tuples \(k, v\), one for each part"):
            rau.merge_attention(leaves[0], parts, kernel.forward, kernel.backward, "BNSD", base="e")
    for kernels, says in (((None, kernel.backward), r"forward is None; expected a function, forward\(q, k, v\)"),
                          ((kernel.forward, "no"), r"backward is of type str; .* backward\(grad_out, q, k, v, out, lse\)")):  # fmt: skip
        with pytest.raises(rau.ShapeError, match=says):
            rau.merge_attention(leaves[0], [leaves[1:]], *kernels, "BNSD", base="e")
    with pytest.raises(rau.OptionError, match="base = None"):
        merged(*leaves, mask, Kernel(), base=None)
