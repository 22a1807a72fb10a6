"""Numbers to fill attention states with, from what kernels emit to what breaks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rau.arrays.numpy_ import named_dtype
from rau.layouts import LAYOUTS
from rau.state import AttentionState
from rau.testing.reference.attention import partial_attention

Generator = np.random.Generator
Stats = list[np.ndarray]  # one (rows,) float64 array for each state
Fill = Callable[[Generator, Stats, Stats], None]


def _rows(rng: Generator, stats: Stats, share: float) -> list[np.ndarray]:
    """For each state, which rows to touch: in some rows one state alone, in some several, in some all."""
    count = len(stats[0])
    picked = [rng.random(count) < share for _ in stats]
    everywhere = rng.random(count) < share / 3
    return [rows | everywhere for rows in picked]


def _put(rng: Generator, stats: Stats, values: list[float], share: float = 0.25) -> None:
    for part, rows in zip(stats, _rows(rng, stats, share), strict=True):
        part[rows] = rng.choice(values, size=int(rows.sum()))


def _empty(rng: Generator, maxima: Stats, sums: Stats) -> None:
    """Both ways to be empty, with anything in the other number."""
    for maximum, total, rows in zip(maxima, sums, _rows(rng, maxima, 0.3), strict=True):
        way = rng.integers(0, 3, len(rows))
        anything = rng.choice([np.nan, np.inf, 0.0, -1.0, 5.0], size=len(rows))
        total[rows & (way == 0)] = rng.choice([0.0, -0.0])
        maximum[rows & (way == 0)] = anything[rows & (way == 0)]
        maximum[rows & (way == 1)] = -np.inf
        total[rows & (way == 1)] = anything[rows & (way == 1)]
        maximum[rows & (way == 2)] = -np.inf
        total[rows & (way == 2)] = 0.0


def _equal_maxima(rng: Generator, maxima: Stats, sums: Stats) -> None:
    for maximum in maxima[1:]:
        maximum[:] = maxima[0]


def _balanced(rng: Generator, maxima: Stats, sums: Stats) -> None:
    """Weights alike although the maxima lie far apart: where the rounding of a difference counts most.

    The sums make up for the gaps, which reach as far as float32's range allows, and in a third of the rows as float64's.
    """
    count = len(maxima[0])
    top = rng.choice([-1.0, 1.0], count) * 10.0 ** rng.uniform(-8.0, 8.0, count)
    gaps = rng.uniform(0.0, 170.0, (len(maxima), count)) * rng.choice([1.0, 1.0, 4.0], count)
    gaps[rng.integers(0, len(maxima), count), np.arange(count)] = 0.0
    for maximum, total, gap in zip(maxima, sums, gaps, strict=True):
        maximum[:] = top - gap
        total[:] = rng.uniform(1.0, 4.0, count) * np.exp(gap - gaps.max(axis=0) / 2)


def _extremes(rng: Generator, maxima: Stats, sums: Stats) -> None:
    """Outside the domain of float64's bound: sums that overflow, or are subnormal, and a half that is lost below -708."""
    _put(rng, sums, [1e308, 1.5e308, 5e-324, 1e-310, 1e-300], 0.6)
    for maximum, rows in zip(maxima, _rows(rng, maxima, 0.3), strict=True):
        maximum[rows] = -rng.uniform(700.0, 716.0, int(rows.sum()))


# Where float32's and float64's exponentials end, and far beyond.
_HUGE = [-1e4, 1e4, 3e38, -3e38, 87.0, -87.0, 104.0, 708.0, -708.0]

# What may be done to ordinary statistics (maxima around 0, sums between 1 and 100).
STATISTICS: dict[str, Fill] = {
    "ordinary": lambda rng, maxima, sums: None,
    "empty": _empty,
    "nan-max": lambda rng, maxima, sums: _put(rng, maxima, [np.nan]),
    "nan-sum": lambda rng, maxima, sums: _put(rng, sums, [np.nan]),
    "infinite-max": lambda rng, maxima, sums: _put(rng, maxima, [np.inf, -np.inf]),
    "infinite-sum": lambda rng, maxima, sums: _put(rng, sums, [np.inf]),
    "huge-gaps": lambda rng, maxima, sums: _put(rng, maxima, _HUGE, 0.5),
    "balanced": _balanced,
    "extremes": _extremes,
    "equal-maxima": _equal_maxima,
    "negative-maxima": lambda rng, maxima, sums: _put(rng, maxima, [-50.0, -1e3, -1e30], 1.0),
    "zero-maxima": lambda rng, maxima, sums: _put(rng, maxima, [0.0, -0.0], 0.7),
    "subnormal-sums": lambda rng, maxima, sums: _put(rng, sums, [1e-45, 3e-42, 1e-38], 0.5),
    "subnormal-weights": lambda rng, maxima, sums: _put(rng, maxima, [-88.0, -95.0, -100.0, -103.5, -104.5], 0.5),
    "large-sums": lambda rng, maxima, sums: _put(rng, sums, [3e38, 1e38, 1e-38], 0.5),
    "negative-sums": lambda rng, maxima, sums: _put(rng, sums, [-1.0, -2.5, 1.0], 0.4),
}


def _outputs(values: list[float], share: float) -> Callable[[Generator, np.ndarray], None]:
    def fill(rng: Generator, output: np.ndarray) -> None:
        rows = rng.random(output.shape) < share
        output[rows] = rng.choice(values, size=int(rows.sum()))

    return fill


# What may be done to ordinary outputs (normally distributed).
OUTPUTS: dict[str, Callable[[Generator, np.ndarray], None]] = {
    "ordinary": lambda rng, output: None,
    "special": _outputs([np.nan, np.inf, -np.inf, 0.0, -0.0], 0.1),
    "signed-zeros": _outputs([0.0, -0.0], 0.6),
    "tiny": _outputs([1e-45, -3e-42, 1e-38, 6e-8, -5e-5], 0.6),
    "large": _outputs([6.5e4, -6.5e4, 3e4, 1e4], 0.5),
    "cancelling": _outputs([1.0, -1.0], 1.0),
}


def fill_statistics(rng: Generator, kind: str, states: int, rows: int) -> tuple[Stats, Stats]:
    """Make maxima and sums of a kind of :data:`STATISTICS`: for each state a (rows,) array of float64."""
    maxima = [rng.normal(0.0, 3.0, rows) for _ in range(states)]
    sums = [rng.uniform(1.0, 100.0, rows) for _ in range(states)]
    STATISTICS[kind](rng, maxima, sums)
    return maxima, sums


def fill_output(rng: Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Make one state's output of a kind of :data:`OUTPUTS`, in float32."""
    output = rng.standard_normal(shape, dtype=np.float32)
    OUTPUTS[kind](rng, output)
    return output


def attention(
    rng: Generator, shape: tuple[int, ...], lengths: Sequence[int], dtypes: Sequence[str], lanes: int, *, layout: str,
    softmax_layout: str,
) -> list[AttentionState]:  # fmt: skip
    """Make real partial states: causal attention of queries of a shape to consecutive parts of their keys.

    Early queries do not see the later parts: their rows are empty.
    """
    queries, made = rng.standard_normal(shape), []
    axis = LAYOUTS[layout].attn_token
    for k, dtype in enumerate(dtypes):
        ends: dict[str, list[int]] = {}
        counts = rng.integers(0, 6, len(lengths)) if layout == "TND" else [int(rng.integers(1, 6))]
        if layout == "TND":
            ends = {"actual_seq_qlen": cumulative(lengths).tolist(), "actual_seq_kvlen": cumulative(counts).tolist()}
        positions = np.concatenate([[], *(3 * k + np.arange(n) for n in counts)]).astype(np.int64)
        their_shape = tuple(len(positions) if a == axis else n for a, n in enumerate(shape))
        keys, values = rng.standard_normal(their_shape), rng.standard_normal(their_shape)
        attn_out, *stats = partial_attention(
            queries, keys, values, causal=True, layout=layout, softmax_layout=softmax_layout, key_positions=positions,
            dtype=dtype, **ends,
        )  # fmt: skip
        made.append(AttentionState(attn_out, *(part[..., :lanes] for part in stats)))
    return made


def flash(rng: Generator, shape: tuple[int, ...], dtypes: Sequence[str], lanes: int) -> list[AttentionState]:
    """Make the partial states that torch's FlashAttention returns on the CPU, of queries (B, N, S, D).

    It hands out a natural log-sum-exp, in softmax_max here, with a softmax_sum of 1.
    """
    import torch  # this kind of numbers alone needs it

    batch, heads, tokens, head_dim = shape
    dtype = getattr(torch, dtypes[0])

    def draw(count: int) -> Any:
        return torch.from_numpy(rng.standard_normal((batch, heads, count, head_dim))).to(dtype)

    queries, made = draw(tokens), []
    for name in dtypes:
        keys = int(rng.integers(1, 20))
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, draw(keys), draw(keys))
        bits = output.contiguous().view(torch.uint16 if dtype.itemsize == 2 else torch.int32).numpy()
        stats = lse.float().contiguous().numpy()[..., None].repeat(lanes, axis=-1)
        made.append(AttentionState(bits.view(named_dtype(name)), stats, np.ones_like(stats)))
    return made


def cumulative(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where sequences end, from 0 on: int64, (sequences + 1,)."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
