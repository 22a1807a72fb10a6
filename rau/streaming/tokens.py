"""Parts of the sequences of a state, slices and halves: seen where they lie, without a copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from rau.arrays import kind_of
from rau.constraints.hints import described
from rau.constraints.rows import (
    REORDER,
    Rows,
    bind_slice,
    bind_tokens,
    rows_of_sequences,
)
from rau.constraints.rules import Violations
from rau.errors import shown
from rau.layouts import LAYOUTS
from rau.state import AttentionState

HALVES = ("front", "back")


def part_of(call: str, tokens: Any, layout: str, packed: bool, length: int, lengths: np.ndarray | None) -> Rows | str:
    """Check which tokens are meant, of S (in layout "TND", T): rows along the token axis, or in TND the name of a half."""
    report = Violations(call)
    rows: Rows | None = None
    if isinstance(tokens, str) and tokens in HALVES:
        pass
    elif packed:
        got = shown(tokens) if isinstance(tokens, (str, slice)) else described(tokens)
        report.add("tokens", f'tokens is {got}; packed statistics expect "front" or "back", the halves of every sequence. '
                   f"{REORDER}")  # fmt: skip
    elif layout == "TND" and not isinstance(tokens, str):
        rows = bind_tokens(report, tokens, length)
    elif isinstance(tokens, slice):
        rows = bind_slice(report, tokens, length)
    else:
        got = shown(tokens) if isinstance(tokens, str) else described(tokens)
        more = ", or in layout \"TND\" the numbers of tokens or a mask" if layout == "TND" else ""
        report.add("tokens", f'tokens is {got}; expected a slice, "front" or "back", the halves of every sequence{more}.')
    report.raise_if_broken()
    if rows is not None:
        return rows
    odd = np.flatnonzero(np.diff(lengths) % 2) if lengths is not None else [0] * (length % 2)
    if len(odd):
        which, size = "every sequence", length
        if lengths is not None:
            begin, end = (int(place) for place in lengths[odd[0] : odd[0] + 2])
            which, size = f"sequence {odd[0]} (tokens {begin} to {end})", end - begin
        more = f", and {len(odd) - 1} more are odd" if len(odd) > 1 else ""
        report.add("tokens-odd", f'tokens = "{tokens}", and {which} has {size} tokens{more}; expected even lengths. '
                   "Pad the sequences, or choose the tokens by a slice (not where statistics are packed).")  # fmt: skip
        raise report.error()
    if layout == "TND":
        return tokens
    middle = length // 2
    return slice(0, middle) if tokens == "front" else slice(middle, length)


def part(state: Sequence[Any], layout: str, tokens: Rows) -> AttentionState:
    """Take some tokens of a state: views for a slice."""
    axes, kind = LAYOUTS[layout], kind_of(state[0])
    assert kind is not None  # the validator has seen to that
    places = axes.attn_token, axes.stats_token, axes.stats_token
    return AttentionState(*(kind.take(array, tokens, axis) for array, axis in zip(state, places, strict=True)))


def padded_rows(slots: np.ndarray, real: np.ndarray, half: str | None) -> tuple[Rows, Rows]:
    """Find the real tokens of padded sequences, in the running state and in a partial one.

    Where that one has a `half`, its slots are half as long: the tokens of each sequence fill the front first.
    """
    starts, lengths = slots[:-1], np.diff(real)
    if half is None:
        rows = rows_of_sequences(starts, lengths)
        return rows, rows
    halves = np.diff(slots) // 2
    here = np.minimum(lengths, halves) if half == "front" else np.maximum(lengths - halves, 0)
    return rows_of_sequences(starts + (0 if half == "front" else halves), here), rows_of_sequences(starts // 2, here)


def halves(
    running: Sequence[Any], partial: Sequence[Any], lengths: np.ndarray, half: str, packed: bool, layout: str
) -> Iterator[tuple[AttentionState, AttentionState]]:
    """See the halves of TND sequences as calls of a layout with a batch axis: one for each run of equal lengths.

    In such a run both orders of the statistics are regular, so that no call needs to know of sequences. `running` has T
    tokens and is contiguous, `partial` T / 2; what is yielded are views, but of `partial` where SBH cannot fold heads
    that are not side by side.
    """
    each = np.diff(lengths)
    starts = np.flatnonzero(np.diff(each, prepend=-1))
    for begin, end in pairwise([*starts.tolist(), len(each)]):
        tokens, count, first = int(each[begin]), end - begin, int(lengths[begin])
        if tokens:
            middle = tokens // 2
            own = slice(0, middle) if half == "front" else slice(middle, tokens)
            whole = _batch(running, first, count, tokens, packed)
            cur = _batch(partial, first // 2, count, middle, packed)
            yield _laid_out(part(whole, "BSND", own), layout), _laid_out(cur, layout)


def _batch(state: Sequence[Any], first: int, count: int, tokens: int, packed: bool) -> AttentionState:
    """See `count` sequences of one length as layout BSND; `first` is the first one's first token."""
    attn_out, *stats = (array[first : first + count * tokens] for array in state)
    heads, last = attn_out.shape[1], stats[0].shape[-1]
    if packed:
        stats = [array.reshape(count, heads, tokens, last) for array in stats]
    else:
        stats = [array.reshape(count, tokens, heads, last).swapaxes(1, 2) for array in stats]
    return AttentionState(attn_out.reshape(count, tokens, heads, attn_out.shape[2]), *stats)


def _laid_out(state: AttentionState, layout: str) -> AttentionState:
    """See a BSND state in another layout."""
    attn_out = state.attn_out
    if layout == "BNSD":
        attn_out = attn_out.swapaxes(1, 2)
    elif layout == "SBH":
        attn_out = attn_out.swapaxes(0, 1)
        attn_out = attn_out.reshape(*attn_out.shape[:2], attn_out.shape[2] * attn_out.shape[3])
    return state._replace(attn_out=attn_out)
