"""Tables and progress for a person: with rich where it is installed, in plain text where it is not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

Step: TypeAlias = Callable[..., None]

_PIPED_WIDTH = 200  # nobody's window: enough that no table is cut off in a file


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = ()
) -> None:
    """Print a table on stdout.

    Parameters
    ----------
    columns : sequence of str
        Headings.
    rows : sequence of sequence of str
        Cells, as many in each row as there are columns.
    right : collection of str, optional
        Headings of the columns that are aligned to the right.
    """
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print("", *_plain_table(columns, rows, right), "", sep="\n")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(Text(name), justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH).print(table)


def _plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str]) -> list[str]:
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = [columns, ["-" * width for width in widths], *rows]
    return [
        "  ".join(
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in lines
    ]


@contextmanager
def progress(total: float) -> Iterator[Step]:
    """Show how far some work is: on stderr, if that is a terminal, and gone when the work is done.

    Parameters
    ----------
    total : float
        Sum of the weights of all the steps.

    Yields
    ------
    step : callable
        ``step(what, weight=1)`` says that a step begins; the one before is then done.

    Examples
    --------
    >>> with progress(2) as step:
    ...     step("the first half")
    ...     step("the second half")
    """
    if not sys.stderr.isatty():
        yield lambda what, weight=1: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        with _plain_progress(total) as step:
            yield step
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        pending: float = 0

        def step(what: str, weight: float = 1) -> None:
            nonlocal pending
            bar.update(task, description=what, advance=pending)
            pending = weight

        yield step


@contextmanager
def _plain_progress(total: float) -> Iterator[Step]:
    done: float = 0
    pending: float = 0

    def step(what: str, weight: float = 1) -> None:
        nonlocal done, pending
        done, pending = done + pending, weight
        _overwrite(f"{done / total:4.0%} {what}")

    try:
        yield step
    finally:
        _overwrite("")


def _overwrite(text: Any) -> None:
    print(f"\r{text[:78]:<78}\r", end="", file=sys.stderr, flush=True)
