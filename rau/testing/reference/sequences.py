"""How the arguments of attention are read: which tokens make a sequence, and where in it they stand."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from rau.testing.reference.row_weights import FORMATS

_FORMS = {"SBH": "(S, B, N, D)", "BSND": "(B, S, N, D)", "BNSD": "(B, N, S, D)", "TND": "(T, N, D)"}
AXES = {"SBH": (1, 2, 0, 3), "BSND": (0, 2, 1, 3), "BNSD": (0, 1, 2, 3)}  # of batch, head, token, dimension


class AttentionCall(NamedTuple):
    """The arguments that say how to read the arrays."""

    causal: bool
    layout: str
    softmax_layout: str
    actual_seq_qlen: Any
    actual_seq_kvlen: Any
    query_positions: Any
    key_positions: Any


class TokenSequence(NamedTuple):
    """One sequence: its batch entry (0 in TND), its tokens among the queries and those among the keys."""

    entry: int
    queries: slice
    keys: slice


def read_arrays(q: Any, k: Any, v: Any, call: AttentionCall) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Check the arrays and view them as (B, N, S, D); ValueError if they do not fit the layout or each other."""
    options = (("layout", call.layout, _FORMS), ("softmax_layout", call.softmax_layout, ("TND", "SBH")))
    for option, given, known in options:
        if given not in known:
            raise ValueError(f"{option} is {given!r}; expected one of {', '.join(known)}")
    q, k, v = (_checked(name, array, call.layout) for name, array in (("q", q), ("k", k), ("v", v)))
    token = 0 if call.layout == "TND" else AXES[call.layout][2]
    expected = (*q.shape[:token], k.shape[token], *q.shape[token + 1 :])
    if k.shape != expected:
        raise ValueError(
            f"k has shape {k.shape}, q {q.shape}; expected them to differ in axis {token}, the tokens, only"
        )
    if v.shape != k.shape:
        raise ValueError(f"v has shape {v.shape}; expected that of k, {k.shape}")
    if call.layout == "TND":
        q, k, v = (array.swapaxes(0, 1)[None] for array in (q, k, v))
    else:
        q, k, v = (array.transpose(AXES[call.layout]) for array in (q, k, v))
    return q, k, v


def sequences_of(q: np.ndarray, k: np.ndarray, call: AttentionCall) -> list[TokenSequence]:
    """List the sequences of (B, N, S, D) arrays: the batch entries, in TND those of the cumulative lengths, if they fit."""
    if call.layout != "TND":
        return [TokenSequence(b, slice(0, q.shape[2]), slice(0, k.shape[2])) for b in range(q.shape[0])]
    own = _cumulative("actual_seq_qlen", call.actual_seq_qlen, q.shape[2], "q")
    other = own
    if call.actual_seq_kvlen is not None or k.shape[2] != q.shape[2]:
        other = _cumulative("actual_seq_kvlen", call.actual_seq_kvlen, k.shape[2], "k")
    if len(own) != len(other):
        raise ValueError(
            f"actual_seq_kvlen has {len(other) - 1} sequences, actual_seq_qlen {len(own) - 1}; "
            "expected as many of keys as of queries"
        )
    spans = zip(pairwise(own), pairwise(other), strict=True)
    return [TokenSequence(0, slice(*queries), slice(*keys)) for queries, keys in spans]


def positions_of(name: str, given: Any, tokens: int, sequences: list[slice]) -> np.ndarray:
    """Return the position of each token within its sequence: what is given, or its number."""
    if given is None:
        places = np.zeros(tokens, np.int64)
        for own in sequences:
            places[own] = np.arange(own.stop - own.start)
        return places
    places = np.asarray(given)
    if places.shape != (tokens,) or places.dtype.kind not in "iu":
        raise ValueError(
            f"{name} has shape {places.shape} and dtype {places.dtype.name}; "
            f"expected integers of shape ({tokens},), the position of each token within its sequence"
        )
    return places


def _cumulative(name: str, given: Any, tokens: int, array: str) -> list[int]:
    rule = f"cumulative lengths in tokens, non-decreasing from 0 to {tokens}, the number of tokens in {array}"
    if given is None:
        raise ValueError(f'layout "TND" needs {name}: {rule}')
    ends = np.asarray(given)
    if ends.ndim != 1 or ends.dtype.kind not in "iu" or not ends.size:
        kind = f"shape {ends.shape} and dtype {ends.dtype.name}"
        raise ValueError(f"{name} has {kind}; expected 1-D integers, {rule}")
    ends = ends.astype(np.int64)
    if ends[0] != 0 or ends[-1] != tokens or (np.diff(ends) < 0).any():
        are_lengths = ends.sum() == tokens != ends[-1]
        hint = "; these look like lengths, pass [0, *np.cumsum(lengths)]" if are_lengths else ""
        raise ValueError(f"{name} is {ends.tolist()}; expected {rule}{hint}")
    return [int(end) for end in ends]


def _checked(name: str, array: Any, layout: str) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype.name not in FORMATS:
        raise ValueError(f"{name} has dtype {array.dtype.name}; expected one of {', '.join(FORMATS)}")
    form = _FORMS[layout]
    if array.ndim != form.count(",") + 1:
        hint = "; split the hidden axis into heads, whose number is not passed" if layout == "SBH" else ""
        raise ValueError(f'{name} has shape {array.shape}; expected {form} in layout "{layout}"{hint}')
    return array
