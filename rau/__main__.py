"""``python -m rau COMMAND``."""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import os
import sys
from contextlib import redirect_stdout

from rau.cli.console import Visible, own_stdout, visible
from rau.cli.session import Formatter, examples
from rau.errors import RauError

COMMANDS = ("info", "demo", "bench", "check", "bits", "difftest", "matrix", "cases", "diagnose")


def main(arguments: list[str] | None = None) -> int:
    """Run one command, that of ``sys.argv`` by default.

    Returns
    -------
    int
        The exit status: 0 good, 1 the verdict is bad, 2 wrong usage or a named backend is missing.
    """
    parser = argparse.ArgumentParser(
        prog="python -m rau",
        description="Merge partial attention states.",
        epilog=examples("demo", "check mykernel:Mine", "diagnose observed.npz")
        + "\n\npython -m rau COMMAND --help has more of each.",
        formatter_class=Formatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"rau.cli.{name}")
        command = module.add_parser(subparsers)
        command.formatter_class = Formatter
        command.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else")
        command.set_defaults(run=module.run)
    if sys.stdout is None:  # started without one
        sys.stdout = open(os.devnull, "w")
    name = parser.prog
    try:
        try:
            parsed, unknown = parser.parse_known_args(arguments)
        finally:
            sys.stdout.flush()  # what cannot be written, of a help as well, is said here, and not by Python at its exit
        if unknown:  # told by the command's own parser, whose usage has what there is
            parser = subparsers.choices.get(parsed.command, parser)
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{_meant(unknown, parser)}")
        if parsed.command is None:
            parser.print_help(sys.stderr)
            return 2
        name += f" {parsed.command}"
        if parsed.json and getattr(parsed, "form", None):
            subparsers.choices[parsed.command].error(f"--json: not allowed with --{parsed.form}")
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a message may hold what the terminal cannot show
                stream.reconfigure(errors="backslashreplace")
        with own_stdout() as own:
            with redirect_stdout(Visible(sys.stderr if parsed.json else own, own)):
                status = int(parsed.run(parsed))
            own.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        _drop_output()
        return 141
    except (RauError, ImportError, OSError) as error:  # what was asked for, a library or a file is not to be had
        print(visible(f"{name}: error: {error}"), file=sys.stderr)
        if isinstance(error, OSError):
            _drop_output()
        return 2


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from rau.config import (
            version_of,  # late, since the metadata of distributions are slow to read
        )

        print(f"rau {version_of('ring-attention-update') or '(a source tree that is not installed)'}")
        parser.exit()


def _meant(unknown: list[str], parser: argparse.ArgumentParser) -> str:
    """Word the option that the first unknown one seems to be."""
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    close = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
    return f". Did you mean {close[0]}?" if close else ""


def _drop_output() -> None:
    """Python flushes stdout once more at its exit: into nothing, where that would fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
