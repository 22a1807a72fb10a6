"""``python -m rau cases``: a list of the cases, the cases as data for programs in any language, a judge of the answers."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rau.cli import case_options, session

if TYPE_CHECKING:
    from rau.testing.cases import Case
    from rau.testing.export import Verification

_SHOWN = 20  # wrong cases in plain text; --json has all of them


def add_parser(subparsers: Any) -> None:
    """Declare the command.

    Parameters
    ----------
    subparsers : argparse._SubParsersAction
    """
    parser = subparsers.add_parser(
        "cases",
        help="list the test cases, export them as plain files, judge what a program made of them",
        description="List the cases that difftest runs and check adds to; or write them as .npy files and one JSON, "
        "for a kernel that no Python can call; or judge the outputs that it wrote beside them.",
        epilog="Exit status: 0 good, 1 an output is wrong or missing, 2 wrong usage.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--export", metavar="DIR", help="write the cases to a new folder, with a README.txt")
    what.add_argument("--verify", metavar="DIR", help="judge the outputs in an exported folder")
    case_options.add_options(parser)
    parser.add_argument("--generated", type=int, default=0, metavar="N", help="add N generated cases (default: none)")
    text = "with --verify: how many times the bound is still right (default: 1)"
    parser.add_argument("--tolerance", type=float, metavar="X", help=text)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """List, export or verify.

    Parameters
    ----------
    arguments : argparse.Namespace

    Returns
    -------
    int
        0: good, 1: an output is wrong or missing, 2: wrong usage.
    """
    from rau.errors import RauError

    mistakes = _mistakes(arguments)
    if mistakes:
        return session.refuse("cases", *mistakes)
    try:
        if arguments.verify:
            return _verify(arguments)
        cases = case_options.named_cases(arguments)
        cases += case_options.generated_cases(arguments, arguments.generated)
        if not cases:
            return session.refuse("cases", "no case matches --select, --dtype and --layout")
        if arguments.export:
            return _export(arguments, cases)
    except (RauError, OSError, ImportError) as error:  # ImportError: bfloat16 without ml_dtypes
        return session.refuse("cases", str(error))
    _list(arguments, cases)
    return 0


def _mistakes(arguments: argparse.Namespace) -> list[str]:
    found = [
        f"--{name} is {getattr(arguments, name)}; expected 0 or more"
        for name in ("generated", "seed")
        if getattr(arguments, name) < 0
    ]
    if arguments.tolerance is not None and not arguments.verify:
        found.append("--tolerance has a meaning with --verify only")
    if arguments.tolerance is not None and not 0 < arguments.tolerance < float("inf"):
        found.append(f"--tolerance is {arguments.tolerance}; expected more than 0")
    if arguments.verify:
        unset = {"select": "*", "dtype": None, "layout": None, "seed": 0, "generated": 0}
        given = [name for name, value in unset.items() if getattr(arguments, name) != value]
        found += [f"--verify judges all that was exported; --{name} has no place beside it" for name in given]
    return found


def _list(arguments: argparse.Namespace, cases: list[Case]) -> None:
    if arguments.json:
        session.print_json({"cases": [asdict(case) for case in cases]})
        return
    width = max(len(case.id) for case in cases)
    for case in cases:
        id, _, words = case_options.describe(case).partition("; ")
        print(f"{id:{width}}  {words}")
    print(f"\n{session.counted(len(cases), 'case')}")


def _export(arguments: argparse.Namespace, cases: list[Case]) -> int:
    from pathlib import Path

    from rau.testing.export import HOW_TO, INDEX, export_cases

    with session.watched(len(cases), arguments.json) as step:
        left_out = export_cases(arguments.export, cases, progress=step)
    folder = Path(arguments.export)
    written = len(cases) - len(left_out)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if arguments.json:
        document = {"folder": arguments.export, "index": INDEX, "written": written, "bytes": size}
        session.print_json(document | {"left_out": [failure._asdict() for failure in left_out]})
        return 0
    print(f"{session.counted(written, 'case')} written to {folder}, {size / 1e6:,.1f} MB.")
    print(f"{folder / INDEX} describes them, {folder / HOW_TO} says what to do.")
    for reason, ids in session.by_reason(left_out):
        print(f"left out: {session.counted(len(ids), 'case')}, {ids[0]} first: {reason}")
    print(f"When the outputs are there: python -m rau cases --verify {folder}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from rau.testing.export import verify_outputs

    tolerance = 1.0 if arguments.tolerance is None else arguments.tolerance
    with session.watched(1, arguments.json) as step:
        found = verify_outputs(
            arguments.verify, tolerance=tolerance, progress=lambda id, done, of: step(f"{done}/{of} {id}", 1 / of)
        )
    verdict = _verdict(found, arguments.verify)
    if arguments.json:
        session.print_json(_document(arguments, found, tolerance, verdict))
    else:
        for id, message in found.report.failures[:_SHOWN]:
            print(f"wrong: {id}\n    {message}")
        if len(found.report.failures) > _SHOWN:
            print(f"wrong: {len(found.report.failures) - _SHOWN:,} more; --json lists all of them")
        for name in ("attn", "sum") if found.comparisons else ():
            id, worst = max(
                ((id, getattr(one, f"{name}_share")) for id, one in found.comparisons.items()), key=lambda pair: pair[1]
            )
            full = {"attn": "attn_out", "sum": "softmax_sum"}[name]
            print(f"largest error of {full}: {session.share(worst)} of the bound, in {id}")
        print(verdict)
    return 0 if found.report.passed else 1


def _verdict(found: Verification, folder: str) -> str:
    report = found.report
    right, wrong = len(report.succeeded), len(report.failures) - found.missing
    if report.passed:
        return f"PASSED: {session.counted(right, 'case')} in {folder} right"
    return f"FAILED: {folder}: {right:,} right, {wrong:,} wrong, {found.missing:,} without all outputs"


def _document(arguments: argparse.Namespace, found: Verification, tolerance: float, verdict: str) -> dict[str, Any]:
    return {
        "folder": arguments.verify,
        "tolerance": tolerance,
        "passed": found.report.passed,
        "verdict": verdict,
        "succeeded": found.report.succeeded,
        "failures": [failure._asdict() for failure in found.report.failures],
        "missing": found.missing,
        "shares": {
            id: {"attn_out": one.attn_share, "softmax_sum": one.sum_share} for id, one in found.comparisons.items()
        },
    }
