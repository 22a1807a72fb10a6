"""The public calls: ring_attention_update, merge_states and merge_lse."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal, overload

from rau import registry
from rau.arrays import kind_of
from rau.arrays.jax_ import is_tracer
from rau.call import NAMES, run
from rau.constraints import Options, bind, checked
from rau.constraints.lse_arguments import (
    asks_base,
    check_base,
    check_layouts,
    check_pair_out,
    check_pairs,
    check_rows,
)
from rau.constraints.options import check_statistics
from rau.constraints.rules import Violations
from rau.constraints.stacked import as_states
from rau.rows import Asked, Compute, asked_of, merge_counts, merge_pair_rows, merge_rows
from rau.state import AttentionState, states_of


def ring_attention_update(
    prev_attn_out: Any,
    prev_softmax_max: Any,
    prev_softmax_sum: Any,
    cur_attn_out: Any,
    cur_softmax_max: Any,
    cur_softmax_sum: Any,
    actual_seq_qlen: Any = None,
    layout: str = "SBH",
    *,
    softmax_layout: str = "TND",
    cu_seqlens_padded: Any = None,
    tokens: Any = None,
    out: Any = None,
    backend: Any = None,
    profile: str = "mindspore",
    check: str = "metadata",
) -> AttentionState:
    """Merge two partial attention states over disjoint keys into the state over all of them.

    S, B and T are the sequence length, the batch and all the batch's tokens; N heads of dimension D make the
    hidden size H = N * D.

    Parameters
    ----------
    prev_attn_out : array, float16, bfloat16 or float32
        Attention output of the first part: (S, B, H) in layout "SBH", (T, N, D) in "TND"; in profile "portable" also
        float64, (B, S, N, D) in "BSND" and (B, N, S, D) in "BNSD". In NumPy arrays, bfloat16 is that of ml_dtypes.
    prev_softmax_max : array, float32
        Row maximum of the scores: (B, N, S, 8), or (T, N, 8) in "TND"; lane 0 is read. In profile "portable" also
        1 lane, and float64 with a float64 output.
    prev_softmax_sum : array, shape and dtype of `prev_softmax_max`
        Row sum of exp(score - max).
    cur_attn_out : array, shape and dtype of `prev_attn_out`
        The second part; in profile "portable" it may be 16-bit where `prev_attn_out` is float32.
    cur_softmax_max, cur_softmax_sum : array, shape and dtype of `prev_softmax_max`
        In profile "portable" of 1 or 8 lanes, whatever the others have.
    actual_seq_qlen : array of int64, shape (sequences + 1,), or list of int, optional
        Cumulative sequence lengths in tokens, non-decreasing from 0 to T; padding at the buffer's end is a sequence of its
        own. Read in layout "TND" only; required there, except for token-major statistics in profile "portable", where int32
        is accepted as well.
    layout : {"SBH", "TND", "BSND", "BNSD"}, default "SBH"
        Layout of the attention outputs.
    softmax_layout : {"TND", "SBH"}, default "TND"
        Order of the statistics in layout "TND": "TND" token-major, the statistic of token t and head n at [t, n];
        "SBH" packed per sequence, as the vendor's kernels emit it. Mixing them up raises no error: read the Notes.
    cu_seqlens_padded : array of int64, shape (sequences + 1,), or list of int, optional
        In layout "TND" with token-major statistics, where each sequence stands in a slot that is longer than itself: the slots'
        cumulative lengths, from 0 to T; `actual_seq_qlen` then holds the sequences' own. Padding is not read: in `out` it stays
        as it is, in a new result it is empty (output 0, max -inf, sum 0).
    tokens : array of bool, shape (T,), or of int, or slice, optional
        In layout "TND" with token-major statistics: the tokens to merge. Of the others, `prev` comes back bit for bit, and
        nothing of `cur` is read. A mask on a device is waited for.
    out : triple of arrays, optional
        Arrays to write into, of the shapes and dtypes of the `prev` arrays (in profile "portable" of 1 or 8 lanes); they may
        be the `prev` (or `cur`) arrays themselves, which makes the update in place. Any other overlap is refused. What
        Ctrl-C, or another thread, can do to them meanwhile is in docs/reliability.md.
    backend : str or Backend, optional
        The backend that computes. Default: `use_backend`, then the environment variable ``RAU_BACKEND``, then the best one
        available.
    profile : {"mindspore", "cann-v2", "portable"}, default "mindspore"
        Which limits hold: the reference page's, those of CANN's V2 entry, or only those on shapes and dtypes.
    check : {"metadata", "values", "document"}, default "metadata"
        "metadata" reads no values of the arrays. "values" also checks that lanes are equal, that no sum is negative or
        NaN and no max NaN or +inf, and that no two states that both have keys in a row share the memory of their outputs, as
        happens when a kernel reuses its buffer. "document" also checks that max is positive, as the reference page says.

    Returns
    -------
    AttentionState
        (attn_out, softmax_max, softmax_sum), each with the shape and dtype of its `prev` counterpart, the lanes of the
        statistics equal; the arrays of `out` where it was given.

    Raises
    ------
    ConstraintError
        If the call breaks a rule; the message lists every broken rule. It is a RuntimeError, as the reference page
        promises; its subclasses ShapeError and LayoutError are also ValueErrors, and DTypeError is also a TypeError.
    UnknownBackendError, BackendUnavailableError, UnsupportedError
        If the backend asked for does not exist, cannot be used here, or does not take the call. UnsupportedError also if
        `out` is given to a call that torch traces or wants a gradient of.

    Notes
    -----
    With m = max(m_prev, m_cur), a = l_prev * exp(m_prev - m) and b = l_cur * exp(m_cur - m), as on the reference page
    of ``mindspore.ops.ring_attention_update``::

        l = a + b,    o = o_prev * (a / l) + o_cur * (b / l)

    Rows are computed in float64 and their weights are rounded once to float32; elements are computed in float32 without
    fused operations, and rounded once more where stored in 16 bits. With u = 2**-24, v = 2**-53,
    S = abs(w1*o1) + abs(w2*o2) and O = abs(o1) + abs(o2), each float32 element is within
    (3*u + 6*v) * S + (1 + u)**3 * 2**-150 * (2 + O) of the exact result, where the second term matters for subnormal numbers
    only; 16 bits add half a unit in the last place. A float64 element is within 7.43 * v * S + 2**-509 * O + 2**-1073, if
    both sums are in [2**-256, 2**256]. Outside that range, a side whose max is more than 708 below the other's is lost
    whatever its sum, and a new sum may be infinite, while the output is still that of the two weights. proofs/README.md has
    the proofs. Every backend of this package but `ascend` and `jax_numpy` returns the same bits.

    A side whose sum is 0 or whose max is -inf is empty: the other side comes back bit for bit, whatever the empty side's
    output holds. If both are empty, so is the result: output 0, max -inf, sum 0.

    Torch tensors that require grad get a gradient, which under ``create_graph=True`` can be differentiated again (in
    float64, slower). Torch is told of every write into `out`: a graph that has kept one of its tensors raises in its
    backward. Torch knows nothing of memory that a tensor shares with NumPy arrays; write into the tensor itself. An `out`
    that requires grad is refused while grad mode is on.

    Packed and token-major statistics have the same shape, and reading one as the other leaves max and sum right and
    corrupts only attn_out. What ``npu_fusion_attention`` emits for TND is packed.

    Examples
    --------
    Two halves of the keys of one query, and the whole:

    >>> import numpy as np, rau
    >>> scores, values = np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0, 4.0])
    >>> def part(s, v):
    ...     p = np.exp(s - s.max())
    ...     stats = [np.full((1, 1, 1, 8), x, np.float32) for x in (s.max(), p.sum())]
    ...     return np.full((1, 1, 1), p @ v / p.sum(), np.float32), *stats
    >>> merged = rau.ring_attention_update(*part(scores[:2], values[:2]), *part(scores[2:], values[2:]))
    >>> bool(np.allclose(merged.attn_out, part(scores, values)[0], rtol=1e-6))
    True
    """
    prev = AttentionState(prev_attn_out, prev_softmax_max, prev_softmax_sum)
    cur = AttentionState(cur_attn_out, cur_softmax_max, cur_softmax_sum)
    options = Options(layout, softmax_layout, profile, check)
    asked = asked_of("ring_attention_update", tokens, cu_seqlens_padded)
    return dispatch("ring_attention_update", (prev, cur), actual_seq_qlen, options, out, backend, asked)


@overload
def merge_states(
    states: Sequence[Any],
    actual_seq_qlen: Any = None,
    layout: str = "SBH",
    *,
    softmax_layout: str = "TND",
    cu_seqlens_padded: Any = None,
    tokens: Any = None,
    indptr: Any = None,
    dtype: Any = None,
    scale: Any = None,
    statistics: Literal[True] = True,
    out: Any = None,
    backend: Any = None,
    profile: str = "portable",
    check: str = "metadata",
) -> AttentionState: ...


@overload
def merge_states(
    states: Sequence[Any],
    actual_seq_qlen: Any = None,
    layout: str = "SBH",
    *,
    softmax_layout: str = "TND",
    cu_seqlens_padded: Any = None,
    tokens: Any = None,
    indptr: Any = None,
    dtype: Any = None,
    scale: Any = None,
    statistics: bool,
    out: Any = None,
    backend: Any = None,
    profile: str = "portable",
    check: str = "metadata",
) -> Any: ...


def merge_states(
    states: Sequence[Any],
    actual_seq_qlen: Any = None,
    layout: str = "SBH",
    *,
    softmax_layout: str = "TND",
    cu_seqlens_padded: Any = None,
    tokens: Any = None,
    indptr: Any = None,
    dtype: Any = None,
    scale: Any = None,
    statistics: bool = True,
    out: Any = None,
    backend: Any = None,
    profile: str = "portable",
    check: str = "metadata",
) -> Any:
    """Merge K partial attention states over disjoint keys in one pass.

    Parameters
    ----------
    states : list or tuple of AttentionState, or AttentionState
        At least one state. All have the first one's shapes, though the statistics may have 1 lane in some and 8 in
        others; later outputs may be 16-bit where the first is float32. Or a single triple whose three arrays hold K
        states along a new first axis: (K, S, B, H) and (K, B, N, S, 8), for example.
    statistics : bool, default True
        False for the output alone, where nobody goes on to merge it: the last merge of a ring, a decode step. No statistics
        are then allocated or written, by the backends of this package.
    out : triple of arrays, optional
        As in :func:`ring_attention_update`, of 8 or 1 lanes; without `statistics` a single array, for the output.
    indptr : array of int64, shape (T + 1,), or list of int, optional
        Where rows have any number of states, in layout "TND" with token-major statistics: `states` is then one triple of arrays,
        (M, N, D) and (M, N, 8), all rows' states one after another, those of row t from ``indptr[t]`` to ``indptr[t + 1]``. The
        result has T rows; one without a state is empty. One call is made for each number of states that there is.
    dtype : str or dtype, optional
        Of the output, where it is not to be the first state's: "float32", "float16", "bfloat16", "float8_e4m3fn" or
        "float8_e5m2", rounded once, to nearest even. Needs a float32 copy of the output, and of a narrower first state.
    scale : float, or array of float32, shape () or (N,), optional
        Of an output of eight bits, which is ``round(clip(output * scale))``: the product is rounded to float32, infinities
        become the largest numbers, NaN stays NaN.
    actual_seq_qlen, layout, softmax_layout, cu_seqlens_padded, tokens, backend, profile, check
        As in :func:`ring_attention_update`, but the profile is "portable" by default, since no vendor offers this call; of tokens
        that are not merged, the first state comes back.

    Returns
    -------
    AttentionState, or array
        With the first state's shapes and dtypes, the lanes those of `out` where it was given; without `statistics` its
        attn_out alone, of the same bits.

    Raises
    ------
    ConstraintError, UnknownBackendError, BackendUnavailableError, UnsupportedError
        As :func:`ring_attention_update`.

    Notes
    -----
    As in :func:`ring_attention_update`, which is the case K = 2: the states are added left to right, each input is read
    once, and a 16-bit result is rounded once. With u = 2**-24, v = 2**-53, S = sum(abs(w_i * o_i)) and O = sum(abs(o_i)), each
    float32 element is within ((1 + u)**(K + 1) * (1 + (K + 6.85) * v) - 1) * S + (1 + u)**(K + 1) * 2**-150 * (K + O) of the
    exact result (to first order (K + 1) * u * S), a float64 one within (2*K + 6.85) * v * S + 2**-509 * O + 2**-1074 * K, if
    all sums are in [2**-256, 2**256]. proofs/README.md has the proofs, for K up to 2**20.

    A state is three arrays, so that ``out, lse = rau.merge_states(...)`` ends in Python's "too many values to unpack
    (expected 2)". Write ``merged.attn_out`` and ``merged.lse(base=...)``, or call :func:`merge_lse`, which takes pairs and
    returns one.

    Examples
    --------
    >>> import numpy as np, rau
    >>> lse = np.log(np.array([[[1.0]], [[3.0]]], np.float32))  # weights 1/4 and 3/4
    >>> parts = [rau.AttentionState.from_lse(np.full((1, 1, 1), x, np.float32), l[None], base="e")
    ...          for x, l in zip((4.0, 8.0), lse)]
    >>> rau.merge_states(parts).attn_out.item()
    7.0
    """
    check_statistics(Violations("merge_states"), statistics, out)
    options = Options(layout, softmax_layout, profile, check, statistics)
    asked = asked_of("merge_states", tokens, cu_seqlens_padded, dtype, scale)
    if indptr is not None:
        merged = merge_counts(
            "merge_states", states, actual_seq_qlen, indptr, options, out, asked, _computing("merge_states", backend)
        )
        return merged if statistics else merged.attn_out
    states = as_states(states, layout)
    if statistics:
        return dispatch("merge_states", states, actual_seq_qlen, options, out, backend, asked)
    return dispatch("merge_states", states, actual_seq_qlen, options, None if out is None else (out,), backend, asked).attn_out


@asks_base
def merge_lse(
    pairs: Sequence[Sequence[Any]],
    layout: str = "SBH",
    *,
    base: str,
    lse_layout: str | None = None,
    inf_is_empty: bool = False,
    heads: int | None = None,
    actual_seq_qlen: Any = None,
    cu_seqlens_padded: Any = None,
    tokens: Any = None,
    dtype: Any = None,
    scale: Any = None,
    out: Any = None,
    backend: Any = None,
) -> tuple[Any, Any]:
    """Merge partial attention outputs and their log-sum-exps, as most kernels return them, into one of each.

    It is :meth:`AttentionState.from_lse`, :func:`merge_states` and :meth:`AttentionState.lse`, in one call, and in place where
    that is wanted.

    Parameters
    ----------
    pairs : list or tuple of pairs (attn_out, lse)
        At least one, each as :meth:`AttentionState.from_lse` takes it. All have the first one's shapes; later outputs may be
        16-bit where the first is float32. With None in the place of each output, the log-sum-exps alone, of any shape.
    layout, base, lse_layout, inf_is_empty, heads
        As in :meth:`AttentionState.from_lse`; of all pairs.
    actual_seq_qlen, cu_seqlens_padded, tokens : optional
        As in :func:`ring_attention_update`. The first is read together with the second alone. Of tokens that are not merged,
        the first pair comes back.
    dtype, scale : optional
        As in :func:`merge_states`: of the output.
    out : pair of arrays, optional
        Arrays to write into: an output of the first one's shape and of the result's dtype, and a log-sum-exp of the dtype that the
        result has.
        They may be those of a pair themselves, which makes the merge in place (unless its log-sum-exp is float64 beside a
        narrower output). Any other overlap is refused.
    backend
        As in :func:`merge_states`.

    Returns
    -------
    attn_out, lse : array
        The output has the first one's dtype, or `dtype`, the log-sum-exp is float32 (float64 with a float64 output), of the same
        base and axes as those given; -inf for a row without keys. The arrays of `out` where it was given.

    Raises
    ------
    ConstraintError, UnknownBackendError, BackendUnavailableError, UnsupportedError
        As :func:`merge_states`; nothing has been written then.

    Notes
    -----
    The bounds are those of :func:`merge_states` and :meth:`AttentionState.lse`. Merged one pair after another, the running
    log-sum-exp is rounded to float32 at each step, which changes weights by up to abs(lse) * 2**-24, a relative error:
    :class:`StreamingMerge` does not lose that.

    Its states have 1 lane, which the vendor's operator does not take. In place, temporaries take some 50 bytes a row.

    Examples
    --------
    >>> import numpy as np, rau
    >>> pairs = [(np.full((1, 1, 2), x, np.float32), np.full((1, 1, 1), np.log(w), np.float32)) for x, w in ((4, 1), (8, 3))]
    >>> out, lse = rau.merge_lse(pairs, base="e")
    >>> out.tolist(), bool(np.allclose(lse, np.log(4)))
    ([[[7.0, 7.0]]], True)
    >>> rau.merge_lse(pairs, base="e", out=pairs[0])[0] is pairs[0][0]  # in place
    True
    """
    report = Violations("merge_lse")
    base = check_base(report, base)
    layout, axes = check_layouts(report, layout, lse_layout)
    check_pairs(report, pairs, out)
    asked = asked_of("merge_lse", tokens, cu_seqlens_padded, dtype, scale)
    if all([attn_out is None for attn_out, _ in pairs]):
        if asked is not None:
            report.add("tokens", "tokens, cu_seqlens_padded, dtype or scale are given, and the pairs have no outputs, whose "
                       "tokens and dtype those are; expected none of them. Pass the log-sum-exps of the tokens that are "
                       "meant.")  # fmt: skip
        return None, _lse_alone(report, pairs, base, inf_is_empty, out, backend)
    names = [(f"pairs[{k}][0]", f"pairs[{k}][1]") for k in range(len(pairs))]
    states = states_of(pairs, names, report, base, layout, axes, inf_is_empty, heads, 1)
    options = Options(layout, "TND", "portable", "metadata")
    how: dict[str, Any] = {"base": base, "layout": layout, "lse_layout": lse_layout}
    if asked is not None:
        bind("merge_lse", states, NAMES["merge_lse"], None, options, None)
        if out is not None:
            _refuse_graph(states)
            check_pair_out(report, out, pairs, names, states[0], layout, axes)

        def call(of: Sequence[Sequence[Any]], options: Options, out: Any, asked: Asked | None) -> AttentionState:
            return dispatch("merge_lse", of, None if asked is None else actual_seq_qlen, options, out, backend, asked)

        return merge_pair_rows(call, pairs, states, actual_seq_qlen, options, axes, how, out, asked)
    if out is None:
        merged = dispatch("merge_lse", states, None, options, None, backend)
        return merged.attn_out, merged.lse(**how)
    _refuse_graph(states)  # before anything is asked of the arrays
    check_pair_out(report, out, pairs, names, states[0], layout, axes)
    # What is wrong is said of the arrays as they are, before anything is made of them.
    alone = options._replace(statistics=False)
    registry.select(checked("merge_lse", states, NAMES["merge_lse"], None, alone, out[:1])[0], backend)
    # The log-sum-exp first, as the merge of outputs without an element: once an output is written, nothing may fail.
    rows = [state._replace(attn_out=state.attn_out[..., :0]) for state in states]
    lse = dispatch("merge_lse", rows, None, options, None, backend).lse(**how)
    dispatch("merge_lse", states, None, alone, out[:1], backend)
    kind = kind_of(out[1])
    assert kind is not None  # as was just checked
    kind.assign(out[1], lse)
    return out[0], out[1]


def _lse_alone(
    report: Violations, pairs: Sequence[Sequence[Any]], base: str, inf_is_empty: bool, out: Any, backend: Any
) -> Any:
    """Merge log-sum-exps, as those of outputs without an element."""
    if out is not None:
        report.add("out", "out is given, and the pairs have no outputs; expected None. Assign from what is returned.")
    first, like = pairs[0][1], None
    for k, (_, lse) in enumerate(pairs):
        its = check_rows(report, f"pairs[{k}][1]", lse, "pairs[0][1]", like, base)
        like = its if k == 0 else like
        if its is not None and like is not None and (tuple(lse.shape), its.dtype) != (tuple(first.shape), like.dtype):
            report.add("shape-match", f"pairs[{k}][1] has shape {tuple(lse.shape)} and dtype {its.dtype}; expected those of "
                       f"pairs[0][1], {tuple(first.shape)} and {like.dtype}.")  # fmt: skip
    report.raise_if_broken()
    rows = [lse.reshape(-1, 1) for _, lse in pairs]
    flat = [(lse[..., None][..., :0], lse) for lse in rows]
    return merge_lse(flat, "TND", base=base, lse_layout="TN", inf_is_empty=inf_is_empty, backend=backend)[1].reshape(first.shape)


def _refuse_graph(states: Sequence[Sequence[Any]]) -> None:
    """Refuse `out` where there is a graph."""
    operators = _operators(states)
    if operators is not None:
        operators.refuse_out("merge_lse", states)


_torch_op: Any = None  # the module rau.torch_op, once torch is in use: to import it takes as long as a thirtieth of a small call
_jax_op: Any = None  # and rau.jax_op


def _operators(states: Sequence[Sequence[Any]]) -> Any:
    """Return the module of torch's operators where torch traces a call or wants a gradient of it, JAX's where that traces it."""
    global _torch_op, _jax_op
    if _torch_op is None and "torch" in sys.modules:
        from rau import torch_op  # imports torch, which is loaded by now

        _torch_op = torch_op
    if _torch_op is not None and _torch_op.graph_of(states):
        return _torch_op
    if "jax" not in sys.modules or not any([is_tracer(array) for state in states for array in state]):
        return None
    if _jax_op is None:
        from rau import jax_op  # imports JAX, which is loaded by now

        _jax_op = jax_op
    return _jax_op


def dispatch(
    call: str,
    states: Sequence[Sequence[Any]],
    actual_seq_qlen: Any,
    options: Options,
    out: Any,
    backend: Any,
    asked: Asked | None = None,
) -> AttentionState:
    """Make a call here, or by its operator where torch or JAX traces it or wants a gradient; of some rows where that is asked."""
    operators = _operators(states)
    if asked is not None:
        if operators is not None and out is not None:
            operators.refuse_out(call, states)
        compute = _computing(call, backend)
        in_graph = operators is not None and operators is _torch_op  # for JAX it is nothing special
        return merge_rows(call, states, actual_seq_qlen, options, out, backend, asked, compute, in_graph)
    if operators is not None:
        return AttentionState(*operators.through_operator(call, states, actual_seq_qlen, options, out, backend))
    return run(call, states, actual_seq_qlen, options, out, backend)


def _computing(call: str, backend: Any) -> Compute:
    """Return what makes calls of a name, by a backend."""
    return lambda states, lengths, options, out: dispatch(call, states, lengths, options, out, backend)
