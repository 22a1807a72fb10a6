"""Calls that have passed every check, recognised when the like of them comes again.

Whether a call is allowed depends, values and cumulative lengths apart, on the types, dtypes and shapes of its arrays,
on how its outputs meet its inputs, and on its options. Calls of the smallest size spend more time on finding that out
than on the merge, and a ring makes the same call over and over. What is kept is the Problem: no array, no address, no
value, so that what is remembered cannot change a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from rau.arrays import kind_of
from rau.constraints.options import Options
from rau.problem import Problem

_MOST = 256  # kinds of call; a program makes a few
_problems: dict[tuple[Any, ...], tuple[Problem, list[Any]]] = {}


def signature(
    call: str,
    states: Sequence[Sequence[Any]],
    actual_seq_qlen: Any,
    options: Options,
    out: Any,
) -> tuple[Any, ...] | None:
    """Describe a call by all that decides whether it is allowed: equal for calls that are alike.

    None for those that take the validator each time: options that are no strings, values or lengths to be read, anything but
    contiguous arrays, outputs that meet other arrays.
    """
    layout, softmax_layout, profile, check, statistics = options
    if not (
        type(layout) is type(softmax_layout) is type(profile) is type(check) is str
        and check == "metadata"
        and (actual_seq_qlen is None or (layout != "TND" and type(actual_seq_qlen) is not str))
    ):
        return None
    arrays = list(chain.from_iterable(states))
    inputs = len(arrays)
    if out is not None:
        if not isinstance(out, (tuple, list)) or len(out) != (3 if statistics else 1):
            return None
        arrays.extend(out)
    kind = kind_of(arrays[0])
    described = None if kind is None else kind.signature(arrays, inputs)
    return None if described is None else (call, inputs, layout, softmax_layout, profile, statistics, described)


def recall(signature: tuple[Any, ...]) -> Problem | None:
    """Return the problem of an earlier call of this signature."""
    # Not get(): without the interpreter's lock it holds the dictionary's own while it compares, and a process that is forked
    # by another thread meanwhile waits for that lock for ever. An index is looked up without one.
    try:
        return _problems[signature][0]
    except KeyError:
        return None


def remember(signature: tuple[Any, ...], problem: Problem, states: Sequence[Sequence[Any]], out: Any) -> None:
    """Keep the problem of a call that has passed every check."""
    if len(_problems) >= _MOST:
        _problems.clear()
    # A signature may hold the address of a dtype, which nobody else may get while it is compared with.
    dtypes = [array.dtype for state in (*states, out or ()) for array in state]
    _problems[signature] = problem, dtypes
