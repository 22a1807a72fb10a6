"""One case: a call to try a backend on, described by a few words and numbers; its arrays are made on demand."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from rau.state import AttentionState
from rau.testing.cases import numbers, placements
from rau.testing.cases.placements import Placed, place
from rau.update import merge_states, ring_attention_update

_TOKEN_AXIS = {"SBH": (0, 2), "TND": (0, 0), "BSND": (1, 2), "BNSD": (2, 2)}  # of attn_out, of statistics


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
        Of the first state and the result; of the later states.
    states : int
        2 calls ring_attention_update, anything else merge_states.
    statistics, outputs : str
        Kinds of numbers: keys of `rau.testing.cases.numbers.STATISTICS` and `OUTPUTS`. Statistics "attention" and "flash": the states are
        real partial attention, outputs included; "flash" is torch's FlashAttention on the CPU, with its log-sum-exp.
    attn_placement, stats_placement, out_placement : str
        How inputs and result lie in memory, see `rau.testing.cases.placements`.
    out : {"fresh", "given", "prev", "cur"}
        Where the result goes: allocated, into given arrays, or in place.
    read_only : bool
        Inputs that are not written to are read-only.
    aliased : bool
        The states are one and the same.
    unequal_lanes : bool
        Lanes 1 to 7 of the inputs hold other numbers than lane 0, which is the one to read.
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
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of attn_out and of the statistics."""
        B, S, N, D = self.batch, self.tokens, self.heads, self.head_dim
        if self.layout == "TND":
            return (S, N, D), (S, N, self.lanes)
        attn = {"SBH": (S, B, N * D), "BSND": (B, S, N, D), "BNSD": (B, N, S, D)}[self.layout]
        return attn, (B, N, S, self.lanes)

    @property
    def needs_float64_rows(self) -> bool:
        """Whether rows in float32 cannot get it right: sums near the ends of float32's range, or of both signs; NaN or
        the sign of zero behind a weight that is subnormal."""
        hostile = ("large-sums", "subnormal-sums", "negative-sums", "subnormal-weights", "balanced", "extremes")
        return self.statistics in hostile or (self.statistics == "huge-gaps" and self.outputs != "ordinary")

    def lengths_argument(self) -> Any:
        """What is passed as actual_seq_qlen."""
        if self.layout != "TND" or self.qlen == "none":
            return None
        cumulative = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)]).astype(np.int64)
        return {"array": cumulative, "int32": cumulative.astype(np.int32), "list": cumulative.tolist()}[self.qlen]

    def call(self, states: Any, out: Any, backend: Any) -> AttentionState:
        """Make the public call that this case stands for, on any arrays.

        Parameters
        ----------
        states : sequence of AttentionState
        out : triple of arrays, or None
        backend : str or Backend

        Returns
        -------
        AttentionState
        """
        options: dict[str, Any] = {
            "actual_seq_qlen": self.lengths_argument(), "layout": self.layout, "softmax_layout": self.softmax_layout,
            "profile": self.profile, "backend": backend, "out": out,
        }  # fmt: skip
        if self.states == 2:
            return ring_attention_update(*states[0], *states[1], **options)
        return merge_states(states, **options)

    def fill(self) -> list[AttentionState]:
        """Make the numbers.

        Returns
        -------
        list of AttentionState
            `states` of them (one, where they are aliased), C-contiguous.
        """
        rng = np.random.default_rng(zlib.crc32(self.id.encode()))
        shape, stats_shape = self.shapes
        distinct = 1 if self.aliased else self.states
        if self.statistics == "attention":
            return numbers.attention(rng, self, distinct)
        if self.statistics == "flash":
            return numbers.flash(rng, self, distinct)
        maxima, sums = numbers.fill_statistics(rng, self.statistics, distinct, int(np.prod(stats_shape[:-1])))
        states = []
        with np.errstate(all="ignore"):  # numbers that a narrow dtype cannot hold become infinite: so be it
            for k in range(distinct):
                dtype = named_dtype(self.dtype if k == 0 else self.cur_dtype or self.dtype)
                output = numbers.fill_output(rng, self.outputs, shape).astype(dtype)
                rows = (part[k].astype(self.stats_dtype).reshape(stats_shape[:-1]) for part in (maxima, sums))
                states.append(AttentionState(output, *map(self.in_all_lanes, rows)))
        return states

    def blank(self) -> list[AttentionState]:
        """Make zeros for numbers, for those who only ask what call it is.

        Returns
        -------
        list of AttentionState
            As :meth:`fill` has them.
        """
        shape, stats_shape = self.shapes
        stats = np.zeros(stats_shape, self.stats_dtype)
        dtypes = [self.dtype, *[self.cur_dtype or self.dtype] * (self.states - 1)]
        return [
            AttentionState(np.zeros(shape, named_dtype(dtype)), stats, stats)
            for dtype in (dtypes[:1] if self.aliased else dtypes)
        ]

    def in_all_lanes(self, rows: np.ndarray) -> np.ndarray:
        """Write a statistic into its lanes: the same number into each, or other numbers into all but lane 0.

        Parameters
        ----------
        rows : ndarray
            One number for each row.

        Returns
        -------
        ndarray, `rows` with one axis more
        """
        lanes = rows[..., None].repeat(self.lanes, axis=-1)
        if self.unequal_lanes:
            lanes[..., 1:] += np.arange(1, self.lanes, dtype=lanes.dtype)
        return lanes

    def make(self, states: list[AttentionState] | None = None) -> CaseCall:
        """Lay the numbers out in memory, fresh at every call.

        Parameters
        ----------
        states : list of AttentionState, optional
            The numbers; those of :meth:`fill` by default.

        Returns
        -------
        CaseCall
        """
        attn_axis, stats_axis = _TOKEN_AXIS[self.layout]
        placed = [
            (
                place(state.attn_out, self.attn_placement, attn_axis),
                place(state.softmax_max, self.stats_placement, stats_axis),
                place(state.softmax_sum, self.stats_placement, stats_axis),
            )
            for state in states or self.fill()
        ]
        out: tuple[Placed, ...] | None = None
        if self.out in ("prev", "cur"):
            out = placed[0 if self.out == "prev" else 1]
        elif self.out == "given":
            shape, stats_shape = self.shapes
            packed = self.layout == "TND" and self.softmax_layout == "SBH"
            stats = "offset" if packed and self.out_placement not in placements.PACKED_PLACEMENTS else self.out_placement
            blank = np.zeros(stats_shape, self.stats_dtype)
            out = (
                place(np.zeros(shape, named_dtype(self.dtype)), self.out_placement, attn_axis),
                place(blank, stats, stats_axis),
                place(blank, stats, stats_axis),
            )
        if self.read_only:
            for state in placed:
                if state is not out:
                    for part in state:
                        part.view.flags.writeable = False
        views = [AttentionState(*(part.view for part in state)) for state in placed]
        return CaseCall(self, views * (self.states // len(views)), out)


class CaseCall:
    """A case with its arrays: run it on a backend, then look at what is left.

    Attributes
    ----------
    case : Case
    states : list of AttentionState
    out : tuple of Placed, or None
    """

    def __init__(self, case: Case, states: list[AttentionState], out: tuple[Placed, ...] | None) -> None:
        self.case = case
        self.states = states
        self.out = out

    def run(self, backend: Any) -> AttentionState:
        """Make the call on the NumPy arrays.

        Parameters
        ----------
        backend : str or Backend

        Returns
        -------
        AttentionState
        """
        out = None if self.out is None else tuple(part.view for part in self.out)
        return self.case.call(self.states, out, backend)


def named_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a name; bfloat16 is ml_dtypes'.

    Parameters
    ----------
    name : str

    Returns
    -------
    numpy.dtype

    Raises
    ------
    ImportError
        For "bfloat16" without ml_dtypes.
    """
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError(
            "bfloat16 cases need ml_dtypes: pip install 'ring-attention-update[test]', or pip install ml_dtypes"
        ) from error
    return np.dtype(ml_dtypes.bfloat16)
