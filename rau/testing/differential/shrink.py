"""Making a failing case small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from rau.testing.cases import Case


def shrink(case: Case, wrong: Callable[[Case], str]) -> Iterator[tuple[Case, str]]:
    """Look for ever smaller cases that still fail, until no step is left; `wrong` says what is wrong, if anything.

    >>> found = shrink(Case(id="x", tokens=9), lambda case: "wrong" if case.tokens > 3 else "")
    >>> [(case.tokens, case.heads, case.head_dim) for case, _ in found]
    [(4, 2, 8), (4, 1, 8), (4, 1, 1)]
    """
    found = True
    while found:
        found = False
        for candidate in smaller(case):
            message = wrong(candidate)
            if message:
                case, found = candidate, True
                yield case, message
                break


def smaller(case: Case) -> Iterator[Case]:
    """List cases a step simpler than one, the largest steps first; not all of them make valid calls."""
    if case.profile != "portable":  # lifts the limits that keep it large
        yield replace(case, profile="portable")
    for name, least in (("tokens", 1), ("batch", 1), ("heads", 1), ("head_dim", 1)):
        value = getattr(case, name)
        if not (name == "tokens" and case.layout == "TND"):
            for less in _less(value, least):
                change: dict[str, Any] = {name: less}
                yield replace(case, **change)
    if case.layout == "TND" and len(case.lengths) > 1:
        half = len(case.lengths) // 2
        for kept in (case.lengths[:half], case.lengths[half:], case.lengths[1:], case.lengths[:-1]):
            yield replace(case, lengths=kept, tokens=sum(kept))
    for place, length in enumerate(case.lengths[:8]):
        if length > 1:
            for shorter in _less(length, 1):
                kept = (*case.lengths[:place], shorter, *case.lengths[place + 1 :])
                yield replace(case, lengths=kept, tokens=sum(kept))
    if case.states > 2 and case.out != "cur":
        yield replace(case, states=2)
        yield replace(case, states=case.states - 1)
    plain: dict[str, Any] = {
        "out": "fresh", "attn_placement": "contiguous", "stats_placement": "contiguous", "out_placement": "contiguous",
        "read_only": False, "aliased": False, "qlen": "array", "statistics": "ordinary", "outputs": "ordinary",
        "unequal_lanes": False,
    }  # fmt: skip
    for name, value in plain.items():
        if getattr(case, name) != value and not (name == "qlen" and not case.lengths):
            yield replace(case, **{name: value})


def _less(value: int, least: int) -> list[int]:
    """Smaller numbers, from far to near: halving what is taken off finds a threshold without counting down to it."""
    steps = [least, value // 4, value // 2]
    taken = value // 4
    while taken:
        steps.append(value - taken)
        taken //= 2
    steps.append(value - 1)
    return [number for number in dict.fromkeys(steps) if least <= number < value]
