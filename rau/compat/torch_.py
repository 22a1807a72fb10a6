"""PyTorch's merger: `_SDPAMerger` of ``torch.distributed.tensor.experimental._context_parallel._attention``."""

from __future__ import annotations

from typing import Any

from rau.compat.pairs import check
from rau.compat.words import worded
from rau.constraints.rules import Violations
from rau.errors import shown
from rau.state import AttentionState
from rau.streaming import StreamingMerge

__all__ = ["_SDPAMerger"]


class _SDPAMerger:
    """Merge the local attention of one step after another.

    Parameters
    ----------
    convert_to_f32 : bool
        Of no effect: what runs is float32 whatever comes in, and rounded once, in :meth:`results`.
    seq_dim : {1, 2}
        Axis of the tokens in the outputs: 2 for (B, N, S, D), as torch's context parallelism has them, 1 for (B, S, N, D).

    Raises
    ------
    LayoutError
        For another axis.

    Examples
    --------
    >>> import numpy as np
    >>> merger = _SDPAMerger(True, seq_dim=2)
    >>> out, lse = np.ones((1, 2, 4, 8), np.float16), np.zeros((1, 2, 4), np.float32)
    >>> merger.step(out, lse, partial=False)
    >>> merger.step(3 * out[:, :, 2:], lse[:, :, 2:], partial=True)
    >>> merged, lse = merger.results()
    >>> merged[0, 0, :, 0].tolist(), merged.dtype, lse.shape
    ([1.0, 1.0, 2.0, 2.0], dtype('float16'), (1, 2, 4))
    """

    def __init__(self, convert_to_f32: bool, seq_dim: int) -> None:
        layout = {1: "BSND", 2: "BNSD"}.get(seq_dim)
        if layout is None:
            report = Violations("_SDPAMerger")
            report.add("layout", f"seq_dim = {shown(seq_dim)}; expected 2 for outputs (B, N, S, D), or 1 for (B, S, N, D). "
                       "Move the tokens to one of these axes.")  # fmt: skip
            raise report.error()
        self._how: dict[str, Any] = {"base": "e", "layout": layout, "lse_layout": layout[:3]}
        self._merge = StreamingMerge(layout)
        self._dtype: Any = None
        self._keeps_axis = False

    @worded(attn_out="out")
    def step(self, out: Any, lse: Any, partial: bool) -> None:
        """Merge one step.

        Parameters
        ----------
        out : array, float16, bfloat16 or float32, shape (B, N, S, D)
        lse : array, float32, shape (B, N, S), or (B, N, S, 1) as cuDNN returns it
            Natural logarithms.
        partial : bool
            The step covers the second half of the tokens.

        Raises
        ------
        ConstraintError, UnsupportedError
            As :meth:`rau.AttentionState.from_lse` and :meth:`rau.StreamingMerge.update`.
        """
        axes = "B, N, S" if self._how["layout"] == "BNSD" else "B, S, N"
        check("_SDPAMerger.step", {"out": (out, f"({axes}, D)"), "lse": (lse, f"({axes}) or ({axes}, 1)")})
        if partial and self._dtype is None:
            report = Violations("_SDPAMerger.step")
            report.add("first-update", "partial is True in the first step; expected False, since that one covers all tokens.")
            raise report.error()
        keeps_axis = lse.ndim == out.ndim
        rows = lse[..., 0] if keeps_axis else lse
        self._merge.update(*AttentionState.from_lse(out, rows, **self._how), tokens="back" if partial else None)
        self._dtype, self._keeps_axis = out.dtype, keeps_axis

    def results(self) -> tuple[Any, Any]:
        """Return what has been merged.

        Returns
        -------
        out : array, dtype of the last step's
        lse : array, float32
            With a last axis of 1 where the last step's had one.

        Raises
        ------
        ConstraintError
            Before the first step.
        """
        if self._dtype is None:
            report = Violations("_SDPAMerger.results")
            report.add("first-update", "there is nothing merged yet; expected a step first.")
            raise report.error()
        merged = self._merge.result(self._dtype)
        lse = merged.lse(**self._how)
        return merged.attn_out, lse[..., None] if self._keeps_axis else lse
