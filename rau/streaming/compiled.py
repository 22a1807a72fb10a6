"""A running state where torch.compile is in use: its methods run as they are, between two graphs.

Imported once dynamo is, which takes torch seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch

_REASON = (
    "a rau.StreamingMerge is written in place, which has no place in a graph. Use rau.merge_states, which has one, or compile "
    "without fullgraph=True"
)


def _run(method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return method(*arguments, **options)


def compiling() -> bool:
    """Whether a frame is being compiled, or would be: else a method runs as it is, and nothing is left to do behind it.

    What an interrupt met there would come after the merge.
    """
    return torch.compiler.is_compiling() or _callback() is not None


_callback = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: True)
_takes_reason = "reason" in signature(torch.compiler.disable).parameters  # not in torch 2.6
eagerly = torch.compiler.disable(_run, **({"reason": _REASON} if _takes_reason else {}))
