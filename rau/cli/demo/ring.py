"""The demonstration's work: real partial attention, merged by a backend, timed and judged."""

from __future__ import annotations

import argparse
import hashlib
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from rau.cli.bench.timing import interleaved
from rau.cli.console import Step
from rau.errors import RauError
from rau.state import AttentionState
from rau.testing import compare, exact_attention, oracle, partial_attention
from rau.testing.cases import Case
from rau.testing.comparison import Comparison
from rau.testing.reference.oracle import Expected, widen
from rau.testing.trial.judge import held_to, judge_values
from rau.update import merge_states, ring_attention_update

_SECONDS = 0.6  # of timing, for each backend


class Work(NamedTuple):
    """What is merged, and what should come out."""

    partials: list[AttentionState]  # partial attention as each rank sees it
    call: dict[str, Any]  # layout, softmax_layout and, in TND, actual_seq_qlen
    case: Case  # the same, as what judges takes it
    expected: Expected  # the oracle's merge of the partials
    exact: np.ndarray  # attention to all the keys, float64, shaped like attn_out
    rounding: float  # largest difference of the two: the error that the rounding of the partials alone explains


class Result(NamedTuple):
    """How one backend did one job."""

    backend: str
    call: str
    updates: int  # length of the ring; 0 for a merge of all at once
    seconds: float  # median
    gigabytes_per_second: float  # inputs read and outputs written
    merge_share: float  # largest errors as shares of the contract's bound
    sum_share: float
    attention_error: float  # largest difference from exact attention
    passed: bool
    problems: list[str]
    digest: str  # of attn_out: equal where the bits are


def steps_of(ranks: int, backends: int) -> int:
    """Total weight of the steps of :func:`prepare`, and of :func:`merge` for so many backends."""
    return 2 * ranks + 1 + backends * (ranks + 1)


def prepare(options: argparse.Namespace, step: Step) -> Work:
    """Compute the partial attention of each rank, the oracle's merge of it, and exact attention."""
    random = np.random.default_rng(options.seed)
    tokens, ranks, packed = options.tokens, options.ranks, options.layout == "TND"
    shape = (tokens, *(() if packed else (1,)), options.heads, options.head_dim)
    q, k, v = random.standard_normal((3, *shape), dtype=np.float32)
    ends = [0, tokens]
    if packed and tokens > 1:  # up to five sequences
        cuts = random.choice(np.arange(1, tokens), min(4, tokens - 1), replace=False)
        ends = [0, *sorted(map(int, cuts)), tokens]
    call: dict[str, Any] = {"layout": options.layout, "softmax_layout": options.softmax_layout}
    if packed:
        call["actual_seq_qlen"] = ends
    partials = []
    for rank in range(ranks):
        step(f"partial attention of rank {rank + 1}")
        # A rank holds its part of every sequence's keys.
        places = [np.array_split(np.arange(end - start), ranks)[rank] for start, end in pairwise(ends)]
        own = np.concatenate([start + part for start, part in zip(ends[:-1], places, strict=True)])
        part: dict[str, Any] = {"causal": options.causal, "key_positions": np.concatenate(places)}
        if packed:
            part["actual_seq_kvlen"] = np.cumsum([0, *map(len, places)])
        partials.append(partial_attention(q, k[own], v[own], dtype=options.dtype, **part, **call))
    step("exact attention", ranks)
    exact = exact_attention(q, k, v, causal=options.causal, **call).attn_out
    step("the oracle")
    expected = oracle(partials, **call)
    case = Case(
        id="demo", layout=options.layout, softmax_layout=options.softmax_layout, tokens=tokens, heads=options.heads,
        head_dim=options.head_dim, lengths=tuple(map(int, np.diff(ends))), dtype=options.dtype, states=ranks,
    )  # fmt: skip
    return Work(partials, call, case, expected, exact, float(np.abs(expected.attn_out - exact).max()))


def merge(work: Work, backend: Any) -> list[Result] | str:
    """Merge the partials at once, and in a ring if they are several; time both in turn, and judge each call's result.

    Where the backend cannot run this, the reason comes instead.
    """
    try:
        return _merged(work, backend)
    except RauError as error:
        return str(error)


def _merged(work: Work, backend: Any) -> list[Result]:
    states = [_owned(backend, state) for state in work.partials]
    options = work.call | {"backend": backend}
    merged = merge_states(states, **options)

    def at_once() -> None:
        merge_states(states, out=merged, **options)
        backend.synchronize()

    def update(state: AttentionState) -> None:
        ring_attention_update(*running, *state, out=running, profile="portable", **options)

    def ring() -> None:
        for state in states[1:]:
            update(state)
        backend.synchronize()

    def start() -> AttentionState:
        return _owned(backend, AttentionState(*(array.copy() for array in work.partials[0])))

    running, updates, tolerance = start(), len(states) - 1, backend.capabilities.tolerance
    times = interleaved({"at once": at_once} | ({"ring": ring} if updates else {}), _SECONDS, least=1)
    traffic = sum(map(_bytes, [*work.partials, work.partials[0]]))
    result = _on_host(backend, merged)
    kind = held_to(backend)
    expected = oracle(work.partials, **work.call, **kind) if kind else work.expected
    comparisons = [judge_values(backend, work.case, work.partials, result, expected)]
    results = [_result(work, backend, 0, times["at once"], traffic, result, comparisons)]
    if updates:
        running, comparisons = start(), []  # the timed one has merged the same partials again and again
        for number, partial in enumerate(work.partials[1:], 1):
            before = AttentionState(*(array.copy() for array in _on_host(backend, running)))
            update(states[number])
            expected = oracle([before, partial], **work.call, **kind)
            comparisons.append(compare(_on_host(backend, running), expected, tolerance=tolerance))
        traffic = 3 * updates * _bytes(work.partials[0])
        results.append(_result(work, backend, updates, times["ring"], traffic, _on_host(backend, running), comparisons))
    return results


def _result(
    work: Work, backend: Any, updates: int, times: np.ndarray, traffic: int, merged: AttentionState,
    comparisons: list[Comparison],
) -> Result:  # fmt: skip
    seconds = float(np.median(times))
    return Result(
        backend=backend.name,
        call="ring_attention_update" if updates else "merge_states",
        updates=updates,
        seconds=seconds,
        gigabytes_per_second=traffic / seconds / 1e9,
        merge_share=max(comparison.attn_share for comparison in comparisons),
        sum_share=max(comparison.sum_share for comparison in comparisons),
        attention_error=float(np.abs(widen(merged.attn_out) - work.exact).max()),
        passed=all(comparison.passed for comparison in comparisons),
        problems=[problem for comparison in comparisons for problem in comparison.problems],
        digest=hashlib.sha256(merged.attn_out.tobytes()).hexdigest()[:16],
    )


def _owned(backend: Any, state: AttentionState) -> AttentionState:
    return AttentionState(*map(backend.asarray, state))


def _on_host(backend: Any, state: AttentionState) -> AttentionState:
    return AttentionState(*map(backend.to_numpy, state))


def _bytes(state: AttentionState) -> int:
    return sum(array.nbytes for array in state)
