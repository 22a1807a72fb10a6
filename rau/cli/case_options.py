"""Which cases a command works on, and how it describes them."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from rau.arrays.numpy_ import ITEMSIZE, NARROW
from rau.cli.session import UsageError, whole
from rau.layouts import LAYOUTS

if TYPE_CHECKING:
    from rau.testing.cases import Case

DTYPES = (*ITEMSIZE, *(f"{name}-into-float32" for name in NARROW))

_ALL: dict[str, Any] = {"select": "*", "dtype": None, "layout": None, "seed": 0}
_NUMBER = r"(\d{1,100})"  # a number with more digits is no id, and Python does not read thousands of them
_LOOK_AHEAD = 10_000  # generated cases in a row that do not match: then none will


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that select cases."""
    text = "only cases whose id matches, such as 'tnd/*' or generated/0/17"
    parser.add_argument("--select", metavar="GLOB", help=text)
    parser.add_argument("--dtype", choices=DTYPES, metavar="D", help=f"only cases of this dtype: {', '.join(DTYPES)}")
    parser.add_argument("--layout", choices=LAYOUTS, metavar="L", help=f"only cases in this layout: {', '.join(LAYOUTS)}")
    parser.add_argument("--seed", type=whole(0), metavar="S", help="seed of the generated cases (default: 0)")
    parser.set_defaults(**_ALL)


def refuse_beside(option: str, arguments: argparse.Namespace, **others: Any) -> None:
    """Refuse to select cases, and `others` with their defaults, along with an option that itself says what is run."""
    for name, default in (_ALL | others).items():
        if getattr(arguments, name) != default:
            raise UsageError(f"--{name} cannot be combined with {option}, which takes everything that it finds there")


def matcher(options: argparse.Namespace) -> Callable[[Case], bool]:
    """Tell which cases the options select."""

    def matches(case: Case) -> bool:
        return (
            fnmatchcase(case.id, options.select)
            and options.dtype in (None, case.kind[1])
            and options.layout in (None, case.layout)
        )

    return matches


def named_cases(options: argparse.Namespace) -> list[Case]:
    """List the named cases that are selected."""
    # Late, as in all commands: --help does not pay for what a run needs.
    from rau.testing.cases import named

    return list(filter(matcher(options), named()))


def generated_cases(options: argparse.Namespace, count: int = sys.maxsize) -> Iterator[Case]:
    """Generate `count` cases that are selected, or fewer; one that is named in full is found wherever it is."""
    from rau.testing.cases import generated

    matches = matcher(options)
    literal = re.match(r"[^*?\[]*", options.select)
    if literal and not "generated/".startswith(literal[0][: len("generated/")]):
        return  # it names others
    in_full = re.fullmatch(rf"generated/{_NUMBER}/{_NUMBER}", options.select)
    if in_full:
        yield from filter(matches, generated(int(in_full[1]), min(count, 1), int(in_full[2])))
        return
    in_part = re.match(rf"generated/{_NUMBER}/", options.select)
    seed = int(in_part[1]) if in_part else options.seed
    found = idle = 0
    for index in itertools.count():
        if found >= count or idle > _LOOK_AHEAD:
            return
        idle += 1
        if fnmatchcase(f"generated/{seed}/{index}", options.select):  # else it need not be made, which takes its time
            for case in filter(matches, generated(seed, 1, index)):
                found, idle = found + 1, 0
                yield case


def describe(case: Case) -> str:
    """Describe a case in one line: its geometry, its numbers, and where its arrays lie."""
    sizes = f"B {case.batch}, S {case.tokens}"
    layout = case.layout
    if case.layout == "TND":
        sizes = f"T {case.tokens}"
        layout += ", statistics packed per sequence" if case.softmax_layout == "SBH" else ", statistics token-major"
        if case.lengths:
            some = ", ".join(map(str, case.lengths[:8])) + (", ..." if len(case.lengths) > 8 else "")
            sizes += f" in sequences of {some}"
    words = [case.id, layout, f"{sizes}, N {case.heads}, D {case.head_dim}", case.kind[1]]
    words += [f"{case.states} states"] * (case.states != 2) + ["1 lane"] * (case.lanes == 1)
    words += [f"statistics: {case.statistics}"] * (case.statistics != "ordinary")
    words += [f"outputs: {case.outputs}"] * (case.outputs != "ordinary" and case.statistics != "attention")
    places = {"attn_out": case.attn_placement, "statistics": case.stats_placement}
    placed = [f"{name} {place}" for name, place in places.items() if place != "contiguous"]
    words += [f"in memory: {', '.join(placed)}"] * bool(placed)
    words += ["inputs read-only"] * case.read_only + ["the states are one and the same"] * case.aliased
    words += [f"out given, {case.out_placement}"] * (case.out == "given")
    words += [f"in place, over {case.out}"] * (case.out in ("prev", "cur"))
    return "; ".join(words)
