"""What many outcomes come to: failures by their cause, and a grid of layouts and dtypes.

The rule of this room: it reads what was said, and runs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from rau.testing.cases import Case

# By layout, then by dtype: how many passed, failed and were excluded.
Grid: TypeAlias = dict[str, dict[str, list[int]]]
PASSED, FAILED, EXCLUDED = range(3)

SLIGHT = 64.0  # a tolerance: about what rows computed in float32 come to
# Worst first: what ends a process, what writes where it must not, what raises. Wrong numbers come after them.
_WORSE = (r"^(crashed|hung|ended its process)", r"wrote beside|was changed", r"^\w+: .*\(.+:\d+, in .+\)$")
_NUMBER = re.compile(
    r"(attn_out|softmax_max|softmax_sum|log-sum-exp)\[[^\]]*\] is (\S+), expected (\S+?)[,;]"
    r"( to be kept)?(?: off by (\S+) times)?"
)

_BITS = re.compile(r"(attn_out|softmax_max|softmax_sum)\[[^\]]*\]: \S+ and \S+; \d+ of \d+ elements differ")
_PLACED = re.compile(r" \([^()]*:\d+, in .*\)$")


class Cause(NamedTuple):
    """Failures that have one cause, as far as their messages tell.

    Attributes
    ----------
    words : str
    ids : list of str
        Those of the failures.
    messages : list of str
        What each of them said.
    """

    words: str
    ids: list[str]
    messages: list[str]


def cause_of(problem: str) -> str:
    """Word what a problem has in common with others of its kind: what went wrong, not where and by how much.

    >>> cause_of("update 3: attn_out[0, 1] is nan, expected 0.3, off by inf times the bound, 2e-08; 1 of 64 are wrong")
    'attn_out is NaN where a number is expected'
    >>> cause_of("states[1] was changed: attn_out[0, 3]: 1.0 and 2.0; 4 of 64 elements differ")
    'states[...] was changed: attn_out has other bits'
    """
    if found := _NUMBER.search(problem):
        name, seen, exact, kept, off = found.groups()
        if seen == "nan" or exact == "nan":
            return f"{name} is {'NaN where a number' if seen == 'nan' else 'a number where NaN'} is expected"
        if "inf" in seen or "inf" in exact:
            return f"{name} is {'infinite where it should not be' if 'inf' in seen else 'finite where it should not be'}"
        if kept or off is None:
            return f"{name} is {'not kept bit for bit' if kept else 'wrong'}"
        return f"{name} is {'a little ' * (float(off) <= SLIGHT)}beyond the bound"
    problem = _BITS.sub(r"\1 has other bits", problem, count=1)
    if not _PLACED.search(problem):
        problem = problem.partition("; ")[0]
    placed = _PLACED.search(problem)
    words, place = (problem, "") if placed is None else (problem[: placed.start()], placed[0])
    words = re.sub(r"\[[^\]]*\]", "[...]", words)
    return re.sub(r"(?<![\w.])[-+]?(\d[\w.+-]*|nan|inf)(?!\w)", "...", words) + place


def by_cause(failures: Iterable[tuple[str, str, str]]) -> list[Cause]:
    """Sort (id, cause, message) by cause, the worst first, then the most frequent.

    >>> worst, other = by_cause([("a", "wrong", "wrong by 3"), ("b", "wrong", "wrong by 4"), ("c", "crashed", "crashed")])
    >>> worst.ids, other
    (['c'], Cause(words='wrong', ids=['a', 'b'], messages=['wrong by 3', 'wrong by 4']))
    """
    causes: dict[str, Cause] = {}
    for id, words, message in failures:
        cause = causes.setdefault(words, Cause(words, [], []))
        cause.ids.append(id)
        cause.messages.append(message)
    return sorted(causes.values(), key=lambda cause: (severity(cause.words), -len(cause.ids)))


def severity(words: str) -> int:
    """Rank a cause: 0 for the worst."""
    numbers = len(_WORSE) + bool(re.search("a little beyond|has other bits", words))
    return next((rank for rank, pattern in enumerate(_WORSE) if re.search(pattern, words, re.DOTALL)), numbers)


def count(grid: Grid, case: Case, outcome: int) -> None:
    """Count a case, as one of `PASSED`, `FAILED` and `EXCLUDED`."""
    layout, dtype = case.kind
    grid.setdefault(layout, {}).setdefault(dtype, [0, 0, 0])[outcome] += 1


def add_grid(grid: Grid, other: Grid) -> None:
    """Add the counts of another grid."""
    for layout, row in other.items():
        for dtype, counts in row.items():
            mine = grid.setdefault(layout, {}).setdefault(dtype, [0, 0, 0])
            mine[:] = map(sum, zip(mine, counts, strict=True))
