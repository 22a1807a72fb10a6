"""The names that a call takes: of layouts, orders, profiles and checks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

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


def whole_number(value: object) -> int | None:
    """Return an int as Python's, whose sums and products do not overflow as a numpy.uint8's do; None for what is none."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.timedelta64))
    return int(value) if whole else None  # type: ignore[call-overload]


def check_layout(report: Violations, layout: object) -> str:
    """Check the name of a layout of attention outputs; return it, empty where it is wrong."""
    note = " The letters are the axes of attn_out: B batch, S or T tokens, N heads, D head dimension, H = N * D."
    return report.choice("layout", "layout", layout, LAYOUTS, note, OTHER_LAYOUTS)


def check_softmax_layout(report: Violations, rule: str, argument: str, order: object) -> str:
    """Check the name of an order of the statistics in layout TND; return it, empty where it is wrong."""
    note = ' "TND" is token-major; "SBH" is packed per sequence, as the vendor\'s kernels emit.'
    return report.choice(rule, argument, order, ("TND", "SBH"), note, {})


def check_options(report: Violations, options: Options) -> tuple[Options, Profile]:
    """Check them; return them, those that are wrong as empty names, and the limits."""
    layout = check_layout(report, options.layout)
    softmax_layout = check_softmax_layout(report, "softmax-layout", "softmax_layout", options.softmax_layout)
    check = report.choice("check", "check", options.check, CHECKS)
    profile = report.choice("profile", "profile", options.profile, PROFILES)
    limits = PROFILES[profile or "portable"]
    if layout and layout not in limits.layouts:
        takes = " and ".join(f'"{name}"' for name in limits.layouts)
        report.add("layout-profile", f'layout = "{layout}"; profile "{profile}" knows {takes} only. '
                   'profile="portable" takes it.')  # fmt: skip
    return Options(layout, softmax_layout, profile, check, options.statistics), limits
