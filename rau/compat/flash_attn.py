"""FlashAttention's combine: ``flash_attn_combine`` of ``flash_attn_interface`` (3) and ``flash_attn.cute`` (4)."""

from __future__ import annotations

from typing import Any

from rau.compat.pairs import check, merged, zipped
from rau.compat.words import worded

__all__ = ["flash_attn_combine"]


@worded(("out_partial[{k}]", "lse_partial[{k}]"), out_0="out", dtype="out_dtype")
def flash_attn_combine(
    out_partial: Any, lse_partial: Any, out: Any = None, out_dtype: Any = None, *, return_lse: bool = True
) -> tuple[Any, Any]:
    """Combine the attention over K splits of the keys, in one pass and with one rounding.

    Parameters
    ----------
    out_partial : array, float16, bfloat16 or float32, shape (K, B, S, N, D) or (K, T, N, D)
    lse_partial : array, float32, shape (K, B, S, N) or (K, T, N)
        Natural logarithms.
    out : array, float16, bfloat16 or float32, shape (B, S, N, D) or (T, N, D), optional
        To write into; new by default.
    out_dtype : dtype, optional
        Of a new output: that of `out_partial` by default.
    return_lse : bool, default True

    Returns
    -------
    out : array
    lse : array, float32, shape (B, S, N) or (T, N)
        -inf for a row without keys; None without `return_lse`.

    Raises
    ------
    ConstraintError, UnsupportedError
        As :func:`rau.merge_lse`, and for another dtype as :func:`rau.merge_states`.

    Examples
    --------
    >>> import numpy as np
    >>> out, lse = flash_attn_combine(np.ones((4, 2, 3, 2, 8), np.float32), np.zeros((4, 2, 3, 2), np.float32))
    >>> out.shape, lse.shape
    ((2, 3, 2, 8), (2, 3, 2))
    """
    pairs = zipped(
        "flash_attn_combine", ("out_partial", out_partial, "(T, N, D) or (B, S, N, D)"),
        ("lse_partial", lse_partial, "(T, N) or (B, S, N)"),
    )  # fmt: skip
    if out is not None:
        check("flash_attn_combine", {"out": (out, "(T, N, D) or (B, S, N, D)")})
    layout, lse_layout = ("TND", "TN") if pairs and pairs[0][0].ndim == 3 else ("BSND", "BSN")
    how = {"base": "e", "layout": layout, "lse_layout": lse_layout}
    dtype = out_dtype if out is None else out.dtype
    return merged(pairs, how, out, with_lse=return_lse, dtype=dtype)
