"""Cumulative sequence lengths: what ``actual_seq_qlen`` may be, and what people pass instead."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from rau.arrays import kind_of, looks_like_array, plain
from rau.constraints.hints import described, in_its_place, whole_numbers
from rau.constraints.rules import Violations
from rau.errors import shown

NAME = "actual_seq_qlen"


def bind_lengths(
    report: Violations, value: Any, tokens: int | None, packed: bool, vendor: bool, name: str = NAME, wait: bool = False
) -> Any:
    """Check the cumulative sequence lengths of a TND call, of `tokens` tokens if that is known; a `vendor` wants int64.

    `name` is what the caller knows them by.

    Return them as an int64 array of shape (sequences + 1,), a device array as it is (unless the caller can `wait` for it), and
    so anything while torch traces, which has no values; None without any, or where they are wrong.
    """
    if value is None:
        end = "T" if tokens is None else f"T = {tokens}"
        wanted = f"the cumulative sequence lengths from 0 to {end}"
        if tokens is not None:
            wanted += f", such as [0, {tokens}] for a single sequence"
        if vendor:
            hint = "" if packed else ' profile="portable" takes token-major statistics without it.'
            report.add("tnd-qlen-required", f'{name} is None; layout "TND" expects {wanted}.{hint}')
        elif packed:
            report.add("packed-qlen-required", f'{name} is None; packed statistics expect {wanted}.')
        return None
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling():
        return value
    if isinstance(value, (list, tuple)):
        lengths = _from_list(report, value, name)
        if lengths is None:
            return None
    else:
        value = plain(value)
        kind = kind_of(value)
        if kind is None:
            report.add("qlen-dtype", f"{name} is {described(value)}; expected an int64 array or a list of ints."
                       f"{in_its_place(value)}")  # fmt: skip
            return None
        if fault := kind.fault(value):
            report.add("array", f"{name} {fault}")
            return None
        dtype, shape = kind.dtype(value), tuple(value.shape)
        if dtype != "int64" and (vendor or dtype != "int32"):
            hint = whole_numbers(name, kind.name, dtype) + (' profile="portable" takes int32 too.' if dtype == "int32" else "")
            report.add("qlen-dtype", f"{name} has dtype {dtype}; expected int64{'' if vendor else ' or int32'}.{hint}")
            dtype = ""
        if len(shape) != 1 or shape[0] == 0:
            report.add("qlen-rank", f"{name} has shape {shape}; expected one axis with one more entry than there are "
                       "sequences, so at least [0].")  # fmt: skip
            return None
        if not dtype:
            return None
        if not (wait or kind.readable(value)):
            return value
        # A copy: what is checked is what is used, whoever writes to the caller's meanwhile.
        lengths = np.array(kind.to_numpy(value), dtype=np.int64)
    return _check_cumulative(report, lengths, tokens, name)


def _from_list(report: Violations, value: list[Any] | tuple[Any, ...], name: str) -> np.ndarray | None:
    wrong = [item for item in value if isinstance(item, bool) or not isinstance(item, (int, np.integer))]
    if wrong:
        item: Any = wrong[0]
        tensors = looks_like_array(item) and tuple(item.shape) == () and not isinstance(item, np.generic)
        hint = " Pass the whole tensor's .tolist(), not a list of its elements." if tensors else ""
        report.add("qlen-dtype", f"{name} holds {shown(wrong[0])}, {described(wrong[0])}; expected ints.{hint}")
        return None
    if not value:
        report.add("qlen-rank", f"{name} is empty; expected one more entry than there are sequences, so at least [0].")
        return None
    try:
        return np.array(value, dtype=np.int64)
    except OverflowError:
        report.add("qlen-dtype", f"{name} holds a number that does not fit into int64.")
        return None


def _check_cumulative(
    report: Violations, lengths: np.ndarray, tokens: int | None, name: str
) -> np.ndarray | None:
    first, last = int(lengths[0]), int(lengths[-1])
    # Compared, not subtracted: a difference of two int64 may wrap.
    falls = lengths[1:] < lengths[:-1]
    falling = falls.any()
    if first == 0 and not falling and tokens in (last, None):
        return lengths
    if falling:
        at = int(falls.argmax())
        found = f"it decreases from {lengths[at]} at index {at} to {lengths[at + 1]}"
    elif first != 0:
        found = f"it starts at {first}"
    else:
        found = f"it ends at {last}"
    hint = ""
    if first == 0 and not falling:  # cumulative, even where it also adds up to T
        if tokens is not None and last < tokens and name == NAME:
            whole = [*lengths.tolist(), tokens] if len(lengths) <= 8 else f"numpy.append({name}, {tokens})"
            hint = " The buffer is longer than the last length: if the rest is padding, pass it as a sequence of its own: "
            hint += f"{whole}."
    elif (lengths >= 0).all() and int(lengths.sum(dtype=object)) == tokens:
        hint = " It looks like the lengths themselves: pass numpy.concatenate([[0], numpy.cumsum(lengths)])"
        if len(lengths) <= 8:
            hint += f", here {np.concatenate([[0], np.cumsum(lengths)]).tolist()}"
        hint += "."
    elif not falling and first > 0 and last == tokens:
        hint = " The leading 0 seems to be missing."
    end = "T" if tokens is None else f"T = {tokens}"
    report.add("tnd-qlen-cumulative", f"{name} = {_short(lengths)}: {found}; expected a non-decreasing sequence from "
               f"0 to {end}.{hint}")  # fmt: skip
    return None


def _short(lengths: np.ndarray) -> str:
    if len(lengths) <= 10:
        return str(lengths.tolist())
    head, tail = (", ".join(map(str, part)) for part in (lengths[:5].tolist(), lengths[-3:].tolist()))
    return f"[{head}, ..., {tail}]"
