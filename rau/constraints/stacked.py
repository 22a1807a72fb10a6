"""What merge_states takes: a sequence of states, or one state of stacked arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rau.arrays import looks_like_array
from rau.constraints.hints import described
from rau.constraints.rules import Violations
from rau.errors import ConstraintError
from rau.layouts import FIELDS, LAYOUTS

MOST_STATES = 1 << 16  # states; each costs some microseconds before anything is merged
FEWER = f"expected at most {MOST_STATES}. Merge groups of them, and then the results"
_EXPECTED = (
    "expected a list of AttentionStates, or of triples (attn_out, softmax_max, softmax_sum), or a single one whose arrays "
    "are stacked along a new first axis"
)


def as_states(states: Any, layout: Any) -> Sequence[Sequence[Any]]:
    """Take the argument of merge_states apart, before anything looks inside the states: at least one, views where stacked."""
    if getattr(type(states), "_fields", ()) == FIELDS or (
        isinstance(states, (list, tuple)) and len(states) == 3 and all(map(looks_like_array, states))
    ):
        return _unstacked(states, layout)
    if isinstance(states, (list, tuple)) and len(states) > MOST_STATES:
        raise _error(f"has K = {len(states)} states; {FEWER}.")
    if not isinstance(states, (list, tuple)) or not states:
        raise _error(f"is {'empty' if isinstance(states, (list, tuple)) else described(states)}; {_EXPECTED}.")
    for k, state in enumerate(states):
        if not isinstance(state, (list, tuple)) or len(state) != 3:
            several = isinstance(state, (list, tuple))
            got = f"has {len(state)} items" if several else f"is {described(state)}"
            hint = ""
            if several and len(state) == 2:
                hint = " AttentionState.from_lse(out, lse, base=...) makes a state from a pair (out, lse)."
            raise _error(f"states[{k}] {got}; {_EXPECTED}.{hint}", "")
    return states


def _unstacked(stacked: Sequence[Any], layout: Any) -> Sequence[Sequence[Any]]:
    """See K states in the arrays of one, along the first axis."""
    axes = LAYOUTS.get(layout) if isinstance(layout, str) else None
    if axes is None or not all(map(looks_like_array, stacked)):
        return [stacked]  # of which the validator has something to say
    shapes = [tuple(part.shape) for part in stacked]
    wanted = [1 + form.count(",") + 1 for form in (axes.attn, axes.stats, axes.stats)]
    ranks = [len(shape) for shape in shapes]
    if ranks == [rank - 1 for rank in wanted]:
        raise _error(f"is one AttentionState; {_EXPECTED}: pass [state].")
    if ranks != wanted or not shapes[0][0] == shapes[1][0] == shapes[2][0] >= 1:
        forms = ", ".join(f"(K, {form.format(lanes=8)[1:]}" for form in (axes.attn, axes.stats, axes.stats))
        raise _error(f'is one triple of arrays of shapes {", ".join(map(str, shapes))}; if stacked, layout "{layout}" expects '
                     f"{forms} with K >= 1.")  # fmt: skip
    if shapes[0][0] > MOST_STATES:
        raise _error(f"has K = {shapes[0][0]} states; {FEWER}.")
    if not all(hasattr(part, "__getitem__") for part in stacked):
        raise _error(f"is one triple of arrays that cannot be indexed; {_EXPECTED}.")
    return [tuple(part[k] for part in stacked) for k in range(shapes[0][0])]


def _error(text: str, name: str = "states ") -> ConstraintError:
    violations = Violations("merge_states")
    violations.add("states", f"{name}{text}")
    return violations.error()
