"""The differential harness: several backends on the same bits, against one another and against the oracle."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from rau import registry
from rau.state import AttentionState
from rau.testing import checks, record
from rau.testing.bits import same_bits
from rau.testing.cases import Case, generated, named
from rau.testing.comparison import compare, shares
from rau.testing.conformance import load
from rau.testing.expected import Expected, widen

BINS = 20  # of the histogram of shares, over [0, 1]; one more holds what is beyond


@dataclass
class Standing:
    """What came of one backend.

    Attributes
    ----------
    cases : int
        Cases that it ran.
    excluded : dict of str to str
        Cases that its capabilities exclude, with the reason.
    attn_share, sum_share : float
        Its worst errors, as shares of the bound.
    worst : str
        Id of the case with the worst attn_share.
    histogram : ndarray of int64, shape (BINS + 1,)
        How many elements of attn_out have which share; elements that are exact bit for bit are in the first bin.
    """

    cases: int = 0
    excluded: dict[str, str] = field(default_factory=dict)
    attn_share: float = 0.0
    sum_share: float = 0.0
    worst: str = ""
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(BINS + 1, np.int64))


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
        Who got it wrong, or the two that differ, as "one, other".
    message : str
    file : str
        Where the case was written; empty where it was not.
    """

    case: Case
    backend: str
    message: str
    file: str = ""

    @property
    def replay(self) -> str:
        """The command that runs it again."""
        return f"python -m rau difftest --replay {shlex.quote(self.file)}" if self.file else ""


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
                f"  {name}: {standing.cases} cases, {len(standing.excluded)} excluded; worst {standing.attn_share:.3f} (attn_out) "
                f"and {standing.sum_share:.3f} (softmax_sum) of the bound"
            )
        for (one, other), pair in self.pairs.items():
            lines.append(f"  {one}, {other}: {pair.cases} cases, {pair.different} with different bits, {pair.share:.3g} of the bound")
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
    """Run every case on every backend and compare all of them.

    Parameters
    ----------
    backends : sequence of Backend or type or str
        As :func:`rau.testing.check_backend` takes them.
    cases : iterable of Case, optional
        The named cases and a thousand generated ones by default. It may be endless, if `progress` ends it by an
        exception.
    folder : path, optional
        Where the smallest failing cases are written.
    progress : callable, optional
        Called with the report after each case.
    into : Differential, optional
        A report to continue, so that what was found is kept when the run is interrupted.

    Returns
    -------
    Differential

    Notes
    -----
    A backend is wrong where a value is beyond ``capabilities.tolerance`` times the bound, or where it fails any other
    check of :mod:`rau.testing.checks`. Two backends that declare tolerance 1 must have the same bits.

    Examples
    --------
    >>> from rau.testing.cases import Case
    >>> print(run_differential(["numpy"], [Case(id="mine")]))
    1 cases: no difference
      numpy: 1 cases, 0 excluded; worst 0... (attn_out) and 0... (softmax_sum) of the bound
    """
    instances = [load(backend) for backend in backends]
    report = into if into is not None else Differential()
    for instance in instances:
        report.standings.setdefault(instance.name, Standing())
    for one, other in combinations(report.standings, 2):
        report.pairs.setdefault((one, other), Pair())
    if cases is None:
        cases = [*named(), *generated(0, 1000)]
    for case in cases:
        for who, message in judge(instances, case, report):
            report.wrong[who] = report.wrong.get(who, 0) + 1
            if all(finding.backend != who for finding in report.findings):
                report.findings.append(_smallest(instances, case, who, message, folder))
        report.cases += 1
        if progress is not None:
            progress(report)
    return report


def judge(instances: Sequence[Any], case: Case, report: Differential | None = None) -> Iterator[tuple[str, str]]:
    """Run one case on every backend.

    Parameters
    ----------
    instances : sequence of Backend
    case : Case
    report : Differential, optional
        Takes the statistics.

    Yields
    ------
    who, message : str
        What went wrong, and whose it is.
    """
    pristine = case.make()
    problem, expected = checks.problem_of(pristine), checks.expected_of(pristine)
    report = report if report is not None else Differential()
    results: list[tuple[Any, AttentionState]] = []
    for instance in instances:
        standing = report.standings.setdefault(instance.name, Standing())
        reasons = instance.capabilities.limits_broken(problem)
        if reasons:
            standing.excluded[case.id] = "; ".join(reasons)
            continue
        standing.cases += 1
        with registry.provisionally(instance):
            result, problems = checks.run(instance, case)
        if result is not None:
            comparison = compare(result, expected, tolerance=instance.capabilities.tolerance)
            problems = [*comparison.problems, *problems]
            if comparison.attn_share > standing.attn_share or not standing.worst:
                standing.attn_share, standing.worst = comparison.attn_share, case.id
            standing.sum_share = max(standing.sum_share, comparison.sum_share)
            standing.histogram += histogram(result, expected)
            results.append((instance, result))
        if problems:
            yield instance.name, "; ".join(problems)
    for (one, mine), (other, its) in combinations(results, 2):
        pair = report.pairs.setdefault((one.name, other.name), Pair())
        pair.cases += 1
        differences = same_bits(mine, its)
        if differences:
            pair.different += 1
            pair.share = max(pair.share, _apart(mine, its, expected))
            pair.first = pair.first or f"{case.id}: {differences[0]}"
            if one.capabilities.tolerance == other.capabilities.tolerance == 1:
                yield f"{one.name}, {other.name}", "; ".join(differences)


def histogram(result: AttentionState, expected: Expected) -> np.ndarray:
    """Count the elements of attn_out by their share of the bound.

    Parameters
    ----------
    result : AttentionState
    expected : Expected

    Returns
    -------
    ndarray of int64, shape (BINS + 1,)
        The last bin holds what is beyond 1.
    """
    if result.attn_out.shape != expected.attn_out.shape or not result.attn_out.size:
        return np.zeros(BINS + 1, np.int64)
    share = shares(
        widen(result.attn_out), expected.attn_out, expected._attn_low, expected.attn_bound, expected.dtype
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


def _smallest(instances: Sequence[Any], case: Case, who: str, message: str, folder: Path | None) -> Finding:
    """Make a failing case smaller as long as the same backend, or pair, still fails."""
    names = who.split(", ")
    involved = [instance for instance in instances if instance.name in names]

    def wrong(candidate: Case) -> str:
        return next((said for blamed, said in judge(involved, candidate) if blamed == who), "")

    shrinking = True
    while shrinking:
        shrinking = False
        for candidate in _smaller(case):
            said = wrong(candidate)
            if said:
                case, message, shrinking = candidate, said, True
                break
    file = ""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{who.replace(', ', '-')}-{case.id.replace('/', '-')}.npz"
        states = case.make().states
        observed = checks.run(involved[0], case).result
        record.save(path, case, states, observed)
        file = str(path)
    return Finding(case, who, message, file)


def _smaller(case: Case) -> Iterator[Case]:
    """Cases a step simpler, the largest steps first."""
    for name, least in (("tokens", 1), ("batch", 1), ("heads", 1), ("head_dim", 1)):
        value = getattr(case, name)
        for smaller in dict.fromkeys((least, value // 4, value // 2, value - 1)):
            if least <= smaller < value and not (name == "tokens" and case.layout == "TND"):
                yield replace(case, **{name: smaller})
    if case.layout == "TND" and len(case.lengths) > 1:
        half = len(case.lengths) // 2
        for kept in (case.lengths[:half], case.lengths[half:], case.lengths[1:], case.lengths[:-1]):
            yield replace(case, lengths=kept, tokens=sum(kept))
    for place, length in enumerate(case.lengths[:8]):
        if length > 1:
            for shorter in dict.fromkeys((1, length // 2, length - 1)):
                kept = (*case.lengths[:place], shorter, *case.lengths[place + 1 :])
                yield replace(case, lengths=kept, tokens=sum(kept))
    if case.states > 2 and case.out != "cur":
        yield replace(case, states=2)
        yield replace(case, states=case.states - 1)
    plain = {
        "out": "fresh", "attn_placement": "contiguous", "stats_placement": "contiguous", "out_placement": "contiguous",
        "read_only": False, "aliased": False, "qlen": "array", "statistics": "ordinary", "outputs": "ordinary",
    }  # fmt: skip
    for name, value in plain.items():
        if getattr(case, name) != value and not (name == "qlen" and not case.lengths):
            yield replace(case, **{name: value})
