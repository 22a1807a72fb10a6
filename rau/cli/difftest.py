"""``python -m rau difftest``: compare backends with one another and with the oracle, on thousands of cases."""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rau.cli import case_options, outcomes, session
from rau.cli.console import Step, progress, save_page, table

if TYPE_CHECKING:
    from rau.testing.apart import Apart, Here
    from rau.testing.cases import Case
    from rau.testing.differential import Differential, Finding

_GENERATED = 1000  # cases, unless the command line says otherwise
_FOLDER = "rau-difftest"  # of failing cases, without --report
_EXAMPLES = session.examples(
    "difftest", "difftest --backends mykernel:Mine,numpy --minutes 2 --report out",
    "difftest --backends mykernel:Mine --replay rau-difftest/mine.npz", "difftest --select 'tnd/*' --cases 0",
)  # fmt: skip
_INTERVAL = 0.1  # seconds between two states of the live line


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    parser = subparsers.add_parser(
        "difftest",
        help="compare backends bit for bit with one another, and with the oracle",
        description="Run the named cases, and generated ones, on every backend. For each backend or pair that goes "
        "wrong, the smallest failing case is written to a file, with the command that replays it.",
        epilog=f"{_EXAMPLES}\n\n{session.EXIT_STATUS}",
    )
    session.add_backends(parser)
    session.add_tables(parser)
    length = parser.add_mutually_exclusive_group()
    text = f"how many generated cases to add to the named ones (default: {_GENERATED})"
    length.add_argument("--cases", type=session.whole(0), metavar="N", help=text)
    text = "instead, generate cases until M minutes have passed, such as 0.5"
    length.add_argument("--minutes", type=session.positive, metavar="M", help=text)
    text = "instead, run one recorded call again, and compare the recorded output too; a recorded output that is wrong "
    text += "fails the run, unless --backends names the backends in question"
    length.add_argument("--replay", type=session.path, metavar="FILE", help=text)
    case_options.add_options(parser)
    text = f"write an HTML page, DIR/index.html, and failing cases beside it (otherwise to ./{_FOLDER}); needs rich"
    parser.add_argument("--report", type=session.path, metavar="DIR", help=text)
    session.add_apart(parser)
    return parser


@dataclass
class DifftestRun:
    """One run: what was asked for, and the outcome."""

    report: Differential
    tolerances: dict[str, float]  # that the backends declare, by their names
    options: dict[str, Any]
    not_run: dict[str, str]  # backends that are not available, with the reasons
    configuration: dict[str, Any]
    seconds: float = 0.0
    interrupted: bool = False
    running: str = ""  # the case that was given to the backends last
    advice: Sequence[list[str]] = ()  # on each of the findings

    @property
    def findings(self) -> list[Finding]:
        """What was found, the worst first."""
        from rau.testing.causes import severity

        return sorted(self.report.findings, key=lambda finding: (severity(finding.cause), -len(finding.ids)))

    @property
    def idle(self) -> list[str]:
        """Backends that ran nothing, if they were named or all of them are."""
        idle = [name for name in self.tolerances if not self.report.standings[name].cases]
        return idle if self.options["backends"] or len(idle) == len(self.tolerances) else []

    @property
    def passed(self) -> bool:
        """Whether nothing went wrong, in a run that came to its end."""
        return not (self.report.wrong or self.interrupted or self.idle)

    @property
    def verdict(self) -> str:
        """The outcome in one line."""
        report = self.report
        tally = f"{session.counted(report.cases, 'case')} in {self.seconds:.0f} s"
        running = f" in {self.running}" if self.running else ""
        if report.wrong:
            wrong = [self._wrong(who, count) for who, count in report.wrong.items()]
            ended = f" (interrupted{running})" * self.interrupted
            ended += " (ended there: too many in a row crashed or hung)" * report.stopped
            return f"FAILED: {tally}{ended}: {', '.join(wrong)}"
        if self.interrupted:
            return f"INTERRUPTED{running}: {tally}, nothing wrong so far"
        if self.idle:
            return f"FAILED: {tally}, of which {', '.join(self.idle)} ran none"
        different = sum(pair.different for pair in report.pairs.values())
        bits = f"{different} with different bits, " if report.pairs else ""
        recorded = "".join(f"; {finding.backend} is wrong" for finding in report.findings)
        beyond = any(standing.attn_share > 1 or standing.sum_share > 1 for standing in report.standings.values())
        return f"PASSED: {tally}, {bits}none beyond {'its tolerance' if beyond and not recorded else 'the bound'}{recorded}"

    def _wrong(self, who: str, count: int) -> str:
        """Word how often a backend is wrong, or two differ: as often as their table says."""
        one, _, other = who.partition(", ")
        if not other:
            return f"{who} is wrong on {count:,} of them"
        pair = self.report.pairs[one, other]
        unexplained = f" ({count:,} without either being wrong)" if count < pair.different else ""
        return f"{session.both(who)} differ on {pair.different:,} of them{unexplained}"

    def title(self, name: str) -> str:
        """Name a backend, with its tolerance where that is not 1."""
        tolerance = self.tolerances.get(name, 1)
        return name if tolerance == 1 else f"{name} (tolerance {tolerance:g})"

    def document(self) -> dict[str, Any]:
        """All of it as plain data."""
        report = self.report
        return {
            "passed": self.passed,
            "interrupted": self.interrupted,
            "verdict": self.verdict,
            "cases": report.cases,
            "seconds": self.seconds,
            "options": self.options,
            "backends": {
                name: asdict(standing)
                | {"excluded": {reason: len(ids) for reason, ids in session.by_reason(standing.excluded.items())}}
                | {"attn_share": standing.attn_share, "sum_share": standing.sum_share}
                | {"tolerance": self.tolerances.get(name, 1), "wrong": report.wrong.get(name, 0)}
                for name, standing in report.standings.items()
            },
            "pairs": [{"backends": names} | asdict(pair) for names, pair in report.pairs.items()],
            "findings": [
                asdict(finding) | {"replay": finding.replay, "advice": advice}
                for finding, advice in zip(self.findings, self.advice, strict=True)
            ],
            "not_run": self.not_run,
            "configuration": self.configuration,
        }


def run(arguments: argparse.Namespace) -> int:
    """Run the comparison: 0 passed, 1 failed, 130 interrupted before anything was wrong."""
    # Late, as in all commands: --help does not pay for what a run needs.
    from rau.config import collect
    from rau.testing.differential import Differential

    session.check_form(arguments.form)
    if arguments.replay:
        case_options.refuse_beside("--replay", arguments)
    folder = Path(_FOLDER) if arguments.report is None else session.report_folder(arguments.report)  # the former when needed
    asked = ("backends", "cases", "minutes", "replay", "select", "dtype", "layout", "seed")
    options = {name: getattr(arguments, name) for name in asked}
    with session.under_test(arguments.backends, arguments) as (backends, not_run, place):
        tolerances = {backend.name: backend.capabilities.tolerance for backend in backends}
        this = DifftestRun(Differential(), tolerances, options, not_run, collect())
        started = time.monotonic()
        if arguments.replay:
            _replay(this, arguments, backends, place)
        else:
            _compare(this, arguments, backends, folder, place)
    this.seconds = time.monotonic() - started
    this.advice = [_advice(this, finding) for finding in this.findings]
    lines = _words(this)
    if arguments.form:
        session.print_table(arguments.form, _records(this))
    elif arguments.json:
        session.print_json(this.document())
    else:
        print(*lines, this.verdict, sep="\n", flush=True)
    if arguments.report:  # last: where it cannot be written, all that was found has been told
        session.save(arguments.report, lambda: _save_page(this, lines, folder / "index.html"))
        if not (arguments.json or arguments.form):
            print(f"report: {folder / 'index.html'}")
    return session.exit_status(this.passed, bool(this.report.wrong), this.interrupted)


def _replay(this: DifftestRun, arguments: argparse.Namespace, backends: list[Any], place: Here | Apart) -> None:
    """Compare what is recorded in a file with what backends make of the call now."""
    from rau.testing.differential import record, run_recorded

    recorded = record.read_record(arguments.replay)
    if recorded.observed is not None and any(part is None for part in recorded.observed):
        recorded = recorded._replace(observed=None)  # of which parts cannot stand beside a backend's
    this.report = run_recorded(recorded, backends, place)
    if arguments.backends is not None:  # the question is whether these are right now, whatever was recorded
        this.report.wrong.pop(record.Recorded.name, None)
    if not (arguments.json or arguments.form):
        print(session.heading(this.configuration))
        print(f"\nreplaying {arguments.replay}: {case_options.describe(recorded.case)}")


def _compare(
    this: DifftestRun, arguments: argparse.Namespace, backends: list[Any], folder: Path, place: Here | Apart
) -> None:
    """Run the named cases, then generated ones, on every backend."""
    from rau.testing.differential import run_differential

    named = case_options.named_cases(arguments)
    count = _GENERATED if arguments.cases is None else arguments.cases
    if not named and not any(True for _ in case_options.generated_cases(arguments, min(count, 1))):
        raise session.UsageError("no case matches --select, --dtype and --layout; see python -m rau cases")
    if not (arguments.json or arguments.form):
        names = ", ".join(this.tolerances)
        print(session.heading(this.configuration))
        print(f"\ncomparing {names}{'' if len(backends) > 1 else ' with the oracle'}", flush=True)
    seconds = None if arguments.minutes is None else 60 * arguments.minutes
    cases = _cases(this, arguments, named, count, None if seconds is None else time.monotonic() + seconds)
    try:
        with progress(seconds or len(named) + count, quiet=bool(arguments.json or arguments.form)) as step:
            shown = _Shown(step, timed=seconds is not None)
            run_differential(backends, cases, folder=folder, progress=shown, into=this.report, place=place)
    except KeyboardInterrupt:
        this.interrupted = True


def _cases(
    this: DifftestRun, arguments: argparse.Namespace, named: list[Case], count: int, end: float | None
) -> Iterator[Case]:
    """The named cases, then generated ones: `count`, or until the end, whichever is given."""
    generated = case_options.generated_cases(arguments, *() if end is not None else (count,))
    for case in itertools.chain(named, generated):
        if end is not None and time.monotonic() >= end:
            return
        this.running = case.id
        yield case


class _Shown:
    """The live line: cases done, how fast, how bad."""

    def __init__(self, step: Step, timed: bool) -> None:
        self.step, self.timed = step, timed
        self.started = self.last = time.monotonic()
        self.cases = 0

    def __call__(self, report: Differential) -> None:
        now = time.monotonic()
        if now - self.last < _INTERVAL:
            return
        worst = max(standing.attn_share for standing in report.standings.values())
        wrong = f", {sum(report.wrong.values())} WRONG" if report.wrong else ""
        rate = report.cases / (now - self.started)
        weight = now - self.last if self.timed else report.cases - self.cases
        self.step(f"{report.cases:,} cases, {rate:.0f}/s, worst {session.share(worst)}{wrong}", weight)
        self.last, self.cases = now, report.cases


def _records(this: DifftestRun) -> list[dict[str, Any]]:
    """The figures of each backend, by dtype, for a table elsewhere."""
    return [
        {
            "backend": name, "dtype": dtype, "tolerance": this.tolerances.get(name, 1), "attn_out share": share,
            "softmax_sum share": standing.sum_shares[dtype], "cases": standing.cases, "wrong": this.report.wrong.get(name, 0),
        }
        for name, standing in this.report.standings.items()
        for dtype, share in standing.attn_shares.items()
    ]  # fmt: skip


def _words(this: DifftestRun) -> list[str]:
    """The report but for its verdict, line by line."""
    report = this.report
    columns = ["backend", "cases", "excluded", "wrong", "attn_out", "softmax_sum", "worst case"]
    rows = [
        [
            this.title(name), f"{standing.cases:,}", f"{len(standing.excluded):,}", f"{report.wrong.get(name, 0):,}",
            session.share(standing.attn_share), session.share(standing.sum_share), standing.worst,
        ]
        for name, standing in report.standings.items()
    ]  # fmt: skip
    lines = ["", *table(columns, rows, right=columns[1:6]), ""]
    columns = ["worst by dtype", "dtype", "attn_out", "softmax_sum"]
    rows = [
        [this.title(name), dtype, session.share(share), session.share(standing.sum_shares[dtype])]
        for name, standing in report.standings.items()
        for dtype, share in standing.attn_shares.items()
    ]
    lines += [*table(columns, rows, right=columns[2:]), "", session.LEGEND]
    if report.pairs:
        columns = ["pair", "cases", "different bits", "apart"]
        rows = [
            [" and ".join(names), f"{pair.cases:,}", f"{pair.different:,}", f"{pair.share:.3g}"]
            for names, pair in report.pairs.items()
        ]
        lines += ["", *table(columns, rows, right=columns[1:]), "", "apart: largest difference, as a share of the bound"]
    lines += ["", *_histograms(this)]
    for names, pair in report.pairs.items():
        if pair.first:
            lines.append(f"first difference of {' and '.join(names)}: {pair.first}")
    for name, standing in report.standings.items():
        for reason, ids in outcomes.by_limit(standing.excluded.items()):
            lines.append(f"excluded from {name}: {session.counted(len(ids), 'case')}: {reason}")
    lines += [f"not run: {name} ({reason})" for name, reason in this.not_run.items()]
    for name, standing in report.standings.items():
        if report.wrong.get(name):
            lines += ["", *outcomes.grid_lines(standing.grid), "", f"{name}: {outcomes.GRID_LEGEND}"]
    for finding, advice in zip(this.findings, this.advice, strict=True):
        lines += ["", f"WRONG: {session.both(finding.backend)}: {outcomes.briefly(finding.message)}"]
        if not this.options["replay"]:
            cause = f": {finding.cause}" if finding.cause != finding.message else ""
            lines.append(f"    {session.counted(len(finding.ids), 'case')} like this{cause}")
            lines.append(f"    smallest failing case: {case_options.describe(finding.case)}")
            lines.append(f"    again: {finding.replay}")
            lines += [f"    {line}" for line in advice]
    for who, count in report.wrong.items():
        more = count - sum(len(finding.ids) for finding in report.findings if finding.backend == who)
        if more:
            counted = session.counted(more, "case")
            lines.append(f"WRONG: {session.both(who)}: {counted} more, of other causes; mend these first")
    return [*lines, ""]


def _advice(this: DifftestRun, finding: Finding) -> list[str]:
    """Say what is known of a mistake, where it is one of numbers."""
    from rau.testing.diagnosis import diagnose
    from rau.testing.differential import record

    if not finding.file or finding.backend not in this.report.standings:  # two that differ are both right
        return []
    recorded = record.read_record(finding.file)
    if recorded.observed is None or " is " not in finding.cause:
        return []
    found = diagnose(recorded, tolerance=this.tolerances[finding.backend])
    slight = [] if found.recognised or not found.slight else outcomes.tolerance_advice([finding.message])
    more = [f"more of it: python -m rau diagnose {shlex.quote(finding.file)}"]
    return [*(slight or outcomes.advice(found)), *more]


def _histograms(this: DifftestRun) -> list[str]:
    """How many elements of attn_out have which share of the bound; a bar grows by two for each factor of ten."""
    tenths = {
        name: [*standing.histogram[:-1].reshape(10, -1).sum(1).tolist(), int(standing.histogram[-1])]
        for name, standing in this.report.standings.items()
    }
    shares = [*(f"{tenth / 10:.1f} to {(tenth + 1) / 10:.1f}" for tenth in range(10)), "beyond"]
    rows = [
        [share, *(f"{count:13,} {'#' * round(2 * math.log10(count) + 1) if count else '':15}" for count in counts)]
        for share, counts in zip(shares, zip(*tenths.values(), strict=True), strict=True)
    ]
    legend = "number of elements of attn_out by error; exact ones are in the first row; bars are logarithmic"
    return [*table(["of the bound", *tenths], rows), "", legend, ""]


def _save_page(this: DifftestRun, lines: list[str], path: Path) -> None:
    """Save the report as one page, which opens from disk and fetches nothing; failing cases beside it are linked."""
    command = ["python", "-m", "rau", "difftest"]
    for name, value in this.options.items():
        if value is not None:
            command += [f"--{name}", ",".join(value) if isinstance(value, list) else str(value)]
    title = f"{datetime.now().astimezone():%d %B %Y, %H:%M %Z}: {shlex.join(command)}"
    failures = [
        f"{session.both(finding.backend)}: {finding.cause}: {session.counted(len(finding.ids), 'case')}: "
        + ", ".join(finding.ids)
        for finding in this.findings
    ]
    failures = ["all failures", *failures] if failures else []
    text = "\n".join([title, "", this.verdict, "", session.heading(this.configuration), *lines, *failures])
    styles = {r"(?m)^PASSED.*": "bold green", r"(?m)^(FAILED|INTERRUPTED|WRONG).*": "bold red"}
    links = {finding.file: Path(finding.file).name for finding in this.report.findings if finding.file}
    save_page("difftest", text, path, styles, links)
