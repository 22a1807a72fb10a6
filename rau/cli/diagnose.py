"""``python -m rau diagnose``: is an output that was observed elsewhere right, and if not, which mistake made it?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rau.cli import session
from rau.cli.case_options import describe

if TYPE_CHECKING:
    from rau.testing.cases import Case
    from rau.testing.diagnosis import Diagnosis

_FILE = """\
FILE is NumPy's .npz, without pickle:
  prev_attn_out prev_softmax_max prev_softmax_sum and cur_... (or states.0.attn_out and so on): the inputs
  attn_out softmax_max softmax_sum: what came out
  layout, softmax_layout: strings, "SBH" and "TND" if absent; actual_seq_qlen: cumulative lengths, for TND
bfloat16 is stored as uint16. numpy.savez(FILE, prev_attn_out=..., ...) writes it.

Exit status: 0 right, 1 wrong, recognised or not, 2 no such file, or one that cannot be used."""


def add_parser(subparsers: Any) -> None:
    """Declare the command.

    Parameters
    ----------
    subparsers : argparse._SubParsersAction
    """
    parser = subparsers.add_parser(
        "diagnose",
        help="judge an output from elsewhere, and name the known mistake that reproduces it",
        description="Compare an output that any implementation gave with the oracle, and if it is wrong with known "
        "mistakes: the order of TND statistics, the base of logarithms, sums left out, rows in 16 bits, and more.",
        epilog=_FILE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="inputs and output, see below")
    text = "how many times the bound is still right, for a kernel with rows in float32 (default: 1)"
    parser.add_argument("--tolerance", type=float, default=1.0, metavar="X", help=text)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Judge a file.

    Parameters
    ----------
    arguments : argparse.Namespace

    Returns
    -------
    int
        0: right, 1: wrong, 2: not such a file.
    """
    from rau.errors import RauError
    from rau.testing import record
    from rau.testing.diagnosis import diagnose

    if not arguments.tolerance > 0:
        return session.refuse("diagnose", f"--tolerance is {arguments.tolerance:g}; expected a positive number")
    try:
        recorded = record.load(arguments.file)
        diagnosis = diagnose(recorded, tolerance=arguments.tolerance)
    except (RauError, ImportError) as error:  # ImportError: bfloat16 without ml_dtypes
        return session.refuse("diagnose", str(error))
    if arguments.json:
        session.print_json(_document(arguments.file, recorded.case, diagnosis))
    else:
        print(f"{arguments.file}: {describe(recorded.case)}")
        print(diagnosis)
    return 0 if diagnosis.right else 1


def _document(file: str, case: Case, diagnosis: Diagnosis) -> dict[str, Any]:
    return {
        "file": file,
        "call": describe(case),
        "right": diagnosis.right,
        "attn_out_share": diagnosis.comparison.attn_share,
        "softmax_sum_share": diagnosis.comparison.sum_share,
        "problems": list(diagnosis.comparison.problems),
        "recognised": [candidate.mistake.name for candidate in diagnosis.recognised],
        "candidates": [
            {
                "name": candidate.mistake.name,
                "reproduces": candidate.reproduces,
                "same_bits": candidate.same_bits,
                "explained": candidate.explained,
                "spoiled": candidate.spoiled,
                "off": candidate.off,
                "everything": candidate.everything,
                "wrong": candidate.mistake.wrong,
                "change": candidate.mistake.change,
            }
            for candidate in diagnosis.candidates
        ],
        "slight": diagnosis.slight,
        "invisible": list(diagnosis.invisible),
    }
