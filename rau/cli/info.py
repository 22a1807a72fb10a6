"""``python -m rau info``: what is installed, what is missing, and who runs a call."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rau.config import collect, render


def add_parser(subparsers: Any) -> None:
    """Declare the command.

    Parameters
    ----------
    subparsers : argparse._SubParsersAction
    """
    parser = subparsers.add_parser("info", help="versions, compiled core, backends with their reasons, settings")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the configuration. Never fails: a bad setting is what it is there to show."""
    config = collect()
    print(json.dumps(config, indent=2) if arguments.json else render(config))
    return 0
