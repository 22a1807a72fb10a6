"""Real partial attention: what FlashAttention would pass to the operator, computed slowly and exactly.

Scores, softmax and output are computed in float64 and rounded once at the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rau.state import AttentionState
from rau.testing.reference.oracle import widen
from rau.testing.reference.row_weights import FORMATS
from rau.testing.reference.sequences import (
    AXES,
    AttentionCall,
    TokenSequence,
    positions_of,
    read_arrays,
    sequences_of,
)

_SCORES = 2**22  # scores computed at a time, 32 MB; much smaller products lose time to BLAS's own threads
_LANES = 8


def partial_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    layout: str = "SBH",
    softmax_layout: str = "TND",
    actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
    query_positions: Any = None,
    key_positions: Any = None,
    dtype: str = "float32",
) -> AttentionState:
    """Compute the attention of queries to some of their keys, in the form that the operator merges.

    Parameters
    ----------
    q : ndarray, float16, bfloat16, float32 or float64
        Queries: (S, B, N, D) in layout "SBH", (B, S, N, D) in "BSND", (B, N, S, D) in "BNSD", (T, N, D) in
        "TND".
    k, v : ndarray, as `q`
        Keys and values, in the same layout with any number of tokens.
    causal : bool, default False
        A query sees the keys whose position is not after its own.
    layout : {"SBH", "TND", "BSND", "BNSD"}, default "SBH"
    softmax_layout : {"TND", "SBH"}, default "TND"
        Order of the statistics in layout "TND": token-major, or packed per sequence.
    actual_seq_qlen : sequence of int, or ndarray of int64, shape (sequences + 1,)
        Layout "TND": cumulative lengths of the sequences of queries, from 0 to T.
    actual_seq_kvlen : sequence of int, or ndarray of int64, shape (sequences + 1,), optional
        Layout "TND": the same for the keys. Default: `actual_seq_qlen`.
    query_positions, key_positions : ndarray of int, shape (S,) or (T,), optional
        Position of each token within its sequence, for `causal`. Default: 0, 1, 2, ... in each sequence. With
        positions, any slice of the keys is possible, including a ring's zig-zag.
    dtype : {"float32", "float16", "bfloat16", "float64"}, default "float32"
        Dtype of the output; "bfloat16" needs ml_dtypes.

    Returns
    -------
    AttentionState
        attn_out of `dtype`, (S, B, N*D) in layout "SBH" and shaped like `q` in the others. softmax_max and
        softmax_sum, float32 (float64 if `dtype` is), with 8 equal lanes: (B, N, S, 8), in "TND" (T, N, 8).

    Raises
    ------
    ValueError
        If the arguments do not fit together.
    ImportError
        If `dtype` is "bfloat16" and ml_dtypes is not installed.

    Notes
    -----
    Scores are scaled by 1 / sqrt(D). A query that sees no key gets output 0, max -inf, sum 0. The maximum is
    rounded to the statistics' dtype first and the sum taken relative to the rounded one, so that the state is
    wrong by the rounding of its output and of its sum only.

    Examples
    --------
    >>> import numpy as np
    >>> from rau.testing import partial_attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 6, 1, 2, 4))
    >>> state = partial_attention(q, k[:3], v[:3], causal=True)
    >>> state.attn_out.shape, state.softmax_max.shape, state.softmax_sum.dtype.name
    ((6, 1, 8), (1, 2, 6, 8), 'float32')
    """
    if not isinstance(dtype, str) or dtype not in FORMATS:
        raise ValueError(f"dtype is {dtype!r}; expected the name of one of {', '.join(FORMATS)}")
    lengths = actual_seq_qlen, actual_seq_kvlen
    call = AttentionCall(causal, layout, softmax_layout, *lengths, query_positions, key_positions)
    stats = np.dtype(np.float64 if dtype == "float64" else np.float32)
    return _attend(q, k, v, call, stats, _rounder(dtype))


def exact_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    layout: str = "SBH",
    softmax_layout: str = "TND",
    actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
    query_positions: Any = None,
    key_positions: Any = None,
) -> AttentionState:
    """Compute attention with one softmax over all the keys, in float64: what merged partials should amount to.

    Parameters
    ----------
    q, k, v, causal, layout, softmax_layout, actual_seq_qlen, actual_seq_kvlen, query_positions, key_positions
        As in :func:`partial_attention`.

    Returns
    -------
    AttentionState
        As from :func:`partial_attention`, all float64.

    Examples
    --------
    >>> import numpy as np
    >>> from rau.testing import exact_attention
    >>> q, k = np.zeros((2, 3, 1, 1, 2))
    >>> exact_attention(q, k, np.arange(6.0).reshape(3, 1, 1, 2), causal=True).attn_out[:, 0]
    array([[0., 1.],
           [1., 2.],
           [2., 3.]])
    """
    lengths = actual_seq_qlen, actual_seq_kvlen
    call = AttentionCall(causal, layout, softmax_layout, *lengths, query_positions, key_positions)
    return _attend(q, k, v, call, np.dtype(np.float64), lambda out: out)


def _attend(q: Any, k: Any, v: Any, call: AttentionCall, stats_dtype: np.dtype[Any], rounded: Any) -> AttentionState:
    """Walk over the sequences and heads; each is a matrix of queries against one of keys."""
    q, k, v = read_arrays(q, k, v, call)
    sequences = sequences_of(q, k, call)
    own = [sequence.queries for sequence in sequences]
    q_places = positions_of("query_positions", call.query_positions, q.shape[2], own)
    own = [sequence.keys for sequence in sequences]
    k_places = positions_of("key_positions", call.key_positions, k.shape[2], own)
    out = np.empty(q.shape)
    maximum, total = np.empty(q.shape[:3]), np.empty(q.shape[:3])
    for sequence in sequences:
        places = (q_places[sequence.queries], k_places[sequence.keys]) if call.causal else None
        for head in range(q.shape[1]):
            rows, keys = (sequence.entry, head, sequence.queries), (sequence.entry, head, sequence.keys)
            with np.errstate(all="ignore"):  # infinities and NaN go where they go
                out[rows], maximum[rows], total[rows] = _softmax(
                    widen(q[rows]), widen(k[keys]), widen(v[keys]), places, stats_dtype
                )
    with np.errstate(all="ignore"):
        state = AttentionState(rounded(out), maximum.astype(stats_dtype), total.astype(stats_dtype))
    return _in_vendor_form(state, call, sequences)


def _softmax(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, places: tuple[np.ndarray, np.ndarray] | None, stats_dtype: np.dtype[Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Attend with one head of one sequence, (queries, D) to (keys, D), a slab of queries at a time.

    `places` are positions (queries,) and (keys,) if the attention is causal; the maximum is rounded to `stats_dtype`. Output
    (queries, D), maxima and sums (queries,) come back.
    """
    out, maximum, total = np.zeros(q.shape), np.full(len(q), -np.inf), np.zeros(len(q))
    scale = 1 / np.sqrt(q.shape[1]) if q.shape[1] else 1.0
    step = max(1, _SCORES // max(1, len(k)))
    for start in range(0, len(q), step):
        rows = slice(start, start + step)
        seen_k, seen_v, hidden = k, v, None
        if places is not None:
            now, then = places[0][rows], places[1]
            reached = then <= now.max()
            if not reached.all():  # keys after every query of the slab cost nothing
                seen_k, seen_v, then = k[reached], v[reached], then[reached]
            if then.size and then.max() > now.min():
                hidden = then > now[:, None]
        if not len(seen_k):
            continue
        scores = (q[rows] * scale) @ seen_k.T
        if hidden is not None:
            scores[hidden] = -np.inf
        top = scores.max(axis=1).astype(stats_dtype).astype(np.float64)
        scores -= np.where(top == -np.inf, 0, top)[:, None]
        np.exp(scores, out=scores)
        maximum[rows], total[rows] = top, scores.sum(axis=1)
        out[rows] = scores @ seen_v / np.where(total[rows] == 0, 1, total[rows])[:, None]
    return out, maximum, total


def _in_vendor_form(state: AttentionState, call: AttentionCall, sequences: list[TokenSequence]) -> AttentionState:
    """Bring (B, N, S, ...) arrays into the layout of the call, and give the statistics their lanes."""
    out, maximum, total = state
    if call.layout in AXES:
        out = out.transpose(np.argsort(AXES[call.layout]))
        if call.layout == "SBH":
            out = out.reshape(*out.shape[:2], out.shape[2] * out.shape[3])
    else:
        out = out[0].swapaxes(0, 1)
        tokens = total.shape[2], total.shape[1]
        if call.softmax_layout == "SBH":
            maximum, total = (_packed(part[0], sequences).reshape(tokens) for part in (maximum, total))
        else:
            maximum, total = maximum[0].T, total[0].T
    lanes = (np.repeat(part[..., None], _LANES, axis=-1) for part in (maximum, total))
    return AttentionState(np.ascontiguousarray(out), *lanes)


def _packed(stats: np.ndarray, sequences: list[TokenSequence]) -> np.ndarray:
    """Cut (N, T) statistics into the (N, S_i) of each sequence, one after another."""
    return np.concatenate([stats[:, sequence.queries].ravel() for sequence in sequences] or [stats.ravel()])


def _rounder(dtype: str) -> Any:
    """Return a function that rounds float64 once, to nearest even."""
    if hasattr(np, dtype):
        return lambda out: out.astype(dtype)
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError(
            f'dtype="{dtype}" needs ml_dtypes, which gives NumPy that type: python -m pip install ml_dtypes'
        ) from error

    def rounded(out: np.ndarray) -> np.ndarray:
        # ml_dtypes goes by way of float32. Rounding to odd there makes the second rounding right.
        single = out.astype(np.float32)
        bits = single.view(np.uint32)
        bits -= np.abs(single) > np.abs(out)
        bits |= single != out
        return single.astype(getattr(ml_dtypes, dtype))

    return rounded
