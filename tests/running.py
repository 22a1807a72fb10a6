"""What a StreamingMerge should hold: a chain of ring_attention_update over the same tokens, kept as BSND rows."""

import ml_dtypes
import numpy as np

import rau

WIDE = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}


def partial(B, S, N, D, dtype="float32", seed=0, *, lanes=8, awkward=True):
    """A BSND state; where `awkward`, with empty rows of both sorts and NaN behind them, and weights that vanish."""
    rng = np.random.default_rng(seed)
    stats = "float64" if dtype == "float64" else "float32"
    maximum, total = rng.normal(size=(B, N, S)) * 3, rng.uniform(0.5, 9, size=(B, N, S))
    attn_out = rng.normal(size=(B, S, N, D))
    if awkward:
        kind = rng.integers(0, 12, size=(B, N, S))
        total[kind == 0], maximum[kind == 1], maximum[kind == 2] = 0.0, -np.inf, -2000.0
        attn_out[(kind <= 1).swapaxes(1, 2)] = np.nan
    lane = (np.repeat(part[..., None].astype(stats), lanes, -1) for part in (maximum, total))
    return rau.AttentionState(attn_out.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype), *lane)


def laid_out(state, layout, packed=False):
    """A BSND state in another layout, in fresh arrays; in TND a sequence for each batch entry."""
    attn_out, *stats = state
    B, S, N, D = attn_out.shape
    if layout == "SBH":
        attn_out = attn_out.swapaxes(0, 1).reshape(S, B, N * D)
    elif layout == "BNSD":
        attn_out = attn_out.swapaxes(1, 2)
    elif layout == "TND":
        attn_out = attn_out.reshape(B * S, N, D)
        stats = [(part if packed else part.swapaxes(1, 2)).reshape(B * S, N, part.shape[-1]) for part in stats]
    return rau.AttentionState(attn_out.copy(), *(part.copy() for part in stats))


def joined(states):
    """TND states of some sequences, one after another; packed statistics stay packed."""
    return rau.AttentionState(*(np.concatenate(parts) for parts in zip(*states, strict=True)))


class Chain:
    """The expected running state: float32 BSND arrays, merged row by row of tokens, by NumPy."""

    def __init__(self, B, S, N, D, dtype="float32", lanes=8):
        stats = WIDE[dtype]
        self.state = rau.AttentionState(
            np.zeros((B, S, N, D), stats), np.full((B, N, S, lanes), -np.inf, stats), np.zeros((B, N, S, lanes), stats)
        )

    def update(self, cur, tokens=slice(None)):
        places = self.state.attn_out[:, tokens], self.state.softmax_max[:, :, tokens], self.state.softmax_sum[:, :, tokens]
        merged = rau.ring_attention_update(*places, *cur, layout="BSND", profile="portable", backend="numpy")
        for place, values in zip(places, merged, strict=True):
            place[...] = values


def half(which, S):
    """The slice that "front" or "back" means."""
    return {"front": slice(0, S // 2), "back": slice(S // 2, S)}[which]


def own(backend, state):
    """NumPy arrays as a backend's own."""
    return rau.AttentionState(*(backend.asarray(np.asarray(part)) for part in state))


def on_host(backend, state):
    backend.synchronize()
    return rau.AttentionState(*(np.array(backend.to_numpy(part)) for part in state))


def same(result, expected):
    """Assert the same bits, save that any NaN equals any NaN."""
    for mine, its in zip(result, expected, strict=True):
        assert mine.dtype == its.dtype
        np.testing.assert_array_equal(mine, its)
        assert (np.signbit(mine) == np.signbit(its))[mine == mine].all()
