"""Errors in the words of the function that was called: its arguments' names, and no advice that it cannot take."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, TypeVar

from rau.errors import RauError

_Function = TypeVar("_Function", bound=Callable[..., Any])
_CALL = re.compile(r"^[\w.]+(?=: )")
_SIDE = re.compile(r"\b(?:pairs\[([\d., ]+)\]\[([01])\]|states\[([\d., ]+)\]\.(?:(attn_out)|softmax_max|softmax_sum))")
_OPTION = re.compile(r"\b([a-z_]+)=(?=[\w\"'.\[{])")
_IN_A_CALL = re.compile(r"\w\([^()]*\)")  # what another function takes
_SENTENCES = re.compile(r"(?<=[^.])\. ")
_CLAUSES = re.compile(r"(: |; |, and )")
_NOUN = re.compile(r'\b(\w*layout) "\w+" expects')


def worded(*sides: tuple[str, str], call: str = "", **names: str) -> Callable[[_Function], _Function]:
    """Have a function word the errors of what it calls in its own names.

    `sides` are what it calls the output and the log-sum-exp of each pair or state, or once for all of them, with a "{k}" in it.
    `names` has what it calls something else, by patterns of what that is called: ``out_0`` and ``out_1`` are those of a pair to
    write into. `call` is its own name, where it does a part of another function's work.
    """

    def decorate(function: _Function) -> _Function:
        own = set(signature(function).parameters)

        @wraps(function)
        def wrapped(*arguments: Any, **options: Any) -> Any:
            try:
                return function(*arguments, **options)
            except RauError as error:
                text = _CALL.sub(call or function.__qualname__, str(error))
                text = _SIDE.sub(lambda found: _side(found, sides), text)
                for name, word in names.items():
                    name = re.sub(r"_([01])$", r"\\[\1\\]", name)
                    text = re.sub(rf"(?<![\w.\[]){name}(?![\w\[-])", word, text)
                error.args = (_followed(text, own), *error.args[1:])
                raise

        return wrapped  # type: ignore[return-value]

    return decorate


def _side(found: re.Match[str], sides: tuple[tuple[str, str], ...]) -> str:
    """Name an array of a pair or state, or those of several."""
    where, role = found[1] or found[3], int(found[2] or not found[4])
    if not sides:
        return found[0]
    if "{k}" in sides[0][role]:
        return sides[0][role].format(k=where)
    first, _, last = where.partition("..")
    numbers = range(int(first), int(last or first) + 1) if where.replace("..", "").isdecimal() else map(int, where.split(", "))
    return " and ".join(sides[k][role] for k in numbers)


def _followed(text: str, options: set[str]) -> str:
    """Leave out the clauses that name an option which the function does not have."""

    def takes(clause: str) -> bool:
        return all(name in options for name in _OPTION.findall(_IN_A_CALL.sub("", clause)))

    text = _NOUN.sub(lambda found: found[0] if found[1] in options else "expected", text)
    lines = []
    for line in text.split("\n"):
        sentences = []
        for sentence in _SENTENCES.split(line):
            first, *rest = _CLAUSES.split(sentence.removesuffix("."))
            kept = first if takes(first) else ""
            for mark, clause in zip(rest[::2], rest[1::2], strict=True):
                kept += (mark * bool(kept) + clause) if takes(clause) else ""
            sentences += [kept] * bool(kept)
        lines.append(". ".join(sentences) + "." * line.endswith("."))
    return "\n".join(lines)
