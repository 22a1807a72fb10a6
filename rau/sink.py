"""Attention sinks: one more logit of each head, whose value is 0."""

from __future__ import annotations

from typing import Any

from rau.arithmetic import library
from rau.arrays import kind_of
from rau.arrays.numpy_ import ITEMSIZE
from rau.call import NAMES
from rau.constraints import Options, bind
from rau.constraints.hints import described
from rau.constraints.lengths import bind_lengths
from rau.constraints.lse_arguments import check_alike, check_array, check_lengths_here
from rau.constraints.options import check_layout, check_softmax_layout
from rau.constraints.rules import Violations
from rau.constraints.values import check_maxima
from rau.errors import ConstraintError
from rau.layouts import LAYOUTS
from rau.lse import reordered
from rau.state import AttentionState
from rau.update import dispatch


def add_sink(
    state: Any,
    sink: Any,
    layout: str = "SBH",
    *,
    softmax_layout: str = "TND",
    actual_seq_qlen: Any = None,
    backend: Any = None,
    check: str = "metadata",
) -> AttentionState:
    """Add each head's attention sink to a state over all the keys: a logit that takes its share of the softmax, of value 0.

    Parameters
    ----------
    state : AttentionState, or triple of arrays
        NumPy arrays or torch tensors, as :func:`merge_states` takes them.
    sink : ndarray or torch.Tensor, float32 (float64 with a float64 output), shape (N,)
        The logit of each query head as it stands in the exponential, exp(sink): in natural units, and not to be scaled as the
        scores are. -inf is no sink.
    layout, softmax_layout, backend, check
        As in :func:`merge_states`.
    actual_seq_qlen : array of int64, shape (sequences + 1,), or list of int, optional
        Cumulative sequence lengths; required for packed statistics.

    Returns
    -------
    AttentionState
        With the state's shapes and dtypes.

    Raises
    ------
    ConstraintError, UnknownBackendError, BackendUnavailableError, UnsupportedError
        As :func:`merge_states`.

    Notes
    -----
    It is ``merge_states([state, s])`` with s of output 0, maximum `sink` and sum 1 in every row, and has its bounds, its rules
    for what is not finite (``check="values"`` refuses sinks that are NaN or +inf) and its gradients: that of the sink is summed
    over the rows. A row without keys has output 0 and the log-sum-exp `sink`. Nothing as large as an output is made for s.

    A sink belongs into each row once. In a ring every rank adds it at the end, to what it has merged for its own queries; added
    to each part of the keys, it would count once a part.

    Examples
    --------
    >>> import numpy as np, rau
    >>> state = rau.AttentionState.from_lse(np.ones((1, 1, 2), np.float32), np.zeros((1, 1, 1), np.float32), base="e")
    >>> rau.add_sink(state, np.zeros(1, np.float32)).attn_out  # as much weight as the only key
    array([[[0.5, 0.5]]], dtype=float32)
    """
    report = Violations("add_sink")
    check_layout(report, layout)
    check_softmax_layout(report, "softmax-layout", "softmax_layout", softmax_layout)
    if not isinstance(state, (list, tuple)) or len(state) != 3:
        got = f"has {len(state)} items" if isinstance(state, (list, tuple)) else f"is {described(state)}"
        report.add("states", f"state {got}; expected an AttentionState or a triple (attn_out, softmax_max, softmax_sum).")
    report.raise_if_broken()
    attn_out, maximum, _ = state
    out = check_array(report, "state.attn_out", attn_out, "dtype-attn", tuple(ITEMSIZE))
    check_array(report, "state.softmax_max", maximum, "dtype-stats")
    wide = out is not None and out.dtype == "float64"
    its = check_array(report, "sink", sink, "dtype-stats", ("float64" if wide else "float32",))
    if its is not None and out is not None:
        check_alike(report, "sink", its, "state.attn_out", out)
    report.raise_if_broken()
    axes, shape, lengths = LAYOUTS[layout], tuple(maximum.shape), actual_seq_qlen
    form = axes.stats.format(lanes="8 or 1")
    packed = layout == "TND" and softmax_layout == "SBH"
    if len(shape) != form.count(",") + 1:
        report.add("rank", f'state.softmax_max has shape {shape}; layout "{layout}" expects {form}.')
    else:
        if tuple(sink.shape) != shape[axes.stats_head : axes.stats_head + 1]:
            report.add("heads", f"sink has shape {tuple(sink.shape)}; expected (N,) = ({shape[axes.stats_head]},), a number for "
                       "each query head.")  # fmt: skip
        if packed:
            lengths = bind_lengths(report, actual_seq_qlen, shape[0], packed=True, vendor=False)
            check_lengths_here(report, lengths, "state.softmax_max", maximum)
    report.raise_if_broken()
    xp = library(sink)
    if packed:  # whose rows are not a view of one number for each head
        logits = reordered(xp.broadcast_to(sink, shape[:2]), lengths, "SBH")[..., None]
    else:
        logits = sink.reshape(*sink.shape, *(1,) * (len(shape) - 1 - axes.stats_head))
    zeros = xp.zeros_like(attn_out[(slice(1),) * (attn_out.ndim - 1)])
    added = AttentionState(
        xp.broadcast_to(zeros, attn_out.shape), xp.broadcast_to(logits, shape), xp.broadcast_to(xp.ones_like(logits), shape)
    )
    options = Options(layout, softmax_layout, "portable", check)
    try:
        return dispatch("add_sink", [state, added], lengths, options, None, backend)
    except ConstraintError:  # what does not fit to the state may be the state's own fault, which is said alone then
        bind("add_sink", [state], NAMES["add_sink"], lengths, options, None)
        kind = kind_of(sink)
        if check != "metadata" and kind is not None:
            check_maxima(report, "sink", kind.to_numpy(sink), check)  # by its own index, and not by that of a row
            report.raise_if_broken()
        raise
