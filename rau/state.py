"""The attention state, and its conversions from and to log-sum-exp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np

from rau.arithmetic import library
from rau.arrays import looks_like_array, summary, type_names
from rau.arrays.jax_ import NAME as JAX
from rau.arrays.jax_ import with_float64
from rau.arrays.numpy_ import ITEMSIZE
from rau.constraints.lengths import bind_lengths
from rau.constraints.lse_arguments import (
    asks_base,
    check_alike,
    check_array,
    check_base,
    check_float64,
    check_heads,
    check_lanes,
    check_layouts,
    check_lengths_here,
    check_padded,
    check_rows,
    check_shapes,
    seems_swapped,
)
from rau.constraints.options import check_softmax_layout
from rau.constraints.rules import Violations
from rau.layouts import LAYOUTS, PADDED
from rau.lse import arranged, joined, log_sum_exp, reordered, statistics


def _computing(array: Any) -> AbstractContextManager[Any]:
    """Compute in float64 and without a word: NumPy would speak of what the contract allows, JAX would have float32."""
    if isinstance(array, np.ndarray):
        return np.errstate(all="ignore")
    return with_float64() if type_names(type(array))[0] == JAX else nullcontext()


class AttentionState(NamedTuple):
    """The result of attention over a part of the keys: everything needed to merge it with another part.

    Attributes
    ----------
    attn_out : array, float16, bfloat16, float32 or float64
        Normalised attention output: (S, B, H) in layout "SBH", (T, N, D) in "TND", (B, S, N, D) in "BSND",
        (B, N, S, D) in "BNSD".
    softmax_max : array, float32 (float64 with a float64 output)
        Maximum m of each row of scores: (T, N, 8) in "TND", (B, N, S, 8) elsewhere; the 8 lanes are equal.
        Portable calls also take 1 lane: merging two states of bfloat16 and D = 128 then moves 792 bytes a row, not 960.
    softmax_sum : array, same shape and dtype as `softmax_max`
        Sum l of exp(score - m) over the row. A row without keys has l = 0 or m = -inf.

    Notes
    -----
    The log-sum-exp of a row is m + log(l), so (m, l) and (lse, 1) are the same state.

    It is a tuple: ``AttentionState(*(part.cpu() for part in state))`` is the same one elsewhere, and ``state._asdict()`` what
    ``numpy.savez`` and ``torch.save`` keep best; torch.load reads that back with ``weights_only=True``.

    Examples
    --------
    >>> import numpy as np
    >>> state = AttentionState.from_lse(np.ones((2, 1, 4), np.float32), np.zeros((1, 1, 2), np.float32), base="e")
    >>> attn_out, softmax_max, softmax_sum = state
    >>> softmax_max.shape
    (1, 1, 2, 1)
    """

    attn_out: Any
    softmax_max: Any
    softmax_sum: Any

    def __repr__(self) -> str:
        width = max(map(len, self._fields))
        lines = [f"  {name:{width}}  {summary(part)}" for name, part in zip(self._fields, self, strict=True)]
        return "\n".join([type(self).__name__, *lines])

    @classmethod
    @asks_base
    def from_lse(
        cls,
        attn_out: Any,
        lse: Any,
        *,
        base: str,
        layout: str = "SBH",
        lse_layout: str | None = None,
        actual_seq_qlen: Any = None,
        inf_is_empty: bool = False,
        heads: int | None = None,
        lanes: int = 1,
    ) -> AttentionState:
        """Make a state from what most attention kernels return: an output and its log-sum-exp.

        Parameters
        ----------
        attn_out : ndarray or torch.Tensor, float16, bfloat16, float32 or float64
            In `layout`; it is taken as it is, not copied.
        lse : ndarray or torch.Tensor, float32 or float64 (float64 with a float64 output)
            Log-sum-exp of each row, in `lse_layout`; on the device of `attn_out`. 16 bits are refused: weights would be off
            by up to abs(lse) * 2**-9 (bfloat16) or 2**-12 (float16). If you have nothing else, cast it.
        base : {"e", "2"}
            Base of the logarithm. There is no default: FlashAttention, PyTorch and vLLM return natural
            logarithms, FlashInfer logarithms to base 2, and mixing them up silently gives wrong numbers.
        layout : {"SBH", "TND", "BSND", "BNSD"}, default "SBH"
            Layout of `attn_out`.
        lse_layout : {"BNS", "BSN", "TN", "NT"}, optional except in layout "TND"
            Axes of `lse`. Layout "TND" has no default: "TN" for (T, N) (FlashInfer), or "NT" for (N, T) (vLLM,
            FlashAttention's varlen calls). The other layouts: "BNS" for (B, N, S), the default at every size, S = N included
            (FlashAttention, torch's SDPA and flex attention), or "BSN" for (B, S, N). In layout "TND" these two stand for one
            padded to the longest sequence, (sequences, N, longest) (FlashAttention's varlen calls of early 2024 and before,
            torch's on ROCm) or (sequences, longest, N). The padding is not read.
        actual_seq_qlen : array of int64 or int32, shape (sequences + 1,), or list of int, optional
            Cumulative sequence lengths from 0 to T; required for a padded `lse`, and not looked at otherwise. On a device, or
            while torch traces the call, they are not read, and therefore not checked.
        inf_is_empty : bool, default False
            Read +inf as -inf, a row without keys: FlashAttention 2 writes +inf for such a row (and for a row whose sum is
            NaN, which is then lost).
        heads : int, optional
            Number N of query heads; checked where given. In layout "SBH" nothing else tells the number: N is read off `lse`,
            so that statistics of the key heads of grouped-query attention would be taken for those of fewer query heads.
        lanes : {1, 8}, default 1
            Lanes of the statistics: 8 for whoever goes on to a call in a vendor's profile, such as
            :func:`ring_attention_update` by default. A merge writes as many as the first state has.

        Returns
        -------
        AttentionState
            Its statistics are float32, or float64 with a float64 output; 8 lanes have stride 0. For base "e" and an `lse` of
            that dtype softmax_max is a view of `lse` (of a copy if that is padded, or with `inf_is_empty`), with
            softmax_sum = 1. Do not write to them, as a merge with ``out=`` this state would: NumPy refuses it, torch lets it
            overwrite `lse` with a maximum. :func:`rau.merge_lse` merges into a pair (out, lse).

        Raises
        ------
        ConstraintError
            If an argument does not fit; its subclass tells in which way.

        Notes
        -----
        A shape that does not fit `lse_layout` is refused, and the error names the layout that would fit. Where T = N, or
        S = N, both fit: nothing can then tell whether the one given, or the default, is right.

        lse = -inf becomes the empty row. For base "2", m = float32(lse * ln 2) and l = float32(exp(lse * ln 2 - m)),
        so that l keeps what the rounding of m loses: :meth:`lse` gives back a float32 lse exactly where its magnitude
        is from 2 to 2**30, within 2**-23 below that, and within a unit in the last place above; a float64 one within
        2**-51 times its magnitude. For base "e" it always comes back exactly. NumPy arrays and torch tensors give the
        same bits.

        A float64 lse with a float32 or 16-bit output is split in the same way: m = float32(lse), l = float32(exp(lse - m)).
        Up to a magnitude of 2**30, m + log(l) is within 2**-24 of it (in base 2, 2**-52 * abs(lse) more); above, within half a
        unit in the last place of float32. Just rounded to float32 it would be off by up to abs(lse) * 2**-24.

        These figures for base 2, and for a float64 lse, are measured, not proven: proofs/measured.py found nothing beyond
        them in 300,000 cases of each (the round trips: in 4 million).

        On torch tensors a gradient flows back to both arguments. Kernels whose log-sum-exp has no gradient lose that
        part: docs/interop.md tells which.

        Examples
        --------
        >>> import numpy as np
        >>> out, lse = np.ones((3, 2, 4), np.float32), np.full((3, 2), 1.5, np.float32)
        >>> how = {"base": "2", "layout": "TND", "lse_layout": "TN"}
        >>> np.array_equal(AttentionState.from_lse(out, lse, **how).lse(**how), lse)
        True
        """
        report = Violations("AttentionState.from_lse")
        base = check_base(report, base)
        layout, axes = check_layouts(report, layout, lse_layout, padded=True)
        lanes = check_lanes(report, lanes)
        names = (("attn_out", "lse"),)
        (state,) = states_of([(attn_out, lse)], names, report, base, layout, axes, inf_is_empty, heads, lanes, actual_seq_qlen)
        return state if cls is AttentionState else cls(*state)

    @classmethod
    @asks_base
    def from_max_sum(
        cls,
        attn_out: Any,
        softmax_max: Any,
        softmax_sum: Any,
        *,
        base: str,
        layout: str = "SBH",
        stats_layout: str | None = None,
        heads: int | None = None,
        lanes: int = 1,
    ) -> AttentionState:
        """Make a state from a kernel's own maximum and sum: to base 2, without lanes, or in other axes.

        Parameters
        ----------
        attn_out : ndarray or torch.Tensor, float16, bfloat16, float32 or float64
            In `layout`, and divided by the sum, as kernels do it at their end; it is taken as it is, not copied.
        softmax_max : ndarray or torch.Tensor, float32 or float64 (float64 with a float64 output)
            Maximum m of each row of scores, in `stats_layout`; with 1 or 8 lanes on a last axis more, of which lane 0 is read,
            or without. On the device of `attn_out`.
        softmax_sum : ndarray or torch.Tensor, dtype of `softmax_max`, with or without lanes
            Sum of exp(score - m) over the row; to base 2, of 2**(score - m), which is the same number.
        base : {"e", "2"}
            What the scores were when the maximum was taken: "2" where they had been multiplied by log2(e), as in kernels that
            compute by exp2. There is no default.
        layout, heads, lanes
            As in :meth:`from_lse`.
        stats_layout : {"BNS", "BSN", "TN", "NT"}, optional except in layout "TND"
            Axes of the statistics, as `lse_layout` in :meth:`from_lse`.

        Returns
        -------
        AttentionState
            Its statistics are float32, or float64 with a float64 output, and not to be written to. For base "e" they are views
            of those given, if these have that dtype.

        Raises
        ------
        ConstraintError
            If an argument does not fit; its subclass tells in which way.

        Notes
        -----
        For base "2", m = float32(softmax_max * ln 2) and l = float32(softmax_sum * exp(softmax_max * ln 2 - m)): what the
        rounding of m loses, l keeps. Up to a magnitude of 2**30 of the maximum, and for sums from 2**-30 to 2**30, m + log(l) is
        within 2**-24 + 2**-52 * abs(m) of that of what was given; just rounded to float32 it would be off by up to
        abs(m) * 2**-24. That is measured, not proven: proofs/measured.py found at most 1.00 of it in 3 million cases. A row of
        sum 0 or maximum -inf stays empty. NumPy arrays and torch tensors give the same bits; on tensors a gradient flows back
        to all three.

        Examples
        --------
        >>> import numpy as np
        >>> out, ones = np.ones((3, 2, 4), np.float32), np.ones((3, 2), np.float32)
        >>> state = AttentionState.from_max_sum(out, 2 * ones, ones, base="2", layout="TND", stats_layout="TN")
        >>> float(state.lse(base="2", layout="TND", lse_layout="TN")[0, 0])
        2.0
        """
        report = Violations("AttentionState.from_max_sum")
        base = check_base(report, base)
        layout, axes = check_layouts(report, layout, stats_layout, "stats_layout")
        number = check_heads(report, heads)
        lanes = check_lanes(report, lanes)
        out = check_array(report, "attn_out", attn_out, "dtype-attn", tuple(ITEMSIZE))
        wide = out is not None and out.dtype == "float64"
        rows: list[Any] = []
        dtype = ""
        for name, array in (("softmax_max", softmax_max), ("softmax_sum", softmax_sum)):
            its = check_rows(report, name, array, "attn_out", out, base)
            if out is None or its is None:
                continue
            if axes:
                array = array[..., 0] if array.ndim == len(axes) + 1 and array.shape[-1] in (1, 8) else array
                check_shapes(report, attn_out, array, layout, axes, number, name=name, option="stats_layout")
            if rows and its.dtype != dtype:
                report.add("dtype-stats", f"softmax_sum has dtype {its.dtype}; expected that of softmax_max.")
            dtype = its.dtype
            rows.append(array)
        report.raise_if_broken()
        with _computing(softmax_max):
            maximum, total = (arranged(array, axes) for array in rows)
            return cls(attn_out, *statistics(maximum, total, "float64" if wide else "float32", base, lanes))

    @asks_base
    def lse(
        self,
        *,
        base: str,
        layout: str = "SBH",
        softmax_layout: str = "TND",
        actual_seq_qlen: Any = None,
        lse_layout: str | None = None,
    ) -> Any:
        """Return the log-sum-exp of each row.

        Parameters
        ----------
        base : {"e", "2"}
            Base of the logarithm.
        layout : {"SBH", "TND", "BSND", "BNSD"}, default "SBH"
            Layout of this state.
        softmax_layout : {"TND", "SBH"}, default "TND"
            Order of the statistics in layout "TND"; packed ones ("SBH") need `actual_seq_qlen`.
        actual_seq_qlen : array of int64, shape (sequences + 1,), or list of int, optional
            Cumulative sequence lengths.
        lse_layout : {"BNS", "BSN", "TN", "NT"}, optional except in layout "TND"
            Axes of the result, as in :meth:`from_lse`.

        Returns
        -------
        ndarray or torch.Tensor, dtype of the statistics
            On their device; -inf for a row without keys.

        Raises
        ------
        ConstraintError
            If an argument does not fit.

        Notes
        -----
        m + log(l) is computed in float64 and rounded once. A float32 result is off by at most half a unit in the last
        place plus 2**-52 * abs(m), which matters where m and log(l) cancel; a float64 one by 2**-51 * abs(lse) plus
        2**-52 * abs(m). That is measured, not proven, since the logarithm is the library's own (and NumPy and torch may
        differ in the last bit): the largest errors seen in 4 million rows each, by proofs/measured.py on an AMD EPYC (Zen 3)
        with NumPy 2.4 and torch 2.13, are 1.00 and 0.72 of these bounds.

        Examples
        --------
        >>> import numpy as np
        >>> stats = np.ones((1, 1, 2, 8), np.float32)
        >>> AttentionState(np.ones((2, 1, 4), np.float32), stats, stats).lse(base="e")
        array([[[1., 1.]]], dtype=float32)
        """
        report = Violations("AttentionState.lse")
        base = check_base(report, base)
        layout, axes = check_layouts(report, layout, lse_layout)
        softmax_layout = check_softmax_layout(report, "softmax-layout", "softmax_layout", softmax_layout)
        arrays = [
            check_array(report, name, stats, "dtype-stats", ("float32", "float64"))
            for name, stats in (("softmax_max", self.softmax_max), ("softmax_sum", self.softmax_sum))
        ]
        report.raise_if_broken()
        assert arrays[0] is not None and arrays[1] is not None
        check_alike(report, "softmax_sum", arrays[1], "softmax_max", arrays[0])
        check_float64(report, "softmax_max", self.softmax_max, arrays[0])
        form = LAYOUTS[layout].stats.format(lanes="8 or 1")
        shape, its = tuple(self.softmax_max.shape), tuple(self.softmax_sum.shape)
        for name, each in (("softmax_max", shape), ("softmax_sum", its)):
            if len(each) != form.count(",") + 1 or each[-1] < 1:
                report.add("rank", f'{name} has shape {each}; layout "{layout}" expects {form}.')
        if its != shape:
            report.add("shape-match", f"softmax_sum has shape {its}; expected that of softmax_max, {shape}.")
        lengths = None
        if layout == "TND" and softmax_layout == "SBH":
            tokens = shape[0] if shape else None
            lengths = bind_lengths(report, actual_seq_qlen, tokens, packed=True, vendor=False)
            check_lengths_here(report, lengths, "softmax_max", self.softmax_max)
        report.raise_if_broken()
        maximum, total = self.softmax_max[..., 0], self.softmax_sum[..., 0]
        if lengths is not None:
            maximum, total = reordered(maximum, lengths, "TND"), reordered(total, lengths, "TND")
        with _computing(maximum):
            result = log_sum_exp(maximum, total, base)
        return arranged(result, axes)


def states_of(
    pairs: Sequence[Sequence[Any]],
    names: Sequence[tuple[str, str]],
    report: Violations,
    base: str,
    layout: str,
    axes: str,
    inf_is_empty: bool,
    heads: int | None,
    lanes: int,
    actual_seq_qlen: Any = None,
) -> list[AttentionState]:
    """Make states of pairs (attn_out, lse), as :meth:`AttentionState.from_lse` says, or raise what `report` then holds.

    `names` are the caller's, of the arrays of each pair. `base`, `layout`, `axes` and `lanes` are what the
    checks of them returned.
    """
    number = check_heads(report, heads)
    padded = layout == "TND" and axes in PADDED
    lengths, dtypes = None, []
    for (attn_out, lse), (out_name, name) in zip(pairs, names, strict=True):
        out = check_array(report, out_name, attn_out, "dtype-attn", tuple(ITEMSIZE))
        wide = out is not None and out.dtype == "float64"
        dtypes.append("float64" if wide else "float32")
        its = check_rows(report, name, lse, out_name, out, base)
        if out is not None and its is None and axes and looks_like_array(lse) and seems_swapped(attn_out, lse, layout, axes):
            # Of the output, which has another dtype, in the place of the log-sum-exp there is nothing else to say.
            shapes = f"{out_name} has shape {tuple(attn_out.shape)} and {name} {tuple(lse.shape)}"
            dtype = str(lse.dtype).removeprefix("torch.")
            report.broken[-1] = ("rank", f"{shapes}; the pair seems to be swapped, since {name} has dtype {dtype}.")
        if out is not None and its is not None and padded:
            lengths = check_padded(report, attn_out, lse, axes, number, actual_seq_qlen, out_name, name)
        elif out is not None and its is not None and axes:
            check_shapes(report, attn_out, lse, layout, axes, number, out_name, name)
    report.raise_if_broken()
    states = []
    for (attn_out, lse), dtype in zip(pairs, dtypes, strict=True):
        with _computing(lse):
            lse = joined(lse, axes, lengths, attn_out.shape[0]) if padded else arranged(lse, axes)
            if inf_is_empty:
                lse = library(lse).where(lse == math.inf, -math.inf, lse)
            states.append(AttentionState(attn_out, *statistics(lse, None, dtype, base, lanes)))
    return states


def reorder_softmax(stats: Any, actual_seq_qlen: Any, *, to: str) -> Any:
    """Copy TND statistics from one of their two orders to the other.

    Parameters
    ----------
    stats : ndarray or torch.Tensor, shape (T, N, lanes) or (T, N), any dtype
        softmax_max or softmax_sum (or a log-sum-exp) in the order that `to` does not name.
    actual_seq_qlen : array of int64 or int32, shape (sequences + 1,), or list of int
        Cumulative sequence lengths, from 0 to T. On a device they are not read, and therefore not checked.
    to : {"TND", "SBH"}
        "TND": from packed per sequence to token-major. "SBH": from token-major to packed.

    Returns
    -------
    ndarray or torch.Tensor, shape, dtype and device of `stats`

    Raises
    ------
    ConstraintError
        If an argument does not fit.

    Notes
    -----
    In packed order, sequence i of length S_i owns S_i * N rows, starting at N * start_i and laid out as (N, S_i).
    Calls with ``to="TND"`` and ``to="SBH"`` undo each other. On torch tensors a gradient flows back.

    Examples
    --------
    >>> import numpy as np
    >>> packed = np.array([[0, 1], [10, 11], [5, 6]])  # sequences of 2 and 1 tokens, 2 heads
    >>> reorder_softmax(packed, [0, 2, 3], to="TND")
    array([[ 0, 10],
           [ 1, 11],
           [ 5,  6]])
    """
    report = Violations("reorder_softmax")
    check_softmax_layout(report, "to", "to", to)
    tokens = None
    if check_array(report, "stats", stats, "dtype-stats"):
        shape = tuple(stats.shape)
        if len(shape) in (2, 3):
            tokens = shape[0]
        else:
            report.add("rank", f"stats has shape {shape}; expected (T, N, lanes) or (T, N).")
    lengths = bind_lengths(report, actual_seq_qlen, tokens, packed=True, vendor=False)
    check_lengths_here(report, lengths, "stats", stats)
    report.raise_if_broken()
    return reordered(stats, lengths, to)
