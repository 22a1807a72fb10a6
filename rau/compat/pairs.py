"""A merge of pairs (out, lse) into what of both the caller has given; what the peers' modules share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rau.arithmetic import library
from rau.state import AttentionState
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
    states = [AttentionState.from_lse(*pair, **how) for pair in pairs]
    out = merge_states(states, layout=how["layout"], statistics=False, out=out, dtype=dtype, scale=scale)
    return out, merged([(its[..., :0], rows) for its, rows in pairs], how, None, lse)[1] if with_lse else None
