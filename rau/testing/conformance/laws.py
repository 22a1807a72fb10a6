"""The laws that merging keeps whatever the numbers are: neutral element, order, split of the keys, permutations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np

from rau.arrays.numpy_ import EIGHT_BITS, ITEMSIZE
from rau.sink import add_sink
from rau.state import AttentionState
from rau.testing.cases import Case
from rau.testing.comparison import compare, same_bits
from rau.testing.conformance.report import Check
from rau.testing.reference.attention import exact_attention, partial_attention
from rau.testing.reference.eight_bits import nearest_codes
from rau.testing.reference.oracle import oracle
from rau.testing.trial import excluded_by
from rau.testing.trial.judge import folds, held_to, keeps_lse
from rau.testing.under_test import host_state, own_state
from rau.update import merge_states

_EMPTY = (0.0, -np.inf, 0.0)  # the neutral element
Merge = Callable[[Sequence[AttentionState]], AttentionState]
Law = Callable[[Any, str], list[str]]  # of a backend and a dtype: what is wrong


def merger(backend: Any, layout: str = "BSND") -> Merge:
    """Make a function that merges NumPy states by a backend."""

    def merge(states: Sequence[AttentionState]) -> AttentionState:
        case = Case(id="law", layout=layout, states=len(states))
        return host_state(backend, case.call([own_state(backend, state) for state in states], None, backend))

    return merge


def _layout(backend: Any) -> str:
    return "BSND" if "BSND" in backend.capabilities.layouts else "SBH"


def _case(backend: Any, dtype: str, states: int = 2, statistics: str = "ordinary") -> Case:
    return Case(
        id=f"law/{dtype}/{statistics}", layout=_layout(backend), batch=2, tokens=9, heads=4, head_dim=64, dtype=dtype,
        states=states, statistics=statistics,
    )  # fmt: skip


def _states(backend: Any, dtype: str, states: int, statistics: str = "ordinary") -> list[AttentionState]:
    return _case(backend, dtype, states, statistics).fill()


def neutral_element(backend: Any, dtype: str) -> list[str]:
    """Merged with an empty state, on either side, a state comes back: bit for bit where maximum and sum are kept."""
    problems: list[str] = []
    merge = merger(backend, _layout(backend))
    for statistics in ("ordinary", "nan-max", "nan-sum", "infinite-sum"):
        (state,) = _states(backend, dtype, 1, statistics)
        empty = AttentionState(
            np.full_like(state.attn_out, np.nan),
            np.full_like(state.softmax_max, -np.inf),
            np.zeros_like(state.softmax_sum),
        )
        for order in ([state, empty], [empty, state]):
            if held_to(backend):
                expected = oracle(order, layout=_layout(backend), **held_to(backend))
                problems += compare(merge(order), expected, tolerance=backend.capabilities.tolerance).problems
            else:
                problems += same_bits(merge(order), state)
    return problems


def commutativity(backend: Any, dtype: str) -> list[str]:
    """Swapped, two states give the same bits."""
    merge = merger(backend, _layout(backend))
    problems: list[str] = []
    for statistics in ("ordinary", "empty", "huge-gaps", "equal-maxima"):
        one, other = _states(backend, dtype, 2, statistics)
        problems += same_bits(merge([one, other]), merge([other, one]))
    return problems


def associativity(backend: Any, dtype: str) -> list[str]:
    """(a + b) + c and a + (b + c) are within twice the bound of three states merged at once.

    Two merges of two states take 3 roundings of an element each, and the sum that is stored in between one more, which
    enters the weights twice: 8 in all, where the bound of three states counts 4. For a kernel that keeps a log-sum-exp it is
    three times its bound: two merges, and the log-sum-exp in between, which is as far off as the weights of a merge.
    """
    layout = _layout(backend)
    merge = merger(backend, layout)
    a, b, c = _states(backend, dtype, 3)
    expected = oracle([a, b, c], layout=layout, **held_to(backend))
    times = 2 if expected.lse is None else 3
    problems: list[str] = []
    for result in (merge([merge([a, b]), c]), merge([a, merge([b, c])])):
        problems += compare(result, expected, tolerance=times * backend.capabilities.tolerance).problems
    return problems


def split_of_the_keys(backend: Any, dtype: str) -> list[str]:
    """However the keys are split, the merge is the attention over all of them.

    On top of the merge's own bound comes what the partial states lost by rounding: one rounding of each output, one of
    each sum, which enters the weights twice, and that of each maximum m, abs(m) roundings in each weight, twice too.
    """
    layout = _layout(backend)
    merge = merger(backend, layout)
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal((2, 9, 4, 64)) for _ in range(3))
    if layout == "SBH":
        q, k, v = (part.swapaxes(0, 1) for part in (q, k, v))
    axis = 0 if layout == "SBH" else 1
    exact = exact_attention(q, k, v, layout=layout)
    problems: list[str] = []
    for cuts in ([4], [1, 2], [2, 3, 5, 8]):
        if len(cuts) + 1 > (backend.capabilities.max_states or np.inf):
            continue
        parts = [
            partial_attention(q, kk, vv, layout=layout, dtype=dtype)
            for kk, vv in zip(np.split(k, cuts, axis), np.split(v, cuts, axis), strict=True)
        ]
        if layout != "SBH":
            parts = [AttentionState(part[0].reshape(q.shape), *part[1:]) for part in parts]
        bound, own = oracle(parts, layout=layout), oracle(parts, layout=layout, **held_to(backend))
        largest = max(float(np.abs(part.softmax_max).max()) for part in parts)
        # A merge made of updates rounds up to four times as much; one that keeps a log-sum-exp is off by it after each, too.
        times = 4 if own.lse is None else 2 * len(parts) - 3
        merging = times if folds(backend, Case(id="law", states=len(parts))) else 1
        off = np.abs(merge(parts).attn_out - np.asarray(exact[0]).reshape(bound.attn_out.shape))
        lost = (3 + 2 * largest) / (len(parts) + 1) * bound.attn_bound
        share = float((off / (merging * backend.capabilities.tolerance * own.attn_bound + lost)).max())
        if not share <= 1.0:
            problems.append(f"split at {cuts}: {share:.3g} of the bound away from attention over all keys")
    return problems


def permutations(backend: Any, dtype: str) -> list[str]:
    """Heads and batch entries that are permuted give the same rows, permuted."""
    layout = _layout(backend)
    if layout != "BSND":
        return []
    merge = merger(backend, layout)
    states = _states(backend, dtype, 2, "empty")
    heads, batch = [2, 0, 3, 1], [1, 0]
    moved = [
        AttentionState(state[0][batch][:, :, heads], *(part[batch][:, heads] for part in state[1:])) for state in states
    ]
    result = merge(states)
    expected = AttentionState(result[0][batch][:, :, heads], *(part[batch][:, heads] for part in result[1:]))
    return same_bits(merge(moved), expected)


def output_alone(backend: Any, dtype: str) -> list[str]:
    """Without statistics, in a new array, in a given one and in place, a merge has the output that it has with them."""
    takes, base = backend.capabilities, _case(backend, dtype, 2, "empty")
    cases = [base, replace(base, states=3, lanes=1)]
    if {"TND", "SBH"} <= {*takes.layouts, *takes.softmax_layouts} and "TND" in takes.layouts:
        cases.append(replace(base, layout="TND", softmax_layout="SBH", batch=1, lengths=(4, 5), qlen="array"))
    cases = [case for case in cases if case is base or not excluded_by(backend, case)]
    return [problem for case in cases for problem in _output_alone(backend, case)]


def _output_alone(backend: Any, case: Case) -> list[str]:
    numbers = case.fill()
    states = [own_state(backend, state) for state in numbers]
    merge = partial(
        merge_states, layout=case.layout, softmax_layout=case.softmax_layout, actual_seq_qlen=case.lengths_argument(),
        backend=backend,
    )  # fmt: skip
    whole = host_state(backend, merge(states))
    alone = {"a new array": merge(states, statistics=False)}
    places = {"out=": np.full_like(whole.attn_out, np.nan)} if backend.capabilities.out else {}
    if backend.capabilities.in_place:
        places["in place"] = numbers[0].attn_out.copy()
    for how, place in places.items():
        out = own_state(backend, AttentionState(place, *whole[1:])).attn_out
        given = [states[0]._replace(attn_out=out), *states[1:]] if how == "in place" else states
        alone[how] = merge(given, statistics=False, out=out)
        if alone[how] is not out:
            return [f"{how}: returned another array than the one given"]
    found = {how: host_state(backend, states[0]._replace(attn_out=array)).attn_out for how, array in alone.items()}
    problems = ((how, same_bits(whole._replace(attn_out=array), whole)) for how, array in found.items())
    where = f"{case.states} states, {case.lanes} lanes, {case.layout}"
    return [f"{where}, {how}: {problem}" for how, its in problems for problem in its]


def _of_tokens(backend: Any, dtype: str) -> Case:
    return replace(_case(backend, dtype, 2, "empty"), layout="TND", batch=1, lengths=(4, 5), qlen="array")


def some_tokens(backend: Any, dtype: str) -> list[str]:
    """Of some tokens, or of all but padding, a merge has the rows that it has of all; the others are neither read nor changed."""
    case = _of_tokens(backend, dtype)
    first, other = case.fill()
    merge = partial(merge_states, layout="TND", backend=backend)
    whole = host_state(backend, merge([own_state(backend, first), own_state(backend, other)], case.lengths_argument()))
    mask = np.array([1, 1, 0, 0, 1, 0, 1, 1, 0], bool)
    padding = {"cu_seqlens_padded": [0, 4, 6, 9], "actual_seq_qlen": [0, 2, 3, 5]}
    empty = [np.full_like(part, value) for part, value in zip(whole, _EMPTY, strict=True)]
    asked: dict[str, tuple[dict[str, Any], Sequence[Any]]] = {
        "tokens": ({"tokens": mask}, first), "a slice": ({"tokens": slice(3, 9)}, first), "padding": (padding, empty),
    }  # fmt: skip
    problems: list[str] = []
    for how, (options, others) in asked.items():
        chosen = np.arange(9) >= 3 if how == "a slice" else mask
        unread = AttentionState(*(np.where(chosen[:, None, None], part, np.asarray(np.nan, part.dtype)) for part in other))
        for place in ("a new state", "in place") if backend.capabilities.out else ("a new state",):
            own = AttentionState(*(part.copy() for part in first))
            states = [own_state(backend, own), own_state(backend, unread)]
            given = states[0] if place == "in place" else None
            rest = first if given else others
            kept = AttentionState(*(np.where(chosen[:, None, None], new, old) for new, old in zip(whole, rest, strict=True)))
            merged = host_state(backend, merge(states, **options, out=given))
            problems += [f"{how}, {place}: {problem}" for problem in same_bits(merged, kept)]
    return problems


def states_by_row(backend: Any, dtype: str) -> list[str]:
    """Rows of two states, of none and of three are what as many merges of single rows give."""
    pool, _ = _of_tokens(backend, dtype).fill()
    indptr = [0, 2, 2, 4, 5, 7, 9]
    merge = partial(merge_states, layout="TND", backend=backend)
    merged = host_state(backend, merge(own_state(backend, pool), indptr=indptr))
    expected = [np.full((len(indptr) - 1, *part.shape[1:]), value, part.dtype) for part, value in zip(pool, _EMPTY, strict=True)]
    for row, (begin, end) in enumerate(pairwise(indptr)):
        one = [own_state(backend, AttentionState(*(part[k : k + 1] for part in pool))) for k in range(begin, end)]
        for part, values in zip(expected, host_state(backend, merge(one)) if one else (), strict=bool(one)):
            part[row] = values[0]
    return same_bits(merged, AttentionState(*expected))


def sinks(backend: Any, dtype: str) -> list[str]:
    """A sink is the merge with a state of output 0, maximum the sink and sum 1; one of -inf changes no bit."""
    case = _case(backend, dtype, 2, "empty")
    state, other = case.fill()
    sink = np.array([0.5, -np.inf, 3e38, -3e38], other.softmax_max.dtype)  # for each of its 4 heads
    rows = np.broadcast_to(sink.reshape(-1, 1, 1), other.softmax_max.shape)
    added = AttentionState(np.zeros_like(other.attn_out), np.array(rows), np.ones_like(other.softmax_sum))
    own, zero = own_state(backend, state), own_state(backend, other._replace(softmax_max=sink)).softmax_max
    merged = host_state(backend, add_sink(own, zero, case.layout, backend=backend))
    expected = host_state(backend, merge_states([own, own_state(backend, added)], layout=case.layout, backend=backend))
    return same_bits(merged, expected)


def eight_bits(backend: Any, dtype: str) -> list[str]:
    """An output of eight bits is the float32 one, multiplied by the scale, limited to the format's range and rounded once."""
    numbers = _states(backend, "float32", 3, "empty")
    numbers[0].attn_out[:, 0, ..., :4] = np.nan, np.inf, -np.inf, -0.0
    merge = partial(merge_states, layout=_layout(backend), backend=backend)
    states = [own_state(backend, state) for state in numbers]
    wide = host_state(backend, merge(states))
    folded = wide.attn_out.reshape(-1, 4, 64)  # 4 heads; tokens and batch in whatever order
    scales = np.array([1.0, 1e-3, 300.0, -7.0], np.float32)
    own_scales = own_state(backend, numbers[0]._replace(softmax_max=scales)).softmax_max
    problems = []
    for how, scale, factors in (("one scale", 300.0, np.float32(300)), ("a scale for each head", own_scales, scales[:, None])):
        narrow = merge(states, dtype=dtype, scale=scale)
        found = host_state(backend, narrow._replace(softmax_max=states[0][1], softmax_sum=states[0][2])).attn_out
        with np.errstate(over="ignore"):
            products = folded * factors
        expected, codes = nearest_codes(products, dtype), found.view(np.uint8).reshape(folded.shape)
        wrong = np.where(np.isnan(products), np.isfinite(found.reshape(folded.shape).astype(np.float32)), codes != expected)
        if wrong.any():
            at = tuple(np.argwhere(wrong)[0])
            problems.append(
                f"{dtype}, {how}: {wrong.sum()} of {wrong.size} wrong; {products[at]!r} became code {codes[at]}, not {expected[at]}"
            )
    return problems


_KNOWN = {"numpy:ndarray", "torch:Tensor", "jax:Array"}  # arrays of which more is known than their shapes
# Each law, and the dtypes that it can be held to: 16 bits are rounded at every merge.
LAWS: dict[str, tuple[Law, tuple[str, ...]]] = {
    "neutral-element": (neutral_element, tuple(ITEMSIZE)),
    "commutativity": (commutativity, tuple(ITEMSIZE)),
    "associativity": (associativity, ("float32", "float64")),
    "split-of-the-keys": (split_of_the_keys, ("float32",)),
    "permutations": (permutations, tuple(ITEMSIZE)),
    "output-alone": (output_alone, tuple(ITEMSIZE)),
    "some-tokens": (some_tokens, tuple(ITEMSIZE)),
    "states-by-row": (states_by_row, tuple(ITEMSIZE)),
    "sinks": (sinks, tuple(ITEMSIZE)),
    "eight-bits": (eight_bits, tuple(EIGHT_BITS)),
}


def laws(backend: Any) -> Iterator[Check]:
    """List the laws for a backend."""
    takes = backend.capabilities
    for name, (law, dtypes) in LAWS.items():
        for dtype in dtypes:
            of_tokens = name in ("some-tokens", "states-by-row")
            merged = "float32" if name == "eight-bits" else dtype
            case = _of_tokens(backend, dtype) if of_tokens else _case(backend, merged)
            reasons = excluded_by(backend, case)
            if not reasons and name in ("commutativity", "permutations", "some-tokens", "states-by-row") and keeps_lse(backend):
                reasons = ["statistics lse: the same bits are not promised"]
            elif not reasons and (of_tokens or name in ("sinks", "eight-bits")) and not _KNOWN & {*takes.array_types}:
                reasons = ["array types of its own: rows of NumPy arrays, torch tensors and JAX arrays are chosen"]
            elif not reasons and (of_tokens or name in ("output-alone", "sinks", "eight-bits")) and not takes.deterministic:
                reasons = ["deterministic False: the same bits are not promised"]
            elif not reasons and name == "commutativity" and takes.tolerance != 1:
                reasons = [f"tolerance {takes.tolerance:g}: the same bits are not promised"]
            elif not reasons and name == "permutations" and "BSND" not in takes.layouts:
                reasons = ["layout BSND is not one of its layouts"]
            elif not reasons and name == "eight-bits" and find_spec("ml_dtypes") is None:
                reasons = ["ml_dtypes is not installed: NumPy has no outputs of eight bits"]
            yield Check(f"algebra/{name}-{dtype}", partial(law, backend, dtype), reasons)
