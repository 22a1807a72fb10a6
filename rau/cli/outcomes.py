"""How check and difftest show what many outcomes come to: causes, limits, a grid."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rau.cli.console import table

if TYPE_CHECKING:
    from rau.testing.causes import Grid
    from rau.testing.diagnosis import Diagnosis

_SHOWN = 4  # ids, or values, in a line
_LONG = 240  # characters of a message; --json has all of it
_VALUE = re.compile(
    r"((?:dtype|layout|softmax_layout|the number of lanes is|it does not merge|[NDK] =) )([^ ,;]+)(.*)", re.DOTALL
)
GRID_LEGEND = "passed/failed/excluded cases, by dtype and layout"


def some(words: Sequence[str]) -> str:
    """List a few words, and count the others.

    >>> some(["a", "b"]), some(list("abcdef"))
    ('a, b', 'a, b, c, d and 2 more')
    """
    more = f" and {len(words) - _SHOWN:,} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more


def briefly(message: str) -> str:
    """Cut a message that goes on and on.

    >>> len(briefly("wrong; " * 100))
    240
    """
    return message if len(message) <= _LONG else f"{message[: _LONG - 4]} ..."


def by_limit(items: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Sort what is excluded, (id, reasons), by declared limit, whatever a case's own value is; the most frequent first.

    >>> by_limit([("a", "dtype float16 is not one of float32"), ("b", "dtype float64 is not one of float32; D = 9 > 8")])
    [('dtype float16, float64 is not one of float32', ['a', 'b']), ('D = 9 > 8', ['b'])]
    """
    limits: dict[tuple[str, str], tuple[list[str], list[str]]] = {}  # before and after the value: values, ids
    for id, reasons in items:
        for reason in reasons.split("; "):
            found = _VALUE.fullmatch(reason)
            before, value, after = found.groups() if found else (reason, "", "")
            values, ids = limits.setdefault((before, after), ([], []))
            ids.append(id)
            if value not in values:
                values.append(value)
    lines = [(f"{before}{some(values)}{after}", ids) for (before, after), (values, ids) in limits.items()]
    return sorted(lines, key=lambda line: -len(line[1]))


def grid_lines(grid: Grid) -> list[str]:
    """Lay out how many cases passed, failed and were excluded, a line a string: a column a layout, a row a dtype."""
    dtypes = dict.fromkeys(dtype for row in grid.values() for dtype in row)
    rows = [[dtype, *("/".join(map(str, row.get(dtype, "-"))) for row in grid.values())] for dtype in dtypes]
    return table(["", *grid], rows, right=grid) if rows else []


def advice(diagnosis: Diagnosis) -> list[str]:
    """Say in a few lines what is known of a wrong output."""
    known = diagnosis.recognised
    if not known:
        return ["no known mistake reproduces it"]
    lines = [f"known mistake: {one}: {one.mistake.wrong} {one.mistake.change}" for one in known[:_SHOWN]]
    return [*lines, "these inputs do not tell these apart; larger ones would"] if known[1:] else lines


def tolerance_advice(messages: Iterable[str]) -> list[str]:
    """Say what to declare, where numbers are off by so little that rows computed in float32 explain it.

    >>> tolerance_advice(["attn_out[0] is 1, expected 2, off by 35.2 times the bound, 1e-7; 1 of 9 are wrong"])[0][:57]
    'rows computed in float32 come this far. If that is intend'
    """
    from rau.testing.causes import SLIGHT

    shares = [float(found) for message in messages for found in re.findall(r"off by (\S+) times the bound", message)]
    if not shares or max(shares) > SLIGHT:
        return []
    declared = f"Capabilities(tolerance={int(max(shares)) + 1})"
    told = f"If that is intended, declare it: {declared} would cover what is seen here"
    return [f"rows computed in float32 come this far. {told}"]
