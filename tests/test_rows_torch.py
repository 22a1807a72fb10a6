"""Rows and dtypes of torch tensors: gradients, graphs, masks that are tensors."""

import os

import pytest

import rau

if "torch" in os.environ.get("RAU_TEST_BACKENDS", ""):
    import torch  # asked for: its absence is a failure
else:
    torch = pytest.importorskip("torch", reason="torch is not installed and was not asked for")

T = 6
ASKED = {
    "slice": {"tokens": slice(0, 3)}, "numbers": {"tokens": [4, 1]}, "mask": {"tokens": torch.arange(T) % 2 == 0},
    "padded": {"cu_seqlens_padded": [0, 4, 6], "actual_seq_qlen": torch.tensor([0, 2, 3])},
}  # fmt: skip


def state(seed, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(seed)
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    parts = [torch.randn(T, 2, n, generator=generator, dtype=torch.float64) for n in (3, 1, 1)]
    parts = [parts[0].to(dtype), parts[1].to(stats), parts[2].abs().add(1).to(stats)]
    return rau.AttentionState(*(part.requires_grad_(grad) for part in parts))


def finite(parts):
    return tuple(torch.where(part.isinf(), 0.0, part) for part in parts)


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_gradcheck_of_rows(asked):
    inputs = (*state(0, grad=True), *state(1, grad=True))
    assert torch.autograd.gradcheck(lambda *x: finite(rau.merge_states([x[:3], x[3:]], layout="TND", **asked)), inputs)
    pairs = [part for k in (0, 1) for part in (state(k, grad=True)[0], state(k)[1][..., 0].clone().requires_grad_())]
    how = {"layout": "TND", "lse_layout": "TN", "base": "2", **asked}
    assert torch.autograd.gradcheck(lambda *x: finite(rau.merge_lse([x[:2], x[2:]], **how)), pairs)


def test_gradcheck_of_any_number_of_states():
    indptr = torch.tensor([0, 2, 2, 3, 6])
    assert torch.autograd.gradcheck(lambda *x: finite(rau.merge_states(x, layout="TND", indptr=indptr)), tuple(state(0, grad=True)))


def test_unread_rows_have_no_gradient_even_behind_nan():
    prev, cur = state(0, torch.float32, True), state(1, torch.float32)
    for part in cur:
        part[0] = float("nan")
    cur = rau.AttentionState(*(part.requires_grad_() for part in cur))
    merged = rau.merge_states([prev, cur], layout="TND", tokens=[1, 2])
    merged.attn_out.sum().backward()
    assert all((part.grad[[0, 3, 4, 5]] == 0).all() for part in cur)
    assert (prev.attn_out.grad[[0, 3, 4, 5]] == 1).all() and prev.attn_out.grad.isfinite().all()


def test_a_gradient_through_another_dtype():
    prev, cur = state(0, torch.bfloat16, True), state(1, torch.bfloat16, True)
    rau.merge_states([prev, cur], layout="TND", dtype=torch.float32).attn_out.sum().backward()
    assert prev.attn_out.grad.dtype == torch.bfloat16 and prev.attn_out.grad.abs().sum() > 0
    with pytest.raises(rau.UnsupportedError, match="eight bits have no gradient here"):
        rau.merge_states([prev, cur], layout="TND", dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("asked", [*ASKED.values(), {"dtype": "float16"}], ids=[*ASKED, "dtype"])
def test_a_graph_is_refused_by_name_and_so_is_out(asked):
    prev, cur = state(0, torch.float32, True), state(1, torch.float32)
    with pytest.raises(rau.UnsupportedError, match="out is given, and an input requires grad"):
        rau.merge_states([prev, cur], layout="TND", **asked, out=state(2, torch.float32))
    compiled = torch.compile(
        lambda prev, cur: rau.merge_states([prev, cur], layout="TND", **asked), backend="eager", fullgraph=True
    )
    with pytest.raises(Exception, match="which rows there are is not known then"):
        compiled(state(0, torch.float32), cur)


@pytest.mark.parametrize("asked", [ASKED["numbers"], {"dtype": torch.bfloat16}], ids=["rows", "dtype"])
def test_torch_knows_of_what_is_written(asked):
    """A graph that has kept what is overwritten notices; so does one that would continue from it."""
    prev, cur, out = (state(seed, torch.float32) for seed in range(3))
    out = out._replace(attn_out=out.attn_out.to(asked.get("dtype", torch.float32)))
    kept = [part.clone() for part in out]
    before = [part._version for part in out]
    rau.merge_states([prev, cur], layout="TND", **asked, out=out)
    assert all(part._version > version for part, version in zip(out, before))
    marked = rau.AttentionState(*(part.requires_grad_() for part in kept))
    with pytest.raises(rau.UnsupportedError, match="attn_out of the arrays to write into requires grad"):
        rau.merge_states([prev, cur], layout="TND", **asked, out=marked)


def test_inference_tensors_are_written_to():
    expected = rau.merge_states([state(0), state(1)], layout="TND", tokens=[1, 4])
    with torch.inference_mode():
        prev, cur = state(0), state(1)
    rau.merge_states([prev, cur], layout="TND", tokens=[1, 4], out=prev)
    assert all(torch.equal(got, wanted) for got, wanted in zip(prev, expected))


def test_what_is_written_under_no_grad_is_no_part_of_a_graph():
    prev, cur = state(0, grad=True), state(1)
    with torch.no_grad():
        rau.merge_states([prev, cur], layout="TND", tokens=[0, 2], out=prev, backend="torch")
    assert all(part.grad_fn is None and part.requires_grad for part in prev)
