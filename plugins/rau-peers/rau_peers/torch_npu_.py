"""torch_npu: ``npu_attention_update``, over up to 16 states; its ``npu_ring_attention_update`` is rau's backend "ascend"."""

from __future__ import annotations

from rau_peers import Peer, takes


class TorchNPU(Peer):
    """CANN's AttentionUpdate: rows of all tokens and heads."""

    name = "torch-npu"
    where = "torch_npu:npu_attention_update"
    capabilities = takes("two-empty", "payload", devices=("npu",), max_states=16, max_head_dim=512, head_dim_multiple=8)

    def merge_lse_states(self, outs, lses):
        rows = [out.reshape(-1, out.shape[-1]) for out in outs]
        out, lse = self._kernel([lse.reshape(-1) for lse in lses], rows, 1)
        return out.reshape(outs[0].shape), lse.reshape(lses[0].shape)
