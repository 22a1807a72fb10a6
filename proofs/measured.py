"""The largest errors seen, beside the bounds that are proven, and of what rests on a library's logarithm, where nothing is.

    python proofs/measured.py                     # a million cases each, half a minute
    python proofs/measured.py --cases 60000000    # in slabs: hours of one core

Prints a line for each quantity: the largest error seen and what the documentation allows. Exits 1 where one is larger. What is
right is computed in double-double arithmetic (rau/testing/reference/doubledouble.py), good to some 100 bits.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import numpy as np

import rau
from rau.arithmetic import BOUND, exp_nonpositive
from rau.testing import compare, oracle
from rau.testing.reference import doubledouble as dd

U = 2.0**-53
SLAB = 1 << 18  # cases at a time: their temporaries stay within some hundred megabytes
Measured = tuple[float, float]  # the largest error seen, and what is allowed


def logarithm(x: np.ndarray) -> dd.Pair:
    """ln(x) of positive numbers: the library's, and what it lacks by one step of Newton's method, good to 2^-100."""
    near = np.log(x)
    high, low, power = dd.exponential((-near, np.zeros_like(near)))
    mantissa, exponent = np.frexp(x)
    product = dd.multiply((high, low), (mantissa, np.zeros_like(mantissa)))
    scale = exponent + power  # x exp(-near) is close to 1
    lacking = dd.add((np.ldexp(product[0], scale), np.ldexp(product[1], scale)), (-np.ones_like(x), np.zeros_like(x)))
    return dd.add((near, np.zeros_like(near)), (lacking[0], lacking[1] - lacking[0] ** 2 / 2))


def exponential(rng: np.random.Generator, count: int) -> Measured:
    """The exponential itself, in units of 2^-53 of it."""
    x = -rng.uniform(0, 708, count)
    got = exp_nonpositive(x)
    high, low, power = dd.exponential((x, np.zeros_like(x)))
    return float(np.abs((np.ldexp(got, -power) - high - low) / high).max() / U), BOUND


def float64_rows(gap: float) -> Callable[[np.random.Generator, int], Measured]:
    """Elements of a float64 merge of maxima some `gap` apart whose weights are alike, as a share of their bound."""

    def measure(rng: np.random.Generator, count: int) -> Measured:
        top = rng.normal(0, 1, count)
        maxima = top - gap * rng.uniform(0.98, 1.02, count), top
        sums = np.exp(maxima[1] - maxima[0] - gap / 2) * rng.uniform(0.5, 2, count), np.full(count, np.exp(-gap / 2))
        states = [
            (rng.standard_normal((count, 1, 1)), maximum[:, None, None], total[:, None, None])
            for maximum, total in zip(maxima, sums, strict=True)
        ]
        merged = rau.merge_states(states, layout="TND", backend="numpy")
        verdict = compare(merged, oracle(states, layout="TND"))
        return max(verdict.attn_share, verdict.sum_share), 1.0

    return measure


def log_sum_exp(dtype: str, base: str, kind: str) -> Callable[[np.random.Generator, int], Measured]:
    """AttentionState.lse, as a share of what its docstring says."""

    def measure(rng: np.random.Generator, count: int) -> Measured:
        m = (rng.choice([-1.0, 1.0], count) * 10.0 ** rng.uniform(-3, 4, count)).astype(dtype)
        l = rng.uniform(1, 1e5, count).astype(dtype)
        near = rng.random(count) < 0.5  # m and log(l) cancel
        m[near] = (-np.log(l) * (1 + 1e-3 * rng.normal(0, 1, count)))[near].astype(dtype)
        got = _lse(m, l, base, kind).astype(np.float64)
        exact = dd.add(logarithm(l.astype(np.float64)), (m.astype(np.float64), np.zeros(count)))
        if base == "2":
            exact = dd.divide(exact, logarithm(np.full(count, 2.0)))
        size = np.abs(exact[0])
        own = np.spacing(size.astype(dtype)).astype(np.float64) / 2 if dtype == "float32" else 2.0**-51 * size
        allowed = own + 2.0**-52 * np.abs(m.astype(np.float64))
        return float((np.abs(got - exact[0] - exact[1]) / allowed).max()), 1.0

    return measure


def round_trip(dtype: str, kind: str) -> Callable[[np.random.Generator, int], Measured]:
    """From a log-sum-exp to base 2 into a state and back, as a share of what from_lse promises."""

    def measure(rng: np.random.Generator, count: int) -> Measured:
        lse = (rng.choice([-1.0, 1.0], count) * 2.0 ** rng.uniform(-10, 40, count)).astype(dtype)
        state = rau.AttentionState.from_lse(*_arrays(kind, np.zeros((count, 1, 1), dtype), lse[:, None]), base="2",
                                            layout="TND", lse_layout="TN")  # fmt: skip
        back = np.asarray(state.lse(base="2", layout="TND", lse_layout="TN"))[:, 0]
        size = np.abs(lse.astype(np.float64))
        allowed = 2.0**-51 * size
        if dtype == "float32":
            allowed = np.where(size < 2, 2.0**-23, np.where(size <= 2.0**30, 0, np.spacing(np.abs(lse)).astype(np.float64)))
        error = np.abs(back.astype(np.float64) - lse.astype(np.float64))
        return float(np.where(error == 0, 0, error / np.where(allowed == 0, 2.0**-200, allowed)).max()), 1.0

    return measure


def narrowed(base: str) -> Callable[[np.random.Generator, int], Measured]:
    """A float64 log-sum-exp in the float32 statistics of a narrower output, m + log(l), as a share of what from_lse promises."""

    def measure(rng: np.random.Generator, count: int) -> Measured:
        lse = rng.choice([-1.0, 1.0], count) * 2.0 ** rng.uniform(-20, 30, count)
        state = rau.AttentionState.from_lse(np.zeros((count, 1, 1), np.float32), lse[:, None], base=base, layout="TND",
                                            lse_layout="TN")  # fmt: skip
        m, l = (np.asarray(part)[:, 0, 0].astype(np.float64) for part in state[1:])
        exact = lse if base == "e" else lse * np.log(2.0)
        low, high = logarithm(l)[::-1]
        rest = dd.add((m, np.zeros(count)), (high, low))
        error = np.abs(dd.add(rest, (-exact, np.zeros(count)))[0])
        allowed = 2.0**-24 + (0 if base == "e" else 2.0**-52 * np.abs(lse))
        return float((error / allowed).max()), 1.0

    return measure


def to_base_2(rng: np.random.Generator, count: int) -> Measured:
    """A float32 maximum and sum to base 2, m + log(l), as a share of what from_max_sum promises."""
    maximum = (rng.choice([-1.0, 1.0], count) * 2.0 ** rng.uniform(-20, 30, count)).astype(np.float32)
    total = (2.0 ** rng.uniform(-30, 30, count)).astype(np.float32)
    state = rau.AttentionState.from_max_sum(np.zeros((count, 1, 1), np.float32), maximum[:, None], total[:, None], base="2",
                                            layout="TND", stats_layout="TN")  # fmt: skip
    m, l = (np.asarray(part)[:, 0, 0].astype(np.float64) for part in state[1:])
    natural = maximum.astype(np.float64) * np.log(2.0)
    given = total.astype(np.float64)
    error = np.abs((m - natural) + np.log(l / given))
    return float((error / (2.0**-24 + 2.0**-52 * np.abs(m))).max()), 1.0


def _arrays(kind: str, *arrays: np.ndarray) -> Iterator[object]:
    if kind == "numpy":
        return iter(arrays)
    import torch

    return map(torch.from_numpy, arrays)


def _lse(m: np.ndarray, l: np.ndarray, base: str, kind: str) -> np.ndarray:
    state = rau.AttentionState(*_arrays(kind, np.zeros((len(m), 1, 1), m.dtype), m[:, None, None], l[:, None, None]))
    return np.asarray(state.lse(base=base, layout="TND", lse_layout="TN"))[:, 0]


def quantities() -> Iterator[tuple[str, Callable[[np.random.Generator, int], Measured]]]:
    """Name what is measured."""
    yield "exponential, in units of 2^-53", exponential
    for gap in (1, 170, 350, 600):
        yield f"float64 merge, maxima {gap} apart, share of its bound", float64_rows(gap)
    for base in ("e", "2"):
        yield f"from_lse, base {base}, float64 beside float32, share of what is said", narrowed(base)
    yield "from_max_sum, base 2, share of what is said", to_base_2
    for kind in ["numpy", *(["torch"] if find_spec("torch") else [])]:
        for dtype in ("float32", "float64"):
            for base in ("e", "2"):
                yield f"lse, base {base}, {dtype}, {kind}, share of what is said", log_sum_exp(dtype, base, kind)
            yield f"from_lse and lse, base 2, {dtype}, {kind}, share of what is said", round_trip(dtype, kind)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10**6, help="of each quantity (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{options.cases} cases each, seed {options.seed}; {platform.machine()}, NumPy {np.__version__}", flush=True)
    worse = 0
    for name, measure in quantities():
        rng, largest, allowed = np.random.default_rng(options.seed), 0.0, 0.0
        for start in range(0, options.cases, SLAB):
            seen, allowed = measure(rng, min(SLAB, options.cases - start))
            largest = max(largest, seen)
        wrong = not largest <= allowed
        worse += wrong
        print(f"{largest:8.3f} of {allowed:4g}  {name}{'   LARGER THAN ALLOWED' if wrong else ''}", flush=True)
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main())
