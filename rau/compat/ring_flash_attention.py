"""ring-flash-attention's merge: ``from ring_flash_attn.utils import update_out_and_lse``, and its log-sum-exps."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

from rau.arithmetic import cast, library
from rau.arrays import kind_of
from rau.compat.pairs import check, check_written, starts_of
from rau.compat.words import worded
from rau.constraints.options import whole_number
from rau.constraints.rules import Violations
from rau.errors import shown
from rau.update import merge_lse

__all__ = ["flatten_varlen_lse", "unflatten_varlen_lse", "update_out_and_lse"]


_BLOCK = "block_out", "block_lse.swapaxes(-1, -2)"


@worded(("out", "lse[..., 0]"), _BLOCK)
def update_out_and_lse(out: Any, lse: Any, block_out: Any, block_lse: Any, slice_: Any = None) -> tuple[Any, Any]:
    """Merge the attention over one more block of keys into the running output and log-sum-exp.

    Parameters
    ----------
    out : array, float32, shape (B, S, N, D) or (T, N, D), or None
        The running output; None for the first block.
    lse : array, float32, shape (B, S, N, 1) or (T, N, 1), or None
        The running log-sum-exp, natural.
    block_out : array, float16, bfloat16 or float32, shape (B, S, N, D) or (T, N, D)
    block_lse : array, float32, shape (B, N, S) or (N, T)
    slice_ : index, optional
        Which rows of the running ones the block covers, as ``out[slice_]``. They are written to; not for the first block.

    Returns
    -------
    out, lse : array, float32
        New ones, or with `slice_` those given.

    Raises
    ------
    ConstraintError, UnsupportedError
        As :func:`rau.merge_lse`; ShapeError also for a slice of what is not there. Neither array is written to then.

    Examples
    --------
    >>> import numpy as np
    >>> block = np.ones((1, 4, 2, 8), np.float16), np.zeros((1, 2, 4), np.float32)
    >>> out, lse = update_out_and_lse(None, None, *block)
    >>> out, lse = update_out_and_lse(out, lse, 3 * block[0][:, 2:], block[1][..., 2:], slice_=(slice(None), slice(2, None)))
    >>> out[0, :, 0, 0].tolist(), lse.shape
    ([1.0, 1.0, 2.0, 2.0], (1, 4, 2, 1))
    """
    outs, rows = "(B, S, N, D) or (T, N, D)", "(B, S, N, 1) or (T, N, 1)"
    check("update_out_and_lse", {"block_out": (block_out, outs), "block_lse": (block_lse, "(B, N, S) or (N, T)")})
    if out is not None:
        check("update_out_and_lse", {"out": (out, outs), "lse": (lse, rows)})
    if slice_ is not None:
        report = Violations("update_out_and_lse")
        if out is None:
            report.add("first-update", "slice_ is given, and out is None; expected a first block of all rows.")
            raise report.error()
        check_written("update_out_and_lse", out=out, lse=lse)
        try:
            running = out[slice_], lse[slice_]
        except (IndexError, TypeError, ValueError) as error:
            report.add("shape-match", f"slice_ is {shown(slice_)}, and out, of shape {tuple(out.shape)}, has no such rows: {error}")
            raise report.error() from error
        out[slice_], lse[slice_] = update_out_and_lse(*running, block_out, block_lse)
        return out, lse
    block = block_out, block_lse.swapaxes(-1, -2)
    return _first(*block) if out is None else _merged((out, lse[..., 0]), block)


@worded(_BLOCK, call="update_out_and_lse")
def _first(out: Any, lse: Any) -> tuple[Any, Any]:
    return _merged((cast(out, library(out).float32), lse))  # what runs is float32


def _merged(*pairs: tuple[Any, Any]) -> tuple[Any, Any]:
    layout, lse_layout = ("TND", "TN") if pairs[0][0].ndim == 3 else ("BSND", "BSN")
    out, lse = merge_lse(pairs, layout, base="e", lse_layout=lse_layout)
    return out, lse[..., None]


def flatten_varlen_lse(lse: Any, cu_seqlens: Any) -> Any:
    """Join the log-sum-exps of sequences that are padded to the longest.

    Parameters
    ----------
    lse : array, shape (sequences, N, longest)
    cu_seqlens : array of int, shape (sequences + 1,)
        Cumulative sequence lengths.

    Returns
    -------
    array, shape (N, T)

    Raises
    ------
    ConstraintError

    Examples
    --------
    >>> import numpy as np
    >>> flatten_varlen_lse(np.array([[[1, 2, 3]], [[4, 0, 0]]]), np.array([0, 3, 4]))
    array([[1, 2, 3, 4]])
    """
    check("flatten_varlen_lse", {"lse": (lse, "(S, N, L)"), "cu_seqlens": (cu_seqlens, "(C)")})
    lengths = np.diff(starts_of("flatten_varlen_lse", cu_seqlens, lse=(lse, False))).tolist()
    return library(lse).concatenate([lse[i, :, :length] for i, length in enumerate(lengths)] or [lse.reshape(-1, 0)], 1)


def unflatten_varlen_lse(lse: Any, cu_seqlens: Any, max_seqlen: int) -> Any:
    """Pad the log-sum-exps of sequences to the longest, with -inf.

    Parameters
    ----------
    lse : array, float32, shape (T, N, 1)
    cu_seqlens : array of int, shape (sequences + 1,)
        Cumulative sequence lengths.
    max_seqlen : int
        At least as many tokens as the longest has.

    Returns
    -------
    array, float32, shape (sequences, N, max_seqlen)

    Raises
    ------
    ConstraintError

    Examples
    --------
    >>> import numpy as np
    >>> unflatten_varlen_lse(np.arange(4, dtype=np.float32).reshape(4, 1, 1), np.array([0, 3, 4]), 3)
    array([[[  0.,   1.,   2.]],
           [[  3., -inf, -inf]]], dtype=float32)
    """
    check("unflatten_varlen_lse", {"lse": (lse, "(T, N, 1)"), "cu_seqlens": (cu_seqlens, "(C)")})
    bounds, kind = starts_of("unflatten_varlen_lse", cu_seqlens, lse=(lse, True)).tolist(), kind_of(lse)
    assert kind is not None  # as was checked
    longest = max(end - start for start, end in pairwise([0, *bounds]))
    width = whole_number(max_seqlen)
    if width is None or width < longest:
        report = Violations("unflatten_varlen_lse")
        report.add(
            "shape-stats", f"max_seqlen is {shown(max_seqlen)}; expected an int, at least {longest}, the longest in cu_seqlens."
        )
        raise report.error()
    padded = kind.full(lse, (len(bounds) - 1, lse.shape[-2], width), "float32", -math.inf)
    for i, (start, end) in enumerate(pairwise(bounds)):
        padded[i, :, : end - start] = lse[start:end, :, 0].swapaxes(0, 1)
    return padded
