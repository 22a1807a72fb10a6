"""The differential harness: several backends on the same bits, against one another and against the oracle.

The rule of this room: nobody is the reference. Each backend has a trial of its own, and then their bits are compared; what
went wrong is made small, and written so that it can be run again.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from rau import registry
from rau.errors import ConstraintError, RauError, UnknownBackendError
from rau.state import AttentionState
from rau.testing.cases import Case, generated, named
from rau.testing.comparison import same_bits, shares
from rau.testing.differential.record import Record, Recorded, write_record
from rau.testing.differential.shrink import shrink
from rau.testing.reference.oracle import Expected, widen
from rau.testing.trial import excluded_by, expected_of, problem_of, run_case
from rau.testing.trial.judge import held_to, judge_values, keeps_lse, promises_bits
from rau.testing.under_test import load

BINS = 20  # of the histogram of shares, over [0, 1]; one more holds what is beyond


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
    """

    cases: int = 0
    excluded: dict[str, str] = field(default_factory=dict)
    attn_shares: dict[str, float] = field(default_factory=dict)
    sum_shares: dict[str, float] = field(default_factory=dict)
    worst: str = ""
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(BINS + 1, np.int64))

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


@dataclass
class Finding:
    """One case that went wrong.

    Attributes
    ----------
    case : Case
        As small as it could be made.
    backend : str
        The backend that got it wrong, or the two that differ, as "one, other".
    message : str
    file : str
        Where the case was written; empty if it was not.
    backends : str
        How the command line names its backends; empty if it knows all of them unasked.
    """

    case: Case
    backend: str
    message: str
    file: str = ""
    backends: str = ""

    @property
    def replay(self) -> str:
        """The command that runs it again."""
        if not self.file:
            return ""
        chosen = f" --backends {shlex.quote(self.backends)}" if self.backends else ""
        return f"python -m rau difftest --replay {shlex.quote(self.file)}{chosen}"


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
        At most one for each backend or pair, the smallest; `wrong` counts them all.
    wrong : dict of str to int
        How many cases went wrong, by backend or pair.
    """

    cases: int = 0
    standings: dict[str, Standing] = field(default_factory=dict)
    pairs: dict[tuple[str, str], Pair] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    wrong: dict[str, int] = field(default_factory=dict)

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

    Returns
    -------
    Differential

    Notes
    -----
    A backend is wrong where a value is beyond the bound at ``capabilities.tolerance``, or where it fails any other
    check of :mod:`rau.testing.trial`. Two backends that declare tolerance 1, and are not wrong, must have the same bits.

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
    for case in cases:
        for who, message in run_on_all(instances, case, report):
            report.wrong[who] = report.wrong.get(who, 0) + 1
            if all(finding.backend != who for finding in report.findings):
                finding = Finding(case, who, message)
                finding.backends = _spelled(_involved(finding, instances))
                report.findings.append(finding)
                try:
                    for smaller in shrink(case, partial(_still_wrong, finding, instances)):
                        finding.case, finding.message = smaller
                finally:  # an interrupted search has found something too
                    if folder is not None:
                        _write(finding, instances, folder)
        report.cases += 1
        if progress is not None:
            progress(report)
    return report


def run_recorded(recorded: Record, backends: Sequence[Any]) -> Differential:
    """Run a recorded call again, and compare: the recording counts as one more backend, for whose bits nothing is promised.

    Parameters
    ----------
    recorded : Record
        From :func:`rau.testing.differential.record.read_record`.
    backends : sequence of Backend or type or str

    Returns
    -------
    Differential

    Raises
    ------
    ConstraintError
        If the arrays do not make a valid call.
    """
    observed = [] if recorded.observed is None else [Recorded(recorded.observed, recorded.lse_base, recorded.unpromised)]
    report = Differential(cases=1)
    for who, message in run_on_all(_instances([*observed, *backends]), recorded.case, report, recorded.states):
        if not who.startswith(f"{Recorded.name}, "):
            report.wrong[who] = 1
            report.findings.append(Finding(recorded.case, who, message))
    return report


def _instances(backends: Sequence[Any]) -> list[Any]:
    """Load backends; each needs a name of its own."""
    instances = [load(backend) for backend in backends]
    names = [instance.name for instance in instances]
    for name in names:
        if names.count(name) > 1:
            raise UnknownBackendError(f'two of the backends are called "{name}"; give each class its own `name`')
    return instances


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
            report.standings.setdefault(instance.name, Standing()).excluded[case.id] = str(error)
        return
    problem, expected = problem_of(pristine), expected_of(pristine)
    results: list[tuple[Any, AttentionState]] = []
    blamed: set[str] = set()
    for instance in instances:
        standing = report.standings.setdefault(instance.name, Standing())
        reasons = excluded_by(instance, case, problem)
        if reasons:
            standing.excluded[case.id] = "; ".join(reasons)
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


def _still_wrong(finding: Finding, instances: Sequence[Any], case: Case) -> str:
    try:
        verdicts = run_on_all(_involved(finding, instances), case)
        return next((message for who, message in verdicts if who == finding.backend), "")
    except ConstraintError:  # too small for its profile, or no valid call at all
        return ""


def _write(finding: Finding, instances: Sequence[Any], folder: Path) -> None:
    """Write a failing case to a file."""
    case = finding.case
    name = re.sub(r"[^\w.-]+", "-", f"{finding.backend}-{case.id}")
    path = folder / f"{name}.npz"
    first = _involved(finding, instances)[0]
    with registry.provisionally(first):
        observed = run_case(first, case).result
    try:
        folder.mkdir(parents=True, exist_ok=True)
        base = first.capabilities.lse_base if keeps_lse(first) else ""
        write_record(path, case, case.make().states, observed, base, first.capabilities.unpromised)
    except OSError as error:
        finding.message += f" (and the case could not be written: {error})"
    else:
        finding.file = str(path)


def _spelled(instances: Sequence[Any]) -> str:
    """Name backends as the command line takes them; empty where the registry knows all of them."""
    known = [_is_registered(instance) for instance in instances]
    classes = [type(instance) for instance in instances]
    return "" if all(known) else ",".join(
        instance.name if registered else f"{cls.__module__}:{cls.__qualname__}"
        for instance, cls, registered in zip(instances, classes, known, strict=True)
    )  # fmt: skip


def _is_registered(instance: Any) -> bool:
    try:
        return registry.get(instance.name) is instance
    except RauError:
        return False


def _involved(finding: Finding, instances: Sequence[Any]) -> list[Any]:
    return [instance for instance in instances if instance.name in finding.backend.split(", ")]
