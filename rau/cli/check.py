"""``python -m rau check``: hold one backend to the contract."""

from __future__ import annotations

import argparse
import time
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from rau.backends import PROPERTIES
from rau.cli import session
from rau.cli.console import progress

if TYPE_CHECKING:
    from rau.testing.conformance.report import Report

_EXAMPLES = session.examples(
    "check numpy", "check mykernel:Mine", "check mykernel:Mine --select 'tnd/*'",
    "check mykernel:Mine --expect-failure 'views/*=not yet' --json",
)  # fmt: skip
_SHOWN = 20  # failures in plain text; --json has all of them


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
    from rau.testing.under_test import load
    from rau.testing.conformance.report import Report

    arguments.backend = session.one_backend(arguments)
    backend = load(arguments.backend)
    configuration = collect()
    if not arguments.json:
        print(session.heading(configuration))
        print(f"\nchecking {backend.name}, which declares: {_declared(backend.capabilities)}", flush=True)

    report, total, interrupted, started = Report(backend.name), 0, False, time.monotonic()
    with progress(1, quiet=arguments.json) as step:

        def show(id: str, done: int, of: int) -> None:
            nonlocal total
            total = of
            failed = f", {len(report.failures)} failed" if report.failures else ""
            step(f"{done}/{of}{failed} {id}", 1 / of)

        step("listing the checks", 0)
        try:
            check_backend(backend, select=arguments.select, progress=show, into=report)
        except KeyboardInterrupt:
            interrupted = True
    seconds = time.monotonic() - started
    if not total and not interrupted:
        raise session.UsageError(f"--select {arguments.select!r} matches no check of {backend.name}")
    partly = interrupted or arguments.select != "*"  # then an expectation that matches nothing says nothing
    report.expect({id: reason for id, reason in arguments.expect_failure if not partly or _matches(id, report)})
    verdict = _verdict(report, total, interrupted, seconds)
    if arguments.json:
        session.print_json({
            **vars(report), "asked_for": arguments.backend, "select": arguments.select, "checks": total, "seconds": seconds,
            "passed": report.passed and not interrupted, "interrupted": interrupted, "verdict": verdict,
            "configuration": configuration,
        })  # fmt: skip
    else:
        _print_report(arguments, report)
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
    if capabilities.unpromised:
        promised = [name for name in PROPERTIES if name not in capabilities.unpromised]
        parts.append(f"promises {', '.join(promised) or 'none of the properties'}")
    return "; ".join(parts)


def _matches(pattern: str, report: Report) -> bool:
    """Whether an expectation can be held to what has run."""
    ran = [*(failure.id for failure in report.failures), *report.succeeded]
    return any(fnmatchcase(id, pattern) for id in ran)


def _verdict(report: Report, total: int, interrupted: bool, seconds: float) -> str:
    counts = [f"{len(report.succeeded):,} passed"]
    items = report.failures, report.expected, report.excluded, report.unpromised
    for found, word in zip(items, ("failed", "failed as expected", "excluded", "not promised"), strict=True):
        counts += [f"{len(found):,} {word}"] * bool(found)
    tally = f"{', '.join(counts)} ({seconds:.1f} s)"
    if interrupted:
        return f"INTERRUPTED: {report.backend}: of {session.counted(total, 'check')}, {tally}"
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
    print(*report.unpromised_lines(), sep="\n", end="\n" * bool(report.unpromised))
    for reason, ids in session.by_reason(report.excluded):
        more = f" and {len(ids) - 4:,} more" if len(ids) > 4 else ""
        print(f"excluded: {reason}\n    {', '.join(ids[:4])}{more}")
    if report.failures:
        print(f"smallest failing cases: python -m rau difftest --backends {arguments.backend},numpy")
    if report.failures or report.expected or report.excluded or report.unpromised:
        print()
