"""Who has the operator on Ascend: torch_npu or MindSpeed for torch tensors, MindSpore for its own.

Whether it is there is found out by looking for the attribute. Never by its version, of which there are many, nor by
calling it: where there is no chip, MindSpore's fails later, from somewhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rau.arrays.mindspore_ import MindSporeKind
from rau.arrays.torch_ import TorchKind, packed_rows
from rau.backends import AttentionState, Problem
from rau.errors import BackendUnavailableError

TORCH_NPU = "torch_npu is not installed"
MINDSPEED = (
    "this torch_npu has no npu_ring_attention_update (newer ones have it), and MindSpeed's is missing too: install "
    "MindSpeed from https://github.com/Ascend/MindSpeed (the mindspeed on the package index is another project)"
)
MINDSPORE = "MindSpore is not installed: see docs/ascend.md"


class OnTorch:
    """Torch tensors on device "npu", and ATen operations; without operator or NPU its making fails, and says how to get one.
    """

    kind = "torch"

    def __init__(self) -> None:
        try:
            import torch
            import torch_npu
        except ModuleNotFoundError as error:
            raise BackendUnavailableError(TORCH_NPU) from error
        except Exception as error:  # such as CANN missing
            raise BackendUnavailableError(f"torch_npu does not load: {error}") from error
        if not torch_npu.npu.is_available():
            raise BackendUnavailableError("torch_npu is installed, but finds no NPU")
        self._torch, self._npu = torch, torch_npu.npu
        self._newer = getattr(torch_npu, "npu_ring_attention_update", None)
        if self._newer is None:
            try:
                from mindspeed.ops.npu_ring_attention_update import (
                    npu_ring_attention_update,
                )
            except Exception as error:
                raise BackendUnavailableError(MINDSPEED) from error
            self._older: Callable[..., Any] = npu_ring_attention_update

    def run(self, problem: Problem, prev: AttentionState, cur: AttentionState) -> Any:
        """Call the operator on contiguous states with equal lanes; it returns fresh arrays.

        Told that every token is a sequence of its own, the packed order is the token-major one: that is how the older
        entry, which reads packed statistics alone, serves token-major calls as well, without a copy.
        """
        torch, lengths = self._torch, None
        if problem.packed:
            lengths = torch.as_tensor(problem.actual_seq_qlen, dtype=torch.int64, device=prev.attn_out.device)
        elif problem.layout == "TND":
            lengths = torch.arange(problem.T + 1, device=prev.attn_out.device)
        if self._newer is None:
            return self._older(*prev, *cur, lengths, problem.layout)
        order = "TND" if problem.layout == "TND" and not problem.packed else ""
        return self._newer(
            *prev, *cur, actual_seq_qlen=lengths, input_layout=problem.layout, input_softmax_layout=order
        )

    def select(self, mask: Any, chosen: Any, other: Any) -> Any:
        """Write `chosen` over `other` where the mask is set."""
        return self._torch.where(mask, chosen, other, out=other)

    def fill(self, array: Any, mask: Any, value: float) -> Any:
        """Write a number where the mask is set."""
        return array.masked_fill_(mask, value)

    def packed_rows(self, problem: Problem, like: Any) -> Any:
        """Where the statistic of each token and head stands among packed rows."""
        return packed_rows(problem.actual_seq_qlen, problem.T, problem.N, like.device)

    def asarray(self, array: np.ndarray) -> Any:
        return TorchKind().from_numpy(array).to("npu")

    def synchronize(self) -> None:
        self._npu.synchronize()


class OnMindSpore:
    """MindSpore tensors where the device target is Ascend, and MindSpore's operations; its making fails where it is another.
    """

    kind = "mindspore"

    def __init__(self) -> None:
        try:
            import mindspore
        except ModuleNotFoundError as error:
            raise BackendUnavailableError(MINDSPORE) from error
        except Exception as error:
            raise BackendUnavailableError(f"MindSpore does not load: {error}") from error
        target = mindspore.get_context("device_target")
        if target != "Ascend":
            raise BackendUnavailableError(f"MindSpore's device target is {target}; expected Ascend")
        if not hasattr(mindspore.ops, "ring_attention_update"):
            raise BackendUnavailableError("this MindSpore has no ops.ring_attention_update; newer ones have it")
        self._mindspore, self._ops = mindspore, mindspore.ops

    def run(self, problem: Problem, prev: AttentionState, cur: AttentionState) -> Any:
        """Call the operator, which reads packed statistics alone: see :meth:`OnTorch.run`."""
        lengths = None
        if problem.packed:
            lengths = self._lengths(problem)
        elif problem.layout == "TND":
            lengths = self._ops.arange(problem.T + 1)
        return self._ops.ring_attention_update(*prev, *cur, lengths, problem.layout)

    def _lengths(self, problem: Problem) -> Any:
        lengths = problem.actual_seq_qlen
        if isinstance(lengths, np.ndarray):
            return self._mindspore.Tensor(lengths)
        return lengths.astype(self._mindspore.int64)

    def select(self, mask: Any, chosen: Any, other: Any) -> Any:
        """Take `chosen` where the mask is set, `other` elsewhere."""
        return self._ops.where(mask, chosen, other)

    def fill(self, array: Any, mask: Any, value: float) -> Any:
        """Take a number where the mask is set."""
        return self._ops.masked_fill(array, mask, value)

    def packed_rows(self, problem: Problem, like: Any) -> Any:
        """Where the statistic of each token and head stands among packed rows; inside bounds whatever the lengths."""
        ops, lengths, token = self._ops, self._lengths(problem), self._ops.arange(problem.T)
        last = lengths.shape[0] - 1
        sequence = (ops.searchsorted(lengths, token, right=True) - 1).clamp(0, max(last - 1, 0))
        start = lengths[sequence]
        length = lengths[(sequence + 1).clamp(0, last)] - start
        rows = (start * problem.N + token - start).unsqueeze(-1) + ops.arange(problem.N) * length.unsqueeze(-1)
        return rows.reshape(-1).clamp(0, problem.T * problem.N - 1)

    def asarray(self, array: np.ndarray) -> Any:
        return MindSporeKind().from_numpy(array)

    def synchronize(self) -> None:
        self._mindspore.runtime.synchronize()


FRAMEWORKS: dict[str, type[OnTorch] | type[OnMindSpore]] = {"torch": OnTorch, "mindspore": OnMindSpore}
