"""Parts of the sequences of a state, slices and halves: seen where they lie, without a copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from rau.constraints.hints import described
from rau.constraints.rules import Violations
from rau.errors import shown
from rau.layouts import LAYOUTS
from rau.state import AttentionState

HALVES = ("front", "back")


def part_of(call: str, tokens: Any, layout: str, length: int, lengths: np.ndarray | None) -> slice | str:
    """Check which tokens are meant, of S (in layout "TND", T): a slice along the token axis, or in TND the name of a half.
    """
    report = Violations(call)
    if isinstance(tokens, slice):
        if layout == "TND":
            report.add("tokens", f'tokens = {shown(tokens)}; layout "TND" expects "front" or "back", the halves of every sequence. '
                       "A slice of one sequence is a state of its own: merge it as such.")  # fmt: skip
            raise report.error()
        try:
            start, stop, step = tokens.indices(length)
        except Exception as error:  # of what is no index, and of whatever it does; of step 0
            why = error if type(error) in (TypeError, ValueError) else shown(error)
            report.add("tokens", f"tokens = {shown(tokens)}: {why}; expected a slice of ints.")
            raise report.error() from error
        if step < 0:
            report.add("tokens", f"tokens = {tokens} walks backwards; expected a positive step.")
            raise report.error()
        return slice(start, max(start, stop), step)
    if not isinstance(tokens, str) or tokens not in HALVES:
        got = shown(tokens) if isinstance(tokens, str) else described(tokens)
        wanted = "" if layout == "TND" else "a slice, "
        report.add("tokens", f'tokens is {got}; expected {wanted}"front" or "back", the halves of every sequence.')
        raise report.error()
    odd = np.flatnonzero(np.diff(lengths) % 2) if lengths is not None else [0] * (length % 2)
    if len(odd):
        which, size = "every sequence", length
        if lengths is not None:
            begin, end = (int(place) for place in lengths[odd[0] : odd[0] + 2])
            which, size = f"sequence {odd[0]} (tokens {begin} to {end})", end - begin
        more = f", and {len(odd) - 1} more are odd" if len(odd) > 1 else ""
        report.add("tokens-odd", f'tokens = "{tokens}", and {which} has {size} tokens{more}; expected even lengths. '
                   "Pad the sequences, or choose the tokens by a slice (not in TND).")  # fmt: skip
        raise report.error()
    if layout == "TND":
        return tokens
    middle = length // 2
    return slice(0, middle) if tokens == "front" else slice(middle, length)


def part(state: Sequence[Any], layout: str, tokens: slice) -> AttentionState:
    """See some tokens of a state."""
    axes = LAYOUTS[layout]
    places = axes.attn_token, axes.stats_token, axes.stats_token
    return AttentionState(*(array[(slice(None),) * axis + (tokens,)] for array, axis in zip(state, places, strict=True)))


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
