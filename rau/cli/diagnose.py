"""``python -m rau diagnose``: is an output that was observed elsewhere right, and if not, which mistake caused it?"""

from __future__ import annotations

import argparse
import difflib
import math
from typing import TYPE_CHECKING, Any

from rau.cli import session
from rau.cli.case_options import describe
from rau.cli.console import table

if TYPE_CHECKING:
    from rau.testing.diagnosis import Candidate
    from rau.testing.diagnosis.element import Element

_FILE = """\
FILE is NumPy's .npz, without pickle, or what torch.save wrote of a dict, loaded as weights only:
  prev_attn_out prev_softmax_max prev_softmax_sum and cur_... (or states.0.attn_out and so on): the inputs
  attn_out softmax_max softmax_sum: the output, or what there is of it
  of a kernel that keeps a log-sum-exp: lse_base "e" or "2", and prev_lse, cur_lse, lse in place of max and sum
  of a kernel that does not promise everything: unpromised, names of what it is not held to (see `python -m rau matrix`)
  layout, softmax_layout: strings, "SBH" and "TND" if absent; actual_seq_qlen: cumulative lengths, for TND
  in a file of torch also prev, cur and out, of three tensors each
bfloat16 is stored as uint16. numpy.savez(FILE, prev_attn_out=..., ...) writes it.

Examples:
  python -m rau diagnose observed.npz
  python -m rau diagnose observed.npz --tolerance 40
  python -m rau diagnose observed.pt --element 3,1,63

Exit status: 0 right, 1 wrong (recognised or not), 2 no such file, or one that cannot be used."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    parser = subparsers.add_parser(
        "diagnose",
        help="judge an output from elsewhere, and name the known mistake that reproduces it",
        description="Compare the output of any implementation with the oracle and, if it is wrong, with known "
        "mistakes: the order of TND statistics, the base of logarithms, sums left out, rows in 16 bits, and more.",
        epilog=_FILE,
    )
    parser.add_argument("file", metavar="FILE", help="inputs and output, see below")
    text = "how many times the bound still counts as right, for a kernel with rows in float32 (default: 1)"
    parser.add_argument("--tolerance", type=session.positive, default=1.0, metavar="X", help=text)
    text = "also go through the merge of one element step by step: token, head, place in the head (a batch entry before them)"
    parser.add_argument("--element", type=_index, metavar="T,H,D", help=text)
    return parser


def _index(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if len(numbers) not in (3, 4) or not all(number.strip().isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected token,head,place, such as 3,1,63")
    return tuple(map(int, numbers))


def run(arguments: argparse.Namespace) -> int:
    """Judge a file: 0 right, 1 wrong."""
    # Late, as in all commands: --help does not pay for what a run needs.
    from rau.testing.diagnosis import diagnose
    from rau.testing.diagnosis.element import element
    from rau.testing.differential import record

    recorded = record.read_record(arguments.file)
    diagnosis = diagnose(recorded, tolerance=arguments.tolerance)
    closer = None if arguments.element is None else element(recorded, arguments.element)
    if arguments.json:
        session.print_json(
            {"file": arguments.file, "call": describe(recorded.case), "right": diagnosis.right}
            | {"unpromised": recorded.unpromised, "unread": recorded.unread, "element": closer}
            | vars(diagnosis)
            | {"candidates": [_plain(candidate) for candidate in diagnosis.candidates]}
            | {"recognised": [candidate.mistake.name for candidate in diagnosis.recognised]}
        )
    else:
        print(f"{arguments.file}: {describe(recorded.case)}")
        if recorded.unpromised:
            print(f"not held to {', '.join(recorded.unpromised)}, which the kernel does not promise")
        print(*map(_unread, recorded.unread), diagnosis, sep="\n")
        if closer is not None:
            print("", *_steps(closer), sep="\n")
    return 0 if diagnosis.right else 1


def _unread(key: str) -> str:
    """Say that a key means nothing, and which one is meant."""
    arrays = [f"{of}{name}" for of in ("", "prev_", "cur_") for name in ("attn_out", "softmax_max", "softmax_sum", "lse")]
    known = ("actual_seq_qlen", "layout", "softmax_layout", "lse_base", *arrays)
    close = difflib.get_close_matches(key, known, n=1)
    return f"not read: {key}, which means nothing here" + (f"; did you mean {close[0]}?" if close else "")


def _steps(of: Element) -> list[str]:
    """Word the merge of one element."""
    columns = ["state", "max", "sum", "a = sum * exp(max - m)", "weight = a / l", "out", "weight * out"]
    rows = [[str(k), *(f"{number:.9g}" for number in side)] for k, side in enumerate(of.sides)]
    lines = [f"{of.where}, step by step:", "", *table(columns, rows, right=columns), ""]
    lines += [f"m = {of.maximum:.9g}, the largest max; l = {of.sum:.9g}, the sum of a", f"exact: {of.exact:.9g}"]
    within = f"may be off by {of.bound:.3g}" if of.bound else "to be kept bit for bit"
    lines[-1] += f", {'anything will do' if math.isinf(of.bound) else within}"
    if of.observed is not None and of.share is not None:
        off = f", off by {abs(of.observed - of.exact):.3g}" if math.isfinite(of.observed - of.exact) else ""
        verdict = "right" if of.share <= 1 else "wrong"
        lines.append(f"observed: {of.observed:.9g}{off}: {verdict}, {session.share(of.share)} of the bound")
    return lines


def _plain(candidate: Candidate) -> dict[str, Any]:
    mistake = candidate.mistake
    words = {"mistake": mistake.name, "wrong": mistake.wrong, "change": mistake.change}
    return vars(candidate) | words | {"reproduces": candidate.reproduces}
