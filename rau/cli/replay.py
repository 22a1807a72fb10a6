"""``python -m rau difftest --replay``: one recorded call, run again and judged."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rau.cli import session
from rau.cli.case_options import describe

if TYPE_CHECKING:
    from rau.testing.cases import Case
    from rau.testing.replay import Outcome, Replay


def run(arguments: argparse.Namespace, backends: list[Any], not_run: dict[str, str]) -> int:
    """Replay a file.

    Parameters
    ----------
    arguments : argparse.Namespace
        Those of ``python -m rau difftest``.
    backends : list of Backend
    not_run : dict of str to str

    Returns
    -------
    int
        0: nothing is wrong, 1: something is, 2: not such a file.
    """
    from rau.config import collect
    from rau.errors import RauError
    from rau.testing import record
    from rau.testing.replay import replay

    try:
        recorded = record.load(arguments.replay)
        found = replay(recorded, backends)
    except (RauError, ImportError) as error:  # ImportError: bfloat16 without ml_dtypes
        return session.refuse("difftest", str(error))
    # Whoever names a backend asks whether that one is right now: a kernel that has been repaired passes.
    counts = arguments.backends is None and found.recorded is not None and bool(found.recorded.problems)
    passed = found.ran and not found.wrong and not counts
    configuration = collect()
    if arguments.json:
        session.print_json(_document(arguments, recorded.case, found, passed, not_run, configuration))
    else:
        print(session.heading(configuration))
        print(f"\nreplaying {arguments.replay}: {describe(recorded.case)}")
        _print_outcomes(found, not_run)
        print(_verdict(found, passed))
    return 0 if passed else 1


def _print_outcomes(found: Replay, not_run: dict[str, str]) -> None:
    from rau.cli.console import print_table

    outcomes = [*([found.recorded] if found.recorded else []), *found.outcomes]
    columns = ["output of", "attn_out", "softmax_sum", "verdict"]
    print_table(columns, [_row(outcome, found) for outcome in outcomes], right=columns[1:3])
    print(f"{session.LEGEND}\n")
    for outcome in outcomes:
        for problem in outcome.problems:
            print(f"{outcome.name} is wrong: {problem}")
    for difference in found.pairs:
        print(f"not the same bits: {difference}")
    for outcome in found.outcomes:
        for difference in outcome.differs:
            print(f"not the recorded bits: {outcome.name}, recorded: {difference}")
    for name, reason in not_run.items():
        print(f"not run: {name} ({reason})")


def _row(outcome: Outcome, found: Replay) -> list[str]:
    if outcome.excluded:
        return [outcome.name, "-", "-", f"excluded: {outcome.excluded}"]
    verdict = "WRONG" if outcome.problems else "right"
    if found.recorded and outcome is not found.recorded:
        verdict += ", other bits than recorded" if outcome.differs else ", the recorded bits"
    comparison = outcome.comparison
    if comparison is None:
        return [outcome.name, "-", "-", "WRONG, returned nothing"]
    return [outcome.name, session.share(comparison.attn_share), session.share(comparison.sum_share), verdict]


def _verdict(found: Replay, passed: bool) -> str:
    names = ", ".join(outcome.name for outcome in found.outcomes if not outcome.excluded)
    recorded = found.recorded is not None and bool(found.recorded.problems)
    if not found.ran:
        return "FAILED: no backend takes this call"
    if found.wrong:
        wrong = [outcome.name for outcome in found.outcomes if outcome.problems]
        if not wrong:
            return "FAILED: different bits"
        return f"FAILED: {', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} wrong"
    if passed:
        return f"PASSED: {names}{'; what was recorded is wrong' if recorded else ''}"
    return f"FAILED: the recorded output is wrong; {names} now: right"


def _document(
    arguments: argparse.Namespace, case: Case, found: Replay, passed: bool, not_run: dict[str, str],
    configuration: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    from dataclasses import asdict

    def plain(outcome: Outcome) -> dict[str, Any]:
        comparison = outcome.comparison
        shares = (comparison.attn_share, comparison.sum_share) if comparison else (None, None)
        return {
            "name": outcome.name,
            "right": not outcome.problems and not outcome.excluded,
            "excluded": outcome.excluded,
            "attn_share": shares[0],
            "sum_share": shares[1],
            "problems": outcome.problems,
            "differs_from_recorded": outcome.differs,
        }

    return {
        "file": arguments.replay,
        "case": asdict(case),
        "passed": passed,
        "recorded": plain(found.recorded) if found.recorded else None,
        "backends": [plain(outcome) for outcome in found.outcomes],
        "pairs": found.pairs,
        "not_run": not_run,
        "configuration": configuration,
    }
