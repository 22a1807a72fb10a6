"""The named rules of the operator, and the report that collects the broken ones.

Sources: *page* is the reference page of ``mindspore.ops.ring_attention_update``; *CANN V2* the newer
entry of the vendor's operator library; *rau* a rule of this package, with its reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from rau.constraints.hints import meant
from rau.errors import (
    ConstraintError,
    DTypeError,
    LayoutError,
    OptionError,
    ShapeError,
    shown,
)


class Rule(NamedTuple):
    """One rule: what kind of error it is, why it exists, and who says so."""

    error: type[ConstraintError]
    reason: str
    source: str


RULES: dict[str, Rule] = {
    "layout": Rule(LayoutError, "the layout tells which axis is which", "page"),
    "layout-profile": Rule(LayoutError, "the vendors know SBH and TND only", "page"),
    "softmax-layout": Rule(LayoutError, "TND statistics come in two orders", "CANN V2"),
    "profile": Rule(OptionError, "a profile names a set of limits", "rau"),
    "base": Rule(OptionError, "logarithms to base 2 and e are mixed up silently", "rau"),
    "lse-layout": Rule(OptionError, "(T, N) and (N, T) both exist in TND, and no shape tells them apart where T = N", "rau"),
    "heads": Rule(ShapeError, "key heads of grouped queries look like fewer query heads", "rau"),
    "to": Rule(OptionError, "statistics are reordered to one of two orders", "rau"),
    "mode": Rule(OptionError, "the configuration is printed or returned", "rau"),
    "threads": Rule(OptionError, "at least one thread runs a call", "rau"),
    "statistics": Rule(OptionError, "a merge returns a state, or its output alone", "rau"),
    "check": Rule(OptionError, "a check level says what is read", "rau"),
    "states": Rule(ShapeError, "a state is three arrays, and there is at least one", "rau"),
    "first-update": Rule(ShapeError, "the first partial gives the shape of the whole, unless like= does", "rau"),
    "tokens": Rule(OptionError, "tokens are chosen by a slice, a mask or their numbers; halves by name", "rau"),
    "indptr": Rule(OptionError, "rows of any number of states are merged as they are", "rau"),
    "tokens-odd": Rule(ShapeError, "a sequence of odd length has no halves", "rau"),
    "array": Rule(DTypeError, "results are of the inputs' kind, so the inputs must have one", "rau"),
    "array-kind": Rule(DTypeError, "nothing is copied between libraries behind the caller's back", "rau"),
    "array-device": Rule(ConstraintError, "nothing is copied between devices behind the caller's back", "rau"),
    "dtype-attn": Rule(DTypeError, "the dtypes of attention outputs", "page"),
    "dtype-match": Rule(DTypeError, "prev and cur are alike", "page"),
    "dtype-stats": Rule(DTypeError, "softmax statistics are float32", "page"),
    "rank": Rule(ShapeError, "the layout gives the number of axes", "page"),
    "shape-match": Rule(ShapeError, "prev and cur are alike", "page"),
    "heads-divide-hidden": Rule(ShapeError, "D = H / N, with N read off the statistics", "page"),
    "shape-stats": Rule(ShapeError, "one statistic for each token and head", "page"),
    "lanes": Rule(ShapeError, "the vendor's block of 32 bytes holds 8 equal numbers", "page"),
    "packed-regular": Rule(ShapeError, "packed rows are found by counting, so they must be evenly spaced", "rau"),
    "tnd-qlen-required": Rule(ConstraintError, "the chip's kernel walks sequence by sequence", "page"),
    "packed-qlen-required": Rule(ConstraintError, "packed rows are ordered by sequence", "rau"),
    "qlen-dtype": Rule(DTypeError, "cumulative lengths are int64", "page"),
    "qlen-rank": Rule(ShapeError, "cumulative lengths are 1-D, one more than there are sequences", "page"),
    "tnd-qlen-cumulative": Rule(ConstraintError, "it must be a non-decreasing sequence from 0 to T", "page"),
    "qlen-padded": Rule(ShapeError, "each sequence fits the slot that it is padded to", "rau"),
    "tnd-head-dim-64": Rule(ConstraintError, "the chip's kernel moves 64 elements at a time", "page, CANN V2"),
    "tnd-unified-buffer": Rule(ConstraintError, "a token must fit the chip's 192 KiB unified buffer", "page"),
    "tnd-heads-256": Rule(ConstraintError, "the chip's kernel takes at most 256 heads", "CANN V2"),
    "tnd-head-dim-768": Rule(ConstraintError, "the chip's kernel takes D up to 768", "CANN V2"),
    "group": Rule(OptionError, "ranks that work together are a process group", "rau"),
    "timeout": Rule(OptionError, "a rank that is lost is waited for in vain", "rau"),
    "ranks": Rule(ConstraintError, "ranks that work together make the same call", "rau"),
    "method": Rule(OptionError, "states of several ranks are merged in one of the ways that there are", "rau"),
    "over": Rule(OptionError, "a state is shared out by rows", "rau"),
    "attention": Rule(OptionError, "what attends, its scale and its gradient are one thing", "rau"),
    "scale": Rule(OptionError, "eight bits have little range, and values are scaled into it", "rau"),
    "out": Rule(ShapeError, "out is a triple of arrays to write into", "rau"),
    "out-dtype": Rule(DTypeError, "the result has prev's dtypes", "page"),
    "out-shape": Rule(ShapeError, "the result has prev's shapes", "page"),
    "out-writable": Rule(ShapeError, "the result is written into out", "rau"),
    "out-strides": Rule(ShapeError, "rows are written whole", "rau"),
    "out-overlap": Rule(ShapeError, "no element may be overwritten before it is read", "rau"),
    "value-lanes": Rule(ConstraintError, "the 8 lanes hold one number", "page"),
    "value-sum": Rule(ConstraintError, "a sum of exponentials is not negative and not NaN", "rau"),
    "value-max": Rule(ConstraintError, "a score's maximum is a number, or -inf for an empty row", "rau"),
    "value-memory": Rule(ConstraintError, "a state that the next one has overwritten is lost", "rau"),
    "document-max-positive": Rule(ConstraintError, "the reference page says that max is positive", "page"),
}


_MOST_LINES = 20  # of a message; the error's `rules` has them all


class Violations:
    """Collects every broken rule of one call, then raises them as one error."""

    def __init__(self, call: str) -> None:
        self.call = call
        self.broken: list[tuple[str, str]] = []

    def add(self, rule: str, message: str) -> None:
        """Note a broken rule, a key of :data:`RULES`: what was found, what was expected, what to do."""
        self.broken.append((rule, message))

    def choice(
        self,
        rule: str,
        argument: str,
        value: object,
        known: Collection[str],
        note: str = "",
        others: Mapping[str, tuple[str, str]] | None = None,
    ) -> str:
        """Check that an option's value exists, and note it with the one that seems to be meant where it does not.

        What follows looks at what is returned, the value or "" where it is wrong, since anything may have been given: an
        array compared to a name is an array.

        `note` is appended: what the values mean. `others` is for values that are no words, as :func:`meant` takes it;
        without it the closest spelling is named.
        """
        if isinstance(value, str) and value in known:  # asked in this order, anything can be tested
            return value
        expected = ", ".join(f'"{name}"' for name in known)
        text = f"{argument} = {shown(value)}; expected one of {expected}."
        if isinstance(value, str):
            text += _closest(value, known) if others is None else meant(value, known, others)
        self.add(rule, text + note)
        return ""

    def error(self) -> ConstraintError:
        """Word everything noted as one error, of the class of the first broken rule; what several states share, once."""
        broken = list(_folded(self.broken))
        lines = [f"[{rule}] {message}" for rule, message in broken]
        if len(lines) > _MOST_LINES:
            lines[_MOST_LINES:] = [f"and {len(lines) - _MOST_LINES:,} more"]
        if len(broken) == 1:
            text = f"{self.call}: {lines[0]}"
        else:
            text = "\n  ".join([f"{self.call}: {len(broken)} rules are broken:", *lines])
        return RULES[broken[0][0]].error(text, tuple(rule for rule, _ in broken))

    def raise_if_broken(self) -> None:
        """Raise what was noted.

        Raises
        ------
        ConstraintError
            If anything was.
        """
        if self.broken:
            raise self.error()


def _folded(broken: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Say once what is said alike of several states: "states[0..63].softmax_max has dtype ..."."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for rule, message in broken:
        before, _, rest = message.partition("states[")
        index, _, after = rest.partition("]")
        if index.isdecimal():
            alike.setdefault((rule, before, after), []).append(int(index))
        else:
            alike.setdefault((rule, message), [])
    for (rule, *parts), indices in alike.items():
        runs: list[list[int]] = []  # each its first and its last
        for k in indices:
            if runs and k == runs[-1][-1] + 1:
                runs[-1][1:] = [k]
            else:
                runs.append([k])
        yield rule, f"states[{', '.join('..'.join(map(str, run)) for run in runs)}]".join(parts)


def _closest(name: str, known: Collection[str]) -> str:
    import difflib

    lowered = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f' Did you mean "{lowered[close[0]]}"?' if close else ""
