"""Attention over parts of the keys by a kernel whose log-sum-exp has no gradient: with the right gradient all the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rau.constraints.hints import described
from rau.constraints.lse_arguments import asks_base
from rau.constraints.rules import Violations
from rau.update import merge_lse

if TYPE_CHECKING:
    from torch import Tensor


@asks_base
def merge_attention(
    q: Tensor,
    parts: Sequence[Sequence[Any]],
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    layout: str = "SBH",
    *,
    base: str,
    lse_layout: str | None = None,
    inf_is_empty: bool = False,
    heads: int | None = None,
    backend: Any = None,
) -> tuple[Tensor, Tensor]:
    """Attend to parts of the keys, one after another, with the gradient of attention to all of them.

    What flows through the merge of the parts is lost in kernels whose log-sum-exp has no gradient. Nothing does here: the
    backward of each part is given the output and the log-sum-exp of the whole, so that its probabilities are those of the
    whole.

    Parameters
    ----------
    q : torch.Tensor
        Queries, as the kernel takes them.
    parts : list or tuple of tuples (k, v)
        At least one. Further items, a mask for example, are handed on to the kernel.
    forward : callable
        ``forward(q, k, v)`` returns an output and its log-sum-exp, as :meth:`AttentionState.from_lse` takes them; what follows
        them is ignored.
    backward : callable
        ``backward(grad_out, q, k, v, out, lse)`` returns the gradients of q, k and v, and None for any further item.
    layout, base, lse_layout, inf_is_empty, heads, backend
        As in :func:`merge_lse`.

    Returns
    -------
    attn_out, lse : torch.Tensor
        As :func:`merge_lse` returns them for the pairs of all parts. A gradient flows to `q` and to the tensors in `parts`,
        once, and from `attn_out` alone: `lse` does not require grad.

    Raises
    ------
    ConstraintError, UnknownBackendError, BackendUnavailableError, UnsupportedError
        As :func:`merge_lse`, of which ``pairs[i]`` is what `forward` returns for ``parts[i]``. UnsupportedError also where the
        gradient is asked for under ``create_graph=True``.

    Notes
    -----
    The gradients of `q` are added up in float32 (float64 for float64), and rounded once. With `inf_is_empty`, rows without
    any key have +inf in the `lse` that `backward` is given, as the kernel writes it. docs/interop.md has an example.
    """
    torch = sys.modules.get("torch")  # without which there is no tensor
    report = Violations("merge_attention")
    if torch is None or not isinstance(q, torch.Tensor):
        report.add("array", f"q is {described(q)}; expected a torch tensor. Where no gradient is wanted, rau.merge_lse merges what "
                   "a kernel returns.")  # fmt: skip
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, (list, tuple)) for part in parts):
        report.add("states", f"parts is {described(parts)}; expected a list of tuples (k, v), one for each part of the keys.")
    for name, kernel in (("forward", forward), ("backward", backward)):
        if not callable(kernel):
            report.add("states", f"{name} is {described(kernel)}; expected a function, "
                       f"{name}({'grad_out, ' * (name == 'backward')}q, k, v{', out, lse' * (name == 'backward')}).")  # fmt: skip
    report.raise_if_broken()
    from rau.torch_op import AttentionToParts  # imports torch, which is loaded by now

    merge = partial(
        merge_lse, layout=layout, base=base, lse_layout=lse_layout, inf_is_empty=inf_is_empty, heads=heads, backend=backend
    )
    apply: Any = AttentionToParts.apply  # which torch gives no type
    flat = [item for part in parts for item in part]
    attn_out, lse = apply(forward, backward, merge, inf_is_empty, [len(part) for part in parts], q, *flat)
    return attn_out, lse
