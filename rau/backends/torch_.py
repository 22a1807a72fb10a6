"""The torch backend: ATen operations only, on any device that has float64; the same bits as the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rau.backends import AttentionState, Backend, Capabilities, Problem
from rau.backends.exponential import COEFFICIENTS, LN2_HIGH, LN2_LOW, LOG2_E, ROUND, UNDERFLOW
from rau.errors import BackendUnavailableError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class Weighed(NamedTuple):
    """The rows of a merge, float64 unless said otherwise, in the order of the output's rows.

    Attributes
    ----------
    live : list of Tensor of bool
        Which rows of each state are not empty.
    alone : Tensor of bool
        Rows with a single live state.
    exponentials : list of Tensor
        exp(m_i - m); 0 for an empty side.
    weights : list of Tensor, dtype of the statistics
        Share of each state; 0 where it is not to be read.
    maximum, total : Tensor
        Merged statistics, not yet rounded.
    """

    live: list[Tensor]
    alone: Tensor
    exponentials: list[Tensor]
    weights: list[Tensor]
    maximum: Tensor
    total: Tensor


class Geometry:
    """How the tensors of one call are seen as rows: (..., N) statistics beside (..., N, D) outputs.

    Parameters
    ----------
    layout : str
    heads : int
        N.
    packed : Tensor of int64, shape (T * N,), or None
        Where each row's statistic stands, if they are packed: see :func:`packed_rows`.
    """

    def __init__(self, layout: str, heads: int, packed: Tensor | None) -> None:
        self._layout = layout
        self._heads = heads
        self._packed = packed

    @classmethod
    def of(cls, state: Sequence[Tensor], actual_seq_qlen: Any, layout: str, softmax_layout: str) -> Geometry:
        """Read it off a state.

        Parameters
        ----------
        state : triple of Tensor
        actual_seq_qlen : Tensor or ndarray of int64, or None
        layout, softmax_layout : str

        Returns
        -------
        Geometry
        """
        attn_out, maximum = state[0], state[1]
        heads = maximum.shape[1]
        if layout != "TND" or softmax_layout != "SBH":
            return cls(layout, heads, None)
        return cls(layout, heads, packed_rows(actual_seq_qlen, attn_out.shape[0], heads, attn_out.device))

    def heads(self, attn_out: Tensor) -> Tensor:
        """See an output as (..., N, D), without a copy."""
        if self._layout != "SBH":
            return attn_out
        return attn_out.unflatten(-1, (self._heads, attn_out.shape[-1] // max(self._heads, 1)))

    def rows(self, stats: Tensor) -> Tensor:
        """See lane 0 of statistics in the order of the output's rows; packed ones are gathered."""
        lane = stats[..., 0]
        if self._packed is not None:
            return lane.reshape(-1).index_select(0, self._packed).view(lane.shape)
        if self._layout == "SBH":
            return lane.permute(2, 0, 1)
        return lane.transpose(1, 2) if self._layout == "BSND" else lane

    def statistics(self, rows: Tensor) -> Tensor:
        """Put rows back into the axes and the order of the statistics; one lane, on a last axis of length 1."""
        if self._packed is not None:
            flat = rows.new_zeros(rows.numel())
            return flat.index_copy_(0, self._packed, rows.reshape(-1)).view(*rows.shape, 1)
        if self._layout == "SBH":
            rows = rows.permute(1, 2, 0)
        elif self._layout == "BSND":
            rows = rows.transpose(1, 2)
        return rows.unsqueeze(-1)


def packed_rows(actual_seq_qlen: Any, tokens: int, heads: int, device: Any) -> Tensor:
    """Where the statistic of each token and head stands among packed rows, token by token.

    Computed on the device, without waiting for it; inside bounds whatever the lengths contain.

    Parameters
    ----------
    actual_seq_qlen : Tensor or ndarray of int64, shape (sequences + 1,)
    tokens, heads : int
        T and N.
    device : torch.device

    Returns
    -------
    Tensor of int64, shape (T * N,)
    """
    import torch

    cumulative = torch.as_tensor(actual_seq_qlen, device=device).to(torch.int64)
    token = torch.arange(tokens, device=device)
    sequence = torch.searchsorted(cumulative, token, right=True).sub_(1).clamp_(0, max(len(cumulative) - 2, 0))
    start = cumulative[sequence]
    length = cumulative[(sequence + 1).clamp_(max=len(cumulative) - 1)] - start
    rows = (start * heads + (token - start)).unsqueeze(-1) + torch.arange(heads, device=device) * length.unsqueeze(-1)
    return rows.clamp_(0, max(tokens * heads - 1, 0)).view(-1)


def difference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract, and find what the rounding lost, as :func:`rau.backends.numpy_.difference`.

    Parameters
    ----------
    a, b : Tensor of float64, one shape

    Returns
    -------
    difference, lost : Tensor of float64
    """
    d = a - b
    back = d - a
    return d, (a - (d - back)).sub_(back.add_(b))


def exp_nonpositive(x: Tensor, lost: Tensor | None = None) -> Tensor:
    """The exponential of rau, see :mod:`rau.backends.exponential`.

    Parameters
    ----------
    x : Tensor of float64
        Zero, negative or NaN.
    lost : Tensor of float64, shape of `x`, optional
        What `x` has lost by rounding, less than its unit in the last place.

    Returns
    -------
    Tensor of float64, shape of `x`
        exp(x + lost), 0 where x is below -708.
    """
    import torch

    safe = torch.where(x >= UNDERFLOW, x, 0.0)
    shifted = safe.mul(LOG2_E).add_(ROUND)
    k = shifted - ROUND
    r = safe.sub_(k * LN2_HIGH).sub_(k * LN2_LOW)
    p = torch.full_like(r, COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        p = p.mul_(r).add_(coefficient)
    # The low bits of `shifted` hold k: made an exponent, they are 2**k, without a library's pow.
    q = p.mul_(shifted.view(torch.int64).add_(1023).bitwise_left_shift_(52).view(torch.float64))
    if lost is not None:
        q = q + q * lost
    return torch.where(x.isnan(), x, torch.where(x < UNDERFLOW, 0.0, q))


def weigh(maxima: Sequence[Tensor], sums: Sequence[Tensor]) -> Weighed:
    """Merge the statistics of K states, row by row.

    Parameters
    ----------
    maxima, sums : sequences of K Tensors, float32 or float64, one shape

    Returns
    -------
    Weighed
    """
    import torch

    m, l = [part.double() for part in maxima], [part.double() for part in sums]  # noqa: E741
    live = [(li != 0) & (mi != -torch.inf) for mi, li in zip(m, l, strict=True)]
    count = torch.stack(live).sum(0)
    maximum = torch.full_like(m[0], -torch.inf)
    for mi, alive in zip(m, live, strict=True):
        maximum = torch.where(alive, torch.maximum(maximum, mi), maximum)  # torch.maximum keeps NaN
    e = [torch.where(alive, exp_nonpositive(*difference(mi, maximum)), 0.0) for mi, alive in zip(m, live, strict=True)]
    a = [torch.where(alive, li * ei, 0.0) for li, ei, alive in zip(l, e, live, strict=True)]
    total = torch.zeros_like(maximum)
    scaled = torch.zeros_like(maximum)
    for ai in a:
        total = total + ai
        scaled = scaled + ai * 2.0**-64
    huge = total.isinf()  # finite sums may add up beyond float64; scaled, their shares are still right
    alone = count == 1
    weights = []
    for ai, alive in zip(a, live, strict=True):
        share = torch.where(huge, ai * 2.0**-64 / scaled, ai / total)
        weights.append(torch.where(alive, torch.where(alone, 1.0, share), 0.0).to(sums[0].dtype))
    for li, alive in zip(l, live, strict=True):
        total = torch.where(alone & alive, li, total)
    return Weighed(live, alone, e, weights, maximum, total)


def merge_rows(weights: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """Add up the weighted rows of K states, left to right.

    Parameters
    ----------
    weights : sequence of K Tensors, float32 or float64, shape (..., N)
    rows : sequence of K Tensors, shape (..., N, D)

    Returns
    -------
    Tensor, dtype of the weights, shape (..., N, D)

    Notes
    -----
    A side of weight 0 is not added: in place of its product stands -0.0, which adds nothing to anything, not even to
    -0.0. One temporary of the output's size, in float32, for each state after the first.
    """
    import torch

    result = None
    for weight, row in zip(weights, rows, strict=True):
        term = torch.empty(row.shape, dtype=weight.dtype, device=row.device)  # contiguous, whatever the row is
        torch.mul(row, weight.unsqueeze(-1), out=term)  # 16-bit rows are widened on the way
        term.masked_fill_((weight == 0).unsqueeze(-1), -0.0)
        result = term if result is None else result.add_(term)
    assert result is not None
    empty = torch.stack([weight == 0 for weight in weights]).all(0)
    return result.masked_fill_(empty.unsqueeze(-1), 0.0)


class TorchBackend(Backend):
    """Runs on torch tensors, wherever they are."""

    name = "torch"
    capabilities = Capabilities(array_types=("torch:Tensor",), devices=None, float64=True, differentiable=True)

    def __init__(self) -> None:
        try:
            import torch
        except ModuleNotFoundError as error:
            raise BackendUnavailableError("torch is missing: pip install 'ring-attention-update[torch]'") from error
        self._torch = torch

    def update(
        self, problem: Problem, prev: AttentionState, cur: AttentionState, out: AttentionState | None
    ) -> AttentionState:
        return self.merge(problem, (prev, cur), out)

    def merge(self, problem: Problem, states: Sequence[AttentionState], out: AttentionState | None) -> AttentionState:
        with self._torch.no_grad():
            first = states[0]
            geometry = Geometry.of(first, problem.actual_seq_qlen, problem.layout, problem.softmax_layout)
            weighed = weigh(
                [geometry.rows(state.softmax_max) for state in states],
                [geometry.rows(state.softmax_sum) for state in states],
            )
            merged = merge_rows(weighed.weights, [geometry.heads(state.attn_out) for state in states])
            attn_out = merged.view(problem.shape)
            maximum, total = (
                geometry.statistics(part.to(first.softmax_max.dtype)).expand(problem.stats_shape)
                for part in (weighed.maximum, weighed.total)
            )
            if out is None:
                contiguous = self._torch.contiguous_format
                return AttentionState(
                    attn_out.to(first.attn_out.dtype),
                    maximum.clone(memory_format=contiguous),
                    total.clone(memory_format=contiguous),
                )
            for target, part in zip(out, (attn_out, maximum, total), strict=True):
                target.copy_(part)
        return out

    def asarray(self, array: np.ndarray) -> Tensor:
        if not array.flags.writeable or any(step < 0 for step in array.strides):
            array = array.copy()  # torch knows neither
        if array.dtype.name == "bfloat16":
            return self._torch.from_numpy(array.view("u2")).view(self._torch.bfloat16)
        return self._torch.from_numpy(array)

    def to_numpy(self, array: Tensor) -> np.ndarray:
        array = array.detach().cpu()
        if array.dtype == self._torch.bfloat16:
            import ml_dtypes

            return array.view(self._torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return array.numpy()

    def synchronize(self) -> None:
        if self._torch.cuda.is_available():
            self._torch.cuda.synchronize()
