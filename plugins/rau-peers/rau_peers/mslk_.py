"""MSLK, where the kernels of xformers have gone (``xformers.ops.fmha`` hands out the same function): ``merge_attentions``."""

from __future__ import annotations

from rau_peers import TRITON, Peer, takes


class MSLK(Peer):
    """Its Triton kernel over K states."""

    name = "mslk"
    where = "mslk.attention.fmha:merge_attentions"
    layout, lse_layout = "BSND", "BNS"
    capabilities = takes("payload", contiguous=False, **TRITON)

    def merge_lse_states(self, outs, lses):
        return self._kernel(self._torch.stack(outs), self._torch.stack(lses))
