"""What is measured, by ``python -m rau bench``, by asv and on a GPU: sizes that users have, and states of random numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from rau.arrays.memory import aligned
from rau.arrays.numpy_ import named_dtype
from rau.cli.bench.timing import Call
from rau.layouts import shapes
from rau.state import AttentionState
from rau.update import ring_attention_update

DTYPES = ("float32", "bfloat16", "float16")
HOW = ("out=", "fresh", "in place")
_PATTERN = 1 << 18  # random numbers, repeated: drawing as many as a large array has takes longer than merging them


class Size(NamedTuple):
    """A size; `lengths` are those of the sequences in TND, S alone elsewhere."""

    layout: str
    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    softmax_layout: str = "TND"
    batch: int = 1

    @property
    def tokens(self) -> int:
        """All the batch's."""
        return self.batch * sum(self.lengths)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of a call."""
        options: dict[str, Any] = {"layout": self.layout, "softmax_layout": self.softmax_layout, "profile": "portable"}
        if self.softmax_layout == "SBH":  # others make no use of the lengths
            options["actual_seq_qlen"] = np.cumsum((0, *self.lengths), dtype=np.int64)
        return options

    def shapes(self, lanes: int = 8) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of attn_out and of the statistics."""
        return shapes(self.layout, self.batch, sum(self.lengths), self.heads, self.head_dim, lanes)

    def state_bytes(self, dtype: str) -> int:
        """Bytes of one state: an output element for each of D, and two statistics of 8 lanes, a token and head."""
        item = 4 if dtype == "float32" else 2
        return self.tokens * self.heads * (self.head_dim * item + 2 * 8 * 4)

    def __str__(self) -> str:
        if self.layout != "TND":
            batch = f"B {self.batch}, " if self.batch > 1 else ""
            return f"{self.layout}, {batch}S {self.lengths[0]}, N {self.heads}, D {self.head_dim}"
        order = "packed" if self.softmax_layout == "SBH" else "token-major"
        many = f" in {len(self.lengths)} sequences" if len(self.lengths) > 1 else ""
        return f"TND {order}, T {self.tokens}{many}, N {self.heads}, D {self.head_dim}"


# MindSpeed's shapes, its sub-sequences, one of vLLM's, a decode step of 32 sequences, one that the caches of most CPUs hold,
# and next to nothing.
LARGE = Size("SBH", (8192,), 32, 128)
SEQUENCES = Size("TND", (256, 512, 640, 1024), 32, 128, "SBH")
SERVING = Size("TND", (4096,), 16, 128)
DECODE = Size("TND", (32,), 32, 128)
CACHED = Size("SBH", (1024,), 8, 64)
SMALLEST = Size("SBH", (16,), 8, 64)


def lacking(dtype: str) -> str:
    """Say what is missing for NumPy arrays of a dtype; nothing where nothing is."""
    try:
        named_dtype(dtype)
    except ImportError as error:
        return str(error)
    return ""


def states(size: Size, dtype: str, count: int, lanes: int = 8) -> list[AttentionState]:
    """Make states of random numbers, as NumPy arrays, aligned to 64 bytes as those that rau allocates."""
    kind = named_dtype(dtype)
    random = np.random.default_rng(0)
    attn_shape, stats_shape = size.shapes(lanes)
    rows = size.tokens * size.heads
    made = []
    for _ in range(count):
        pattern = random.standard_normal(min(_PATTERN, rows * size.head_dim), dtype=np.float32).astype(kind)
        stats = "f8" if dtype == "float64" else "f4"
        state = AttentionState(aligned(attn_shape, kind), aligned(stats_shape, stats), aligned(stats_shape, stats))
        state.attn_out[...] = np.resize(pattern, attn_shape)
        state.softmax_max.reshape(rows, lanes)[...] = random.standard_normal((rows, 1), dtype=np.float32)
        state.softmax_sum.reshape(rows, lanes)[...] = random.uniform(1, 9, (rows, 1))
        made.append(state)
    return made


def modes(size: Size, backend: Any, arrays: list[AttentionState], wait: bool = True) -> dict[str, Call]:
    """The ways to call a backend, by their names in `HOW`, each as a function that may wait for the result.

    `arrays` are prev, cur and a state to write into, of the backend's own.
    """
    prev, cur, out = arrays
    options = size.options | {"backend": backend}
    if "actual_seq_qlen" in options:  # where the tensors are: it would be sent there at every call
        options["actual_seq_qlen"] = backend.asarray(options["actual_seq_qlen"])

    def update(target: AttentionState | None) -> Call:
        def call() -> None:
            ring_attention_update(*prev, *cur, out=target, **options)
            if wait:
                backend.synchronize()

        return call

    return dict(zip(HOW, (update(out), update(None), update(prev)), strict=True))
