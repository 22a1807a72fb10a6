"""One validated call, as backends see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from rau.arrays import Kind, kind_of, type_names
from rau.layouts import BlockTerms, block_terms, contiguous_strides, dimensions


def _strides(kind: Kind, array: Any) -> tuple[int, ...]:
    """Strides in elements of an array that kernels can stream."""
    if kind.contiguous(array):
        return contiguous_strides(array.shape)
    strides = kind.strides(array)
    assert strides is not None
    # An axis of length 1 may have any stride, with which nothing is to be computed.
    return tuple(step if length > 1 else 0 for step, length in zip(strides, array.shape, strict=True))


_Value = TypeVar("_Value")


class _once(Generic[_Value]):
    """A property that is computed once.

    functools.cached_property takes a lock up to Python 3.11, one for all Problems: a child that is forked while another
    thread holds it would wait for ever.
    """

    def __init__(self, compute: Callable[[Any], _Value]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __get__(self, problem: Any, cls: Any = None) -> _Value:
        value = vars(problem)[self._compute.__name__] = self._compute(problem)
        return value


class Problem:
    """A call whose arguments have passed every check. Do not write to it: later calls like it may get the same object.

    Attributes
    ----------
    layout : {"SBH", "TND", "BSND", "BNSD"}
    softmax_layout : {"TND", "SBH"}
        Order of the statistics in layout "TND"; no effect in other layouts.
    profile : str
        The limits that were checked.
    K : int
        Number of input states; 2 for the update.
    B, S, T, N, D : int
        Batch, longest sequence, all tokens, heads, head dimension. In TND, B counts sequences; S is None
        where the lengths live on a device.
    lanes : {8, 1}
        Length of the statistics' last axis, in inputs and result alike.
    statistics : bool
        Whether the result has statistics; if not, there are None in their places, and `strides` has the first input's.
        Only for a backend that says that it can (Capabilities.without_statistics).
    dtype, cur_dtype, stats_dtype : str
        Names of the dtypes of the first state's output (the result's too), of the later states' outputs,
        and of the statistics.
    actual_seq_qlen : ndarray of int64, shape (B + 1,), or device array, or None
        Cumulative sequence lengths in TND: on the host, or the device array as given.
    kind : str
        Kind of the arrays, such as "numpy".
    array_types : tuple of str
        The arrays' type and its bases, as "module:qualname".
    device : str
    out : bool
        Whether there are arrays to write the result into.
    in_place : bool
        Whether the result is written over an input.
    half : {"front", "back"} or None
        In TND, for an update in place: the first state, which is also the result, holds sequences twice as long, and this
        half of each is merged. Lengths and shapes here are the later state's; `blocks` tells where each row is.
    runs : pair of ndarrays of int64, shape (runs,), or None
        In TND with token-major statistics, where not all tokens are merged: first tokens and lengths of the runs that are. Only
        for a backend that says that it can (Capabilities.runs); `blocks` then has a block for each.
    strides : tuple of tuples of int
        Strides in elements of each input's three arrays, then of the result's.
    blocks : ndarray of int64, shape (blocks, 2 + 9 * (K + 1)), or None
        The block table, see `rau.layouts`; None where the lengths live on a device.
    taken_by : Backend or None
        The last backend found to take it: a problem that is met again need not be judged again.
    """

    layout: str
    softmax_layout: str
    profile: str
    K: int
    B: int
    T: int
    N: int
    D: int
    lanes: int
    statistics: bool
    dtype: str
    cur_dtype: str
    stats_dtype: str
    shape: tuple[int, ...]
    stats_shape: tuple[int, ...]
    actual_seq_qlen: Any
    kind: str
    array_types: tuple[str, ...]
    device: str
    out: bool
    in_place: bool
    half: str | None
    runs: tuple[np.ndarray, np.ndarray] | None
    taken_by: Any
    _kind: Kind

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name!r} of a Problem must not be written: later calls may be described by the same object")

    @classmethod
    def of(
        cls,
        states: Sequence[Sequence[Any]],
        out: Sequence[Any] | None,
        lengths: Any,
        layout: str,
        softmax_layout: str,
        profile: str,
        *,
        in_place: bool,
        half: str | None = None,
        statistics: bool = True,
        runs: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Problem:
        """Describe a call that is known to be valid. Nothing is checked here: that is the validator's task.

        Parameters
        ----------
        states : sequence of triples of arrays
            attn_out, softmax_max, softmax_sum of each input state; with a `half`, all have the later state's shape.
        out : triple of arrays, or None
            Without `statistics`, attn_out alone is looked at.
        lengths : ndarray of int64, shape (B + 1,), or device array, or None
            Cumulative sequence lengths in TND.
        layout, softmax_layout, profile, in_place, half, statistics, runs
            As the attributes.

        Returns
        -------
        Problem
        """
        attn_out, softmax_max, _ = states[0]
        kind = kind_of(attn_out)
        assert kind is not None
        shape, stats_shape = tuple(attn_out.shape), tuple(softmax_max.shape)
        B, longest, T, N, D = dimensions(layout, shape, stats_shape)
        dtype = kind.dtype(attn_out)
        described: dict[str, Any] = {
            "layout": layout, "softmax_layout": softmax_layout, "profile": profile, "K": len(states),
            "B": B, "T": T, "N": N, "D": D, "lanes": stats_shape[-1], "shape": shape, "stats_shape": stats_shape,
            "dtype": dtype, "cur_dtype": kind.dtype(states[1][0]) if len(states) > 1 else dtype,
            "stats_dtype": kind.dtype(softmax_max), "actual_seq_qlen": lengths, "kind": kind.name,
            "array_types": type_names(type(attn_out)), "device": kind.device(attn_out), "in_place": in_place, "half": half,
            "out": out is not None,
            "statistics": statistics, "runs": runs, "taken_by": None, "_kind": kind,
        }  # fmt: skip
        if lengths is None:
            described["S"] = longest
        else:
            described["B"] = lengths.shape[0] - 1
        if out is not None and not statistics:
            out = out[0], *states[0][1:]
        triples = states if out is None else (*states, out)
        if not all([kind.contiguous(array) for state in triples for array in state]):
            strides = [_strides(kind, array) for state in triples for array in state]
            if out is None:
                stats = contiguous_strides(stats_shape)
                strides += contiguous_strides(shape), *([stats, stats] if statistics else strides[1:3])
            described["strides"] = tuple(strides)
        self = cls()
        vars(self).update(described)
        return self

    def result(self) -> tuple[Any, Any, Any]:
        """Allocate the arrays of a result in the inputs' kind, in host memory; they have no values yet."""
        output, statistics = self._allocators
        return (output(), statistics(), statistics()) if self.statistics else (output(), None, None)

    @_once
    def _allocators(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        return self._kind.allocator(self.shape, self.dtype), self._kind.allocator(self.stats_shape, self.stats_dtype)

    @property
    def packed(self) -> bool:
        """Whether the statistics are in TND's packed order."""
        return self.layout == "TND" and self.softmax_layout == "SBH"

    @_once
    def S(self) -> int | None:
        if isinstance(self.actual_seq_qlen, np.ndarray):
            return int(np.diff(self.actual_seq_qlen).max(initial=0))
        return None

    @_once
    def strides(self) -> tuple[tuple[int, ...], ...]:
        stats = contiguous_strides(self.stats_shape)
        return (contiguous_strides(self.shape), stats, stats) * (self.K + 1)

    @_once
    def block_terms(self) -> BlockTerms | None:
        """The block table in compact form; None where `blocks` is."""
        if (self.packed or self.half is not None) and not isinstance(self.actual_seq_qlen, np.ndarray):
            return None  # elsewhere it takes no lengths to find the rows
        tokens = self.T if self.layout == "TND" else self.S
        assert tokens is not None
        lengths = (self.B, tokens, self.N, self.D)
        return block_terms(self.layout, self.packed, lengths, self.actual_seq_qlen, self.strides, self.half, self.runs)

    @_once
    def blocks(self) -> np.ndarray | None:
        return None if self.block_terms is None else self.block_terms.table()

    def __repr__(self) -> str:
        lengths = ", ".join(f"{name}={getattr(self, name)}" for name in "BSTND")
        order = f", softmax_layout={self.softmax_layout!r}" if self.layout == "TND" else ""
        half = f", {self.half} halves" if self.half else ""
        runs = "" if self.runs is None else f", {len(self.runs[0])} runs of {int(self.runs[1].sum())} tokens"
        alone = "" if self.statistics else ", statistics=False"
        dtype = self.dtype if self.dtype == self.cur_dtype else f"{self.cur_dtype} into {self.dtype}"
        return (
            f"Problem(layout={self.layout!r}{order}{half}{runs}, {lengths}, lanes={self.lanes}, {dtype}, "
            f"K={self.K}{alone}, kind={self.kind!r}, device={self.device!r}, profile={self.profile!r})"
        )
