"""The running state of a StreamingMerge: its arrays, and how any backend is brought to merge into them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from rau import registry
from rau.arithmetic import scaled
from rau.arrays import kind_of
from rau.arrays.foreign import ForeignKind
from rau.arrays.jax_ import JaxKind
from rau.arrays.numpy_ import EIGHT_BITS, NumPyKind
from rau.call import full, hand_over
from rau.constraints import FIELDS
from rau.constraints.rows import Rows
from rau.constraints.rules import Violations
from rau.errors import UnsupportedError
from rau.problem import Problem
from rau.state import AttentionState
from rau.streaming.tokens import halves

UPDATE = "StreamingMerge.update"
_HOST = NumPyKind()
# Places of the state, and what is handed over to merge into them: a problem, the two states, and where to write.
_Call = tuple[AttentionState, Problem, AttentionState, AttentionState, "AttentionState | None"]


def of_part(state: int, field: int) -> str:
    """Name an array of an update of some tokens."""
    return FIELDS[field] if state else f"the running {FIELDS[field]} at `tokens`"


class RunningState:
    """Three arrays that begin as the empty state, of the full shape, in the place and of the kind of a state like it.

    `state` is float32, or float64; `asked` is the Problem of which each update asks the registry who takes it. With
    `own_kind` the arrays are a plugin's or JAX's: nobody but a backend can make them, or write into them, and after an update
    they may be other ones.
    """

    def __init__(self, problem: Problem, like: Any, backend: Any) -> None:
        kind = kind_of(like[0])
        assert kind is not None  # the validator has seen to that
        self.kind, self._backend, self.broken = kind, backend, False
        self.own_kind = isinstance(kind, (ForeignKind, JaxKind))
        dtype = problem.stats_dtype
        fills = (problem.shape, 0.0), (problem.stats_shape, -np.inf), (problem.stats_shape, 0.0)
        chosen = registry.select(problem, backend)[0] if self.own_kind else None  # which alone can make them
        self.state = AttentionState(*(full(chosen, like[0], shape, dtype, value) for shape, value in fills))
        self.asked = Problem.of(
            (self.state, self.state), None, problem.actual_seq_qlen, problem.layout, problem.softmax_layout, "portable",
            in_place=False,
        )  # fmt: skip
        self.choose()  # who refuses does so before there is a state

    def choose(self) -> tuple[Any, str]:
        """Choose the backend, by what decides at this moment; the origin of the choice comes with it."""
        return registry.select(self.asked, self._backend)

    def refuse_overlap(self, partial: AttentionState) -> None:
        """Refuse arrays taken from the state: they would be counted twice, and overwritten while they are read."""
        extents = [self.kind.extent(mine) for mine in self.state]  # anew: a copy of the state lies elsewhere
        for array, name in zip(partial, FIELDS, strict=True):
            its = kind_of(array)
            if its is None or its.name != self.kind.name or its.fault(array):
                continue  # about which there is more to say
            low, high = its.extent(array)
            if any([low < end and start < high for start, end in extents]) and any(
                its.memory(array).overlaps(its.memory(mine)) for mine in self.state
            ):
                report = Violations(UPDATE)
                report.add("out-overlap", f"{name} shares memory with the running state; expected separate memory. Pass a "
                           "copy, or StreamingMerge.result().")  # fmt: skip
                raise report.error()

    def cast(self, array: Any, dtype: str, scale: Any = None) -> Any:
        """Return a copy of an array of this kind, rounded once; an output of eight bits is scaled before."""
        kind, chosen = self.kind, None
        if self.own_kind:
            kind, (chosen, _) = _HOST, self.choose()
            array = chosen.to_numpy(array)
        if dtype in EIGHT_BITS:
            array = scaled(array, scale, EIGHT_BITS[dtype], self.asked.layout, self.asked.N)
        array = kind.cast(array, dtype)
        return array if chosen is None else chosen.asarray(array)

    def to_host(self, state: Iterable[Any]) -> AttentionState:
        """Copy a state of arrays of a plugin's own kind to the host."""
        chosen, _ = self.choose()
        return AttentionState(*(np.array(chosen.to_numpy(array)) for array in state))

    def merge(
        self, problem: Problem, whole: AttentionState, places: AttentionState, cur: AttentionState, *, on_host: bool,
        rows: Rows | None = None,
    ) -> None:  # fmt: skip
        """Merge a partial state into some places of the state; UnsupportedError, and nothing written, if it cannot be.

        `whole` is the state, or what :meth:`to_host` made of it where `on_host`; `places` the part of it that is meant,
        or, where the problem has a half, as many tokens. Where `rows` are an array, `places` are copies of them.
        """
        copies = places
        chosen, origin = self.choose()
        registry.log_call(UPDATE, chosen, origin)
        if on_host or registry.reasons_against(chosen, problem):
            calls = self._adapted(chosen, problem, whole, places, cur, on_host)
        else:
            prev = places if problem.half is None else whole
            calls = [(places, problem, prev, cur, prev if problem.out else None)]
        # Broken until the last line: wherever a fault or Ctrl-C stops an update once it may have written, nobody can tell
        # which rows are merged. Marked afterwards, it would go unmarked where an interrupt comes first.
        self.broken, written = True, False
        for places, bound, prev, cur, out in calls:
            try:
                result = hand_over(UPDATE, chosen, bound, (prev, cur), out)
            except UnsupportedError:  # said before anything is written
                self.broken = written
                raise
            written = True
            if self.own_kind and not on_host:
                self.state = AttentionState(*result)
            elif on_host or out is None:
                for place, values in zip(places, self.to_host(result) if on_host else result, strict=True):
                    place[...] = values
        if isinstance(rows, np.ndarray):
            kind = kind_of(whole.attn_out)
            assert kind is not None
            for array, values in zip(whole, copies, strict=True):
                kind.put(array, rows, values)
        if on_host:
            self.state = AttentionState(*map(chosen.asarray, whole))
        self.broken = False

    def refuse_broken(self, call: str) -> None:
        """Refuse to go on from a state that was cut short while it was written."""
        if self.broken:
            raise UnsupportedError(f"{call}: an earlier update was stopped while it wrote, and nobody can tell which rows it had "
                                   "merged; start again with a new StreamingMerge.")  # fmt: skip

    def _adapted(
        self, chosen: Any, problem: Problem, whole: AttentionState, places: AttentionState, cur: AttentionState, on_host: bool
    ) -> list[_Call]:
        """Find calls for a backend that does not take the call as it is, all judged before any is made."""
        takes, layout, lengths, half = chosen.capabilities, problem.layout, problem.actual_seq_qlen, problem.half
        if problem.cur_dtype != problem.dtype and not takes.mixed:
            wide = _HOST.cast(cur.attn_out, problem.dtype) if on_host else self.cast(cur.attn_out, problem.dtype)
            cur = cur._replace(attn_out=wide)
        pieces = iter([(places, cur)])
        if half is not None and (on_host or not (takes.halves and takes.in_place)):
            layout = next((name for name in ("BSND", "SBH", "BNSD") if name in takes.layouts), "")
            missing = "" if layout else "it takes no layout with a batch axis, in which they could be passed to it"
            if not isinstance(lengths, np.ndarray):
                missing = "the lengths are not on the host, so they cannot be passed to it one by one"
            if missing:
                raise UnsupportedError(f'{UPDATE}: backend "{chosen.name}" does not take halves of TND sequences '
                                       f"(Capabilities.halves), and {missing}.")  # fmt: skip
            pieces, lengths, half = halves(whole, cur, 2 * lengths, half, problem.packed, layout), None, None
        calls: list[_Call] = []
        for places, cur in pieces:
            prev = places
            if on_host:
                prev, cur = (
                    AttentionState(*(chosen.asarray(np.ascontiguousarray(array)) for array in state)) for state in (prev, cur)
                )
            out = prev if takes.in_place else None
            bound = Problem.of(
                (prev, cur), out, lengths, layout, problem.softmax_layout, "portable", in_place=takes.in_place, half=half
            )
            reasons = registry.reasons_against(chosen, bound)
            if reasons:
                raise UnsupportedError(f'{UPDATE}: backend "{chosen.name}" does not take {bound!r}: {"; ".join(reasons)}.')
            prev = prev if half is None else whole
            calls.append((places, bound, prev, cur, None if out is None else prev))
        return calls
