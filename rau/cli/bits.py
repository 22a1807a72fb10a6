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
        "is missing. Where a backend does not promise bits, by its tolerance for example, or in a merge of many states that is "
        "one update after another, it does not fail; one that promises none is compared if it is named.\n\n"
        + session.examples("bits", "bits --backends mykernel:Mine"),
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
        promised = {backend.name: bits.promised(backend) for backend in backends}
        if arguments.backends is None:  # nothing depends on the others, and JAX compiles for minutes
            not_run |= {name: f"it promises no bits; --backends {name} compares them" for name in promised if not promised[name]}
            backends = [backend for backend in backends if promised[backend.name]]
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
        differ = [group for group in its if its[group] != published.get(group)]
        rows[backend.name] = {
            "same": [group for group in published if its.get(group) == published[group]],
            "differ": [group for group in differ if group in promised[backend.name]],
            "not_promised": [group for group in differ if group not in promised[backend.name]],
            "not_taken": [group for group in published if group not in its],
        }
    bad = [name for name, row in rows.items() if row["differ"] or (promised[name] and not row["same"])]
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


def _verdict(name: str, row: dict[str, Any], found: dict[str, str], groups: int) -> str:
    taken = f"{len(row['same'])} of {groups} groups of merges"
    untaken = f" It does not take {len(row['not_taken'])} of them." if row["not_taken"] else ""
    differ, not_promised = row["differ"], row["not_promised"]
    shown = [*differ, *not_promised]
    if not shown and row["same"]:
        return f"{name}: these are the published bits ({taken}).{untaken}"
    lines = [f"{name}: NOT the published bits in {session.counted(len(shown), 'group')}; the same in {taken}.{untaken}"]
    if not_promised:
        lines[0] += f" Its capabilities do not promise {f'{len(not_promised)} of them' if differ else 'them'}."
    lines += [f"    {group}: {found[group]}" for group in shown[:_SHOWN]]
    if len(shown) > _SHOWN:
        lines.append(f"    and {len(shown) - _SHOWN} more; --json lists all of them")
    return "\n".join(lines)
