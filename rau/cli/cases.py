"""``python -m rau cases``: list the cases, export them as data for programs in any language, judge the answers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rau.cli import case_options, session
from rau.cli.console import progress

if TYPE_CHECKING:
    from rau.testing.cases import Case
    from rau.testing.export import Verification

_EXAMPLES = session.examples(
    "cases --select 'tnd/*'", "cases --export data --dtype float32 --layout SBH", "cases --verify data --tolerance 40"
)
_SHOWN = 20  # wrong cases in plain text; --json has all of them


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    parser = subparsers.add_parser(
        "cases",
        help="list the test cases, export them as plain files, judge what a program made of them",
        description="List the cases that difftest runs and check adds to; or write them as .npy files and one JSON "
        "file, for a kernel that Python cannot call; or judge the outputs that it wrote beside them.",
        epilog=f"{_EXAMPLES}\n\nExit status: 0 good, 1 an output is wrong or missing, 2 wrong usage.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--export", type=session.path, metavar="DIR", help="write the cases to a new folder, with a README.txt")
    what.add_argument("--verify", type=session.path, metavar="DIR", help="judge the outputs in an exported folder")
    case_options.add_options(parser)
    text = "add N generated cases (default: none)"
    parser.add_argument("--generated", type=session.whole(0), default=0, metavar="N", help=text)
    text = "with --verify: how many times the bound still counts as right (default: 1)"
    parser.add_argument("--tolerance", type=session.positive, metavar="X", help=text)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """List, export or verify: 0 good, 1 an output is wrong or missing."""
    if arguments.verify:
        case_options.refuse_beside("--verify", arguments, generated=0)
        return _verify(arguments)
    if arguments.tolerance is not None:
        raise session.UsageError("--tolerance only makes sense with --verify")
    cases = case_options.named_cases(arguments)
    cases += case_options.generated_cases(arguments, arguments.generated)
    if not cases:
        raise session.UsageError("no case matches --select, --dtype and --layout")
    if arguments.export:
        _export(arguments, cases)
    elif arguments.json:
        session.print_json({"cases": cases})
    else:
        width = max(len(case.id) for case in cases)
        for case in cases:
            id, _, words = case_options.describe(case).partition("; ")
            print(f"{id:{width}}  {words}")
        print(f"\n{session.counted(len(cases), 'case')}")
    return 0


def _export(arguments: argparse.Namespace, cases: list[Case]) -> None:
    # Late, as in all commands: --help does not pay for what a run needs.
    from rau.testing.export import HOW_TO, INDEX, export_cases

    with progress(len(cases), quiet=arguments.json) as step:
        left_out = export_cases(arguments.export, cases, progress=step)
    folder = Path(arguments.export)
    written = len(cases) - len(left_out)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if arguments.json:
        session.print_json({
            "folder": arguments.export, "index": INDEX, "written": written, "bytes": size, "left_out": left_out,
        })  # fmt: skip
        return
    print(f"{session.counted(written, 'case')} written to {folder}, {size / 1e6:,.1f} MB.")
    print(f"{folder / INDEX} describes them, {folder / HOW_TO} says what to do.")
    for reason, ids in session.by_reason(left_out):
        print(f"left out: {session.counted(len(ids), 'case')}, {ids[0]} first: {reason}")
    print(f"Once the outputs are there: python -m rau cases --verify {folder}")


def _verify(arguments: argparse.Namespace) -> int:
    from rau.testing.export import verify_outputs

    tolerance = arguments.tolerance or 1.0
    with progress(1, quiet=arguments.json) as step:
        found = verify_outputs(
            arguments.verify, tolerance=tolerance, progress=lambda id, done, of: step(f"{done}/{of} {id}", 1 / of)
        )
    report, verdict = found.report, _verdict(found, arguments.verify)
    shares = {id: {"attn_out": one.attn_share, "softmax_sum": one.sum_share} for id, one in found.comparisons.items()}
    if arguments.json:
        session.print_json({
            "folder": arguments.verify, "tolerance": tolerance, "passed": report.passed, "verdict": verdict,
            "succeeded": report.succeeded, "failures": report.failures, "missing": found.missing, "shares": shares,
        })  # fmt: skip
        return 0 if report.passed else 1
    for id, message in report.failures[:_SHOWN]:
        print(f"wrong: {id}\n    {message}")
    if len(report.failures) > _SHOWN:
        print(f"wrong: {len(report.failures) - _SHOWN:,} more; --json lists all of them")
    for name in ("attn_out", "softmax_sum") if shares else ():
        worst = max(shares, key=lambda id: shares[id][name])
        print(f"largest error of {name}: {session.share(shares[worst][name])} of the bound, in {worst}")
    print(verdict)
    return 0 if report.passed else 1


def _verdict(found: Verification, folder: str) -> str:
    report = found.report
    right, wrong = len(report.succeeded), len(report.failures) - found.missing
    if report.passed:
        return f"PASSED: {session.counted(right, 'case')} in {folder} right"
    return f"FAILED: {folder}: {right:,} right, {wrong:,} wrong, {found.missing:,} without all outputs"
