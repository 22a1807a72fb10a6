"""The operators rau::ring_attention_update and rau::merge_states of torch.library: compile, export and gradients.

Everything that must not be traced (the validator, the registry, context, environment) runs inside them: at trace time
the validator in their fake functions, at run time the whole call in their kernels. Imported once torch is in use.

And the gradient of attention to parts by kernels whose log-sum-exp has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from rau import registry
from rau.arithmetic import merge_rows, merge_smoothly, weigh
from rau.arrays.torch_ import tensor_inside
from rau.backends.torch_ import Geometry
from rau.call import NAMES, run
from rau.constraints import Options, bind
from rau.errors import DTypeError, ShapeError, UnsupportedError

Triple = tuple[Tensor, Tensor, Tensor]


class Graph(NamedTuple):
    """Why a call has to go through the operators, in words, and how one keeps it from that."""

    reason: str
    way_out: str
    operators_take_it: bool = True


_PROXY = torch._C._TorchDispatchModeKey.PROXY
_TRACED = Graph("torch traces the call", "call it outside of the graph")
_TRANSFORMED = Graph("a transform of torch.func is at work", "call it outside of the transform", operators_take_it=False)
_FORWARD = Graph("forward-mode AD is at work", "call it outside of torch.autograd.forward_ad", operators_take_it=False)
_GRADIENT = Graph("an input requires grad", "call under torch.no_grad()")


def graph_of(states: Sequence[Sequence[Any]]) -> Graph | None:
    """Tell why a call has to go through the operators; None where it need not.

    It has to while torch compiles or exports, inside a functorch transform or forward-mode AD, for tensors of other
    types than torch's own two (fake ones, subclasses), and where a gradient is asked for.
    """
    arrays = [array for state in states for array in state]
    if type(arrays[0]) is not Tensor and not any([isinstance(array, Tensor) for array in arrays]):
        return None
    # The tracer of torch.jit, whose shapes are of tensors; and make_fx on real tensors, which would take results for constants.
    if torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._get_dispatch_mode(_PROXY) is not None:
        return _TRACED
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return _TRANSFORMED
    if torch.autograd.forward_ad._current_level >= 0:
        return _FORWARD
    gradients, found = torch.is_grad_enabled(), None
    for array in arrays:
        cls = type(array)
        if cls is Tensor or cls is Parameter:
            found = found or (_GRADIENT if gradients and array.requires_grad else None)
        elif isinstance(array, Tensor):
            if tensor_inside(cls):
                return None  # the validator says what to pass in its place; the operators would not
            found = found or Graph(f"an input is a {cls.__name__}, a subclass of torch.Tensor", "pass plain tensors")
    return found


def refuse_out(call: str, states: Sequence[Sequence[Any]]) -> NoReturn:
    """Say that nothing is written into where there is a graph."""
    graph = graph_of(states)
    assert graph is not None  # or nobody would have come here
    raise UnsupportedError(
        f"{call}: out is given, and {graph.reason}; an output that is written into has no gradient and no place in a graph. "
        f"Leave out=None, or {graph.way_out}."
    )


def through_operator(
    call: str, states: Sequence[Sequence[Any]], actual_seq_qlen: Any, options: Options, out: Any, backend: Any
) -> Triple:
    """Make a call by its operator.

    UnsupportedError for `out` and a backend that is no name, which cannot be part of a graph; for functorch and
    forward-mode AD.
    """
    if out is not None:
        refuse_out(call, states)
    if backend is not None and not isinstance(backend, str):
        raise UnsupportedError(f"{call}: backend is a {type(backend).__name__}; expected a name where torch traces the call")
    for state in states:
        for part in state:
            if not isinstance(part, Tensor):
                raise DTypeError(
                    f"{call}: [array-kind] a {type(part).__name__} among torch tensors; expected only tensors",
                    ("array-kind",),
                )
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        raise UnsupportedError(
            f"{call}: functorch transforms (torch.func.grad, vmap, ...) are not implemented: torch's operators defined in "
            "Python do not take them. Use torch.autograd.grad, and put a batch into the layout's own axis."
        )
    if not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0:
        duals = (torch.autograd.forward_ad.unpack_dual(part).tangent for state in states for part in state)
        if any(tangent is not None for tangent in duals):
            raise UnsupportedError(
                f"{call}: forward-mode AD is not implemented, and the tangent would be lost; use reverse mode "
                "(torch.autograd.grad, torch.func.vjp)"
            )
    if options.layout != "TND":
        actual_seq_qlen = None  # not even looked at
    elif actual_seq_qlen is not None and not isinstance(actual_seq_qlen, Tensor):
        try:
            actual_seq_qlen = torch.as_tensor(actual_seq_qlen)
        except Exception:
            bind(call, states, NAMES[call], actual_seq_qlen, options._replace(check="metadata"), None)  # says why
            raise
    if call == "ring_attention_update":
        return torch.ops.rau.ring_attention_update(*states[0], *states[1], actual_seq_qlen, *options[:4], backend)
    columns = ([state[field] for state in states] for field in range(3))
    return torch.ops.rau.merge_states(*columns, actual_seq_qlen, *options, backend)


@torch.library.custom_op("rau::ring_attention_update", mutates_args=())
def _update(
    prev_attn_out: Tensor,
    prev_softmax_max: Tensor,
    prev_softmax_sum: Tensor,
    cur_attn_out: Tensor,
    cur_softmax_max: Tensor,
    cur_softmax_sum: Tensor,
    actual_seq_qlen: Tensor | None,
    layout: str,
    softmax_layout: str,
    profile: str,
    check: str,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    states = ((prev_attn_out, prev_softmax_max, prev_softmax_sum), (cur_attn_out, cur_softmax_max, cur_softmax_sum))
    options = Options(layout, softmax_layout, profile, check)
    result = run("ring_attention_update", states, actual_seq_qlen, options, None, backend)
    return result.attn_out, result.softmax_max, result.softmax_sum


@torch.library.custom_op("rau::merge_states", mutates_args=())
def _merge(
    attn_out: Sequence[Tensor],
    softmax_max: Sequence[Tensor],
    softmax_sum: Sequence[Tensor],
    actual_seq_qlen: Tensor | None,
    layout: str,
    softmax_layout: str,
    profile: str,
    check: str,
    statistics: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    states = list(zip(attn_out, softmax_max, softmax_sum, strict=True))
    options = Options(layout, softmax_layout, profile, check, statistics)
    result = run("merge_states", states, actual_seq_qlen, options, None, backend)
    if not statistics:  # an operator returns as many tensors each time
        return result.attn_out, softmax_max[0].new_empty(0), softmax_sum[0].new_empty(0)
    return result.attn_out, result.softmax_max, result.softmax_sum


def _blank(call: str, states: Sequence[Sequence[Tensor]], actual_seq_qlen: Tensor | None, *given: Any) -> Triple:
    """Check the metadata, as far as it can be seen while tracing, and make results without values."""
    options = Options(*given)._replace(check="metadata")
    bind(call, states, NAMES[call], actual_seq_qlen, options, None)
    attn_out, maximum, total = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in states[0])
    return (attn_out, maximum, total) if options.statistics else (attn_out, maximum.new_empty(0), total.new_empty(0))


@_update.register_fake
def _blank_update(*arguments: Any) -> Triple:
    return _blank("ring_attention_update", (arguments[:3], arguments[3:6]), *arguments[6:-1])


@_merge.register_fake
def _blank_merge(*arguments: Any) -> Triple:
    return _blank("merge_states", list(zip(*arguments[:3], strict=True)), *arguments[3:-1])


def _keep(
    ctx: Any, states: Sequence[Sequence[Tensor]], backend: str | None, actual_seq_qlen: Tensor | None,
    layout: str, softmax_layout: str,
) -> None:  # fmt: skip
    """Save the inputs themselves: weights are cheap to compute again, and take no memory until then."""
    ctx.save_for_backward(*[part for state in states for part in state], actual_seq_qlen)
    ctx.layout, ctx.softmax_layout = layout, softmax_layout
    ctx.keeps_lse = registry.keeps_lse(backend)


def _gradients(ctx: Any, grads: Sequence[Tensor | None]) -> Sequence[Sequence[Tensor | None]]:
    """Gradients of all inputs, a triple for each state.

    Notes
    -----
    With w_i = l_i exp(m_i - m) / l, e_i = exp(m_i - m) and t_i the share of a maximum in m (1 for the largest, 1/n among
    n equal ones, 0 else), and s_i the sum over D of grad(o) * (o_i - o)::

        grad(o_i) = w_i grad(o)
        grad(l_i) = e_i / l * s_i + e_i grad(l)
        grad(m_i) = w_i s_i + (l_i e_i - l t_i) grad(l) + t_i grad(m)

    A backend that keeps a log-sum-exp returns m + log(l) in the place of m, and 1 in that of l: then grad(l) is grad(m) / l,
    and what came for the 1 goes nowhere.

    The lanes' gradients are summed, and an input's goes to its lane 0. An empty side gets zeros; where a weight is 0,
    s_i counts as 0 and o_i is not read.
    """
    *saved, actual_seq_qlen = ctx.saved_tensors
    states = [saved[k : k + 3] for k in range(0, len(saved), 3)]
    geometry = Geometry.of(states[0], actual_seq_qlen, ctx.layout, ctx.softmax_layout)
    if torch.is_grad_enabled():  # create_graph: they are to be differentiated in their turn
        return _gradients_in_a_graph(states, geometry, grads, ctx.keeps_lse)
    maxima, sums = ([geometry.rows(state[field]) for state in states] for field in (1, 2))
    weighed = weigh(maxima, sums)
    wide = weighed.weights[0].dtype
    rows = [geometry.heads(state[0]) for state in states]
    g_out = None if grads[0] is None else geometry.heads(grads[0].contiguous())
    g_max, g_sum = (
        torch.zeros_like(weighed.total) if grad is None else geometry.rows(grad.double().sum(-1, keepdim=True))
        for grad in grads[1:]
    )
    if ctx.keeps_lse:
        g_sum = g_max / weighed.total.masked_fill(weighed.total == 0, 1.0)
    merged = merge_rows(weighed.weights, rows)
    ties = torch.stack(
        [alive & (part.double() == weighed.maximum) for alive, part in zip(weighed.live, maxima, strict=True)]
    ).double()
    ties = ties / ties.sum(0).clamp_min(1)

    result = []
    for k, (row, weight, e) in enumerate(zip(rows, weighed.weights, weighed.exponentials, strict=True)):
        zero = torch.zeros_like(weighed.total)
        read = (weight != 0) & ~weighed.alone  # a side that is alone does not depend on its own statistics
        through = zero
        if g_out is None:
            grad_row = torch.zeros_like(row)
        else:
            grad_row = (g_out * weight.unsqueeze(-1)).masked_fill_((weight == 0).unsqueeze(-1), 0.0).to(row.dtype)
            apart = (row.to(wide) - merged).mul_(g_out).masked_fill_(~read.unsqueeze(-1), 0.0)
            through = apart.sum(-1, dtype=torch.float64)
        total = sums[k].double()
        grad_sum = torch.where(read, e / weighed.total * through, zero) + e * g_sum
        grad_max = weight.double() * through + (total * e - weighed.total * ties[k]) * g_sum + ties[k] * g_max
        statistics = []
        for grad, stats in ((grad_max, states[k][1]), (grad_sum, states[k][2])):
            grad = torch.where(weighed.live[k], grad, zero).to(stats.dtype)
            lanes = torch.zeros_like(stats, memory_format=torch.contiguous_format)
            lanes[..., :1] = geometry.statistics(grad)
            statistics.append(lanes)
        result.append([grad_row.reshape(states[k][0].shape), *statistics])
    return result


def _gradients_in_a_graph(
    states: Sequence[Sequence[Tensor]], geometry: Geometry, grads: Sequence[Tensor | None], keeps_lse: bool
) -> Sequence[Sequence[Tensor | None]]:
    """The same by torch's own differentiation: slower and in more memory, and to be differentiated in their turn."""
    # Each input anew, with its graph behind it: where one tensor stands in two places, each has a gradient of its own.
    seen = [[part.view_as(part) for part in state] for state in states]
    through = [
        (part, torch.zeros_like(part) if grad is None else grad.double())
        for part, grad in zip(_merged(seen, geometry, keeps_lse), grads, strict=True)
        if part.requires_grad
    ]
    outputs, upstream = zip(*through, strict=True)
    asked = [part for state in seen for part in state if part.requires_grad]
    found = iter(torch.autograd.grad(outputs, asked, upstream, create_graph=True))
    return [[next(found) if part.requires_grad else None for part in state] for state in seen]


def _merged(states: Sequence[Sequence[Tensor]], geometry: Geometry, keeps_lse: bool) -> Triple:
    """The merge as torch can differentiate it, any number of times, in float64."""
    maxima, sums = ([geometry.rows(state[field]) for state in states] for field in (1, 2))
    with torch.no_grad():
        weighed = weigh(maxima, sums)
    attn_out, *stats = merge_smoothly(maxima, sums, [geometry.heads(state[0]) for state in states], weighed, keeps_lse)
    maximum, total = (geometry.statistics(row).expand_as(states[0][1]) for row in stats)
    return attn_out.reshape(states[0][0].shape), maximum, total


def _keep_update(ctx: Any, inputs: tuple[Any, ...], output: Triple) -> None:
    _keep(ctx, (inputs[:3], inputs[3:6]), inputs[-1], *inputs[6:9])


def _update_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    prev, cur = _gradients(ctx, grads)
    return (*prev, *cur, None, None, None, None, None, None)


def _keep_merge(ctx: Any, inputs: tuple[Any, ...], output: Triple) -> None:
    _keep(ctx, list(zip(*inputs[:3], strict=True)), inputs[-1], *inputs[3:6])
    ctx.statistics = inputs[8]


def _merge_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    if not ctx.statistics:  # those that stood in their places have nothing to say
        grads = grads[0], None, None
    columns = zip(*_gradients(ctx, grads), strict=True)
    return (*map(list, columns), None, None, None, None, None, None, None)


_update.register_autograd(_update_backward, setup_context=_keep_update)
_merge.register_autograd(_merge_backward, setup_context=_keep_merge)


class AttentionToParts(torch.autograd.Function):
    """What :func:`rau.merge_attention` says; the parts are in `flat`, item by item, of as many items as `lengths` says."""

    @staticmethod
    def forward(
        ctx: Any, forward: Callable[..., Any], backward: Callable[..., Any], merge: Callable[..., Any], inf_is_empty: bool,
        lengths: list[int], q: Tensor, *flat: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        parts = _taken_apart(flat, lengths)
        out, lse = merge([forward(q, *part)[:2] for part in parts])
        ctx.backward_of_a_part, ctx.lengths, ctx.inf_is_empty = backward, lengths, inf_is_empty
        ctx.others = [None if isinstance(item, Tensor) else item for item in flat]
        ctx.save_for_backward(q, out, lse, *(item if isinstance(item, Tensor) else None for item in flat))
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # torch would take what comes out for constants, and nobody would say so
            raise UnsupportedError(
                "merge_attention: its gradient has no gradient, being made by the kernel's backward; differentiate without "
                "create_graph=True, or merge by rau.merge_lse parts of a kernel that torch differentiates twice."
            )
        q, out, lse, *tensors = ctx.saved_tensors
        flat = [other if item is None else item for item, other in zip(tensors, ctx.others, strict=True)]
        if ctx.inf_is_empty:
            lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        grad_q = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
        grads: list[Any] = []
        for part in _taken_apart(flat, ctx.lengths):
            of_q, *of_part = ctx.backward_of_a_part(grad_out, q, *part, out, lse)
            if len(of_part) != len(part):
                raise ShapeError(f"merge_attention: [states] backward returned {1 + len(of_part)} gradients for q and a part of "
                                 f"{len(part)} items; expected {1 + len(part)}, None where there is none.",
                                 ("states",))  # fmt: skip
            for name, item, gradient in zip(("q", "k", "v"), (q, *part), (of_q, *of_part), strict=False):
                if gradient is not None and gradient.shape != item.shape:  # else it might be broadcast
                    raise ShapeError(f"merge_attention: [states] backward returned a gradient of {name} of shape "
                                     f"{tuple(gradient.shape)}; expected {tuple(item.shape)}, that of {name}.",
                                     ("states",))  # fmt: skip
            if of_q is not None:
                grad_q += of_q
            grads += of_part
        return None, None, None, None, None, grad_q.to(q.dtype), *grads


def _taken_apart(flat: Sequence[Any], lengths: Sequence[int]) -> list[Sequence[Any]]:
    starts = [sum(lengths[:k]) for k in range(len(lengths))]
    return [flat[start : start + length] for start, length in zip(starts, lengths, strict=True)]
