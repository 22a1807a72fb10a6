"""What a person sees: plain tables on stdout, and progress on stderr where rich is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

Step: TypeAlias = Callable[..., None]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] = ()) -> list[str]:
    """Lay out a table, a line a string; the columns named in `right` are aligned to the right."""
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
def progress(total: float, quiet: bool = False) -> Iterator[Step]:
    """Show a person at a terminal how far some work is, until it is done; others see nothing.

    What is yielded is called as ``step(what, weight=1)`` when a step begins; the one before is then done. The weights of
    all the steps add up to `total`.
    """
    visible = not quiet and sys.stdout.isatty() and sys.stderr.isatty()  # rich sends stdout where its bar is
    if visible:
        try:
            from rich.console import Console
            from rich.markup import escape
            from rich.progress import Progress
        except ImportError:
            visible = False
    if not visible:
        yield lambda what, weight=1: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        pending: float = 0

        def step(what: str, weight: float = 1) -> None:
            nonlocal pending
            bar.update(task, description=escape(what), advance=pending)
            pending = weight

        yield step
