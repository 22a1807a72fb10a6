"""SGLang: ``merge_state``, which picks its CUDA kernel where it can, and its Triton kernel by itself."""

from __future__ import annotations

from rau_peers import TRITON, Peer, takes


class SGLang(Peer):
    """What SGLang calls; +inf is read as an empty side."""

    name = "sglang"
    where = "sglang.srt.layers.attention.merge_state:merge_state"
    capabilities = takes("two-empty", "payload", devices=("cuda",))

    def merge_lse(self, prev_out, prev_lse, cur_out, cur_lse):
        return self._kernel(prev_out, prev_lse, cur_out, cur_lse)


class SGLangTriton(SGLang):
    """Its Triton kernel."""

    name = "sglang-triton"
    where = "sglang.kernels.ops.attention.merge_state:merge_state_triton"
    capabilities = takes("two-empty", "payload", **TRITON)
