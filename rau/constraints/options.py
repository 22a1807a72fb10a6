"""The names that a call takes: of layouts, orders, profiles and checks."""

from __future__ import annotations

from rau.constraints.profiles import PROFILES, Profile
from rau.constraints.rules import Violations
from rau.layouts import LAYOUTS, OTHER_LAYOUTS

CHECKS = ("metadata", "values", "document")


def check_layout(report: Violations, layout: object) -> bool:
    """Check the name of a layout of attention outputs."""
    note = " The letters are the axes of attn_out: B batch, S or T tokens, N heads, D head dimension, H = N * D."
    return report.choice("layout", "layout", layout, LAYOUTS, note, OTHER_LAYOUTS)


def check_softmax_layout(report: Violations, rule: str, argument: str, order: object) -> None:
    """Check the name of an order of the statistics in layout TND."""
    note = ' "TND" is token-major; "SBH" is packed per sequence, as the vendor\'s kernels emit.'
    report.choice(rule, argument, order, ("TND", "SBH"), note, {})


def check_options(
    report: Violations, layout: str, softmax_layout: str, profile: str, check: str
) -> tuple[str, Profile]:
    """Check the names; return the layout, empty where there is no such, and the limits."""
    known = check_layout(report, layout)
    check_softmax_layout(report, "softmax-layout", "softmax_layout", softmax_layout)
    report.choice("check", "check", check, CHECKS)
    if not report.choice("profile", "profile", profile, PROFILES):
        return (layout if known else ""), PROFILES["portable"]
    limits = PROFILES[profile]
    if known and layout not in limits.layouts:
        takes = " and ".join(f'"{name}"' for name in limits.layouts)
        report.add("layout-profile", f'layout = "{layout}"; profile "{profile}" knows {takes} only. '
                   'profile="portable" takes it.')  # fmt: skip
    return (layout if known else ""), limits
