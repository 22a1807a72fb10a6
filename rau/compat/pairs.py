"""A merge of pairs (out, lse) into what of both the caller has given; what the peers' modules share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rau.arithmetic import library
from rau.arrays import looks_like_array
from rau.constraints.hints import described
from rau.constraints.rules import Violations
from rau.state import states_of
from rau.update import merge_lse, merge_states


def merged(
    pairs: Sequence[Sequence[Any]], how: dict[str, Any], out: Any = None, lse: Any = None, *, with_lse: bool = True,
    dtype: Any = None, scale: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Merge pairs into an output and a log-sum-exp, each new where it is None; without `with_lse` into an output alone.

    `how` is what :func:`rau.merge_lse` is told of the pairs, `dtype` and `scale` what :func:`rau.merge_states` is told of
    the output. The result has None for what was not wanted.
    """
    if dtype is not None and dtype == pairs[0][0].dtype:
        dtype = None  # which can be traced
    if with_lse and dtype is None and scale is None:
        if out is None and lse is None:  # which has a gradient, and can be traced
            return merge_lse(pairs, **how)
        into = [library(like).empty_like(like) if array is None else array for array, like in zip((out, lse), pairs[0])]
        return merge_lse(pairs, **how, out=into)
    axes, inf_is_empty = how["lse_layout"], how.get("inf_is_empty", False)
    states = states_of(pairs, names_of(pairs), Violations("merge_lse"), how["base"], how["layout"], axes, inf_is_empty, None, 1)
    out = merge_states(states, layout=how["layout"], statistics=False, out=out, dtype=dtype, scale=scale)
    return out, merged([(its[..., :0], rows) for its, rows in pairs], how, None, lse)[1] if with_lse else None


def names_of(pairs: Sequence[Any]) -> list[tuple[str, str]]:
    """Name the arrays of pairs as :func:`rau.merge_lse` does."""
    return [(f"pairs[{k}][0]", f"pairs[{k}][1]") for k in range(len(pairs))]


def stacked(call: str, **arrays: Any) -> list[tuple[Any, Any]]:
    """Pair K outputs with K log-sum-exps: arrays that hold them along a first axis, or lists of arrays."""
    report = Violations(call)
    for name, several in arrays.items():
        if not looks_like_array(several) and not (isinstance(several, (list, tuple)) and all(map(looks_like_array, several))):
            report.add("array", f"{name} is {described(several)}; expected an array of K of them, or a list of K arrays.")
    report.raise_if_broken()
    (name, outs), (its, lses) = arrays.items()
    if len(outs) != len(lses) or not len(outs):
        report.add("states", f"{name} holds {len(outs)} of them and {its} {len(lses)}; expected as many, at least one.")
    report.raise_if_broken()
    return list(zip(outs, lses, strict=True))
