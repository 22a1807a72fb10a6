"""NATTEN: ``merge_attentions``, in the sigmoid form."""

from __future__ import annotations

from rau.backends import Problem
from rau_peers import Peer, takes


def _limits(problem: Problem) -> list[str]:
    return ["K = 1: it wants at least two states"] if problem.K < 2 else []


class NATTEN(Peer):
    """Composed of torch's operations; not compiled here, and without its own autograd."""

    name = "natten"
    where = "natten:merge_attentions"
    layout, lse_layout = "BSND", "BSN"
    capabilities = takes(
        "one-empty", "two-empty", "payload", "small-weights", devices=("cpu", "cuda"), limits=_limits
    )

    def merge_lse_states(self, outs, lses):
        return self._kernel(list(outs), list(lses), torch_compile=False, use_autograd_fix=False)
