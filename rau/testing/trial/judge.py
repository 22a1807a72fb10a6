"""How the values of a backend are judged: against the oracle, and where it merges by updates, update by update.

A backend that leaves `merge` to its base class rounds after every pair of states. Nobody can bound that by the numbers
that went in: a sum may overflow on the way, or a weight vanish in two steps that is large enough in one. What can be asked
is that each update is right, given what the one before left, and that the merge is nothing but these updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rau import registry
from rau.arrays.numpy_ import named_dtype
from rau.backends import Backend
from rau.state import AttentionState
from rau.testing.cases import Case
from rau.testing.comparison import Comparison, compare, same_bits
from rau.testing.reference.oracle import Expected, oracle
from rau.testing.under_test import host_state, own_state


def keeps_lse(backend: Any) -> bool:
    """Tell whether a backend's kernel keeps a log-sum-exp."""
    return bool(backend.capabilities.statistics == "lse")


def held_to(backend: Any) -> dict[str, Any]:
    """Return what the oracle has to know of a backend to judge it by what it promises; nothing if that is all there is."""
    takes = backend.capabilities
    if takes.statistics == "max_sum" and not takes.unpromised:
        return {}
    return {"statistics": takes.statistics, "lse_base": takes.lse_base, "unpromised": takes.unpromised}


def folds(backend: Any, case: Case) -> bool:
    """Tell whether a backend merges a case's states by one update after another."""
    return case.states > 2 and getattr(type(backend), "merge", None) is Backend.merge


def promises_bits(backend: Any, case: Case) -> bool:
    """Tell whether a backend is to have the bits of every other one that promises them."""
    return bool(backend.capabilities.tolerance == 1) and not held_to(backend) and not folds(backend, case)


def judge_values(
    backend: Any, case: Case, numbers: Sequence[AttentionState], result: AttentionState, expected: Expected
) -> Comparison:
    """Judge a result (NumPy arrays) of input states `numbers`; where the backend folds, by the worst of its updates.

    `expected` is what the oracle says of all states at once, of a backend of its kind.
    """
    tolerance = backend.capabilities.tolerance
    if not folds(backend, case):
        return compare(result, expected, tolerance=tolerance)
    running, *rest = [*numbers] * (case.states // len(numbers))
    wide = backend.capabilities.running_dtype(case.dtype)
    running = _cast(running, wide)
    attn_share = sum_share = 0.0
    problems: list[str] = []
    for k, cur in enumerate(rest, 1):
        if wide != case.dtype and not backend.capabilities.mixed:
            cur = _cast(cur, wide)
        update = _update(case, running, cur)
        lengths, order = case.lengths_argument(), case.softmax_layout
        one = oracle([running, cur], lengths, case.layout, softmax_layout=order, **held_to(backend))
        running = _run(backend, update, [running, cur])
        comparison = compare(running, one, tolerance=tolerance)
        attn_share = max(attn_share, comparison.attn_share)
        sum_share = max(sum_share, comparison.sum_share)
        problems += [f"update {k}: {problem}" for problem in comparison.problems]
    if not problems:
        differences = same_bits(result, _cast(running, case.dtype))
        problems = [f"merge and one update after another: {difference}" for difference in differences]
    return Comparison(not problems, attn_share, sum_share, tuple(problems))


def _update(case: Case, prev: AttentionState, cur: AttentionState) -> Case:
    return replace(
        case, states=2, dtype=prev.attn_out.dtype.name, cur_dtype=cur.attn_out.dtype.name, out="fresh", aliased=False,
        attn_placement="contiguous", stats_placement="contiguous", read_only=False, profile="portable",
    )  # fmt: skip


def _run(backend: Any, case: Case, states: Sequence[AttentionState]) -> AttentionState:
    with registry.provisionally(backend):
        return host_state(backend, case.call([own_state(backend, state) for state in states], None, backend))


def _cast(state: AttentionState, dtype: str) -> AttentionState:
    with np.errstate(over="ignore"):
        return AttentionState(state.attn_out.astype(named_dtype(dtype)), *state[1:])
