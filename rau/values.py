"""What ``check="values"`` and ``check="document"`` read in the statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rau.arrays import Kind
from rau.rules import Report


def check_values(
    report: Report, kind: Kind, states: Sequence[Sequence[Any]], names: Callable[[int, int], str], check: str
) -> None:
    """Read the statistics of every state and note what no attention kernel would have written.

    Parameters
    ----------
    report : Report
    kind : Kind
    states : sequence of triples of arrays
        Statistics of shape (..., lanes), float32 or float64.
    names : callable
        Gives the caller's name of array `field` of state `state`.
    check : {"values", "document"}
        "document" also holds the reference page to its word that max is positive.
    """
    if kind.device(states[0][0]) == "meta":
        report.add("array-device", f'{names(0, 0)} is on meta, where tensors have no values; check = "{check}" expects a device '
                   'that has them. Leave check at "metadata".')  # fmt: skip
        return
    for k, state in enumerate(states):
        maximum, total = (kind.to_numpy(array) for array in state[1:])
        for name, stats in ((names(k, 1), maximum), (names(k, 2), total)):
            lane = stats[..., :1]
            _note(report, "value-lanes", name, stats, (stats != lane) & ~(np.isnan(stats) & np.isnan(lane)),
                  "that of lane 0: the lanes of one token and head are equal")  # fmt: skip
        _note(report, "value-max", names(k, 1), maximum, np.isnan(maximum) | (maximum == np.inf),
              "a finite number, or -inf for a row without keys")  # fmt: skip
        if check == "document":
            _note(report, "document-max-positive", names(k, 1), maximum, ~(maximum > 0),
                  'a positive number, as the reference page says (real maxima are often negative: check="values")')
        _note(report, "value-sum", names(k, 2), total, ~(total >= 0), "a number that is not negative")


def _note(report: Report, rule: str, name: str, stats: np.ndarray, wrong: np.ndarray, expected: str) -> None:
    count = int(np.count_nonzero(wrong))
    if count:
        index = tuple(int(axis) for axis in np.unravel_index(int(np.argmax(wrong)), wrong.shape))
        others = f" ({count} such elements)" if count > 1 else ""
        report.add(rule, f"{name}{list(index)} = {stats[index]}; expected {expected}.{others}")
