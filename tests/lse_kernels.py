"""Kernels that return an output and its log-sum-exp, in the forms in which the field writes them, as backends."""

from dataclasses import replace

import numpy as np

from rau.backends import Capabilities
from rau.backends.lse import LSEBackend

NUMPY = ("numpy:ndarray",)


class Guarded(LSEBackend):
    """Any number of states at once, with everything guarded that can be."""

    name = "guarded"
    capabilities = Capabilities(array_types=NUMPY, statistics="lse")
    exp, log = staticmethod(np.exp), staticmethod(np.log)

    def merge_lse_states(self, outs, lses):
        top = np.maximum.reduce(lses)
        finite = np.where(np.isneginf(top), 0, top)
        factors = [self.exp(lse - finite) for lse in lses]
        total = sum(factors)
        lse, result = finite + self.log(total), np.full(outs[0].shape, -0.0, top.dtype)
        for factor, out in zip(factors, outs, strict=True):
            weight = self.rows(factor / np.where(total == 0, 1, total))
            result += np.where(weight == 0, -0.0, weight * out.astype(top.dtype)).astype(top.dtype)
        return np.where(self.rows(np.isneginf(top)), 0, result), lse

    def rows(self, stats):
        """See (T, N) beside (T, N, D)."""
        return stats[..., None]


class Base2(Guarded):
    """To base 2, heads first in the log-sum-exp, as FlashInfer and vLLM each have one of them."""

    name = "base-2"
    lse_layout = "NT"
    capabilities = Capabilities(array_types=NUMPY, statistics="lse", lse_base="2")
    exp, log = staticmethod(np.exp2), staticmethod(np.log2)

    def rows(self, stats):
        return stats.T[..., None]


class Pairs(Guarded):
    """Two states at a time; axes of 4 dimensions, (B, N, S, D)."""

    name = "pairs"
    layout, lse_layout = "BNSD", "BNS"
    merge = LSEBackend.merge

    def merge_lse(self, prev_out, prev_lse, cur_out, cur_lse):
        return self.merge_lse_states((prev_out, cur_out), (prev_lse, cur_lse))


class Weights(LSEBackend):
    """Weights exp(lse_i - lse), which do not add up to 1, as in TransformerEngine; nothing is guarded."""

    name = "weights"
    capabilities = Capabilities(array_types=NUMPY, statistics="lse", unpromised=("two-empty", "payload", "signed-zero"))

    def merge_lse(self, prev_out, prev_lse, cur_out, cur_lse):
        lse = np.maximum(prev_lse, cur_lse) + np.log1p(np.exp(-np.abs(prev_lse - cur_lse)))
        return np.exp(prev_lse - lse)[..., None] * prev_out + np.exp(cur_lse - lse)[..., None] * cur_out, lse


class Sigmoid(LSEBackend):
    """One weight, and the difference of the outputs, as in ring-flash-attention and PyTorch; nothing is guarded."""

    name = "sigmoid"
    capabilities = Capabilities(
        array_types=NUMPY, statistics="lse",
        unpromised=("one-empty", "two-empty", "payload", "signed-zero", "small-weights", "infinity"),
    )  # fmt: skip

    def merge_lse(self, prev_out, prev_lse, cur_out, cur_lse):
        weight, out = (1 / (1 + np.exp(prev_lse - cur_lse)))[..., None], prev_out.astype(prev_lse.dtype)
        apart = prev_lse - cur_lse
        return out - weight * (out - cur_out), prev_lse - (np.minimum(apart, 0) - np.log1p(np.exp(-np.abs(apart))))


KERNELS = (Guarded, Base2, Pairs, Weights, Sigmoid)


class TorchWeights(LSEBackend):
    """The same in torch, with whatever gradient comes of it."""

    name = "torch-weights"
    capabilities = Capabilities(
        array_types=("torch:Tensor",), statistics="lse", max_states=4, unpromised=("two-empty", "payload", "signed-zero")
    )

    def merge_lse(self, prev_out, prev_lse, cur_out, cur_lse):
        import torch

        lse = torch.logaddexp(prev_lse, cur_lse)
        return (prev_lse - lse).exp()[..., None] * prev_out + (cur_lse - lse).exp()[..., None] * cur_out, lse


class Strideless(TorchWeights):
    """It reads its outputs as if they were contiguous, and says so; it has no gradient."""

    name = "strideless"
    capabilities = replace(TorchWeights.capabilities, contiguous=True)

    def merge_lse(self, prev_out, prev_lse, cur_out, cur_lse):
        flat = [out.detach().as_strided(out.shape, out.new_empty(out.shape).stride()) for out in (prev_out, cur_out)]
        return super().merge_lse(flat[0], prev_lse.detach(), flat[1], cur_lse.detach())
