"""The one validator: it turns a call's arguments into a Problem, or into one error that names every broken rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rau.arrays import Kind, kind_of, plain
from rau.arrays.foreign import ForeignKind
from rau.arrays.numpy_ import NARROW
from rau.constraints import cache
from rau.constraints.hints import another_dtype, not_an_array, swapped
from rau.constraints.lengths import bind_lengths
from rau.constraints.options import CHECKS, Options, check_options
from rau.constraints.outputs import Names, check_out, is_whole
from rau.constraints.profiles import PROFILES, Profile
from rau.constraints.results import result_dtype
from rau.constraints.rules import RULES, Rule, Violations
from rau.constraints.values import check_memory, check_values
from rau.layouts import FIELDS, LAYOUTS, dimensions, packed_row_stride
from rau.problem import Problem

__all__ = ["CHECKS", "FIELDS", "PROFILES", "RULES", "Options", "Problem", "Profile", "Rule", "bind", "check_options", "checked"]


_ONE_LANE = ' profile="portable" takes 1 lane as well, and AttentionState.from_lse(..., lanes=8) makes 8.'


def checked(
    call: str,
    states: Sequence[Sequence[Any]],
    names: Names,
    actual_seq_qlen: Any,
    options: Options,
    out: Sequence[Any] | None,
    half: str | None = None,
) -> tuple[Problem, Sequence[Sequence[Any]], Sequence[Any] | None]:
    """Check a call as :func:`bind` does, or recognise it: nobody else knows that calls are remembered.

    `out` comes back with the states: as the arrays that were checked, whatever class the caller's are of.
    """
    signature = cache.signature(call, states, actual_seq_qlen, options, out)
    problem = None if signature is None else cache.recall(signature)
    if problem is not None:
        return problem, states, out
    # What a subclass says of itself is believed by nobody: seen as its library's own class, an array is checked and used.
    states = [[plain(array) for array in state] for state in states]
    if isinstance(out, (tuple, list)):
        out = [plain(array) for array in out]
    problem, bound = bind(call, states, names, actual_seq_qlen, options, out, half)
    if signature is not None and bound is states:  # else others than the caller's would have to be made each time
        cache.remember(signature, problem, states, out)
    return problem, bound, out


def bind(
    call: str,
    states: Sequence[Sequence[Any]],
    names: Names,
    actual_seq_qlen: Any,
    options: Options,
    out: Sequence[Any] | None,
    half: str | None = None,
    dtype: Any = None,
) -> tuple[Problem, Sequence[Sequence[Any]]]:
    """Check a call and describe it.

    Parameters
    ----------
    call : str
        Name of the public function, for messages.
    states : sequence of triples of arrays
        attn_out, softmax_max, softmax_sum of each input state.
    names : callable
        Gives the caller's name for array `field` of state `state`.
    actual_seq_qlen
        As in :func:`rau.ring_attention_update`.
    options : Options
    out : sequence of arrays, optional
        A state's arrays, or its output alone where no statistics are wanted.
    half : {"front", "back"}, optional
        As in :class:`Problem`; here the first state and `out` nevertheless have the later state's shape.
    dtype : optional
        What the output is rounded to, by whoever calls, if not to the first state's dtype.

    Returns
    -------
    problem : Problem
    states : sequence of triples of arrays
        The same arrays, except that those whose last axis is not contiguous, which no kernel can stream, are copied, and that
        statistics of other lanes than the result's are seen with as many.

    Raises
    ------
    ConstraintError
        Its message says everything that is wrong with the call.
    """
    report = Violations(call)
    options, limits = check_options(report, options)
    layout = options.layout
    packed = layout == "TND" and options.softmax_layout == "SBH"
    if isinstance(actual_seq_qlen, str) and actual_seq_qlen in LAYOUTS:  # which most layouts would let pass: they read no lengths
        report.add("qlen-dtype", f'actual_seq_qlen is "{actual_seq_qlen}"; expected cumulative lengths or None. A layout is passed '
                   f'by name, layout="{actual_seq_qlen}", or after the lengths.')  # fmt: skip
        raise report.error()
    into = out if out is not None and is_whole(report, out, options.statistics) else None
    kind = _check_arrays(report, states, names)
    found = None
    if kind is not None:
        own, _, stats_dtype = _check_dtypes(report, kind, states, names, limits)
        out_dtype = result_dtype(report, dtype, own)
        if layout:
            found = _check_shapes(report, kind, states, into, names, layout, limits)
    lengths = None
    if layout == "TND":
        tokens = None
        if found:
            _, _, tokens, N, D = dimensions(layout, *found[:2])
            limits.limits(report, names(0, 0), N, D, own)
        lengths = bind_lengths(report, actual_seq_qlen, tokens, packed, limits.vendor)
        elsewhere = None if lengths is None or isinstance(lengths, np.ndarray) else kind_of(lengths)
        # A plugin's own arrays may go with lengths wherever its kernel finds them.
        if elsewhere and kind and not isinstance(kind, ForeignKind) and kind.readable(states[0][0]):
            report.add("array-device", f"actual_seq_qlen is on {elsewhere.device(lengths)} and {names(0, 0)} on "
                       f"{kind.device(states[0][0])}, where nobody can read it; expected one device for all. Pass "
                       "actual_seq_qlen.cpu().")  # fmt: skip
    if kind is None or found is None:
        raise report.error()  # what follows needs arrays whose axes are known

    seen = _same_lanes(report, kind, states, names, found[1][-1])
    plain = all([kind.contiguous(array) for state in seen for array in state])
    regular = seen if plain else _regular_inputs(report, kind, seen, names, packed)
    in_place = into is not None and check_out(report, kind, states, into, names, found, (out_dtype, stats_dtype), packed)
    report.raise_if_broken()
    if options.check != "metadata":
        check_values(report, kind, states, names, options.check)
        report.raise_if_broken()
        check_memory(report, kind, states, regular, names)
        report.raise_if_broken()

    problem = Problem.of(
        regular, into, lengths, layout, options.softmax_layout, options.profile, in_place=in_place, half=half,
        statistics=options.statistics,
    )  # fmt: skip
    return problem, regular


def _check_arrays(report: Violations, states: Sequence[Sequence[Any]], names: Names) -> Kind | None:
    """Check that all are arrays of one kind on one device; None where they are not."""
    kind = kind_of(states[0][0])
    device = None
    good = kind
    for k, state in enumerate(states):
        for field, array in enumerate(state):
            its = kind_of(array)
            if its is None:
                report.add("array", not_an_array(names(k, field), array))
                good = None
            elif kind is None:
                continue  # the first is no array, which has been said
            elif its.name != kind.name:
                report.add("array-kind", f"{names(k, field)} is a {its.name} array and {names(0, 0)} a "
                           f"{kind.name} one; expected one kind for all. Convert one of them first.")  # fmt: skip
                good = None
            elif fault := its.fault(array):
                report.add("array", f"{names(k, field)} {fault}")
                good = None
            elif device is None:  # of the first that can be asked
                device = its.device(array)
            elif its.device(array) != device:
                report.add("array-device", f"{names(k, field)} is on {its.device(array)} and {names(0, 0)} on "
                           f"{device}; expected one device for all. Move one of them first.")  # fmt: skip
    return good


def _check_dtypes(
    report: Violations, kind: Kind, states: Sequence[Sequence[Any]], names: Names, limits: Profile
) -> tuple[str, str, str]:
    """Check the dtypes; return those of the first output, of the later ones, and of the statistics."""
    dtype = kind.dtype(states[0][0])
    if dtype not in limits.dtypes:
        hint = ' profile="portable" takes float64.' if dtype == "float64" else swapped(dtype)
        report.add("dtype-attn", f"{names(0, 0)} has dtype {dtype}; expected one of {', '.join(limits.dtypes)}.{hint}")
    cur_dtype = kind.dtype(states[1][0]) if len(states) > 1 else dtype
    for k in range(1, len(states)):
        its = kind.dtype(states[k][0])
        if its != cur_dtype:
            report.add("dtype-match", f"{names(k, 0)} has dtype {its} and {names(1, 0)} {cur_dtype}; "
                       f"expected one dtype for all later states.{swapped(its)}")  # fmt: skip
        elif its != dtype:
            mixed = dtype == "float32" and its in NARROW
            if not mixed or limits.vendor:
                hint = ' profile="portable" merges a 16-bit state into a float32 one.' if mixed else swapped(its)
                report.add("dtype-match", f"{names(k, 0)} has dtype {its} and {names(0, 0)} {dtype}; "
                           f"expected the same dtype.{hint}")  # fmt: skip
    wide = dtype == "float64" and "float64" in limits.dtypes
    stats_dtype = "float64" if wide else "float32"
    for k, state in enumerate(states):
        for field in (1, 2):
            its = kind.dtype(state[field])
            if its != stats_dtype:
                since = f", since {names(0, 0)} is float64" if wide else ""
                instead = another_dtype(FIELDS[field], kind.name, its, stats_dtype)
                report.add("dtype-stats", f"{names(k, field)} has dtype {its}; expected {stats_dtype}{since}.{instead}")
    return dtype, cur_dtype, stats_dtype


def _check_shapes(
    report: Violations, kind: Kind, states: Sequence[Sequence[Any]], out: Sequence[Any] | None, names: Names, layout: str,
    limits: Profile,
) -> list[tuple[int, ...]] | None:
    """Read the shapes that every state has to have off the first one, and return the result's.

    Lanes are each state's own, of those that the profile takes; the result has those of `out`, or else the first state's.
    None where the ranks of the first state do not even allow that.
    """
    axes = LAYOUTS[layout]
    ranks = _ranks(layout)
    shapes: list[list[Any]] = [[tuple(array.shape) for array in state] for state in states]
    others = _fitting(shapes) if (len(shapes[0][0]), len(shapes[0][1])) != ranks else []
    if others:
        first, its = shapes[0][:2]
        fit = " or ".join(f'layout="{other}"' for other in others)
        fit += "" if set(others) <= set(limits.layouts) else ' in profile="portable"'
        report.add("rank", f'{names(0, 0)} has shape {first} and {names(0, 1)} {its}; layout "{layout}" expects {axes.attn} and '
                   f"{axes.stats.format(lanes=' or '.join(map(str, limits.lanes)))}. They fit {fit}.")  # fmt: skip
        return None
    for k, state in enumerate(shapes):
        for field, shape in enumerate(state):
            if len(shape) != ranks[field > 0]:
                report.add("rank", _wrong_rank(names(k, field), shape, layout, field > 0, limits))
                state[field] = None
    attn_shape, stats_shape, _ = shapes[0]
    if attn_shape is None or stats_shape is None:
        return None

    lanes = stats_shape[-1]
    if lanes not in limits.lanes:
        hint = _ONE_LANE if lanes == 1 else " The lanes hold one number, written 8 times."
        report.add("lanes", f"{names(0, 1)} has shape {stats_shape}; expected a last axis of "
                   f"{' or '.join(map(str, limits.lanes))}.{hint}")  # fmt: skip
        if shapes[0][2] != stats_shape:  # a slip in one array, not a habit: said once, of that array
            lanes = 8
            shapes[0][1] = (*stats_shape[:-1], lanes)

    B, tokens, _, N, _ = dimensions(layout, attn_shape, stats_shape)
    if axes.attn_head is None and (attn_shape[-1] % N if N else attn_shape[-1]):
        report.add("heads-divide-hidden", f"{names(0, 0)} has H = {attn_shape[-1]} and {names(0, 1)} N = {N} heads "
                   f"(shapes {attn_shape} and {stats_shape}); expected H = N * D.")  # fmt: skip
    rows = (tokens, N) if axes.attn_batch is None else (B, N, tokens)
    for k, state in enumerate(shapes):
        its = lanes if state[1] is None or state[1][-1] not in limits.lanes else state[1][-1]
        stats = (*rows, its)
        if state == [attn_shape, stats, stats]:
            continue
        if state[0] not in (attn_shape, None):
            report.add("shape-match", f"{names(k, 0)} has shape {state[0]}; expected that of {names(0, 0)}, "
                       f"{attn_shape}.")  # fmt: skip
        for field in (1, 2):
            if state[field] not in (stats, None):
                source = f" (read off {names(0, 1)})" if axes.attn_head is None else ""
                hint = _ONE_LANE if state[field] == (*rows, 1) and limits.vendor else ""
                report.add("shape-stats", f"{names(k, field)} has shape {tuple(states[k][field].shape)}; for "
                           f'{names(0, 0)} of shape {attn_shape} and N = {N} heads{source}, layout "{layout}" expects '
                           f"{axes.stats.format(lanes=its)} = {stats}.{hint}")  # fmt: skip
    if out is not None and len(out) == 3:
        # Of what is no such array, or has other shapes, check_out has something to say.
        its_kind = kind_of(out[1])
        if its_kind is not None and its_kind.name == kind.name and not its_kind.fault(out[1]):
            wanted: tuple[int, ...] = tuple(out[1].shape)
            lanes = wanted[-1] if len(wanted) == len(rows) + 1 and wanted[-1] in limits.lanes else lanes
    return [attn_shape, (*rows, lanes), (*rows, lanes)]


def _ranks(layout: str) -> tuple[int, int]:
    axes = LAYOUTS[layout]
    return axes.attn.count(",") + 1, axes.stats.count(",") + 1


def _fitting(shapes: Sequence[Sequence[tuple[int, ...]]]) -> list[str]:
    """Find the layouts that states fit whose ranks are not those of the layout that was named."""
    attn, stats = shapes[0][:2]
    found = len(attn), len(stats)
    if any((len(state[0]), len(state[1]), len(state[2])) != (*found, found[1]) for state in shapes):
        return []
    fitting = []
    for name, axes in LAYOUTS.items():
        if found == _ranks(name):
            B, tokens, _, N, _ = dimensions(name, attn, stats)
            if stats[:-1] == ((tokens, N) if axes.attn_batch is None else (B, N, tokens)):
                fitting.append(name)
    return fitting


def _same_lanes(
    report: Violations, kind: Kind, states: Sequence[Sequence[Any]], names: Names, lanes: int
) -> Sequence[Sequence[Any]]:
    """See all statistics with as many lanes as the result has: of each state, lane 0 alone is read."""
    if report.broken:
        return states
    others = [k for k, state in enumerate(states) if state[1].shape[-1] != lanes or state[2].shape[-1] != lanes]
    if not others:
        return states
    if isinstance(kind, ForeignKind):
        k = others[0]
        report.add("lanes", f"{names(k, 1)} has shape {tuple(states[k][1].shape)} and the result {lanes} lane(s); expected as "
                   f"many, since nothing is known of views of a {kind.name}. Pass statistics of {lanes} lane(s).")  # fmt: skip
        return states
    return [
        (state[0], kind.lanes(state[1], lanes), kind.lanes(state[2], lanes)) if k in others else state
        for k, state in enumerate(states)
    ]


def _wrong_rank(name: str, shape: tuple[int, ...], layout: str, stats: bool, limits: Profile) -> str:
    axes = LAYOUTS[layout]
    form = axes.stats.format(lanes=" or ".join(map(str, limits.lanes))) if stats else axes.attn
    rank = form.count(",") + 1
    text = f'{name} has shape {shape}, {len(shape)} axes; layout "{layout}" expects {rank}: {form}.'
    if stats and len(shape) == rank - 1 and 1 in limits.lanes:
        text += " The last axis has 1 lane, x[..., None], or one number written 8 times."
    elif stats and len(shape) == rank - 1:
        text += " The last axis holds one number, written 8 times: numpy.repeat(x[..., None], 8, axis=-1)."
    return text


def _regular_inputs(
    report: Violations, kind: Kind, states: Sequence[Sequence[Any]], names: Names, packed: bool
) -> list[Sequence[Any]]:
    """Replace the inputs that no kernel can stream by copies; refuse irregular packed statistics."""
    regular: list[Sequence[Any]] = []
    for k, state in enumerate(states):
        kept = list(state)
        for field, array in enumerate(state):
            if kind.contiguous(array):
                continue
            strides = kind.strides(array)
            if strides is None or (field == 0 and array.shape[-1] > 1 and strides[-1] != 1):
                kept[field] = kind.regular_copy(array)
            elif packed and field and len(strides) == 3 and packed_row_stride(array.shape, strides) is None:
                report.add("packed-regular", f"{names(k, field)} has strides {strides} (in elements) for shape "
                           f"{tuple(array.shape)}; packed statistics must be contiguous, since (T, N) is only a label "
                           "for their flat order. Slice them in token-major order: "
                           'rau.reorder_softmax(..., to="TND").')  # fmt: skip
        regular.append(kept)
    return regular
