"""vLLM: ``merge_attn_states``, which picks CUDA, Triton or torch, and its Triton kernel by itself."""

from __future__ import annotations

from rau_peers import TRITON, Peer, takes


class VLLM(Peer):
    """What vLLM calls; +inf is read as an empty side."""

    name = "vllm"
    where = "vllm.v1.attention.ops.merge_attn_states:merge_attn_states"
    lse_layout = "NT"
    capabilities = takes("payload", devices=("cuda", "cpu"))

    def merge_lse(self, prev_out, prev_lse, cur_out, cur_lse):
        out, lse = self._torch.empty_like(prev_out), self._torch.empty_like(prev_lse)
        self._kernel(out, prev_out, prev_lse, cur_out, cur_lse, lse)
        return out, lse


class VLLMTriton(VLLM):
    """Its Triton kernel."""

    name = "vllm-triton"
    where = "vllm.v1.attention.ops.triton_merge_attn_states:merge_attn_states"
    capabilities = takes("payload", **TRITON)
