"""ring-flash-attention: ``update_out_and_lse``, in the sigmoid form, with a running output in float32."""

from __future__ import annotations

from rau_peers import Peer, takes


class RingFlashAttention(Peer):
    """Composed of torch's operations."""

    name = "ring-flash-attention"
    where = "ring_flash_attn.utils:update_out_and_lse"
    layout, lse_layout = "BSND", "BNS"
    capabilities = takes("one-empty", "two-empty", "payload", "small-weights", devices=("cpu", "cuda"), mixed=True)

    def merge_lse_states(self, outs, lses):
        out = lse = None
        for block_out, block_lse in zip(outs, lses, strict=True):
            out, lse = self._kernel(out, lse, block_out, block_lse)
        return out, lse.squeeze(-1).transpose(-1, -2)
