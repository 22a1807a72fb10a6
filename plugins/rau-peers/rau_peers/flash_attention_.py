"""FlashAttention 3 and 4: ``flash_attn_combine``, up to 256 states, empty ones skipped."""

from __future__ import annotations

from rau_peers import Peer, takes


class FlashAttention4(Peer):
    """The CuTe kernel: partial outputs in 16 bits too."""

    name = "flash-attention-4"
    where = "flash_attn.cute.interface:flash_attn_combine"
    layout, lse_layout = "BSND", "BNS"
    capabilities = takes(devices=("cuda",), contiguous=False, max_states=256, head_dim_multiple=8)

    def merge_lse_states(self, outs, lses, dtype=None):
        lse_partial = self._torch.stack(lses).transpose(-1, -2)  # (K, B, S, N), but the tokens have to lie side by side
        out, lse = self._kernel(self._torch.stack(outs), lse_partial, out_dtype=dtype or outs[0].dtype)
        return out, lse.transpose(-1, -2)


class FlashAttention3(FlashAttention4):
    """The CUDA kernel of Hopper's package: partial outputs in float32 alone, rounded once at the end."""

    name = "flash-attention-3"
    where = "flash_attn_interface:flash_attn_combine"
    capabilities = takes(devices=("cuda",), contiguous=False, mixed=True, max_states=256)

    def merge_lse_states(self, outs, lses):
        return super().merge_lse_states([out.float() for out in outs], lses, outs[0].dtype)
