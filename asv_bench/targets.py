"""The numbers to reach, and what this machine reaches: ``python -m rau bench --targets``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np

from benchmarks import probes
from rau.cli.bench.peers import COMPILED, EAGER, WRITTEN
from rau.cli.console import Step
from rau.errors import RauError

REACHED, MISSED, UNMEASURED = "reached", "MISSED", "not measured here"
STEPS = 8  # of measurements()
_ALL = ("float32", "bfloat16", "float16")


class Scale(NamedTuple):
    """How much is measured.

    Attributes
    ----------
    tokens : int
        Of the large problems.
    seconds : float
        For each size and dtype.
    processes : int
    compiled : bool
        torch.compile too.
    """

    tokens: int = 8192
    seconds: float = 3.0
    processes: int = 5
    compiled: bool = True


QUICK = Scale(256, 0.0, 1, False)


class Target(NamedTuple):
    """A number to reach.

    Attributes
    ----------
    what : str
    source : str
        The measurement that it is read from, a key of what :func:`measurements` returns.
    figures : callable
        Takes them out of it, by name: a number, or one from each process.
    limit : float
    least : bool
        Whether `limit` is the least or the most that a figure may be.
    form : str
        How figures are worded.
    """

    what: str
    source: str
    figures: Callable[[Any], Mapping[str, Any]]
    limit: float
    least: bool
    form: str = "{:.2f}"


class Line(NamedTuple):
    """A target, and what came of it; `measured` words the figures, or says why there are none."""

    what: str
    goal: str
    measured: str
    verdict: str
    figures: Mapping[str, Any]


def _shares(how: str, *dtypes: str) -> Callable[[Any], Mapping[str, Any]]:
    return lambda found: {dtype: [one[dtype][how] for one in found] for dtype in dtypes if dtype in found[0]}


def _slower(how: str, *names: str) -> Callable[[Any], Mapping[str, Any]]:
    def figures(found: Any) -> Mapping[str, Any]:  # of several composites the best counts
        times = {dtype: [one[name][how] for name in names if name in one] for dtype, one in found.items()}
        return {dtype: min(some) for dtype, some in times.items() if some}

    return figures


def _one(name: str, times: float = 1.0) -> Callable[[Any], Mapping[str, Any]]:
    return lambda found: {"": found[name] * times}


TARGETS = (
    Target("large, out=, float32: of a triad", "large", _shares("out=", "float32"), 0.92, True),
    Target("large, out=, 16-bit: of a triad", "large", _shares("out=", *_ALL[1:]), 0.90, True),
    Target("large, in place: of an in-place triad", "large", _shares("in place", *_ALL), 0.88, True),
    Target("torch eager by out=", "composites", _slower("out=", EAGER, WRITTEN), 6.0, True, "{:.1f}x"),
    Target("torch eager by fresh outputs", "composites", _slower("fresh", EAGER, WRITTEN), 4.0, True, "{:.1f}x"),
    Target("torch.compile by out=", "composites", _slower("out=", COMPILED), 2.0, True, "{:.1f}x"),
    Target("torch.compile by fresh outputs", "composites", _slower("fresh", COMPILED), 1.5, True, "{:.1f}x"),
    Target("smallest call, NumPy, out=", "smallest, NumPy", _one("out=", 1e6), 8.0, False, "{:.1f} us"),
    Target("smallest call, NumPy, fresh", "smallest, NumPy", _one("fresh", 1e6), 10.0, False, "{:.1f} us"),
    Target("smallest call, torch, out=", "smallest, torch", _one("out=", 1e6), 12.0, False, "{:.1f} us"),
    Target("smallest call, torch, fresh", "smallest, torch", _one("fresh", 1e6), 15.0, False, "{:.1f} us"),
    Target("smallest call, torch, fresh: of torch eager", "smallest, torch",
           lambda found: {"": found["fresh"] / found[EAGER]}, 1 / 3, False),
    Target("10,000 sequences of one token by one of 10,000", "sequences", _one("ratio"), 1.3, False),
    Target("GPU, large: of a copy on the device", "GPU", _shares("out=", *_ALL), 0.92, True),
    Target("import rau beyond NumPy", "import", _one("seconds", 1e3), 15.0, False, "{:.1f} ms"),
    Target("accuracy: worst error by its bound", "accuracy", lambda found: found["share"], 1.0, False, "{:.4f}"),
    Target("accuracy: 16-bit elements rounded correctly", "accuracy", lambda found: found["rounded"], 0.999, True,
           "{:.3%}"),
)  # fmt: skip


def measurements(threads: int, scale: Scale, step: Step) -> dict[str, Any]:
    """Measure all that can be measured here.

    Parameters
    ----------
    threads : int
    scale : Scale
    step : callable
        From :func:`rau.cli.console.progress`; called `STEPS` times.

    Returns
    -------
    dict
        By source; the exception that says why, where one cannot be had.
    """
    tokens, seconds = scale.tokens, scale.seconds
    sources: dict[str, Callable[[], Any]] = {
        "large": lambda: [_fresh(probes.large, threads, tokens, seconds) for _ in range(scale.processes)],
        "composites": lambda: _fresh(probes.composites, threads, tokens, seconds, scale.compiled),
        "smallest, NumPy": lambda: _fresh(probes.smallest, threads, seconds, False),
        "smallest, torch": lambda: _fresh(probes.smallest, threads, seconds, True),
        "sequences": lambda: _fresh(probes.sequences, threads, tokens, seconds),
        "GPU": lambda: [_fresh(probes.gpu, tokens, seconds)],
        "import": lambda: _importing(2 * scale.processes + 1),
        "accuracy": probes.accuracy,
    }
    found = {}
    for name, measure in sources.items():
        step(name)
        try:
            found[name] = measure()
        except (RauError, ImportError, MemoryError) as error:
            found[name] = error
    return found


def judged(target: Target, found: Any) -> Line:
    """Word a target and what was measured for it.

    Parameters
    ----------
    target : Target
    found : object
        What :func:`measurements` has for its source.

    Returns
    -------
    Line
    """
    goal = f"at {'least' if target.least else 'most'} {target.form.format(target.limit)}"
    if isinstance(found, Exception):
        return Line(target.what, goal, str(found).partition("\n")[0], UNMEASURED, {})
    figures = target.figures(found)
    if not figures:
        return Line(target.what, goal, "left out of this run", UNMEASURED, {})
    medians = {name: float(np.median(values)) for name, values in figures.items()}
    parts = []
    for name, values in figures.items():
        part = f"{name} {target.form.format(medians[name])}".strip()
        if isinstance(values, list) and len(values) > 1:
            part += f" ({target.form.format(min(values))} to {target.form.format(max(values))})"
        parts.append(part)
    worst = min(medians.values()) if target.least else -max(medians.values())
    met = worst >= (target.limit if target.least else -target.limit)
    return Line(target.what, goal, ", ".join(parts), REACHED if met else MISSED, figures)


def _fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise MemoryError("the process that measured it was killed, as happens when memory runs out") from error


def _importing(processes: int) -> dict[str, float]:
    """What `import rau` takes after `import numpy`, as the median over fresh interpreters."""
    code = "import time, numpy; start = time.perf_counter(); import rau; print(time.perf_counter() - start)"
    command = [sys.executable, "-c", code]
    compiled = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}  # an installed package has its bytecode; a checkout gets it now

    def seconds() -> float:
        return float(subprocess.run(command, capture_output=True, text=True, check=True, env=compiled).stdout)

    seconds()
    return {"seconds": float(np.median([seconds() for _ in range(processes)]))}
