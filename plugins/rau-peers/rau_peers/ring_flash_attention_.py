"""ring-flash-attention: ``update_out_and_lse``, in the sigmoid form, with a running output in float32."""

from __future__ import annotations

from rau_peers import SIGMOID, Peer, takes


class RingFlashAttention(Peer):
    """Composed of torch's operations."""

    name = "ring-flash-attention"
    where = "ring_flash_attn.utils:update_out_and_lse"
    layout, lse_layout = "BSND", "BNS"
    capabilities = takes(*SIGMOID, devices=("cpu", "cuda"), deterministic=False, contiguous=False, mixed=True)

    def merge_lse(self, prev_out, prev_lse, cur_out, cur_lse):
        out, lse = self._kernel(None, None, prev_out, prev_lse)
        out, lse = self._kernel(out, lse, cur_out, cur_lse)
        return out, lse.squeeze(-1).transpose(-1, -2)
