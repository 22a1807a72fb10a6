"""``python -m rau diagnose``: is an output that was observed elsewhere right, and if not, which mistake caused it?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rau.cli import session
from rau.cli.case_options import describe

if TYPE_CHECKING:
    from rau.testing.diagnosis import Candidate

_FILE = """\
FILE is NumPy's .npz, without pickle:
  prev_attn_out prev_softmax_max prev_softmax_sum and cur_... (or states.0.attn_out and so on): the inputs
  attn_out softmax_max softmax_sum: the output
  of a kernel that keeps a log-sum-exp: lse_base "e" or "2", and prev_lse, cur_lse, lse in place of max and sum
  of a kernel that does not promise everything: unpromised, names of what it is not held to (see `python -m rau matrix`)
  layout, softmax_layout: strings, "SBH" and "TND" if absent; actual_seq_qlen: cumulative lengths, for TND
bfloat16 is stored as uint16. numpy.savez(FILE, prev_attn_out=..., ...) writes it.

Examples:
  python -m rau diagnose observed.npz
  python -m rau diagnose observed.npz --tolerance 40

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
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Judge a file: 0 right, 1 wrong."""
    # Late, as in all commands: --help does not pay for what a run needs.
    from rau.testing.differential import record
    from rau.testing.diagnosis import diagnose

    recorded = record.read_record(arguments.file)
    diagnosis = diagnose(recorded, tolerance=arguments.tolerance)
    if arguments.json:
        session.print_json(
            {"file": arguments.file, "call": describe(recorded.case), "right": diagnosis.right}
            | {"unpromised": recorded.unpromised}
            | vars(diagnosis)
            | {"candidates": [_plain(candidate) for candidate in diagnosis.candidates]}
            | {"recognised": [candidate.mistake.name for candidate in diagnosis.recognised]}
        )
    else:
        print(f"{arguments.file}: {describe(recorded.case)}")
        if recorded.unpromised:
            print(f"not held to {', '.join(recorded.unpromised)}, which the kernel does not promise")
        print(diagnosis)
    return 0 if diagnosis.right else 1


def _plain(candidate: Candidate) -> dict[str, Any]:
    mistake = candidate.mistake
    words = {"mistake": mistake.name, "wrong": mistake.wrong, "change": mistake.change}
    return vars(candidate) | words | {"reproduces": candidate.reproduces}
