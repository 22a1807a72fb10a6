"""A merge of pairs (out, lse) into what of both the caller has given; what the peers' modules share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rau.arithmetic import library
from rau.state import AttentionState
from rau.update import merge_lse, merge_states


def merged(
    pairs: Sequence[Sequence[Any]], how: dict[str, Any], out: Any = None, lse: Any = None, *, with_lse: bool = True
) -> tuple[Any, Any]:
    """Merge pairs into an output and a log-sum-exp, each new where it is None; without `with_lse` into an output alone.

    `how` is what :func:`rau.merge_lse` is told of the pairs. The result has None for what was not wanted.
    """
    if not with_lse:
        states = [AttentionState.from_lse(*pair, **how) for pair in pairs]
        return merge_states(states, layout=how["layout"], statistics=False, out=out), None
    if out is None and lse is None:  # which has a gradient, and can be traced
        return merge_lse(pairs, **how)
    given = zip((out, lse), pairs[0], strict=True)
    return merge_lse(pairs, **how, out=[library(like).empty_like(like) if array is None else array for array, like in given])
