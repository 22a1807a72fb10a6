"""The conformance kit: hold any backend to the contract, from Python or from pytest.

The rule of this room: whatever is asked of a backend is a :class:`Check`, with an id, and a reason where it is excluded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any, ClassVar

import numpy as np

from rau import registry
from rau.errors import BackendUnavailableError, ShapeError
from rau.testing.apart import LONG, Apart, Here, NoAnswer, Patience
from rau.testing.cases import Case, generated, named
from rau.testing.cases.placements import PACKED_PLACEMENTS
from rau.testing.comparison import same_bits
from rau.testing.conformance.autograd import autograd
from rau.testing.conformance.laws import laws
from rau.testing.conformance.properties import STRIDES, tried
from rau.testing.conformance.report import Check, Report
from rau.testing.conformance.streaming import streams
from rau.testing.trial import check_case, excluded_by, ordinary_case, run_case
from rau.testing.under_test import load
from rau.update import ring_attention_update

GENERATED = 400  # cases in addition to the named ones


def check_backend(
    backend: Any,
    expected_failures: Mapping[str, str] | None = None,
    *,
    cases: Iterable[Case] | None = None,
    select: str = "*",
    progress: Callable[[str, int, int], None] | None = None,
    into: Report | None = None,
    place: Here | Apart = Here(),
) -> Report:
    """Hold a backend to the contract.

    Parameters
    ----------
    backend : Backend or type or str
        An instance, a class, a registered name, or "module:Class".
    expected_failures : mapping of str to str, optional
        Ids (or patterns with ``*``) of checks that are known to fail, each with the reason. They are strict: one that
        passes, or matches nothing, is a failure.
    cases : iterable of Case, optional
        What to run: by default the named cases and several hundred generated ones.
    select : str, default "*"
        Pattern for the ids of the checks to run; those of what is not promised are "unpromised/NAME".
    progress : callable, optional
        Called with (id, how many checks are done, how many there are) before each check.
    into : Report, optional
        A report to fill, so that what was found is kept if the run is interrupted.
    place : Here or Apart, optional
        Where the checks run: here, or in a process of its own (`rau.testing.apart`), which may crash or hang without
        ending this one; `backend` is then one of its `backends`. `python -m rau check` does that.

    Returns
    -------
    Report
        `passed`, `failures`, and what was excluded by the backend's capabilities.

    Notes
    -----
    Each case checks the values against the oracle (within the bound at ``capabilities.tolerance``), dtypes and shapes,
    equal lanes, array kind and device, that inputs are unchanged, that `out` is what is returned and nothing else is
    written, and that a second run with another number of threads gives the same bits. In addition there are the laws of
    merging, a StreamingMerge over the backend in each layout, whole and in parts, what autograd is told of writes into torch
    tensors, a wrong call (nothing may be written), and calls from several threads at once.

    What a kernel does not promise (``capabilities.unpromised``, ``contiguous``) is left out of all that, and tried by
    itself: `unpromised` of the report says what came of it, and does not count.

    Examples
    --------
    >>> from rau.testing.cases import Case
    >>> check_backend("numpy", cases=[Case(id="mine", tokens=3)]).passed
    True
    """
    backend = load(backend)
    report = into if into is not None else Report(backend.name)
    takes = backend.capabilities
    aside = {f"unpromised/{name}": name for name in (*takes.unpromised, *[STRIDES] * takes.contiguous)}
    tries = [Check(id, partial(tried, backend, name), []) for id, name in aside.items() if fnmatchcase(id, select)]
    try:
        every = [*place.call(checks, backend, cases, select, seconds=LONG), *tries]
    except NoAnswer as lost:
        raise BackendUnavailableError(f"{backend.name}: while its checks were listed: {lost}") from lost
    patience = Patience(place)
    for done, check in enumerate(every):
        if progress is not None:
            progress(check.id, done, len(every))
        if check.excluded:
            report.exclude(check.id, check.excluded, check.case)
            continue
        if patience.gone:
            report.not_run.append(check.id)
            continue
        try:
            problems = patience.call(_problems, backend, check)
        except NoAnswer as lost:
            problems = [str(lost)]
        if check.id in aside:
            report.unpromised[aside[check.id]] = problems
        else:
            report.record(check.id, problems, check.case)
    report.expect(expected_failures or {})
    return report


def _problems(backend: Any, check: Check) -> list[str]:
    with registry.provisionally(backend):
        return check.problems()


def checks(backend: Any, cases: Iterable[Case] | None = None, select: str = "*") -> list[Check]:
    """List all the checks of a backend whose ids match a pattern, those of the cases first."""
    every = []
    for case in _cases() if cases is None else cases:
        case = _fitting(backend, case)
        if fnmatchcase(case.id, select):
            every.append(Check(case.id, partial(_case, backend, case), excluded_by(backend, case), case))
    every += [*laws(backend), *streams(backend), *autograd(backend)]
    every.append(Check("calls/wrong-call-writes-nothing", partial(_wrong_call, backend), []))
    several = [ordinary_case(backend, f"calls/threads-{i}", 40 + i) for i in range(4)]
    together = partial(_several_threads, backend, several)
    every.append(Check("calls/several-threads-at-once", together, excluded_by(backend, several[0])))
    return [check for check in every if fnmatchcase(check.id, select)]


@cache
def _cases() -> tuple[Case, ...]:
    """What is run by default. Made once: who checks many backends on few cases each would wait for these alone."""
    return *named(), *generated(0, GENERATED)


def _fitting(backend: Any, case: Case) -> Case:
    """A case as the backend takes it: most are about numbers, not about a layout, or about the place of the result."""
    if case.out == "given" and not backend.capabilities.out:
        case = replace(case, out="fresh")
    layouts = backend.capabilities.layouts
    if case.layout != "SBH" or "SBH" in layouts:
        return case
    layout = next((name for name in ("BSND", "BNSD", "TND") if name in layouts), "SBH")
    if layout == "SBH":
        return case
    rows: dict[str, Any] = {}
    if layout == "TND":
        rows = {"batch": 1, "tokens": case.batch * case.tokens, "lengths": (case.tokens,) * case.batch}
        if "TND" not in backend.capabilities.softmax_layouts and case.stats_placement in PACKED_PLACEMENTS:
            rows |= {"softmax_layout": "SBH", "qlen": "array"}
    portable = "portable" if layout != "TND" else case.profile
    return replace(case, id=f"{case.id}@{layout}", layout=layout, profile=portable, **rows)


def _case(backend: Any, case: Case) -> list[str]:
    return check_case(backend, case)[0]


def _wrong_call(backend: Any) -> list[str]:
    case = Case(id="calls/wrong", tokens=5, heads=2, head_dim=64, out="given")
    call = case.make()
    assert call.out is not None
    states = [[backend.asarray(part) for part in state] for state in call.states]
    out = [backend.asarray(part.view) for part in call.out]
    before = [np.array(backend.to_numpy(part)) for part in out]
    short = [states[1][0], states[1][1], backend.asarray(call.states[1].softmax_sum[:, :, :-1])]
    try:
        ring_attention_update(*states[0], *short, out=tuple(out), backend=backend)
    except ShapeError:
        return same_bits(before, [np.asarray(backend.to_numpy(part)) for part in out])
    return ["statistics of unequal shapes were accepted"]


def _several_threads(backend: Any, cases: list[Case]) -> list[str]:
    alone = [run_case(backend, case).result for case in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        together = list(pool.map(lambda case: run_case(backend, case).result, cases * 3))
    problems = []
    for one, other in zip(alone * 3, together, strict=True):
        if one is None or other is None:
            problems.append("a call failed")
        elif backend.capabilities.deterministic:
            problems += same_bits(one, other)
    return problems


class BackendConformance:
    """The kit as a pytest class: derive from it and name your backend.

    Attributes
    ----------
    backend : Backend or type or str
        What to check, as :func:`check_backend` takes it.
    expected_failures : mapping of str to str
        As :func:`check_backend` takes it.

    Examples
    --------
    >>> class TestMine(BackendConformance):
    ...     backend = "numpy"
    """

    backend: ClassVar[Any] = None
    expected_failures: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def pytest_generate_tests(cls, metafunc: Any) -> None:
        """Make a test from each check: excluded ones are skipped with the reason, expected failures are strict."""
        import pytest  # only this class is for it

        if "check" not in metafunc.fixturenames:
            return
        assert cls.backend is not None, f"{cls.__qualname__}: set the class attribute `backend`"
        backend = load(cls.backend)
        parameters = []
        for check in checks(backend):
            marks = [
                pytest.mark.xfail(strict=True, reason=reason)
                for pattern, reason in cls.expected_failures.items()
                if fnmatchcase(check.id, pattern)
            ]
            if check.excluded:
                marks = [pytest.mark.skip(reason=f"excluded: {'; '.join(check.excluded)}")]
            parameters.append(pytest.param(check, backend, id=check.id, marks=marks))
        metafunc.parametrize(("check", "instance"), parameters)

    def test_conformance(self, check: Check, instance: Any) -> None:
        """Run one check."""
        with registry.provisionally(instance):
            problems = check.problems()
        assert not problems, "\n".join(problems)

    def test_expected_failures_match_something(self) -> None:
        """Fail if an expectation matches no check, which is a mistake."""
        idle = [pattern for pattern in self.expected_failures if not checks(load(self.backend), select=pattern)]
        assert not idle, f"expected failures that match no check: {idle}"
