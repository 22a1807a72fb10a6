"""Merges of some rows, or to another dtype: taken out, merged as any call is, rounded, and put in their place.

What is not asked for is not read. A backend meets an ordinary call, of the rows alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rau import registry
from rau.arithmetic import scaled
from rau.arrays import Kind, kind_of, looks_like_array, plain
from rau.arrays.numpy_ import EIGHT_BITS
from rau.call import NAMES, as_state, hand_over
from rau.constraints import Options, bind, check_options
from rau.constraints.hints import described
from rau.constraints.results import bind_scale, result_dtype
from rau.constraints.rows import (
    PADDED,
    Rows,
    bind_counts,
    bind_padded,
    bind_tokens,
    check_token_major,
    count,
    rows_beside,
    rows_of_sequences,
    runs_of,
)
from rau.constraints.rules import Violations
from rau.constraints.values import check_memory, check_values
from rau.errors import UnsupportedError
from rau.layouts import FIELDS
from rau.problem import Problem
from rau.state import AttentionState

# Makes an ordinary call: of states, cumulative lengths, options and out.
Compute = Callable[[Sequence[Sequence[Any]], Any, Options, Any], AttentionState]
_EMPTY = (0.0, -np.inf, 0.0)  # the neutral element


class Asked(NamedTuple):
    """What a call asks beside the merge itself, as in :func:`rau.merge_states`."""

    tokens: Any = None
    cu_seqlens_padded: Any = None
    dtype: Any = None
    scale: Any = None
    found: tuple[Rows | None, Any] | None = None  # what _find() has said of it


def asked_of(call: str, tokens: Any, cu_seqlens_padded: Any, dtype: Any = None, scale: Any = None) -> Asked | None:
    """Return what a call asks, None if nothing; UnsupportedError for anything while torch traces."""
    if tokens is None and cu_seqlens_padded is None and dtype is None and scale is None:
        return None
    refuse_tracing(call)
    return Asked(tokens, cu_seqlens_padded, dtype, scale)


def refuse_tracing(call: str) -> None:
    """Refuse a graph: which rows there are is to be known for it."""
    torch = sys.modules.get("torch")
    if torch is not None and (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        raise UnsupportedError(
            f"{call}: tokens, cu_seqlens_padded, indptr or dtype are given while torch compiles, exports or traces, and which rows "
            "there are is not known then. Call it outside of the graph, or take the rows by torch's own operations."
        )


def merge_rows(
    call: str, states: Sequence[Sequence[Any]], actual_seq_qlen: Any, options: Options, out: Any, backend: Any, asked: Asked,
    compute: Compute, in_graph: bool,
) -> AttentionState:  # fmt: skip
    """Make a call that asks for something. All of it is checked before anything is written, in the caller's words."""
    report, padded = Violations(call), asked.cu_seqlens_padded is not None
    states, into = _plain(states, out)
    first = states[0]
    rows, lengths = _find(report, asked, first[0], actual_seq_qlen, options)
    metadata = options._replace(check="metadata")  # values are looked at of the rows alone
    problem, regular = bind(call, states, NAMES[call], lengths, metadata, into, dtype=asked.dtype)
    kind = _settled(call, first)
    dtype = result_dtype(report, asked.dtype, problem.dtype)
    scale = bind_scale(report, asked.scale, dtype, problem.N, first[0])
    report.raise_if_broken()
    if rows is None and dtype == problem.dtype:
        return compute(states, lengths, options, out)

    if in_graph and dtype in EIGHT_BITS:
        raise UnsupportedError(f"{call}: dtype = {dtype} and an input requires grad; eight bits have no gradient here. Call "
                               "under torch.no_grad(), or merge to float32 and round that.")  # fmt: skip

    def rounded(attn_out: Any) -> Any:
        """Copy part of the output in the dtype that is wanted."""
        if dtype not in EIGHT_BITS:
            return kind.cast(attn_out, dtype)
        wide = attn_out if kind.dtype(attn_out) == "float32" else kind.cast(attn_out, "float32")
        return kind.cast(scaled(wide, scale, EIGHT_BITS[dtype], options.layout, problem.N), dtype)

    def copied(state: Sequence[Any]) -> list[Any]:
        return [rounded(state[0]), *(kind.cast(array, problem.stats_dtype) for array in state[1:])]

    fields = 3 if options.statistics else 1
    on_first = into is not None and all([kind.memory(a).same_view(kind.memory(b)) for a, b in zip(into, first)])
    rest: Rows = slice(0, 0)  # what is not merged, and has to be written
    kept: list[Any] = []
    if into is not None and rows is not None and not (padded or on_first):
        rest = rows_beside(rows, problem.T)
        kept = copied([kind.take(array, rest) for array in first[:fields]])  # before `into`, which may stand on it, is written

    def new() -> list[Any]:
        """Make arrays for the result, with what is to be in the rows that are not merged: the first state's, or nothing."""
        return copied((_empty(kind, first) if padded else first)[:fields])

    where_they_lie = dtype == problem.dtype and not in_graph and options.check == "metadata"
    if rows is not None and where_they_lie and (into is None or padded or on_first or not problem.in_place):
        how = problem.actual_seq_qlen, options.layout, options.softmax_layout, options.profile
        chosen, origin = registry.select(Problem.of(regular, None, *how, in_place=False), backend)
        if chosen.capabilities.runs and (chosen.capabilities.in_place or not problem.in_place):
            registry.log_call(call, chosen, origin)
            if into is not None:
                kind.will_write(as_state(into))
            target = as_state(new() if into is None else into)
            problem = Problem.of(
                regular, target, *how, in_place=problem.in_place, statistics=options.statistics, runs=runs_of(rows)
            )
            hand_over(call, chosen, problem, regular, target)
            _put(kind, target, rest, kept)
            return target if out is None else as_state(out)

    picked = states
    if rows is not None:
        picked, lengths = [[kind.take(array, rows) for array in state] for state in states], np.array([0, count(rows)])
        if options.check != "metadata":
            check_values(report, kind, picked, NAMES[call], options.check, np.arange(problem.T)[rows])
            check_memory(report, kind, states, picked, NAMES[call])
            report.raise_if_broken()
            options = metadata
    if dtype != problem.dtype and problem.dtype != "float32":  # later states may be narrower than a float32 one
        picked = [[kind.cast(picked[0][0], "float32"), *picked[0][1:]], *picked[1:]]
    merged = compute(picked, lengths, options._replace(profile="portable"), None)  # whose limits were looked at
    if dtype != problem.dtype:
        merged = merged._replace(attn_out=rounded(merged.attn_out))
    if rows is None and into is None:
        return merged
    if into is None:
        into = new()
    else:
        kind.will_write(as_state(into))
    written = _put(kind, into, slice(None) if rows is None else rows, merged)
    _put(kind, into, rest, kept)
    return as_state(written if out is None else out)


def _put(kind: Kind, into: Sequence[Any], rows: Rows, values: Sequence[Any]) -> list[Any]:
    """Write rows of a state, of as many fields as both have; return its arrays, which JAX makes anew."""
    return [
        kind.put(target, rows, its if its.shape[-1] == target.shape[-1] else kind.lanes(its, target.shape[-1]))
        for target, its in zip(into, values)
    ]


def merge_pair_rows(
    call: Callable[[Sequence[Sequence[Any]], Options, Any, Asked | None], AttentionState], pairs: Sequence[Sequence[Any]],
    states: Sequence[AttentionState], lengths: Any, options: Options, axes: str, how: dict[str, Any], out: Any, asked: Asked,
) -> tuple[Any, Any]:  # fmt: skip
    """Merge pairs (attn_out, lse), which are `states` as well, where something is asked of that, which was not checked.

    `call` makes a call of states, options, out and what is asked; `axes` are those of the log-sum-exps, `how` what
    AttentionState.lse takes. The log-sum-exps first, as :func:`rau.merge_lse` has them.
    """
    found = _find(Violations("merge_lse"), asked, states[0][0], lengths, options)
    asked, rows = asked._replace(found=found), found[0]
    kind = _settled("merge_lse", states[0])
    if rows is None and out is None:
        both = call(states, options, None, asked)
        return both.attn_out, both.lse(**how)
    picked = [state._replace(attn_out=state.attn_out[..., :0]) for state in states]
    if rows is not None:
        picked = [AttentionState(*(kind.take(array, rows) for array in state)) for state in picked]
    lse = call(picked, options, None, None).lse(**how)
    alone = options._replace(statistics=False)
    merged = call(states, alone, None if out is None else out[:1], asked).attn_out
    given, padded = pairs[0][1], asked.cu_seqlens_padded is not None
    if out is None:
        other = kind.full(given, tuple(given.shape), kind.dtype(given), -np.inf) if padded else given
        out = merged, kind.cast(other, kind.dtype(lse))
    elif rows is not None and not padded and not kind.memory(out[1]).same_view(kind.memory(given)):
        kind.assign(out[1], kind.cast(given, kind.dtype(lse)))
    if rows is None:
        kind.assign(out[1], lse)
        return out[0], out[1]
    return out[0], kind.put(out[1], rows, lse, axes.index("T"))


def merge_counts(
    call: str, state: Any, lengths: Any, indptr: Any, options: Options, out: Any, asked: Asked | None, compute: Compute
) -> AttentionState:
    """Merge as many states in each row as it has: those from indptr[t] to indptr[t + 1] of one triple of arrays.

    One call for each number of states that there is, of the rows that have as many.
    """
    refuse_tracing(call)
    report = Violations(call)
    options, _ = check_options(report, options)
    report.raise_if_broken()
    if not isinstance(state, (tuple, list)) or len(state) != 3 or not all(map(looks_like_array, state)):
        report.add("states", f"states is {described(state)}; with indptr expected one triple (attn_out, softmax_max, softmax_sum) "
                   "of arrays that hold the states of all rows.")  # fmt: skip
    check_token_major(report, "indptr", options)
    if asked is not None or out is not None or lengths is not None:
        report.add("indptr", "indptr is given with actual_seq_qlen, tokens, cu_seqlens_padded, dtype, scale or out; expected it "
                   "without them.")  # fmt: skip
    report.raise_if_broken()
    (state,), _ = _plain((state,), None)
    problem, _ = bind(call, (state,), lambda _, field: f"states.{FIELDS[field]}", None, options, None)
    kind = _settled(call, state)
    starts = bind_counts(report, indptr, problem.T)
    report.raise_if_broken()
    assert starts is not None
    counts = np.diff(starts)
    merged = [kind.full(array, (len(counts), *array.shape[1:]), kind.dtype(array), value) for array, value in zip(state, _EMPTY)]
    for number in np.unique(counts[counts > 0]).tolist():
        rows = np.flatnonzero(counts == number)
        chosen = [[kind.take(array, starts[rows] + k) for array in state] for k in range(number)]
        for field, values in enumerate(compute(chosen, np.array([0, len(rows)]), options, None)):
            if values is not None:
                merged[field] = kind.put(merged[field], rows, values)
    return AttentionState(*merged)


def _find(report: Violations, asked: Asked, attn_out: Any, lengths: Any, options: Options) -> tuple[Rows | None, Any]:
    """Find the rows that are asked for, None for all of them; and lengths by which the whole can be checked."""
    if asked.found is not None:
        return asked.found
    tokens, padded = asked.tokens, asked.cu_seqlens_padded
    if tokens is None and padded is None:
        return None, lengths
    if tokens is not None and padded is not None:
        report.add("tokens", f"tokens and {PADDED} are both given; expected one of them. Choose among the real tokens by tokens.")
    options, _ = check_options(report, options)
    report.raise_if_broken()
    check_token_major(report, "tokens" if padded is None else PADDED, options)
    report.raise_if_broken()
    length = next(iter(getattr(attn_out, "shape", ())), None)
    rows: Rows | None = None
    if padded is not None:
        bound = bind_padded(report, lengths, padded, length)
        if bound is not None:
            rows, lengths = rows_of_sequences(bound[1][:-1], np.diff(bound[0])), bound[1]
    elif length is not None:  # else it is no array, of which the validator has something to say
        rows = bind_tokens(report, tokens, length)
    report.raise_if_broken()
    return rows, lengths


def _empty(kind: Kind, like: Sequence[Any]) -> list[Any]:
    """Return arrays of empty rows, like those of a state or of a pair of an output and a log-sum-exp."""
    return [kind.full(array, tuple(array.shape), kind.dtype(array), value) for array, value in zip(like, _EMPTY)]


def _plain(states: Sequence[Sequence[Any]], out: Any) -> tuple[list[list[Any]], Any]:
    """See arrays as their libraries' own."""
    into = [plain(array) for array in out] if isinstance(out, (tuple, list)) else out
    return [[plain(array) for array in state] for state in states], into


def _settled(call: str, state: Sequence[Any]) -> Kind:
    """Return the kind of arrays that were checked; UnsupportedError where rows of it cannot be chosen."""
    kind = kind_of(state[0])
    assert kind is not None
    if kind.name not in ("numpy", "torch", "jax"):
        raise UnsupportedError(
            f"{call}: tokens, cu_seqlens_padded, indptr or dtype are given with {kind.name} arrays, whose rows nobody takes out "
            "and puts back here; expected NumPy arrays, torch tensors or JAX arrays."
        )
    return kind
