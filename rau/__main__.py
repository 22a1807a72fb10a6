"""``python -m rau COMMAND``."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys

COMMANDS = ("info", "demo", "bench", "check", "difftest", "cases", "diagnose")


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    arguments : list of str, optional
        ``sys.argv[1:]`` by default.

    Returns
    -------
    int
        The exit status: 0 good, 1 the verdict is bad, 2 wrong usage or a named backend missing.
    """
    parser = argparse.ArgumentParser(prog="python -m rau", description="Merge partial attention states.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS:
        importlib.import_module(f"rau.cli.{command}").add_parser(subparsers)
    parsed = parser.parse_args(arguments)
    if parsed.command is None:
        parser.print_help(sys.stderr)
        return 2
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a message may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        return int(parsed.run(parsed))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at exit
        return 141


if __name__ == "__main__":
    sys.exit(main())
