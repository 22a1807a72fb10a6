"""The demonstration's work: real partial attention, merged by a backend, timed and judged."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

import rau
from rau.cli.console import Step
from rau.state import AttentionState
from rau.testing import compare, exact_attention, oracle, partial_attention
from rau.testing.comparison import Comparison
from rau.testing.expected import Expected, widen

_LEAST_REPEATS, _LEAST_SECONDS = 3, 0.3  # the best of so many, and so long


class Work(NamedTuple):
    """What is merged, and what should come out.

    Attributes
    ----------
    partials : list of AttentionState
        Partial attention as each rank sees it.
    call : dict
        layout, softmax_layout and, in TND, actual_seq_qlen.
    expected : Expected
        The oracle's merge of the partials.
    exact : ndarray of float64
        Attention to all the keys, shaped like attn_out.
    rounding : float
        Largest difference of the two: the error that the rounding of the partials alone explains.
    """

    partials: list[AttentionState]
    call: dict[str, Any]
    expected: Expected
    exact: np.ndarray
    rounding: float


class Result(NamedTuple):
    """How one backend did one job.

    Attributes
    ----------
    backend, call : str
    updates : int
        Length of the ring; 0 for a merge of all at once.
    seconds : float
        Best time.
    rate : float
        Bytes of the inputs read and the outputs written, in GB/s.
    attn_share, sum_share : float
        Largest errors as shares of the contract's bound.
    attention : float
        Largest difference from exact attention.
    passed : bool
    problems : tuple of str
    merged : ndarray
        The output.
    """

    backend: str
    call: str
    updates: int
    seconds: float
    rate: float
    attn_share: float
    sum_share: float
    attention: float
    passed: bool
    problems: tuple[str, ...]
    merged: np.ndarray


def steps_of(ranks: int, backends: int) -> int:
    """Total weight of the steps of :func:`prepare`, :func:`merge_at_once` and :func:`merge_in_a_ring`."""
    return 2 * ranks + 1 + backends * (ranks + 2)


def prepare(options: argparse.Namespace, step: Step) -> Work:
    """Compute the partial attention of each rank, the oracle's merge of it, and exact attention.

    Parameters
    ----------
    options : argparse.Namespace
        Those of ``python -m rau demo``.
    step : callable
        From :func:`rau.cli.console.progress`.
    """
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
    return Work(partials, call, expected, exact, float(np.abs(expected.attn_out - exact).max()))


def merge_at_once(work: Work, backend: Any, step: Step) -> Result:
    """Merge all the partials in one call."""
    step(f"{backend.name}: all the partials at once", 2)
    states = [_for_backend(backend, state) for state in work.partials]
    result = rau.merge_states(states, backend=backend.name, **work.call)

    def again() -> None:
        rau.merge_states(states, backend=backend.name, out=result, **work.call)
        backend.synchronize()

    seconds = _best_time(again)
    merged = _on_host(backend, result)
    comparison = compare(merged, work.expected, tolerance=backend.capabilities.tolerance)
    traffic = sum(map(_bytes, work.partials)) + _bytes(merged)
    return _result(work, backend, 0, seconds, traffic, merged, [comparison])


def merge_in_a_ring(work: Work, backend: Any, step: Step) -> Result | None:
    """Merge one partial after another into a running state, in place, as a ring does; each update is judged.

    Returns
    -------
    Result or None
        None where there is but one partial. Shares are the worst of all the updates.
    """
    states = [_for_backend(backend, state) for state in work.partials]
    updates = len(states) - 1
    if not updates:
        return None
    running = states[0]

    def start() -> None:
        nonlocal running
        running = _for_backend(backend, AttentionState(*(array.copy() for array in work.partials[0])))
        backend.synchronize()

    def update(state: AttentionState) -> None:
        rau.ring_attention_update(
            *running, *state, out=running, backend=backend.name, profile="portable", **work.call
        )

    def ring() -> None:
        for state in states[1:]:
            update(state)
        backend.synchronize()

    step(f"{backend.name}: a ring of {updates} updates")
    seconds = _best_time(ring, start)
    start()
    comparisons = []
    for number in range(1, len(states)):
        step(f"{backend.name}: judging update {number}")
        before = AttentionState(*(array.copy() for array in _on_host(backend, running)))
        update(states[number])
        expected = oracle([before, work.partials[number]], **work.call)
        comparisons.append(
            compare(_on_host(backend, running), expected, tolerance=backend.capabilities.tolerance)
        )
    traffic = updates * 3 * _bytes(work.partials[0])
    return _result(work, backend, updates, seconds, traffic, _on_host(backend, running), comparisons)


def _result(
    work: Work, backend: Any, updates: int, seconds: float, traffic: int, merged: AttentionState,
    comparisons: Sequence[Comparison],
) -> Result:  # fmt: skip
    return Result(
        backend=backend.name,
        call="ring_attention_update" if updates else "merge_states",
        updates=updates,
        seconds=seconds,
        rate=traffic / seconds / 1e9,
        attn_share=max(comparison.attn_share for comparison in comparisons),
        sum_share=max(comparison.sum_share for comparison in comparisons),
        attention=float(np.abs(widen(merged.attn_out) - work.exact).max()),
        passed=all(comparison.passed for comparison in comparisons),
        problems=tuple(problem for comparison in comparisons for problem in comparison.problems),
        merged=merged.attn_out,
    )


def _best_time(job: Callable[[], None], before: Callable[[], None] = lambda: None) -> float:
    times: list[float] = []
    while len(times) < _LEAST_REPEATS or sum(times) < _LEAST_SECONDS:
        before()
        start = time.perf_counter()
        job()
        times.append(time.perf_counter() - start)
    return min(times)


def _for_backend(backend: Any, state: AttentionState) -> AttentionState:
    return AttentionState(*map(backend.asarray, state))


def _on_host(backend: Any, state: AttentionState) -> AttentionState:
    return AttentionState(*map(backend.to_numpy, state))


def _bytes(state: AttentionState) -> int:
    return sum(array.nbytes for array in state)
