"""Stand-ins for the peers: the documented signatures and demands of each, around one right merge in float64.

They refuse what the peer would refuse, and a wrong keyword in the first place. Where a peer is installed the tests compare
their signatures with its own.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch

HALF = (torch.float16, torch.bfloat16)
USUAL = (torch.float16, torch.bfloat16, torch.float32)


def merged(outs, lses, base=math.e):
    """Merge (K, ..., D) and (K, ...), right in whatever the contract says of a log-sum-exp."""
    natural = lses.double() * math.log(base)
    lse = torch.logsumexp(natural, 0)
    weights = torch.where(natural == -math.inf, 0.0, (natural - lse).exp()).unsqueeze(-1)
    out = torch.where(weights == 0, 0.0, weights * outs.double()).sum(0)
    return out.to(outs.dtype), (lse / math.log(base)).float()


def demand(*, outs, lses, shape, dtypes=USUAL, contiguous=True):
    """Refuse what is not of the documented form; `shape` makes the shape of log-sum-exps of that of outputs."""
    for out, lse in zip(outs, lses, strict=True):
        assert out.dtype in dtypes and out.dtype == outs[0].dtype, out.dtype
        assert lse.dtype == torch.float32, lse.dtype
        assert out.shape == outs[0].shape and tuple(lse.shape) == shape(*out.shape), (out.shape, lse.shape)
        assert not contiguous or (out.is_contiguous() and lse.is_contiguous())


# ---------------------------------------------------------------------------------------------------------- FlashInfer


def flashinfer(dtypes, dims):
    def merge_state(v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor):
        demand(outs=(v_a, v_b), lses=(s_a, s_b), shape=lambda t, n, d: (t, n), dtypes=dtypes)
        assert v_a.shape[-1] in dims
        return merged(torch.stack([v_a, v_b]), torch.stack([s_a, s_b]), 2)

    def merge_states(v: torch.Tensor, s: torch.Tensor):
        demand(outs=(v,), lses=(s,), shape=lambda t, k, n, d: (t, k, n), dtypes=dtypes)
        assert v.shape[-1] in dims
        return merged(v.transpose(0, 1), s.transpose(0, 1), 2)

    return {"merge_state": merge_state, "merge_states": merge_states}


# ----------------------------------------------------------------------------------------------------- vLLM and SGLang


def merge_attn_states(
    output: torch.Tensor,
    prefix_output: torch.Tensor,
    prefix_lse: torch.Tensor,
    suffix_output: torch.Tensor,
    suffix_lse: torch.Tensor,
    output_lse: torch.Tensor | None = None,
    prefill_tokens_with_context: int | None = None,
    output_scale: torch.Tensor | None = None,
) -> None:
    outs, lses = (prefix_output, suffix_output, output), (prefix_lse, suffix_lse, output_lse)
    demand(outs=outs, lses=lses, shape=lambda t, n, d: (n, t))
    out, lse = merged(torch.stack(outs[:2]), torch.stack(lses[:2]).mT)
    output.copy_(out)
    output_lse.copy_(lse.T)


def merge_state(
    prefix_output: torch.Tensor,
    prefix_lse: torch.Tensor,
    suffix_output: torch.Tensor,
    suffix_lse: torch.Tensor,
    output: torch.Tensor | None = None,
    output_lse: torch.Tensor | None = None,
):
    demand(outs=(prefix_output, suffix_output), lses=(prefix_lse, suffix_lse), shape=lambda t, n, d: (t, n))
    return merged(torch.stack([prefix_output, suffix_output]), torch.stack([prefix_lse, suffix_lse]))


# ------------------------------------------------------------------------------------------------------ FlashAttention


def flash_attn_combine_3(out_partial, lse_partial, out=None, out_dtype=None):
    demand(outs=(out_partial,), lses=(lse_partial,), shape=lambda *s: s[:-1], dtypes=(torch.float32,), contiguous=False)
    assert out_partial.stride(-1) == 1 and lse_partial.stride(-2) == 1 and len(out_partial) <= 256
    out, lse = merged(out_partial, lse_partial)
    return out.to(out_dtype or out.dtype), lse


def flash_attn_combine_4(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    cu_seqlens: torch.Tensor | None = None,
    seqused: torch.Tensor | None = None,
    virtual_batch_idx: torch.Tensor | None = None,
    return_lse: bool = True,
):
    demand(outs=(out_partial,), lses=(lse_partial,), shape=lambda *s: s[:-1], contiguous=False)
    assert out_partial.stride(-1) == 1 and lse_partial.stride(-2) == 1 and len(out_partial) <= 256
    assert out_partial.shape[-1] % 8 == 0 and out_dtype in (None, out_partial.dtype)
    return merged(out_partial, lse_partial)


# ------------------------------------------------------------------------------- MSLK, NATTEN, ring-flash-attention, torch


def mslk_merge_attentions(attn_split, lse_split, write_lse: bool = True, output_dtype: torch.dtype | None = None):
    demand(outs=(attn_split,), lses=(lse_split,), shape=lambda k, b, m, h, d: (k, b, h, m), contiguous=False)
    out, lse = merged(attn_split, lse_split.mT)
    return out, lse.mT


def natten_merge_attentions(outputs, lse_tensors, torch_compile: bool = True, use_autograd_fix: bool = True):
    demand(outs=outputs, lses=lse_tensors, shape=lambda b, s, n, d: (b, s, n))
    assert len(outputs) >= 2 and not torch_compile and not use_autograd_fix
    return merged(torch.stack(outputs), torch.stack(lse_tensors))


def update_out_and_lse(out, lse, block_out, block_lse, slice_=None):
    demand(outs=(block_out,), lses=(block_lse,), shape=lambda b, s, n, d: (b, n, s), contiguous=False)
    block_out, block_lse = block_out.float(), block_lse.mT.unsqueeze(-1)
    if out is None:
        return block_out, block_lse
    assert out.dtype == torch.float32 and lse.shape == block_lse.shape
    out, lse = merged(torch.stack([out, block_out]), torch.stack([lse, block_lse]).squeeze(-1))
    return out, lse.unsqueeze(-1)


class SDPAMerger:
    def __init__(self, convert_to_f32: bool, seq_dim: int):
        assert convert_to_f32 and seq_dim == 2
        self.seen: list[Any] = []

    def step(self, out: torch.Tensor, lse: torch.Tensor, partial: bool) -> None:
        assert not partial
        self.seen.append((out, lse))

    def results(self):
        outs, lses = zip(*self.seen, strict=True)
        demand(outs=outs, lses=lses, shape=lambda b, n, s, d: (b, n, s), contiguous=False)
        return merged(torch.stack(outs), torch.stack(lses))


# -------------------------------------------------------------------------------------------------- TransformerEngine


def flash_attn_fwd_softmax_lse_correction(softmax_lse: torch.Tensor, softmax_lse_per_step: torch.Tensor):
    pair = torch.stack([softmax_lse, softmax_lse_per_step])
    softmax_lse.copy_(torch.logsumexp(pair.double(), 0))


def flash_attn_fwd_out_correction_init(
    out_init_step: torch.Tensor, softmax_lse: torch.Tensor, softmax_lse_init_step: torch.Tensor, seq_dim: int
):
    return weighted(out_init_step, softmax_lse, softmax_lse_init_step, seq_dim)


def flash_attn_fwd_out_correction(
    out: torch.Tensor,
    out_per_step: torch.Tensor,
    softmax_lse: torch.Tensor,
    softmax_lse_per_step: torch.Tensor,
    seq_dim: int,
):
    out.add_(weighted(out_per_step, softmax_lse, softmax_lse_per_step, seq_dim))


def weighted(out, lse, lse_per_step, seq_dim):
    demand(outs=(out,), lses=(lse,), shape=lambda b, s, n, d: (b, n, s), contiguous=False)
    weights = torch.where(lse_per_step == -math.inf, 0.0, (lse_per_step.double() - lse).exp())
    weights = weights.movedim(2, seq_dim).unsqueeze(-1)
    return torch.where(weights == 0, 0.0, weights * out.double()).to(out.dtype)


def thd_out_correction(out, out_per_step, lse, lse_per_step, cu_seqlens, only_second_half, lse_packed, /):
    demand(outs=(out, out_per_step), lses=(lse, lse_per_step), shape=lambda t, n, d: (n, t))
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, len(out)]
    assert not only_second_half and lse_packed
    out.add_(weighted(out_per_step[None], lse[None], lse_per_step[None], 1)[0])


CORRECTIONS = {
    "flash_attn_fwd_softmax_lse_correction": flash_attn_fwd_softmax_lse_correction,
    "flash_attn_fwd_out_correction_init": flash_attn_fwd_out_correction_init,
    "flash_attn_fwd_out_correction": flash_attn_fwd_out_correction,
    "tex": SimpleNamespace(thd_out_correction=thd_out_correction),
}


# ----------------------------------------------------------------------------------------------------------- torch_npu


def npu_attention_update(lse, local_out, update_type):
    demand(outs=local_out, lses=lse, shape=lambda rows, d: (rows,))
    assert update_type == 1 and 1 <= len(lse) <= 16 and local_out[0].shape[-1] in range(8, 513, 8)
    return merged(torch.stack(local_out), torch.stack(lse))


# What each adapter finds where it looks: the functions of its module.
STAND_INS: dict[str, dict[str, Any]] = {
    "flash-attention-3": {"flash_attn_combine": flash_attn_combine_3},
    "flash-attention-4": {"flash_attn_combine": flash_attn_combine_4},
    "flashinfer": flashinfer(HALF, (64, 128, 256, 512)),
    "flashinfer-triton": flashinfer(USUAL, range(1, 1000)),
    "mslk": {"merge_attentions": mslk_merge_attentions},
    "natten": {"merge_attentions": natten_merge_attentions},
    "ring-flash-attention": {"update_out_and_lse": update_out_and_lse},
    "sdpa-merger": {"_SDPAMerger": SDPAMerger},
    "sglang": {"merge_state": merge_state},
    "sglang-triton": {"merge_state_triton": merge_state},
    "torch-npu": {"npu_attention_update": npu_attention_update},
    "transformer-engine": CORRECTIONS,
    "transformer-engine-thd": CORRECTIONS,
    "vllm": {"merge_attn_states": merge_attn_states},
    "vllm-triton": {"merge_attn_states": merge_attn_states},
}
