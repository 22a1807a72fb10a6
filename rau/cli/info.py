"""``python -m rau info``: what is installed, what is missing, and which backend runs a call."""

from __future__ import annotations

import argparse
from typing import Any

from rau.cli import session
from rau.config import collect, render


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Declare the command."""
    return subparsers.add_parser(
        "info",
        help="show versions, the compiled core, backends with their reasons, settings",
        epilog=session.examples("info", "info --json"),
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the configuration. Never fails: a bad setting is what it is there to show."""
    config = collect()
    if arguments.json:
        session.print_json(config)
    else:
        print(render(config))
    return 0
