"""One validated call, as backends see it."""

from __future__ import annotations

from typing import Any

import numpy as np

from rau.layouts import BlockTerms, block_terms, contiguous_strides


class Problem:
    """A call whose arguments have passed every check. Immutable by convention.

    Attributes
    ----------
    layout : {"SBH", "TND", "BSND", "BNSD"}
    softmax_layout : {"TND", "SBH"}
        Order of the statistics in layout "TND"; without effect elsewhere.
    profile : str
        The limits that were checked.
    K : int
        Number of input states; 2 for the update.
    B, S, T, N, D : int
        Batch, longest sequence, all tokens, heads, head dimension. In TND, B counts sequences; S is None
        where the lengths live on a device.
    lanes : {8, 1}
        Length of the statistics' last axis.
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
    in_place : bool
        The result is written over an input.
    half : {"front", "back"} or None
        In TND, of an update in place: the first state, which is the result too, holds sequences twice as long, and this
        half of each is meant. Lengths and shapes here are the later state's; where each row is, `blocks` tells.
    strides : tuple of tuples of int
        Strides in elements of each input's three arrays, then of the result's.
    blocks : ndarray of int64, shape (blocks, 2 + 9 * (K + 1)), or None
        The block table, see :mod:`rau.layouts`; None where the lengths live on a device.
    taken_by : Backend or None
        The last one found to take it: a problem that is met again need not be judged again.
    """

    __slots__ = (
        "B", "D", "K", "N", "S", "T", "_blocks", "_strides", "_terms", "actual_seq_qlen", "array_types", "cur_dtype",
        "device", "dtype", "half", "in_place", "kind", "lanes", "layout", "profile", "shape", "softmax_layout",
        "stats_dtype", "stats_shape", "taken_by",
    )  # fmt: skip

    def __init__(
        self,
        *,
        layout: str,
        softmax_layout: str,
        profile: str,
        K: int,
        B: int,
        S: int | None,
        T: int,
        N: int,
        D: int,
        lanes: int,
        dtype: str,
        cur_dtype: str,
        stats_dtype: str,
        shape: tuple[int, ...],
        stats_shape: tuple[int, ...],
        actual_seq_qlen: Any,
        kind: str,
        array_types: tuple[str, ...],
        device: str,
        in_place: bool,
        strides: tuple[tuple[int, ...], ...] | None,
        half: str | None = None,
    ) -> None:
        self.layout, self.softmax_layout, self.profile = layout, softmax_layout, profile
        self.K, self.B, self.S, self.T, self.N, self.D, self.lanes = K, B, S, T, N, D, lanes
        self.dtype, self.cur_dtype, self.stats_dtype = dtype, cur_dtype, stats_dtype
        self.shape, self.stats_shape = shape, stats_shape
        self.actual_seq_qlen = actual_seq_qlen
        self.kind, self.array_types, self.device = kind, array_types, device
        self.in_place, self.half = in_place, half
        self._strides = strides
        self._terms: BlockTerms | None = None
        self._blocks: np.ndarray | None = None
        self.taken_by: Any = None

    @property
    def packed(self) -> bool:
        """Whether the statistics are in TND's packed order."""
        return self.layout == "TND" and self.softmax_layout == "SBH"

    @property
    def strides(self) -> tuple[tuple[int, ...], ...]:
        if self._strides is None:  # every array is contiguous
            stats = contiguous_strides(self.stats_shape)
            self._strides = (contiguous_strides(self.shape), stats, stats) * (self.K + 1)
        return self._strides

    @property
    def block_terms(self) -> BlockTerms | None:
        """The block table in short; None where that is."""
        anywhere = not self.packed and self.half is None  # it takes no lengths to find the rows
        if self._terms is None and (isinstance(self.actual_seq_qlen, np.ndarray) or anywhere):
            tokens = self.T if self.layout == "TND" else self.S
            assert tokens is not None
            lengths = (self.B, tokens, self.N, self.D)
            self._terms = block_terms(self.layout, self.packed, lengths, self.actual_seq_qlen, self.strides, self.half)
        return self._terms

    @property
    def blocks(self) -> np.ndarray | None:
        if self._blocks is None and self.block_terms is not None:
            self._blocks = self.block_terms.table()
        return self._blocks

    def __repr__(self) -> str:
        lengths = ", ".join(f"{name}={getattr(self, name)}" for name in "BSTND")
        order = f", softmax_layout={self.softmax_layout!r}" if self.layout == "TND" else ""
        half = f", {self.half} halves" if self.half else ""
        dtype = self.dtype if self.dtype == self.cur_dtype else f"{self.cur_dtype} into {self.dtype}"
        return (
            f"Problem(layout={self.layout!r}{order}{half}, {lengths}, lanes={self.lanes}, {dtype}, "
            f"K={self.K}, kind={self.kind!r}, device={self.device!r}, profile={self.profile!r})"
        )
