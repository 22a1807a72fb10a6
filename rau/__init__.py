"""Merge partial attention states: Huawei's ``ring_attention_update`` on every device, with the same bits.

Long sequences do not fit on one accelerator, so attention is computed in pieces and the pieces are merged. This
package does that merge. Start with :func:`merge_lse` if your kernel returns (out, lse), with :func:`merge_states` and
:meth:`AttentionState.from_lse` if you go on to merge what comes out, or with :func:`ring_attention_update` if it returns
the softmax's max and sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rau.errors import (
    BackendUnavailableError,
    ConstraintError,
    DTypeError,
    LayoutError,
    OptionError,
    RauError,
    ShapeError,
    UnknownBackendError,
    UnsupportedError,
)
from rau.explain import explain
from rau.parts import merge_attention
from rau.registry import use_backend
from rau.sink import add_sink
from rau.state import AttentionState, reorder_softmax
from rau.threads import get_num_threads, set_num_threads
from rau.update import merge_lse, merge_states, ring_attention_update

if TYPE_CHECKING:
    from rau import compat, registry, testing
    from rau.config import show_config
    from rau.streaming import StreamingMerge

__all__ = [
    "AttentionState",
    "BackendUnavailableError",
    "ConstraintError",
    "DTypeError",
    "LayoutError",
    "OptionError",
    "RauError",
    "ShapeError",
    "StreamingMerge",
    "UnknownBackendError",
    "UnsupportedError",
    "__version__",
    "add_sink",
    "compat",
    "explain",
    "get_num_threads",
    "merge_attention",
    "merge_lse",
    "merge_states",
    "registry",
    "reorder_softmax",
    "ring_attention_update",
    "set_num_threads",
    "show_config",
    "testing",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    # What a plain `import rau` should not pay for.
    if name in ("backends", "compat", "distributed", "registry", "testing"):
        import importlib

        return importlib.import_module(f"rau.{name}")
    if name == "show_config":
        from rau.config import show_config

        return show_config
    if name == "StreamingMerge":
        from rau.streaming import StreamingMerge

        return StreamingMerge
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("ring-attention-update")
        except PackageNotFoundError:  # a source tree that is not installed
            return "0+unknown"
    raise AttributeError(f"module 'rau' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
