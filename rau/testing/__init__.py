"""What shows that a backend is right: an oracle, cases, comparisons, the conformance kit and the differential harness.

Everything is loaded on first use, and nothing here needs more than NumPy, except :mod:`rau.testing.strategies`
(Hypothesis) and the pytest side of :class:`BackendConformance`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rau.testing import cases, strategies
    from rau.testing.comparison import compare, same_bits
    from rau.testing.conformance import BackendConformance, check_backend
    from rau.testing.diagnosis import diagnose
    from rau.testing.diagnosis.vendor import VendorArithmetic
    from rau.testing.differential import run_differential
    from rau.testing.export import export_cases, verify_outputs
    from rau.testing.reference.attention import exact_attention, partial_attention
    from rau.testing.reference.oracle import oracle

__all__ = [
    "BackendConformance",
    "VendorArithmetic",
    "cases",
    "check_backend",
    "compare",
    "diagnose",
    "exact_attention",
    "export_cases",
    "oracle",
    "partial_attention",
    "run_differential",
    "same_bits",
    "strategies",
    "verify_outputs",
]

# No module bears the name of a function that it holds: importing it would hide the function behind the module.
_HOME = {
    "BackendConformance": "conformance",
    "VendorArithmetic": "diagnosis.vendor",
    "check_backend": "conformance",
    "compare": "comparison",
    "diagnose": "diagnosis",
    "exact_attention": "reference.attention",
    "export_cases": "export",
    "oracle": "reference.oracle",
    "partial_attention": "reference.attention",
    "run_differential": "differential",
    "same_bits": "comparison",
    "verify_outputs": "export",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _HOME:
        return import_module(f"{__name__}.{name}")
    globals()[name] = value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
