"""A call: checked, given to a backend, and run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rau import registry
from rau.arrays import Kind, kind_of
from rau.arrays.foreign import ForeignKind
from rau.constraints import Options, checked
from rau.errors import RauError, UnsupportedError
from rau.layouts import FIELDS
from rau.problem import Problem
from rau.state import AttentionState


def _update_name(state: int, field: int) -> str:
    return f"{('prev', 'cur')[state]}_{FIELDS[field]}"


def _state_name(state: int, field: int) -> str:
    return f"states[{state}].{FIELDS[field]}"


def _pair_name(state: int, field: int) -> str:
    return f"pairs[{state}][{min(field, 1)}]"


def _sink_name(state: int, field: int) -> str:
    return "sink" if state else f"state.{FIELDS[field]}"


NAMES = {
    "ring_attention_update": _update_name, "merge_states": _state_name, "merge_lse": _pair_name, "add_sink": _sink_name,
}  # fmt: skip


def run(
    call: str,
    states: Sequence[Sequence[Any]],
    actual_seq_qlen: Any,
    options: Options,
    out: Any,
    backend: Any,
) -> AttentionState:
    """Check a call, choose who runs it, and run it; `call` is one of `NAMES`.

    Without statistics, `out` is a sequence of attn_out alone, and the result has None in their places.
    """
    problem, states, target = checked(call, states, NAMES[call], actual_seq_qlen, options, out)
    chosen, origin = registry.select(problem, backend)
    registry.log_call(call, chosen, origin)
    own = None if target is out else as_state(out)  # the caller's objects; once they are written, nothing may fail
    result = hand_over(call, chosen, problem, states, target)
    return result if own is None else own


def as_state(arrays: Sequence[Any]) -> AttentionState:
    """See a state's arrays, or its output alone, as a state."""
    return arrays if type(arrays) is AttentionState else AttentionState(*arrays, *(None,) * (3 - len(arrays)))


def hand_over(call: str, backend: Any, problem: Problem, states: Sequence[Sequence[Any]], out: Any) -> AttentionState:
    """Have a backend merge states: the one way to a backend, so that none of them has to think of autograd.

    "merge_states", "merge_lse" and "add_sink" take its `merge`, any other call its `update`. The arrays' library is told of a
    write before it, and so where a backend fails half way, too; UnsupportedError where it forbids the write, or where the
    backend has no `merge`.
    """
    states = [state if type(state) is AttentionState else AttentionState(*state) for state in states]
    out = None if out is None else as_state(out)
    if not problem.statistics and not backend.capabilities.without_statistics:
        problem, out = _with_statistics(backend, problem, states, out)
    if out is not None and problem.kind != "numpy":  # which keeps no account of writes
        kind = kind_of(out[0])
        assert kind is not None  # the validator has seen to that
        kind.will_write(out)
    target = out
    if backend.capabilities.contiguous:
        problem, states, target = _contiguous(call, backend, problem, states, out)
    if call not in ("merge_states", "merge_lse", "add_sink"):
        result = backend.update(problem, *states, target)
    elif hasattr(backend, "merge"):
        result = backend.merge(problem, states, target)
    else:
        raise UnsupportedError(f'backend "{backend.name}" has no merge; derive it from rau.backends.Backend.')
    if result is not target or target is None:
        _check_result(backend, problem, result, target)
    if out is None or target is out:
        return result
    kind = kind_of(out[0])
    assert kind is not None and target is not None
    for array, values in zip(out, target, strict=True):
        if values is not array:
            kind.assign(array, values)
    return out


def _contiguous(
    call: str, backend: Any, problem: Problem, states: Sequence[Any], out: AttentionState | None
) -> tuple[Problem, Sequence[Any], AttentionState | None]:
    """Describe a call for a backend that takes contiguous arrays only: on copies of those that are not, in place as it was."""
    kind = kind_of(states[0].attn_out)
    assert kind is not None  # the validator has seen to that
    copies: dict[int, Any] = {}
    for array in [array for state in states for array in state if not kind.contiguous(array)]:
        if id(array) not in copies:
            copies[id(array)] = kind.regular_copy(array)
    for array in out or ():
        if array is not None and id(array) not in copies and not kind.contiguous(array):
            copies[id(array)] = kind.full(array, tuple(array.shape), kind.dtype(array), 0.0)
    if not copies:
        return problem, states, out
    registry.log_copies(call, backend, len(copies))
    states = [AttentionState(*(copies.get(id(array), array) for array in state)) for state in states]
    target = None if out is None else AttentionState(*(copies.get(id(array), array) for array in out))
    described = Problem.of(
        states, target, problem.actual_seq_qlen, problem.layout, problem.softmax_layout, problem.profile,
        in_place=problem.in_place and any(_same(kind, own, part) for own, *parts in zip(target or (), *states) for part in parts),
        statistics=problem.statistics,
    )  # fmt: skip
    return described, states, target


def _same(kind: Kind, one: Any, other: Any) -> bool:
    return one is other or (one is not None and kind.memory(one).same_view(kind.memory(other)))


def _with_statistics(
    backend: Any, problem: Problem, states: Sequence[Sequence[Any]], out: AttentionState | None
) -> tuple[Problem, AttentionState | None]:
    """Describe a call that wants no statistics for a backend that cannot leave them out: they are written beside `out`."""
    if out is not None:
        made = [full(backend, states[0][0], problem.stats_shape, problem.stats_dtype, 0.0) for _ in range(2)]
        out = AttentionState(out.attn_out, *made)
    options = problem.layout, problem.softmax_layout, problem.profile
    return Problem.of(states, out, problem.actual_seq_qlen, *options, in_place=problem.in_place, runs=problem.runs), out


def full(backend: Any, like: Any, shape: tuple[int, ...], dtype: str, value: float) -> Any:
    """Return a new array of a kind, beside another one; of a plugin's own kind, its backend makes it."""
    kind = kind_of(like)
    assert kind is not None  # the validator has seen to that
    if isinstance(kind, ForeignKind):
        return backend.asarray(np.full(shape, value, dtype))
    return kind.full(like, shape, dtype, value)


def _check_result(backend: Any, problem: Problem, result: Any, out: AttentionState | None) -> None:
    """Refuse what no backend may return: it would be taken for the merge."""
    stats = problem.stats_shape if problem.statistics else None
    shapes = problem.shape, stats, stats
    if out is None and isinstance(result, tuple) and tuple([getattr(array, "shape", None) for array in result]) == shapes:
        return  # which is what there is, and has to be quick
    fault = ""
    if not isinstance(result, tuple) or len(result) != 3:
        fault = f"returned a {type(result).__name__}; expected an AttentionState"
    elif out is not None:
        if any(its is not given for its, given in zip(result, out, strict=True)):
            fault = "returned other arrays than those of `out`, which it was given to fill"
    else:
        for name, array, shape in zip(FIELDS, result, shapes, strict=True):
            its = getattr(array, "shape", None)
            if shape is None and array is not None:
                fault = f"returned {name}, though no statistics were asked for and its capabilities say that it leaves them out"
                break
            if shape is not None and (its is None or tuple(its) != shape):
                kind = f"is a {type(array).__name__}; expected the inputs' kind"
                fault = f"returned a wrong array: {name} {kind if its is None else f'has shape {tuple(its)}; expected {shape}'}"
                break
    if fault:
        raise RauError(f'backend "{backend.name}" {fault}. That is a fault of the backend: python -m rau check finds it.')
