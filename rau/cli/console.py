"""What a person sees: plain tables on stdout, and progress on stderr where rich is installed."""

from __future__ import annotations

import io
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

Step: TypeAlias = Callable[..., None]
_PAGE = """\
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<style>{{stylesheet}} pre {{{{ white-space: {wrap} }}}}</style></head>
<body><pre>{{code}}</pre></body></html>
"""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] = ()) -> list[str]:
    """Lay out a table, a line a string; the columns named in `right` are aligned to the right.

    Where a person's terminal is narrower, the table is told in parts, one below the other, each with the columns of words that
    it begins with: a terminal breaks lines where they end, through the middle of numbers.
    """
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
    labels = next((k for k, name in enumerate(columns) if name in right), 1)
    if sum(widths) + 2 * len(widths) - 2 > room and labels < len(columns):
        used, last = sum(widths[:labels]) + 2 * labels, labels
        while last < len(columns) and (last == labels or used + widths[last] <= room):
            used, last = used + widths[last] + 2, last + 1
        if last < len(columns):
            first, rest = ([*range(last)], [*range(labels), *range(last, len(columns))])
            parts = [([columns[k] for k in some], [[row[k] for k in some] for row in rows]) for some in (first, rest)]
            return [*table(*parts[0], right=right), "", *table(*parts[1], right=right)]
    lines = [columns, ["-" * width for width in widths], *rows]
    return [
        "  ".join(
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in lines
    ]


# What a terminal does something with, or what turns the order of letters; not the newline and the tab.
_COMMANDS = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069]")


def visible(text: str) -> str:
    """Show what a terminal would obey: names, ids and reasons come from plugins, files and the environment.

    >>> print(visible("\\x1b[31mred"))
    \\x1b[31mred
    """
    return _COMMANDS.sub(lambda found: ascii(found[0])[1:-1], text)


class Visible(io.TextIOBase):
    """A stream on which nothing but text is printed; a `document`, which is to be all of its stream, goes past it."""

    def __init__(self, stream: Any, document: Any) -> None:
        self._stream, self.document = stream, document

    def write(self, text: str) -> int:
        """Write text, made visible."""
        self._stream.write(visible(text))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        """Leave the stream open, which is not this one's: Python calls this when nobody refers to it any more."""

    def isatty(self) -> bool:
        return bool(self._stream.isatty())

    def fileno(self) -> int:
        return int(self._stream.fileno())


@contextmanager
def own_stdout() -> Iterator[Any]:
    """Keep stdout for what is printed here: what a kernel, or a process that it starts, writes to descriptor 1 goes to stderr."""
    stream = sys.stdout
    try:
        ordinary = isinstance(stream, io.TextIOWrapper) and stream.fileno() == 1 and sys.stderr is not None
    except OSError:
        ordinary = False
    if not ordinary:
        yield stream  # a test's, or a notebook's
        return
    from rau.testing.under_test import write_out  # ten milliseconds, which parsing arguments need not take

    assert isinstance(stream, io.TextIOWrapper)
    stream.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        # A message may hold what the terminal cannot show.
        how: dict[str, Any] = {"encoding": stream.encoding, "errors": "backslashreplace", "closefd": False}
        with open(kept, "w", buffering=1 if stream.line_buffering else -1, **how) as own:
            yield own
    finally:
        write_out()
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def progress(total: float, quiet: bool = False) -> Iterator[Step]:
    """Show a person at a terminal how far some work is, until it is done; others see nothing.

    What is yielded is called as ``step(what, weight=1)`` when a step begins; the one before is then done. The weights of
    all the steps add up to `total`.
    """
    shown = not quiet and sys.stdout.isatty() and sys.stderr.isatty()  # rich sends stdout where its bar is
    if shown:
        try:
            from rich.console import Console
            from rich.markup import escape
            from rich.progress import Progress
        except ImportError:
            shown = False
    if not shown:
        yield lambda what, weight=1: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        pending: float = 0

        def step(what: str, weight: float = 1) -> None:
            nonlocal pending
            bar.update(task, description=escape(visible(what)), advance=pending)
            pending = weight

        yield step


def save_page(
    title: str, text: str, path: Path, styles: Mapping[str, str], links: Mapping[str, str] = {}, wrap: str = "pre-wrap"
) -> None:
    """Save a report as one page, which opens from disk and fetches nothing: styles by pattern, links by the words they are on."""
    from rich.console import Console
    from rich.style import Style
    from rich.text import Text

    page = Text(visible(text))
    for pattern, style in styles.items():
        page.highlight_regex(pattern, style)
    for words, target in links.items():
        page.highlight_words([words], Style(link=target))
    console = Console(record=True, file=io.StringIO())
    console.print(page, soft_wrap=True)
    console.save_html(str(path), code_format=_PAGE.format(title=title, wrap=wrap))
