"""Cases: calls to try a backend on, named or generated, always the same for the same id."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import rau
from rau.state import AttentionState
from rau.testing import contents, memory
from rau.testing.memory import Placed, place

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
        Kinds of numbers: keys of `rau.testing.contents.STATISTICS` and `OUTPUTS`.
    attn_placement, stats_placement, out_placement : str
        How inputs and result lie in memory, see `rau.testing.memory`.
    out : {"fresh", "given", "prev", "cur"}
        Where the result goes: allocated, into given arrays, or in place.
    read_only : bool
        Inputs that are not written to are read-only.
    aliased : bool
        The states are one and the same.
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

    def lengths_argument(self) -> Any:
        """What is passed as actual_seq_qlen."""
        if self.layout != "TND" or self.qlen == "none":
            return None
        cumulative = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)]).astype(np.int64)
        return {"array": cumulative, "int32": cumulative.astype(np.int32), "list": cumulative.tolist()}[self.qlen]

    def make(self) -> Call:
        """Make the arrays, fresh at every call.

        Returns
        -------
        Call
        """
        rng = np.random.default_rng(zlib.crc32(self.id.encode()))
        shape, stats_shape = self.shapes
        distinct = 1 if self.aliased else self.states
        maxima, sums = contents.fill_statistics(rng, self.statistics, distinct, int(np.prod(stats_shape[:-1])))
        attn_axis, stats_axis = _TOKEN_AXIS[self.layout]
        placed = []
        with np.errstate(all="ignore"):  # numbers that a narrow dtype cannot hold become infinite: so be it
            for k in range(distinct):
                dtype = _dtype(self.dtype if k == 0 else self.cur_dtype or self.dtype)
                output = contents.fill_output(rng, self.outputs, shape).astype(dtype)
                lanes = [
                    np.repeat(part[k].astype(self.stats_dtype).reshape(*stats_shape[:-1], 1), self.lanes, axis=-1)
                    for part in (maxima, sums)
                ]
                placed.append(
                    (
                        place(output, self.attn_placement, attn_axis),
                        *(place(part, self.stats_placement, stats_axis) for part in lanes),
                    )
                )
        states = [AttentionState(*(part.view for part in state)) for state in placed] * (self.states // distinct)
        out: tuple[Placed, ...] | None = None
        if self.out in ("prev", "cur"):
            out = placed[0 if self.out == "prev" else 1]
        elif self.out == "given":
            blank = AttentionState(np.zeros(shape, _dtype(self.dtype)), *[np.zeros(stats_shape, self.stats_dtype)] * 2)
            packed = self.layout == "TND" and self.softmax_layout == "SBH"
            stats = self.out_placement
            if packed and stats not in memory.PACKED_PLACEMENTS:
                stats = "offset"
            out = (
                place(blank.attn_out, self.out_placement, attn_axis),
                place(blank.softmax_max, stats, stats_axis),
                place(blank.softmax_sum, stats, stats_axis),
            )
        if self.read_only:
            for state in placed:
                if state is not out:
                    for part in state:
                        part.view.flags.writeable = False
        return Call(self, states, out)


class Call:
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
        """Make the call.

        Parameters
        ----------
        backend : str or Backend

        Returns
        -------
        AttentionState
        """
        case = self.case
        options = {
            "softmax_layout": case.softmax_layout,
            "profile": case.profile,
            "backend": backend,
            "out": None if self.out is None else tuple(part.view for part in self.out),
        }
        if case.states == 2:
            return rau.ring_attention_update(
                *self.states[0], *self.states[1], case.lengths_argument(), case.layout, **options
            )
        return rau.merge_states(self.states, case.lengths_argument(), case.layout, **options)


def _dtype(name: str) -> np.dtype[Any]:
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError(
            "bfloat16 cases need ml_dtypes: pip install 'ring-attention-update[test]', or pip install ml_dtypes"
        ) from error
    return np.dtype(ml_dtypes.bfloat16)


def generated(seed: int, count: int) -> Iterator[Case]:
    """Generate cases that mix everything with everything, small enough to run thousands.

    Parameters
    ----------
    seed : int
        Case i of a seed is always the same.
    count : int

    Yields
    ------
    Case
        With the id "generated/SEED/I".

    Examples
    --------
    >>> [case.id for case in generated(7, 2)]
    ['generated/7/0', 'generated/7/1']
    """
    for index in range(count):
        yield _generate(f"generated/{seed}/{index}")


def _generate(name: str) -> Case:
    rng = np.random.default_rng(zlib.crc32(f"{name} shape".encode()))

    def pick(options: Any, weights: Any = None) -> Any:
        at = rng.choice(len(options), p=weights)
        return options[int(at)]

    layout = pick(("SBH", "TND", "BSND", "BNSD"), (0.35, 0.45, 0.1, 0.1))
    packed = layout == "TND" and bool(rng.random() < 0.6)
    dtype = pick(("float32", "bfloat16", "float16", "float64"), (0.35, 0.25, 0.25, 0.15))
    cur_dtype = dtype
    if dtype == "float32" and rng.random() < 0.25:
        cur_dtype = pick(("bfloat16", "float16"))
    states = pick((2, 1, 3, 4, 9), (0.6, 0.05, 0.15, 0.1, 0.1))
    lengths: tuple[int, ...] = ()
    batch = 1
    if layout == "TND":
        sequences = int(rng.integers(0, 7))
        lengths = tuple(int(n) for n in rng.choice((0, 1, 2, 3, 5, 17, 70), size=sequences))
        tokens = sum(lengths)
    else:
        batch = pick((1, 2, 3, 0), (0.5, 0.3, 0.18, 0.02))
        tokens = pick((1, 2, 3, 7, 65, 130, 0), (0.2, 0.2, 0.2, 0.2, 0.13, 0.05, 0.02))
    heads = pick((1, 2, 3, 5, 8, 0), (0.25, 0.25, 0.2, 0.2, 0.09, 0.01))
    head_dim = pick((1, 2, 3, 7, 8, 16, 22, 33, 64, 65, 128, 600, 0), (*[0.08] * 10, 0.1, 0.09, 0.01))
    if layout == "SBH" and heads == 0:
        head_dim = 0
    aliased = bool(rng.random() < 0.05) and cur_dtype == dtype
    out = pick(("fresh", "given", "prev", "cur"), (0.3, 0.35, 0.25, 0.1))
    if out == "cur" and (states == 1 or cur_dtype != dtype):
        out = "prev"
    if aliased and out != "given":
        out = "fresh"
    stats_placements = memory.PACKED_PLACEMENTS if packed else memory.PLACEMENTS
    in_place = out in ("prev", "cur")
    if in_place:  # what is written to must be writable and have a contiguous last axis
        stats_placements = tuple(p for p in stats_placements if p not in ("broadcast", "gapped"))
    attn_placements = memory.OUT_PLACEMENTS if in_place else tuple(p for p in memory.PLACEMENTS if p != "broadcast")
    return Case(
        id=name, layout=layout, softmax_layout="SBH" if packed else "TND", batch=batch, tokens=tokens, heads=heads,
        head_dim=head_dim, lengths=lengths, qlen=pick(("array", "int32", "list") if packed else ("array", "list", "none")),
        lanes=pick((8, 1), (0.8, 0.2)), dtype=dtype, cur_dtype=cur_dtype, states=states,
        statistics=pick(tuple(contents.STATISTICS)), outputs=pick(tuple(contents.OUTPUTS)),
        attn_placement=pick(attn_placements), stats_placement=pick(stats_placements),
        out_placement=pick(memory.OUT_PLACEMENTS), out=out, read_only=bool(rng.random() < 0.5), aliased=aliased,
    )  # fmt: skip
