"""Merges of the states of all ranks: the same list of states gives the same bits, however they are spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rau import torch_op
from rau.constraints import Options, bind, check_options
from rau.constraints.hints import described
from rau.constraints.rules import Violations
from rau.distributed.ranks import Ranks
from rau.errors import UnsupportedError
from rau.layouts import FIELDS, LAYOUTS
from rau.state import AttentionState
from rau.update import merge_states

_ALIGNED = 8  # bytes; of each array in a message


def merge(
    state: Any,
    group: Any = None,
    *,
    layout: str = "SBH",
    actual_seq_qlen: Any = None,
    softmax_layout: str = "TND",
    method: str = "gather",
    timeout: float | None = None,
) -> AttentionState:
    """Merge the states of all ranks into the state over all their keys, which every rank gets.

    Parameters
    ----------
    state : AttentionState, or list or tuple of them
        This rank's states over its keys, torch tensors as :func:`rau.merge_states` takes them, for the same queries on all
        ranks. A rank without keys may bring an empty list.
    group : torch.distributed.ProcessGroup, optional
        The default group where it is None. All its ranks make the same call.
    layout, actual_seq_qlen, softmax_layout
        As in :func:`rau.merge_states`.
    method : {"gather", "tree"}, default "gather"
        "gather": every rank receives all states and merges them in one pass. "tree": ranks merge in pairs, so that each
        receives a state of float32 ceil(log2(ranks)) times at most.
    timeout : float, optional
        Seconds to wait for another rank each time; the group's own timeout where it is None. With nccl, a timeout makes the
        host wait for the device.

    Returns
    -------
    AttentionState
        With the shapes, dtypes and lanes of the first state; the same bits on every rank.

    Raises
    ------
    ConstraintError, UnknownBackendError, BackendUnavailableError, UnsupportedError
        As :func:`rau.merge_states`; where ranks disagree about the call, or one refuses its part of it, on all ranks, before
        a state is sent. UnsupportedError also for tensors that require grad.
    LostRankError
        If a rank is gone, or silent for too long. The group cannot be used any more then.

    Notes
    -----
    "gather" is by definition ``merge_states`` of all states in rank order, those of a rank in the order given: the bits
    depend on that list alone, not on how it is spread over the ranks, nor on which rank comes first; its bounds are those of
    :func:`rau.merge_states`.

    "tree" first merges the K states of a rank, then goes d = ceil(log2(ranks)) levels up. Its bits depend on the number of
    ranks and are the same on all of them. With u, v, S and M as at :class:`rau.StreamingMerge`, K the largest of the ranks',
    a float32 element is within ((1 + u)**(5*d + K + 1) * (1 + (9*d + K + 7) * v) - 1) * S + 2**-148 * (d + K) * (1 + M) of
    the exact result (to first order (5*d + K + 1) * u * S), where all sums are normal float32 numbers; proofs/README.md has
    the proof. 16 bits add half a unit in the last place: what travels is float32.

    docs/scaling.md says what each costs, and which is right when.
    """
    ranks = Ranks("merge", group, timeout)
    options = Options(layout, softmax_layout, "portable", "metadata")
    states, form, kinds = _introduced(ranks, state, options, actual_seq_qlen, "method", method, ("gather", "tree"))
    how = {"layout": layout, "softmax_layout": softmax_layout, "actual_seq_qlen": actual_seq_qlen}
    if method == "tree":
        return _finished(_by_tree(ranks, states, form, how), kinds)
    dtypes = [[dtype for dtype, _ in its] for its in kinds]
    mine = form.buffer(max(form.size(its) for its in dtypes))
    form.fill(mine, states)
    everyone = ranks.gather(mine, "gathering the states")
    whole = [each for its, buffer in zip(dtypes, everyone, strict=True) for each in form.states(buffer, its)]
    return _finished(merge_states(whole, **how), kinds)


def merge_scatter(
    state: Any,
    group: Any = None,
    *,
    over: str = "heads",
    layout: str = "SBH",
    timeout: float | None = None,
) -> AttentionState:
    """Merge the states of all ranks, and leave each rank its share of the heads or tokens: a reduce-scatter.

    What decode context parallelism does: the cache is spread over ranks, and each goes on with its own heads. Where each
    brings one state, a rank receives one share from each other rank: in all, less than a state.

    Parameters
    ----------
    state, group, layout, timeout
        As in :func:`merge`; statistics in layout "TND" are token-major.
    over : {"heads", "tokens"}, default "heads"
        What is shared out, as ``torch.tensor_split`` shares it: the first ranks get one more where it does not divide.

    Returns
    -------
    AttentionState
        This rank's share of what :func:`merge` returns, in its own tensors: the same bits.

    Raises
    ------
    ConstraintError, UnknownBackendError, BackendUnavailableError, UnsupportedError, LostRankError
        As :func:`merge`.
    """
    ranks = Ranks("merge_scatter", group, timeout)
    options = Options(layout, "TND", "portable", "metadata")
    states, form, kinds = _introduced(ranks, state, options, None, "over", over, ("heads", "tokens"))
    dtypes = [[dtype for dtype, _ in its] for its in kinds]
    shares = [_Share.of(form, layout, over, rank, ranks.size) for rank in range(ranks.size)]
    own = shares[ranks.rank].form
    sent = [share.form.size(dtypes[ranks.rank]) for share in shares]
    received = [own.size(its) for its in dtypes]
    mine = form.buffer(sum(sent))
    for share, buffer in zip(shares, mine.split(sent), strict=True):
        share.form.fill(buffer, [share.cut(each) for each in states])
    buffers = ranks.deal(mine, sent, received, "dealing out the states")
    whole = [each for its, buffer in zip(dtypes, buffers, strict=True) for each in own.states(buffer, its)]
    return _finished(merge_states(whole, layout=layout), kinds)


class _Form(NamedTuple):
    """The states of a call: their shapes, the statistics' without lanes; and how they lie in a message, with one lane."""

    attn_out: tuple[int, ...]
    rows: tuple[int, ...]
    statistics: torch.dtype
    device: torch.device

    def size(self, dtypes: Sequence[str]) -> int:
        """Bytes of states whose outputs have these dtypes."""
        return sum(_aligned(shape, dtype) for each in dtypes for shape, dtype in self._arrays(each))

    def buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def states(self, buffer: Tensor, dtypes: Sequence[str]) -> list[AttentionState]:
        """See states in the bytes of a buffer."""
        arrays, start = [], 0
        for shape, dtype in (array for each in dtypes for array in self._arrays(each)):
            arrays.append(buffer[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape))
            start += _aligned(shape, dtype)
        return [AttentionState(*arrays[k : k + 3]) for k in range(0, len(arrays), 3)]

    def fill(self, buffer: Tensor, states: Sequence[AttentionState]) -> None:
        """Copy states into a buffer."""
        for places, state in zip(self.states(buffer, [_name(state.attn_out) for state in states]), states, strict=True):
            for place, array in zip(places, _one_lane(state), strict=True):
                place.copy_(array)

    def _arrays(self, dtype: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
        rows = (*self.rows, 1), self.statistics
        return [(self.attn_out, getattr(torch, dtype)), rows, rows]


class _Share(NamedTuple):
    """A rank's part of the heads or tokens: where it begins and ends along an axis of the output, and one of the rows."""

    form: _Form
    attn_axis: int
    attn_start: int
    rows_axis: int
    rows_start: int

    @classmethod
    def of(cls, form: _Form, layout: str, over: str, rank: int, ranks: int) -> _Share:
        axes = LAYOUTS[layout]
        rows_axis, attn_axis = axes.stats_token, axes.attn_token
        if over == "heads":
            rows_axis, attn_axis = axes.stats_head, axes.attn_head if axes.attn_head is not None else len(form.attn_out) - 1
        each, more = divmod(form.rows[rows_axis], ranks)
        start, length = rank * each + min(rank, more), each + (rank < more)
        width = form.attn_out[attn_axis] // max(1, form.rows[rows_axis])  # D, where heads are folded into the last axis
        attn_out, rows = list(form.attn_out), list(form.rows)
        attn_out[attn_axis], rows[rows_axis] = length * width, length
        return cls(form._replace(attn_out=tuple(attn_out), rows=tuple(rows)), attn_axis, start * width, rows_axis, start)

    def cut(self, state: AttentionState) -> AttentionState:
        attn_out, *stats = state
        length, rows = self.form.attn_out[self.attn_axis], self.form.rows[self.rows_axis]
        return AttentionState(
            attn_out.narrow(self.attn_axis, self.attn_start, length),
            *(part.narrow(self.rows_axis, self.rows_start, rows) for part in stats),
        )


def _introduced(
    ranks: Ranks, state: Any, options: Options, lengths: Any, option: str, value: Any, known: tuple[str, ...]
) -> tuple[list[AttentionState], _Form, list[list[tuple[str, int]]]]:
    """Check this rank's states and tell the others; return them, the form of all, and each rank's dtypes and lanes."""

    def describe() -> tuple[dict[str, Any], list[tuple[str, int]]]:
        report = Violations(ranks.call)
        report.choice(option, option, value, known)
        check_options(report, options)
        report.raise_if_broken()
        checked.extend(_checked(ranks.call, state, options, lengths))
        packed = options.layout == "TND" and options.softmax_layout == "SBH"
        alike = {
            "layout": options.layout, "softmax_layout": options.softmax_layout, option: value,
            "actual_seq_qlen": torch.as_tensor(lengths).tolist() if packed else None,
        }  # fmt: skip
        first = checked[0] if checked else AttentionState(None, None, None)
        alike["attn_out.shape"] = list(first.attn_out.shape) if checked else None
        alike["softmax_max.shape"] = list(first.softmax_max.shape[:-1]) if checked else None
        alike["softmax_max.dtype"] = _name(first.softmax_max) if checked else None
        alike["device"] = first.attn_out.device.type if checked else None
        return alike, [(_name(each.attn_out), each.softmax_max.shape[-1]) for each in checked]

    checked: list[AttentionState] = []
    agreed, kinds = ranks.agree(describe)
    report = Violations(ranks.call)
    if agreed["device"] is None:
        report.add("states", "state is an empty list on every rank; expected a state on one of them at least.")
    dtypes = [(rank, dtype) for rank, its in enumerate(kinds) for dtype, _ in its]
    _, first = dtypes[0] if dtypes else (0, "")
    taken = (first, "float16", "bfloat16") if first == "float32" else (first,)
    for rank, dtype in dtypes:
        if dtype not in taken:
            report.add("ranks", f"attn_out is {dtype} on rank {rank}, and the first state's is {first}; expected "
                       f"{' or '.join(taken)}.")  # fmt: skip
    report.raise_if_broken()
    device = checked[0].attn_out.device if checked else torch.device(agreed["device"])
    shapes = tuple(agreed["attn_out.shape"]), tuple(agreed["softmax_max.shape"])
    return checked, _Form(*shapes, getattr(torch, agreed["softmax_max.dtype"]), device), kinds


def _checked(call: str, state: Any, options: Options, lengths: Any) -> list[AttentionState]:
    """Take a rank's argument apart, and check what is in it."""
    several = isinstance(state, (list, tuple))
    states = [state] if several and len(state) == 3 and not any(isinstance(each, (list, tuple)) for each in state) else state
    report = Violations(call)
    if not several or not all(isinstance(each, (list, tuple)) and len(each) == 3 for each in states):
        report.add("states", f"state is {described(state)}; expected an AttentionState of torch tensors, or a list of them.")
    else:
        for k, field in ((k, field) for k, each in enumerate(states) for field in range(3)):
            if not isinstance(states[k][field], Tensor):
                report.add("array", f"states[{k}].{FIELDS[field]} is {described(states[k][field])}; expected a torch "
                           "tensor. torch.from_numpy makes one of a NumPy array, without a copy.")  # fmt: skip
    report.raise_if_broken()
    if not states:
        return []
    bind(call, states, lambda k, field: f"states[{k}].{FIELDS[field]}", lengths, options, None)
    if torch_op.graph_of(states):
        raise UnsupportedError(
            f"{call}: a tensor requires grad, or torch traces or transforms the call; what other ranks send has no "
            "gradient. Call it under torch.no_grad() or on detached tensors; rau.distributed.ring_attention has a gradient."
        )
    return [AttentionState(*each) for each in states]


def _by_tree(ranks: Ranks, states: Sequence[AttentionState], form: _Form, how: dict[str, Any]) -> AttentionState:
    """Merge in pairs; what travels, and is returned, is at least float32 and has one lane.

    Ranks beyond the largest power of two hand their state to one below it, and are handed the result. The others swap states
    with the rank whose number differs in one bit, then in the next: both of a pair do the same merge, in rank order.
    """
    dtype = form.statistics  # float32, or float64
    names = [str(dtype).removeprefix("torch.")]
    size = form.size(names)
    if states:
        first, *rest = map(_one_lane, states)
        mine = merge_states([first._replace(attn_out=first.attn_out.to(dtype)), *rest], **how)
    else:
        (mine,) = form.states(form.buffer(size).zero_(), names)  # no row has a key where the sum is 0

    def moved(peer: int, give: bool, take: bool) -> AttentionState:
        outgoing, incoming = form.buffer(size), form.buffer(size)
        form.fill(outgoing, [mine])
        moves = [*([("to", outgoing, peer)] if give else []), *([("from", incoming, peer)] if take else [])]
        doing = f"exchanging states with rank {peer}"
        ranks.wait(ranks.begin(moves, doing), doing)
        return form.states(incoming, names)[0]

    power = 1 << ranks.size.bit_length() - 1
    below = ranks.rank < power
    partner = ranks.rank + power if below else ranks.rank - power
    if not below:
        moved(partner, give=True, take=False)
        return moved(partner, give=False, take=True)
    if partner < ranks.size:
        mine = merge_states([mine, moved(partner, give=False, take=True)], **how)
    bit = 1
    while bit < power:
        pair = [mine, moved(ranks.rank ^ bit, give=True, take=True)]
        mine = merge_states(pair if not ranks.rank & bit else pair[::-1], **how)
        bit *= 2
    if partner < ranks.size:
        moved(partner, give=True, take=False)
    return mine


def _finished(merged: AttentionState, kinds: Sequence[Sequence[tuple[str, int]]]) -> AttentionState:
    """Give a state of one lane the dtype and lanes of the first one."""
    dtype, lanes = next(kind for its in kinds for kind in its)
    attn_out, *stats = merged
    return AttentionState(
        attn_out.to(getattr(torch, dtype)), *(part.expand(*part.shape[:-1], lanes).contiguous() for part in stats)
    )


def _one_lane(state: AttentionState) -> AttentionState:
    return AttentionState(state.attn_out, state.softmax_max[..., :1], state.softmax_sum[..., :1])


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _aligned(shape: Sequence[int], dtype: torch.dtype) -> int:
    return -(prod(shape) * dtype.itemsize // -_ALIGNED) * _ALIGNED
