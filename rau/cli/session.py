"""What the commands share: types of arguments, the backends they test, how they begin, what they print and how they end."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rau.cli.console import Visible
from rau.errors import RauError
from rau.install import command

if TYPE_CHECKING:
    from rau.testing.apart import Apart, Here

INTERRUPTED = 130  # as a shell has it for a process ended by Ctrl-C
EXIT_STATUS = (
    "Exit status: 0 passed, 1 failed, 2 wrong usage or a named backend is missing, "
    "130 stopped by Ctrl-C before anything was found wrong (1 if after)."
)
LEGEND = (
    "attn_out, softmax_sum: largest error against the oracle, as a share of the bound; the limit is 1, or the "
    "backend's tolerance, which does not widen the rounding to 16 bits; inf: a bit was not kept, or there is a NaN where "
    "there must not be"
)
BACKEND = "a registered backend, or module:Class for a class in a module of the current folder, which need not be installed"


class UsageError(RauError, ValueError):
    """Options whose values are each possible, but which cannot be followed."""


def whole(least: int) -> Callable[[str], int]:
    """Make a type of argument: a whole number, `least` or more."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number, {least} or more")
        return number

    return convert


def positive(text: str) -> float:
    """Convert an argument that is a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a number above 0")
    return number


def path(text: str) -> str:
    """Convert an argument that names a file or folder."""
    if not text:  # as "$DIR" is where it is unset; it would be taken for an option that was not given
        raise argparse.ArgumentTypeError("got an empty name; expected a path")
    return text


def report_folder(report: str) -> Path:
    """Make the folder of a page: what stands against it is told before anything takes time."""
    if find_spec("rich") is None:
        raise UsageError(f"--report needs rich: {command('cli')}")
    try:
        Path(report).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        told = f"--report: got {report!r}; expected a folder that exists or can be made: {error.strerror}"
        raise UsageError(told) from error
    return Path(report)


def save(report: str, write: Callable[[], None]) -> None:
    """Write a page, or say what stands against it."""
    try:
        write()
    except OSError as error:
        raise UsageError(f"--report: got {report!r}; the page could not be written: {error}") from error


class _Names(argparse.Action):
    """Names in as many words as one likes, and with commas between them."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        names = [name.strip() for text in values for name in text.split(",") if name.strip()]
        if not names:
            raise argparse.ArgumentError(self, f"got {values[0]!r}; expected names of backends, such as numpy,cython")
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), *names])


def add_backends(parser: argparse.ArgumentParser) -> None:
    """Declare the option that names backends."""
    text = f"only these backends, with commas or spaces between them (default: all that are available): {BACKEND}"
    parser.add_argument("--backends", nargs="+", action=_Names, metavar="NAME", help=text)


def add_one_backend(parser: argparse.ArgumentParser) -> None:
    """Declare the argument that names one backend; it is an option elsewhere, and may be one here."""
    parser.add_argument("backend", nargs="?", metavar="NAME", help=BACKEND)
    parser.add_argument("--backends", nargs="+", action=_Names, metavar="NAME", help="the same, as other commands spell it")


def one_backend(arguments: argparse.Namespace) -> str:
    """Return the name of the backend that is meant."""
    names = [name for name in (arguments.backend, *(arguments.backends or ())) if name]
    if len(names) != 1 or "," in names[0]:
        got = ", ".join(names) or "none"
        raise UsageError(f"got {got}; expected the name of one backend: python -m rau {arguments.command} NAME")
    return str(names[0])


class Formatter(argparse.HelpFormatter):
    """Wraps paragraphs, and leaves those with indented lines as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.split("\n\n")
        return "\n\n".join(part if "\n " in part else super(Formatter, self)._fill_text(part, width, indent) for part in parts)


def examples(*commands: str) -> str:
    """Word examples of a command, for the end of its help."""
    return "\n".join(["Examples:", *(f"  python -m rau {command}" for command in commands)])


def add_apart(parser: argparse.ArgumentParser, what: str = "a case", timeout: float = 60.0) -> None:
    """Declare where backends run that are not rau's own."""
    text = f"seconds after which {what} counts as hanging, where it runs in a process of its own (default: {timeout:g})"
    parser.add_argument("--timeout", type=positive, default=timeout, metavar="S", help=text)
    text = "run a backend that is not rau's own in this process too, for a debugger: a crash then ends the run"
    parser.add_argument("--in-process", action="store_true", help=text)


@contextmanager
def under_test(
    names: Sequence[str] | None, arguments: argparse.Namespace
) -> Iterator[tuple[list[Any], dict[str, str], Apart | Here]]:
    """Load backends as :func:`choose` does, and tell where they run: apart, if one is not rau's own."""
    # Late, as in all commands: --help does not pay for what a run needs.
    from rau.plugins import OURS
    from rau.testing.apart import Apart, Here

    missing: dict[str, str] = {}
    if names is None:
        backends, missing = choose(None)
        names = [backend.name for backend in backends]
    names = list(dict.fromkeys(names))
    if arguments.in_process or set(names) <= set(OURS):
        yield choose(names)[0], missing, Here()
        return
    with Apart(names, arguments.timeout) as place:
        place.backends, _ = choose(names)  # which the other process has survived
        yield list(place.backends), missing, place


def choose(names: Sequence[str] | None) -> tuple[list[Any], dict[str, str]]:
    """Load the backends that are named, or all that are available, with the reasons why others are not."""
    # Late, as in all commands: --help does not pay for what a run needs.
    from rau import registry
    from rau.testing.under_test import load

    missing = {}
    if names is None:
        if wanted := os.environ.get("RAU_BACKEND"):
            note = "chooses for calls of rau; this command runs every backend that is available"
            print(f"RAU_BACKEND={wanted} {note}: --backends {wanted} runs that one", file=sys.stderr)
        states = registry.status()
        names = [state.name for state in states if state.available]
        missing = {state.name: state.reason for state in states if not state.available}
    backends = [load(name) for name in dict.fromkeys(names)]
    called = [backend.name for backend in backends]
    twice = dict.fromkeys(name for name in called if called.count(name) > 1)
    if twice:
        raise UsageError(f"several backends are called {', '.join(twice)}; give each class its own name")
    return backends, missing


def add_tables(parser: argparse.ArgumentParser) -> None:
    """Declare the options that print the figures as a table for elsewhere, and nothing else."""
    forms = parser.add_mutually_exclusive_group()
    for form, text in (
        ("csv", "commas, numbers in full"),
        ("markdown", "needs tabulate"),
        ("latex", "needs tabulate, and booktabs"),
    ):
        text = f"the figures alone, as a table: {text}"
        forms.add_argument(f"--{form}", dest="form", action="store_const", const=form, help=text)


def check_form(form: str | None) -> None:
    """Refuse a table that cannot be made, before anything takes time."""
    if form in _TABLES and find_spec("tabulate") is None:
        raise UsageError(f"--{form} needs tabulate: {command('cli')}")


_TABLES = {"markdown": "github", "latex": "latex_booktabs"}  # of tabulate


def print_table(form: str, records: Sequence[dict[str, Any]]) -> None:
    """Print figures, a record a row, of the same keys each."""
    if form == "csv":
        writer = csv.DictWriter(sys.stdout, list(records[0]) if records else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return
    from tabulate import tabulate

    print(tabulate(records, headers="keys", tablefmt=_TABLES[form], floatfmt=".4g", missingval="-"))


def heading(configuration: dict[str, Any]) -> str:
    """Write what a report begins with: versions, the machine, the core, and every RAU_* variable."""
    lines = [", ".join(f"{name} {version}" for name, version in configuration["versions"].items())]
    lines += [configuration["platform"], _core(configuration)]
    variables = configuration["environment"]
    lines += [f"{name}={entry['value']} ({entry['note']})" for name, entry in variables.items()]
    if not variables:
        lines.append("no RAU_* variable is set")
    return "\n".join(lines)


def _core(configuration: dict[str, Any]) -> str:
    core, threads = configuration["core"], configuration["threads"]
    if not core["compiled"]:
        return "compiled core: none"
    number = f"{counted(threads['number'], 'thread')} (from {threads['origin']})"
    return f"compiled core: {core['simd']}, {number if core['openmp'] else 'no OpenMP, 1 thread'}, {core['compiler']}"


def print_json(document: Any) -> None:
    """Print one JSON document on stdout; infinities and NaN, which JSON has not, become strings."""
    stream = sys.stdout.document if isinstance(sys.stdout, Visible) else sys.stdout
    print(json.dumps(_plain(document), indent=2, allow_nan=False), file=stream)


def _plain(value: Any) -> Any:
    """Turn dataclasses, named tuples and arrays into what JSON has."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    elif hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def counted(number: int, thing: str) -> str:
    """Word a number of things.

    >>> counted(1, "case"), counted(1200, "case")
    ('1 case', '1,200 cases')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def both(who: str) -> str:
    """Word the name of a backend, or of a pair as reports have it.

    >>> both("numpy"), both("cython, numpy")
    ('numpy', 'cython and numpy')
    """
    return who.replace(", ", " and ")


def by_reason(items: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Sort (id, reason) into (reason, ids), the most frequent first.

    >>> by_reason([("a", "too wide"), ("b", "too long"), ("c", "too long")])
    [('too long', ['b', 'c']), ('too wide', ['a'])]
    """
    reasons: dict[str, list[str]] = {}
    for id, reason in items:
        reasons.setdefault(reason, []).append(id)
    return sorted(reasons.items(), key=lambda item: -len(item[1]))


def share(value: float) -> str:
    """Word a share of the bound.

    >>> share(0.99961), share(45_200_000.0), share(float("inf"))
    ('0.9996', '4.52e+07', 'inf')
    """
    return f"{value:.4f}" if value < 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Word a time.

    >>> duration(0.0123), duration(0.0000069)
    ('12.30 ms', '6.9 us')
    """
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def exit_status(passed: bool, wrong: bool, interrupted: bool) -> int:
    """The exit status of a command that judges, and that may have been interrupted."""
    if interrupted and not wrong:
        return INTERRUPTED
    return 0 if passed else 1
