"""xformers' merge, and mslk's: ``from xformers.ops.fmha import merge_attentions``."""

from __future__ import annotations

import math
from typing import Any

from rau.compat.pairs import merged, zipped
from rau.compat.words import worded

__all__ = ["merge_attentions"]

_HOW = {"base": "e", "layout": "BSND", "lse_layout": "BNS"}


@worded(("attn_split[{k}]", "lse_split[{k}]"), dtype="output_dtype")
def merge_attentions(
    attn_split: Any, lse_split: Any, write_lse: bool = True, output_dtype: Any = None
) -> tuple[Any, Any]:
    """Merge the attention over K chunks of the keys, in one pass and with one rounding.

    Parameters
    ----------
    attn_split : array of shape (K, B, M, H, D) or (K, B, M, G, H, D), or list of K arrays, float16, bfloat16 or float32
    lse_split : array of shape (K, B, H, M) or (K, B, G, H, M), or list of K arrays, float32
        Natural logarithms.
    write_lse : bool, default True
        False for the output alone.
    output_dtype : dtype, optional
        Of the output, as in :func:`rau.merge_states`: that of `attn_split` by default, else rounded from float32.

    Returns
    -------
    attn_out : array, shape (B, M, H, D) or (B, M, G, H, D), of `output_dtype`
    lse_out : array, float32, shape (B, H, M) or (B, G, H, M)
        None without `write_lse`.

    Raises
    ------
    ConstraintError, UnsupportedError
        As :func:`rau.merge_lse`, and with another `output_dtype` as :func:`rau.merge_states`.

    Notes
    -----
    A gradient flows to outputs and log-sum-exps, through both results.

    Examples
    --------
    >>> import numpy as np
    >>> out, lse = merge_attentions(np.ones((4, 2, 3, 5, 2, 8), np.float32), np.zeros((4, 2, 5, 2, 3), np.float32))
    >>> out.shape, lse.shape
    ((2, 3, 5, 2, 8), (2, 5, 2, 3))
    """
    pairs = zipped(
        "merge_attentions", ("attn_split", attn_split, "(B, M, H, D) or (B, M, G, H, D)"),
        ("lse_split", lse_split, "(B, H, M) or (B, G, H, M)"),
    )  # fmt: skip
    if not pairs:
        return merged(pairs, _HOW)  # which says that there is none
    shape, rows = pairs[0][0].shape, pairs[0][1].shape
    heads = math.prod(shape[2:-1])  # of all groups
    flat, flat_rows = (*shape[:2], heads, shape[-1]), (rows[0], heads, rows[-1])
    pairs = [(out.reshape(flat), lse.reshape(flat_rows)) for out, lse in pairs]
    attn_out, lse_out = merged(pairs, _HOW, with_lse=write_lse, dtype=output_dtype)
    return attn_out.reshape(shape), lse_out if lse_out is None else lse_out.reshape(rows)
