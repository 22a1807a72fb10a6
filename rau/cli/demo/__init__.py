"""``python -m rau demo``: merges of real attention, timed and judged."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rau.cli import session
from rau.cli.console import progress, table

if TYPE_CHECKING:
    from rau.cli.demo.ring import Result, Work

_LEGEND = """\
one merge    merge_states of all the partials
updates      ring_attention_update of a running state, in place, one partial after another
merge, sum   largest error of attn_out and softmax_sum against the oracle on the same inputs,
             as a share of what the contract allows: 1.00 is the limit
attention    largest difference from exact softmax attention in float64
partials     how much of that the rounding of the partials alone explains
"""
_PROBLEM = ("tokens", "heads", "head_dim", "ranks", "dtype", "layout", "softmax_layout", "causal", "seed")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    parser = subparsers.add_parser(
        "demo",
        help="merge real partial attention with every backend, timed and checked",
        description="Compute the partial attention that the ranks of a ring would see, merge it with each "
        "backend, and judge the results. Exit status: 0 all right, 1 a merge is wrong, 2 wrong usage.",
        epilog=session.examples(
            "demo", "demo --backends cython --dtype bfloat16 --causal", "demo --layout TND --ranks 64", "demo --latex"
        ),
    )
    add_problem(parser, 4096, 8, ("float32", "float16", "bfloat16"))
    session.add_backends(parser)
    session.add_tables(parser)
    session.add_apart(parser, "all that a backend has to do", 600.0)
    return parser


def add_problem(parser: argparse.ArgumentParser, tokens: int, ranks: int, dtypes: tuple[str, ...]) -> None:
    """Declare what the attention is over, with these defaults; the first of `dtypes` is one too."""
    for option, least, default, text in (
        ("--tokens", 1, tokens, "total number of tokens"),
        ("--heads", 1, 16, "attention heads"),
        ("--head-dim", 1, 64, "dimension of a head"),
        ("--ranks", 1, ranks, "ranks of the ring: the keys are split into this many parts"),
        ("--seed", 0, 0, "seed of the random numbers"),
    ):
        text = f"{text} (default: {default})"
        parser.add_argument(option, type=session.whole(least), default=default, metavar="N", help=text)
    for option, choices, text in (
        ("--dtype", dtypes, "dtype of the outputs; bfloat16 needs ml_dtypes"),
        ("--layout", ("SBH", "TND"), "layout; TND has several sequences of unequal lengths"),
        ("--softmax-layout", ("TND", "SBH"), "order of TND statistics: token-major, or packed per sequence"),
    ):
        parser.add_argument(option, choices=choices, default=choices[0], help=f"{text} (default: {choices[0]})")
    parser.add_argument("--causal", action="store_true", help="a query sees no later keys")


def problem(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of the problem, checked."""
    if arguments.ranks > arguments.tokens:
        raise session.UsageError(
            f"--ranks is {arguments.ranks} and --tokens {arguments.tokens}; expected at most as many ranks as tokens, "
            "since each rank holds a part of the keys"
        )
    return {name: getattr(arguments, name) for name in _PROBLEM}


def heading(arguments: argparse.Namespace) -> str:
    """Describe the problem."""
    what = "Causal attention" if arguments.causal else "Attention"
    layout = arguments.layout
    if layout == "TND":
        order = "token-major" if arguments.softmax_layout == "TND" else "packed per sequence"
        layout = f"TND with sequences of unequal lengths, statistics {order}"
    return (
        f"{what} of {arguments.tokens} tokens, {arguments.heads} heads of dimension {arguments.head_dim}, "
        f"{arguments.dtype}, layout {layout}.\n"
        f"Its keys are split among {arguments.ranks} ranks; the partial attention that each sees is merged."
    )


def run(arguments: argparse.Namespace) -> int:
    """Merge, time and judge: 0 all right, 1 a merge is wrong."""
    # Late, as in all commands: --help does not pay for what a run needs.
    from rau.cli.demo import ring
    from rau.testing.apart import NoAnswer

    session.check_form(arguments.form)
    options, told = problem(arguments), not (arguments.json or arguments.form)
    results: list[Result] = []
    lost: dict[str, str] = {}
    with session.under_test(arguments.backends, arguments) as (backends, not_run, place):
        if not backends:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in not_run.items())
            raise session.UsageError(f"no backend is available: {reasons}")
        if told:
            print(heading(arguments), flush=True)
        with progress(ring.steps_of(arguments.ranks, len(backends)), quiet=not told) as step:
            work = ring.prepare(arguments, step)
            for backend in backends:
                step(f"{backend.name}: all the partials at once, and {arguments.ranks - 1} updates", arguments.ranks + 1)
                try:
                    found = place.call(ring.merge, work, backend)
                except NoAnswer as error:
                    lost[backend.name] = str(error)
                    continue
                if not isinstance(found, str):
                    results += found
                elif arguments.backends:
                    raise session.UsageError(f'backend "{backend.name}" cannot run this: {found}')
                else:
                    not_run[backend.name] = found
    passed = bool(results) and all(result.passed for result in results) and not lost
    if arguments.json:
        session.print_json({
            "problem": options | {"actual_seq_qlen": work.call.get("actual_seq_qlen")}, "results": results,
            "partials_error": work.rounding, "same_bits": _agree(results), "not_run": not_run, "lost": lost,
            "passed": passed,
        })  # fmt: skip
        return 0 if passed else 1
    if arguments.form:
        session.print_table(arguments.form, [
            {
                "backend": result.backend, "updates": result.updates, "seconds": result.seconds,
                "GB/s": result.gigabytes_per_second, "attn_out share": result.merge_share, "softmax_sum share": result.sum_share,
                "attention error": result.attention_error, "partials error": work.rounding,
            }
            for result in results
        ])  # fmt: skip
        return 0 if passed else 1
    numbers = ["time", "GB/s", "merge", "sum", "attention", "partials"]
    rows = [
        [
            result.backend, f"{result.updates} updates" if result.updates else "one merge",
            session.duration(result.seconds), f"{result.gigabytes_per_second:.1f}", f"{result.merge_share:.2f}",
            f"{result.sum_share:.2f}", f"{result.attention_error:.2e}", f"{work.rounding:.2e}",
        ]
        for result in results
    ]  # fmt: skip
    print("", *table(["backend", "how", *numbers], rows, right=numbers), "", _LEGEND, sep="\n")
    for name, reason in not_run.items():
        print(f"not run: {name} ({reason})")
    print(_verdict(work, results, lost))
    return 0 if passed else 1


def _verdict(work: Work, results: list[Result], lost: dict[str, str]) -> str:
    """Say in a sentence or two what it all means."""
    if lost:
        return "\n".join(f"WRONG: {name} did not come to its end: {told}" for name, told in lost.items())
    wrong = [result for result in results if not result.passed]
    if wrong:
        names = " and ".join(dict.fromkeys(result.backend for result in wrong))
        return (
            f"WRONG: {names} merged partial attention with a larger error than the contract allows.\n"
            f"{wrong[0].backend}, {wrong[0].call}: {wrong[0].problems[0]}."
        )
    if not results:
        return "Nothing was checked: no backend could run this."
    names = ", ".join(dict.fromkeys(result.backend for result in results))
    share = max(max(result.merge_share, result.sum_share) for result in results)
    several = len({result.backend for result in results}) > 1
    return (
        f"Right: every merge by {names} keeps within the error that the contract allows, {share:.0%} of it\n"
        f"at worst{'; all give the same bits' if several and _agree(results) else ''}. "
        f"They differ from exact attention by at most {max(result.attention_error for result in results):.1e},\n"
        f"of which the rounding of the partials alone accounts for {work.rounding:.1e}."
    )


def _agree(results: list[Result]) -> bool:
    """Tell whether every backend's outputs have the same bits."""
    return len({(result.call, result.digest) for result in results}) == len({result.call for result in results})
