"""NATTEN: ``merge_attentions``, in the sigmoid form."""

from __future__ import annotations

from rau_peers import SIGMOID, Peer, takes


class NATTEN(Peer):
    """Composed of torch's operations; not compiled here, and without its own autograd."""

    name = "natten"
    where = "natten:merge_attentions"
    layout, lse_layout = "BSND", "BSN"
    capabilities = takes(*SIGMOID, devices=("cpu", "cuda"), deterministic=False)

    def merge_lse(self, prev_out, prev_lse, cur_out, cur_lse):
        return self._kernel([prev_out, cur_out], [prev_lse, cur_lse], torch_compile=False, use_autograd_fix=False)
