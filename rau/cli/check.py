"""``python -m rau check``: hold one backend to the contract."""

from __future__ import annotations

import argparse
import time
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from rau.cli import session

if TYPE_CHECKING:
    from rau.testing.report import Report

_SHOWN = 20  # failures in plain text; --json has all of them


def add_parser(subparsers: Any) -> None:
    """Declare the command.

    Parameters
    ----------
    subparsers : argparse._SubParsersAction
    """
    parser = subparsers.add_parser(
        "check",
        help="hold a backend to the contract, a kernel under development too",
        description="Check a backend: values against the oracle, dtypes, shapes, lanes, memory, repeated runs, and the "
        "laws of merging. What its capabilities exclude is listed, not skipped in silence.",
        epilog=session.EXIT_STATUS,
    )
    parser.add_argument("backend", metavar="NAME", help=session.BACKEND)
    text = "a check, or a pattern of checks, that is known to fail; it fails the run when it passes or matches nothing"
    parser.add_argument("--expect-failure", action="append", default=[], metavar="ID=REASON", help=text)
    text = "only checks whose id matches, such as 'tnd/*' or 'algebra/*'"
    parser.add_argument("--select", default="*", metavar="GLOB", help=text)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the checks.

    Parameters
    ----------
    arguments : argparse.Namespace

    Returns
    -------
    int
        0: passed, 1: failed, 2: wrong usage, or no such backend, 130: interrupted before anything failed.
    """
    from rau.config import collect
    from rau.errors import RauError
    from rau.testing.conformance import check_backend, load
    from rau.testing.report import Report

    expected = dict(text.partition("=")[::2] for text in arguments.expect_failure)
    if not all(id and reason for id, reason in expected.items()):
        return session.refuse("check", "--expect-failure takes ID=REASON, such as 'outputs/tiny-*=flushes subnormals'")
    try:
        backend = load(arguments.backend)
    except RauError as error:
        return session.refuse("check", str(error))
    configuration = collect()
    if not arguments.json:
        print(session.heading(configuration))
        print(f"\nchecking {backend.name}, which declares: {_declared(backend.capabilities)}", flush=True)

    report, total, interrupted, started = Report(backend.name), 0, False, time.monotonic()
    with session.watched(1, arguments.json) as step:

        def progress(id: str, done: int, of: int) -> None:
            nonlocal total
            total = of
            failed = f", {len(report.failures)} failed" if report.failures else ""
            step(f"{done}/{of}{failed} {id}", 1 / of)

        step("listing the checks", 0)
        try:
            check_backend(backend, select=arguments.select, progress=progress, into=report)
        except KeyboardInterrupt:
            interrupted = True
    seconds = time.monotonic() - started
    if not total and not interrupted:
        return session.refuse("check", f"--select {arguments.select!r} matches no check of {backend.name}")
    partly = interrupted or arguments.select != "*"
    report.expect({id: reason for id, reason in expected.items() if not partly or _matches(id, report)})
    verdict = _verdict(report, total, interrupted, seconds)
    if arguments.json:
        session.print_json(_document(arguments, report, total, interrupted, seconds, verdict, configuration))
    else:
        _print_report(arguments, report)
        print(verdict)
    return session.exit_status(report.passed, bool(report.failures), interrupted)


def _declared(capabilities: Any) -> str:
    """What a backend says of itself."""
    parts = [
        f"dtypes {', '.join(capabilities.dtypes)}{' and 16-bit into float32' if capabilities.mixed else ''}",
        f"layouts {', '.join(capabilities.layouts)}",
        f"{' or '.join(map(str, capabilities.lanes))} lanes",
        "in place" if capabilities.in_place else "not in place",
        "deterministic" if capabilities.deterministic else "not deterministic",
        f"tolerance {capabilities.tolerance:g}",
    ]
    return "; ".join(parts)


def _matches(pattern: str, report: Report) -> bool:
    """Whether an expectation can be held to what has run."""
    return any(fnmatchcase(failure.id, pattern) for failure in report.failures) or any(
        fnmatchcase(id, pattern) for id in report.succeeded
    )


def _verdict(report: Report, total: int, interrupted: bool, seconds: float) -> str:
    counts = [f"{len(report.succeeded):,} passed"]
    for items, word in ((report.failures, "failed"), (report.expected, "failed as expected")):
        counts += [f"{len(items):,} {word}"] * bool(items)
    counts += [f"{len(report.excluded):,} excluded"] * bool(report.excluded)
    tally = f"{', '.join(counts)} ({seconds:.1f} s)"
    if interrupted:
        return f"INTERRUPTED: {report.backend}, of {session.counted(total, 'check')}: {tally}"
    if report.passed or report.failures:
        return f"{'PASSED' if report.passed else 'FAILED'}: {report.backend}: {tally}"
    return f"FAILED: {report.backend}: nothing that was selected could be checked: {tally}"


def _print_report(arguments: argparse.Namespace, report: Report) -> None:
    print()
    for title, items in (("failed", report.failures), ("failed as expected", report.expected)):
        for id, message in items[:_SHOWN]:
            print(f"{title}: {id}\n    {message}")
        if len(items) > _SHOWN:
            print(f"{title}: {len(items) - _SHOWN:,} more; --json lists all of them, --select GLOB runs some")
    for reason, ids in session.by_reason(report.excluded):
        more = f" and {len(ids) - 4:,} more" if len(ids) > 4 else ""
        print(f"excluded: {reason}\n    {', '.join(ids[:4])}{more}")
    if report.failures:
        print(f"smallest failing cases: python -m rau difftest --backends {arguments.backend},numpy")
    if report.failures or report.expected or report.excluded:
        print()


def _document(
    arguments: argparse.Namespace, report: Report, total: int, interrupted: bool, seconds: float, verdict: str,
    configuration: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The answer as plain data."""
    return {
        "backend": report.backend,
        "asked_for": arguments.backend,
        "select": arguments.select,
        "passed": report.passed and not interrupted,
        "interrupted": interrupted,
        "verdict": verdict,
        "seconds": seconds,
        "checks": total,
        "succeeded": report.succeeded,
        "failures": [failure._asdict() for failure in report.failures],
        "expected_failures": [failure._asdict() for failure in report.expected],
        "excluded": [failure._asdict() for failure in report.excluded],
        "configuration": configuration,
    }
