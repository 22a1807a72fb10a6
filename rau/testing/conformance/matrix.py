"""Kernels against properties: one row for each backend, the same questions to all of them.

The rule of this file: a question has one answer of a few words, found by running the kernel, whatever it promises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from rau import registry
from rau.arrays import kind_of
from rau.arrays.numpy_ import ITEMSIZE, NARROW, named_dtype
from rau.backends import PROPERTIES
from rau.testing.apart import Apart, Here, NoAnswer, Patience
from rau.testing.cases import Case
from rau.testing.conformance.properties import STRIDES, tried, unasked
from rau.testing.reference.oracle import oracle, widen
from rau.testing.trial import (
    check_case,
    excluded_by,
    expected_of,
    ordinary_case,
    run_case,
)
from rau.testing.trial.judge import folds, held_to
from rau.testing.under_test import described

LAYOUTS = (("SBH", "TND"), ("BSND", "TND"), ("BNSD", "TND"), ("TND", "TND"), ("TND", "SBH"))
YES, NO, UNASKED = "yes", "NO", "-"


class Answer(NamedTuple):
    """What a kernel does: in a word or a figure, whether that is good, whether it was promised, and what was found."""

    word: str
    good: bool
    promised: bool = True
    found: str = ""


Question = Callable[[Any], Answer]


def matrix(
    backends: Iterable[Any], progress: Callable[[str], None] | None = None, place: Here | Apart = Here()
) -> dict[str, dict[str, Answer]]:
    """Ask every backend everything.

    Parameters
    ----------
    backends : iterable of Backend
        Instances.
    progress : callable, optional
        Called with "BACKEND: QUESTION" before each question.
    place : Here or Apart, optional
        Where the backends run, as :func:`rau.testing.check_backend` takes it.

    Returns
    -------
    dict of str to dict of str to Answer
        By the backend's name and the question, in the order of :data:`QUESTIONS`.
    """
    rows: dict[str, dict[str, Answer]] = {}
    for backend in backends:
        row, patience = rows.setdefault(backend.name, {}), Patience(place)
        for name in QUESTIONS:
            if progress is not None:
                progress(f"{backend.name}: {name}")
            try:
                row[name] = patience.call(_answer, backend, name)
            except NoAnswer as lost:
                row[name] = Answer(NO, False, _promised(name, backend), str(lost))
    return rows


def _answer(backend: Any, name: str) -> Answer:
    with registry.provisionally(backend):
        try:
            return QUESTIONS[name](backend)
        except Exception as error:  # of the backend's
            return Answer(NO, False, _promised(name, backend), described(error))


def _promised(name: str, backend: Any) -> bool:
    return name not in backend.capabilities.unpromised and not (name == STRIDES and backend.capabilities.contiguous)


def _keeps(backend: Any) -> Answer:
    takes = backend.capabilities
    return Answer(f"lse, base {takes.lse_base}" if takes.statistics == "lse" else "max and sum", True)


def _property(name: str, backend: Any) -> Answer:
    if reasons := unasked(backend, name):
        return Answer(UNASKED, True, False, "; ".join(reasons))
    problems = tried(backend, name)
    return Answer(NO if problems else YES, not problems, _promised(name, backend), problems[0] if problems else "")


def _error(dtype: str, backend: Any) -> Answer:
    """The largest error, as a share of the bound of the kernel's kind."""
    case = replace(ordinary_case(backend, f"matrix/{dtype}", 400), dtype=dtype)
    if reasons := excluded_by(backend, case):
        return Answer(UNASKED, True, False, "; ".join(reasons))
    problems, comparison = check_case(backend, case)
    worst = np.inf if comparison is None else max(comparison.attn_share, comparison.sum_share)
    return Answer(f"{worst:.2f}", not problems, True, problems[0] if problems else "")


def _rounding(backend: Any) -> Answer:
    """How many elements are the exact result, rounded to 16 bits to nearest even."""
    shares = []
    for dtype in NARROW:
        case = replace(ordinary_case(backend, f"matrix/rounding-{dtype}", 400), dtype=dtype)
        if excluded_by(backend, case):
            continue
        numbers = case.fill()
        result, problems = run_case(backend, case, numbers)
        if result is None:
            return Answer(NO, False, True, problems[0])
        exact = expected_of(case.make(numbers), backend).attn_out.astype(np.float32).astype(named_dtype(dtype))
        shares.append(float((widen(result.attn_out) == widen(exact)).mean()))
    if not shares:
        return Answer(UNASKED, True, False, "it takes no 16-bit outputs")
    return Answer(f"{min(shares):.2%}", min(shares) >= 0.99)


def _states(backend: Any) -> Answer:
    """How many states it merges, and how."""
    takes, case = backend.capabilities, replace(ordinary_case(backend, "matrix/states", 20), states=9)
    most = "" if takes.max_states is None else f" up to {takes.max_states}"
    if reasons := excluded_by(backend, case):
        few = takes.max_states is not None and takes.max_states < case.states
        return Answer(f"{takes.max_states} at most" if few else UNASKED, True, False, "; ".join(reasons))
    problems = check_case(backend, case)[0]
    word = f"{'in pairs' if folds(backend, case) else 'at once'}{most}"
    return Answer(NO if problems else word, not problems, True, problems[0] if problems else "")


def _layouts(backend: Any) -> Answer:
    """In which layouts it is right, of those that it takes."""
    right: list[str] = []
    wrong: list[str] = []
    found = ""
    for layout, order in LAYOUTS:
        ordinary = ordinary_case(backend, f"matrix/{layout}-{order}", 12)
        case = replace(ordinary, layout=layout, softmax_layout=order, lengths=(5, 0, 7))
        if excluded_by(backend, case):
            continue
        problems = check_case(backend, case)[0]
        (wrong if problems else right).append(f"{layout} packed" if order == "SBH" else layout)
        found = found or "".join(problems[:1])
    told = f"wrong in {', '.join(wrong)}: {found}" if wrong else ", ".join(right)
    return Answer(f"{len(right)} of {len(LAYOUTS)}", not wrong, True, told)


def _gradients(backend: Any) -> Answer:
    """Whether the kernel's own result has a gradient, and the right one with respect to the outputs.

    That of the sum of all elements with respect to an element of a side is the side's weight: what the merge of ones with
    zeros gives, and is held to the bound of that.
    """
    kernel = getattr(backend, "merge_lse", None)
    if kernel is None or "torch:Tensor" not in backend.capabilities.array_types:
        return Answer(UNASKED, True, False, "no kernel of log-sum-exps in torch tensors")
    case = Case(id="matrix/gradients", layout=backend.layout, tokens=12, lengths=(12,), heads=4, head_dim=64)
    states = case.fill()
    lses = [state.lse(base=backend.capabilities.lse_base, layout=case.layout, lse_layout=backend.lse_layout) for state in states]
    outs = [backend.asarray(state.attn_out).requires_grad_() for state in states]
    tensors = [backend.asarray(np.ascontiguousarray(lse)).requires_grad_() for lse in lses]
    try:
        out = kernel(outs[0], tensors[0], outs[1], tensors[1])[0]
        if not out.requires_grad:
            return Answer(NO, False, False, "its result has no gradient")
        out.sum().backward()
    except RuntimeError as error:  # torch's, or the kernel's own refusal
        return Answer(NO, False, False, described(error))
    for side, of_side in enumerate(outs):
        ones = [state._replace(attn_out=np.full_like(state.attn_out, k == side)) for k, state in enumerate(states)]
        expected = oracle(ones, None, case.layout, **held_to(backend))
        kind = kind_of(of_side.grad)
        if kind is None:
            return Answer(NO, False, False, "an output has no gradient")
        off = np.abs(kind.to_numpy(of_side.grad) - expected.attn_out) / expected.attn_bound
        if not off.max() <= 1:
            return Answer(NO, False, False, f"the gradient of an output is off by {off.max():.3g} times the bound of its weight")
    without = [tensor.grad is None for tensor in tensors]
    return Answer("of outputs only", False, False) if any(without) else Answer(YES, True, False)


QUESTIONS: dict[str, Question] = {
    "keeps": _keeps,
    **{name: partial(_property, name) for name in PROPERTIES},
    **{f"error, {dtype}": partial(_error, dtype) for dtype in ITEMSIZE},
    "rounded right": _rounding,
    "states": _states,
    "layouts": _layouts,
    STRIDES: partial(_property, STRIDES),
    "gradients": _gradients,
}
