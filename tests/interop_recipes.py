"""What each library hands out, made a state by from_lse and merged by a backend.

The reference does not know of any of it: one softmax over all the keys, in float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from rau import registry
from rau.arrays import kind_of
from rau.state import AttentionState
from rau.testing.cases import Case
from rau.testing.comparison import same_bits
from rau.testing.reference.attention import exact_attention, partial_attention
from rau.testing.reference.oracle import oracle
from rau.testing.trial import excluded_by
from rau.testing.trial.judge import folds, judge_values

_CUTS = (3, 7)  # of the keys: causal queries before a cut have no key in the parts after it


class Recipe(NamedTuple):
    """How a library hands out its partial attention."""

    layout: str
    lse_layout: str
    base: str
    inf_is_empty: bool = False  # it writes +inf for a row without keys


RECIPES = {
    "torch": Recipe("BNSD", "BNS", "e"),  # SDPA and flex attention
    "flash-attention": Recipe("BSND", "BNS", "e", inf_is_empty=True),
    "flash-attention-varlen": Recipe("TND", "NT", "e", inf_is_empty=True),  # and vLLM
    "flashinfer": Recipe("TND", "TN", "2"),
    "token-major": Recipe("BSND", "BSN", "e"),
    "token-major-base-2": Recipe("BNSD", "BSN", "2"),
    "sequence-first": Recipe("SBH", "BNS", "e"),
}


DTYPES = ("float32", "bfloat16")


def check_all(backend: Any) -> list[str]:
    """Check every recipe that a backend's capabilities do not exclude; there has to be one."""
    taken = [(name, dtype) for name in RECIPES for dtype in DTYPES if not excluded_by(backend, _case(RECIPES[name], dtype))]
    assert taken
    with registry.provisionally(backend):
        return [f"{name}: {problem}" for name, dtype in taken for problem in check_recipe(backend, RECIPES[name], dtype)]


def check_recipe(backend: Any, recipe: Recipe, dtype: str) -> list[str]:
    """Merge three parts of causal attention that come as a recipe says, and say what is wrong.

    With the merge, by the oracle; in float32 also with the whole way from outputs and log-sum-exp to attention over all the
    keys and its log-sum-exp.
    """
    case = _case(recipe, dtype)
    q, k, v = _inputs(case)
    parts = [_part(case, recipe, q, k, v, keys) for keys in np.split(np.arange(case.tokens), _CUTS)]
    options: dict[str, Any] = {"base": recipe.base, "layout": recipe.layout, "lse_layout": recipe.lse_layout}
    lanes = 1 if 1 in backend.capabilities.lanes else 8

    def states(convert: Any) -> list[AttentionState]:
        return [
            AttentionState.from_lse(*map(convert, part), **options, inf_is_empty=recipe.inf_is_empty, lanes=lanes)
            for part in parts
        ]

    numbers = states(np.asarray)
    own_kind = kind_of(backend.asarray(np.zeros(1, np.float32)))
    if own_kind is not None and own_kind.name in ("numpy", "torch"):
        own = states(backend.asarray)
    else:  # an array type of the backend's own, which from_lse does not know
        own = [AttentionState(*map(backend.asarray, map(np.ascontiguousarray, state))) for state in numbers]
    problems = [
        f"from_lse of NumPy arrays and of the backend's: {difference}"
        for one, other in zip(numbers, own, strict=True)
        for difference in same_bits(one, [np.asarray(backend.to_numpy(part)) for part in other])
    ]
    merged = case.call(own, None, backend)
    backend.synchronize()
    result = AttentionState(*(np.array(backend.to_numpy(part)) for part in merged))
    expected = oracle(numbers, case.lengths_argument(), case.layout)
    problems += judge_values(backend, case, numbers, result, expected).problems
    if dtype != "float32":
        return problems

    # One rounding of each output; of each log-sum-exp, twice in each weight; two more of each sum (base 2).
    exact = exact_attention(q, k, v, causal=True, layout=case.layout, actual_seq_qlen=case.lengths_argument())
    sizes = np.concatenate([np.abs(part[1][np.isfinite(part[1])]) for part in parts])
    largest = float(sizes.max()) * (np.log(2) if recipe.base == "2" else 1)
    merging = (4 if folds(backend, case) else 1) * backend.capabilities.tolerance
    allowed = (merging + (3 + 2 * largest) / (case.states + 1)) * expected.attn_bound
    allowed += 2.0**-24 * np.abs(exact.attn_out)  # where one part is alone the merge keeps its bits: a bound of 0
    share = float((np.abs(result.attn_out - exact.attn_out) / allowed).max())
    if not share <= 1:
        problems.append(f"attn_out is {share:.3g} times what is allowed away from attention over all the keys")
    apart = np.abs(result.lse(**options) - exact.lse(**options)).max()
    if not apart <= (merging * (case.states + 1) + 4 + 2 * largest) * 2.0**-24 / np.log(2):
        problems.append(f"the log-sum-exp is {apart:.3g} away from that over all the keys")
    return problems


def _case(recipe: Recipe, dtype: str) -> Case:
    single = recipe.layout == "TND"
    return Case(
        id=f"interop/{recipe.layout}", layout=recipe.layout, batch=1 if single else 2, tokens=10, lengths=(10,), heads=4,
        head_dim=64, dtype=dtype, states=3,
    )  # fmt: skip


def _inputs(case: Case) -> np.ndarray:
    """Queries, keys and values in the layout of a case."""
    B, S, N, D = case.batch, case.tokens, case.heads, case.head_dim
    shape = {"SBH": (S, B, N, D), "TND": (S, N, D), "BSND": (B, S, N, D), "BNSD": (B, N, S, D)}[case.layout]
    return np.random.default_rng(6).standard_normal((3, *shape))


def _part(
    case: Case, recipe: Recipe, q: np.ndarray, k: np.ndarray, v: np.ndarray, keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What a kernel hands out: the output over some of the keys and its log-sum-exp."""
    tokens = {"SBH": 0, "TND": 0, "BSND": 1, "BNSD": 2}[case.layout]
    lengths: dict[str, Any] = {}
    if case.layout == "TND":
        lengths = {"actual_seq_qlen": [0, case.tokens], "actual_seq_kvlen": [0, len(keys)]}
    out, maximum, total = partial_attention(
        q, k.take(keys, tokens), v.take(keys, tokens), causal=True, layout=case.layout, key_positions=keys,
        dtype=case.dtype, **lengths,
    )  # fmt: skip
    with np.errstate(divide="ignore"):
        lse = maximum[..., 0].astype(np.float64) + np.log(total[..., 0].astype(np.float64))
    if recipe.base == "2":
        lse /= np.log(2)
    if recipe.inf_is_empty:
        lse[lse == -np.inf] = np.inf
    if recipe.lse_layout in ("BSN", "NT"):
        lse = lse.swapaxes(-1, -2)
    return out, np.ascontiguousarray(lse, maximum.dtype)
