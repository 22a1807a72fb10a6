"""The names that a call takes: of layouts, orders, profiles and checks."""

from __future__ import annotations

from typing import NamedTuple

from rau.constraints.hints import described
from rau.constraints.profiles import PROFILES, Profile
from rau.constraints.rules import Violations
from rau.layouts import LAYOUTS, OTHER_LAYOUTS

CHECKS = ("metadata", "values", "document")


class Options(NamedTuple):
    """What a call says beside its arrays, as in :func:`rau.merge_states`."""

    layout: str
    softmax_layout: str
    profile: str
    check: str
    statistics: bool = True


def check_statistics(report: Violations, statistics: object, out: object) -> None:
    """Check that statistics are wanted or not, and that `out` is not a state where they are not; raise at once.

    Before torch makes part of a graph of them, or anything else is asked of the call.
    """
    if statistics is not True and statistics is not False:
        report.add("statistics", f"statistics is {described(statistics)}; expected True, or False for the output alone.")
    elif statistics is False and isinstance(out, (tuple, list)):
        report.add("out", f"out has {len(out)} items; without statistics expected one array, for the output: pass "
                   "out=state.attn_out.")  # fmt: skip
    report.raise_if_broken()


def check_layout(report: Violations, layout: object) -> bool:
    """Check the name of a layout of attention outputs."""
    note = " The letters are the axes of attn_out: B batch, S or T tokens, N heads, D head dimension, H = N * D."
    return report.choice("layout", "layout", layout, LAYOUTS, note, OTHER_LAYOUTS)


def check_softmax_layout(report: Violations, rule: str, argument: str, order: object) -> None:
    """Check the name of an order of the statistics in layout TND."""
    note = ' "TND" is token-major; "SBH" is packed per sequence, as the vendor\'s kernels emit.'
    report.choice(rule, argument, order, ("TND", "SBH"), note, {})


def check_options(report: Violations, options: Options) -> tuple[str, Profile]:
    """Check them; return the layout, empty where there is no such, and the limits."""
    layout, softmax_layout, profile, check, _ = options
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
