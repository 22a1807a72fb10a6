"""The rules of a row, in order of precedence: the one source of the exported README.txt and of docs/contract.md.

The rule of this room: plain words, in ASCII, that a reader without Python can follow.
"""

from __future__ import annotations

import textwrap
from typing import NamedTuple


class RowRule(NamedTuple):
    """What a row comes to in one case."""

    case: str
    result: str


PRECEDENCE = (
    RowRule("no live state", "o = 0, m = -inf, l = 0: the neutral element again"),
    RowRule("one live state", "it comes back bit for bit, whatever it holds; nothing from the empty ones enters the result"),
    RowRule("a max is NaN", "o, m and l are NaN"),
    RowRule("a sum is NaN", "o and l are NaN, m by the formula"),
    RowRule("a max is +inf", "m = +inf, o and l are NaN"),
    RowRule("a sum is +inf", "o is NaN, l by the formula: +inf, or NaN where its factor is 0"),
    RowRule(
        "a weight a_i / l rounds to 0 in float32",
        "that product is left out, so that NaN or infinity in a state whose weight is 0 does not matter; in cases of dtype "
        "float64: to 0 in float64",
    ),
    RowRule("the new sum exceeds float32", "it is stored as +inf, but o is right nevertheless: compute the rows in float64"),
)


def as_text() -> str:
    """Write the rules as numbered lines of plain text.

    Returns
    -------
    str

    Examples
    --------
    >>> print(as_text().splitlines()[0])
      1. no live state: o = 0, m = -inf, l = 0: the neutral element again
    """
    return "\n".join(
        textwrap.fill(f"{case}: {result}", 116, initial_indent=f"  {number}. ", subsequent_indent="     ")
        for number, (case, result) in enumerate(PRECEDENCE, 1)
    )


def as_markdown() -> str:
    """Write the rules as a table of Markdown.

    Returns
    -------
    str

    Examples
    --------
    >>> print(as_markdown().splitlines()[2])
    | 1 | no live state | o = 0, m = -inf, l = 0: the neutral element again |
    """
    rows = [f"| {number} | {case} | {result} |" for number, (case, result) in enumerate(PRECEDENCE, 1)]
    return "\n".join(["| | case | what comes out |", "|---|---|---|", *rows])
