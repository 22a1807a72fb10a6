"""One trial: a case on a backend, and all that can be said of it: values, kind, inputs, outputs, determinism.

The rule of this room: one backend and one case at a time; what to try, and what comes of it, is for the rooms above.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from rau import threads
from rau.arrays import kind_of
from rau.constraints import Options, bind
from rau.layouts import FIELDS
from rau.problem import Problem
from rau.state import AttentionState
from rau.testing.cases import Case, CaseCall
from rau.testing.comparison import Comparison, same_bits
from rau.testing.reference.oracle import Expected, oracle
from rau.testing.trial.judge import held_to, judge_values
from rau.testing.under_test import described, host_state


def problem_of(call: CaseCall) -> Problem:
    """Describe a case's call, on its NumPy arrays, or raise what is wrong with it."""
    case = call.case
    out = None if call.out is None else [part.view for part in call.out]
    options = Options(case.layout, case.softmax_layout, case.profile, "metadata")
    problem, _ = bind(case.id, call.states, lambda k, field: f"states[{k}].{FIELDS[field]}", case.lengths_argument(), options, out)
    return problem


def excluded_by(backend: Any, case: Case, problem: Problem | None = None) -> list[str]:
    """List what excludes a case: a backend's capabilities, or a library that is missing; its `problem`, if that is known."""
    try:
        reasons = backend.capabilities.limits_broken(problem or problem_of(case.make(case.blank())))
    except ImportError as error:  # of ml_dtypes
        return [str(error)]
    except OSError as error:  # a system that reserves no memory that it may not have
        return [f"no room here: {error}"]
    # The bound of a log-sum-exp says itself where it promises nothing.
    if backend.capabilities.tolerance > 1 and backend.capabilities.statistics == "max_sum" and case.needs_float64_rows:
        reasons.append(f"tolerance {backend.capabilities.tolerance:g}: it is not held to what only float64 rows decide")
    return list(reasons)


def ordinary_case(backend: Any, id: str, tokens: int) -> Case:
    """Make an ordinary case, in what the backend takes."""
    takes = backend.capabilities
    return Case(
        id=id, layout=takes.layouts[0], softmax_layout=takes.softmax_layouts[0], tokens=tokens, lengths=(tokens,), heads=4,
        head_dim=64, lanes=takes.lanes[0], dtype="float32" if "float32" in takes.dtypes else takes.dtypes[0],
    )  # fmt: skip


def expected_of(call: CaseCall, backend: Any = None) -> Expected:
    """Ask the oracle about a case's call that was not run yet: what the contract asks, or that of a backend's kind."""
    case, kind = call.case, {} if backend is None else held_to(backend)
    return oracle(call.states, case.lengths_argument(), case.layout, softmax_layout=case.softmax_layout, **kind)


class CaseRun(NamedTuple):
    """What a backend did with one case."""

    result: AttentionState | None  # as NumPy arrays; None where the call failed
    problems: list[str]  # what it did wrong beside the values


def run_case(backend: Any, case: Case, numbers: list[AttentionState] | None = None) -> CaseRun:
    """Run a case on a backend's own arrays and look at everything but the values; `numbers` stand for ``case.fill()``."""
    numbers = numbers or case.fill()
    call, pristine = case.make(numbers), case.make(numbers)
    try:
        return _run(backend, call, pristine)
    except Exception as error:  # of the backend, in its conversions too
        return CaseRun(None, [described(error)])


def _run(backend: Any, call: CaseCall, pristine: CaseCall) -> CaseRun:
    converted: dict[int, Any] = {}

    def convert(array: np.ndarray) -> Any:
        if id(array) not in converted:
            converted[id(array)] = backend.asarray(array)
        return converted[id(array)]

    states = [AttentionState(*(convert(part) for part in state)) for state in call.states]
    out = None if call.out is None else AttentionState(*(convert(part.view) for part in call.out))
    result = call.case.call(states, out, backend)
    problems = []
    if not isinstance(result, tuple) or len(result) != 3:
        return CaseRun(None, [f"returned a {type(result).__name__}; expected an AttentionState"])
    kind = kind_of(states[0].attn_out)
    for name, part in zip(FIELDS, result, strict=True):
        its = kind_of(part)
        if kind is None or its is None or its.name != kind.name:
            problems.append(f"{name} is a {type(part).__name__}; expected the inputs' kind")
        elif its.device(part) != kind.device(states[0].attn_out):
            problems.append(f"{name} is on {its.device(part)}; expected {kind.device(states[0].attn_out)}")
    if problems:
        return CaseRun(None, problems)
    if out is None:
        inputs = {id(part) for state in states for part in state}
        problems += [
            f"{name} is an input itself; expected a fresh array"
            for name, part in zip(FIELDS, result, strict=True)
            if id(part) in inputs
        ]
    else:
        problems += [
            f"{name} was given by out, and another array came back"
            for name, mine, its in zip(FIELDS, out, result, strict=True)
            if mine is not its
        ]
    as_numpy = host_state(backend, result)
    written = [] if out is None else list(map(id, out))
    for k, (before, after) in enumerate(zip(pristine.states, states, strict=True)):
        # What is written to compares with itself.
        now = [
            old if id(part) in written else np.asarray(backend.to_numpy(part))
            for old, part in zip(before, after, strict=True)
        ]
        problems += [f"states[{k}] was changed: {change}" for change in same_bits(before, now)]
    if call.out is not None and not all(part.guards_intact() for part in call.out):
        problems.append("wrote beside its output")
    return CaseRun(as_numpy, problems)


def check_case(
    backend: Any, case: Case, expected: Expected | None = None, numbers: list[AttentionState] | None = None
) -> tuple[list[str], Comparison | None]:
    """Run one case and judge all of it: what is wrong, and the values against the oracle, None where there were none."""
    numbers = numbers or case.fill()
    if expected is None:
        expected = expected_of(case.make(numbers), backend)
    result, problems = run_case(backend, case, numbers)
    if result is None:
        return problems, None
    comparison = judge_values(backend, case, numbers, result, expected)
    problems = [*comparison.problems, *problems]
    if backend.capabilities.deterministic:
        problems += _repeated(backend, case, numbers, result)
    return problems, comparison


def _repeated(backend: Any, case: Case, numbers: list[AttentionState], result: AttentionState) -> list[str]:
    """Run a case once more, with another number of threads."""
    before = threads.get_num_threads()
    threads.set_num_threads(1 if before > 1 else 2)
    try:
        again, _ = run_case(backend, case, numbers)
    finally:
        threads.set_num_threads(before)
    if again is None:
        return ["a second run failed"]
    return [f"two runs differ: {difference}" for difference in same_bits(result, again)]
