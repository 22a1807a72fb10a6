"""Which rows of a TND batch a merge is of: chosen tokens, the real ones of padded sequences, any number of states a row."""

from __future__ import annotations

from typing import Any

import numpy as np

from rau.arrays import kind_of, plain
from rau.constraints.hints import described
from rau.constraints.lengths import bind_lengths
from rau.constraints.options import Options
from rau.constraints.rules import Violations
from rau.constraints.stacked import FEWER, MOST_STATES
from rau.errors import shown
from rau.layouts import numbered

Rows = slice | np.ndarray  # places along the token axis; an array of them is int64, each once
PADDED = "cu_seqlens_padded"
REORDER = 'rau.reorder_softmax(stats, lengths, to="TND") puts packed statistics into that order.'


def check_token_major(report: Violations, argument: str, options: Options) -> None:
    """Check that rows can be chosen: the first axis of all arrays is that of tokens."""
    layout = options.layout
    if layout != "TND" or options.softmax_layout != "TND":
        got = f'layout "{layout}"' if layout != "TND" else 'softmax_layout "SBH"'
        hint = "Pass slices of the arrays, and of out." if layout != "TND" else REORDER
        report.add("tokens", f'{argument} is given with {got}; expected layout "TND" with token-major statistics. {hint}')


def bind_tokens(report: Violations, tokens: Any, length: int) -> Rows | None:
    """Check which of T tokens are meant: a slice, numbers each at most once, or a boolean mask; None where that is wrong."""
    expected = f"expected a slice, a mask of {length} bools, or the numbers of tokens, from 0 to {length - 1}"
    if isinstance(tokens, slice):
        return bind_slice(report, tokens, length)
    if isinstance(tokens, (list, tuple)):
        bools = [isinstance(item, (bool, np.bool_)) for item in tokens]
        wrong = [item for item, its in zip(tokens, bools) if not isinstance(item, (int, float, np.generic)) or its != bools[0]]
        if wrong:
            report.add("tokens", f"tokens holds {shown(wrong[0])}, {described(wrong[0])}; {expected}.")
            return None
        values = np.array(tokens) if tokens else np.zeros(0, np.int64)
    else:
        tokens = plain(tokens)
        kind = kind_of(tokens)
        if kind is None or kind.name not in ("numpy", "torch", "jax") or kind.fault(tokens):
            report.add("tokens", f"tokens is {described(tokens)}; {expected}.")
            return None
        values = np.array(kind.to_numpy(tokens))  # a copy, on the host: what is checked is what is used
    if values.ndim != 1:
        report.add("tokens", f"tokens has shape {values.shape}; {expected}, on one axis.")
    elif values.dtype == bool:
        if len(values) == length:
            return _as_slice(np.flatnonzero(values))
        report.add("tokens", f"tokens is a mask of {len(values)} bools, for T = {length} tokens; expected one for each token.")
    elif values.dtype.kind not in "iu":
        report.add("tokens", f"tokens has dtype {values.dtype}; {expected}.")
    elif len(values) and not (0 <= values.min() and values.max() < length):
        at = int(((values < 0) | (values >= length)).argmax())
        report.add("tokens", f"tokens[{at}] = {values[at]}; expected numbers of tokens, from 0 to {length - 1} (T = {length}).")
    elif len(np.unique(values)) < len(values):
        again, counts = np.unique(values, return_counts=True)
        hint = " It looks like a mask: pass it as bools." if len(values) == length and values.max() <= 1 else ""
        report.add("tokens", f"tokens names {again[counts.argmax()]} more than once; expected each token once at most, since "
                   f"one call merges a row once.{hint}")  # fmt: skip
    else:
        return _as_slice(values)
    return None


def bind_slice(report: Violations, tokens: slice, length: int) -> slice | None:
    """Check a slice along the token axis, and resolve it: from a first token on, up to and without a last one."""
    try:
        start, stop, step = tokens.indices(length)
    except Exception as error:  # of what is no index, and of whatever it does; of step 0
        why = error if type(error) in (TypeError, ValueError) else shown(error)
        report.add("tokens", f"tokens = {shown(tokens)}: {why}; expected a slice of ints.")
        raise report.error() from error
    if step < 0:
        report.add("tokens", f"tokens = {shown(tokens)} walks backwards; expected a positive step.")
        return None
    return slice(start, max(start, stop), step)


def bind_padded(report: Violations, lengths: Any, padded: Any, tokens: int | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Check the cumulative lengths of sequences and of the slots that they stand in, both on the host from here on.

    The slots end at T, and each sequence fits its own. None where that is wrong.
    """
    both = []
    for name, value, end in (("actual_seq_qlen", lengths, None), (PADDED, padded, tokens)):
        if value is None:
            report.add("tnd-qlen-required", f"{name} is None; padded sequences expect actual_seq_qlen, the cumulative real "
                       f"lengths, and {PADDED}, the cumulative lengths of their slots.")  # fmt: skip
            continue
        both.append(bind_lengths(report, value, end, False, False, name, wait=True))  # rows are found by them, on the host
    if len(both) < 2 or both[0] is None or both[1] is None:
        return None
    real, slots = both
    if len(real) != len(slots):
        report.add("qlen-padded", f"actual_seq_qlen is of {len(real) - 1} sequences and {PADDED} of {len(slots) - 1}; "
                   "expected as many.")  # fmt: skip
        return None
    over = np.flatnonzero(np.diff(real) > np.diff(slots))
    if len(over):
        at = int(over[0])
        report.add("qlen-padded", f"sequence {at} has {np.diff(real)[at]} tokens and its slot {np.diff(slots)[at]}; expected "
                   "each sequence to fit its slot: actual_seq_qlen holds the cumulative lengths without padding.")  # fmt: skip
        return None
    return real, slots


def rows_of_sequences(starts: np.ndarray, lengths: np.ndarray) -> Rows:
    """Return the rows of sequences that start at some rows and have some lengths."""
    sequence, place = numbered(lengths)
    return _as_slice(starts[sequence] + place)


def bind_counts(report: Violations, indptr: Any, states: int) -> np.ndarray | None:
    """Check where each row's states begin among all `states`, cumulative from 0; None where that is wrong."""
    found: np.ndarray | None = bind_lengths(report, indptr, states, False, False, "indptr", wait=True)
    if found is not None and (counts := np.diff(found)).max(initial=0) > MOST_STATES:
        report.add("states", f"indptr gives row {counts.argmax()} {counts.max()} states; {FEWER}.")
        return None
    return found


def count(rows: Rows) -> int:
    """Return how many rows there are."""
    return len(range(rows.start, rows.stop, rows.step)) if isinstance(rows, slice) else len(rows)


def rows_beside(rows: Rows, length: int) -> Rows:
    """Return the other rows, of so many in all."""
    others = np.ones(length, bool)
    others[rows] = False
    return _as_slice(np.flatnonzero(others))


def runs_of(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return first rows and lengths of the runs of rows that follow one another."""
    if isinstance(rows, slice):
        if rows.step == 1:
            return np.array([rows.start], np.int64), np.array([rows.stop - rows.start], np.int64)
        rows = np.arange(rows.start, rows.stop, rows.step, dtype=np.int64)
    first = np.flatnonzero(np.diff(rows, prepend=-2) != 1).astype(np.int64)
    return rows[first], np.diff(first, append=len(rows))


def _as_slice(rows: np.ndarray) -> Rows:
    """See rows that follow one another as a slice: arrays then need no copy."""
    if not len(rows):
        return slice(0, 0, 1)
    rows = rows.astype(np.int64, copy=False)
    first, last = int(rows[0]), int(rows[-1])
    one_run = last - first + 1 == len(rows) and bool((np.diff(rows) == 1).all())
    return slice(first, last + 1, 1) if one_run else rows
