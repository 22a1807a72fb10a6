"""PyTorch: the merger of its own ring attention, private, in the sigmoid form, with a running output in float32."""

from __future__ import annotations

from rau_peers import SIGMOID, Peer, takes


class SDPAMerger(Peer):
    """``_SDPAMerger`` of torch.distributed, as context parallelism uses it."""

    name = "sdpa-merger"
    where = "torch.distributed.tensor.experimental._context_parallel._attention:_SDPAMerger"
    layout, lse_layout = "BNSD", "BNS"
    capabilities = takes(*SIGMOID, devices=("cpu", "cuda"), deterministic=False, contiguous=False)

    def merge_lse(self, prev_out, prev_lse, cur_out, cur_lse):
        merger = self._kernel(convert_to_f32=True, seq_dim=2)
        merger.step(prev_out, prev_lse, partial=False)
        merger.step(cur_out, cur_lse, partial=False)
        return merger.results()
