"""``python -m rau bench``: how fast a merge is on this machine, beside how fast it could be."""

from __future__ import annotations

import argparse
import os
import time
from typing import TYPE_CHECKING, Any

from rau.cli import session

if TYPE_CHECKING:
    from rau.cli.bench.survey import Group, Row

_LEGEND = """\
time       median of the rounds, in which everything runs in turn; +- is half the distance of the quartiles
GB/s       bytes that the call has to move (two states read, one written) by the median time
of roof    time of the roof by the call's, for as many bytes: the median of the rounds. A triad (to = a + b / 2) with
           the same threads; for calls in place one in place. Fresh outputs pay for new pages, which no roof contains
out=       the call writes into arrays that were used before; fresh: it allocates; in place: it writes over prev"""


def add_parser(subparsers: Any) -> None:
    """Declare the command.

    Parameters
    ----------
    subparsers : argparse._SubParsersAction
    """
    parser = subparsers.add_parser(
        "bench",
        help="time, bandwidth and share of the roof of every backend on this machine",
        description="Measure how fast this machine copies and adds arrays, and each backend beside it, in some ten "
        "seconds. Speed is no verdict: the exit status is 0 whatever was measured, 2 for wrong usage or a named "
        "backend that is missing.",
    )
    text = f"only these backends (default: all that are available): {session.BACKEND}"
    parser.add_argument("--backend", nargs="+", action="extend", metavar="NAME", help=text)
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the roof, of rau and of torch")
    text = "beside them torch composites, eager and compiled, where torch is installed; takes a minute more"
    parser.add_argument("--peers", action="store_true", help=text)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few rounds: shows that it works, not how fast it is")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else")
    text = "draw the roofline chart into a file (.png, .svg, .pdf); needs matplotlib"
    parser.add_argument("--plot", metavar="FILE", help=text)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure.

    Parameters
    ----------
    arguments : argparse.Namespace

    Returns
    -------
    int
        0, or 2: wrong usage, or a named backend is missing.
    """
    from rau.cli.bench.timing import threads
    from rau.config import collect
    from rau.errors import RauError

    mistakes = _mistakes(arguments)
    if mistakes:
        return session.refuse("bench", *mistakes)
    try:
        backends, missing = session.choose(",".join(arguments.backend) if arguments.backend else None)
        peers = _peers(arguments, missing)
        with threads(arguments.threads) as number:
            configuration, load = collect(), _load()
            if not arguments.json:
                print(session.heading(configuration), *_busy(load), sep="\n", flush=True)
            started = time.monotonic()
            document = _survey(arguments, backends, missing, peers, number)
    except RauError as error:
        return session.refuse("bench", str(error))
    if arguments.json:
        seconds = time.monotonic() - started
        document |= {"threads": number, "load": load, "seconds": seconds, "configuration": configuration}
        session.print_json(document)
    else:
        print(f"\n{time.monotonic() - started:.0f} s")
    return 0


def _mistakes(arguments: argparse.Namespace) -> list[str]:
    """What is wrong with the options, before anything takes time."""
    found = []
    if arguments.plot:
        from rau.cli import roofline

        found += roofline.obstacles(arguments.plot)
    return found


def _load() -> float | None:
    """How many processes want a CPU; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _busy(load: float | None) -> list[str]:
    """A warning where others keep the CPUs busy: threads then wait for each other, and every figure suffers."""
    cpus = os.cpu_count() or 1
    return [f"BUSY: load {load:.1f} on {cpus} CPUs before anything was measured"] if load and load > cpus / 2 else []


def _peers(arguments: argparse.Namespace, missing: dict[str, str]) -> Any:
    if not arguments.peers:
        return None
    from rau.cli.bench.peers import Peers

    try:
        return Peers(compiled=not arguments.quick)
    except ImportError as error:
        missing["torch composites"] = str(error)
        return None


def _survey(
    arguments: argparse.Namespace, backends: list[Any], missing: dict[str, str], peers: Any, number: int
) -> dict[str, Any]:
    from rau.cli.bench import survey, workload

    plan = survey.QUICK if arguments.quick else survey.PLAN
    memory = workload.available_memory() // 2
    groups: list[Group] = []
    with session.watched(len(plan), arguments.json) as step:
        for size, dtype, seconds in plan:
            lacking = workload.lacking(dtype)
            if lacking:
                missing[f"{size.title}, {dtype}"] = lacking
                continue
            if peers:  # more calls to share the time among
                seconds *= 4
            found = survey.measure(size.fitted(memory), dtype, seconds, backends, number, peers, step)
            groups.append(found)
            if not arguments.json:
                _print_group(found)
    if arguments.plot:
        from rau.cli import roofline

        roofline.draw(groups, arguments.plot)
    if not arguments.json:
        print(_LEGEND)
        for name, reason in missing.items():
            print(f"not run: {name} ({reason})")
        if arguments.plot:
            print(f"drawn: {arguments.plot}")
    return {"quick": arguments.quick, "groups": [survey.plain(group) for group in groups], "not_run": missing}


def _print_group(group: Group) -> None:
    from rau.cli.console import print_table

    print(f"\n{group.size}, {group.dtype}: {group.bytes / 1e6:.4g} MB a call")
    if group.roof:
        roofs = ", ".join(f"{name} {row.rate:.1f} GB/s" for name, row in group.roof.items())
        print(f"roof: {roofs}\n      by {group.origin}")
    else:
        print(f"roof: {group.origin}")
    numbers = ["time", "+-", "GB/s", "of roof"]
    print_table(["", "", *numbers], [_cells(row) for row in group.rows], right=numbers)
    if group.peers:
        ways = [how for how in group.peers[0].slower or {}]
        columns = [*numbers, *(f"by {how}" for how in ways)]
        rows = [[*_cells(row), *(f"{(row.slower or {})[how]:.2f}x" for how in ways)] for row in group.peers]
        print(f"composites, and their time by that of {group.reference}:")
        print_table(["", "", *columns], rows, right=columns)
    for name, reason in group.not_run.items():
        print(f"not run: {name} ({reason})")


def _cells(row: Row) -> list[str]:
    spread = (row.seconds.high - row.seconds.low) / 2 / row.seconds.median
    share = f"{row.share.median:.2f}" if row.share else "-"
    return [row.name, row.how, _duration(row.seconds.median), f"{spread:.0%}", f"{row.rate:.1f}", share]


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
