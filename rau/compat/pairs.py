"""What the peers' modules share: a merge of pairs (out, lse) into what of both the caller has given, and the shapes they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rau.arithmetic import library
from rau.arrays import kind_of, plain
from rau.constraints.hints import described, not_an_array
from rau.constraints.lengths import bind_lengths
from rau.constraints.rules import Violations
from rau.state import states_of
from rau.update import merge_lse, merge_states


def merged(
    pairs: Sequence[Sequence[Any]], how: dict[str, Any], out: Any = None, lse: Any = None, *, with_lse: bool = True,
    dtype: Any = None, **asked: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """Merge pairs into an output and a log-sum-exp, each new where it is None; without `with_lse` into an output alone.

    `how` is what :func:`rau.merge_lse` is told of the pairs, `dtype` and `asked` what it is asked of the result, which has
    None for what was not wanted.
    """
    if dtype is not None and pairs and dtype == pairs[0][0].dtype:
        dtype = None  # which can be traced
    asked["dtype"] = dtype
    if not with_lse:
        axes, inf_is_empty = how["lse_layout"], how.get("inf_is_empty", False)
        states = states_of(pairs, names_of(pairs), Violations("merge_lse"), how["base"], how["layout"], axes, inf_is_empty, None, 1)
        return merge_states(states, layout=how["layout"], statistics=False, out=out, **asked), None
    if pairs and (out is not None or lse is not None):
        asked["out"] = [library(like).empty_like(like) if array is None else array for array, like in zip((out, lse), pairs[0])]
    return merge_lse(pairs, **how, **asked)


def names_of(pairs: Sequence[Any]) -> list[tuple[str, str]]:
    """Name the arrays of pairs as :func:`rau.merge_lse` does."""
    return [(f"pairs[{k}][0]", f"pairs[{k}][1]") for k in range(len(pairs))]


def check(call: str, given: Mapping[str, tuple[Any, str]]) -> None:
    """Check that arguments are arrays of the shapes that a peer's call has, before anything is asked of them.

    Each comes with its shape, such as "(T, K, N, D)", or with several, "(T, N, D) or (B, S, N, D)". What has the same letter
    has the same size. All else is the operator's to say.

    Raises
    ------
    ConstraintError
    """
    report, sizes = Violations(call), dict[str, tuple[int, str]]()
    for name, (array, forms) in given.items():
        if kind_of(plain(array)) is None:
            report.add("array", not_an_array(name, array))
            continue
        shape = tuple(array.shape)
        named = [[letter for letter in form.strip("()").split(", ") if letter] for form in forms.split(" or ")]
        letters = next((each for each in named if len(each) == len(shape)), None)
        if letters is None:
            report.add("rank", f"{name} has shape {shape}; expected {forms}.")
            continue
        theirs = [
            sizes.setdefault(letter, (size, "")) if letter.isalpha() else (int(letter), "") for letter, size in zip(letters, shape)
        ]
        expected = tuple(size for size, _ in theirs)
        if expected != shape:
            whose = " and ".join(dict.fromkeys(other for size, other in theirs if other))
            report.add(
                "shape-match",
                f"{name} has shape {shape}; expected ({', '.join(letters)}) = {expected}{f', as {whose} has' * bool(whose)}.",
            )
        sizes |= {letter: (size, name) for letter, (size, other) in zip(letters, theirs) if not other}
    report.raise_if_broken()


def check_written(call: str, **given: Any) -> None:
    """Check that arrays may be written to, which a peer's call does by itself, not through the operator.

    Raises
    ------
    ConstraintError
    """
    report = Violations(call)
    for name, array in given.items():
        kind = kind_of(array)
        if kind is not None and not kind.writable(array):
            report.add("out-writable", f"{name} is read-only; expected an array that may be written to.")
    report.raise_if_broken()


def zipped(call: str, outs: tuple[str, Any, str], lses: tuple[str, Any, str]) -> list[tuple[Any, Any]]:
    """Return the pairs of stacked outputs and log-sum-exps, arrays or lists of them, each with its name and what it stacks.

    Raises
    ------
    ConstraintError
    """
    report, counts = Violations(call), []
    for name, stack, _ in (outs, lses):
        if isinstance(stack, (list, tuple)) or kind_of(plain(stack)) is not None and len(stack.shape):
            counts.append(len(stack))
        else:
            report.add(
                "array", f"{name} is {described(stack)}; expected an array, or a list of arrays, one for each part of the keys."
            )
    if len(set(counts)) > 1:
        report.add("states", f"{outs[0]} is of {counts[0]} parts and {lses[0]} of {counts[1]}; expected as many.")
    report.raise_if_broken()
    check(call, {f"{name}[{k}]": (each, form) for name, stack, form in (outs, lses) for k, each in enumerate(stack)})
    return list(zip(outs[1], lses[1], strict=True))


def starts_of(call: str, cu_seqlens: Any, factor: int = 1, **rows: tuple[Any, bool]) -> np.ndarray:
    """Return cumulative sequence lengths, an array, on the host; each is to be a multiple of a factor.

    Each of `rows` is said to be packed or not. Packed, it has the tokens of all sequences on the last of two axes, or on the
    first of three; else padded on its last, and the sequences on its first.

    Raises
    ------
    ConstraintError
    """
    report = Violations(call)
    starts: np.ndarray = bind_lengths(report, cu_seqlens, None, False, False, "cu_seqlens", wait=True)
    report.raise_if_broken()
    if (odd := starts[starts % factor != 0]).size:
        report.add("qlen-padded", f"cu_seqlens holds {odd[0]}; expected multiples of {factor}.")
    for name, (array, packed) in rows.items():
        longest, shape = int(starts[-1] if packed else np.diff(starts).max(initial=0)), tuple(array.shape)
        if shape[0 if packed and len(shape) == 3 else -1] < longest:
            report.add("shape-stats", f"{name} has shape {shape}; expected room for {longest} tokens, as cu_seqlens has.")
        elif not packed and shape[0] != len(starts) - 1:
            report.add("shape-stats", f"{name} has shape {shape}; expected {len(starts) - 1} sequences, as cu_seqlens has.")
    report.raise_if_broken()
    return starts
