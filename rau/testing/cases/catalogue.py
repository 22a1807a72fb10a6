"""The cases with names: what has gone wrong somewhere, from small to large."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from typing import Any

from rau.arrays.numpy_ import ITEMSIZE, NARROW
from rau.constraints import PROFILES
from rau.testing.cases import numbers, placements
from rau.testing.cases.case import Case


def named() -> list[Case]:
    """List the cases with names: what has gone wrong somewhere, from small to large.

    Returns
    -------
    list of Case
        Their ids are stable: "GROUP/WHAT".

    Examples
    --------
    >>> named()[0].id
    'smallest/one-token-one-head'
    """
    return list(_named())


def _named() -> Iterator[Case]:
    yield Case(id="smallest/one-token-one-head", tokens=1, heads=1, head_dim=1)
    for layout in ("SBH", "BSND", "BNSD"):
        yield Case(id=f"layout/{layout}", layout=layout, batch=3, tokens=7, heads=5, head_dim=16)
        yield Case(id=f"layout/{layout}-attention", layout=layout, batch=2, tokens=9, heads=3, head_dim=16,
                   statistics="attention")  # fmt: skip
    if find_spec("torch"):
        for dtype in ("float32", "bfloat16"):
            yield Case(id=f"flash/{dtype}", layout="BNSD", batch=2, tokens=40, heads=3, head_dim=64, dtype=dtype, states=3,
                       statistics="flash")  # fmt: skip
    vendor: dict[str, Any] = {"profile": "mindspore", "head_dim": 64, "heads": 3}
    lengths = {"even": (4, 4, 4), "uneven": (5, 1, 6), "zero-length": (0, 5, 0, 0, 7, 0), "one": (12,), "ones": (1,) * 12}
    for order, name in (("TND", "token-major"), ("SBH", "packed")):
        for how, sequences in lengths.items():
            for statistics in ("ordinary", "attention"):
                suffix = "-attention" if statistics == "attention" else ""
                yield Case(id=f"tnd/{name}-{how}{suffix}", layout="TND", softmax_layout=order, tokens=12, lengths=sequences,
                           statistics=statistics, **vendor)  # fmt: skip
        yield Case(id=f"tnd/{name}-no-tokens", layout="TND", softmax_layout=order, tokens=0, **vendor)
        for qlen in ("int32", "list"):
            yield Case(id=f"tnd/{name}-qlen-{qlen}", layout="TND", softmax_layout=order, tokens=12, lengths=(5, 7),
                       qlen=qlen)  # fmt: skip
        yield Case(id=f"tnd/{name}-thousands", layout="TND", softmax_layout=order, tokens=6000, lengths=(1, 0, 2) * 2000,
                   heads=2, head_dim=8, dtype="bfloat16")  # fmt: skip
    yield Case(id="tnd/token-major-no-qlen", layout="TND", tokens=12, qlen="none")
    yield Case(id="tnd/at-the-buffer-limit", profile="mindspore", layout="TND", tokens=3, lengths=(3,), heads=42,
               head_dim=128)  # fmt: skip
    yield Case(id="tnd/at-the-v2-limits", profile="cann-v2", layout="TND", tokens=2, lengths=(2,), heads=256, head_dim=768)
    for dtype, cur_dtype in [*zip(ITEMSIZE, ITEMSIZE, strict=True), *product(("float32",), NARROW)]:
        name = dtype if dtype == cur_dtype else f"{cur_dtype}-into-{dtype}"
        common: dict[str, Any] = {"dtype": dtype, "cur_dtype": cur_dtype}
        profile = "mindspore" if dtype == cur_dtype and dtype in PROFILES["mindspore"].dtypes else "portable"
        yield Case(id=f"dtype/{name}", tokens=130, heads=3, head_dim=64, profile=profile, **common)
        yield Case(id=f"dtype/{name}-attention", tokens=20, heads=3, head_dim=64, statistics="attention", **common)
        for outputs in numbers.OUTPUTS:
            yield Case(id=f"outputs/{outputs}-{name}", tokens=9, heads=3, head_dim=22, outputs=outputs, statistics="empty",
                       **common)  # fmt: skip
        for statistics in numbers.STATISTICS:
            yield Case(id=f"statistics/{statistics}-{name}", tokens=65, heads=2, head_dim=22, statistics=statistics,
                       **common)  # fmt: skip
        for states in (1, 3, 8):
            yield Case(id=f"states/{states}-{name}", tokens=9, heads=3, head_dim=22, states=states, statistics="empty",
                       **common)  # fmt: skip
    for dimension in ("batch", "tokens", "heads", "head_dim"):
        sizes: dict[str, Any] = {"batch": 2, "tokens": 3, "heads": 2, "head_dim": 5}
        yield Case(id=f"one/{dimension}", **{**sizes, dimension: 1})
        empty: dict[str, Any] = {**sizes, dimension: 0}
        if dimension == "heads":
            empty["head_dim"] = 0  # N = 0 needs H = 0
        yield Case(id=f"none/{dimension}", **empty)
    for head_dim in (1, 3, 7, 22, 63, 65, 127, 129, 600, 12816):
        for dtype in ("float32", "bfloat16"):
            yield Case(id=f"head-dim/{head_dim}-{dtype}", tokens=3, heads=2, head_dim=head_dim, dtype=dtype, out="given")
    for lanes in (8, 1):
        for layout in ("SBH", "TND"):
            yield Case(id=f"lanes/{lanes}-{layout}", layout=layout, tokens=9, lengths=(9,), heads=3, lanes=lanes)
    for order, layout in (("TND", "SBH"), ("TND", "TND"), ("SBH", "TND")):
        name = "packed" if order == "SBH" else layout
        yield Case(id=f"lanes/unequal-{name}", layout=layout, softmax_layout=order, tokens=9, lengths=(3, 6), heads=3,
                   head_dim=22, statistics="empty", unequal_lanes=True)  # fmt: skip
    for placement in placements.PLACEMENTS:
        for layout in ("SBH", "TND", "BSND", "BNSD"):
            common = {"layout": layout, "tokens": 10, "lengths": (10,), "heads": 3, "head_dim": 16, "statistics": "empty"}
            attn_placement = "contiguous" if placement == "broadcast" else placement
            inputs: dict[str, Any] = {"attn_placement": attn_placement, "stats_placement": placement}
            yield Case(id=f"views/{placement}-{layout}", read_only=True, **common, **inputs)
            if placement in placements.OUT_PLACEMENTS:
                yield Case(id=f"out/{placement}-{layout}", out="given", out_placement=placement, **common)
                yield Case(id=f"in-place/{placement}-{layout}", out="prev", **common, **inputs)
                yield Case(id=f"in-place/{placement}-{layout}-cur", out="cur", **common, **inputs)
    for layout in ("SBH", "TND"):  # offsets beyond 32 bits, without the memory that they take otherwise
        yield Case(id=f"far/views-{layout}", layout=layout, tokens=3, lengths=(3,), attn_placement="far",
                   stats_placement="far")  # fmt: skip
        yield Case(id=f"far/out-{layout}", layout=layout, tokens=3, lengths=(3,), out="given", out_placement="far")
    for placement in placements.PACKED_PLACEMENTS:
        yield Case(id=f"views/{placement}-packed", layout="TND", softmax_layout="SBH", tokens=10, lengths=(3, 7), heads=3,
                   stats_placement=placement)  # fmt: skip
    yield Case(id="views/aliased", tokens=5, aliased=True)
    yield Case(id="states/133", tokens=20, heads=2, head_dim=16, states=133, statistics="empty", dtype="bfloat16")
    yield Case(id="large/streamed", tokens=3000, heads=8, head_dim=128, statistics="empty", out="given")
    yield Case(id="large/heads", tokens=2, heads=20000, head_dim=3, statistics="empty")
