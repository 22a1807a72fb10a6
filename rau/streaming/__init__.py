"""StreamingMerge: a running state that takes one partial state after another, in place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np

from rau.arrays import Kind, plain
from rau.arrays.jax_ import is_tracer
from rau.constraints import FIELDS, Options, bind, check_options, checked
from rau.constraints.hints import described
from rau.constraints.lengths import bind_lengths
from rau.constraints.outputs import Names
from rau.constraints.results import bind_scale, result_dtype
from rau.constraints.rows import PADDED, Rows, bind_padded, check_token_major, count
from rau.constraints.rules import Violations
from rau.errors import ConstraintError, UnsupportedError, shown
from rau.layouts import LAYOUTS
from rau.problem import Problem
from rau.state import AttentionState
from rau.streaming.running_state import UPDATE, RunningState, of_part
from rau.streaming.tokens import padded_rows, part, part_of

_CLASS, _RESULT = "StreamingMerge", "StreamingMerge.result"


def _of_like(state: int, field: int) -> str:
    return f"like.{FIELDS[field]}"


def _of_partial(state: int, field: int) -> str:
    return FIELDS[field]


def _of_whole(state: int, field: int) -> str:
    return FIELDS[field] if state else f"the running {FIELDS[field]}"


def _breaks_graphs(method: Callable[..., Any]) -> Callable[..., Any]:
    """Have a method run as it is, between two graphs, where torch compiles whoever calls it."""

    @wraps(method)
    def call(self: StreamingMerge, *arguments: Any, **options: Any) -> Any:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            from rau.streaming.compiled import compiling, eagerly

            if compiling():
                return eagerly(method, self, *arguments, **options)
        return method(self, *arguments, **options)

    return call


class StreamingMerge:
    """A running attention state, fed one partial state at a time: the merge of a ring, with one rounding at its end.

    It starts empty. Each :meth:`update` merges one partial state into it, in place; :meth:`result` rounds once. A chain
    of 16-bit updates rounds at every hop, so that its error grows with the ring; this one's does not.

    Parameters
    ----------
    layout : {"SBH", "TND", "BSND", "BNSD"}, default "SBH"
        Layout of the attention outputs, as in :func:`ring_attention_update`.
    actual_seq_qlen : array of int64, shape (sequences + 1,), or list of int, optional
        Cumulative sequence lengths in layout "TND", always those of all tokens, even where parts of them are updated.
        Required there, except for token-major statistics in profile "portable", where None means one sequence. Copied, if
        on the host.
    softmax_layout : {"TND", "SBH"}, default "TND"
        Order of the statistics in layout "TND": token-major, or packed per sequence.
    cu_seqlens_padded : array of int64, shape (sequences + 1,), or list of int, optional
        In layout "TND" with token-major statistics, as in :func:`ring_attention_update`: the cumulative lengths of the slots in
        which the sequences stand. Padding stays empty. A half is one of the slots, each sequence filling its front first.
    like : AttentionState, optional
        A state of the full shape, for when the first update covers only a part. Its shapes, dtypes, array kind and
        device are used, and none of its values.
    backend : str or Backend, optional
        The backend that computes, chosen anew at each update. Default: `use_backend`, then the environment variable
        ``RAU_BACKEND``, then the best one available.
    profile : {"portable", "mindspore", "cann-v2"}, default "portable"
        Which limits each partial state has to keep. The running state is float32 in all of them.
    check : {"metadata", "values", "document"}, default "metadata"
        What is checked in each partial state, as in :func:`ring_attention_update`.

    Raises
    ------
    ConstraintError
        If an option does not exist, or `like` or `actual_seq_qlen` breaks a rule.

    Notes
    -----
    The running state has the kind and device of the first partial state's arrays: it is float32, or float64 where they
    are. The first step allocates it. No later step allocates anything of its size or copies any of it, with or without
    `tokens`: the backend is given views and writes in place (rows chosen by number or mask, and those of padded sequences, are
    copied out and back). What memory a backend itself needs is up to it: `cython` and
    `cuda` need none, `numpy` and `torch` compute in temporaries. For a backend that does not merge 16 bits into float32,
    partial states are widened; for one that does not write in place, results are copied.

    The float32 state has the bits of a chain of :func:`ring_attention_update` with ``out=`` the running state, on every
    backend of this package. With u = 2**-24, v = 2**-53, S = sum(abs(w_i * o_i)) and M = max(abs(o_i)), after n partial states
    an element is within ((1 + u)**(4*n - 5) * (1 + 5.43 * (n - 1) * v) - 1) * S + 2**-148 * n * (1 + M) of the exact merge of
    all of them (to first order (4*n - 5) * u * S), whatever the partials' dtype, where the sums are normal float32 numbers;
    in float64 within 7.43 * (n - 1) * v * S + 2**-507 * n * M + 2**-1073 * n, where all sums, the running one's too, are in
    [2**-256, 2**256]. proofs/README.md has the proofs.

    Under ``torch.compile`` the graph breaks around each of these methods, which run as they are; ``fullgraph=True`` is refused.

    A whole ring can be captured into a CUDA graph, from the creation of the StreamingMerge to its result; a replay then
    starts from the empty state. `actual_seq_qlen` has to be on the device for that. There it is not read, and so not
    checked: with sequences of odd lengths, halves are undefined, though nothing outside the arrays is touched.

    Examples
    --------
    >>> import numpy as np, rau
    >>> rng = np.random.default_rng(0)
    >>> def partial(tokens):
    ...     stats = [np.repeat(rng.random((1, 2, tokens, 1), np.float32), 8, axis=-1) for _ in range(2)]
    ...     return rau.AttentionState(rng.standard_normal((tokens, 1, 2 * 4)).astype(np.float16), *stats)
    >>> ring = rau.StreamingMerge()
    >>> first, second, third = partial(6), partial(6), partial(3)
    >>> ring.update(*first)
    >>> ring.update(*second)
    >>> ring.update(*third, tokens="back")  # tokens 3 to 5 alone see these keys
    >>> merged = ring.result(np.float16)
    >>> merged.attn_out.shape, merged.attn_out.dtype, merged.softmax_sum.dtype
    ((6, 1, 8), dtype('float16'), dtype('float32'))
    >>> both = rau.merge_states([first, second])
    >>> bool(np.allclose(merged.attn_out[:3], both.attn_out[:3], atol=1e-3))
    True
    """

    @_breaks_graphs
    def __init__(
        self,
        layout: str = "SBH",
        *,
        actual_seq_qlen: Any = None,
        softmax_layout: str = "TND",
        cu_seqlens_padded: Any = None,
        like: Any = None,
        backend: Any = None,
        profile: str = "portable",
        check: str = "metadata",
    ) -> None:
        report = Violations(_CLASS)
        self._options, limits = check_options(report, Options(layout, softmax_layout, profile, check))  # of partial states
        report.raise_if_broken()
        lengths, self._real = None, None
        self._packed = layout == "TND" and softmax_layout == "SBH"
        if cu_seqlens_padded is not None:
            check_token_major(report, PADDED, self._options)
            report.raise_if_broken()
            bound = bind_padded(report, actual_seq_qlen, cu_seqlens_padded, None)
            report.raise_if_broken()
            assert bound is not None
            self._real, lengths = bound
        elif layout == "TND":
            lengths = bind_lengths(report, actual_seq_qlen, None, self._packed, limits.vendor)
            report.raise_if_broken()
        self._whole = self._options._replace(profile="portable", check="metadata")  # of the running one
        self._lengths, self._backend = lengths, backend
        self._running: RunningState | None = None
        if like is not None:
            if not isinstance(like, (tuple, list)) or len(like) != 3:
                report.add("states", f"like is {described(like)}; expected an AttentionState of the full shape.")
                raise report.error()
            _refuse_gradients(_CLASS, like)
            self._running = self._start(_CLASS, like, _of_like, self._options._replace(check="metadata"))

    def __repr__(self) -> str:
        how = f'layout="{self._options.layout}"'
        if self._backend is not None:
            how += f", backend={shown(self._backend)}"
        if self._running is None:
            return f"StreamingMerge({how}), no state yet"
        broken = ", broken off in an update" if self._running.broken else ""
        return f"StreamingMerge({how}){broken}, its running {self._running.state!r}"

    @property
    def running(self) -> AttentionState | None:
        """The running state itself, which later updates change (and tell torch that they do); None before there is one.

        :meth:`result` returns a copy.
        """
        return None if self._running is None else self._running.state

    @_breaks_graphs
    def update(self, attn_out: Any, softmax_max: Any = None, softmax_sum: Any = None, *, tokens: Any = None) -> None:
        """Merge one partial state into the running state, in place.

        Parameters
        ----------
        attn_out : array, float16, bfloat16 or float32
            Attention output over some keys, in the layout; float64 where the first one was. It need not be contiguous
            and is not kept.
        softmax_max, softmax_sum : array, float32 (float64 with a float64 output)
            Its statistics: (B, N, S, 8), or (T, N, 8) in "TND"; 1 lane will do as well in profile "portable". The running
            ones have as many as the first.
        tokens : slice, {"front", "back"}, or array of int or bool, optional
            Which tokens the partial state covers; all by default. A slice along the token axis, unless statistics are packed.
            In layout "TND" with token-major statistics also the tokens' numbers, each at most once, or a mask of shape (T,): the
            partial state has as many tokens as are chosen, in that order. "front" and "back" are the first and the second half of
            every sequence, in all layouts and both orders of the statistics: the partial state then has T / 2 tokens, its
            sequences half as long, one after another.

        Raises
        ------
        ConstraintError
            If something does not fit; nothing has been written then. ShapeError for a first update that does not cover all
            tokens where `like` was not given, for a half of a sequence of odd length, for arrays of other shapes, and for
            a partial state that shares memory with the running one.
        UnsupportedError
            If an input requires grad or is traced by torch, or the running state was made to require grad; if the backend
            asked for cannot run this.

        Notes
        -----
        Stopped by Ctrl-C while it writes, an update leaves a state of which nobody can tell which rows are merged (`cython`
        and `cuda` write all or nothing; `numpy` and `torch` in pieces): it refuses further updates and results.

        Tokens that no partial state has covered are empty rows: output 0, max -inf, sum 0. `cython`, `numpy` and `cuda`
        merge the halves of any number of sequences in one call. Other backends are given views of runs of equally long
        sequences, in a layout with a batch axis; parts of a plugin's own arrays go through the host.
        """
        if isinstance(attn_out, (tuple, list)) and softmax_max is softmax_sum is None:
            raise _broken(UPDATE, "states", f"attn_out is {described(attn_out)} of {len(attn_out)} items, and nothing else is "
                          "given; expected three arrays. Pass *state, not state; of an output and its log-sum-exp "
                          "*AttentionState.from_lse(out, lse, base=...).")  # fmt: skip
        if softmax_sum is None and softmax_max is not None:
            raise _broken(UPDATE, "states", "two arrays are given; expected three. Of an output and its log-sum-exp pass "
                          "*AttentionState.from_lse(out, lse, base=...).")  # fmt: skip
        partial = AttentionState(attn_out, softmax_max, softmax_sum)
        _refuse_gradients(UPDATE, partial)
        partial = AttentionState(*map(plain, partial))
        if isinstance(tokens, slice) and tokens.start is tokens.stop is tokens.step is None:
            tokens = None
        as_wanted = self._options == self._whole  # else once more, by other rules
        running = self._running
        if running is None:
            if tokens is not None:
                raise _broken(UPDATE, "first-update", f"tokens = {shown(tokens)} in the first update, which sets the shape of "
                              "the whole; expected an update of all tokens. Or give StreamingMerge(like=...) a state of the "
                              "full shape.")  # fmt: skip
            running = self._start(UPDATE, partial, _of_partial, self._options)
            as_wanted = True
        running.refuse_broken(UPDATE)
        running.refuse_overlap(partial)

        on_host = running.own_kind and (tokens is not None or self._real is not None)
        whole = running.to_host(running.state) if on_host else running.state
        places, lengths, half, names = whole, self._lengths, None, _of_whole
        rows: Rows | None = None
        if tokens is not None:
            places, lengths, half, rows = self._places(running.kind, whole, tokens)
            if rows is not None and self._real is not None:
                raise _broken(UPDATE, "tokens", "tokens are chosen in a ring of padded sequences; expected \"front\", \"back\" or "
                              "none, since padding stays empty.")  # fmt: skip
            names = of_part
        if on_host:
            bind(UPDATE, (partial,), _of_partial, lengths, self._whole, None)
            partial = running.to_host(partial)
        if self._real is not None and (tokens is None or half is not None):
            bind(UPDATE, (places, partial), names, lengths, self._whole, None)
            assert isinstance(self._lengths, np.ndarray)  # the slots, on the host
            rows, its = padded_rows(self._lengths, self._real, half)
            places, partial, half = part(whole, "TND", rows), part(partial, "TND", its), None
            lengths = np.array([0, count(rows)])
        into = None if running.kind.name == "jax" and not on_host else places  # which cannot be written into
        problem, states, _ = checked(UPDATE, (places, partial), names, lengths, self._whole, into, half)
        if not as_wanted:
            bind(UPDATE, (partial,), _of_partial, lengths, self._options, None)
        running.merge(problem, whole, places, AttentionState(*states[1]), on_host=on_host, rows=rows)
        self._running = running

    @_breaks_graphs
    def result(self, dtype: Any = None, scale: Any = None) -> AttentionState:
        """Return a copy of the running state, its output rounded once to nearest even.

        Parameters
        ----------
        dtype : str or dtype, optional
            float16, bfloat16, float32, float8_e4m3fn or float8_e5m2, by name or as NumPy's or the framework's dtype; float64
            where the partial states are. By default the running state's, which rounds nothing.
        scale : float, or array of float32, shape () or (N,), optional
            Of an output of eight bits, as in :func:`rau.merge_states`.

        Returns
        -------
        AttentionState
            New arrays, which later updates do not change; the statistics are float32 (or float64).

        Raises
        ------
        ShapeError
            Before the first update, where `like` was not given. With `like`, the state is then empty.
        DTypeError
            For any other dtype.
        """
        running = self._running
        if running is None:
            raise _broken(_RESULT, "first-update", "there is no state yet; expected an update first. Or give "
                          "StreamingMerge(like=...) a state of the full shape, for an empty result.")  # fmt: skip
        running.refuse_broken(_RESULT)
        own = running.asked.dtype
        report = Violations(_RESULT)
        wanted = result_dtype(report, dtype, own)
        scale = bind_scale(report, scale, wanted, running.asked.N, running.state.attn_out)
        report.raise_if_broken()
        attn_out, *stats = running.state
        return AttentionState(running.cast(attn_out, wanted, scale), *(running.cast(part, own) for part in stats))

    def next_update(self) -> tuple[Problem, Any]:
        """Describe the next update, of all tokens, and name the backend that it asks for, if any: :func:`rau.explain` asks."""
        if self._running is None:
            raise _broken("explain", "first-update", "there is no state yet, and the kind of arrays is not known; expected an "
                          "update first. Or give StreamingMerge(like=...) a state of the full shape.")  # fmt: skip
        return self._running.asked, self._backend

    def _start(self, call: str, like: Any, names: Names, options: Options) -> RunningState:
        problem, _ = bind(call, (like,), names, self._lengths, options, None)
        return RunningState(problem, like, self._backend)

    def _places(
        self, kind: Kind, whole: AttentionState, tokens: Any
    ) -> tuple[AttentionState, Any, str | None, Rows | None]:
        """Find the part of the running state that some tokens are.

        Returns them, as views where they can be seen so, the partial state's cumulative lengths and, in layout "TND", the half
        or the rows. The halves of sequences are no view; the first tokens, as many, have to stand for them (see Problem.half).
        """
        if kind.name == "mindspore":
            raise UnsupportedError(f"{UPDATE}: tokens = {shown(tokens)} with MindSpore tensors, whose slices may be copies; "
                                   "expected NumPy arrays, torch tensors or a plugin's own arrays.")  # fmt: skip
        layout, lengths = self._options.layout, self._lengths
        length = whole.attn_out.shape[LAYOUTS[layout].attn_token]
        on_device = lengths is not None and not isinstance(lengths, np.ndarray)  # and not read: no odd length is noticed
        where = part_of(UPDATE, tokens, layout, self._packed, length, np.zeros(1, np.int64) if on_device else lengths)
        if not isinstance(where, str):
            own = np.array([0, count(where)]) if layout == "TND" else None
            return part(whole, layout, where), own, None, where
        lengths = np.array((0, length)) if lengths is None else lengths
        return part(whole, "TND", slice(0, length // 2)), lengths // 2, where, None


def _broken(call: str, rule: str, message: str) -> ConstraintError:
    report = Violations(call)
    report.add(rule, message)
    return report.error()


def _refuse_gradients(call: str, partial: Any) -> None:
    if any([is_tracer(array) for array in partial]):
        from rau import jax_op  # imports JAX, which is loaded by now

        jax_op.refuse_running(call)
    if "torch" not in sys.modules:
        return
    from rau import torch_op  # imports torch, which is loaded by now

    graph = torch_op.graph_of((partial,))
    if graph is not None:
        instead = "Use rau.merge_states, which has both, or" if graph.operators_take_it else "You may"
        raise UnsupportedError(
            f"{call}: {graph.reason}; a state that is written in place has no gradient and no place in a graph. {instead} "
            f"{graph.way_out}."
        )
