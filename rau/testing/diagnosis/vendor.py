"""The arithmetic of the vendor's operator, on a CPU: what a chip returns, NaN included, can be had without one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rau.backends import AttentionState, Backend, Capabilities, Problem
from rau.testing.diagnosis.steps import Steps


class VendorArithmetic(Backend):
    """Huawei's ring_attention_update as its kernel computes it, unrepaired: for NumPy arrays, and slow.

    Rows are float32 and nothing is guarded: a row without keys on both sides is 0 / 0, so NaN, and what an empty side holds is
    multiplied by 0. Element d of a row is weighted by lane d mod 8 of the statistics. The exponential is NumPy's, whose last
    bits are not a chip's: what agrees with one is where it has NaN, infinities and large errors. The backend `ascend` repairs
    all of this; this one fails where that one does.

    Examples
    --------
    >>> import numpy as np, rau
    >>> from rau.testing import VendorArithmetic
    >>> empty = rau.AttentionState(np.zeros((1, 1, 8), "f4"), np.full((1, 1, 1, 8), -np.inf, "f4"), np.zeros((1, 1, 1, 8), "f4"))
    >>> bool(np.isnan(rau.ring_attention_update(*empty, *empty, backend=VendorArithmetic()).attn_out).all())
    True
    >>> bool(np.isnan(rau.ring_attention_update(*empty, *empty).attn_out).any())
    False
    """

    name = "vendor"
    capabilities = Capabilities(
        array_types=("numpy:ndarray",), dtypes=("float16", "bfloat16", "float32"), mixed=False, layouts=("SBH", "TND"),
        lanes=(8,), tolerance=40.0,
    )  # fmt: skip

    def update(
        self, problem: Problem, prev: AttentionState, cur: AttentionState, out: AttentionState | None
    ) -> AttentionState:
        """Merge two states, rows in float32."""
        merged = vendors_merge(Steps((prev, cur), problem.actual_seq_qlen, problem.layout, problem.softmax_layout))
        if out is None:
            return merged
        for target, values in zip(out, merged, strict=True):
            target[...] = values
        return out


def vendors_merge(rows: Steps) -> AttentionState:
    """Merge two states as the vendor's kernel does."""
    maxima, sums = (part.astype(np.float32) for part in rows.lanes)
    with np.errstate(all="ignore"):
        maximum = np.maximum(*maxima)
        factors = sums * np.exp(maxima - maximum)
        total = factors[0] + factors[1]
        lane = np.arange(rows.outputs[0].shape[1]) % 8
        terms: Sequence[np.ndarray] = [w[:, lane] * out for w, out in zip(factors / total, rows.outputs, strict=True)]
        return rows.store(terms[0] + terms[1], maximum, total)
