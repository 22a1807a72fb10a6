"""What the testing commands share: whom they test, how they begin, how they refuse and how they end."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rau.cli.console import Step, progress

INTERRUPTED = 130  # as a shell has it for a process ended by Ctrl-C
EXIT_STATUS = (
    "Exit status: 0 passed, 1 failed, 2 wrong usage or a named backend missing, "
    "130 stopped by Ctrl-C before anything was found wrong (1 after)."
)
LEGEND = (
    "attn_out, softmax_sum: largest error against the oracle, as a share of the bound: 1 is the limit, or the "
    "backend's tolerance, which does not widen the rounding to 16 bits; inf: a bit was not kept, or NaN stands where it "
    "must not"
)
BACKEND = "a registered backend, or module:Class for a class in a module of the current folder, not installed"


def refuse(command: str, *sentences: str) -> int:
    """Say on stderr why a command does nothing.

    Parameters
    ----------
    command : str
    *sentences : str

    Returns
    -------
    int
        The exit status, 2.
    """
    for sentence in sentences:
        print(f"python -m rau {command}: error: {sentence}", file=sys.stderr)
    return 2


def choose(names: str | None) -> tuple[list[Any], dict[str, str]]:
    """Load the backends that are asked for, or all that are available.

    Parameters
    ----------
    names : str or None
        Separated by commas.

    Returns
    -------
    backends : list of Backend
    not_run : dict of str to str
        The registered ones that were not asked for by name and are not available, with the reasons.

    Raises
    ------
    RauError
        If one that is asked for cannot be had.
    """
    from rau import registry
    from rau.testing.conformance import load

    if names is not None:
        asked_for = dict.fromkeys(name.strip() for name in names.split(","))
        return [load(name) for name in asked_for if name], {}
    states = registry.status()
    available = [registry.get(state.name) for state in states if state.available]
    return available, {state.name: state.reason for state in states if not state.available}


def heading(configuration: dict[str, Any]) -> str:
    """Word what a report begins with: versions, the machine, the core, and every RAU_* variable.

    Parameters
    ----------
    configuration : dict
        From :func:`rau.config.collect`.

    Returns
    -------
    str
    """
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
    number = f"{threads['number']} thread{'s' if threads['number'] != 1 else ''} (from {threads['origin']})"
    return f"compiled core: {core['simd']}, {number if core['openmp'] else 'no OpenMP, 1 thread'}, {core['compiler']}"


@contextmanager
def watched(total: float, quiet: bool) -> Iterator[Step]:
    """Show progress to a person at a terminal, and to nobody else.

    Parameters
    ----------
    total : float
    quiet : bool
        Show nothing.

    Yields
    ------
    step : callable
        As :func:`rau.cli.console.progress` has it.
    """
    if quiet or not sys.stdout.isatty():
        yield lambda what, weight=1: None
    else:
        with progress(total) as step:
            yield step


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document on stdout; infinities and NaN, which JSON has not, become strings."""
    print(json.dumps(_strict(document), indent=2, allow_nan=False))


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def counted(number: int, thing: str) -> str:
    """Word a number of things.

    Examples
    --------
    >>> counted(1, "case"), counted(1200, "case")
    ('1 case', '1,200 cases')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def both(who: str) -> str:
    """Word the name of a backend, or of a pair as reports have it.

    Examples
    --------
    >>> both("numpy"), both("cython, numpy")
    ('numpy', 'cython and numpy')
    """
    return who.replace(", ", " and ")


def by_reason(items: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Sort what was left out by the reason.

    Parameters
    ----------
    items : iterable of (id, reason)

    Returns
    -------
    list of (reason, ids)
        The most frequent first.

    Examples
    --------
    >>> by_reason([("a", "too wide"), ("b", "too long"), ("c", "too long")])
    [('too long', ['b', 'c']), ('too wide', ['a'])]
    """
    reasons: dict[str, list[str]] = {}
    for id, reason in items:
        reasons.setdefault(reason, []).append(id)
    return sorted(reasons.items(), key=lambda item: -len(item[1]))


def share(value: float) -> str:
    """Word a share of the bound.

    Examples
    --------
    >>> share(0.99961), share(45_200_000.0), share(float("inf"))
    ('0.9996', '4.52e+07', 'inf')
    """
    return f"{value:.4f}" if value < 100 else f"{value:.3g}"


def exit_status(passed: bool, wrong: bool, interrupted: bool) -> int:
    """The exit status of a command that judges.

    Parameters
    ----------
    passed, wrong, interrupted : bool

    Returns
    -------
    int
    """
    if interrupted and not wrong:
        return INTERRUPTED
    return 0 if passed else 1
