"""PyTorch: the merger of its own ring attention, private, in the sigmoid form, with a running output in float32."""

from __future__ import annotations

from rau_peers import Peer, takes


class SDPAMerger(Peer):
    """``_SDPAMerger`` of torch.distributed, as context parallelism uses it."""

    name = "sdpa-merger"
    where = "torch.distributed.tensor.experimental._context_parallel._attention:_SDPAMerger"
    layout, lse_layout = "BNSD", "BNS"
    capabilities = takes("one-empty", "two-empty", "payload", "small-weights", devices=("cpu", "cuda"))

    def merge_lse_states(self, outs, lses):
        merger = self._kernel(convert_to_f32=True, seq_dim=2)
        for out, lse in zip(outs, lses, strict=True):
            merger.step(out, lse, partial=False)
        return merger.results()
