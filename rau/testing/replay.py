"""Running a recorded call again, and judging what was recorded with it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

from rau import registry
from rau.state import AttentionState
from rau.testing import checks, folding
from rau.testing.bits import same_bits
from rau.testing.comparison import Comparison, compare
from rau.testing.record import Record


class Outcome(NamedTuple):
    """What came of one backend, or of the recorded output.

    Attributes
    ----------
    name : str
        The backend's; "recorded" for the output in the file.
    problems : list of str
        What is wrong with it.
    comparison : Comparison or None
        Its values against the oracle; None where there were none.
    excluded : str
        Why it was not run; empty where it was.
    differs : list of str
        Where its bits are not those of the recorded output.
    """

    name: str
    problems: list[str]
    comparison: Comparison | None = None
    excluded: str = ""
    differs: list[str] = []  # noqa: RUF012 - never written to


class Replay(NamedTuple):
    """What :func:`replay` found.

    Attributes
    ----------
    recorded : Outcome or None
        None where the file holds no output.
    outcomes : list of Outcome
    pairs : list of str
        Differences in bits between backends that promise to have none.
    """

    recorded: Outcome | None
    outcomes: list[Outcome]
    pairs: list[str]

    @property
    def ran(self) -> bool:
        """Whether any backend ran the call."""
        return any(not outcome.excluded for outcome in self.outcomes)

    @property
    def wrong(self) -> bool:
        """Whether a backend is wrong now, whatever was recorded."""
        return bool(self.pairs) or any(outcome.problems for outcome in self.outcomes)


def replay(record: Record, backends: Sequence[Any]) -> Replay:
    """Run a recorded call again.

    Parameters
    ----------
    record : Record
        From :func:`rau.testing.record.load`.
    backends : sequence of Backend

    Returns
    -------
    Replay

    Raises
    ------
    ConstraintError
        If the arrays make no valid call.
    """
    case, numbers = record.case, record.states
    call = case.make(numbers)
    problem, expected = checks.problem_of(call), checks.expected_of(call)
    recorded = None
    if record.observed is not None:
        comparison = compare(record.observed, expected)
        recorded = Outcome("recorded", list(comparison.problems), comparison)
    outcomes: list[Outcome] = []
    exact: list[tuple[str, AttentionState]] = []  # of the backends that promise the same bits
    for backend in backends:
        reasons = backend.capabilities.limits_broken(problem)
        if reasons:
            outcomes.append(Outcome(backend.name, [], None, "; ".join(reasons)))
            continue
        with registry.provisionally(backend):
            result, problems = checks.run(backend, case, numbers)
        if result is None:
            outcomes.append(Outcome(backend.name, problems))
            continue
        comparison = folding.judge(backend, case, numbers, result, expected)
        differs = same_bits(result, record.observed) if record.observed is not None else []
        outcomes.append(Outcome(backend.name, [*comparison.problems, *problems], comparison, "", differs))
        if folding.promises_bits(backend, case):
            exact.append((backend.name, result))
    pairs = [
        f"{one}, {other}: {difference}"
        for (one, mine), (other, its) in combinations(exact, 2)
        for difference in same_bits(mine, its)
    ]
    return Replay(recorded, outcomes, pairs)
