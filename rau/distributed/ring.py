"""Ring attention: keys and values travel round the ranks, and each rank's queries attend to those that pass by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rau.constraints.hints import described
from rau.constraints.lengths import bind_lengths
from rau.constraints.rules import Violations
from rau.distributed.attention import attend, attend_backward, differentiated
from rau.distributed.ranks import Ranks
from rau.errors import UnsupportedError, shown
from rau.layouts import LAYOUTS, OTHER_LAYOUTS
from rau.sink import add_sink
from rau.state import AttentionState
from rau.streaming import StreamingMerge

_LAYOUTS = ("BNSD", "BSND", "TND")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Any = None,
    *,
    causal: bool = False,
    layout: str = "BNSD",
    actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    forward: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    timeout: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to the keys of all ranks, each rank holding a part of the queries, keys and values; with its gradient.

    Keys and values go round the ring of ranks, the next ones under way while a rank attends to those that it has, and a
    running state in float32 merges the parts. In the backward pass they go round again, with their gradients in float32.

    Parameters
    ----------
    q : torch.Tensor, float16, bfloat16, float32 or float64
        This rank's queries: (B, N, S, D) in layout "BNSD", (B, S, N, D) in "BSND", (T, N, D) in "TND".
    k, v : torch.Tensor, dtype of `q`
        This rank's keys and values, of N heads, or of fewer, each of which serves as many query heads (GQA). Ranks may hold
        different numbers of tokens, or none.
    group : torch.distributed.ProcessGroup, optional
        The default group where it is None; ring order is rank order. All its ranks make the same call.
    causal : bool, default False
        A query sees no later key. Sequences are then to be cut zig-zag, so that every step costs all ranks the same: of 2P
        chunks, rank r holds chunk r and behind it chunk 2P-1-r, both equally long.
    layout : {"BNSD", "BSND", "TND"}, default "BNSD"
    actual_seq_qlen : array of int64, shape (sequences + 1,), or list of int, optional
        In layout "TND", cumulative lengths of what this rank holds of each sequence; None means one sequence.
    actual_seq_kvlen : as `actual_seq_qlen`, optional
        Of the keys, where they differ.
    sink : torch.Tensor, float32 (float64 with float64), shape (N,), optional
        A logit of each query head without a value, as in :func:`rau.add_sink`; the same on all ranks. Its gradient is that
        of this rank's queries: add it up over the ranks, as that of any parameter which all of them hold.
    scale : float, optional
        Of the scores; by default 1 / sqrt(D).
    forward : callable, optional
        Another kernel: ``forward(q, k, v, causal)`` returns an output and its natural log-sum-exp, (B, N, S, D) and
        (B, N, S), for views in these axes, one sequence at a time in layout "TND". `causal` is true for the rank's own keys
        alone, which are then as many as the queries. The default is torch's flash kernel, or products in float32 where a
        device has none.
    backward : callable, optional
        Its gradient: ``backward(dout, q, k, v, out, lse, causal)`` returns those of q, k and v, where `out` and `lse` are
        those over all keys, as FlashAttention's backward takes them. Without it, `forward` is computed again and
        differentiated by torch, which has to differentiate its log-sum-exp as well.
    timeout : float, optional
        As in :func:`rau.distributed.merge`.

    Returns
    -------
    attn_out : torch.Tensor, shape and dtype of `q` (its last axis that of `v`)
    lse : torch.Tensor, float32 (float64 with float64)
        Natural log-sum-exp over all keys, the sink among them: (B, N, S), or (T, N) in layout "TND". It has no gradient.

    Raises
    ------
    ConstraintError
        If an argument does not fit; where ranks disagree about the call, or one refuses its part of it, on all ranks, before
        anything travels.
    UnsupportedError
        For a gradient under ``create_graph=True``, or of a `forward` that torch does not differentiate.
    LostRankError
        If a rank is gone, or silent for too long; its message names the step and the neighbours. The group cannot be used
        any more then.

    Notes
    -----
    At a given number of ranks, and if `forward` does so, it returns the same bits at every run. The merge is
    :class:`rau.StreamingMerge`, in which rank r merges its own keys first, then those of rank r - 1 and so on; its bound,
    for as many partial states as there are ranks, comes on top of what the kernel's own errors make.

    What `forward` or `backward` raises ends the call of that rank alone: to the others it is lost, and the group cannot be
    used any more.

    Of tokens without any key the output is 0, and the log-sum-exp -inf.
    """
    ranks = Ranks("ring_attention", group, timeout)
    lengths: list[list[int]] = []

    def describe() -> tuple[dict[str, Any], list[int]]:
        lengths[:] = _checked(ranks.call, q, k, v, causal, layout, actual_seq_qlen, actual_seq_kvlen, sink)
        _check_kernel(ranks.call, q, v, scale, forward, backward)
        head = LAYOUTS[layout].attn_head
        assert head is not None
        wants = torch.is_grad_enabled() and any(each.requires_grad for each in (q, k, v, sink) if each is not None)
        return {
            "layout": layout, "causal": causal, "dtype": str(q.dtype), "device": q.device.type,
            "the number of query heads": q.shape[head], "the number of key heads": k.shape[head],
            "the head dimensions of q and v": [q.shape[-1], v.shape[-1]],
            "the number of sequences": len(lengths[0]) if layout == "TND" else q.shape[0],
            "sink is given": sink is not None, "a gradient is wanted": wants, "scale": repr(scale),
        }, lengths[1]  # fmt: skip

    _, keys = ranks.agree(describe)
    if forward is None:
        forward, backward = partial(attend, scale=scale), partial(attend_backward, scale=scale)
    elif backward is None:
        backward = differentiated(forward)
    apply: Any = _Ring.apply  # which torch gives no type
    attn_out, lse = apply(q, k, v, sink, _Plan(ranks, layout, causal, lengths[0], keys, forward, backward))
    return attn_out, lse


class _Plan(NamedTuple):
    """What a ring does, beside its tensors."""

    ranks: Ranks
    layout: str
    causal: bool
    queries: list[int]  # tokens of each sequence, one number for the sequences of a batch
    keys: list[list[int]]  # the same of each rank's keys
    forward: Callable[..., Any]
    backward: Callable[..., Any]

    def visible(self, source: int) -> tuple[str | None, str | None, bool]:
        """Tell which half of the queries attends to which half of the keys of a rank, and whether by a triangular mask."""
        if not self.causal:
            return None, None, False
        if source == self.ranks.rank:
            return None, None, True
        return (None, "front", False) if source < self.ranks.rank else ("back", None, False)

    def cut(self, tensor: Tensor, lengths: Sequence[int], half: str | None = None) -> list[Tensor]:
        """See the sequences of a tensor in the layout, or a half of each, as (B, N, S, D)."""
        if self.layout == "TND":
            views = [part.transpose(0, 1)[None] for part in tensor.split(list(lengths))]
        else:
            views = [tensor if self.layout == "BNSD" else tensor.transpose(1, 2)]
        if half is None:
            return views
        return [view.tensor_split(2, 2)[half == "back"] for view in views]

    def rows(self, lse: Tensor, half: str | None = None) -> list[Tensor]:
        """See the log-sum-exps of the sequences, as (B, N, S)."""
        its = lse.transpose(1, 2) if self.layout == "BSND" else lse
        return [view[..., 0] for view in self.cut(its[..., None], self.queries, half)]

    def state(self, parts: Sequence[tuple[Tensor, Tensor]]) -> AttentionState:
        """Make one state in the layout of what the kernel returned for each sequence."""
        if self.layout == "TND":
            out = torch.cat([out[0].transpose(0, 1) for out, _ in parts])
            return AttentionState.from_lse(
                out, torch.cat([lse[0] for _, lse in parts], 1), base="e", layout="TND", lse_layout="NT"
            )
        ((out, lse),) = parts
        return AttentionState.from_lse(
            out if self.layout == "BNSD" else out.transpose(1, 2), lse, base="e", layout=self.layout, lse_layout="BNS"
        )

    def shapes(self, k: Tensor, v: Tensor, source: int) -> list[tuple[int, ...]]:
        """Shapes of the keys and values of a rank."""
        axis, tokens = LAYOUTS[self.layout].attn_token, sum(self.keys[source])
        return [(*each.shape[:axis], tokens, *each.shape[axis + 1 :]) for each in (k, v)]

    def seen(self, buffer: Tensor, k: Tensor, v: Tensor, source: int) -> list[Tensor]:
        """See the keys and values of a rank in a buffer."""
        of_k, of_v = self.shapes(k, v, source)
        return [buffer[: prod(of_k)].view(of_k), buffer[prod(of_k) : prod(of_k) + prod(of_v)].view(of_v)]

    def sizes(self, k: Tensor, v: Tensor) -> list[int]:
        """Elements of the keys and values of each rank."""
        return [sum(map(prod, self.shapes(k, v, source))) for source in range(self.ranks.size)]

    def travel(self, k: Tensor, v: Tensor, phase: str) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield (rank of origin, keys and values) of every rank, one's own first; the next travel meanwhile."""
        ranks, sizes = self.ranks, self.sizes(k, v)
        held = k.new_empty(max(sizes))
        spare = torch.empty_like(held) if ranks.size > 1 else held
        for place, mine in zip(self.seen(held, k, v, ranks.rank), (k, v), strict=True):
            place.copy_(mine)
        for step in range(ranks.size):
            source = (ranks.rank - step) % ranks.size
            works: list[Any] = []
            doing = ""
            if step < ranks.size - 1:
                coming = spare[: sizes[source - 1]]
                works, doing = self.pass_on(held[: sizes[source]], coming, f"{phase}, step {step + 1}, keys and values")
            yield source, self.seen(held, k, v, source)
            ranks.wait(works, doing)
            held, spare = spare, held

    def pass_on(self, outgoing: Tensor, incoming: Tensor, what: str) -> tuple[list[Any], str]:
        """Begin to send to the next rank and to receive from the one before; return the works, and words for them."""
        ranks = self.ranks
        before, after = (ranks.rank - 1) % ranks.size, (ranks.rank + 1) % ranks.size
        doing = f"{what}: waiting for rank {before} to send or rank {after} to receive"
        return ranks.begin([("to", outgoing, after), ("from", incoming, before)], doing), doing


class _Ring(torch.autograd.Function):
    """What :func:`ring_attention` says."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, plan: _Plan) -> tuple[Tensor, Tensor]:
        layout = plan.layout
        if q.stride(-1) != 1:  # kernels that are called below torch's dispatch ask for it; keys and values are so, having travelled
            q = q.contiguous()
        ends = [0, *accumulate(plan.queries)] if layout == "TND" else None
        merge = StreamingMerge(layout, actual_seq_qlen=ends, like=_like(q, v, layout))
        for source, (ks, vs) in plan.travel(k, v, "forward"):
            queries, keys, triangle = plan.visible(source)
            lengths = plan.keys[source]
            sequences = zip(
                plan.cut(q, plan.queries, queries), plan.cut(ks, lengths, keys), plan.cut(vs, lengths, keys), strict=True
            )
            parts = [_attended(plan.forward, *sequence, triangle) for sequence in sequences]
            merge.update(*plan.state(parts), tokens=queries)
        state = merge.running
        assert state is not None
        if sink is not None:
            state = add_sink(state, sink, layout)
        out = state.attn_out.to(q.dtype)  # the one rounding
        lse = state.lse(base="e", layout=layout, lse_layout="TN" if layout == "TND" else "BNS")
        ctx.save_for_backward(q, k, v, sink, out, lse)
        ctx.plan = plan
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # torch would take what comes out for constants, and nobody would say so
            raise UnsupportedError(
                "ring_attention: its gradient has no gradient, being made by the kernel's backward; differentiate without "
                "create_graph=True."
            )
        q, k, v, sink, out, lse = ctx.saved_tensors
        plan: _Plan = ctx.plan
        ranks, sizes = plan.ranks, plan.sizes(k, v)
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.zeros_like(q, dtype=wide)
        held = k.new_zeros(max(sizes), dtype=wide)  # the gradients of the keys and values at hand; one step behind them
        spare = torch.empty_like(held) if ranks.size > 1 else held
        works: list[Any] = []
        doing = ""
        for source, (ks, vs) in plan.travel(k, v, "backward"):
            queries, keys, triangle = plan.visible(source)
            of_queries = [plan.cut(each, plan.queries, queries) for each in (dout, q, out, dq)]
            of_keys = [plan.cut(each, plan.keys[source], keys) for each in (ks, vs)]
            sequences = zip(*of_queries[:3], plan.rows(lse, queries), *of_keys, strict=True)
            terms: list[Sequence[Tensor]] = []
            for its_dout, its_q, its_out, its_lse, its_k, its_v in sequences:
                there = its_q.numel() and its_k.numel()
                terms.append(plan.backward(its_dout, its_q, its_k, its_v, its_out, its_lse, triangle) if there else ())
                found, expected = ([tuple(each.shape) for each in some] for some in (terms[-1], (its_q, its_k, its_v)))
                if there and found != expected:  # else one might be broadcast
                    report = Violations(ranks.call)
                    report.add("attention", f"backward returned gradients of shapes {found}; expected those of q, k and v, "
                               f"{expected}.")  # fmt: skip
                    raise report.error()
            ranks.wait(works, doing)  # for what the ranks before have added up
            if works:
                held, spare = spare, held
            gradients = [plan.cut(each, plan.keys[source], keys) for each in plan.seen(held, k, v, source)]
            for sums, its in zip(zip(of_queries[3], *gradients, strict=True), terms, strict=True):
                for total, term in zip(sums, its):
                    total.add_(term)
            if ranks.size > 1:
                step = (ranks.rank - source) % ranks.size + 1
                works, doing = plan.pass_on(
                    held[: sizes[source]], spare[: sizes[source - 1]], f"backward, step {step}, gradients of keys and values"
                )
        ranks.wait(works, doing)  # the last hop brings them home
        dk, dv = plan.seen(spare, k, v, ranks.rank)
        of_sink = _of_sink(sink, dout, out, lse, plan) if ctx.needs_input_grad[3] else None
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), of_sink, None


def _like(q: Tensor, v: Tensor, layout: str) -> AttentionState:
    """Make what has the shapes of the running state, and no memory of its own."""
    rows = (q.shape[0], q.shape[2], q.shape[1], 1) if layout == "BSND" else (*q.shape[:-1], 1)
    stats = torch.empty((), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device).expand(rows)
    return AttentionState(q.new_empty(()).expand(*q.shape[:-1], v.shape[-1]), stats, stats)


def _attended(
    forward: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attend, where there is something to attend to: kernels need not know what nothing is."""
    if q.numel() and k.numel():
        found = forward(q, k, v, causal)
        if not isinstance(found, (tuple, list)) or len(found) < 2:
            report = Violations("ring_attention")
            report.add("attention", f"what forward returned is {described(found)}; expected a tuple that begins with (out, lse).")
            raise report.error()
        return found[0], found[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_zeros(*q.shape[:-1], v.shape[-1]), torch.full(q.shape[:-1], -torch.inf, dtype=wide, device=q.device)


def _of_sink(sink: Tensor, dout: Tensor, out: Tensor, lse: Tensor, plan: _Plan) -> Tensor:
    """Gradient of the sinks: each weighs exp(sink - lse) in its rows, and has the value 0."""
    total = torch.zeros_like(sink)
    of_queries = (plan.cut(each, plan.queries) for each in (dout, out))
    for its_dout, its_out, its_lse in zip(*of_queries, plan.rows(lse), strict=True):
        # Without the mask, NaN where a row without keys has no sink either.
        weight = (sink[:, None] - its_lse).exp().masked_fill(sink[:, None] == -torch.inf, 0.0)
        total -= (weight * (its_dout.to(sink.dtype) * its_out.to(sink.dtype)).sum(-1)).sum((0, 2))
    return total


def _checked(
    call: str, q: Any, k: Any, v: Any, causal: Any, layout: Any, qlen: Any, kvlen: Any, sink: Any
) -> list[list[int]]:
    """Check this rank's part; return the tokens of each of its sequences, of queries and of keys."""
    report = Violations(call)
    report.choice("layout", "layout", layout, _LAYOUTS, "", OTHER_LAYOUTS)
    if causal is not True and causal is not False:
        report.add("attention", f"causal = {shown(causal)}; expected True or False.")
    for name, each in (("q", q), ("k", k), ("v", v), *([] if sink is None else [("sink", sink)])):
        if not isinstance(each, Tensor):
            report.add("array", f"{name} is {described(each)}; expected a torch tensor.")
    report.raise_if_broken()
    if q.dtype not in _DTYPES:
        report.add("dtype-attn", f"q has dtype {q.dtype}; expected float16, bfloat16, float32 or float64.")
    for name, each in (("k", k), ("v", v)):
        if each.dtype != q.dtype:
            report.add("dtype-match", f"{name} has dtype {each.dtype}; expected that of q, {q.dtype}.")
        if each.device != q.device:
            report.add("array-device", f"{name} is on {each.device}; expected the device of q, {q.device}.")
    axes = LAYOUTS[layout]
    for name, each in (("q", q), ("k", k), ("v", v)):
        if each.dim() != len(layout):
            report.add("rank", f'{name} has shape {tuple(each.shape)}; layout "{layout}" expects {axes.attn}.')
    report.raise_if_broken()
    head, token = axes.attn_head, axes.attn_token
    assert head is not None
    if k.shape[:-1] != v.shape[:-1]:
        report.add("shape-match", f"v has shape {tuple(v.shape)}; expected that of k but for D, {tuple(k.shape)}.")
    if k.shape[-1] != q.shape[-1]:
        report.add("shape-match", f"k has D = {k.shape[-1]}; expected that of q, {q.shape[-1]}.")
    if axes.attn_batch is not None and k.shape[0] != q.shape[0]:
        report.add("shape-match", f"k has B = {k.shape[0]}; expected that of q, {q.shape[0]}.")
    if not k.shape[head] or q.shape[head] % k.shape[head]:
        report.add("heads", f"q has {q.shape[head]} heads and k has {k.shape[head]}; expected as many, or a number that "
                   "divides it.")  # fmt: skip
    if sink is not None:
        wanted = torch.promote_types(q.dtype, torch.float32)
        if sink.dtype != wanted or tuple(sink.shape) != (q.shape[head],):
            report.add("heads", f"sink has dtype {sink.dtype} and shape {tuple(sink.shape)}; expected {wanted} and (N,) = "
                       f"({q.shape[head]},), a number for each query head.")  # fmt: skip
        if sink.device != q.device:
            report.add("array-device", f"sink is on {sink.device}; expected the device of q, {q.device}.")
    lengths = []
    for name, value, each in (("actual_seq_qlen", qlen, q), ("actual_seq_kvlen", qlen if kvlen is None else kvlen, k)):
        tokens = each.shape[token]
        if layout != "TND":
            if value is not None:
                report.add("attention", f'{name} is given; expected None in layout "{layout}", whose sequences are all as '
                           'long. layout="TND" has sequences of different lengths.')  # fmt: skip
            lengths.append([tokens])
            continue
        on_host = value.cpu() if isinstance(value, Tensor) else value
        ends = bind_lengths(report, on_host, tokens, False, False, name)
        lengths.append([tokens] if ends is None else np.diff(ends).tolist() or [0])
    report.raise_if_broken()
    queries, keys = lengths
    if len(queries) != len(keys):
        report.add("shape-match", f"actual_seq_kvlen has {len(keys)} sequences; expected as many as actual_seq_qlen, "
                   f"{len(queries)}.")  # fmt: skip
    elif causal and queries != keys:
        report.add("shape-match", f"queries have {shown(queries)} tokens and keys {shown(keys)}; with causal=True expected "
                   "as many.")  # fmt: skip
    if causal and any(length % 2 for length in queries):
        report.add("tokens-odd", f"this rank holds {shown(queries)} tokens of the sequences; with causal=True expected even "
                   "numbers: of 2P chunks of each sequence rank r holds chunk r, and behind it chunk 2P-1-r, which is as "
                   "long.")  # fmt: skip
    report.raise_if_broken()
    return lengths


def _check_kernel(call: str, q: Tensor, v: Tensor, scale: Any, forward: Any, backward: Any) -> None:
    report = Violations(call)
    for name, each in (("forward", forward), ("backward", backward)):
        if each is not None and not callable(each):
            report.add("attention", f"{name} is {described(each)}; expected a function, or None for torch's own kernel.")
    if forward is None and backward is not None:
        report.add("attention", "backward is given, but not the forward that it is the gradient of; expected both, or "
                   "forward alone.")  # fmt: skip
    if forward is not None and scale is not None:
        report.add("attention", "scale is given with a forward; expected one of them: a forward scales its scores itself.")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        report.add("attention", f"scale = {shown(scale)}; expected a number, or None for 1 / sqrt(D).")
    if forward is None and v.shape[-1] != q.shape[-1]:
        report.add("attention", f"v has D = {v.shape[-1]} and q {q.shape[-1]}; torch's own kernel expects the same. Pass a "
                   "forward that takes both.")  # fmt: skip
    report.raise_if_broken()
