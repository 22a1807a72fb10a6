"""SGLang's merges: ``sglang.srt.layers.attention.merge_state.merge_state`` and ``sgl_kernel.merge_state_v2``.

``sgl_kernel.merge_state``, without the v2, is FlashInfer's and works in base 2: :func:`rau.compat.flashinfer.merge_state`.
"""

from __future__ import annotations

from typing import Any

from rau.compat.pairs import merged
from rau.compat.words import worded

__all__ = ["merge_state", "merge_state_v2"]

_HOW = {"base": "e", "layout": "TND", "lse_layout": "TN", "inf_is_empty": True}


@worded(("prefix_output", "prefix_lse"), ("suffix_output", "suffix_lse"), out="output", out_0="output", out_1="output_lse")
def merge_state(
    prefix_output: Any,
    prefix_lse: Any,
    suffix_output: Any,
    suffix_lse: Any,
    output: Any = None,
    output_lse: Any = None,
) -> tuple[Any, Any]:
    """Merge attention over a prefix with attention over a suffix.

    Parameters
    ----------
    prefix_output, suffix_output : array, float16, bfloat16 or float32, shape (T, N, D)
    prefix_lse, suffix_lse : array, float32, shape (T, N)
        Natural logarithms; +inf is read as -inf, a row without keys.
    output : array, shape and dtype of `prefix_output`, optional
        To write into; new by default.
    output_lse : array, float32, shape (T, N), optional
        To write into; new by default.

    Returns
    -------
    output, output_lse : array
        Those given, where they were.

    Raises
    ------
    ConstraintError, UnsupportedError
        As :func:`rau.merge_lse`.

    Examples
    --------
    >>> import numpy as np
    >>> out, lse = np.ones((3, 2, 8), np.float32), np.zeros((3, 2), np.float32)
    >>> output, output_lse = merge_state(2 * out, lse, 4 * out, lse)
    >>> float(output[0, 0, 0]), bool(output_lse[0, 0] == np.log(np.float32(2)))
    (3.0, True)
    """
    return merged([(prefix_output, prefix_lse), (suffix_output, suffix_lse)], _HOW, output, output_lse)


@worded(("v_a", "s_a"), ("v_b", "s_b"), out="v_merged", out_0="v_merged", out_1="s_merged")
def merge_state_v2(
    v_a: Any, s_a: Any, v_b: Any, s_b: Any, v_merged: Any = None, s_merged: Any = None
) -> tuple[Any, Any]:
    """Do what :func:`merge_state` does, by the names of sgl_kernel.

    Parameters
    ----------
    v_a, v_b : array, float16, bfloat16 or float32, shape (T, N, D)
    s_a, s_b : array, float32, shape (T, N)
    v_merged : array, shape and dtype of `v_a`, optional
    s_merged : array, float32, shape (T, N), optional

    Returns
    -------
    v_merged, s_merged : array

    Raises
    ------
    ConstraintError, UnsupportedError
        As :func:`rau.merge_lse`.
    """
    return merged([(v_a, s_a), (v_b, s_b)], _HOW, v_merged, s_merged)
