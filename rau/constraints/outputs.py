"""``out``: the arrays to write into and what they may share memory with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rau.arrays import Kind, kind_of
from rau.constraints.hints import described, not_an_array
from rau.constraints.rules import Violations
from rau.layouts import FIELDS, packed_row_stride

_ALONE = {"merge_lse": "out[0]"}  # what an output that is written without statistics is called, if not "out"
Names = Callable[[int, int], str]  # (state, field) -> the name that the caller knows it by


def is_whole(report: Violations, out: Any, statistics: bool) -> bool:
    """Check that `out` is three things, or one where no statistics are wanted."""
    if isinstance(out, (tuple, list)) and len(out) == (3 if statistics else 1):
        return True
    got = f"has {len(out)} items" if isinstance(out, (tuple, list)) else f"is {described(out)}"
    report.add("out", f"out {got}; expected an AttentionState or a triple (attn_out, softmax_max, softmax_sum).")
    return False


def check_out(
    report: Violations,
    kind: Kind,
    states: Sequence[Sequence[Any]],
    out: Sequence[Any],
    names: Names,
    shapes: Sequence[tuple[int, ...]],
    dtypes: tuple[str, str],
    packed: bool,
) -> bool:
    """Check the arrays to write into, a state's or its output alone.

    Returns whether the call is in place: an output stands on an input.
    """
    broken = len(report.broken)
    if kind.name == "jax":
        report.add("out-writable", "out is given, and JAX arrays cannot be written into; expected None. Take what is returned.")
        return False
    device = kind.device(states[0][0])
    views = []
    for field, array in enumerate(out):
        name = f"out.{FIELDS[field]}" if len(out) > 1 else _ALONE.get(report.call, "out")
        its = kind_of(array)
        if its is None:
            report.add("array", not_an_array(name, array))
            continue
        if fault := its.fault(array):
            report.add("array", f"{name} {fault}")
            continue
        if its.name != kind.name:
            report.add("array-kind", f"{name} is a {its.name} array; expected a {kind.name} one, like the inputs.")
            continue
        if its.device(array) != device:
            report.add("array-device", f"{name} is on {its.device(array)}; expected {device}, like the inputs.")
        dtype, wanted = its.dtype(array), dtypes[field > 0]
        if dtype != wanted:
            report.add("out-dtype", f"{name} has dtype {dtype}; expected {wanted}.")
        view = field > 0 and _is_from_lse(its, array)
        if view:
            views.append(name)
        elif not its.writable(array):
            report.add("out-writable", f"{name} is read-only; expected an array that may be written to.")
        if tuple(array.shape) != shapes[field]:
            report.add("out-shape", f"{name} has shape {tuple(array.shape)}; expected {shapes[field]}.")
        elif not view and not its.contiguous(array):
            _check_strides(report, its, name, array, packed and field > 0)
    if views:  # a habit, said once, and not by what it comes to
        report.add("out-writable", f"{' and '.join(views)} {'have' if views[1:] else 'has'} lanes of stride 0, as "
                   "AttentionState.from_lse makes them; expected arrays that may be written to. To merge in place, use "
                   "rau.merge_lse(..., out=pair) of pairs (attn_out, lse), or a rau.StreamingMerge.")  # fmt: skip
    return len(report.broken) == broken and _check_overlap(report, kind, states, out, names)


def _is_from_lse(kind: Kind, array: Any) -> bool:
    """Tell whether statistics are as AttentionState.from_lse makes them, where these cannot be written to."""
    strides = kind.strides(array) or (1,)
    shared = array.shape[-1:] != (1,) and not kind.contiguous(array)  # an axis of length 1 may have any stride
    return strides[-1:] == (0,) and (shared or not kind.writable(array))


def _check_strides(report: Violations, kind: Kind, name: str, array: Any, packed: bool) -> None:
    """Check that rows can be written whole, and each element once."""
    shape = tuple(array.shape)
    strides = kind.strides(array)
    if strides is None:
        if not kind.writable(array):
            return  # which has been said
        report.add("out-strides", f"{name} is not aligned to its items; expected an aligned array. Pass such an array and assign "
                   "from it.")  # fmt: skip
        return
    if shape[-1] > 1 and strides[-1] != 1:
        report.add("out-strides", f"{name} has strides {strides} (in elements) for shape {shape}; expected a "
                   "contiguous last axis. Pass such an array and assign from it.")  # fmt: skip
    if packed and packed_row_stride(shape, strides) is None:
        report.add("packed-regular", f"{name} has strides {strides} (in elements) for shape {shape}; packed statistics "
                   "must be contiguous. Pass such an array and assign from it.")  # fmt: skip
    if kind.memory(array).overlaps_itself():
        report.add("out-overlap", f"{name} has strides {strides} (in elements) for shape {shape} and overlaps itself; "
                   "expected separate memory for each element. Pass a copy.")  # fmt: skip


def _check_overlap(
    report: Violations, kind: Kind, states: Sequence[Sequence[Any]], out: Sequence[Any], names: Names
) -> bool:
    """Refuse outputs that share memory with anything, save an input of their own role exactly beneath them.

    Returns whether the call is in place.
    """
    # Most calls are settled by one sweep over the extents: no two of them meet.
    in_place = False
    extents = [kind.extent(array) for array in out]
    for state in states:
        for field, array in enumerate(state):
            if field < len(out) and array is out[field]:
                in_place = True
            else:
                extents.append(kind.extent(array))
    extents.sort()
    end = 0
    for low, high in extents:
        if low < end and low < high:
            break
        end = max(end, high)
    else:
        return in_place

    in_place = False
    memory = [kind.memory(array) for array in out]
    for field, mine in enumerate(memory):
        for later in range(field + 1, len(memory)):
            if mine.overlaps(memory[later]):
                report.add("out-overlap", f"out.{FIELDS[field]} and out.{FIELDS[later]} share memory; "
                           "expected three separate arrays.")  # fmt: skip
        for k, state in enumerate(states):
            for role, array in enumerate(state):
                its = kind.memory(array)
                if not mine.overlaps(its):
                    continue
                if mine.same_view(its) and (role == 0) == (field == 0):
                    in_place = True
                else:
                    name = f"out.{FIELDS[field]}" if len(out) > 1 else _ALONE.get(report.call, "out")
                    report.add("out-overlap", f"{name} shares memory with {names(k, role)}; expected "
                               f"separate memory or, to work in place, exactly an input's {FIELDS[field]}: the same "
                               "address, shape and strides.")  # fmt: skip
    return in_place
