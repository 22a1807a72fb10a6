"""What one would write without rau: composites of torch operations, eager and compiled."""

from __future__ import annotations

from typing import Any

from rau.cli.bench.timing import Call
from rau.cli.bench.workload import Size
from rau.install import command
from rau.state import AttentionState

EAGER, WRITTEN, COMPILED = "torch eager", "torch eager, as commonly written", "torch.compile"


class Peers:
    """The composites; ImportError where torch is not installed.

    torch.compile, which takes ten seconds or more the first time, is one of them if `compiled`.
    """

    def __init__(self, compiled: bool = True) -> None:
        try:
            import torch
        except ImportError as error:
            raise ImportError(f"torch is not installed: {command('torch')}") from error
        self._torch, self._compiled = torch, compiled

    def tensors(self, state: AttentionState) -> AttentionState:
        """A state of NumPy arrays as torch tensors over the same memory."""
        torch = self._torch
        attn_out, maximum, total = state
        if attn_out.dtype.name == "bfloat16":
            output = torch.from_numpy(attn_out.view("u2")).view(torch.bfloat16)
        else:
            output = torch.from_numpy(attn_out)
        return AttentionState(output, torch.from_numpy(maximum), torch.from_numpy(total))

    def calls(self, size: Size, prev: AttentionState, cur: AttentionState) -> dict[str, Call]:
        """Functions that merge two states of torch tensors, all with fresh results: a composite has no other.

        Not with packed statistics: for those nobody has a composite that runs on a CPU.
        """
        torch = self._torch
        found: dict[str, Call] = {
            EAGER: lambda: self.eager(prev, cur),
            WRITTEN: lambda: self.written(prev, cur, size.head_dim),
        }
        if self._compiled:
            torch.compiler.reset()  # or the sizes before would make this one dynamic
            function = torch.compile(self.eager, dynamic=False)
            found[COMPILED] = lambda: function(prev, cur)
        return found

    def eager(self, prev: AttentionState, cur: AttentionState) -> tuple[Any, Any, Any]:
        """The update with weights that broadcast: as good as eager operations get."""
        weights, maximum, total = self._weights(prev, cur)
        shape = prev[0].shape
        if len(shape) == len(maximum.shape):  # TND
            rows = weights
        else:  # SBH: the weights are (B, N, S, 1)
            rows = [weight.permute(2, 0, 1, 3) for weight in weights]
        outputs = [state[0].view(*rows[0].shape[:-1], -1) for state in (prev, cur)]
        merged = outputs[0] * rows[0] + outputs[1] * rows[1]  # in float32: the weights are
        return merged.to(prev[0].dtype).view(shape), maximum, total

    def written(self, prev: AttentionState, cur: AttentionState, head_dim: int) -> tuple[Any, Any, Any]:
        """The update with weights repeated to the outputs' shape, as training scripts have it."""
        weights, maximum, total = self._weights(prev, cur)
        shape = prev[0].shape
        wide = [weight.repeat(*[1] * (weight.dim() - 1), head_dim) for weight in weights]
        if len(shape) != len(maximum.shape):
            wide = [weight.permute(2, 0, 1, 3).reshape(shape) for weight in wide]
        merged = prev[0] * wide[0] + cur[0] * wide[1]
        return merged.to(prev[0].dtype), maximum, total

    def _weights(self, prev: AttentionState, cur: AttentionState) -> tuple[list[Any], Any, Any]:
        torch = self._torch
        maximum = torch.maximum(prev[1], cur[1])
        terms = [state[2] * torch.exp(state[1] - maximum) for state in (prev, cur)]
        total = terms[0] + terms[1]
        return [(term / total)[..., :1] for term in terms], maximum, total
