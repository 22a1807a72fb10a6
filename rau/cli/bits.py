"""``python -m rau bits``: whether merges give the published bits here."""

from __future__ import annotations

import argparse
from typing import Any

from rau.cli import session
from rau.cli.console import progress

_SHOWN = 8  # groups that differ, in plain text; --json has all of them


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    parser = subparsers.add_parser(
        "bits",
        help="compare digests of fixed merges with the published ones: the same bits on this machine, too?",
        description="Merge fixed numbers, which are made of integers and so are the same everywhere, in every dtype, layout and "
        "number of states, and compare a digest of each group of results with the one that this version of rau ships.",
        epilog="Exit status: 0 all that a backend takes has the published bits, 1 some has not, 2 wrong usage or a named backend "
        "is missing. A backend that does not promise bits, by its tolerance for example, is compared if it is named, and never "
        "fails.\n\n" + session.examples("bits", "bits --backends mykernel:Mine"),
    )
    session.add_backends(parser)
    session.add_apart(parser, "a group of merges")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Compare: 0 these are the published bits, 1 they are not."""
    # Late, as in all commands: --help does not pay for what a run needs.
    from rau.cli.bench.workload import lacking
    from rau.config import collect
    from rau.testing import bits
    from rau.testing.under_test import spelled

    found: dict[str, dict[str, str]] = {}
    with session.under_test(arguments.backends, arguments) as (backends, not_run, place):
        configuration, published = collect(), bits.published()
        promising = {backend.name: _promises(backend) for backend in backends}
        if arguments.backends is None:  # nothing depends on the others, and JAX compiles for minutes
            not_run |= {name: f"it promises no bits; --backends {name} compares them" for name in promising if not promising[name]}
            backends = [backend for backend in backends if promising[backend.name]]
        if reason := lacking("bfloat16"):
            not_run["bfloat16 and eight bits"] = reason
        with progress(len(backends), quiet=arguments.json) as step:
            for backend in backends:

                def show(group: str, share: float, name: str = backend.name) -> None:
                    step(f"{name}: {group}", share)

                found[backend.name] = bits.digests(backend, show, place)
    rows = {}
    for backend in backends:
        its = found[backend.name]
        rows[backend.name] = {
            "same": [group for group in published if its.get(group) == published[group]],
            "differ": [group for group in its if its[group] != published.get(group)],
            "not_taken": [group for group in published if group not in its],
            "promised": promising[backend.name],
        }
    bad = [name for name, row in rows.items() if row["promised"] and (row["differ"] or not row["same"])]
    if arguments.json:
        session.print_json({
            "backends": rows, "digests": found, "not_run": not_run, "passed": not bad, "configuration": configuration,
        })  # fmt: skip
        return 1 if bad else 0
    print(session.heading(configuration), end="\n\n")
    for backend, (name, row) in zip(backends, rows.items(), strict=True):
        print(_verdict(name, row, found[name], len(published)))
        if name in bad:
            print(f"    Next: python -m rau check {spelled([backend]) or name} says what is wrong.")
    for name, reason in not_run.items():
        print(f"not run: {name} ({reason})")
    return 1 if bad else 0


def _promises(backend: Any) -> bool:
    """Tell whether a backend promises our bits in all that it takes."""
    from rau.testing.trial.judge import keeps_lse  # late, as above

    takes = backend.capabilities
    return takes.tolerance == 1 and takes.deterministic and not keeps_lse(backend)


def _verdict(name: str, row: dict[str, Any], found: dict[str, str], groups: int) -> str:
    taken = f"{len(row['same'])} of {groups} groups of merges"
    untaken = f" It does not take {len(row['not_taken'])} of them." if row["not_taken"] else ""
    if not row["differ"] and row["same"]:
        return f"{name}: these are the published bits ({taken}).{untaken}"
    lines = [f"{name}: NOT the published bits in {session.counted(len(row['differ']), 'group')}; the same in {taken}.{untaken}"]
    if not row["promised"]:
        lines[0] += " Its capabilities do not promise them."
    lines += [f"    {group}: {found[group]}" for group in row["differ"][:_SHOWN]]
    if len(row["differ"]) > _SHOWN:
        lines.append(f"    and {len(row['differ']) - _SHOWN} more; --json lists all of them")
    return "\n".join(lines)
