"""A base for backends whose kernel takes and returns an output and its log-sum-exp, as most kernels of the field do.

The rule here: what is converted is axes and statistics, once each way; everything else is the kernel's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from rau.arithmetic import library
from rau.arrays import kind_of
from rau.arrays.torch_ import TorchKind
from rau.backends import AttentionState, Backend, Problem
from rau.errors import RauError
from rau.layouts import LAYOUTS
from rau.lse import log_sum_exp, reordered, statistics

__all__ = ["LSEBackend"]

_AXES = {"TND": ("TN", "NT"), "BSND": ("BNS", "BSN"), "BNSD": ("BNS", "BSN")}  # of outputs, and of the log-sum-exps beside them


class LSEBackend(Backend):
    """A kernel on (out, lse) as a backend: derive, declare ``statistics="lse"``, and write one method.

    `merge_lse` merges two states, `merge_lse_states` any number at once; one of them is enough. Calls in every layout reach
    the kernel in its own axes, without a copy where views will do. Arrays are NumPy's, or torch's where "torch:Tensor" is
    one of the `array_types`; :meth:`asarray` puts them on the first of the `devices`.

    Attributes
    ----------
    layout : {"TND", "BSND", "BNSD"}
        Axes of the outputs that the kernel takes and returns; where it is "TND", T counts the tokens of all sequences.
    lse_layout : {"TN", "NT", "BNS", "BSN"}
        Axes of the log-sum-exps, always contiguous, and of the dtype of the call's statistics. Their base is
        ``capabilities.lse_base``.

    Examples
    --------
    >>> from rau.backends import Capabilities
    >>> class Kernel(LSEBackend):
    ...     name = "kernel"
    ...     capabilities = Capabilities(array_types=("numpy:ndarray",), statistics="lse", unpromised=("two-empty", "payload"))
    ...
    ...     def merge_lse(self, prev_out, prev_lse, cur_out, cur_lse):
    ...         lse = np.logaddexp(prev_lse, cur_lse)
    ...         prev, cur = np.exp(prev_lse - lse)[..., None], np.exp(cur_lse - lse)[..., None]
    ...         return prev * prev_out + cur * cur_out, lse
    """

    layout: ClassVar[str] = "TND"
    lse_layout: ClassVar[str] = "TN"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.lse_layout not in _AXES.get(cls.layout, ()):
            known = "; ".join(f"{name} with {' or '.join(axes)}" for name, axes in _AXES.items())
            raise TypeError(f"{cls.__name__}: layout = {cls.layout!r}, lse_layout = {cls.lse_layout!r}; expected {known}.")
        if "capabilities" in vars(cls):  # its kernel makes a log-sum-exp, and its statistics are written, wanted or not
            cls.capabilities = replace(cls.capabilities, without_statistics=False)
        if "merge_lse_states" in vars(cls) and "merge" not in vars(cls):
            setattr(cls, "merge", cls._merge_at_once)  # noqa: B010 - else the base class's, one update after another

    def merge_lse(self, prev_out: Any, prev_lse: Any, cur_out: Any, cur_lse: Any) -> tuple[Any, Any]:
        """Merge two states.

        Parameters
        ----------
        prev_out, cur_out : array, axes `layout`
        prev_lse, cur_lse : array, axes `lse_layout`
            -inf for a row without keys. None of the arrays may be written to.

        Returns
        -------
        tuple of (out, lse)
            In the same axes; they are cast to the dtypes of the call. Anything else is refused with RauError.
        """
        return self.merge_lse_states((prev_out, cur_out), (prev_lse, cur_lse))

    def merge_lse_states(self, outs: Sequence[Any], lses: Sequence[Any]) -> tuple[Any, Any]:
        """Merge any number of states at once; arguments and result as those of :meth:`merge_lse`."""
        raise NotImplementedError(f"{type(self).__name__} has neither merge_lse nor merge_lse_states")

    def update(
        self, problem: Problem, prev: AttentionState, cur: AttentionState, out: AttentionState | None
    ) -> AttentionState:
        return self._merge(problem, (prev, cur), out, lambda outs, lses: self.merge_lse(outs[0], lses[0], outs[1], lses[1]))

    def _merge_at_once(
        self, problem: Problem, states: Sequence[AttentionState], out: AttentionState | None
    ) -> AttentionState:
        return self._merge(problem, states, out, self.merge_lse_states)

    def _merge(
        self, problem: Problem, states: Sequence[AttentionState], out: AttentionState | None, kernel: Any
    ) -> AttentionState:
        first, kind = states[0].attn_out, kind_of(states[0].attn_out)
        assert kind is not None  # the validator has seen to that
        if out is None:
            stats = problem.stats_shape, problem.stats_dtype
            blank = ((problem.shape, problem.dtype), stats, stats)
            out = AttentionState(*(kind.full(first, *each, 0.0) for each in blank))
        if problem.T == 0 or problem.N == 0:
            return out
        base, packed, lengths = self.capabilities.lse_base, problem.packed, problem.actual_seq_qlen
        with np.errstate(all="ignore"):
            outs, lses = [], []
            for state in states:
                rows = self._tokens_flat(_by_tokens(state.attn_out, problem))
                rows = rows if kind.contiguous(rows) or not self.capabilities.contiguous else kind.regular_copy(rows)
                if problem.D == 0:  # which no kernel expects, though there is a log-sum-exp to merge
                    some = (*rows.shape[:-1], self.capabilities.head_dim_multiple)
                    rows = kind.full(first, some, kind.dtype(rows), 0.0)
                lse = log_sum_exp(state.softmax_max[..., 0], state.softmax_sum[..., 0], base)
                lse = self._tokens_flat(_stats_by_tokens(reordered(lse, lengths, "TND") if packed else lse, problem.layout))
                outs.append(rows)
                lses.append(lse if kind.contiguous(lse) else kind.regular_copy(lse))
            merged, lse = self._returned(kernel(outs, lses), (tuple(outs[0].shape), tuple(lses[0].shape)))
            target = _by_tokens(out.attn_out, problem)
            target[...] = self._tokens_apart(merged[..., : problem.D], target.shape)
            lse = self._tokens_apart(lse, target.shape[:-1])
            lse = _stats_by_tokens(lse, problem.layout, back=True)
            lse = reordered(lse, lengths, "SBH") if packed else lse
            maximum, total = statistics(lse, None, problem.stats_dtype, base, problem.lanes)
            out.softmax_max[...] = maximum
            out.softmax_sum[...] = total
        return out

    def _returned(self, result: Any, shapes: tuple[tuple[int, ...], ...]) -> Any:
        """Refuse what is no pair of arrays in the kernel's axes: other axes of as many elements would be taken for these."""
        pair = isinstance(result, (tuple, list)) and len(result) == 2
        found = tuple(tuple(getattr(part, "shape", ())) for part in result) if pair else ()
        if found == shapes:
            return result
        told = f"arrays of shapes {found[0]} and {found[1]}" if pair else f"a {type(result).__name__}"
        raise RauError(
            f'backend "{self.name}": its kernel returned {told}; expected (out, lse) of shapes {shapes[0]} and {shapes[1]}, the '
            f'axes "{self.layout}" and "{self.lse_layout}" that the class declares.'
        )

    def _tokens_flat(self, array: Any) -> Any:
        """See (A, B, N, D) or (A, B, N) in the kernel's axes."""
        if self.layout == "TND":
            array = array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])
        return self._swapped(array, array.ndim == (4 if self.layout != "TND" else 3))

    def _tokens_apart(self, array: Any, shape: Sequence[int]) -> Any:
        """See what the kernel returned as (A, B, N, D) or (A, B, N)."""
        return self._swapped(array, len(shape) == 4).reshape(shape)

    def _swapped(self, array: Any, is_output: bool) -> Any:
        """Put heads first, or back; it is its own inverse."""
        axes = self.layout if is_output else self.lse_layout
        first = {"BNSD": (1, 2), "BNS": (1, 2), "NT": (0, 1)}.get(axes)
        return array if first is None else array.swapaxes(*first)

    def _into(self, problem: Problem, state: AttentionState, out: AttentionState) -> AttentionState:
        for target, part in zip(out, state, strict=True):
            target[...] = part
        return out

    def _neutral(self, problem: Problem, like: AttentionState) -> AttentionState:
        kind = kind_of(like.attn_out)
        assert kind is not None  # the validator has seen to that
        nothing = kind.full(like.attn_out, problem.shape, kind.dtype(like.attn_out), 0.0)  # the kernel may read it
        return super()._neutral(problem, like)._replace(attn_out=nothing)

    def asarray(self, array: np.ndarray) -> Any:
        if "torch:Tensor" not in self.capabilities.array_types:
            return array
        return TorchKind().from_numpy(array).to((self.capabilities.devices or ("cpu",))[0])

    def to_numpy(self, array: Any) -> np.ndarray:
        kind = kind_of(array)
        assert kind is not None  # it is one of this backend's
        return kind.to_numpy(array)

    def synchronize(self) -> None:
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
            sys.modules["torch"].cuda.synchronize()


def _by_tokens(attn_out: Any, problem: Problem) -> Any:
    """See an output as (A, B, N, D), A and B being axes of tokens, in the order in which they lie; never a copy."""
    axes = LAYOUTS[problem.layout]
    if axes.attn_head is None:
        attn_out = attn_out.reshape(*attn_out.shape[:-1], problem.N, problem.D)
    else:
        attn_out = library(attn_out).moveaxis(attn_out, axes.attn_head, -2)
    return attn_out[None] if axes.attn_batch is None else attn_out


def _stats_by_tokens(rows: Any, layout: str, back: bool = False) -> Any:
    """See statistics without lanes as (A, B, N), as :func:`_by_tokens` sees the output beside them, or `back`."""
    order = LAYOUTS[layout].tokens_then_heads
    ordered, move = tuple(range(len(order))), library(rows).moveaxis
    if back:
        return move(rows[0] if len(order) == 2 else rows, ordered, order)
    rows = move(rows, order, ordered)
    return rows[None] if len(order) == 2 else rows
