"""What is asked of an output and its log-sum-exp before one is made of the other, and the words of what is refused.

Everything here can be traced by torch.compile: shapes are compared, no value is read and no table is grown.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import numpy as np

from rau.arrays import kind_of, looks_like_array
from rau.arrays.torch_ import TorchKind, has_float64, tensor_inside
from rau.constraints.hints import another_dtype, described, not_an_array, swapped
from rau.constraints.lengths import NAME, bind_lengths
from rau.constraints.options import check_layout, whole_number
from rau.constraints.rules import Violations
from rau.constraints.stacked import MOST_STATES
from rau.errors import shown
from rau.layouts import (
    FIELDS,
    LAYOUTS,
    LSE_LAYOUTS,
    OTHER_LSE_LAYOUTS,
    PADDED,
    lse_layouts,
)

_Function = TypeVar("_Function", bound=Callable[..., Any])
_BASES = " Natural logarithms: FlashAttention, PyTorch, vLLM. Base 2: FlashInfer."


def asks_base(function: _Function) -> _Function:
    """Have a function that is called without ``base=``, which has no default, say which bases there are, and whose they are.

    Python would say that it is missing, and no more. The signature stays as it is written.
    """
    name = function.__qualname__  # which a compiler that traces the call does not know

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if "base" not in options:
            report = Violations(name)
            report.add("base", f'base is missing, and has no default; expected "e" or "2".{_BASES}')
            raise report.error()
        return function(*arguments, **options)

    return call  # type: ignore[return-value]


def check_base(report: Violations, base: object) -> str:
    """Check the base of the logarithm; return it, empty where it is wrong."""
    return report.choice("base", "base", base, ("e", "2"), _BASES)


def check_layouts(
    report: Violations, layout: object, axes: object, option: str = "lse_layout", padded: bool = False
) -> tuple[str, str]:
    """Check the names of an attention layout and of the axes of what it has a row of.

    Return them, empty where wrong; the axes are so where the layout is.

    `option` is what the caller knows the axes by. Where `padded`, those of :data:`PADDED` go with layout "TND" as well.

    None stands for "BNS", except in layout "TND", which has no default: both orders are common there, no shape tells
    them apart where T = N, and mistaking one for the other silently gives wrong numbers.
    """
    known = check_layout(report, layout)
    names = lse_layouts(known) if known else tuple(LSE_LAYOUTS)
    what = "lse" if option == "lse_layout" else "the statistics"
    if axes is None:
        if known and known != "TND":
            return known, names[0]
        if known:
            report.add("lse-layout", f'{option} is None; layout "TND" expects the axes of {what} by name: "TN" for (T, N) '
                       '(FlashInfer), "NT" for (N, T) (vLLM, FlashAttention\'s varlen calls).')  # fmt: skip
        return known, ""
    forms = " or ".join(map(LSE_LAYOUTS.__getitem__, names))
    note = f' With layout "{known}" {what} {"is" if what == "lse" else "are"} {forms}.' if known else ""
    if padded and known == "TND":
        names += tuple(PADDED)
        note += f" Padded, {' or '.join(PADDED.values())}, it needs {NAME}."
    named = report.choice("lse-layout", option, axes, names, note, OTHER_LSE_LAYOUTS)
    return known, named if known else ""


class Described(NamedTuple):
    """What the checks ask of an array, of kind "numpy", "torch" or "jax"."""

    kind: str
    dtype: str
    device: str


def check_array(report: Violations, name: str, array: Any, rule: str, dtypes: tuple[str, ...] = ()) -> Described | None:
    """Check that something is an array of NumPy, torch or JAX, of one of some dtypes (any by default); None if not."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor) and not tensor_inside(type(array)):
        # Not through its kind: a compiler that traces this would guard the kinds' tables, which grow meanwhile.
        if not torch.compiler.is_compiling() and (fault := TorchKind().fault(array)):
            report.add("array", f"{name} {fault}")
            return None
        its = Described("torch", str(array.dtype).removeprefix("torch."), str(array.device))
    else:
        kind = kind_of(array)
        if kind is None:
            report.add("array", not_an_array(name, array))
            return None
        if kind.name not in ("numpy", "jax"):
            how = f"{name}.asnumpy()" if kind.name == "mindspore" else f"numpy.asarray({name})"
            report.add("array", f"{name} is a {kind.name} array; expected an array of NumPy, torch or JAX. Convert it: {how}.")
            return None
        if fault := kind.fault(array):
            report.add("array", f"{name} {fault}")
            return None
        its = Described(kind.name, kind.dtype(array), kind.device(array))
    if dtypes and its.dtype not in dtypes:
        expected = f"one of {', '.join(dtypes)}" if len(dtypes) > 1 else dtypes[0]
        hint = another_dtype(name, its.kind, its.dtype, dtypes[0]) if rule == "dtype-stats" else swapped(its.dtype)
        report.add(rule, f"{name} has dtype {its.dtype}; expected {expected}.{hint}")
        return None
    return its


def check_alike(report: Violations, name: str, its: Described, other_name: str, other: Described) -> None:
    """Check that two arrays are of one kind, on one device."""
    if its.kind != other.kind:
        report.add("array-kind", f"{name} is a {its.kind} array and {other_name} a {other.kind} one; expected one kind "
                   "for both. Convert one of them first.")  # fmt: skip
    elif its.device != other.device:
        report.add("array-device", f"{name} is on {its.device} and {other_name} on {other.device}; expected one device "
                   "for both. Move one of them first.")  # fmt: skip


def check_float64(report: Violations, name: str, array: Any, its: Described) -> None:
    """Refuse a tensor on a device without float64, in which log-sum-exps are computed."""
    if its.kind == "torch":

        if not has_float64(array.device):
            report.add("array-device", f"{name} is on {its.device}, a device that has no float64, in which log-sum-exps are "
                       f"computed; expected one that has it. Pass {name}.cpu().")  # fmt: skip


def check_rows(
    report: Violations, name: str, rows: Any, out_name: str, out: Described | None, base: str
) -> Described | None:
    """Check that an array has a number for each row of an output, whatever its shape; None if not."""
    wide = out is not None and out.dtype == "float64"
    its = check_array(report, name, rows, "dtype-stats", ("float64",) if wide else ("float32", "float64"))
    if its is not None and out is not None:
        check_alike(report, name, its, out_name, out)
        if its.dtype == "float64" or base == "2":
            check_float64(report, name, rows, its)
    return its


def check_lengths_here(report: Violations, lengths: Any, name: str, stats: Any) -> None:
    """Refuse lengths on a device for statistics, called `name`, that are on the host."""
    if isinstance(stats, np.ndarray) and lengths is not None and not isinstance(lengths, np.ndarray):
        report.add("array-device", f"{NAME} is not on the host and {name} is a NumPy array; expected both on the host. "
                   f"Pass {NAME}.cpu().")  # fmt: skip


def check_heads(report: Violations, heads: int | None) -> int | None:
    """Check a number of query heads; None where there is nothing to check, or it is no such number."""
    number = whole_number(heads)
    if heads is None or (number is not None and number >= 0):
        return number
    report.add("heads", f"heads = {shown(heads)}; expected the number N of query heads, an int.")
    return None


def check_lanes(report: Violations, lanes: int) -> int:
    """Check a number of lanes; 1 where it is no such number."""
    number = whole_number(lanes)
    if number in (1, 8):
        return number
    report.add("lanes", f"lanes = {shown(lanes)}; expected 1, or 8 for a call in a vendor's profile.")
    return 1


def check_pairs(report: Violations, pairs: Any, out: Any) -> None:
    """Check that these are pairs (attn_out, lse), at least one, and that `out` is one or None; raise at once if not."""
    several = isinstance(pairs, (list, tuple))
    wrong = ""
    if getattr(type(pairs), "_fields", ()) == FIELDS:
        wrong = "is an AttentionState; {}. States are for rau.merge_states."
    elif not several or not pairs:
        wrong = f"is {'empty' if several else described(pairs)}; {{}}, at least one."
    elif len(pairs) == 2 and all(map(looks_like_array, pairs)):
        wrong = "is one pair of arrays; {}: pass [pair], or list(zip(*pair)) if it is stacked."
    elif len(pairs) == 2 and _alike(pairs[0]) == _alike(pairs[1]) > 2:
        wrong = "is a list of outputs and one of log-sum-exps, as it seems; {}: pass list(zip(*pairs))."
    elif len(pairs) > MOST_STATES:
        wrong = f"has {len(pairs)} pairs; {{}}, at most {MOST_STATES}. Merge groups of them, and then the results."
    if wrong:
        report.add("states", f"pairs {wrong.format('expected a list of pairs (attn_out, lse)')}")
        raise report.error()
    named = [(f"pairs[{k}]", pair) for k, pair in enumerate(pairs)]
    for name, pair in named if out is None else [*named, ("out", out)]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            got = f"has {len(pair)} items" if isinstance(pair, (list, tuple)) else f"is {described(pair)}"
            hint = " States are for rau.merge_states." if isinstance(pair, (list, tuple)) and len(pair) == 3 else ""
            report.add("out" if name == "out" else "states", f"{name} {got}; expected a pair (attn_out, lse).{hint}")
    report.raise_if_broken()


def _alike(part: Any) -> int:
    """Count the arrays of a list of nothing else, all of one shape, as those of a state are not; 0 for anything else."""
    if not isinstance(part, (list, tuple)) or not all(map(looks_like_array, part)):
        return 0
    shapes = [tuple(array.shape) for array in part]  # compared, since a tracer's cannot be hashed
    return len(part) if all(shape == shapes[0] for shape in shapes) else 0


def check_pair_out(
    report: Violations, out: Sequence[Any], pairs: Sequence[Sequence[Any]], names: Sequence[tuple[str, str]],
    first: Sequence[Any], layout: str, axes: str,
) -> None:  # fmt: skip
    """Check a pair to write into: all of its log-sum-exp, and what both arrays share memory with.

    `names` are those of the arrays of `pairs`; `first` is the state of the first pair.
    """
    like = check_array(report, "", first[1], "dtype-stats")
    assert like is not None  # it was made by us
    attn_out, lse = out
    if like.kind == "jax":
        report.add("out-writable", "out is given, and JAX arrays cannot be written into; expected None. Take what is returned.")
        raise report.error()
    its, kind = check_array(report, "out[1]", lse, "out-dtype", (like.dtype,)), kind_of(lse)
    if its is not None and kind is not None:
        check_alike(report, "out[1]", its, names[0][1], like)
        check_shapes(report, first[0], lse, layout, axes, first[1].shape[LAYOUTS[layout].stats_head], names[0][0], "out[1]")
        if not kind.writable(lse):
            report.add("out-writable", "out[1] is read-only; expected an array that may be written to.")
        elif getattr(lse, "requires_grad", False):
            report.add("out-writable", "out[1] requires grad, and would not have the gradient of what is written; expected a "
                       "tensor that does not. Pass out[1].detach(), which is the same memory.")  # fmt: skip
    report.raise_if_broken()
    assert kind is not None
    if kind.memory(lse).overlaps_itself():
        report.add("out-overlap", "out[1] overlaps itself; expected separate memory for each element. Pass a copy.")
    given = [(names[k][role], pair[role], role) for k, pair in enumerate(pairs) for role in (0, 1)]
    for role, mine in enumerate(out):
        others = [*given, ("out[0]", attn_out, None)] if role else given
        for name, array, its_role in others:
            if _meet(mine, array) and not (role == its_role and kind.memory(mine).same_view(kind.memory(array))):
                report.add("out-overlap", f"out[{role}] shares memory with {name}; expected separate memory or, to work in "
                           f"place, exactly a pair's [{role}]: the same address, shape and strides.")  # fmt: skip
    report.raise_if_broken()


def _meet(one: Any, other: Any) -> bool:
    """Tell whether two arrays share memory, as far as that is known of their kinds."""
    kinds = kind_of(one), kind_of(other)
    if kinds[0] is None or kinds[1] is None or kinds[0].name != kinds[1].name:
        return False  # of which the merge has something to say
    (low, high), (its_low, its_high) = kinds[0].extent(one), kinds[1].extent(other)
    return low < its_high and its_low < high and kinds[0].memory(one).overlaps(kinds[1].memory(other))


def check_shapes(
    report: Violations, attn_out: Any, rows: Any, layout: str, rows_layout: str, heads: int | None,
    out_name: str = "attn_out", name: str = "lse", option: str = "lse_layout",
) -> None:  # fmt: skip
    """Check that an output and what it has a row of fit together; `heads` is what :func:`check_heads` returned.

    `out_name`, `name` and `option` are what the caller knows the output, the rows and their axes by.
    """
    axes = LAYOUTS[layout]
    shape, given = tuple(attn_out.shape), tuple(rows.shape)
    if len(shape) != axes.attn.count(",") + 1:
        hint = _SWAPPED if seems_swapped(attn_out, rows, layout, rows_layout) else _fitting(shape, given, layout, heads, option)
        report.add("rank", f'{out_name} has shape {shape}; layout "{layout}" expects {axes.attn}.{hint}')
    elif len(given) != len(rows_layout):
        hint = f" Drop its last axis: {name}[..., 0]." if given == (*given[: len(rows_layout)], 1) else ""
        hint = hint or _fitting(shape, given, layout, heads, option)
        if layout == "TND" and len(given) == 3 and not hint and option == "lse_layout":
            hint = f' AttentionState.from_lse takes a padded one, {PADDED["BNS"]}, with lse_layout="BNS" and {NAME}.'
        report.add("rank", f'{name} has shape {given}; {option} "{rows_layout}" expects {LSE_LAYOUTS[rows_layout]}.{hint}')
    else:
        if heads is not None and axes.attn_head is not None and shape[axes.attn_head] != heads:
            report.add("heads", f'{out_name} has N = {shape[axes.attn_head]} heads (shape {shape}, in layout "{layout}"); expected '
                       f"heads = {heads}.")  # fmt: skip
            return
        expected = {each: _expected(shape, given, layout, each, heads) for each in lse_layouts(layout)}
        if given != expected[rows_layout]:
            swapped_pair = seems_swapped(attn_out, rows, layout, rows_layout)
            _say_shapes(report, shape, given, layout, rows_layout, heads, expected, out_name, name, option, swapped_pair)


def seems_swapped(attn_out: Any, lse: Any, layout: str, axes: str) -> bool:
    """Tell whether what was given as the output has the shape of the log-sum-exp, and the other way round."""
    shape, given = tuple(attn_out.shape), tuple(lse.shape)
    ranks = LAYOUTS[layout].attn.count(",") + 1, len(axes)
    if (len(given), len(shape)) != ranks:
        return False
    return ranks[0] != ranks[1] or _expected(given, shape, layout, axes, None) == shape != given


_SWAPPED = " The pair seems to be swapped."


def _fitting(shape: tuple[int, ...], given: tuple[int, ...], layout: str, heads: int | None, option: str) -> str:
    """Word which other layout an output and its rows fit; empty where none."""
    fitting = []
    for name, axes in LAYOUTS.items():
        if name == layout or len(shape) != axes.attn.count(",") + 1:
            continue
        for rows_layout in lse_layouts(name):
            if given == _expected(shape, given, name, rows_layout, heads):
                fitting.append(f'layout="{name}"' + f', {option}="{rows_layout}"' * (rows_layout != "BNS"))
    return f" They fit {' or '.join(fitting)}." if fitting else ""


def check_padded(
    report: Violations, attn_out: Any, lse: Any, axes: str, heads: int | None, actual_seq_qlen: Any, out_name: str, name: str
) -> Any:
    """Check that an output in layout "TND" and a log-sum-exp padded to the longest sequence fit together; return the lengths.

    Lengths on a device are not read: a log-sum-exp that is too short for them goes unnoticed there.
    """
    shape, given, form = tuple(attn_out.shape), tuple(lse.shape), PADDED[axes]
    if len(shape) != 3:
        report.add("rank", f'{out_name} has shape {shape}; layout "TND" expects {LAYOUTS["TND"].attn}.')
        return None
    if actual_seq_qlen is None:
        report.add("packed-qlen-required", f'{NAME} is None; {name} of lse_layout "{axes}", padded to {form}, expects the '
                   f"cumulative sequence lengths from 0 to T = {shape[0]}.")  # fmt: skip
        return None
    lengths = bind_lengths(report, actual_seq_qlen, shape[0], packed=True, vendor=False)
    check_lengths_here(report, lengths, name, lse)
    if len(given) != 3:
        report.add("rank", f'{name} has shape {given}; lse_layout "{axes}" expects {form} in layout "TND".')
    elif heads is not None and shape[1] != heads:
        report.add("heads", f'{out_name} has N = {shape[1]} heads (shape {shape}, in layout "TND"); expected heads = {heads}.')
    elif lengths is not None:
        sequences = len(lengths) - 1
        on_host = isinstance(lengths, np.ndarray)
        longest = int(np.diff(lengths).max(initial=0)) if on_host else -(-shape[0] // max(sequences, 1))

        def fits(axes: str) -> bool:
            return (given[0], given[axes.index("N")]) == (sequences, shape[1]) and given[axes.index("S")] >= longest

        if not fits(axes):
            (other,) = PADDED.keys() - {axes}
            hint = f' It looks like {PADDED[other]}: pass lse_layout="{other}".' if fits(other) else ""
            wanted = (sequences, shape[1], longest) if axes == "BNS" else (sequences, longest, shape[1])
            report.add("shape-stats", f'{name} has shape {given}; for {out_name} of shape {shape} and {sequences} sequences, '
                       f'lse_layout "{axes}" expects {form} = {wanted} or padded further.{hint}')  # fmt: skip
    return lengths


def _expected(
    shape: tuple[int, ...], given: tuple[int, ...], layout: str, name: str, heads: int | None
) -> tuple[int, ...] | None:
    """Shape of a log-sum-exp in a layout; None where H is no multiple of the heads, `given`'s if nobody says how many."""
    axes = LAYOUTS[layout]
    if len(given) != len(name):
        return None
    tokens = shape[axes.attn_token]
    if axes.attn_head is not None:
        heads = shape[axes.attn_head]
    else:
        heads = given[name.index("N")] if heads is None else heads
        if shape[-1] % heads if heads else shape[-1]:
            return None
    rows = (tokens, heads) if name in ("BSN", "TN") else (heads, tokens)
    return rows if axes.attn_batch is None else (shape[axes.attn_batch], *rows)


def _say_shapes(
    report: Violations,
    shape: tuple[int, ...],
    given: tuple[int, ...],
    layout: str,
    axes: str,
    heads: int | None,
    expected: dict[str, tuple[int, ...] | None],
    out_name: str,
    name: str,
    option: str,
    swapped_pair: bool,
) -> None:
    """Note rows that do not fit, and what they seem to be."""
    hint = ""
    for other in expected:
        if other != axes and given == expected[other]:
            hint = f' It looks like {LSE_LAYOUTS[other]}: pass {option}="{other}".'
    if not hint and swapped_pair:
        hint = _SWAPPED
    wanted, its = expected[axes], given[axes.index("N")]
    if wanted is None:
        source = f"heads = {heads}"
        if heads is None:
            source = f"{name} N = {its} heads (shape {given}, read as {LSE_LAYOUTS[axes]})"
        report.add("heads-divide-hidden", f"{out_name} has H = {shape[-1]} and {source}; expected H = N * D.{hint}")
        return
    number = wanted[axes.index("N")]
    if not hint and 0 < its < number and not number % its:
        hint = f" Its {its} heads seem to be the key heads of grouped-query attention: pass one number for each query head."
    if not hint and axes == "BNS" and given[:-1] == wanted[:-1] and given[-1] > wanted[-1]:
        hint = f" Some kernels pad it: pass {name}[..., :{wanted[-1]}]."
    known = "" if heads is None else f" and heads = {heads}"
    report.add("shape-stats", f'{name} has shape {given}; for {out_name} of shape {shape}{known}, layout "{layout}" expects '
               f"{LSE_LAYOUTS[axes]} = {wanted}.{hint}")  # fmt: skip
