"""The attention state, and its conversions from and to log-sum-exp."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from rau.arrays import kind_of, not_an_array
from rau.layouts import LAYOUTS, SUM, block_table, row_index
from rau.lengths import bind_lengths
from rau.rules import Report

_LN2 = math.log(2.0)


class AttentionState(NamedTuple):
    """The result of attention over a part of the keys: what one needs to merge it with another part.

    Attributes
    ----------
    attn_out : array, float16, bfloat16, float32 or float64
        Normalised attention output: (S, B, H) in layout "SBH", (T, N, D) in "TND", (B, S, N, D) in "BSND",
        (B, N, S, D) in "BNSD".
    softmax_max : array, float32 (float64 with a float64 output)
        Maximum m of each row of scores: (T, N, 8) in "TND", (B, N, S, 8) elsewhere; the 8 lanes are equal.
        Portable calls take 1 lane as well.
    softmax_sum : array, same shape and dtype as `softmax_max`
        Sum l of exp(score - m) over the row. A row without keys has l = 0 or m = -inf.

    Notes
    -----
    The log-sum-exp of a row is m + log(l), so (m, l) and (lse, 1) are the same state.

    Examples
    --------
    >>> import numpy as np
    >>> state = AttentionState.from_lse(np.ones((2, 1, 4), np.float32), np.zeros((1, 1, 2), np.float32), base="e")
    >>> attn_out, softmax_max, softmax_sum = state
    >>> softmax_max.shape, softmax_max.strides[-1]
    ((1, 1, 2, 8), 0)
    """

    attn_out: Any
    softmax_max: Any
    softmax_sum: Any

    @classmethod
    def from_lse(
        cls, attn_out: Any, lse: Any, *, base: str, layout: str = "SBH", lse_layout: str | None = None
    ) -> AttentionState:
        """Make a state of what most attention kernels return: an output and its log-sum-exp.

        Parameters
        ----------
        attn_out : ndarray, float16, bfloat16, float32 or float64
            In `layout`; it is taken as it is, not copied.
        lse : ndarray, float32 (float64 with a float64 output)
            Log-sum-exp of each row: (B, N, S), or in layout "TND" as `lse_layout` says.
        base : {"e", "2"}
            Base of the logarithm, without default: FlashAttention, PyTorch and vLLM hand out natural
            logarithms, FlashInfer logarithms to base 2, and mixing them up gives wrong numbers silently.
        layout : {"SBH", "TND", "BSND", "BNSD"}, default "SBH"
            Layout of `attn_out`.
        lse_layout : {"TN", "NT"}, optional
            In layout "TND" only: (T, N), the default, or (N, T).

        Returns
        -------
        AttentionState
            With 8-lane statistics that are read-only views of stride 0. For base "e" they are views of
            `lse` itself, with softmax_sum = 1.

        Raises
        ------
        ConstraintError
            If an argument does not fit; its subclass tells which kind.

        Notes
        -----
        lse = -inf becomes the empty row. For base "2", m = float32(lse * ln 2) and l = float32(exp(lse * ln 2 - m)),
        so that what the rounding of m loses, l keeps: :meth:`lse` gives back a float32 lse exactly where its magnitude
        is from 2 to 2**30, within 2**-23 below that, and within a unit in the last place above. For base "e" it always
        comes back exactly.

        Examples
        --------
        >>> import numpy as np
        >>> out, lse = np.ones((3, 2, 4), np.float32), np.full((3, 2), 1.5, np.float32)
        >>> state = AttentionState.from_lse(out, lse, base="2", layout="TND")
        >>> np.array_equal(state.lse(base="2", layout="TND"), lse)
        True
        """
        report = Report("AttentionState.from_lse")
        _check_base(report, base)
        _check_lse_inputs(report, attn_out, lse, layout, lse_layout)
        report.raise_if_broken()
        if lse_layout == "NT":
            lse = lse.T
        if base == "e":
            maximum, total = lse, np.ones((), lse.dtype)
        else:
            with np.errstate(all="ignore"):
                natural = lse.astype(np.float64) * _LN2
                maximum = natural.astype(lse.dtype)
                lost = natural - maximum  # NaN where infinite; too much for l beyond 2**30, where a step is 128
                total = np.where(np.abs(lost) <= 64, np.exp(lost), 1).astype(lse.dtype)
        return cls(attn_out, *(np.broadcast_to(part[..., None], (*lse.shape, 8)) for part in (maximum, total)))

    def lse(
        self, *, base: str, layout: str = "SBH", softmax_layout: str = "TND", actual_seq_qlen: Any = None
    ) -> np.ndarray:
        """Return the log-sum-exp of each row.

        Parameters
        ----------
        base : {"e", "2"}
            Base of the logarithm.
        layout : {"SBH", "TND", "BSND", "BNSD"}, default "SBH"
            Layout of this state.
        softmax_layout : {"TND", "SBH"}, default "TND"
            Order of the statistics in layout "TND"; packed ones ("SBH") need `actual_seq_qlen`.
        actual_seq_qlen : ndarray of int64, shape (sequences + 1,), or list of int, optional
            Cumulative sequence lengths.

        Returns
        -------
        ndarray, dtype of the statistics
            (T, N) in layout "TND", (B, N, S) elsewhere; -inf for a row without keys.

        Raises
        ------
        ConstraintError
            If an argument does not fit.

        Notes
        -----
        m + log(l) is computed in float64 and rounded once.

        Examples
        --------
        >>> import numpy as np
        >>> stats = np.ones((1, 1, 2, 8), np.float32)
        >>> AttentionState(np.ones((2, 1, 4), np.float32), stats, stats).lse(base="e")
        array([[[1., 1.]]], dtype=float32)
        """
        report = Report("AttentionState.lse")
        _check_base(report, base)
        report.choice("layout", "layout", layout, LAYOUTS)
        report.choice("softmax-layout", "softmax_layout", softmax_layout, ("TND", "SBH"))
        for name, stats in (("softmax_max", self.softmax_max), ("softmax_sum", self.softmax_sum)):
            _check_numpy(report, name, stats, "dtype-stats", ("float32", "float64"))
        report.raise_if_broken()
        form = LAYOUTS[layout].stats.format(lanes="8 or 1")
        for name, stats in (("softmax_max", self.softmax_max), ("softmax_sum", self.softmax_sum)):
            if stats.ndim != form.count(",") + 1 or stats.shape[-1] < 1:
                report.add("rank", f'{name} has shape {stats.shape}; layout "{layout}" expects {form}.')
        if self.softmax_sum.shape != self.softmax_max.shape:
            report.add("shape-match", f"softmax_sum has shape {self.softmax_sum.shape}; expected that of softmax_max, "
                       f"{self.softmax_max.shape}.")  # fmt: skip
        lengths = None
        if layout == "TND" and softmax_layout == "SBH":
            tokens = self.softmax_max.shape[0] if self.softmax_max.ndim else None
            lengths, _, _ = bind_lengths(report, actual_seq_qlen, tokens, packed=True, vendor=False)
        report.raise_if_broken()
        maximum, total = self.softmax_max[..., 0], self.softmax_sum[..., 0]
        if lengths is not None:
            maximum, total = _reorder(maximum, lengths, "TND"), _reorder(total, lengths, "TND")
        empty = (total == 0) | (maximum == -np.inf)
        with np.errstate(all="ignore"):
            result = maximum.astype(np.float64) + np.log(total.astype(np.float64))
            if base == "2":
                result /= _LN2
            return np.where(empty, -np.inf, result).astype(self.softmax_max.dtype)


def reorder_softmax(stats: Any, actual_seq_qlen: Any, *, to: str) -> np.ndarray:
    """Copy TND statistics from one of their two orders to the other.

    Parameters
    ----------
    stats : ndarray, shape (T, N, lanes) or (T, N), any dtype
        softmax_max or softmax_sum (or a log-sum-exp) in the order that `to` does not name.
    actual_seq_qlen : ndarray of int64 or int32, shape (sequences + 1,), or list of int
        Cumulative sequence lengths, from 0 to T.
    to : {"TND", "SBH"}
        "TND": from packed per sequence to token-major. "SBH": from token-major to packed.

    Returns
    -------
    ndarray, shape and dtype of `stats`

    Raises
    ------
    ConstraintError
        If an argument does not fit.

    Notes
    -----
    Packed, sequence i of length S_i owns S_i * N rows from N * start_i on, laid out as (N, S_i). The two
    calls with ``to="TND"`` and ``to="SBH"`` undo each other.

    Examples
    --------
    >>> import numpy as np
    >>> packed = np.array([[0, 1], [10, 11], [5, 6]])  # sequences of 2 and 1 tokens, 2 heads
    >>> reorder_softmax(packed, [0, 2, 3], to="TND")
    array([[ 0, 10],
           [ 1, 11],
           [ 5,  6]])
    """
    report = Report("reorder_softmax")
    report.choice("to", "to", to, ("TND", "SBH"))
    tokens = None
    if _check_numpy(report, "stats", stats, "dtype-stats"):
        if stats.ndim in (2, 3):
            tokens = stats.shape[0]
        else:
            report.add("rank", f"stats has shape {stats.shape}; expected (T, N, lanes) or (T, N).")
    lengths, _, _ = bind_lengths(report, actual_seq_qlen, tokens, packed=True, vendor=False)
    report.raise_if_broken()
    return _reorder(np.asarray(stats), lengths, to)  # a subclass might index in its own way


def _reorder(stats: np.ndarray, lengths: np.ndarray, to: str) -> np.ndarray:
    """Do what :func:`reorder_softmax` says, to arguments that have been checked."""
    tokens, heads = stats.shape[:2]
    row = (heads, 1, 1)  # strides of a (T, N, 1) array
    table = block_table("TND", True, (1, tokens, heads, 1), lengths, (row,) * 3)
    packed_rows = row_index(table, 0, SUM)  # for rows in token-major order: packed blocks are whole sequences
    flat = stats.reshape(tokens * heads, *stats.shape[2:])
    if to == "TND":
        return flat[packed_rows].reshape(stats.shape)
    result = np.empty_like(flat)
    result[packed_rows] = flat
    return result.reshape(stats.shape)


def _check_base(report: Report, base: object) -> None:
    note = " Natural logarithms: FlashAttention, PyTorch, vLLM. Base 2: FlashInfer."
    report.choice("base", "base", base, ("e", "2"), note)


def _check_numpy(report: Report, name: str, array: Any, rule: str, dtypes: tuple[str, ...] = ()) -> bool:
    kind = kind_of(array)
    if kind is None:
        report.add("array", not_an_array(name, array))
    elif kind.name != "numpy":
        report.add("array", f"{name} is a {kind.name} array; expected a NumPy one.")
    elif dtypes and kind.dtype(array) not in dtypes:
        expected = f"one of {', '.join(dtypes)}" if len(dtypes) > 1 else dtypes[0]
        report.add(rule, f"{name} has dtype {kind.dtype(array)}; expected {expected}.")
    else:
        return True
    return False


def _check_lse_inputs(report: Report, attn_out: Any, lse: Any, layout: str, lse_layout: str | None) -> None:
    known = report.choice("layout", "layout", layout, LAYOUTS)
    if lse_layout is not None:
        if known and layout != "TND":
            report.add("lse-layout", f'lse_layout = {lse_layout!r}; layout "{layout}" has one only: lse is (B, N, S).')
        else:
            report.choice("lse-layout", "lse_layout", lse_layout, ("TN", "NT"))
    arrays = _check_numpy(report, "attn_out", attn_out, "dtype-attn", ("float16", "bfloat16", "float32", "float64"))
    wide = arrays and attn_out.dtype == np.float64
    arrays &= _check_numpy(report, "lse", lse, "dtype-stats", ("float64",) if wide else ("float32",))
    if not (known and arrays):
        return
    shape, axes = attn_out.shape, LAYOUTS[layout]
    if len(shape) != axes.attn.count(",") + 1:
        report.add("rank", f'attn_out has shape {shape}; layout "{layout}" expects {axes.attn}.')
        return
    if axes.attn_batch is not None:
        form = "(B, N, S)"
    else:
        form = "(N, T)" if lse_layout == "NT" else "(T, N)"
    if lse.ndim != form.count(",") + 1:
        report.add("rank", f'lse has shape {lse.shape}; layout "{layout}" expects {form}.')
        return
    tokens = shape[axes.attn_token]
    if axes.attn_head is not None:
        heads = shape[axes.attn_head]
    else:
        heads = lse.shape[1]
        if shape[-1] % heads if heads else shape[-1]:
            report.add("heads-divide-hidden", f"attn_out has H = {shape[-1]} and lse N = {heads} heads (shape "
                       f"{lse.shape}); expected H = N * D.")  # fmt: skip
    expected: tuple[int, ...]
    if axes.attn_batch is not None:
        expected = (shape[axes.attn_batch], heads, tokens)
    else:
        expected = (heads, tokens) if lse_layout == "NT" else (tokens, heads)
    if lse.shape != expected:
        other = {"(T, N)": "NT", "(N, T)": "TN"}.get(form, "") if lse.shape == expected[::-1] else ""
        hint = f' Pass lse_layout="{other}" for ({other[0]}, {other[1]}).' if other else ""
        report.add("shape-stats", f'lse has shape {lse.shape}; for attn_out of shape {shape} layout "{layout}" '
                   f"expects {form} = {expected}.{hint}")  # fmt: skip
