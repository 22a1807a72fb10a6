"""The space of valid calls: one description of what goes with what, whoever chooses.

NumPy's generator chooses by weights, so that thousands of cases mix everything with everything; Hypothesis by its draw,
which takes the option named first for the simplest. Neither knows of the other.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np

from rau.arrays.numpy_ import ITEMSIZE
from rau.backends import Capabilities
from rau.testing.cases.case import Case
from rau.testing.cases.numbers import OUTPUTS, STATISTICS
from rau.testing.cases.placements import OUT_PLACEMENTS, PACKED_PLACEMENTS, PLACEMENTS

T = TypeVar("T")
EVERYTHING = Capabilities(array_types=(), dtypes=tuple(ITEMSIZE))


class Chooser(Protocol):
    """Who chooses. Where `when` is false there is nothing to choose: the first option it is, or no."""

    largest: int  # sizes and numbers of states beyond it are not in the space

    def one(self, options: Mapping[T, float] | Sequence[T], when: bool = True) -> T:
        """Choose an option; a mapping gives each a weight."""

    def chance(self, probability: float, when: bool = True) -> bool:
        """Choose yes or no."""

    def several(self, options: Sequence[int], most: int) -> Sequence[int]:
        """Choose up to `most` numbers, each as often as it comes."""


class Weighted:
    """NumPy's generator as a chooser. What there is nothing to choose about takes nothing from its stream."""

    largest = 10**9

    def __init__(self, name: str) -> None:
        self.rng = np.random.default_rng(zlib.crc32(f"{name} shape".encode()))

    def one(self, options: Mapping[T, float] | Sequence[T], when: bool = True) -> T:
        if not when:
            return next(iter(options))
        # What capabilities exclude leaves weights that do not add up to 1.
        weights = np.array(list(options.values())) / sum(options.values()) if isinstance(options, Mapping) else None
        return list(options)[int(self.rng.choice(len(options), p=weights))]

    def chance(self, probability: float, when: bool = True) -> bool:
        return when and bool(self.rng.random() < probability)

    def several(self, options: Sequence[int], most: int) -> Sequence[int]:
        return self.rng.choice(options, size=int(self.rng.integers(0, most + 1))).tolist()


def choose_case(choose: Chooser, id: str, takes: Capabilities = EVERYTHING) -> Case:
    """Choose a valid call that capabilities do not exclude. The order of the choices is part of what an id stands for."""

    def sizes(options: Mapping[int, float], most: int | None = None, multiple: int = 1) -> Mapping[int, float]:
        options = {n: share for n, share in options.items() if n <= choose.largest}
        if multiple > 1:
            options = {multiple: 0.5, 2 * multiple: 0.5}
        return {n: share for n, share in options.items() if most is None or n <= most}

    layout = choose.one(_of({"SBH": 0.35, "TND": 0.45, "BSND": 0.1, "BNSD": 0.1}, takes.layouts))
    tnd = layout == "TND"
    packed = choose.chance(0.6, tnd)
    if len(takes.softmax_layouts) == 1:
        packed = tnd and "SBH" in takes.softmax_layouts
    dtype = choose.one(_of({"float32": 0.35, "bfloat16": 0.25, "float16": 0.25, "float64": 0.15}, takes.dtypes))
    mixed = choose.chance(0.25, takes.mixed and dtype == "float32")
    cur_dtype = choose.one(("bfloat16", "float16")) if mixed else dtype
    states = choose.one(sizes({2: 0.6, 1: 0.05, 3: 0.15, 4: 0.1, 9: 0.1}))
    lengths: tuple[int, ...] = ()
    if tnd:
        lengths = tuple(choose.several([n for n in (0, 1, 2, 3, 5, 17, 70) if n <= choose.largest], 6))
    batch = choose.one({1: 0.5, 2: 0.3, 3: 0.18, 0: 0.02}, not tnd)
    tokens = choose.one(sizes({1: 0.2, 2: 0.2, 3: 0.2, 7: 0.2, 65: 0.13, 130: 0.05, 0: 0.02}), not tnd)
    heads = choose.one(sizes({1: 0.25, 2: 0.25, 3: 0.2, 5: 0.2, 8: 0.09, 0: 0.01}, takes.max_heads))
    dimensions = dict.fromkeys((1, 2, 3, 7, 8, 16, 22, 33, 64, 65), 0.08) | {128: 0.1, 600: 0.09, 0: 0.01}
    head_dim = choose.one(sizes(dimensions, takes.max_head_dim, takes.head_dim_multiple))
    if layout == "SBH" and heads == 0:
        head_dim = 0  # N = 0 needs H = 0
    aliased = choose.chance(0.05) and cur_dtype == dtype
    goes = {"fresh": 0.3, "given": 0.35, "prev": 0.25, "cur": 0.1}
    out = choose.one(goes if takes.in_place else _of(goes, ("fresh", "given") if takes.out else ("fresh",)))
    if out == "cur" and (states == 1 or cur_dtype != dtype):
        out = "prev"
    if aliased and out != "given":
        out = "fresh"
    attn: Sequence[str] = [place for place in PLACEMENTS if place != "broadcast"]
    stats: Sequence[str] = PACKED_PLACEMENTS if packed else PLACEMENTS
    if out in ("prev", "cur"):  # what is written to must be writable and have a contiguous last axis
        attn, stats = OUT_PLACEMENTS, [place for place in stats if place in OUT_PLACEMENTS]
    qlen = choose.one(("array", "int32", "list") if packed else ("array", "list", "none"))
    lanes = choose.one(_of({8: 0.8, 1: 0.2}, takes.lanes))
    statistics = choose.one((*STATISTICS, "attention"), bool(heads and head_dim and batch))
    outputs = choose.one(tuple(OUTPUTS))
    attn_placement, stats_placement, out_placement = choose.one(attn), choose.one(stats), choose.one(OUT_PLACEMENTS)
    read_only = choose.chance(0.5)
    # Never by weight: what the ids of generated cases stand for is older than this choice.
    unequal_lanes = choose.chance(0.0, lanes > 1 and stats_placement != "broadcast")
    return Case(
        id=id, layout=layout, softmax_layout="SBH" if packed else "TND", batch=batch,
        tokens=sum(lengths) if tnd else tokens, heads=heads, head_dim=head_dim, lengths=lengths, qlen=qlen, lanes=lanes,
        dtype=dtype, cur_dtype=cur_dtype, states=states, statistics=statistics, outputs=outputs,
        attn_placement=attn_placement, stats_placement=stats_placement, out_placement=out_placement, out=out,
        read_only=read_only, aliased=aliased, unequal_lanes=unequal_lanes,
    )  # fmt: skip


def _of(weights: Mapping[T, float], taken: Collection[T]) -> Mapping[T, float]:
    return {option: share for option, share in weights.items() if option in taken}


def generated(seed: int, count: int, first: int = 0) -> Iterator[Case]:
    """Generate cases that mix everything with everything, small enough to run thousands.

    Parameters
    ----------
    seed : int
        Case i of a seed is always the same.
    count : int
    first : int, default 0
        The number i of the first one.

    Yields
    ------
    Case
        With the id "generated/SEED/I".

    Examples
    --------
    >>> [case.id for case in generated(7, 2)]
    ['generated/7/0', 'generated/7/1']
    """
    for index in range(first, first + count):
        name = f"generated/{seed}/{index}"
        yield choose_case(Weighted(name), name)
