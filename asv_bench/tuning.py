"""What the choices of the compiled core cost on this processor: tiles, stores around the cache, prefetching.

    python asv_bench/tuning.py [--seconds 2] [--threads 1]

Each is set to other values than the core has chosen (`rau._core.tuning`), and measured in turn with those, in one process:
the table has times by those of the core's choice. Bits do not depend on any of them.
"""

from __future__ import annotations

import argparse

from rau import _core, config, registry
from rau.cli.bench.timing import Call, interleaved, ratio, thread_count
from rau.cli.bench.workload import CACHED, LARGE, SERVING, Size, modes, states
from rau.cli.console import table

TRIED = {
    "tile_bytes": (1 << 16, 1 << 17, 1 << 18, 1 << 19),
    "stream_bytes": (0, 1 << 23, 1 << 62),
    "rows_ahead": (0, 2, 4, 8),
}
SIZES = (CACHED, SERVING._replace(lengths=(1024,)), SERVING, LARGE._replace(lengths=(4096,)))


def tuned(call: Call, **changed: int) -> Call:
    """The same call, with the core set otherwise."""
    setting = _core.tuning() | changed

    def run() -> None:
        _core.tune(**setting)
        call()

    return run


def measured(size: Size, dtype: str, how: str, seconds: float) -> list[list[str]]:
    """One line for each value: its time by that of the core's own choice."""
    call = modes(size, registry.get("cython"), states(size, dtype, 3))[how]
    own = _core.tuning()
    lines = []
    for name, values in TRIED.items():
        calls = {"own": tuned(call)} | {str(value): tuned(call, **{name: value}) for value in values if value != own[name]}
        times = interleaved(calls, seconds)
        _core.tune(**own)
        for value in list(calls)[1:]:
            spread = ratio(times[value], times["own"])
            lines.append([str(size), dtype, how, name, value, f"{spread.median:.2f}", f"{spread.low:.2f} to {spread.high:.2f}"])
    return lines


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each line's values together (default 2)")
    parser.add_argument("--threads", type=int, help="of the core (default: all)")
    given = parser.parse_args()
    found = config.collect()
    print(found["platform"], found["core"]["simd"], _core.tuning(), sep="\n")
    with thread_count(given.threads):
        lines = [
            line
            for size in SIZES
            for dtype in ("float32", "bfloat16")
            for how in ("out=", "in place")
            for line in measured(size, dtype, how, given.seconds)
        ]
    print(*table(["size", "dtype", "how", "choice", "value", "time", "quartiles"], lines), sep="\n")


if __name__ == "__main__":
    main()
