"""Attention states for tests that are not about numbers: random, valid, C-contiguous."""

import ml_dtypes
import numpy as np

import rau

NAMES = (
    "prev_attn_out", "prev_softmax_max", "prev_softmax_sum", "cur_attn_out", "cur_softmax_max", "cur_softmax_sum",
)  # fmt: skip


def state(shape, stats_shape, dtype="float32", seed=0):
    """Make one state; statistics of `stats_shape`, whose last axis holds equal lanes."""
    rng = np.random.default_rng(seed)
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    stats_dtype = "float64" if dtype == "float64" else "float32"

    def lanes(rows):
        return np.repeat(rows.astype(stats_dtype), stats_shape[-1], axis=-1)

    rows = (*stats_shape[:-1], 1)
    return rau.AttentionState(
        rng.normal(size=shape).astype(dtype), lanes(rng.normal(size=rows)), lanes(rng.uniform(1, 9, size=rows))
    )


def sbh(S=4, B=2, N=3, D=8, *, lanes=8, dtype="float32", seed=0):
    return state((S, B, N * D), (B, N, S, lanes), dtype, seed)


def tnd(T=8, N=2, D=64, *, lanes=8, dtype="float32", seed=0):
    return state((T, N, D), (T, N, lanes), dtype, seed)


def arguments(make=sbh, **sizes):
    """The six arrays of a call, by name."""
    return dict(zip(NAMES, (*make(**sizes, seed=1), *make(**sizes, seed=2)), strict=True))


def bits(arrays):
    """What the arrays hold, to compare: NaN and the sign of zero count."""
    return [np.asarray(array).tobytes() for array in arrays]
