"""FlashInfer's merges: ``from flashinfer import merge_state, merge_state_in_place, merge_states``.

Log-sum-exps are to base 2.
"""

from __future__ import annotations

from typing import Any

from rau.errors import UnsupportedError
from rau.update import merge_lse

__all__ = ["merge_state", "merge_state_in_place", "merge_states"]

_HOW: dict[str, Any] = {"base": "2", "layout": "TND", "lse_layout": "TN"}


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
        As :func:`rau.merge_lse`, to which a is pairs[0] and b pairs[1].

    Examples
    --------
    >>> import numpy as np
    >>> v, s = np.ones((3, 2, 8), np.float32), np.zeros((3, 2), np.float32)
    >>> v, s = merge_state(2 * v, s, 4 * v, s)
    >>> float(v[0, 0, 0]), float(s[0, 0])
    (3.0, 1.0)
    """
    return merge_lse([(v_a, s_a), (v_b, s_b)], **_HOW)


def merge_state_in_place(v: Any, s: Any, v_other: Any, s_other: Any, mask: Any = None) -> None:
    """Merge another attention state into (v, s), which are written to.

    Parameters
    ----------
    v, v_other : array, float16, bfloat16 or float32, shape (T, N, D)
    s, s_other : array, float32, shape (T, N)
        Log-sum-exps to base 2.
    mask : None
        A mask of rows is not taken.

    Raises
    ------
    ConstraintError, UnsupportedError
        As :func:`rau.merge_lse`, to which (v, s) is pairs[0] and out; UnsupportedError also for a mask.
    """
    if mask is not None:
        raise UnsupportedError(
            "merge_state_in_place: mask is given; expected None. Merge the rows of the mask by themselves: "
            "v[mask], s[mask] = merge_state(v[mask], s[mask], v_other[mask], s_other[mask])."
        )
    merge_lse([(v, s), (v_other, s_other)], **_HOW, out=(v, s))


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
    return merge_lse([(v[:, k], s[:, k]) for k in range(v.shape[1])], **_HOW)
