"""``python -m rau matrix``: kernels against properties, on one page."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rau.cli import session
from rau.cli.console import progress, save_page, table

if TYPE_CHECKING:
    from rau.testing.conformance.matrix import Answer

_EXAMPLES = session.examples("matrix", "matrix --backends mykernel:Mine numpy --report out")
_BESIDE = 6  # kernels in one table: as many as a terminal is wide
_LEGEND = (
    "(in brackets): not promised by the kernel. error: the largest one, as a share of the bound of the kernel's kind. "
    "rounded right: elements that are the exact result, rounded to 16 bits to nearest even. "
    "gradients: of the kernel's own; rau.ring_attention_update has them with any backend."
)


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    parser = subparsers.add_parser(
        "matrix",
        help="what kernels do, and whether they promise it: kernels against properties, on one page",
        description="Ask every backend the same: what it makes of empty rows, of NaN and infinity behind a weight of 0 and "
        "in statistics, how large its errors are in each dtype, how it rounds to 16 bits, how many states, layouts and "
        "strides it takes, and whether it has gradients. It is run, whatever it promises.",
        epilog=f"{_EXAMPLES}\n\nExit status: 0 every kernel does what it promises, 1 one does not, 2 wrong usage or a named "
        "backend is missing.",
    )
    session.add_backends(parser)
    session.add_apart(parser, "a question")
    text = "write an HTML page, too, DIR/index.html; needs rich"
    parser.add_argument("--report", type=session.path, metavar="DIR", help=text)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Ask: 0 all that is promised is done, 1 something is not."""
    # Late, as in all commands: --help does not pay for what a run needs.
    from rau.config import collect
    from rau.testing.conformance.matrix import QUESTIONS, matrix

    folder = None if arguments.report is None else session.report_folder(arguments.report)
    with session.under_test(arguments.backends, arguments) as (backends, not_run, place):
        configuration = collect()
        with progress(len(backends) * len(QUESTIONS), quiet=arguments.json) as step:
            rows = matrix(backends, progress=step, place=place)
    not_done = [
        (answer.promised, f"{name}: {question}: {answer.found}")
        for name, row in rows.items()
        for question, answer in row.items()
        if not answer.good
    ]
    broken = [line for promised, line in not_done if promised]
    lines = [""]
    for some in (list(rows)[i : i + _BESIDE] for i in range(0, len(rows), _BESIDE)):
        cells = [[question, *(_word(rows[name][question]) for name in some)] for question in QUESTIONS]
        lines += [*table(["", *some], cells), ""]
    lines += [_LEGEND, "", *(f"BROKEN PROMISE: {line}" for line in broken)]
    lines += [f"not promised, and not done: {line}" for promised, line in not_done if not promised]
    lines += [f"not run: {name} ({reason})" for name, reason in not_run.items()]
    text = "\n".join([session.heading(configuration), *lines])
    if arguments.json:
        session.print_json({
            "kernels": rows, "broken": broken, "not_run": not_run, "passed": not broken, "configuration": configuration,
        })  # fmt: skip
    else:
        print(text)
    if folder is not None:  # last: where a disk is full, all that was found has been told
        styles = {r"\byes\b": "green", r"\bNO\b": "bold red", r"(?m)^BROKEN PROMISE.*": "bold red"}
        title, path = "kernels against properties", folder / "index.html"
        session.save(arguments.report, lambda: save_page(title, text, path, styles, wrap="pre"))
    return 1 if broken else 0


def _word(answer: Answer) -> str:
    return answer.word if answer.promised or answer.word == "-" else f"({answer.word})"
