"""The one validator: it turns a call's arguments into a Problem, or into one error that names every broken rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rau.arrays import (
    ITEMSIZE,
    Kind,
    internally_disjoint,
    kind_of,
    type_names,
)
from rau.layouts import LAYOUTS, contiguous_strides, packed_row_stride
from rau.lengths import bind_lengths
from rau.problem import Problem
from rau.rules import RULES, Report, Rule
from rau.values import check_values

__all__ = ["CHECKS", "FIELDS", "PROFILES", "RULES", "Problem", "Profile", "Rule", "bind"]

FIELDS = ("attn_out", "softmax_max", "softmax_sum")
SOFTMAX_LAYOUTS = ("TND", "SBH")
CHECKS = ("metadata", "values", "document")

Names = Callable[[int, int], str]  # (state, field) -> the name that the caller knows it by


class Profile(NamedTuple):
    """One set of limits."""

    layouts: tuple[str, ...]
    dtypes: tuple[str, ...]
    lanes: tuple[int, ...]
    vendor: bool  # a chip's limits hold, and actual_seq_qlen is required in TND
    limits: Callable[[Report, str, int, int, str], None]  # in TND: report, argument's name, N, D, dtype


_SUPPORTED = ("float16", "bfloat16", "float32")
_CHIP = ' This is a limit of the Ascend chip; profile="portable" lifts it.'


def _align(count: int, step: int) -> int:
    return -(-count // step) * step


def unified_buffer_bytes(heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes of the chip's unified buffer that one token takes in layout TND.

    Parameters
    ----------
    heads, head_dim : int
    itemsize : int
        Bytes of one element of attn_out.

    Returns
    -------
    int
        At most 192 * 1024 is accepted.

    Notes
    -----
    The formula is the reference page's.

    Examples
    --------
    >>> unified_buffer_bytes(42, 128, 4), unified_buffer_bytes(43, 128, 4)
    (193536, 197632)
    """
    return _align(heads * head_dim, 64) * (itemsize * 6 + 8) + _align(heads * 8, 64) * 56


def _head_dim_64(report: Report, name: str, head_dim: int) -> None:
    if head_dim % 64:
        report.add(
            "tnd-head-dim-64",
            f'the last axis of {name} is D = {head_dim}; layout "TND" takes multiples of 64.{_CHIP}',
        )


def _mindspore_limits(report: Report, name: str, heads: int, head_dim: int, dtype: str) -> None:
    _head_dim_64(report, name, head_dim)
    itemsize = ITEMSIZE.get(dtype, 4)
    need, limit = unified_buffer_bytes(heads, head_dim, itemsize), 192 * 1024
    if need > limit:
        report.add(
            "tnd-unified-buffer",
            f"{name} with N = {heads}, D = {head_dim}, {dtype} needs AlignUp(N*D, 64) * ({itemsize}*6 + 8) "
            f"+ AlignUp(N*8, 64) * 56 = {need} bytes; the limit is 192*1024 = {limit}.{_CHIP}",
        )


def _cann_v2_limits(report: Report, name: str, heads: int, head_dim: int, dtype: str) -> None:
    _head_dim_64(report, name, head_dim)
    if heads > 256:
        report.add("tnd-heads-256", f"{name} has N = {heads} heads; the limit is 256.{_CHIP}")
    if head_dim > 768:
        report.add("tnd-head-dim-768", f"{name} has D = {head_dim}; the limit is 768.{_CHIP}")


def _no_limits(report: Report, name: str, heads: int, head_dim: int, dtype: str) -> None:
    pass


PROFILES: dict[str, Profile] = {
    "mindspore": Profile(("SBH", "TND"), _SUPPORTED, (8,), True, _mindspore_limits),
    "cann-v2": Profile(("SBH", "TND"), _SUPPORTED, (8,), True, _cann_v2_limits),
    "portable": Profile(tuple(LAYOUTS), (*_SUPPORTED, "float64"), (8, 1), False, _no_limits),
}


def choice_error(argument: str, value: object, known: Sequence[str], note: str = "") -> str:
    """Word the message for an option with an unknown value, with the closest known one.

    Parameters
    ----------
    argument : str
    value : object
    known : sequence of str
    note : str, optional
        Appended: what the values mean.

    Returns
    -------
    str
    """
    import difflib

    expected = ", ".join(f'"{name}"' for name in known)
    text = f"{argument} = {value!r}; expected one of {expected}."
    if isinstance(value, str):
        lowered = {name.lower(): name for name in known}
        close = difflib.get_close_matches(value.lower(), lowered, n=1)
        if close:
            text += f' Did you mean "{lowered[close[0]]}"?'
    return text + note


def bind(
    call: str,
    states: Sequence[Sequence[Any]],
    names: Names,
    actual_seq_qlen: Any,
    layout: str,
    softmax_layout: str,
    out: Sequence[Any] | None,
    profile: str,
    check: str,
) -> tuple[Problem, list[Sequence[Any]]]:
    """Check a call and describe it.

    Parameters
    ----------
    call : str
        Name of the public function, for messages.
    states : sequence of triples of arrays
        attn_out, softmax_max, softmax_sum of each input state.
    names : callable
        Gives the caller's name of array `field` of state `state`.
    actual_seq_qlen, layout, softmax_layout, out, profile, check
        As in :func:`rau.ring_attention_update`.

    Returns
    -------
    problem : Problem
    states : list of triples of arrays
        The same arrays; copies of those whose last axis is not contiguous, which no kernel can stream.

    Raises
    ------
    ConstraintError
        With everything that is wrong with the call.
    """
    report = Report(call)
    if not (isinstance(layout, str) and layout in LAYOUTS):
        note = " It names the axes of attn_out." if not isinstance(layout, str) else ""
        report.add("layout", choice_error("layout", layout, tuple(LAYOUTS), note))
        layout = ""
    if softmax_layout not in SOFTMAX_LAYOUTS:
        note = ' "TND" is token-major; "SBH" is packed per sequence, as the vendor\'s kernels emit.'
        report.add("softmax-layout", choice_error("softmax_layout", softmax_layout, SOFTMAX_LAYOUTS, note))
    if check not in CHECKS:
        report.add("check", choice_error("check", check, CHECKS))
    if not (isinstance(profile, str) and profile in PROFILES):
        report.add("profile", choice_error("profile", profile, tuple(PROFILES)))
        profile = "portable"
    limits = PROFILES[profile]
    if layout and layout not in limits.layouts:
        known = " and ".join(f'"{name}"' for name in limits.layouts)
        report.add("layout-profile", f'layout = "{layout}"; profile "{profile}" knows {known} only. '
                   'profile="portable" takes it.')  # fmt: skip

    kind = _check_arrays(report, states, names)
    if kind is None:
        report.raise_if_broken()
    assert kind is not None
    first = states[0]
    dtype, cur_dtype, stats_dtype = _check_dtypes(report, kind, states, names, limits)
    lengths = layout and _check_shapes(report, states, names, layout, limits)
    if not lengths:
        report.raise_if_broken()
    B, S, T, N, D = lengths

    qlen = None
    if layout == "TND":
        packed = softmax_layout == "SBH"
        limits.limits(report, names(0, 0), N, D, dtype)
        qlen, B, S = bind_lengths(report, actual_seq_qlen, T, packed, limits.vendor)
    else:
        packed = False

    regular = _regular_inputs(report, kind, states, names, packed)
    in_place, out_strides = False, None
    if out is not None:
        in_place, out_strides = _check_out(report, kind, states, out, names, dtype, stats_dtype, packed)
    report.raise_if_broken()
    if check != "metadata":
        check_values(report, kind, regular, names, check)
        report.raise_if_broken()

    strides = None
    if out_strides is not None or not all(kind.contiguous(array) for state in regular for array in state):
        shapes = (first[0].shape, first[1].shape, first[1].shape)
        result = out_strides or [contiguous_strides(shape) for shape in shapes]
        strides = (*(_strides(kind, array) for state in regular for array in state), *result)
    problem = Problem(
        layout=layout, softmax_layout=softmax_layout, profile=profile, K=len(states),
        B=B, S=S, T=T, N=N, D=D, lanes=first[1].shape[-1],
        dtype=dtype, cur_dtype=cur_dtype, stats_dtype=stats_dtype,
        shape=tuple(first[0].shape), stats_shape=tuple(first[1].shape),
        actual_seq_qlen=qlen, kind=kind.name, array_types=type_names(type(first[0])),
        device=kind.device(first[0]), in_place=in_place, strides=strides,
    )  # fmt: skip
    return problem, regular


def _check_arrays(report: Report, states: Sequence[Sequence[Any]], names: Names) -> Kind | None:
    """Check that all are arrays of one kind on one device; None where they are not."""
    kind = kind_of(states[0][0])
    device = kind.device(states[0][0]) if kind else ""
    good = kind
    for k, state in enumerate(states):
        for field, array in enumerate(state):
            its = kind_of(array)
            if its is None:
                report.add("array", _not_an_array(names(k, field), array))
                good = None
            elif kind is None:
                continue  # the first is no array, which has been said
            elif its.name != kind.name:
                report.add("array-kind", f"{names(k, field)} is a {its.name} array and {names(0, 0)} a "
                           f"{kind.name} one; expected one kind for all. Convert one of them first.")  # fmt: skip
                good = None
            elif its.device(array) != device:
                report.add("array-device", f"{names(k, field)} is on {its.device(array)} and {names(0, 0)} on "
                           f"{device}; expected one device for all. Move one of them first.")  # fmt: skip
                good = None
    return good


def _not_an_array(name: str, value: object) -> str:
    cls = type(value)
    got = "None" if value is None else f"a {cls.__module__}.{cls.__qualname__}".replace("builtins.", "")
    text = f"{name} is {got}; expected an array (NumPy, or of a kind that a backend takes)."
    if isinstance(value, (list, tuple)):
        text += " Convert it with numpy.asarray(..., dtype=...)."
    elif "MaskedArray" in cls.__qualname__:
        text += " A mask would be lost: fill it first, an empty row has softmax_sum 0."
    return text


def _check_dtypes(
    report: Report, kind: Kind, states: Sequence[Sequence[Any]], names: Names, limits: Profile
) -> tuple[str, str, str]:
    dtype = kind.dtype(states[0][0])
    if dtype not in limits.dtypes:
        expected = ", ".join(limits.dtypes)
        hint = ' float64 is taken by profile="portable".' if dtype == "float64" else ""
        if "byte-swapped" in dtype:
            hint = " Convert it to native byte order: a.astype(a.dtype.newbyteorder('='))."
        report.add("dtype-attn", f"{names(0, 0)} has dtype {dtype}; expected one of {expected}.{hint}")
    cur_dtype = kind.dtype(states[1][0]) if len(states) > 1 else dtype
    for k in range(1, len(states)):
        its = kind.dtype(states[k][0])
        if its != cur_dtype:
            report.add("dtype-match", f"{names(k, 0)} has dtype {its} and {names(1, 0)} {cur_dtype}; "
                       "expected the later states alike.")  # fmt: skip
        elif its != dtype:
            mixed = dtype == "float32" and its in ("float16", "bfloat16")
            if not mixed or limits.vendor:
                hint = ' A 16-bit state is merged into a float32 one by profile="portable".' if mixed else ""
                report.add("dtype-match", f"{names(k, 0)} has dtype {its} and {names(0, 0)} {dtype}; "
                           f"expected the same dtype.{hint}")  # fmt: skip
    stats_dtype = "float64" if dtype == "float64" and "float64" in limits.dtypes else "float32"
    for k, state in enumerate(states):
        for field in (1, 2):
            its = kind.dtype(state[field])
            if its != stats_dtype:
                report.add("dtype-stats", f"{names(k, field)} has dtype {its}; expected {stats_dtype}, "
                           f"since {names(0, 0)} is {dtype}.")  # fmt: skip
    return dtype, cur_dtype, stats_dtype


def _check_shapes(
    report: Report, states: Sequence[Sequence[Any]], names: Names, layout: str, limits: Profile
) -> tuple[int, int | None, int, int, int] | None:
    """Read B, S, T, N, D off the shapes; None where the ranks do not even allow that."""
    axes = LAYOUTS[layout]
    attn_rank, stats_rank = axes.attn.count(",") + 1, axes.stats.count(",") + 1
    stats_form = axes.stats.format(lanes="8" if limits.vendor else "8 or 1")
    attn_shape, stats_shape = tuple(states[0][0].shape), tuple(states[0][1].shape)
    unranked = False
    for k, state in enumerate(states):
        for field, array in enumerate(state):
            shape = tuple(array.shape)
            rank, form = (stats_rank, stats_form) if field else (attn_rank, axes.attn)
            if len(shape) != rank:
                report.add("rank", f"{names(k, field)} has shape {shape}, {len(shape)} axes; "
                           f'layout "{layout}" expects {rank}: {form}.')  # fmt: skip
                unranked = True
            elif shape != (stats_shape if field else attn_shape):
                other = names(0, 1 if field else 0)
                expected = stats_shape if field else attn_shape
                report.add("shape-match", f"{names(k, field)} has shape {shape}; expected that of {other}, {expected}.")
    if unranked:
        return None

    lanes = stats_shape[-1]
    if lanes not in limits.lanes:
        hint = ""
        if lanes == 1:
            hint = ' 1 lane is taken by profile="portable".'
        elif limits.vendor or lanes != 1:
            hint = " The same number stands there 8 times: numpy.repeat(stats[..., None], 8, axis=-1)."
        expected = " or ".join(map(str, limits.lanes))
        report.add("lanes", f"{names(0, 1)} has {lanes} lanes on its last axis (shape {stats_shape}); "
                   f"expected {expected}.{hint}")  # fmt: skip

    N = stats_shape[axes.stats_head]
    tokens = attn_shape[axes.attn_token]
    if axes.attn_batch is None:
        B, T, S = 1, tokens, None
    else:
        B, S = attn_shape[axes.attn_batch], tokens
        T = B * S
    if axes.attn_head is None:
        H = attn_shape[-1]
        if H % N if N else H:
            report.add("heads-divide-hidden", f"{names(0, 0)} has H = {H} and {names(0, 1)} N = {N} heads "
                       f"(shapes {attn_shape} and {stats_shape}); expected H = N * D.")  # fmt: skip
        D = H // N if N else 0
        heads = N
    else:
        D = attn_shape[-1]
        heads = attn_shape[axes.attn_head]
    expected_stats = (tokens, heads) if axes.attn_batch is None else (B, heads, tokens)
    if stats_shape[:-1] != expected_stats:
        report.add("shape-stats", f"{names(0, 1)} has shape {stats_shape}; for {names(0, 0)} of shape {attn_shape} "
                   f'layout "{layout}" expects {stats_form} = {(*expected_stats, lanes)}.')  # fmt: skip
    return B, S, T, N, D


def _strides(kind: Kind, array: Any) -> tuple[int, ...]:
    if kind.contiguous(array):
        return contiguous_strides(array.shape)
    strides = kind.strides(array)
    assert strides is not None  # bind has replaced such inputs and refused such outputs
    return strides


def _regular_inputs(
    report: Report, kind: Kind, states: Sequence[Sequence[Any]], names: Names, packed: bool
) -> list[Sequence[Any]]:
    """Replace the inputs that no kernel can stream by copies; refuse irregular packed statistics."""
    regular = []
    for k, state in enumerate(states):
        if not all(kind.contiguous(array) for array in state):
            kept = list(state)
            for field, array in enumerate(state):
                strides = _strides_or_none(kind, array)
                if strides is None or (field == 0 and array.shape[-1] > 1 and strides[-1] != 1):
                    kept[field] = kind.regular_copy(array)
                elif field and packed and packed_row_stride(array.shape, strides) is None:
                    report.add("packed-regular", f"{names(k, field)} has strides {strides} (in elements) for shape "
                               f"{tuple(array.shape)}; packed statistics must be contiguous. Make it so with "
                               "numpy.ascontiguousarray before packing.")  # fmt: skip
            state = kept
        regular.append(state)
    return regular


def _strides_or_none(kind: Kind, array: Any) -> tuple[int, ...] | None:
    return contiguous_strides(array.shape) if kind.contiguous(array) else kind.strides(array)


def _check_out(
    report: Report,
    kind: Kind,
    states: Sequence[Sequence[Any]],
    out: Sequence[Any],
    names: Names,
    dtype: str,
    stats_dtype: str,
    packed: bool,
) -> tuple[bool, list[tuple[int, ...]] | None]:
    """Check the arrays to write into; tell whether they stand on inputs, and their strides."""
    if not isinstance(out, (tuple, list)) or len(out) != 3:
        got = f"{len(out)} items" if isinstance(out, (tuple, list)) else f"a {type(out).__name__}"
        report.add("out", f"out is {got}; expected an AttentionState or a triple (attn_out, softmax_max, softmax_sum).")
        return False, None
    device = kind.device(states[0][0])
    strides = []
    for field, array in enumerate(out):
        name, expected = f"out.{FIELDS[field]}", states[0][field]
        its = kind_of(array)
        if its is None:
            report.add("array", _not_an_array(name, array))
            continue
        if its.name != kind.name:
            report.add("array-kind", f"{name} is a {its.name} array; expected a {kind.name} one, like the inputs.")
            continue
        if kind.device(array) != device:
            report.add("array-device", f"{name} is on {kind.device(array)}; expected {device}, like the inputs.")
            continue
        wanted = stats_dtype if field else dtype
        if kind.dtype(array) != wanted:
            report.add("out-dtype", f"{name} has dtype {kind.dtype(array)}; expected {wanted}, that of {names(0, field)}.")
            continue
        if array.shape != expected.shape:
            report.add("out-shape", f"{name} has shape {tuple(array.shape)}; expected {tuple(expected.shape)}, "
                       f"that of {names(0, field)}.")  # fmt: skip
            continue
        if not kind.writable(array):
            report.add("out-writable", f"{name} is read-only; expected an array that may be written to.")
        its_strides = _strides_or_none(kind, array)
        if its_strides is None or (array.shape[-1] > 1 and its_strides[-1] != 1):
            given = getattr(array, "strides", its_strides)
            report.add("out-strides", f"{name} has byte strides {given} for shape {tuple(array.shape)}; expected an aligned "
                       "array with a contiguous last axis. Pass such an array and assign from it.")  # fmt: skip
            continue
        if packed and field and packed_row_stride(array.shape, its_strides) is None:
            report.add("packed-regular", f"{name} has strides {its_strides} (in elements) for shape "
                       f"{tuple(array.shape)}; packed statistics must be contiguous.")  # fmt: skip
            continue
        if not internally_disjoint(tuple(array.shape), its_strides):
            report.add("out-overlap", f"{name} overlaps itself (strides {its_strides} in elements for shape "
                       f"{tuple(array.shape)}); expected one memory cell for each element. Pass a copy.")  # fmt: skip
            continue
        strides.append(its_strides)
    if len(strides) != 3:
        return False, None
    return _check_overlap(report, kind, states, out, names), strides


def _check_overlap(
    report: Report, kind: Kind, states: Sequence[Sequence[Any]], out: Sequence[Any], names: Names
) -> bool:
    """Refuse outputs that share memory with anything, save an input of their own role exactly beneath them.

    Returns whether the call is in place.
    """
    # Most calls are settled by one sweep over the extents: no two of them meet.
    extents = [kind.extent(array) for array in out]
    for state in states:
        for role, array in enumerate(state):
            if array is not out[role]:
                extents.append(kind.extent(array))
    extents.sort()
    end = 0
    for low, high in extents:
        if low < end and low < high:
            break
        end = max(end, high)
    else:
        return any(array is out[role] for state in states for role, array in enumerate(state))

    in_place = False
    memory = [kind.memory(array) for array in out]
    for field, mine in enumerate(memory):
        for later in range(field + 1, 3):
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
                    report.add("out-overlap", f"out.{FIELDS[field]} shares memory with {names(k, role)} without being "
                               "the same view of it; expected separate memory, or exactly that array "
                               "(in place).")  # fmt: skip
    return in_place
