"""What came of a run of ``python -m rau difftest``: its verdict, and all of it as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rau.cli import session

if TYPE_CHECKING:
    from rau.testing.differential import Differential


@dataclass
class Run:
    """One run: what was asked for, and what came of it.

    Attributes
    ----------
    report : Differential
    seconds : float
    interrupted : bool
    tolerances : dict of str to float
        What the backends declare.
    options : dict
        What was asked for on the command line.
    not_run : dict of str to str
        Backends that are not available, with the reasons.
    configuration : dict
        From :func:`rau.config.collect`.
    """

    report: Differential
    tolerances: dict[str, float]
    options: dict[str, Any]
    not_run: dict[str, str]
    configuration: dict[str, Any]
    seconds: float = 0.0
    interrupted: bool = False

    def title(self, name: str) -> str:
        """Name a backend, with its tolerance where that is not 1."""
        tolerance = self.tolerances[name]
        return name if tolerance == 1 else f"{name} (tolerance {tolerance:g})"

    @property
    def wrong(self) -> bool:
        """Whether anything went wrong so far."""
        return bool(self.report.wrong)

    @property
    def passed(self) -> bool:
        """Whether nothing did, in a run that came to its end."""
        return self.report.passed and self.report.cases > 0 and not self.interrupted

    @property
    def verdict(self) -> str:
        """All of it in a line."""
        report = self.report
        tally = f"{session.counted(report.cases, 'case')} in {self.seconds:.0f} s"
        if report.wrong:
            wrong = [
                f"{session.both(who)} {'differ' if ', ' in who else 'is wrong'} on {count:,} of them"
                for who, count in report.wrong.items()
            ]
            return f"FAILED: {tally}{' (interrupted)' * self.interrupted}: {', '.join(wrong)}"
        if self.interrupted:
            return f"INTERRUPTED: {tally}, nothing wrong so far"
        idle = [name for name, standing in report.standings.items() if not standing.cases]
        if idle or not report.cases:
            return f"FAILED: {tally}, of which {', '.join(idle) or 'no backend'} ran none"
        different = sum(pair.different for pair in report.pairs.values())
        bits = f"{different} with different bits, " if report.pairs else ""
        return f"PASSED: {tally}, {bits}none beyond the bound"


def document(this: Run) -> dict[str, Any]:
    """The answer as plain data.

    Parameters
    ----------
    this : Run

    Returns
    -------
    dict
    """
    report = this.report
    return {
        "passed": this.passed,
        "interrupted": this.interrupted,
        "verdict": this.verdict,
        "cases": report.cases,
        "seconds": this.seconds,
        "options": this.options,
        "backends": {
            name: {
                "cases": standing.cases,
                "excluded": {reason: len(ids) for reason, ids in session.by_reason(standing.excluded.items())},
                "tolerance": this.tolerances[name],
                "wrong": report.wrong.get(name, 0),
                "attn_share": standing.attn_share,
                "sum_share": standing.sum_share,
                "by_dtype": {
                    dtype: {"attn_share": share, "sum_share": standing.sum_shares[dtype]}
                    for dtype, share in standing.attn_shares.items()
                },
                "worst_case": standing.worst,
                "histogram": standing.histogram.tolist(),
            }
            for name, standing in report.standings.items()
        },
        "pairs": [{"backends": names, **asdict(pair)} for names, pair in report.pairs.items()],
        "findings": [
            {
                "backend": finding.backend,
                "case": asdict(finding.case),
                "message": finding.message,
                "file": finding.file,
                "replay": finding.replay,
            }
            for finding in report.findings
        ],
        "not_run": this.not_run,
        "configuration": this.configuration,
    }
