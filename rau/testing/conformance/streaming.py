"""Streaming held to the contract: a StreamingMerge over a backend, update by update, whole and in parts; stacked states.

States are kept sequence by sequence here, and put into a layout by nothing but NumPy's reshape, swapaxes and concatenate:
what is checked is rau's own idea of where a token is, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from rau.arrays.numpy_ import ITEMSIZE, NARROW, named_dtype
from rau.state import AttentionState
from rau.streaming import StreamingMerge
from rau.testing.cases import Case
from rau.testing.comparison import compare, same_bits
from rau.testing.conformance.report import Check
from rau.testing.reference.oracle import oracle
from rau.testing.trial import excluded_by
from rau.testing.trial.judge import held_to
from rau.testing.under_test import host_state
from rau.update import merge_states

HEADS, HEAD_DIM = 3, 64
LENGTHS = {"TND": (4, 4, 0, 6, 2, 14), "": (8, 8)}  # of the sequences; in TND some are equal, and one is empty
HISTORY = (None, "back", "front", None, "back")
SLICES = (None, slice(2, 7), slice(0, None, 3), "front", "back", slice(3, 3), None)

Sequences = list[AttentionState]  # of each: attn_out (S, N, D), statistics (N, S, lanes)


def streams(backend: Any) -> Iterator[Check]:
    """List the checks of streaming for a backend, by layout and by the dtype of the partial states."""
    takes = backend.capabilities
    for name, layout, packed in (
        ("SBH", "SBH", False), ("BSND", "BSND", False), ("BNSD", "BNSD", False),
        ("TND-token-major", "TND", False), ("TND-packed", "TND", True),
    ):  # fmt: skip
        for dtype in ITEMSIZE:
            cases = [_case(backend, layout, packed, each) for each in dict.fromkeys((dtype, _running(dtype)))]
            reasons = list(dict.fromkeys(reason for case in cases for reason in excluded_by(backend, case)))
            if not reasons and layout == "TND" and not takes.halves and not {"SBH", "BSND", "BNSD"} & set(takes.layouts):
                reasons = ["it takes neither halves of TND sequences nor a layout with a batch axis"]
            yield Check(f"streaming/{name}-{dtype}", partial(check_stream, backend, layout, packed, dtype), reasons)
    stacks = hasattr(backend.asarray(np.zeros(1, np.float32)), "__getitem__")
    for dtype in ITEMSIZE:
        reasons = excluded_by(backend, _case(backend, takes.layouts[0], False, dtype))
        reasons = reasons if stacks else ["its arrays cannot be indexed"]
        yield Check(f"states/stacked-{dtype}", partial(check_stacked, backend, dtype), reasons)


def check_stacked(backend: Any, dtype: str) -> list[str]:
    """Merge states that are stacked in one, and in a list: the same bits."""
    layout = backend.capabilities.layouts[0]
    options: dict[str, Any] = {"layout": layout, "backend": backend}
    lengths = LENGTHS["TND" if layout == "TND" else ""]
    if layout == "TND":
        order = backend.capabilities.softmax_layouts[0]
        options |= {"actual_seq_qlen": np.cumsum([0, *lengths]), "softmax_layout": order}
    problems = []
    for count in {min(count, backend.capabilities.max_states or count) for count in (1, 2, 5)}:
        states = []
        for state in _states(backend, dtype, count):
            whole = [AttentionState(*(part[b] for part in state)) for b in range(len(lengths))]
            cut = [AttentionState(s[0][:n], s[1][:, :n], s[2][:, :n]) for s, n in zip(whole, lengths, strict=True)]
            states.append(_together(cut, layout, options.get("softmax_layout") == "SBH"))
        listed = merge_states([AttentionState(*map(backend.asarray, state)) for state in states], **options)
        stack = AttentionState(*(backend.asarray(np.stack(parts)) for parts in zip(*states, strict=True)))
        stacked = merge_states(stack, **options)
        differences = same_bits(host_state(backend, stacked), host_state(backend, listed))
        problems += [f"{count} states in one stack and in a list: {difference}" for difference in differences]
    return problems


def check_stream(backend: Any, layout: str, packed: bool, dtype: str) -> list[str]:
    """Feed a StreamingMerge with updates of all tokens and of parts, and judge each.

    Wrong are a merged row that is further off than one merge may be, a row that was not meant and changed, a partial state
    that was written to, and a result that is not the running state rounded once.
    """
    lengths = LENGTHS["TND" if layout == "TND" else ""]
    ends = np.cumsum([0, *lengths]) if layout == "TND" else None
    ring = StreamingMerge(layout, actual_seq_qlen=ends, softmax_layout="SBH" if packed else "TND", backend=backend)
    history: Sequence[Any] = HISTORY if layout == "TND" else SLICES
    before: Sequences | None = None
    problems: list[str] = []
    for number, (tokens, state) in enumerate(zip(history, _states(backend, dtype, len(history)), strict=True)):
        places = [np.arange(length)[_where(tokens, length)] for length in lengths]
        # Sequence by sequence other numbers: a partial state that lands in the wrong one is seen.
        cur = [
            AttentionState(*(part[b, ..., : len(at), :] for part in (state[0].swapaxes(1, 2), *state[1:])))
            for b, at in enumerate(places)
        ]
        cur = [AttentionState(part[0].swapaxes(0, 1), *part[1:]) for part in cur]
        given = _together(cur, layout, packed)
        own = [backend.asarray(part) for part in given]
        ring.update(*own, tokens=tokens)
        after = _apart(host_state(backend, ring.result()), lengths, layout, packed)
        told = f"update {number}, tokens = {tokens}: "
        merged = _rows(after, places)
        term = _widened(_rows(cur, [np.arange(len(at)) for at in places]), dtype)
        terms = [_empty(term) if before is None else _rows(before, places), term]
        if before is not None:
            others = [np.setdiff1d(np.arange(length), at) for length, at in zip(lengths, places, strict=True)]
            changed = same_bits(_rows(before, others), _rows(after, others))
            problems += [f"{told}tokens that were not meant have changed: {change}" for change in changed]
        expected = oracle(terms, layout="BSND", **held_to(backend))
        comparison = compare(merged, expected, tolerance=backend.capabilities.tolerance)
        problems += [f"{told}{problem}" for problem in comparison.problems]
        unwritten = same_bits(given, [np.asarray(backend.to_numpy(part)) for part in own])
        problems += [f"{told}the partial state was changed: {change}" for change in unwritten]
        before = after
    wide = host_state(backend, ring.result())
    if wide.attn_out.dtype.name != _running(dtype):
        problems.append(f"the running state is {wide.attn_out.dtype.name}; expected {_running(dtype)}")
    elif dtype in NARROW:
        with np.errstate(over="ignore"):
            rounded = AttentionState(wide.attn_out.astype(named_dtype(dtype)), *wide[1:])
        narrow = host_state(backend, ring.result(dtype))
        problems += [f"result({dtype!r}) is not rounded once: {change}" for change in same_bits(narrow, rounded)]
    return problems


def _empty(like: AttentionState) -> AttentionState:
    """What a running state is before there is anything."""
    return AttentionState(np.zeros_like(like[0]), np.full_like(like[1], -np.inf), np.zeros_like(like[2]))


def _widened(state: AttentionState, dtype: str) -> AttentionState:
    """See a partial state as what it is merged into, which is exact."""
    return state._replace(attn_out=state.attn_out.astype(_running(dtype)))


def _running(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def _case(backend: Any, layout: str, packed: bool, dtype: str) -> Case:
    lengths = LENGTHS["TND" if layout == "TND" else ""]
    sizes: dict[str, Any] = {"batch": len(lengths), "tokens": lengths[0]}
    if layout == "TND":
        sizes = {"tokens": sum(lengths), "lengths": lengths, "softmax_layout": "SBH" if packed else "TND"}
    return Case(
        id="streaming", layout=layout, heads=HEADS, head_dim=HEAD_DIM, dtype=dtype, lanes=backend.capabilities.lanes[0],
        **sizes,
    )  # fmt: skip


def _states(backend: Any, dtype: str, count: int) -> list[AttentionState]:
    """Partial states in BSND, of more batch entries and tokens than any layout here needs."""
    return Case(
        id=f"streaming/{dtype}", layout="BSND", batch=max(map(len, LENGTHS.values())), tokens=max(LENGTHS["TND"]),
        heads=HEADS, head_dim=HEAD_DIM, dtype=dtype, states=count, statistics="empty",
        lanes=backend.capabilities.lanes[0],
    ).fill()  # fmt: skip


def _where(tokens: Any, length: int) -> slice:
    halves = {"front": slice(0, length // 2), "back": slice(length // 2, length)}
    return slice(None) if tokens is None else tokens if isinstance(tokens, slice) else halves[tokens]


def _together(sequences: Sequences, layout: str, packed: bool) -> AttentionState:
    """Put sequences into a layout."""
    attn_out, maxima, sums = (list(parts) for parts in zip(*sequences, strict=True))
    if layout == "TND":
        stats = [
            np.concatenate([(part if packed else part.swapaxes(0, 1)).reshape(-1, HEADS, part.shape[-1]) for part in parts])
            for parts in (maxima, sums)
        ]
        return AttentionState(np.concatenate(attn_out), *stats)
    whole = np.stack(attn_out)
    if layout == "SBH":
        whole = whole.swapaxes(0, 1).reshape(whole.shape[1], whole.shape[0], HEADS * HEAD_DIM)
    elif layout == "BNSD":
        whole = whole.swapaxes(1, 2)
    return AttentionState(np.ascontiguousarray(whole), np.stack(maxima), np.stack(sums))


def _apart(state: AttentionState, lengths: Sequence[int], layout: str, packed: bool) -> Sequences:
    """Take a state apart into its sequences."""
    attn_out, *stats = state
    if layout != "TND":
        if layout == "SBH":
            attn_out = attn_out.reshape(*attn_out.shape[:2], HEADS, HEAD_DIM).swapaxes(0, 1)
        elif layout == "BNSD":
            attn_out = attn_out.swapaxes(1, 2)
        return [AttentionState(*parts) for parts in zip(attn_out, *stats, strict=True)]
    found, first = [], 0
    for length in lengths:
        rows = [part[first : first + length] for part in stats]
        lanes = rows[0].shape[-1]
        rows = [part.reshape(HEADS, length, lanes) if packed else part.swapaxes(0, 1) for part in rows]
        found.append(AttentionState(attn_out[first : first + length], *rows))
        first += length
    return found


def _rows(sequences: Sequences, places: Sequence[np.ndarray]) -> AttentionState:
    """Some tokens of each sequence, as one BSND state."""
    chosen = [
        AttentionState(part[0][at], *(stats[:, at] for stats in part[1:]))
        for part, at in zip(sequences, places, strict=True)
    ]
    attn_out, maxima, sums = zip(*chosen, strict=True)
    return AttentionState(np.concatenate(attn_out)[None], *(np.concatenate(part, 1)[None] for part in (maxima, sums)))
