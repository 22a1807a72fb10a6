"""``python -m rau demo``: the main job on real attention, timed and judged."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rau.cli.demo.ring import Result, Work

_LEGEND = """\
one merge    merge_states of all the partials
updates      ring_attention_update of a running state, in place, partial after partial
merge, sum   largest error of attn_out and softmax_sum against the oracle on the same inputs,
             as a share of what the contract allows: 1.00 is the limit
attention    largest difference from exact softmax attention in float64
partials     as much of it as the rounding of the partials alone explains
"""


def add_parser(subparsers: Any) -> None:
    """Declare the command.

    Parameters
    ----------
    subparsers : argparse._SubParsersAction
    """
    parser = subparsers.add_parser(
        "demo",
        help="merge real partial attention with every backend, timed and checked",
        description="Compute the partial attention that the ranks of a ring would see, merge it with each "
        "backend, and judge the results. Exit status: 0 all right, 1 a merge is wrong, 2 wrong usage.",
    )
    for option, default, meaning in (
        ("--tokens", 4096, "tokens in all"),
        ("--heads", 16, "attention heads"),
        ("--head-dim", 64, "dimension of a head"),
        ("--ranks", 8, "ranks of the ring: the keys are split into so many parts"),
        ("--seed", 0, "seed of the random numbers"),
    ):
        parser.add_argument(option, type=int, default=default, metavar="N", help=f"{meaning} (default: {default})")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32",
        help="dtype of the outputs; bfloat16 needs ml_dtypes (default: float32)",
    )  # fmt: skip
    for option, choices, text in (
        ("--layout", ("SBH", "TND"), "layout; TND has several sequences of unequal lengths"),
        ("--softmax-layout", ("TND", "SBH"), "order of TND statistics: token-major, or packed per sequence"),
    ):
        parser.add_argument(
            option, choices=choices, default=choices[0], help=f"{text} (default: {choices[0]})"
        )
    parser.add_argument("--causal", action="store_true", help="a query sees no later keys")
    text = "only these backends (default: all that are available)"
    parser.add_argument("--backend", nargs="+", action="extend", metavar="NAME", help=text)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demonstration.

    Parameters
    ----------
    arguments : argparse.Namespace

    Returns
    -------
    int
        0: all right, 1: a merge is wrong, 2: wrong usage, or a named backend is missing.
    """
    from rau.cli.console import progress
    from rau.cli.demo import ring
    from rau.errors import RauError

    mistakes = _mistakes(arguments)
    if mistakes:
        return _refuse(*mistakes)
    try:
        backends, missing = _choose(arguments.backend)
    except RauError as error:
        return _refuse(str(error))
    if not backends:
        return _refuse("no backend is available", *(f"{name}: {reason}" for name, reason in missing.items()))
    if not arguments.json:
        print(_header(arguments), flush=True)
    results: list[Result] = []
    with progress(ring.steps_of(arguments.ranks, len(backends))) as step:
        try:
            work = ring.prepare(arguments, step)
        except ImportError as error:  # of ml_dtypes
            return _refuse(str(error))
        for backend in backends:
            try:
                done = ring.merge_at_once(work, backend, step), ring.merge_in_a_ring(work, backend, step)
                results += [result for result in done if result is not None]
            except RauError as error:
                if arguments.backend:
                    return _refuse(f'backend "{backend.name}" cannot run this: {error}')
                missing[backend.name] = str(error)
    passed = bool(results) and all(result.passed for result in results)
    if arguments.json:
        print(json.dumps(_document(arguments, work, results, missing, passed), indent=2))
    else:
        _print_results(work, results, missing)
        print(_verdict(work, results))
    return 0 if passed else 1


def _mistakes(arguments: argparse.Namespace) -> list[str]:
    """What is wrong with the options, each in a sentence that says what would be right."""
    found = [
        f"--{name.replace('_', '-')} is {getattr(arguments, name)}; expected 1 or more"
        for name in ("tokens", "heads", "head_dim", "ranks")
        if getattr(arguments, name) < 1
    ]
    if arguments.seed < 0:
        found.append(f"--seed is {arguments.seed}; expected 0 or more")
    if arguments.ranks > arguments.tokens > 0:
        found.append(
            f"--ranks is {arguments.ranks} and --tokens {arguments.tokens}; expected at most as "
            "many ranks as tokens, since each rank holds a part of the keys"
        )
    return found


def _refuse(*sentences: str) -> int:
    for sentence in sentences:
        print(f"python -m rau demo: error: {sentence}", file=sys.stderr)
    return 2


def _choose(names: list[str] | None) -> tuple[list[Any], dict[str, str]]:
    """Backends to run, and the reason against each other one."""
    from rau import registry

    if names:
        return [registry.get(name, "--backend") for name in dict.fromkeys(names)], {}
    states = registry.status()
    missing = {state.name: state.reason for state in states if not state.available}
    return [registry.get(state.name) for state in states if state.available], missing


def _header(arguments: argparse.Namespace) -> str:
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


def _print_results(work: Work, results: list[Result], missing: dict[str, str]) -> None:
    from rau.cli.console import print_table

    numbers = ["time", "GB/s", "merge", "sum", "attention", "partials"]
    print_table(
        ["backend", "how", *numbers],
        [
            [
                result.backend,
                f"{result.updates} updates" if result.updates else "one merge",
                _duration(result.seconds),
                f"{result.rate:.1f}",
                f"{result.attn_share:.2f}",
                f"{result.sum_share:.2f}",
                f"{result.attention:.2e}",
                f"{work.rounding:.2e}",
            ]
            for result in results
        ],
        right=numbers,
    )
    print(_LEGEND)
    for name, reason in missing.items():
        print(f"not run: {name} ({reason})")


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def _verdict(work: Work, results: list[Result]) -> str:
    """Say in a sentence or two what it all means."""
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
    share = max(result.attn_share for result in results)
    several = len({result.backend for result in results}) > 1
    return (
        f"Right: every merge by {names} keeps within the error that the contract allows, {share:.0%} of it\n"
        f"at worst{'; all give the same bits' if several and _agree(results) else ''}. "
        f"From exact attention they differ by at most {max(result.attention for result in results):.1e},\n"
        f"of which the rounding of the partials alone makes {work.rounding:.1e}."
    )


def _agree(results: list[Result]) -> bool:
    """Tell whether every backend's outputs have the same bits."""
    outputs: dict[str, set[bytes]] = {}
    for result in results:
        outputs.setdefault(result.call, set()).add(result.merged.tobytes())
    return all(len(versions) == 1 for versions in outputs.values())


def _document(
    arguments: argparse.Namespace, work: Work, results: list[Result], missing: dict[str, str], passed: bool
) -> dict[str, Any]:
    """The answer as plain data."""
    options = ("tokens", "heads", "head_dim", "ranks", "dtype", "layout", "softmax_layout", "causal", "seed")
    return {
        "problem": {name: getattr(arguments, name) for name in options}
        | {"actual_seq_qlen": work.call.get("actual_seq_qlen")},
        "results": [
            {
                "backend": result.backend,
                "call": result.call,
                "updates": result.updates,
                "seconds": result.seconds,
                "gigabytes_per_second": result.rate,
                "merge_share": _number(result.attn_share),
                "sum_share": _number(result.sum_share),
                "attention_error": _number(result.attention),
                "passed": result.passed,
                "problems": list(result.problems),
            }
            for result in results
        ],
        "partials_error": _number(work.rounding),
        "same_bits": _agree(results),
        "not_run": missing,
        "passed": passed,
    }


def _number(value: float) -> float | str:
    """Keep JSON strict, which has no infinity."""
    return value if value < float("inf") else str(value)
