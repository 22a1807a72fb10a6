"""Sizes, states and backends."""

import os

import numpy as np

import rau

LARGE = os.environ.get("RAU_BENCH_LARGE", "") not in ("", "0")
BACKENDS = rau.registry.names()
DTYPES = ["float32", "bfloat16", "float16"]

# layout, order of TND statistics, lengths of the sequences (S and B elsewhere), heads, head dimension.
SMALL = {
    "SBH 1x1024x32x128": ("SBH", "TND", (1024, 1), 32, 128),  # MindSpeed's, shorter: three float32 states are 57 MB
    "BSND 2x512x16x128": ("BSND", "TND", (512, 2), 16, 128),
    "BNSD 2x512x16x128": ("BNSD", "TND", (512, 2), 16, 128),
    "TND 256x4x64": ("TND", "TND", (256,), 4, 64),  # vLLM's smallest
    "TND packed 2432x8x128": ("TND", "SBH", (256, 512, 640, 1024), 8, 128),  # MindSpeed's sub-sequences
}
BEYOND_64_MB = {
    "SBH 1x8192x32x128": ("SBH", "TND", (8192, 1), 32, 128),
    "SBH 1x8192x64x128": ("SBH", "TND", (8192, 1), 64, 128),
    "SBH 1x32768x32x128": ("SBH", "TND", (32768, 1), 32, 128),
    "SBH 1x65536x32x128": ("SBH", "TND", (65536, 1), 32, 128),  # 16-bit only fits into 8 GB
    "TND packed 2432x32x128": ("TND", "SBH", (256, 512, 640, 1024), 32, 128),
    "TND 4096x16x128": ("TND", "TND", (4096,), 16, 128),
    "TND 4096x64x256": ("TND", "TND", (4096,), 64, 256),
}
SHAPES = SMALL | BEYOND_64_MB if LARGE else SMALL
_MOST = 8 << 30  # bytes of all the arrays of a call with fresh outputs


class EachBackend:
    """Base of what is measured for every backend: n/a where one is not available, which is found out once."""

    def setup_cache(self):
        return {one.name: one.reason for one in rau.registry.status() if not one.available}

    def load(self, missing, name):
        if name in missing:
            raise NotImplementedError(missing[name])
        return rau.registry.get(name)


def core():
    """The compiled core's backend; n/a without it."""
    try:
        return rau.registry.get("cython")
    except rau.RauError as error:
        raise NotImplementedError("no compiled core") from error


def states(shape, dtype, count=3):
    """Make states, and the call's further arguments. Nothing but the arrays is ever allocated at their size."""
    layout, order, lengths, heads, head_dim = shape
    tnd = layout == "TND"
    tokens, batch = (sum(lengths), 1) if tnd else lengths
    item = 4 if dtype == "float32" else 2
    if (count + 1) * tokens * batch * heads * (head_dim * item + 64) > _MOST:
        raise NotImplementedError("more than 8 GB")
    if dtype == "bfloat16":
        try:
            from ml_dtypes import bfloat16 as dtype
        except ImportError as error:
            raise NotImplementedError("bfloat16 NumPy arrays need ml_dtypes") from error
    attn_shape = {
        "SBH": (tokens, batch, heads * head_dim),
        "BSND": (batch, tokens, heads, head_dim),
        "BNSD": (batch, heads, tokens, head_dim),
        "TND": (tokens, heads, head_dim),
    }[layout]
    stats_shape = (tokens, heads, 8) if tnd else (batch, heads, tokens, 8)
    random = np.random.default_rng(0)
    made = []
    for _ in range(count):
        state = rau.AttentionState(np.empty(attn_shape, dtype), *np.empty((2, *stats_shape), np.float32))
        # Random along the last axis but one: as good as any to a kernel that branches on no value.
        state.attn_out[:] = random.standard_normal(attn_shape[-1], dtype=np.float32)
        state.softmax_max[:] = random.standard_normal((stats_shape[-2], 1), dtype=np.float32)
        state.softmax_sum[:] = random.uniform(1, 9, (stats_shape[-2], 1))
        made.append(state)
    options = {"layout": layout, "profile": "portable"}
    if tnd:
        options |= {"actual_seq_qlen": np.cumsum((0, *lengths)), "softmax_layout": order}
    return made, options


def update(backend, how, arrays, options):
    """A function that makes one call and waits for its result; n/a where the backend does not take it."""
    prev, cur, out = (rau.AttentionState(*map(backend.asarray, state)) for state in arrays)
    target = {"out=": out, "fresh": None, "in place": prev}[how]

    def call():
        rau.ring_attention_update(*prev, *cur, out=target, backend=backend, **options)
        backend.synchronize()

    try:
        call()
    except rau.UnsupportedError as error:
        raise NotImplementedError(str(error).partition("\n")[0]) from error
    return call
