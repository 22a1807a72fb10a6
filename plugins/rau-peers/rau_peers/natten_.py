"""NATTEN: ``merge_attentions``, in the sigmoid form."""

from __future__ import annotations

from rau_peers import Peer, takes


class NATTEN(Peer):
    """Composed of torch's operations; not compiled here, and without its own autograd."""

    name = "natten"
    where = "natten:merge_attentions"
    layout, lse_layout = "BSND", "BSN"
    capabilities = takes("one-empty", "two-empty", "payload", "small-weights", devices=("cpu", "cuda"))

    def merge_lse_states(self, outs, lses):
        return self._kernel(list(outs), list(lses), torch_compile=False, use_autograd_fix=False)
