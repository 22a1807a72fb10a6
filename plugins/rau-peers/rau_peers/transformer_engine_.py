"""TransformerEngine: what its context parallelism does to outputs and log-sum-exps, step by step."""

from __future__ import annotations

from rau_peers import Peer, takes

_WHERE = "transformer_engine.pytorch.attention.dot_product_attention.context_parallel"


def _lse_of_all(kernels, lses):
    """The log-sum-exp over all steps, by which every partial output is then weighted."""
    lse = lses[0].clone()
    for lse_per_step in lses[1:]:
        kernels.flash_attn_fwd_softmax_lse_correction(lse, lse_per_step)
    return lse


class TransformerEngine(Peer):
    """Its functions for layout "bshd", composed of torch's operations."""

    name = "transformer-engine"
    where = _WHERE
    layout, lse_layout = "BSND", "BNS"
    capabilities = takes("two-empty", "payload", devices=("cuda",), contiguous=False)

    def merge_lse_states(self, outs, lses):
        lse = _lse_of_all(self._kernel, lses)
        out = self._kernel.flash_attn_fwd_out_correction_init(outs[0], lse, lses[0], 1)
        for out_per_step, lse_per_step in zip(outs[1:], lses[1:], strict=True):
            self._kernel.flash_attn_fwd_out_correction(out, out_per_step, lse, lse_per_step, 1)
        return out, lse


class TransformerEngineTHD(Peer):
    """Its CUDA kernel for layout "thd"; all tokens are one sequence here, which changes nothing where none is halved."""

    name = "transformer-engine-thd"
    where = _WHERE
    lse_layout = "NT"
    capabilities = takes("two-empty", "payload", devices=("cuda",), head_dim_multiple=8)

    def merge_lse_states(self, outs, lses):
        lse, out = _lse_of_all(self._kernel, lses), self._torch.zeros_like(outs[0])
        ends = self._torch.tensor([0, out.shape[0]], dtype=self._torch.int32, device=out.device)
        for out_per_step, lse_per_step in zip(outs, lses, strict=True):
            self._kernel.tex.thd_out_correction(out, out_per_step, lse, lse_per_step, ends, False, True)
        return out, lse
