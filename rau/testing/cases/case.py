"""One case: a call to try on a backend, described by a few words and numbers; its arrays are made on demand."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rau.arrays.numpy_ import named_dtype
from rau.layouts import LAYOUTS, shapes
from rau.state import AttentionState
from rau.testing.cases import numbers
from rau.testing.cases.placements import PACKED_PLACEMENTS, Placed, place
from rau.update import merge_states, ring_attention_update


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call, described by a few words and numbers; its arrays are made on demand.

    Attributes
    ----------
    id : str
        Stable name; it seeds the numbers.
    layout, softmax_layout, profile : str
    batch, tokens, heads, head_dim : int
        B and S in the batched layouts; in TND `tokens` is T and `batch` is not used.
    lengths : tuple of int
        Lengths of the sequences in TND; they add up to `tokens`.
    qlen : {"array", "int32", "list", "none"}
        How the cumulative lengths are passed.
    lanes : {8, 1}
    dtype, cur_dtype : str
        Dtype of the first state and the result; dtype of the later states.
    states : int
        Number of states: with 2 the call is ring_attention_update, with any other number merge_states.
    statistics, outputs : str
        Kinds of numbers: keys of `rau.testing.cases.numbers.STATISTICS` and `OUTPUTS`. With statistics "attention" or
        "flash" the states are real partial attention, outputs included; "flash" is torch's FlashAttention on the CPU, with
        its log-sum-exp.
    attn_placement, stats_placement, out_placement : str
        How inputs and result lie in memory, see `rau.testing.cases.placements`.
    out : {"fresh", "given", "prev", "cur"}
        Where the result goes: into fresh arrays, into given arrays, or in place.
    read_only : bool
        Whether inputs that are not written to are read-only.
    aliased : bool
        Whether all states are one and the same.
    unequal_lanes : bool
        Whether lanes 1 to 7 of the inputs hold other numbers than lane 0, which is the one to read.
    """

    id: str
    layout: str = "SBH"
    softmax_layout: str = "TND"
    profile: str = "portable"
    batch: int = 1
    tokens: int = 4
    heads: int = 2
    head_dim: int = 8
    lengths: tuple[int, ...] = ()
    qlen: str = "array"
    lanes: int = 8
    dtype: str = "float32"
    cur_dtype: str = ""
    states: int = 2
    statistics: str = "ordinary"
    outputs: str = "ordinary"
    attn_placement: str = "contiguous"
    stats_placement: str = "contiguous"
    out_placement: str = "contiguous"
    out: str = "fresh"
    read_only: bool = False
    aliased: bool = False
    unequal_lanes: bool = False

    @property
    def stats_dtype(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def dtypes(self) -> list[str]:
        """Dtype of each state's output; just one if the states are aliased."""
        return [self.dtype, *[self.cur_dtype or self.dtype] * (0 if self.aliased else self.states - 1)]

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of attn_out and of the statistics."""
        batch = 1 if self.layout == "TND" else self.batch
        return shapes(self.layout, batch, self.tokens, self.heads, self.head_dim, self.lanes)

    @property
    def kind(self) -> tuple[str, str]:
        """Its layout, with the order of the statistics in TND, and its dtype, or both of a mixed one, in words."""
        packed = self.layout == "TND" and self.softmax_layout == "SBH"
        mixed = self.cur_dtype and self.cur_dtype != self.dtype
        return f"{self.layout}{' packed' * packed}", f"{self.cur_dtype}-into-{self.dtype}" if mixed else self.dtype

    @property
    def needs_float64_rows(self) -> bool:
        """Whether rows in float32 cannot get it right: sums near the ends of float32's range, or of both signs; NaN or
        the sign of zero behind a weight that is subnormal."""
        hostile = ("large-sums", "subnormal-sums", "negative-sums", "subnormal-weights", "balanced", "extremes")
        return self.statistics in hostile or (self.statistics == "huge-gaps" and self.outputs != "ordinary")

    def lengths_argument(self) -> Any:
        """Return what is passed as actual_seq_qlen."""
        if self.layout != "TND" or self.qlen == "none":
            return None
        ends = numbers.cumulative(self.lengths)
        return {"array": ends, "int32": ends.astype(np.int32), "list": ends.tolist()}[self.qlen]

    def call(self, states: Any, out: Any, backend: Any) -> AttentionState:
        """Make the public call that this case describes, on any arrays: states, and a triple to write to, or None."""
        options: dict[str, Any] = {
            "actual_seq_qlen": self.lengths_argument(), "layout": self.layout, "softmax_layout": self.softmax_layout,
            "profile": self.profile, "backend": backend, "out": out,
        }  # fmt: skip
        if self.states == 2:
            return ring_attention_update(*states[0], *states[1], **options)
        return merge_states(states, **options)

    def fill(self) -> list[AttentionState]:
        """Make the numbers: `states` C-contiguous states, or one if they are aliased."""
        rng = np.random.default_rng(zlib.crc32(self.id.encode()))
        shape, stats_shape = self.shapes
        if self.statistics == "attention":
            heads = (*shape[:2], self.heads, self.head_dim) if self.layout == "SBH" else shape
            how = {"layout": self.layout, "softmax_layout": self.softmax_layout}
            return numbers.attention(rng, heads, self.lengths, self.dtypes, self.lanes, **how)
        if self.statistics == "flash":
            return numbers.flash(rng, shape, self.dtypes, self.lanes)
        kinds = numbers.fill_statistics(rng, self.statistics, len(self.dtypes), int(np.prod(stats_shape[:-1])))
        states = []
        with np.errstate(all="ignore"):  # numbers that a narrow dtype cannot hold become infinite: so be it
            for dtype, *rows in zip(self.dtypes, *kinds, strict=True):
                output = numbers.fill_output(rng, self.outputs, shape).astype(named_dtype(dtype))
                stats = (row.astype(self.stats_dtype).reshape(stats_shape[:-1]) for row in rows)
                states.append(AttentionState(output, *map(self.in_all_lanes, stats)))
        return states

    def blank(self) -> list[AttentionState]:
        """Make zeros in place of the numbers of :meth:`fill`, for when only the form of the call matters."""
        shape, stats_shape = self.shapes
        stats = np.zeros(stats_shape, self.stats_dtype)
        return [AttentionState(np.zeros(shape, named_dtype(dtype)), stats, stats) for dtype in self.dtypes]

    def in_all_lanes(self, rows: np.ndarray) -> np.ndarray:
        """Give a statistic (...) its lanes (..., lanes): the same number in each, or other numbers in all but lane 0."""
        lanes = rows[..., None].repeat(self.lanes, axis=-1)
        if self.unequal_lanes:
            lanes[..., 1:] += np.arange(1, self.lanes, dtype=lanes.dtype)
        return lanes

    def make(self, states: list[AttentionState] | None = None) -> CaseCall:
        """Lay out numbers in memory, those of :meth:`fill` by default, afresh at every call."""
        attn_axis, stats_axis = LAYOUTS[self.layout].attn_token, LAYOUTS[self.layout].stats_token

        def placed_state(state: AttentionState, attn: str, stats: str) -> tuple[Placed, ...]:
            attn_out, *others = state
            return place(attn_out, attn, attn_axis), *(place(part, stats, stats_axis) for part in others)

        placed = [placed_state(state, self.attn_placement, self.stats_placement) for state in states or self.fill()]
        out: tuple[Placed, ...] | None = None
        if self.out in ("prev", "cur"):
            out = placed[0 if self.out == "prev" else 1]
        elif self.out == "given":
            packed = self.layout == "TND" and self.softmax_layout == "SBH"
            stats = "offset" if packed and self.out_placement not in PACKED_PLACEMENTS else self.out_placement
            out = placed_state(self.blank()[0], self.out_placement, stats)
        if self.read_only:
            for part in (part for state in placed if state is not out for part in state):
                part.view.flags.writeable = False
        views = [AttentionState(*(part.view for part in state)) for state in placed]
        return CaseCall(self, views * (self.states // len(views)), out)


class CaseCall(NamedTuple):
    """A case with its arrays: run it on a backend, then look at what is left."""

    case: Case
    states: list[AttentionState]
    out: tuple[Placed, ...] | None

    def run(self, backend: Any) -> AttentionState:
        """Make the call on the NumPy arrays."""
        out = None if self.out is None else tuple(part.view for part in self.out)
        return self.case.call(self.states, out, backend)
