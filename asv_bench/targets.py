"""The numbers that rau means to reach, and what this machine reaches.

    python asv_bench/targets.py                     a table; some minutes
    python asv_bench/targets.py --plot roof.png     instead, a chart of all that `python -m rau bench` measures

Speed is no verdict: the exit status is 0 whatever was measured. docs/benchmarks.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from benchmarks import probes

from rau import RauError
from rau.cli import session
from rau.cli.bench import add_scale, busy, system_load
from rau.cli.bench.peers import COMPILED, EAGER, WRITTEN
from rau.cli.bench.survey import PLAN, QUICK, Group, survey
from rau.cli.bench.timing import thread_count
from rau.cli.bench.workload import LARGE, Size
from rau.cli.console import Step, progress, table
from rau.config import collect
from rau.install import command

REACHED, MISSED, UNMEASURED = "reached", "MISSED", "not measured here"
STEPS = 8  # of measurements()
_ALL = ("float32", "bfloat16", "float16")
_LEGEND = """\
large is MindSpeed's (S, B, N, D) = (8192, 1, 32, 128), or less where memory is short; the lowest and highest of the
processes stand in brackets. Of several figures the worst decides. A figure is this machine's, as busy as it is now.
docs/benchmarks.md has figures of a quiet one, and says where the rest of each goes."""


class Scale(NamedTuple):
    """How much is measured."""

    tokens: int = 8192  # of the large problems
    seconds: float = 3.0  # for each size and dtype
    processes: int = 5
    compiled: bool = True  # torch.compile too


QUICK_SCALE = Scale(256, 0.0, 1, False)


class Target(NamedTuple):
    """A number to reach."""

    what: str
    source: str  # the measurement that it is read from, a key of what measurements() returns
    figures: Callable[[Any], Mapping[str, Any]]  # takes them out of it, by name: a number, or one from each process
    limit: float
    least: bool  # whether `limit` is the least or the most that a figure may be
    form: str = "{:.2f}"  # how figures are worded


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
    Target("smallest call, NumPy, out=: plain Python takes", "smallest, NumPy",
           lambda found: {"": found[probes.PYTHON] / found["out="]}, 25.0, True, "{:.0f}x"),
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
    """Measure all that can be measured here: by source, or the exception that says why one cannot be had."""
    seconds, memory = scale.seconds, available_memory() // 2
    size = fitted(LARGE._replace(lengths=(scale.tokens,)), memory)
    tokens = 10_000 if scale.tokens >= LARGE.tokens else scale.tokens
    tokens = fitted(Size("TND", (tokens,), 8, 128), memory).tokens
    sources: dict[str, Callable[[], Any]] = {
        "large": lambda: [_fresh(probes.large, threads, size, seconds) for _ in range(scale.processes)],
        "composites": lambda: _fresh(probes.composites, threads, size, seconds, scale.compiled),
        "smallest, NumPy": lambda: _fresh(probes.smallest, threads, seconds, False),
        "smallest, torch": lambda: _fresh(probes.smallest, threads, seconds, True),
        "sequences": lambda: _fresh(probes.sequences, threads, tokens, seconds),
        "GPU": lambda: [_fresh(probes.gpu, size, seconds)],
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
    """Word a target and what :func:`measurements` has for its source."""
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


def fitted(size: Size, memory: int) -> Size:
    """Halve the tokens until everything that is measured beside each other fits into so many bytes.

    Three states, a fresh one, three arrays of the roof and the temporaries of the backends and peers that make some come
    to less than 16 float32 outputs.
    """
    while size.tokens > len(size.lengths) and 16 * 4 * size.tokens * size.heads * size.head_dim > memory:
        size = size._replace(lengths=tuple(max(1, length // 2) for length in size.lengths))
    return size


def available_memory() -> int:
    """Bytes that may be filled without pushing anybody else's out; 1 GiB where the system does not say."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    except (OSError, StopIteration, ValueError, IndexError):
        try:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
        except (AttributeError, OSError, ValueError):
            pass
    try:  # a container's own limit
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        found.append(max(limit - used, 0))
    except (OSError, ValueError):  # none; "max" is no number
        pass
    return min(found, default=1 << 30)


_FLOPS = 3  # an element: two products and their sum; the rows' own arithmetic, once for D elements, is left out
_STYLES = {"triad": "-", "in-place triad": "--", "copy": ":"}
_MARKERS = {"out=": "o", "fresh": "s", "in place": "^"}


def draw(groups: Iterable[Group], file: str, where: str = "") -> None:
    """Draw the roofline chart: a column for each size, its roof, and a point for each call under it.

    Every call does so little with a byte that the memory alone is its roof, and calls of one dtype and head dimension do
    the same: columns are therefore side by side, with their flop/byte written beneath, and the scale is bandwidth. Whiskers go
    from one quartile of the time to the other; `where` says on what it was measured, and when.
    """
    from matplotlib.figure import Figure

    shown = [group for group in groups if group.roof]
    figure = Figure(figsize=(2.5 + 1.7 * max(2, len(shown)), 6), layout="constrained")
    axes = figure.add_subplot(yscale="log")
    names = list(dict.fromkeys(row.name for group in shown for row in group.rows))
    labels = []
    for column, group in enumerate(shown):
        for name, style in _STYLES.items():
            rate = group.roof[name].gigabytes_per_second
            axes.plot([column - 0.4, column + 0.4], [rate, rate], style, color="black", linewidth=1)
        for row in group.rows:
            place = names.index(row.name)
            x = column - 0.35 + 0.7 * (place + 0.5) / len(names)
            rate, spread = row.gigabytes_per_second, row.seconds
            whiskers = [[rate - rate * spread.median / spread.high], [rate * spread.median / spread.low - rate]]
            axes.errorbar(x, rate, whiskers, fmt=_MARKERS[row.how], color=f"C{place}", fillstyle="none", capsize=2, elinewidth=0.8)
        size = group.size
        intensity = _FLOPS * size.tokens * size.heads * size.head_dim / group.bytes
        labels.append(f"{size}".replace(", ", "\n") + f"\n{group.dtype}\n{intensity:.2f} flop/byte")
    for place, name in enumerate(names):
        axes.plot([], [], "o", color=f"C{place}", label=name)
    for how, marker in _MARKERS.items():
        axes.plot([], [], marker, color="grey", fillstyle="none", label=how)
    for name, style in _STYLES.items():
        axes.plot([], [], style, color="black", linewidth=1, label=name)
    axes.set_xticks(range(len(shown)), labels)
    axes.set_ylabel("GB/s")
    figure.suptitle("Merging attention states:\nthe memory's roof, and what is reached under it")
    axes.set_title(where, fontsize="small", wrap=True)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(True, which="both", axis="y", alpha=0.2)
    figure.savefig(file)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; print the table, or draw the chart."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_scale(parser)
    text = "instead, draw a chart of what every backend reaches into a file (.png, .svg, .pdf); needs matplotlib"
    parser.add_argument("--plot", metavar="FILE", help=text)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else")
    options = parser.parse_args(arguments)
    if options.plot:
        try:
            draw([], options.plot)  # what stands against it is told before anything takes time
        except ImportError:
            parser.error(f"argument --plot: needs matplotlib: {command('bench')}")
        except (OSError, ValueError) as error:
            parser.error(f"argument --plot: {error}")
    with thread_count(options.threads) as threads:
        configuration, load, started = collect(), system_load(), time.monotonic()
        if not options.json:
            print(session.heading(configuration), *busy(load), sep="\n", flush=True)
        if options.plot:
            document: dict[str, Any] = _chart(options, configuration, threads)
        else:
            document = _table(options, threads)
    seconds = time.monotonic() - started
    if options.json:
        session.print_json(
            document
            | {"quick": options.quick, "threads": threads, "load": load, "seconds": seconds, "configuration": configuration}
        )
    else:
        print(f"\n{seconds:.0f} s")
    return 0


def _table(options: argparse.Namespace, threads: int) -> dict[str, Any]:
    scale = QUICK_SCALE if options.quick else Scale()
    with progress(STEPS, quiet=options.json) as step:
        found = measurements(threads, scale, step)
    lines = [judged(target, found[target.source]) for target in TARGETS]
    if not options.json:
        rows = [[line.what, line.goal, "" if line.verdict == UNMEASURED else line.measured, line.verdict] for line in lines]
        print("", *table(["what", "goal", "measured", ""], rows), "", sep="\n")
        missing = session.by_reason((line.what, line.measured) for line in lines if line.verdict == UNMEASURED)
        for reason, whats in missing:
            print(f"not measured: {'; '.join(whats)}\n    {reason}")
        print(_LEGEND)
    return {"scale": scale, "targets": lines}


def _chart(options: argparse.Namespace, configuration: dict[str, Any], threads: int) -> dict[str, Any]:
    backends, not_run = session.choose(None)
    plan = QUICK if options.quick else PLAN
    with progress(len(plan), quiet=options.json) as step:
        groups = list(survey(plan, backends, None, not_run, step))
    where = f"{configuration['platform'].partition(', ')[2]}; {session.counted(threads, 'thread')}; {time.strftime('%d %B %Y')}"
    draw(groups, options.plot, where)
    if not options.json:
        for name, reason in not_run.items():
            print(f"not run: {name} ({reason})")
        print(f"drawn: {options.plot}")
    return {"plot": options.plot, "groups": groups, "not_run": not_run}


if __name__ == "__main__":
    sys.exit(main())
