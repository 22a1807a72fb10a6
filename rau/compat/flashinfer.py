"""FlashInfer's merges: ``from flashinfer import merge_state, merge_state_in_place, merge_states``.

And ``from flashinfer.triton.cascade import variable_length_merge_states``. Log-sum-exps are to base 2.
"""

from __future__ import annotations

from typing import Any

from rau.compat.pairs import check
from rau.compat.words import worded
from rau.state import AttentionState
from rau.update import merge_lse
from rau.update import merge_states as _merge_states

__all__ = ["merge_state", "merge_state_in_place", "merge_states", "variable_length_merge_states"]

_HOW: dict[str, Any] = {"base": "2", "layout": "TND", "lse_layout": "TN"}


@worded(("v_a", "s_a"), ("v_b", "s_b"))
def merge_state(v_a: Any, s_a: Any, v_b: Any, s_b: Any) -> tuple[Any, Any]:
    """Merge two attention states.

    Parameters
    ----------
    v_a, v_b : array, float16, bfloat16 or float32, shape (T, N, D)
    s_a, s_b : array, float32, shape (T, N)
        Log-sum-exps to base 2.

    Returns
    -------
    v : array, shape and dtype of `v_a`
    s : array, float32, shape (T, N)
        To base 2; -inf for a row without keys.

    Raises
    ------
    ConstraintError, UnsupportedError
        As :func:`rau.merge_lse`.

    Examples
    --------
    >>> import numpy as np
    >>> v, s = np.ones((3, 2, 8), np.float32), np.zeros((3, 2), np.float32)
    >>> v, s = merge_state(2 * v, s, 4 * v, s)
    >>> float(v[0, 0, 0]), float(s[0, 0])
    (3.0, 1.0)
    """
    return merge_lse([(v_a, s_a), (v_b, s_b)], **_HOW)


@worded(("v", "s"), ("v_other", "s_other"), out="v", out_0="v", out_1="s", tokens="mask")
def merge_state_in_place(v: Any, s: Any, v_other: Any, s_other: Any, mask: Any = None) -> None:
    """Merge another attention state into (v, s), which are written to.

    Parameters
    ----------
    v, v_other : array, float16, bfloat16 or float32, shape (T, N, D)
    s, s_other : array, float32, shape (T, N)
        Log-sum-exps to base 2.
    mask : array of bool, or of numbers of which 0 is False, shape (T,), optional
        The rows to merge: of the others nothing is read or written. On a device it is waited for.

    Raises
    ------
    ConstraintError, UnsupportedError
        As :func:`rau.merge_lse`.

    Examples
    --------
    >>> import numpy as np
    >>> v, s = np.ones((3, 2, 8), np.float32), np.zeros((3, 2), np.float32)
    >>> merge_state_in_place(v, s, 3 * v, s.copy(), np.array([True, False, True]))
    >>> v[:, 0, 0].tolist(), s[:, 0].tolist()
    ([2.0, 1.0, 2.0], [1.0, 0.0, 1.0])
    """
    tokens = None
    if mask is not None:
        check("merge_state_in_place", {"v": (v, "(T, N, D)"), "mask": (mask, "(T)")})
        tokens = mask != 0  # of integers, which would be the tokens' numbers
    merge_lse([(v, s), (v_other, s_other)], **_HOW, tokens=tokens, out=(v, s))


@worded(("v[:, {k}]", "s[:, {k}]"))
def merge_states(v: Any, s: Any) -> tuple[Any, Any]:
    """Merge K attention states, in one pass and with one rounding.

    Parameters
    ----------
    v : array, float16, bfloat16 or float32, shape (T, K, N, D)
    s : array, float32, shape (T, K, N)
        Log-sum-exps to base 2.

    Returns
    -------
    v : array, shape (T, N, D)
    s : array, float32, shape (T, N)

    Raises
    ------
    ConstraintError, UnsupportedError
        As :func:`rau.merge_lse`.

    Examples
    --------
    >>> import numpy as np
    >>> v, s = merge_states(np.ones((3, 4, 2, 8), np.float32), np.zeros((3, 4, 2), np.float32))
    >>> v.shape, float(s[0, 0])
    ((3, 2, 8), 2.0)
    """
    check("merge_states", {"v": (v, "(T, K, N, D)"), "s": (s, "(T, K, N)")})
    return merge_lse([(v[:, k], s[:, k]) for k in range(v.shape[1])], **_HOW)


@worded(attn_out="v", lse="s", **{"states.attn_out": "v"})
def variable_length_merge_states(v: Any, s: Any, indptr: Any) -> tuple[Any, Any]:
    """Merge as many attention states in each row as it has, with one rounding.

    Parameters
    ----------
    v : array, float16, bfloat16 or float32, shape (M, N, D)
        All rows' states, one after another.
    s : array, float32, shape (M, N)
        Log-sum-exps to base 2.
    indptr : array of int, shape (T + 1,)
        The states of row t are those from ``indptr[t]`` to ``indptr[t + 1]``. Read on the host.

    Returns
    -------
    v : array, shape (T, N, D)
        0 in a row without states or keys.
    s : array, float32, shape (T, N)
        -inf there, as FlashInfer's CUDA kernels have it.

    Raises
    ------
    ConstraintError, UnsupportedError
        As :meth:`rau.AttentionState.from_lse` and :func:`rau.merge_states`.

    Examples
    --------
    >>> import numpy as np
    >>> v, s = np.arange(3, dtype=np.float32).reshape(3, 1, 1), np.zeros((3, 1), np.float32)
    >>> v, s = variable_length_merge_states(v, s, np.array([0, 0, 2, 3]))
    >>> v.ravel().tolist(), s.ravel().tolist()
    ([0.0, 0.5, 2.0], [-inf, 1.0, 0.0])
    """
    merged = _merge_states(AttentionState.from_lse(v, s, **_HOW), layout="TND", indptr=indptr)
    return merged.attn_out, merged.lse(**_HOW)
