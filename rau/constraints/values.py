"""What ``check="values"`` and ``check="document"`` read in the statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from rau.arrays import Kind
from rau.constraints.rules import Violations


def check_values(
    report: Violations, kind: Kind, states: Sequence[Sequence[Any]], names: Callable[[int, int], str], check: str,
    tokens: np.ndarray | None = None,
) -> None:  # fmt: skip
    """Read the statistics of every state, of shape (..., lanes), and note what no attention kernel would have written.

    The check "document" also holds the reference page to its word that max is positive. `tokens` are the numbers that the rows
    of the first axis have for the caller, where the states are but some of those given.
    """
    if kind.device(states[0][0]) == "meta":
        report.add("array-device", f'{names(0, 0)} is on meta, where tensors have no values; check = "{check}" expects a device '
                   'that has them. Leave check at "metadata".')  # fmt: skip
        return
    note = partial(_note, report, tokens)
    for k, state in enumerate(states):
        maximum, total = (kind.to_numpy(array) for array in state[1:])
        for name, stats in ((names(k, 1), maximum), (names(k, 2), total)):
            lane = stats[..., :1]
            note("value-lanes", name, stats, (stats != lane) & ~(np.isnan(stats) & np.isnan(lane)),
                  "that of lane 0: the lanes of one token and head are equal")  # fmt: skip
        check_maxima(report, names(k, 1), maximum, check, tokens)
        note("value-sum", names(k, 2), total, ~(total >= 0), "a number that is not negative")


def check_maxima(report: Violations, name: str, maximum: np.ndarray, check: str, tokens: np.ndarray | None = None) -> None:
    """Note maxima that no attention kernel would have written, as :func:`check_values` does."""
    expected = "a finite number, or -inf for a row without keys"
    _note(report, tokens, "value-max", name, maximum, np.isnan(maximum) | (maximum == np.inf), expected)
    if check == "document":
        expected = 'a positive number, as the reference page says (real maxima are often negative: check="values")'
        _note(report, tokens, "document-max-positive", name, maximum, ~(maximum > 0), expected)


def check_memory(
    report: Violations,
    kind: Kind,
    states: Sequence[Sequence[Any]],
    regular: Sequence[Sequence[Any]],
    names: Callable[[int, int], str],
) -> None:
    """Note outputs of several states in one place: a kernel that writes into one buffer has overwritten the earlier ones.

    A place may be shared where no row has seen keys in both states, as the rows of a buffer that several kernels fill.
    `states` are where they lie, `regular` has the same values, readable.
    """
    places: dict[Any, np.ndarray] = {}  # and of each row there, the first state that has seen keys in it
    for k, (attn_out, _, _) in enumerate(states):
        if 0 in attn_out.shape:
            continue
        low, high = kind.extent(attn_out)
        live = _live(kind, regular[k])
        first = places.setdefault((low, high) if low < high else id(attn_out), np.full(live.shape, len(states)))
        earlier = int(first[live].min(initial=len(states)))
        first[live] = np.minimum(first[live], k)
        if earlier < k:
            report.add("value-memory", f"{names(k, 0)} is in the same memory as {names(earlier, 0)}, and some rows have "
                       "seen keys in both states; expected separate memory for each. A kernel that writes into one buffer has "
                       "overwritten the earlier state: copy that before the next call.")  # fmt: skip


def _live(kind: Kind, state: Sequence[Any]) -> np.ndarray:
    maximum, total = (kind.to_numpy(array)[..., 0] for array in state[1:])
    return (total != 0) & (maximum != -np.inf)


def _note(
    report: Violations, tokens: np.ndarray | None, rule: str, name: str, stats: np.ndarray, wrong: np.ndarray, expected: str
) -> None:
    count = int(np.count_nonzero(wrong))
    if count:
        index = tuple(int(axis) for axis in np.unravel_index(int(np.argmax(wrong)), wrong.shape))
        place = index if tokens is None else (int(tokens[index[0]]), *index[1:])
        others = f" ({count} such elements)" if count > 1 else ""
        report.add(rule, f"{name}{list(place)} = {stats[index]}; expected {expected}.{others}")
