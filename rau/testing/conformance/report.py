"""A check, and the report on many: what passed, what failed, what was excluded and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from rau.backends import PROPERTIES
from rau.testing.cases import Case
from rau.testing.causes import (
    EXCLUDED,
    FAILED,
    PASSED,
    Cause,
    Grid,
    by_cause,
    cause_of,
    count,
)
from rau.testing.under_test import described


class Check(NamedTuple):
    """One check of one backend."""

    id: str
    run: Callable[[], list[str]]  # returns what is wrong
    excluded: list[str]  # why the backend's capabilities exclude it; empty where they do not
    case: Case | None = None  # the one that it runs, if it is just that

    def problems(self) -> list[str]:
        """Run it; an exception is a problem like any other."""
        try:
            return self.run()
        except Exception as error:
            return [described(error)]


class Failure(NamedTuple):
    """One check that failed: its id, and what was found and what was expected."""

    id: str
    message: str


class Report:
    """The outcome of checking one backend.

    Attributes
    ----------
    backend : str
        Its name.
    succeeded : list of str
        Ids of the checks that passed.
    failures : list of Failure
        The checks that failed without being expected to, and the expectations that were not met.
    expected : list of Failure
        The checks that failed as expected.
    excluded : list of Failure
        The checks that the backend's capabilities exclude, with the reasons. They were not run.
    unpromised : dict of str to list of str
        What the backend does not promise, and what was found that speaks against its doing so all the same: nothing, if it
        does.
    not_run : list of str
        Ids of the checks that were not run any more, after many in a row whose process crashed or hung.
    grid : dict
        How many of the checks that are just a case passed, failed and were excluded, by layout and dtype.
    cases : dict of str to Case
        The cases among the failures, by id.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.succeeded: list[str] = []
        self.failures: list[Failure] = []
        self.expected: list[Failure] = []
        self.excluded: list[Failure] = []
        self.unpromised: dict[str, list[str]] = {}
        self.not_run: list[str] = []
        self.grid: Grid = {}
        self.cases: dict[str, Case] = {}
        self._causes: dict[str, str] = {}

    @property
    def passed(self) -> bool:
        """Whether nothing failed unexpectedly, and something was checked at all, be it what is not promised alone."""
        return not self.failures and bool(self.succeeded or (self.unpromised and not self.excluded))

    def record(self, id: str, problems: list[str], case: Case | None = None) -> None:
        """Note the outcome of one check: no problems if it passed; the case, if it is just that."""
        if problems:
            self.failures.append(Failure(id, "; ".join(problems)))
            self._causes[id] = cause_of(problems[0])
        else:
            self.succeeded.append(id)
        if case is not None:
            count(self.grid, case, FAILED if problems else PASSED)
            self.cases |= {id: case} if problems else {}

    def exclude(self, id: str, reasons: list[str], case: Case | None = None) -> None:
        """Note a check that the backend's capabilities exclude."""
        self.excluded.append(Failure(id, "; ".join(reasons)))
        if case is not None:
            count(self.grid, case, EXCLUDED)

    def by_cause(self) -> list[Cause]:
        """Sort the failures by what their messages have in common, the worst first."""
        return by_cause((id, self._causes.get(id, message), message) for id, message in self.failures)

    def expect(self, expected_failures: Mapping[str, str]) -> None:
        """Take expected failures (id or pattern: reason) out of the failures; one that matches nothing, or passes, fails."""
        outcome = {failure.id: failure for failure in self.failures}
        known = {*outcome, *self.succeeded, *(item.id for item in self.excluded)}
        for pattern, reason in expected_failures.items():
            matches = sorted(id for id in known if fnmatchcase(id, pattern))
            if not matches:
                self.failures.append(Failure(pattern, "an expected failure that matches no check"))
            for id in matches:
                if id in outcome:
                    failure = outcome[id]
                    if failure in self.failures:
                        self.failures.remove(failure)
                        self.expected.append(Failure(id, f"{failure.message} (expected: {reason})"))
                elif id in self.succeeded:
                    self.failures.append(Failure(id, f"expected to fail ({reason}), but passes: take it off the list"))

    def unpromised_lines(self) -> list[str]:
        """Word what is not promised, a line each, and whether the backend does it."""
        return [
            f"does not promise {name} ({PROPERTIES.get(name, 'outputs need not be contiguous')}); "
            f"does it: {f'no: {problems[0]}' if problems else 'yes'}"
            for name, problems in self.unpromised.items()
        ]

    def __str__(self) -> str:
        lines = [
            f"{self.backend}: {'passed' if self.passed else 'FAILED'}: {len(self.succeeded)} checks passed, "
            f"{len(self.failures)} failed, {len(self.expected)} failed as expected, {len(self.excluded)} excluded"
        ]
        for title, items in (("failed", self.failures), ("failed as expected", self.expected)):
            lines += [f"  {title}: {id}: {message}" for id, message in items]
        lines += [f"  {line}" for line in self.unpromised_lines()]
        reasons: dict[str, list[str]] = {}
        for id, reason in self.excluded:
            reasons.setdefault(reason, []).append(id)
        lines += [
            f"  excluded: {reason}: {', '.join(ids[:4])}{f' and {len(ids) - 4} more' if len(ids) > 4 else ''}"
            for reason, ids in reasons.items()
        ]
        return "\n".join(lines)
