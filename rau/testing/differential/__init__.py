"""The differential harness: several backends on the same bits, against one another and against the oracle.

The rule of this room: nobody is the reference. Each backend has a trial of its own, and then their bits are compared; what
went wrong is made small, and written so that it can be run again.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from rau import registry
from rau.errors import ConstraintError, UnknownBackendError
from rau.plugins import OURS
from rau.state import AttentionState
from rau.testing.apart import PATIENCE, Apart, Here, NoAnswer
from rau.testing.cases import Case, generated, named
from rau.testing.causes import EXCLUDED, FAILED, PASSED, Grid, add_grid, cause_of, count
from rau.testing.comparison import same_bits, shares
from rau.testing.differential.record import Record, Recorded, write_record
from rau.testing.differential.shrink import shrink
from rau.testing.reference.oracle import Expected, widen
from rau.testing.trial import excluded_by, expected_of, problem_of, run_case
from rau.testing.trial.judge import held_to, judge_values, keeps_lse, promises_bits
from rau.testing.under_test import load, spelled

BINS = 20  # of the histogram of shares, over [0, 1]; one more holds what is beyond
CAUSES = 8  # for each backend or pair, of which a smallest case is looked for: it takes seconds
_DEATHS = 15  # by weight, in which a case that crashes may be made smaller


@dataclass
class Standing:
    """How one backend did.

    Attributes
    ----------
    cases : int
        Cases that it ran.
    excluded : dict of str to str
        Cases that its capabilities exclude, with the reason.
    attn_shares, sum_shares : dict of str to float
        Its worst errors, as shares of the bound, by the dtype of the result: each has a bound of its own.
    worst : str
        Id of the case with the worst share in attn_out.
    histogram : ndarray of int64, shape (BINS + 1,)
        How many elements of attn_out have which share; elements that are exact bit for bit are in the first bin.
    grid : dict
        How many cases passed, failed and were excluded, by layout and dtype.
    """

    cases: int = 0
    excluded: dict[str, str] = field(default_factory=dict)
    attn_shares: dict[str, float] = field(default_factory=dict)
    sum_shares: dict[str, float] = field(default_factory=dict)
    worst: str = ""
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(BINS + 1, np.int64))
    grid: Grid = field(default_factory=dict)

    def add(self, other: Standing) -> None:
        """Take in how it did on other cases."""
        if other.worst and (other.attn_share > self.attn_share or not self.worst):
            self.worst = other.worst
        self.cases += other.cases
        self.excluded |= other.excluded
        for mine, its in ((self.attn_shares, other.attn_shares), (self.sum_shares, other.sum_shares)):
            for dtype, share in its.items():
                mine[dtype] = max(mine.get(dtype, 0.0), share)
        self.histogram += other.histogram
        add_grid(self.grid, other.grid)

    @property
    def attn_share(self) -> float:
        """The worst of all dtypes."""
        return max(self.attn_shares.values(), default=0.0)

    @property
    def sum_share(self) -> float:
        """The worst of all dtypes."""
        return max(self.sum_shares.values(), default=0.0)


@dataclass
class Pair:
    """How two backends compare.

    Attributes
    ----------
    cases : int
        Cases that both ran.
    different : int
        Those with a difference in bits.
    share : float
        Largest difference between the two, as a share of the oracle's bound.
    first : str
        The first difference, with its case.
    """

    cases: int = 0
    different: int = 0
    share: float = 0.0
    first: str = ""

    def add(self, other: Pair) -> None:
        """Take in how they compare on other cases."""
        self.cases += other.cases
        self.different += other.different
        self.share = max(self.share, other.share)
        self.first = self.first or other.first


@dataclass
class Finding:
    """Cases that went wrong for one cause, and the smallest of them.

    Attributes
    ----------
    case : Case
        As small as it could be made.
    backend : str
        The backend that got it wrong, or the two that differ, as "one, other".
    message : str
    cause : str
        What their messages have in common.
    ids : list of str
        Those of all the cases.
    file : str
        Where the case was written; empty if it was not.
    backends : str
        How the command line names its backends; empty if it knows all of them unasked.
    """

    case: Case
    backend: str
    message: str
    cause: str = ""
    ids: list[str] = field(default_factory=list)
    file: str = ""
    backends: str = ""

    @property
    def replay(self) -> str:
        """The command that runs it again: the file, or the case that it was made from where there is none."""
        chosen = f" --backends {shlex.quote(self.backends)}" if self.backends else ""
        which = f"--replay {shlex.quote(self.file)}" if self.file else f"--select {shlex.quote(self.case.id)}"
        return f"python -m rau difftest {which}{chosen}"


@dataclass
class Differential:
    """The report of :func:`run_differential`.

    Attributes
    ----------
    cases : int
    standings : dict of str to Standing
        By backend.
    pairs : dict of (str, str) to Pair
    findings : list of Finding
        One for each cause of each backend or pair, up to `CAUSES`; `wrong` counts all cases.
    wrong : dict of str to int
        How many cases went wrong, by backend or pair.
    stopped : bool
        Whether it ended before the last case, after many in a row in which a process crashed or hung.
    """

    cases: int = 0
    standings: dict[str, Standing] = field(default_factory=dict)
    pairs: dict[tuple[str, str], Pair] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    wrong: dict[str, int] = field(default_factory=dict)
    stopped: bool = False

    def add(self, other: Differential) -> None:
        """Take in the statistics of other cases; what went wrong in them is the business of who ran them."""
        self.cases += other.cases
        for name, standing in other.standings.items():
            self.standings.setdefault(name, Standing()).add(standing)
        for names, pair in other.pairs.items():
            self.pairs.setdefault(names, Pair()).add(pair)

    @property
    def passed(self) -> bool:
        """Whether every backend ran something and nothing went wrong."""
        return not self.wrong and all(standing.cases for standing in self.standings.values())

    def __str__(self) -> str:
        lines = [f"{self.cases} cases: {'no difference' if self.passed else 'DIFFERENCES'}"]
        for name, standing in self.standings.items():
            lines.append(
                f"  {name}: {standing.cases} cases, {len(standing.excluded)} excluded; worst {standing.attn_share:.3f} "
                f"(attn_out) and {standing.sum_share:.3f} (softmax_sum) of the bound"
            )
            lines += [
                f"    {dtype}: {share:.3f} (attn_out) and {standing.sum_shares[dtype]:.3f} (softmax_sum)"
                for dtype, share in standing.attn_shares.items()
            ]
        for (one, other), pair in self.pairs.items():
            different = f"{pair.different} with different bits, {pair.share:.3g} of the bound"
            lines.append(f"  {one}, {other}: {pair.cases} cases, {different}")
        for finding in self.findings:
            lines.append(f"  WRONG {finding.backend}: {finding.case.id}: {finding.message}")
            if finding.file:
                lines.append(f"    {finding.replay}")
        return "\n".join(lines)


def run_differential(
    backends: Sequence[Any],
    cases: Iterable[Case] | None = None,
    *,
    folder: Path | None = None,
    progress: Callable[[Differential], None] | None = None,
    into: Differential | None = None,
    place: Here | Apart = Here(),
) -> Differential:
    """Run every case on every backend and compare the results.

    Parameters
    ----------
    backends : sequence of Backend or type or str
        Backends as in :func:`rau.testing.check_backend`.
    cases : iterable of Case, optional
        By default the named cases and a thousand generated ones. May be endless, if `progress` ends it with an
        exception.
    folder : path, optional
        Where the smallest failing cases are written.
    progress : callable, optional
        Called with the report after each case.
    into : Differential, optional
        A report to continue, so that what was found is kept if the run is interrupted.
    place : Here or Apart, optional
        Where the backends run, as :func:`rau.testing.check_backend` takes it.

    Returns
    -------
    Differential

    Notes
    -----
    A backend is wrong where a value is beyond the bound at ``capabilities.tolerance``, or where it fails any other
    check of `rau.testing.trial`. Two backends that declare tolerance 1, and are not wrong, must have the same bits.

    Examples
    --------
    >>> from rau.testing.cases import Case
    >>> print(run_differential(["numpy"], [Case(id="mine")]))
    1 cases: no difference
      numpy: 1 cases, 0 excluded; worst 0... (attn_out) and 0... (softmax_sum) of the bound
        float32: 0... (attn_out) and 0... (softmax_sum)
    """
    instances = _instances(backends)
    report = into if into is not None else Differential()
    for instance in instances:
        report.standings.setdefault(instance.name, Standing())
    for one, other in combinations(report.standings, 2):
        report.pairs.setdefault((one, other), Pair())
    if cases is None:
        cases = [*named(), *generated(0, 1000)]
    lost_in_a_row = 0
    for case in cases:
        if lost_in_a_row >= PATIENCE:
            report.stopped = True
            break
        verdicts, one_case, lost = _run(place, instances, case)
        asked = any(standing.cases for name, standing in one_case.standings.items() if name not in OURS)
        lost_in_a_row = lost_in_a_row + lost if lost or not asked else 0
        report.add(one_case)
        for who, message in verdicts:
            report.wrong[who] = report.wrong.get(who, 0) + 1
            cause = cause_of(message)
            known = [finding for finding in report.findings if finding.backend == who]
            same = next((finding for finding in known if finding.cause == cause), None)
            if same is not None:
                same.ids.append(case.id)
            elif len(known) < CAUSES:
                finding = Finding(case, who, message, cause, [case.id])
                finding.backends = spelled(_involved(finding, instances))
                report.findings.append(finding)
                _make_small(place, finding, instances, folder)
        if progress is not None:
            progress(report)
    return report


def run_recorded(recorded: Record, backends: Sequence[Any], place: Here | Apart = Here()) -> Differential:
    """Run a recorded call again, and compare: the recording counts as one more backend, for whose bits nothing is promised.

    Parameters
    ----------
    recorded : Record
        From :func:`rau.testing.differential.record.read_record`.
    backends : sequence of Backend or type or str
    place : Here or Apart, optional
        Where the backends run.

    Returns
    -------
    Differential

    Raises
    ------
    ConstraintError
        If the arrays do not make a valid call.
    """
    problem_of(recorded.case.make(recorded.states))
    then = [] if recorded.observed is None else [Recorded(recorded.observed, recorded.lse_base, recorded.unpromised)]
    verdicts, report, _ = _run(place, _instances([*then, *backends]), recorded.case, recorded.states)
    for who, message in verdicts:
        if not who.startswith(f"{Recorded.name}, "):
            report.wrong[who] = 1
            report.findings.append(Finding(recorded.case, who, message, cause_of(message), [recorded.case.id]))
    return report


def _instances(backends: Sequence[Any]) -> list[Any]:
    """Load backends; each needs a name of its own."""
    instances = [load(backend) for backend in backends]
    names = [instance.name for instance in instances]
    for name in names:
        if names.count(name) > 1:
            raise UnknownBackendError(f'two of the backends are called "{name}"; give each class its own `name`')
    return instances


Outcome: TypeAlias = tuple[list[tuple[str, str]], Differential]  # who got something wrong, and what; and the statistics


def _outcome(instances: Sequence[Any], case: Case, numbers: list[AttentionState] | None = None) -> Outcome:
    report = Differential(cases=1)
    return list(run_on_all(instances, case, report, numbers)), report


def _run(
    place: Here | Apart, instances: Sequence[Any], case: Case, numbers: list[AttentionState] | None = None
) -> tuple[list[tuple[str, str]], Differential, int]:
    """Run one case on every backend, and find out which of them it is that does not answer; what that weighs comes last."""
    try:
        return *place.call(_outcome, instances, case, numbers), 0
    except NoAnswer as lost:
        suspects = [instance for instance in instances if instance.name not in (*OURS, Recorded.name)] or instances
        if len(suspects) == 1:
            (guilty,) = suspects
            report = Differential(cases=1, standings={guilty.name: Standing(cases=1)})
            count(report.standings[guilty.name].grid, case, FAILED)
            rest = [instance for instance in instances if instance is not guilty]
            verdicts, others, more = _run(place, rest, case, numbers) if rest else ([], Differential(), 0)
            others.cases = 0
            report.add(others)
            return [(guilty.name, str(lost)), *verdicts], report, max(lost.weight, more)
        found: list[tuple[str, str]] = []
        report, weight = Differential(), 0
        for instance in instances:
            verdicts, one, more = _run(place, [instance], case, numbers)
            found, weight = found + verdicts, max(weight, more)
            report.add(one)
        report.cases = 1
        together = [(instance.name, f"{lost}, though not when it runs alone") for instance in suspects]
        return found if weight else found + together, report, weight or lost.weight


def _make_small(place: Here | Apart, finding: Finding, instances: Sequence[Any], folder: Path | None) -> None:
    """Look for the smallest case that goes wrong for the same cause, and write it to a file."""
    involved, deaths = _involved(finding, instances), 0

    def still_wrong(case: Case) -> str:
        nonlocal deaths
        if deaths >= _DEATHS:
            return ""
        try:
            verdicts = place.call(_verdicts, involved, case)
        except NoAnswer as lost:
            deaths += lost.weight
            verdicts = [(finding.backend, str(lost))]
        return next((said for who, said in verdicts if who == finding.backend and cause_of(said) == finding.cause), "")

    try:
        if not finding.message.startswith("hung"):  # it would take too long
            for smaller in shrink(finding.case, still_wrong):
                finding.case, finding.message = smaller
    finally:  # an interrupted search has found something too
        if folder is not None:
            _write(place, finding, involved[0], folder)


def _verdicts(instances: Sequence[Any], case: Case) -> list[tuple[str, str]]:
    try:
        return list(run_on_all(instances, case))
    except ConstraintError:  # too small for its profile, or no valid call at all
        return []


def run_on_all(
    instances: Sequence[Any], case: Case, report: Differential | None = None, numbers: list[AttentionState] | None = None
) -> Iterator[tuple[str, str]]:
    """Run one case on every backend: who got something wrong, and what. `report` takes the statistics.

    `numbers` are the input states, where they come from elsewhere than ``case.fill()``.
    """
    report = report if report is not None else Differential()
    try:
        numbers = case.fill() if numbers is None else numbers
        pristine = case.make(numbers)
    except (ImportError, OSError) as error:  # of ml_dtypes; a system that reserves no memory that it may not have
        for instance in instances:
            standing = report.standings.setdefault(instance.name, Standing())
            standing.excluded[case.id] = str(error)
            count(standing.grid, case, EXCLUDED)
        return
    problem, expected = problem_of(pristine), expected_of(pristine)
    results: list[tuple[Any, AttentionState]] = []
    blamed: set[str] = set()
    for instance in instances:
        standing = report.standings.setdefault(instance.name, Standing())
        reasons = excluded_by(instance, case, problem)
        if reasons:
            standing.excluded[case.id] = "; ".join(reasons)
            count(standing.grid, case, EXCLUDED)
            continue
        standing.cases += 1
        with registry.provisionally(instance):
            result, problems = run_case(instance, case, numbers)
        if result is not None:
            own = expected_of(pristine, instance) if held_to(instance) else expected
            comparison = judge_values(instance, case, numbers, result, own)
            problems = [*comparison.problems, *problems]
            if comparison.attn_share > standing.attn_share or not standing.worst:
                standing.worst = case.id
            for worst, share in ((standing.attn_shares, comparison.attn_share), (standing.sum_shares, comparison.sum_share)):
                worst[case.dtype] = max(worst.get(case.dtype, 0.0), share)
            standing.histogram += histogram(result, own)
            results.append((instance, result))
        count(standing.grid, case, FAILED if problems else PASSED)
        if problems:
            blamed.add(instance.name)
            yield instance.name, "; ".join(problems)
    for (one, mine), (other, its) in combinations(results, 2):
        pair = report.pairs.setdefault((one.name, other.name), Pair())
        pair.cases += 1
        differences = same_bits(mine, its)
        if differences:
            pair.different += 1
            pair.share = max(pair.share, _apart(mine, its, expected))
            pair.first = pair.first or f"{case.id}: {differences[0]}"
            told = {one.name, other.name} & blamed  # that one of them is wrong explains the difference
            if promises_bits(one, case) and promises_bits(other, case) and not told:
                yield f"{one.name}, {other.name}", "; ".join(differences)


def histogram(result: AttentionState, expected: Expected) -> np.ndarray:
    """Count the elements of attn_out by their share of the bound, (BINS + 1,); the last bin holds what is beyond 1."""
    if result.attn_out.shape != expected.attn_out.shape or not result.attn_out.size:
        return np.zeros(BINS + 1, np.int64)
    share = shares(
        widen(result.attn_out), expected.attn_out, expected._attn_low, expected.attn_error, expected.dtype
    ).ravel()
    place = np.where(share > 1.0, BINS, np.minimum(share * BINS, BINS - 1)).astype(np.int64)
    return np.bincount(place, minlength=BINS + 1)


def _apart(one: AttentionState, other: AttentionState, expected: Expected) -> float:
    """The largest difference between two outputs, as a share of the bound."""
    if one.attn_out.shape != other.attn_out.shape or not one.attn_out.size:
        return 0.0
    with np.errstate(all="ignore"):
        apart = np.abs(widen(one.attn_out) - widen(other.attn_out)) / expected.attn_bound
    return float(np.max(np.where(np.isfinite(apart), apart, 0.0), initial=0.0))


def observed(backend: Any, case: Case) -> AttentionState | None:
    """Run a case, for what comes of it; None where nothing does."""
    with registry.provisionally(backend):
        return run_case(backend, case).result


def _write(place: Here | Apart, finding: Finding, first: Any, folder: Path) -> None:
    """Write a failing case to a file."""
    case = finding.case
    name = re.sub(r"[^\w.-]+", "-", f"{finding.backend}-{case.id}")
    path = folder / f"{name}.npz"
    try:
        result = None if finding.message.startswith("hung") else place.call(observed, first, case)
    except NoAnswer:
        result = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        base = first.capabilities.lse_base if keeps_lse(first) else ""
        write_record(path, case, case.make().states, result, base, first.capabilities.unpromised)
    except OSError as error:
        finding.message += f" (and the case could not be written: {error})"
    else:
        finding.file = str(path)


def _involved(finding: Finding, instances: Sequence[Any]) -> list[Any]:
    return [instance for instance in instances if instance.name in finding.backend.split(", ")]
