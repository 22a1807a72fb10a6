"""What a kernel need not promise, tried all the same: a property is asked for by itself, where it makes a difference.

The oracle says twice what a call should give, with and without the property among those that are not promised; where the
second allows more, and nowhere else, the first is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rau.testing.cases import Case
from rau.testing.comparison import compare
from rau.testing.trial import excluded_by, expected_of, ordinary_case, run_case

STRIDES = "strides"
_NUMBERS = {  # of the cases that show a property: statistics, outputs
    "one-empty": (("empty", "ordinary"),),
    "two-empty": (("empty", "ordinary"),),
    "payload": (("empty", "special"), ("huge-gaps", "special")),
    "small-weights": (("ordinary", "large"), ("huge-gaps", "large")),
    "infinity": (("infinite-max", "ordinary"), ("infinite-sum", "ordinary")),
    "nan": (("nan-max", "ordinary"), ("nan-sum", "ordinary")),
    "signed-zero": (("ordinary", "signed-zeros"), ("empty", "signed-zeros")),
    "subnormal": (("ordinary", "tiny"),),
}


def tried(backend: Any, name: str) -> list[str]:
    """Say what speaks against a backend having a property of :data:`rau.backends.PROPERTIES`, or taking strides."""
    if reasons := unasked(backend, name):
        return reasons
    if name == STRIDES:
        backend = with_capabilities(backend, contiguous=False)
    problems = []
    for case in _cases(backend, name):
        if excluded_by(backend, case):
            continue
        numbers = case.fill()
        result, wrong = run_case(backend, case, numbers)
        if result is None:
            problems += wrong
            continue
        others = tuple(other for other in backend.capabilities.unpromised if other != name)
        expected = expected_of(case.make(numbers), with_capabilities(backend, unpromised=others))
        if name != STRIDES:
            wider = with_capabilities(backend, unpromised=(*others, name))
            expected = expected.where_wider(expected_of(case.make(numbers), wider))
        problems += compare(result, expected, tolerance=backend.capabilities.tolerance).problems
    return problems


def unasked(backend: Any, name: str) -> list[str]:
    """List what excludes all the cases of a property; nothing where at least one can be run."""
    excluded = [excluded_by(backend, case) for case in _cases(backend, name)]
    return [*dict.fromkeys(reason for reasons in excluded for reason in reasons)] if all(excluded) else []


def _cases(backend: Any, name: str) -> Iterator[Case]:
    ordinary = ordinary_case(backend, f"properties/{name}", 65)
    if name == STRIDES:  # in the kernel's own axes: any others are seen as these, or copied, before it gets them
        layout = getattr(backend, "layout", ordinary.layout)
        for placement in ("strided", "padded"):  # transposed, one that goes by the heads' stride alone reads far outside
            yield replace(ordinary, id=f"{ordinary.id}/{placement}", layout=layout, attn_placement=placement)
        return
    for statistics, outputs in _NUMBERS[name]:
        yield replace(ordinary, id=f"{ordinary.id}/{statistics}", statistics=statistics, outputs=outputs)


def with_capabilities(backend: Any, **changed: Any) -> Any:
    """Copy a backend that declares something else."""
    other = copy.copy(backend)
    vars(other)["capabilities"] = replace(backend.capabilities, **changed)
    return other
