"""Attention to one rank's keys, and its gradient: torch's own kernels, or what a caller brings.

Tensors are (B, N, S, D), log-sum-exps natural ones, (B, N, S); keys may have fewer heads than queries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rau.errors import UnsupportedError

_aten: Any = torch.ops.aten


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Return the output and its log-sum-exp, by torch's flash kernel where there is one; else by products in float32."""
    if not _has_flash(q):
        return _products(q, k, v, causal, scale)
    k, v = _repeated(k, q), _repeated(v, q)
    if q.is_cuda:
        return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v that these keys have a part in.

    `out` and `lse` are those over *all* keys, so that the probabilities, recomputed as exp(score - lse), are the final ones.
    """
    if not _has_flash(q):
        return differentiated(partial(_products, scale=scale))(dout, q, k, v, out, lse, causal)
    ks, vs = _repeated(k, q), _repeated(v, q)
    if q.is_cuda:
        unused = torch.zeros(2, dtype=torch.int64, device=q.device)  # the random state of a dropout that is off
        lengths = None, None, q.shape[2], k.shape[2]
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
            dout, q, ks, vs, out, lse.contiguous(), *lengths, 0.0, causal, unused, unused, scale=scale
        )
    else:
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, ks, vs, out, lse, 0.0, causal, scale=scale
        )
    return dq, _summed(dk, k), _summed(dv, v)


def differentiated(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the gradient of an attention function that torch differentiates, through its log-sum-exp as well.

    In the merge, a part's output o and log-sum-exp weigh w = exp(its lse - lse): so the output has gradient w dout, and the
    log-sum-exp w dout (o - out), summed over the elements of a row.
    """

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [each.detach().requires_grad_() for each in (q, k, v)]
            its_out, its_lse = forward(*leaves, causal)[:2]
        if not (its_out.requires_grad and its_lse.requires_grad):
            raise UnsupportedError(
                "ring_attention: torch does not differentiate what forward returns, output and log-sum-exp both; pass the "
                "kernel's own gradient as backward=."
            )
        weight = torch.where(its_lse == -torch.inf, 0.0, its_lse.detach() - lse).exp()
        weight = torch.where(its_lse == -torch.inf, 0.0, weight)
        wide = dout.to(weight.dtype)
        of_out = weight[..., None] * wide
        of_lse = (of_out * (its_out.detach().to(weight.dtype) - out.to(weight.dtype))).sum(-1)
        return torch.autograd.grad((its_out, its_lse), leaves, (of_out.to(its_out.dtype), of_lse))

    return backward


def _has_flash(q: Tensor) -> bool:
    return q.device.type == "cpu" or (q.is_cuda and q.dtype in (torch.float16, torch.bfloat16))


def _products(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):  # whose products would be of 16 bits
        return _wide_products(q, k, v, causal, scale)


def _wide_products(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    qs, ks, vs = q.to(wide), _repeated(k, q).to(wide), _repeated(v, q).to(wide)
    scores = qs @ ks.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1) @ vs).to(q.dtype), scores.logsumexp(-1)


def _repeated(of_keys: Tensor, q: Tensor) -> Tensor:
    """Repeat key heads for the query heads that share them."""
    share = q.shape[1] // of_keys.shape[1]
    return of_keys if share == 1 else of_keys.repeat_interleave(share, 1)


def _summed(gradient: Tensor, of_keys: Tensor) -> Tensor:
    """Add up the gradients of repeated heads; in float32 at least."""
    share = gradient.shape[1] // of_keys.shape[1]
    if share == 1:
        return gradient
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32)).unflatten(1, (-1, share)).sum(2)
