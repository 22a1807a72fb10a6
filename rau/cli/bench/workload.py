"""What is measured: sizes that users of the operator have, states of random numbers, and the memory there is for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rau.memory import aligned
from rau.state import AttentionState

DTYPES = ("float32", "bfloat16", "float16")
HOW = ("out=", "fresh", "in place")
_PATTERN = 1 << 18  # random numbers, repeated: drawing as many as a large array has takes longer than merging them


class Size(NamedTuple):
    """A size; `lengths` are those of the sequences, one in SBH, where the batch is 1.

    Attributes
    ----------
    title : str
    layout, softmax_layout : str
    lengths : tuple of int
    heads, head_dim : int
    """

    title: str
    layout: str
    softmax_layout: str
    lengths: tuple[int, ...]
    heads: int
    head_dim: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of a call."""
        options: dict[str, Any] = {"layout": self.layout, "profile": "portable"}
        if self.layout == "TND":
            ends = np.cumsum((0, *self.lengths), dtype=np.int64)
            options |= {"softmax_layout": self.softmax_layout, "actual_seq_qlen": ends}
        return options

    def state_bytes(self, dtype: str) -> int:
        """Bytes of one state: an output element for each of D, and two statistics of 8 lanes, a token and head."""
        item = 4 if dtype == "float32" else 2
        return self.tokens * self.heads * (self.head_dim * item + 2 * 8 * 4)

    def fitted(self, memory: int) -> Size:
        """Halve the tokens until everything that is measured beside each other fits into some memory.

        Parameters
        ----------
        memory : int
            Bytes. Three states, a fresh one, three arrays of the roof and the temporaries of the backends and peers that
            make some come to less than 16 float32 outputs.

        Returns
        -------
        Size
        """
        size = self
        while size.tokens > len(size.lengths) and 16 * 4 * size.tokens * size.heads * size.head_dim > memory:
            size = size._replace(lengths=tuple(max(1, length // 2) for length in size.lengths))
        return size

    def __str__(self) -> str:
        if self.layout == "SBH":
            return f"SBH, S {self.tokens}, N {self.heads}, D {self.head_dim}"
        order = "packed" if self.softmax_layout == "SBH" else "token-major"
        many = f" in {len(self.lengths)} sequences" if len(self.lengths) > 1 else ""
        return f"TND {order}, T {self.tokens}{many}, N {self.heads}, D {self.head_dim}"


# MindSpeed's shapes, its sub-sequences, one of vLLM's, one that the caches of most CPUs hold, and next to nothing.
LARGE = Size("large", "SBH", "TND", (8192,), 32, 128)
SEQUENCES = Size("sequences", "TND", "SBH", (256, 512, 640, 1024), 32, 128)
SERVING = Size("serving", "TND", "TND", (4096,), 16, 128)
CACHED = Size("in the cache", "SBH", "TND", (1024,), 8, 64)
SMALLEST = Size("smallest", "SBH", "TND", (16,), 8, 64)


def dtypes() -> tuple[str, ...]:
    """Those of `DTYPES` that can be had here."""
    return tuple(dtype for dtype in DTYPES if not lacking(dtype))


def lacking(dtype: str) -> str:
    """Say what is missing for NumPy arrays of a dtype; nothing where nothing is."""
    if dtype == "bfloat16":
        try:
            import ml_dtypes  # noqa: F401
        except ImportError:
            return "bfloat16 NumPy arrays need ml_dtypes: pip install ml_dtypes"
    return ""


def states(size: Size, dtype: str, count: int, seed: int = 0) -> list[AttentionState]:
    """Make states of random numbers, as NumPy arrays, aligned to 64 bytes as those that rau allocates.

    Parameters
    ----------
    size : Size
    dtype : str
        Of the outputs; one of :func:`dtypes`.
    count : int
    seed : int, default 0

    Returns
    -------
    list of AttentionState
    """
    if dtype == "bfloat16":
        import ml_dtypes  # noqa: F401 - NumPy then knows the name
    kind = np.dtype(dtype)
    random = np.random.default_rng(seed)
    tokens, heads, head_dim = size.tokens, size.heads, size.head_dim
    tnd = size.layout == "TND"
    attn_shape = (tokens, heads, head_dim) if tnd else (tokens, 1, heads * head_dim)
    stats_shape = (tokens, heads, 8) if tnd else (1, heads, tokens, 8)
    rows = tokens * heads
    made = []
    for _ in range(count):
        pattern = random.standard_normal(min(_PATTERN, rows * head_dim), dtype=np.float32).astype(kind)
        maximum = random.standard_normal(rows, dtype=np.float32)
        total = random.uniform(1, 9, rows).astype(np.float32)
        state = AttentionState(aligned(attn_shape, kind), aligned(stats_shape, "f4"), aligned(stats_shape, "f4"))
        state.attn_out[...] = np.resize(pattern, attn_shape)
        state.softmax_max.reshape(rows, 8)[...] = maximum[:, None]
        state.softmax_sum.reshape(rows, 8)[...] = total[:, None]
        made.append(state)
    return made


def modes(size: Size, backend: Any, arrays: list[AttentionState]) -> dict[str, Callable[[], object]]:
    """The ways to call a backend, by their names in `HOW`, each as a function that waits for the result.

    Parameters
    ----------
    size : Size
    backend : Backend
    arrays : list of AttentionState
        prev, cur, and one to write into; the backend's own arrays.
    """
    import rau

    prev, cur, out = arrays
    options = size.options
    wait = backend.synchronize

    def update(target: AttentionState | None) -> Callable[[], object]:
        def call() -> None:
            rau.ring_attention_update(*prev, *cur, out=target, backend=backend, **options)
            wait()

        return call

    return dict(zip(HOW, (update(out), update(None), update(prev)), strict=True))


def available_memory() -> int:
    """Bytes that may be filled without pushing anybody else's out; 1 GiB where the system does not say."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    except (OSError, StopIteration, ValueError, IndexError):
        try:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
        except (AttributeError, OSError, ValueError):
            pass
    try:  # a container's own limit
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        found.append(max(limit - used, 0))
    except (OSError, ValueError):  # none; "max" is no number
        pass
    return min(found, default=1 << 30)
