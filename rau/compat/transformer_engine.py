"""TransformerEngine's corrections: those of its context parallelism, and the two of ``transformer_engine_torch`` for "thd".

It merges in two rounds: first every step's log-sum-exp into one, then every step's output into a sum, by its weight in the
whole, exp(lse_per_step - lse). In between the log-sum-exp is rounded to float32, which changes all weights of a row by up to
abs(lse) * 2**-24: :func:`rau.merge_states`, or a :class:`rau.StreamingMerge`, does not lose that.
"""

from __future__ import annotations

from typing import Any

from rau.arithmetic import library
from rau.compat.pairs import check, check_written, names_of, starts_of
from rau.compat.words import worded
from rau.constraints.rows import rows_of_sequences
from rau.constraints.rules import Violations
from rau.errors import shown
from rau.layouts import numbered
from rau.state import states_of
from rau.update import merge_lse, merge_states

__all__ = [
    "flash_attn_fwd_out_correction",
    "flash_attn_fwd_out_correction_init",
    "flash_attn_fwd_second_half_out_correction",
    "flash_attn_fwd_second_half_softmax_lse_correction",
    "flash_attn_fwd_softmax_lse_correction",
    "thd_out_correction",
    "thd_second_half_lse_correction",
]

_RUNNING, _STEP = ("out", "softmax_lse"), ("out_per_step", "softmax_lse_per_step")


@worded(_RUNNING, _STEP)
def flash_attn_fwd_softmax_lse_correction(softmax_lse: Any, softmax_lse_per_step: Any) -> None:
    """Merge a step's log-sum-exp into the running one.

    Parameters
    ----------
    softmax_lse : array, float32, any shape
        Natural logarithms. Is written to.
    softmax_lse_per_step : array, float32, shape of `softmax_lse`

    Raises
    ------
    ConstraintError, UnsupportedError
        As :func:`rau.merge_lse`.

    Examples
    --------
    >>> import numpy as np
    >>> lse = np.full((1, 2, 3), -np.inf, np.float32)
    >>> flash_attn_fwd_softmax_lse_correction(lse, np.ones_like(lse))
    >>> flash_attn_fwd_softmax_lse_correction(lse, np.full_like(lse, -np.inf))
    >>> float(lse[0, 0, 0])
    1.0
    """
    check_written("flash_attn_fwd_softmax_lse_correction", softmax_lse=softmax_lse)
    softmax_lse[...] = merge_lse([(None, softmax_lse), (None, softmax_lse_per_step)], base="e")[1]


@worded()
def flash_attn_fwd_second_half_softmax_lse_correction(softmax_lse: Any, softmax_lse_per_step: Any) -> None:
    """Merge a step's log-sum-exp into the second half of the running one.

    Parameters
    ----------
    softmax_lse : array, float32, shape (B, N, 2, S / 2)
        Natural logarithms. Is written to.
    softmax_lse_per_step : array, float32, shape (B, N, S / 2)

    Raises
    ------
    ConstraintError, UnsupportedError
        As :func:`rau.merge_lse`.
    """
    check("flash_attn_fwd_second_half_softmax_lse_correction", {"softmax_lse": (softmax_lse, "(B, N, 2, S)")})
    flash_attn_fwd_softmax_lse_correction(softmax_lse[..., 1, :], softmax_lse_per_step)


@worded(out_per_step="out_init_step", softmax_lse_per_step="softmax_lse_init_step")
def flash_attn_fwd_out_correction_init(
    out_init_step: Any, softmax_lse: Any, softmax_lse_init_step: Any, seq_dim: int
) -> Any:
    """Weigh the first step's output.

    Parameters
    ----------
    out_init_step : array, float16, bfloat16 or float32, shape (B, S, N, D) or (S, B, N, D)
    softmax_lse : array, float32, shape (B, N, S)
        Natural logarithms, over all steps.
    softmax_lse_init_step : array, float32, shape (B, N, S)
    seq_dim : {0, 1}
        Axis of S in the output.

    Returns
    -------
    array, shape and dtype of `out_init_step`

    Raises
    ------
    ConstraintError, UnsupportedError
        As :func:`flash_attn_fwd_out_correction`.
    """
    check("flash_attn_fwd_out_correction_init", {"out_init_step": (out_init_step, "(B, S, N, D)")})
    out = library(out_init_step).zeros_like(out_init_step)
    flash_attn_fwd_out_correction(out, out_init_step, softmax_lse, softmax_lse_init_step, seq_dim)
    return out


@worded(_RUNNING, _STEP, _STEP)
def flash_attn_fwd_out_correction(
    out: Any, out_per_step: Any, softmax_lse: Any, softmax_lse_per_step: Any, seq_dim: int
) -> None:
    """Add a step's output to the sum, by its weight.

    Parameters
    ----------
    out : array, float16, bfloat16 or float32, shape (B, S, N, D) or (S, B, N, D)
        Is written to.
    out_per_step : array, shape and dtype of `out`
    softmax_lse : array, float32, shape (B, N, S)
        Natural logarithms, over all steps.
    softmax_lse_per_step : array, float32, shape (B, N, S)
    seq_dim : {0, 1}
        Axis of S in the outputs.

    Raises
    ------
    ConstraintError, UnsupportedError
        As :func:`rau.AttentionState.from_lse` and :func:`rau.merge_states`.

    Examples
    --------
    >>> import numpy as np
    >>> output, rows = np.ones((1, 1, 1, 8), np.float32), np.ones((1, 1, 1), np.float32)
    >>> lse = np.log(4 * rows)  # of two steps, with 1/4 and 3/4 of it
    >>> out = flash_attn_fwd_out_correction_init(4 * output, lse, np.log(rows), seq_dim=1)
    >>> flash_attn_fwd_out_correction(out, 8 * output, lse, np.log(3 * rows), seq_dim=1)
    >>> float(out[0, 0, 0, 0].round(5))
    7.0
    """
    its = _by_axis("flash_attn_fwd_out_correction", seq_dim, "(S, B, N, D)", "(B, S, N, D)")
    check("flash_attn_fwd_out_correction", {
        "out": (out, its), "out_per_step": (out_per_step, its), "softmax_lse": (softmax_lse, "(B, N, S)"),
        "softmax_lse_per_step": (softmax_lse_per_step, "(B, N, S)"),
    })  # fmt: skip
    if seq_dim == 0:
        out, out_per_step = out.swapaxes(0, 1), out_per_step.swapaxes(0, 1)
    _add(out, out_per_step, softmax_lse, softmax_lse_per_step, "BSND", "BNS")


@worded()
def flash_attn_fwd_second_half_out_correction(
    out: Any, out_per_step: Any, softmax_lse: Any, softmax_lse_per_step: Any, seq_dim: int
) -> None:
    """Add a step's output to the second half of the sum, by its weight.

    Parameters
    ----------
    out : array, float16, bfloat16 or float32, shape (B, 2, S / 2, N, D) or (2, S / 2, B, N, D)
        Is written to.
    out_per_step : array, dtype of `out`, shape (B, S / 2, N, D) or (S / 2, B, N, D)
    softmax_lse : array, float32, shape (B, N, S)
        Natural logarithms, over all steps.
    softmax_lse_per_step : array, float32, shape (B, N, S / 2)
    seq_dim : {0, 1}
        Axis of the halves in `out`, and of S / 2 in `out_per_step`.

    Raises
    ------
    ConstraintError, UnsupportedError
        As :func:`flash_attn_fwd_out_correction`.
    """
    its = _by_axis("flash_attn_fwd_second_half_out_correction", seq_dim, "(2, S, B, N, D)", "(B, 2, S, N, D)")
    check("flash_attn_fwd_second_half_out_correction", {"out": (out, its), "softmax_lse": (softmax_lse, "(B, N, L)")})
    half = out[1] if seq_dim == 0 else out[:, 1]
    lse = softmax_lse[..., softmax_lse.shape[-1] // 2 :]
    flash_attn_fwd_out_correction(half, out_per_step, lse, softmax_lse_per_step, seq_dim)


@worded(softmax_lse="lse", softmax_lse_per_step="lse_per_step")
def thd_second_half_lse_correction(lse: Any, lse_per_step: Any, cu_seqlens: Any, lse_packed: bool) -> None:
    """Merge a step's log-sum-exp into the second half of every sequence of the running one.

    Parameters
    ----------
    lse : array, float32, shape (N, T), or (sequences, N, longest) where not `lse_packed`
        Natural logarithms. Is written to.
    lse_per_step : array, float32, shape (N, T / 2), or (sequences, N, longest / 2)
    cu_seqlens : array of int, shape (sequences + 1,)
        Cumulative lengths of the whole sequences, all even; read on the host.
    lse_packed : bool

    Raises
    ------
    ConstraintError, UnsupportedError
        As :func:`rau.merge_lse`.
    """
    form = "(N, T)" if lse_packed else "(C, N, L)"
    its = form.replace("T", "H").replace("L", "H")  # half of them
    check("thd_second_half_lse_correction", {
        "lse": (lse, form), "lse_per_step": (lse_per_step, its), "cu_seqlens": (cu_seqlens, "(M)"),
    })  # fmt: skip
    _, _, rows, its_rows = _places("thd_second_half_lse_correction", cu_seqlens, True, lse_packed, lse, lse_per_step)
    check_written("thd_second_half_lse_correction", lse=lse)
    half = lse[rows]
    flash_attn_fwd_softmax_lse_correction(half, lse_per_step[its_rows])
    lse[rows] = half


@worded(("out", "lse"), ("out_per_step", "lse_per_step"), ("out_per_step", "lse_per_step"))
def thd_out_correction(
    out: Any, out_per_step: Any, lse: Any, lse_per_step: Any, cu_seqlens: Any, only_second_half: bool, lse_packed: bool
) -> None:
    """Add a step's output to the sum, or to the second half of every sequence of it, by its weight.

    Parameters
    ----------
    out : array, float16, bfloat16 or float32, shape (T, N, D)
        Is written to.
    out_per_step : array, dtype of `out`, shape (T, N, D), or (T / 2, N, D) where `only_second_half`
    lse : array, float32, shape (N, T), or (sequences, N, longest) where not `lse_packed`
        Natural logarithms, over all steps.
    lse_per_step : array, float32
        As `lse`, of the tokens of `out_per_step`.
    cu_seqlens : array of int, shape (sequences + 1,)
        Cumulative lengths of the whole sequences; even ones where `only_second_half`; read on the host.
    only_second_half, lse_packed : bool

    Raises
    ------
    ConstraintError, UnsupportedError
        As :func:`flash_attn_fwd_out_correction`.
    """
    form = "(N, T)" if lse_packed else "(C, N, L)"
    its = form.replace("T", "H").replace("L", "M") if only_second_half else form
    check("thd_out_correction", {
        "out": (out, "(T, N, D)"), "out_per_step": (out_per_step, "(H, N, D)" if only_second_half else "(T, N, D)"),
        "lse": (lse, form), "lse_per_step": (lse_per_step, its), "cu_seqlens": (cu_seqlens, "(E)"),
    })  # fmt: skip
    starts = starts_of("thd_out_correction", cu_seqlens, 2 if only_second_half else 1, out=(out, True))
    starts_of("thd_out_correction", starts // 2 if only_second_half else starts, 1, out_per_step=(out_per_step, True))
    tokens, its_tokens, rows, its_rows = _places("thd_out_correction", cu_seqlens, only_second_half, lse_packed, lse, lse_per_step)
    check_written("thd_out_correction", out=out)
    mine = out[tokens]
    _add(mine, out_per_step[its_tokens], lse[rows], lse_per_step[its_rows], "TND", "NT" if lse_packed else "TN")
    if not isinstance(tokens, slice):  # else a view
        out[tokens] = mine


def _by_axis(call: str, seq_dim: Any, *forms: str) -> str:
    """Return which of two shapes an output has, from the axis of its tokens."""
    if isinstance(seq_dim, int) and seq_dim in (0, 1):
        return forms[seq_dim]
    report = Violations(call)
    report.add("layout", f"seq_dim = {shown(seq_dim)}; expected 0 for {forms[0]}, or 1 for {forms[1]}.")
    raise report.error()


def _add(out: Any, part: Any, lse: Any, its_lse: Any, layout: str, lse_layout: str) -> None:
    """Add an output to `out`, times exp(its_lse - lse), in place.

    The weights of a merge add up to 1, and `out` is to keep a weight of 1: a third state, of zeros and with the part's sum
    negated, takes back as much weight as the part has, and its product adds nothing.
    """
    zeros = library(part).zeros_like(part)
    pairs = (out, lse), (part, its_lse), (zeros, its_lse)
    total, weighed, balance = states_of(pairs, names_of(pairs), Violations("merge_states"), "e", layout, lse_layout, False, None, 1)
    balance = balance._replace(softmax_sum=-balance.softmax_sum)
    merge_states([total, weighed, balance], layout=layout, statistics=False, out=out)


def _places(call: str, cu_seqlens: Any, half: bool, packed: bool, lse: Any, its_lse: Any) -> tuple[Any, Any, Any, Any]:
    """Index the tokens of all sequences, or of their second halves: in the whole, in a step; then the rows of both."""
    bounds = starts_of(call, cu_seqlens, 2 if half else 1, lse=(lse, packed))
    starts_of(call, bounds // 2 if half else bounds, 1, lse_per_step=(its_lse, packed))
    starts = (bounds[:-1] + bounds[1:]) // 2 if half else bounds[:-1]
    lengths = bounds[1:] - starts
    tokens = rows_of_sequences(starts, lengths)
    its_tokens = slice(bounds[0] // 2, bounds[-1] // 2) if half else tokens
    if packed:
        return tokens, its_tokens, (..., tokens), (..., its_tokens)
    sequence, its_place = numbered(lengths)
    place = its_place + (starts - bounds[:-1])[sequence]
    return tokens, its_tokens, (sequence, slice(None), place), (sequence, slice(None), its_place)
