"""``python -m rau difftest``: backends against one another and against the oracle, on thousands of cases."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rau.cli import case_options, session
from rau.cli.outcome import Run, document

if TYPE_CHECKING:
    from rau.testing.cases import Case
    from rau.testing.differential import Differential

_GENERATED = 1000  # cases, unless the command line says otherwise
_FOLDER = "rau-difftest"  # of failing cases, without --report
_INTERVAL = 0.1  # seconds between two states of the live line


def add_parser(subparsers: Any) -> None:
    """Declare the command.

    Parameters
    ----------
    subparsers : argparse._SubParsersAction
    """
    parser = subparsers.add_parser(
        "difftest",
        help="compare backends bit for bit with one another, and with the oracle",
        description="Run the named cases, and generated ones, on every backend. Of each backend and pair that goes "
        "wrong, the smallest failing case is written to a file, with the command that replays it.",
        epilog=session.EXIT_STATUS,
    )
    text = f"separated by commas (default: all that are available); each {session.BACKEND}"
    parser.add_argument("--backends", metavar="A,B", help=text)
    length = parser.add_mutually_exclusive_group()
    text = f"how many generated cases to add to the named ones (default: {_GENERATED})"
    length.add_argument("--cases", type=int, metavar="N", help=text)
    length.add_argument("--minutes", type=float, metavar="M", help="generate cases for so long instead, such as 0.5")
    case_options.add_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else")
    text = f"write an HTML page there, DIR/index.html, and failing cases beside it (else to ./{_FOLDER})"
    parser.add_argument("--report", metavar="DIR", help=text)
    text = "run one recorded call instead, judge it and the output recorded with it; an output that was recorded wrong "
    text += "fails the run, unless --backends says whose is asked about"
    parser.add_argument("--replay", metavar="FILE", help=text)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the comparison.

    Parameters
    ----------
    arguments : argparse.Namespace

    Returns
    -------
    int
        0: passed, 1: failed, 2: wrong usage or a named backend missing, 130: interrupted before anything was wrong.
    """
    from rau.cli import page, replay
    from rau.config import collect
    from rau.errors import RauError
    from rau.testing.differential import Differential, run_differential

    mistakes = _mistakes(arguments)
    if mistakes:
        return session.refuse("difftest", *mistakes)
    try:
        backends, not_run = session.choose(arguments.backends)
    except RauError as error:
        return session.refuse("difftest", str(error))
    names = [backend.name for backend in backends]
    twice = {name for name in names if names.count(name) > 1}
    if not backends:
        return session.refuse("difftest", "--backends names none")
    if twice:
        text = f"several backends are called {', '.join(twice)}; give each class its own name"
        return session.refuse("difftest", text)
    if arguments.replay:
        return replay.run(arguments, backends, not_run)
    first = case_options.named_cases(arguments)
    count = _GENERATED if arguments.cases is None else arguments.cases
    if not first and not any(True for _ in case_options.generated_cases(arguments, min(count, 1))):
        return session.refuse("difftest", "no case matches --select, --dtype and --layout; see python -m rau cases")
    try:
        folder = Path(arguments.report or _FOLDER)
        if arguments.report:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return session.refuse("difftest", f"--report: {error}")

    asked = ("backends", "cases", "minutes", "select", "dtype", "layout", "seed")
    options = {name: getattr(arguments, name) for name in asked}
    tolerances = {backend.name: backend.capabilities.tolerance for backend in backends}
    this = Run(Differential(), tolerances, options, not_run, collect())
    if not arguments.json:
        print(session.heading(this.configuration))
        print(f"\ncomparing {', '.join(names)}{'' if len(names) > 1 else ' with the oracle'}", flush=True)
    started = time.monotonic()
    seconds = None if arguments.minutes is None else 60 * arguments.minutes
    cases = _cases(arguments, first, count, None if seconds is None else started + seconds)
    try:
        with session.watched(seconds or len(first) + count, arguments.json) as step:
            progress = _Progress(step, timed=seconds is not None)
            run_differential(backends, cases, folder=folder, progress=progress, into=this.report)
    except KeyboardInterrupt:
        this.interrupted = True
    this.seconds = time.monotonic() - started
    if arguments.report:
        (folder / "index.html").write_text(page.render(this), encoding="utf-8")
    if arguments.json:
        session.print_json(document(this))
    else:
        _print_report(this, arguments.report)
        print(this.verdict)
    return session.exit_status(this.passed, this.wrong, this.interrupted)


def _mistakes(arguments: argparse.Namespace) -> list[str]:
    found = []
    if arguments.cases is not None and arguments.cases < 0:
        found.append(f"--cases is {arguments.cases}; expected 0 or more")
    if arguments.minutes is not None and not 0 < arguments.minutes < float("inf"):
        found.append(f"--minutes is {arguments.minutes}; expected more than 0")
    if arguments.seed < 0:
        found.append(f"--seed is {arguments.seed}; expected 0 or more")
    if arguments.replay:
        others = ("cases", "minutes", "dtype", "layout", "report")
        given = [name for name in others if getattr(arguments, name) is not None]
        given += ["select"] * (arguments.select != "*") + ["seed"] * (arguments.seed != 0)
        found += [f"--replay runs one call; --{name} has no place beside it" for name in given]
    return found


def _cases(arguments: argparse.Namespace, first: list[Case], count: int, end: float | None) -> Iterator[Case]:
    """The named cases, then generated ones: `count`, or until the end, whichever is given."""
    if end is None:
        yield from first
        yield from case_options.generated_cases(arguments, count)
        return
    for several in (first, case_options.generated_cases(arguments)):
        for case in several:
            if time.monotonic() >= end:
                return
            yield case


class _Progress:
    """The live line: cases done, how fast, how bad."""

    def __init__(self, step: Any, timed: bool) -> None:
        self.step, self.timed = step, timed
        self.started = self.shown = time.monotonic()
        self.cases = 0

    def __call__(self, report: Differential) -> None:
        now = time.monotonic()
        if now - self.shown < _INTERVAL:
            return
        worst = max(standing.attn_share for standing in report.standings.values())
        wrong = f", {sum(report.wrong.values())} WRONG" if report.wrong else ""
        rate = report.cases / (now - self.started)
        weight = now - self.shown if self.timed else report.cases - self.cases
        self.step(f"{report.cases:,} cases, {rate:.0f}/s, worst {session.share(worst)}{wrong}", weight)
        self.shown, self.cases = now, report.cases


def _print_report(this: Run, folder: str | None) -> None:
    from rau.cli.console import print_table

    report = this.report
    columns = ["backend", "cases", "excluded", "wrong", "attn_out", "softmax_sum", "worst case"]
    rows = [
        [
            this.title(name), f"{standing.cases:,}", f"{len(standing.excluded):,}", f"{report.wrong.get(name, 0):,}",
            session.share(standing.attn_share), session.share(standing.sum_share), standing.worst,
        ]
        for name, standing in report.standings.items()
    ]  # fmt: skip
    print_table(columns, rows, right=columns[1:6])
    print(session.LEGEND)
    if report.pairs:
        columns = ["pair", "cases", "different bits", "apart"]
        rows = [
            [" and ".join(names), f"{pair.cases:,}", f"{pair.different:,}", f"{pair.share:.3g}"]
            for names, pair in report.pairs.items()
        ]
        print_table(columns, rows, right=columns[1:])
    for names, pair in report.pairs.items():
        if pair.first:
            print(f"first difference of {' and '.join(names)}: {pair.first}")
    for name, standing in report.standings.items():
        for reason, ids in session.by_reason(standing.excluded.items()):
            print(f"excluded from {name}: {session.counted(len(ids), 'case')}: {reason}")
    for name, reason in this.not_run.items():
        print(f"not run: {name} ({reason})")
    for finding in report.findings:
        case = case_options.describe(finding.case)
        print(f"\nWRONG: {session.both(finding.backend)}, smallest failing case: {case}")
        print(f"    {finding.message}")
        if finding.file:
            print(f"    again: {finding.replay}")
            print(f"    a known mistake? python -m rau diagnose {shlex.quote(finding.file)}")
    if folder:
        print(f"\nreport: {Path(folder) / 'index.html'}")
    print()
