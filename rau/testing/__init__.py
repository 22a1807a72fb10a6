"""What proves that a backend is right: an oracle, a comparison, and attention to make real inputs from.

Everything is loaded on first use, and nothing here needs more than NumPy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rau.testing.attention import exact_attention, partial_attention
    from rau.testing.comparison import compare
    from rau.testing.expected import oracle

__all__ = ["compare", "exact_attention", "oracle", "partial_attention"]

# No module bears the name of what it holds: importing it would hide the function behind the module.
_HOME = {
    "compare": "comparison",
    "exact_attention": "attention",
    "oracle": "expected",
    "partial_attention": "attention",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
