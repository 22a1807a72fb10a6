"""``python -m rau check``: hold one backend to the contract."""

from __future__ import annotations

import argparse
import shlex
import time
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from rau.backends import PROPERTIES
from rau.cli import outcomes, session
from rau.cli.console import progress

if TYPE_CHECKING:
    from rau.testing.apart import Apart, Here
    from rau.testing.conformance.report import Report

_EXAMPLES = session.examples(
    "check numpy", "check mykernel:Mine", "check mykernel:Mine --select 'tnd/*'",
    "check mykernel:Mine --expect-failure 'views/*=not yet' --json",
)  # fmt: skip
_SHOWN = 10  # causes in plain text; --json has all of them


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    parser = subparsers.add_parser(
        "check",
        help="hold a backend to the contract, including a kernel under development",
        description="Check a backend: values against the oracle, dtypes, shapes, lanes, memory, repeated runs, and the "
        "laws of merging. What its capabilities exclude is listed, not silently skipped.",
        epilog=f"{_EXAMPLES}\n\n{session.EXIT_STATUS}",
    )
    session.add_one_backend(parser)
    text = "a check, or a pattern of checks, known to fail; if it passes or matches nothing, the run fails"
    parser.add_argument("--expect-failure", type=_expectation, action="append", default=[], metavar="ID=REASON", help=text)
    text = "only checks whose id matches, such as 'tnd/*', 'algebra/*' or 'unpromised/*'"
    parser.add_argument("--select", default="*", metavar="GLOB", help=text)
    session.add_apart(parser)
    return parser


def _expectation(text: str) -> tuple[str, str]:
    id, _, reason = text.partition("=")
    if not id or not reason:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected ID=REASON, such as 'outputs/tiny-*=flushes subnormals'")
    return id, reason


def run(arguments: argparse.Namespace) -> int:
    """Run the checks: 0 passed, 1 failed, 130 interrupted before anything failed."""
    # Late, as in all commands: --help does not pay for what a run needs.
    from rau.config import collect
    from rau.testing.conformance import check_backend
    from rau.testing.conformance.report import Report

    arguments.backend = session.one_backend(arguments)
    with session.under_test([arguments.backend], arguments) as ((backend,), _, place):
        configuration = collect()
        if not arguments.json:
            print(session.heading(configuration))
            print(f"\nchecking {backend.name}, which declares: {_declared(backend.capabilities)}", flush=True)

        report, total, running, started = Report(backend.name), 0, "", time.monotonic()
        with progress(1, quiet=arguments.json) as step:

            def show(id: str, done: int, of: int) -> None:
                nonlocal total, running
                total, running = of, id
                failed = f", {len(report.failures)} failed" if report.failures else ""
                step(f"{done}/{of}{failed} {id}", 1 / of)

            step("listing the checks", 0)
            try:
                check_backend(backend, select=arguments.select, progress=show, into=report, place=place)
                interrupted = False
            except KeyboardInterrupt:
                interrupted = True
        partly = interrupted or arguments.select != "*"  # then an expectation that matches nothing says nothing
        report.expect({id: reason for id, reason in arguments.expect_failure if not partly or _matches(id, report)})
        causes = [] if not report.failures else _explained(arguments, report, backend, None if interrupted else place)
    seconds = time.monotonic() - started
    if not total and not interrupted:
        raise session.UsageError(f"--select {arguments.select!r} matches no check of {backend.name}")
    verdict = _verdict(report, total, running if interrupted else None, seconds)
    if arguments.json:
        session.print_json({
            "backend": report.backend, "succeeded": report.succeeded, "failures": report.failures,
            "expected": report.expected, "excluded": report.excluded, "unpromised": report.unpromised,
            "not_run": report.not_run, "causes": causes, "grid": report.grid, "asked_for": arguments.backend,
            "select": arguments.select, "checks": total, "seconds": seconds,
            "passed": report.passed and not interrupted, "interrupted": interrupted, "verdict": verdict,
            "configuration": configuration,
        })  # fmt: skip
    else:
        _print_report(arguments, report, causes)
        print(verdict)
    return session.exit_status(report.passed, bool(report.failures), interrupted)


def _declared(capabilities: Any) -> str:
    """What a backend says about itself."""
    parts = [
        f"dtypes {', '.join(capabilities.dtypes)}{' and 16-bit into float32' if capabilities.mixed else ''}",
        f"layouts {', '.join(capabilities.layouts)}",
        f"{' or '.join(map(str, capabilities.lanes))} lanes",
        "in place" if capabilities.in_place else "not in place",
        "deterministic" if capabilities.deterministic else "not deterministic",
        f"tolerance {capabilities.tolerance:g}",
    ]
    if capabilities.statistics == "lse":
        parts.append(f"a log-sum-exp to base {capabilities.lse_base}")
    if capabilities.contiguous:
        parts.append("contiguous arrays, others being copied for it")
    if capabilities.unpromised:
        promised = [name for name in PROPERTIES if name not in capabilities.unpromised]
        parts.append(f"promises {', '.join(promised) or 'none of the properties'}")
    return "; ".join(parts)


def _matches(pattern: str, report: Report) -> bool:
    """Whether an expectation can be held to what has run."""
    ran = [*(failure.id for failure in report.failures), *report.succeeded]
    return any(fnmatchcase(id, pattern) for id in ran)


def _verdict(report: Report, total: int, interrupted: str | None, seconds: float) -> str:
    counts = [f"{len(report.succeeded):,} passed"]
    for found, word in (
        (report.failures, "failed"), (report.expected, "failed as expected"), (report.excluded, "excluded"),
        (report.unpromised, "not promised"), (report.not_run, "not run after so many crashes in a row"),
    ):  # fmt: skip
        counts += [f"{len(found):,} {word}"] * bool(found)
    tally = f"{', '.join(counts)} ({seconds:.1f} s)"
    if interrupted is not None:
        where = interrupted or "listing the checks"
        return f"INTERRUPTED in {where}: {report.backend}: of {session.counted(total, 'check')}, {tally}"
    if report.passed or report.failures:
        return f"{'PASSED' if report.passed else 'FAILED'}: {report.backend}: {tally}"
    return f"FAILED: {report.backend}: nothing that was selected could be checked: {tally}"


def _explained(
    arguments: argparse.Namespace, report: Report, backend: Any, place: Here | Apart | None
) -> list[dict[str, Any]]:
    """Describe the causes of failures, the worst first: how many, an example, how to run it again, and what is known of it.

    For the latter the example is run once more, if there is a place to do that in.
    """
    from rau.testing.apart import NoAnswer
    from rau.testing.diagnosis import diagnose
    from rau.testing.differential import observed
    from rau.testing.differential.record import Record

    takes, told = backend.capabilities, []
    base = takes.lse_base if takes.statistics == "lse" else ""
    for number, cause in enumerate(report.by_cause()):
        example, advice = cause.ids[0], outcomes.tolerance_advice(cause.messages)
        case = report.cases.get(example)
        if place and case and not advice and number < _SHOWN and " is " in cause.words:  # of numbers that are wrong
            try:
                result = place.call(observed, backend, case)
            except NoAnswer:
                result = None
            if result is not None:
                record = Record(case, case.make().states, result, base, takes.unpromised)
                advice = outcomes.advice(diagnose(record, tolerance=takes.tolerance))
        again = f"python -m rau check {shlex.quote(arguments.backend)} --select {shlex.quote(example)}"
        told.append({
            "cause": cause.words, "count": len(cause.ids), "ids": cause.ids, "example": example,
            "message": cause.messages[0], "again": again, "advice": advice,
        })  # fmt: skip
    return told


def _print_report(arguments: argparse.Namespace, report: Report, causes: list[dict[str, Any]]) -> None:
    lines = [""]
    for cause in causes[:_SHOWN]:
        lines.append(f"failed: {session.counted(cause['count'], 'check')}: {cause['cause']}")
        lines.append(f"    {outcomes.some(cause['ids'])}")
        if cause["message"] != cause["cause"]:
            lines.append(f"    {cause['example']}: {outcomes.briefly(cause['message'])}")
        lines += [f"    again: {cause['again']}", *(f"    {line}" for line in cause["advice"])]
    for id, message in report.expected[:_SHOWN]:
        lines += [f"failed as expected: {id}", f"    {message}"]
    for title, items in (("failed", causes), ("failed as expected", report.expected)):
        if len(items) > _SHOWN:
            lines.append(f"{title}: {len(items) - _SHOWN:,} more; --json lists all of them")
    print(*lines, sep="\n")
    print(*report.unpromised_lines(), sep="\n", end="\n" * bool(report.unpromised))
    for reason, ids in outcomes.by_limit(report.excluded):
        print(f"excluded: {reason}\n    {outcomes.some(ids)}")
    if report.failures:
        print(f"smallest failing cases: python -m rau difftest --backends {arguments.backend},numpy")
        print("", *outcomes.grid_lines(report.grid), "", outcomes.GRID_LEGEND, sep="\n")
    if report.failures or report.expected or report.excluded or report.unpromised:
        print()
