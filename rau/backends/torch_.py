"""The torch backend: ATen operations only, on any device that has float64; the same bits as the others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from rau.arithmetic import merge_rows, weigh
from rau.arrays.torch_ import TorchKind, packed_rows
from rau.backends import AttentionState, Backend, Capabilities, Problem
from rau.errors import BackendUnavailableError
from rau.install import command
from rau.layouts import LAYOUTS

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@cache
def _permutations(layout: str) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Axes of the statistics in the order of the output's rows, and back; None where that is their own order."""
    order = LAYOUTS[layout].row_order
    back = tuple(order.index(axis) for axis in range(len(order)))
    return (None, None) if order == back == tuple(range(len(order))) else (order, back)


class Geometry:
    """How the tensors of one call are seen as rows: (..., N) statistics beside (..., N, D) outputs.

    `packed` tells where each row's statistic stands, an int64 tensor of shape (T * N,); None where they are not packed.
    """

    def __init__(self, layout: str, heads: int, packed: Tensor | None) -> None:
        self._folded = LAYOUTS[layout].attn_head is None
        self._order, self._inverse = _permutations(layout)
        self._heads = heads
        self._packed = packed

    @classmethod
    def of(cls, state: Sequence[Tensor], actual_seq_qlen: Any, layout: str, softmax_layout: str) -> Geometry:
        """Read it off a state, and off the cumulative lengths where its statistics are packed."""
        attn_out, maximum = state[0], state[1]
        heads = maximum.shape[LAYOUTS[layout].stats_head]
        if layout != "TND" or softmax_layout != "SBH":
            return cls(layout, heads, None)
        return cls(layout, heads, packed_rows(actual_seq_qlen, attn_out.shape[0], heads, attn_out.device))

    def heads(self, attn_out: Tensor) -> Tensor:
        """See an output as (..., N, D), without a copy."""
        if not self._folded:
            return attn_out
        return attn_out.unflatten(-1, (self._heads, attn_out.shape[-1] // max(self._heads, 1)))

    def rows(self, stats: Tensor) -> Tensor:
        """See lane 0 of statistics in the order of the output's rows; packed ones are gathered."""
        lane = stats[..., 0]
        if self._packed is not None:
            return lane.reshape(-1).index_select(0, self._packed).view(lane.shape)
        return lane if self._order is None else lane.permute(self._order)

    def statistics(self, rows: Tensor) -> Tensor:
        """Put rows back into the axes and the order of the statistics; one lane, on a last axis of length 1."""
        if self._packed is not None:
            flat = rows.new_zeros(rows.numel())
            return flat.index_copy_(0, self._packed, rows.reshape(-1)).view(*rows.shape, 1)
        return (rows if self._inverse is None else rows.permute(self._inverse)).unsqueeze(-1)


class TorchBackend(Backend):
    """Runs on torch tensors, wherever they are."""

    name = "torch"
    capabilities = Capabilities(
        array_types=("torch:Tensor",), devices=None, float64=True, differentiable=True, without_statistics=True
    )

    def __init__(self) -> None:
        try:
            import torch
        except ModuleNotFoundError as error:
            raise BackendUnavailableError(f"torch is missing: {command('torch')}") from error
        self._torch, self._kind = torch, TorchKind()

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
            attn_out = merged.contiguous().view(problem.shape)
            if not problem.statistics:
                if out is None:
                    return AttentionState(attn_out.to(first.attn_out.dtype), None, None)
                self._kind.assign(out.attn_out, attn_out)
                return out
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
                self._kind.assign(target, part)
        return out

    def asarray(self, array: np.ndarray) -> Tensor:
        return self._kind.from_numpy(array)

    def to_numpy(self, array: Tensor) -> np.ndarray:
        return self._kind.to_numpy(array)

    def synchronize(self) -> None:
        if self._torch.cuda.is_available():
            self._torch.cuda.synchronize()
