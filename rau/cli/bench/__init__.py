"""``python -m rau bench``: how fast a merge is on this machine, compared with how fast it could be."""

from __future__ import annotations

import argparse
import os
import time
from typing import TYPE_CHECKING, Any

from rau.cli import session
from rau.cli.console import progress, table

if TYPE_CHECKING:
    from rau.cli.bench.peers import Peers
    from rau.cli.bench.survey import Group, Row

_LEGEND = """\
time       median of the rounds, in which everything runs in turn; +- is half the interquartile range
GB/s       bytes that the call has to move (two states read, one written), divided by the median time
of roof    time of the roof divided by the call's, for as many bytes: the median of the rounds. The roof is a triad
           (to = a + b / 2) with the same threads, in place for calls in place. Fresh outputs pay for new pages, which
           no roof includes
out=       the call writes into arrays that were used before; fresh: it allocates; in place: it writes over prev"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    parser = subparsers.add_parser(
        "bench",
        help="time, bandwidth and share of the roof of every backend on this machine",
        description="Measure how fast this machine copies and adds arrays, and how fast each backend is in comparison, in "
        "about ten seconds. Speed never counts as a failure: the exit status is 0 whatever was measured, 1 where a backend crashed "
        "or hung, 2 for wrong usage or a named backend that is missing, 130 if stopped by Ctrl-C, which shows what there is.",
        epilog=session.examples("bench", "bench --backends cython --threads 1", "bench --peers --json", "bench --markdown"),
    )
    session.add_backends(parser)
    add_scale(parser)
    session.add_tables(parser)
    session.add_apart(parser, "a backend in one size", 300.0)
    text = "also measure torch composites, eager and compiled, where torch is installed; takes a minute more"
    parser.add_argument("--peers", action="store_true", help=text)
    return parser


def add_scale(parser: argparse.ArgumentParser) -> None:
    """Declare how much is measured, and with how many threads."""
    parser.add_argument("--threads", type=session.whole(1), metavar="N", help="threads of the roof, of rau and of torch")
    text = "tiny sizes and few rounds: shows that it works, not how fast it is"
    parser.add_argument("--quick", action="store_true", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Measure, and return 0; 1 if a backend crashed or hung; 130 if interrupted, with what there is."""
    # Late, as in all commands: --help does not pay for what a run needs.
    from rau.cli.bench import survey
    from rau.cli.bench.timing import thread_count
    from rau.config import collect

    session.check_form(arguments.form)
    told = not (arguments.json or arguments.form)
    plan = survey.QUICK if arguments.quick else survey.PLAN
    lacking: dict[str, str] = {}
    peers = _peers(arguments, lacking)
    apart, asked = session.under_test(arguments.backends, arguments), arguments.threads
    with apart as (backends, not_run, place), thread_count(asked) as threads:
        not_run |= lacking
        configuration, load = collect(), system_load()
        if told:
            print(session.heading(configuration), *busy(load), sep="\n", flush=True)
        started, groups, interrupted = time.monotonic(), [], False
        with progress(len(plan), quiet=not told) as step:
            try:
                for group in survey.survey(plan, backends, peers, not_run, step, place):
                    groups.append(group)
                    if told:
                        _print_group(group)
            except KeyboardInterrupt:
                interrupted = True
    seconds = time.monotonic() - started
    status = session.INTERRUPTED if interrupted else int(any(group.lost for group in groups))
    if arguments.json:
        session.print_json({
            "quick": arguments.quick, "groups": groups, "not_run": not_run, "threads": threads, "load": load,
            "seconds": seconds, "interrupted": interrupted, "configuration": configuration,
        })  # fmt: skip
        return status
    if arguments.form:
        rows = [(group, row) for group in groups for row in (*group.roof.values(), *group.rows, *group.peers)]
        session.print_table(arguments.form, [_record(*row) for row in rows])
        return status
    print(_LEGEND)
    for name, reason in not_run.items():
        print(f"not run: {name} ({reason})")
    ended = f"INTERRUPTED: {len(groups)} of {session.counted(len(plan), 'size')} measured, in " * interrupted
    print(f"\n{ended}{seconds:.0f} s")
    return status


def system_load() -> float | None:
    """How many processes want a CPU; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def busy(load: float | None) -> list[str]:
    """A warning where others keep the CPUs busy: threads then wait for each other, and every figure suffers."""
    cpus = os.cpu_count() or 1
    return [f"BUSY: load {load:.1f} on {cpus} CPUs before anything was measured"] if load and load > cpus / 2 else []


def _peers(arguments: argparse.Namespace, not_run: dict[str, str]) -> Peers | None:
    if not arguments.peers:
        return None
    from rau.cli.bench.peers import Peers

    try:
        return Peers(compiled=not arguments.quick)
    except ImportError as error:
        not_run["torch composites"] = str(error)
        return None


def _print_group(group: Group) -> None:
    print(f"\n{group.size}, {group.dtype}: {group.bytes / 1e6:.4g} MB a call")
    if group.roof:
        roofs = ", ".join(f"{name} {row.gigabytes_per_second:.1f} GB/s" for name, row in group.roof.items())
        print(f"roof: {roofs}\n      by {group.roof_by}")
    else:
        print(f"roof: {group.roof_by}")
    numbers = ["time", "+-", "GB/s", "of roof"]
    print("", *table(["", "", *numbers], [_cells(row) for row in group.rows], right=numbers), "", sep="\n")
    if group.peers:
        ways = list(group.peers[0].slower or {})
        columns = [*numbers, *(f"by {how}" for how in ways)]
        rows = [[*_cells(row), *(f"{(row.slower or {})[how]:.2f}x" for how in ways)] for row in group.peers]
        print(f"composites, and their time divided by that of {group.reference}:")
        print("", *table(["", "", *columns], rows, right=columns), "", sep="\n")
    for name, reason in group.not_run.items():
        print(f"not run: {name} ({reason})")
    for name, told in group.lost.items():
        print(f"WRONG: {name}: {told}")


def _record(group: Group, row: Row) -> dict[str, Any]:
    """One row of a table for elsewhere; the quartiles are those of the time."""
    return {
        "size": str(group.size), "dtype": group.dtype, "call": row.name, "how": row.how, "seconds": row.seconds.median,
        "low quartile": row.seconds.low, "high quartile": row.seconds.high, "GB/s": row.gigabytes_per_second,
        "of roof": row.share.median if row.share else None,
    }  # fmt: skip


def _cells(row: Row) -> list[str]:
    spread = (row.seconds.high - row.seconds.low) / 2 / row.seconds.median
    share = f"{row.share.median:.2f}" if row.share else "-"
    rate = f"{row.gigabytes_per_second:.1f}"
    return [row.name, row.how, session.duration(row.seconds.median), f"{spread:.0%}", rate, share]
