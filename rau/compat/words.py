"""Errors in the words of the function that was called: its arguments' names, and no advice that it cannot take."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from typing import Any, TypeVar

from rau.errors import RauError

_Function = TypeVar("_Function", bound=Callable[..., Any])
_CALL = re.compile(r"^[\w.]+(?=: )")
_SIDE = re.compile(r"\b(?:pairs\[([\d., ]+)\]\[([01])\]|states\[([\d., ]+)\]\.(?:(attn_out)|softmax_max|softmax_sum))")
_OPTION = re.compile(r"\b([a-z_]+)=(None)?(?=[\w\"'.\[{]|(?<=None))")
_IN_A_CALL = re.compile(r"\w\([^()]*\)")  # what another function takes
_SENTENCES = re.compile(r"(?<=[^.])\. ")
_CLAUSES = re.compile(r"(: |; |, and |, or )")
_NOUN = re.compile(r'\b(\w*layout) "\w+" expects')


def worded(*sides: tuple[str, str], call: str = "", **names: str) -> Callable[[_Function], _Function]:
    """Have a function word the errors of what it calls in its own names.

    `sides` are what it calls the output and the log-sum-exp of each pair or state, or once for all of them, with a "{k}" in it.
    `names` has what it calls something else, by what that is called: ``out_0`` and ``out_1`` are those of a pair to write into.
    `call` is its own name, where it does a part of another function's work.
    """
    patterns = [(_pattern(name), word) for name, word in names.items()]

    def decorate(function: _Function) -> _Function:
        its_name = call or function.__qualname__
        own = {name: parameter.default for name, parameter in signature(function).parameters.items()}

        @wraps(function)
        def wrapped(*arguments: Any, **options: Any) -> Any:
            try:
                return function(*arguments, **options)
            except RauError as error:
                text = _CALL.sub(its_name, str(error))
                text = _SIDE.sub(lambda found: _side(found, sides), text)
                for pattern, word in patterns:
                    text = pattern.sub(word, text)
                error.args = (_followed(text, own), *error.args[1:])
                raise

        return wrapped  # type: ignore[return-value]

    return decorate


def _pattern(name: str) -> re.Pattern[str]:
    """Match an argument's name: a word that is one of the language's too, such as "out", only where it can be no other."""
    escaped = re.escape(re.sub(r"_([01])$", r"[\1]", name))
    if not name.isalpha():
        return re.compile(rf"(?<![\w.\[]){escaped}(?![\w\[-])")
    return re.compile(rf"(?:(?<=\] )|(?<=\w: )){name}(?= (?:is|has|and|shares|overlaps|requires) )|(?<![\w.\[]){name}(?= ?=)")


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


def _followed(text: str, options: Mapping[str, Any]) -> str:
    """Leave out the clauses that name an option which the function does not have, or None for one that it has to be given."""

    def takes(clause: str) -> bool:
        named = _OPTION.findall(_IN_A_CALL.sub("", clause))
        return all(name in options and (not none or options[name] is None) for name, none in named)

    text = _NOUN.sub(lambda found: found[0] if found[1] in options else "expected", text)
    lines = []
    for line in text.split("\n"):
        sentences = []
        for sentence in _SENTENCES.split(line):
            first, *rest = _CLAUSES.split(sentence.removesuffix("."))
            kept = first if takes(first) else ""
            for mark, clause in zip(rest[::2], rest[1::2], strict=True):
                if takes(clause):
                    kept += mark + clause if kept else _begun(clause)
            sentences += [kept] * bool(kept)
        lines.append(". ".join(sentences) + "." * line.endswith("."))
    return "\n".join(lines)


def _begun(clause: str) -> str:
    """Begin a sentence with what was a later clause of it."""
    clause = clause.removeprefix("or ")
    return clause[:1].upper() + clause[1:]
