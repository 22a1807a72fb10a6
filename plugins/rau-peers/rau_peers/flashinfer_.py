"""FlashInfer: ``merge_state`` and ``merge_states``, CUDA and Triton; log-sum-exps to base 2."""

from __future__ import annotations

from rau.backends import Problem
from rau_peers import Peer, takes


def _limits(problem: Problem) -> list[str]:
    """A block has a thread for each 16 bytes of a token, or for more where D > 256, and at most 1024."""
    if problem.D not in (64, 128, 256, 512):
        return [f"D = {problem.D} is not one of 64, 128, 256, 512"]
    heads = 1024 // min(problem.D // 8, 32)
    return [f"N = {problem.N} > {heads} with D = {problem.D}"] if problem.N > heads else []


class FlashInfer(Peer):
    """Its CUDA kernels."""

    name = "flashinfer"
    where = "flashinfer.cascade"
    capabilities = takes("payload", devices=("cuda",), dtypes=("float16", "bfloat16"), lse_base="2", limits=_limits)

    def merge_lse(self, prev_out, prev_lse, cur_out, cur_lse):
        return self._kernel.merge_state(prev_out, prev_lse, cur_out, cur_lse)

    def merge_lse_states(self, outs, lses):
        return self._kernel.merge_states(self._torch.stack(outs, 1), self._torch.stack(lses, 1))


class FlashInferTriton(FlashInfer):
    """Its Triton kernels, which it launches on Hopper alone."""

    name = "flashinfer-triton"
    where = "flashinfer.triton.cascade"
    capabilities = takes("two-empty", "payload", devices=("cuda",), lse_base="2")
