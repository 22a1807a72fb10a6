"""What the compiled core reaches of the memory's roof on this processor, by shape; and what its choices cost there.

    python asv_bench/tuning.py states|rows|parts|dtypes|choices [--seconds 2] [--threads 1]

The first four have shares: a call's roof is the sum of as many arrays as it has states, each of a state's bytes, with the same
threads and stores (`rau._core.roof`; of two arrays it is the triad); for some heads of larger arrays over the same runs, as far
apart. With `choices`, each is set to other values than the core has chosen (`rau._core.tuning`); the table has times by those of
the core's choice. What is compared is measured in turn, in one process. Bits do not depend on any of the choices.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np

from rau import AttentionState, StreamingMerge, _core, config, get_num_threads, merge_states, registry
from rau.arrays.memory import aligned
from rau.cli.bench.timing import Call, interleaved, ratio, thread_count
from rau.cli.bench.workload import CACHED, LARGE, SERVING, Size, modes, states
from rau.cli.console import table

DTYPES = ("float32", "bfloat16", "float16", "float64")
TRIED = {
    "tile_bytes": (1 << 16, 1 << 17, 1 << 18, 1 << 19),
    "stream_bytes": (0, 1 << 23, 1 << 62),
    "rows_ahead": (0, 2, 4, 8),
}
SIZES = (CACHED, SERVING._replace(lengths=(1024,)), SERVING, LARGE._replace(lengths=(4096,)))


class Case(NamedTuple):
    """What is held to its roof; `part` of larger arrays, if any."""

    size: Size
    dtype: str
    how: str = "out="
    count: int = 2
    part: str = ""


SHARES = {
    "states": [Case(SERVING, dtype, count=count) for dtype in DTYPES for count in (2, 3, 4, 8, 16)],
    "rows": [
        Case(SERVING._replace(lengths=(SERVING.tokens * 128 // head_dim,), head_dim=head_dim), dtype)
        for dtype in DTYPES
        for head_dim in (22, 32, 40, 59, 72, 80, 96, 128, 600)
    ],
    "parts": [
        *(Case(SERVING, dtype, part=part) for dtype in DTYPES for part in ("8 of 16 heads", "2 of 16 heads", "1 of 16 heads")),
        *(Case(SERVING._replace(lengths=(512,) * 8, softmax_layout="SBH"), dtype, "in place", part="back") for dtype in DTYPES),
    ],
    "dtypes": [
        Case(size, dtype, how)
        for size in (CACHED, LARGE._replace(lengths=(4096,)))
        for dtype in DTYPES
        for how in ("out=", "in place")
    ],
}


def state_bytes(state: AttentionState) -> int:
    """Bytes of all that a state has."""
    return sum(array.nbytes for array in state)


def roof(bytes_: int, arrays: int, in_place: bool = False, runs: int = 1, part: float = 1.0) -> Call:
    """The roof of a merge that moves so many bytes, from so many arrays into another: from a part of each run of those that
    would be `part` as long."""
    size = int(bytes_ / (arrays + 1) / part) // (64 * runs) * 16
    made = [aligned((runs, size), np.float32) for _ in range(arrays + 1)]
    for array in made:
        array[:] = 1
    *sources, to = [array[:, : int(size * part)] for array in made]
    around = not in_place and 4 * to.size > _core.tuning()["stream_bytes"]
    return lambda: _core.roof(sources[0] if in_place else to, tuple(sources), around, get_num_threads())


def held(case: Case) -> tuple[Call, Call]:
    """A case's call, and its roof."""
    size, count = case.size, case.count
    made = states(size, case.dtype, count + 1)
    if case.part == "back":  # into the running state, which is float32 at least
        running, partial = states(size, "float64" if case.dtype == "float64" else "float32", 1)[0], states(
            size._replace(lengths=tuple(length // 2 for length in size.lengths)), case.dtype, 1)[0]  # fmt: skip
        ring = StreamingMerge(like=running, backend="cython", **size.options)
        return lambda: ring.update(*partial, tokens="back"), roof(state_bytes(running) + state_bytes(partial), 2, True)
    if case.part:
        heads = int(case.part.split()[0])
        made = [AttentionState(*(array[:, :heads] for array in state)) for state in made]
        limits = [roof(sum(array.nbytes for array in arrays), count, case.how == "in place", size.tokens, heads / size.heads)
                  for arrays in zip(*made, strict=True)]  # fmt: skip
    else:
        limits = [roof(sum(map(state_bytes, made)), count, case.how == "in place")]
    *inputs, out = made

    def limit() -> None:
        for one in limits:
            one()

    if count == 2:
        return modes(size, registry.get("cython"), made)[case.how], limit
    return lambda: merge_states(inputs, out=out, backend="cython", **size.options), limit


def shared(case: Case, seconds: float) -> list[str]:
    """A line: a case's share of its roof, and its roof's rate by that of a triad over as many bytes."""
    call, limit = held(case)
    calls = {"call": call, "roof": limit}
    if case.count > 2 or case.part.endswith("heads"):
        moved = (case.count + 1) * state_bytes(states(case.size, case.dtype, 1)[0])
        heads = int(case.part.split()[0]) if case.part else case.size.heads
        calls["triad"] = roof(moved * heads // case.size.heads, 2)
    times = interleaved(calls, seconds)
    share = ratio(times["roof"], times["call"])
    by_triad = f"{ratio(times['triad'], times['roof']).median:.2f}" if "triad" in times else ""
    what = str(case.size) + (f", {case.part}" if case.part else "")
    quartiles, rounds = f"{share.low:.2f} to {share.high:.2f}", str(len(times["call"]))
    return [what, case.dtype, case.how, str(case.count), f"{share.median:.2f}", quartiles, by_triad, rounds]


def tuned(call: Call, **changed: int) -> Call:
    """The same call, with the core set otherwise."""
    setting = _core.tuning() | changed

    def run() -> None:
        _core.tune(**setting)
        call()

    return run


def tried(size: Size, dtype: str, how: str, seconds: float) -> list[list[str]]:
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
            lines.append(
                [str(size), dtype, how, name, str(value), f"{spread.median:.2f}", f"{spread.low:.2f} to {spread.high:.2f}"]
            )
    return lines


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=[*SHARES, "choices"])
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="only these")
    parser.add_argument("--seconds", type=float, default=2.0, help="for what is measured in turn, together (default 2)")
    parser.add_argument("--threads", type=int, help="of the core (default: all)")
    given = parser.parse_args()
    dtypes, found = given.dtype or DTYPES, config.collect()
    print(found["platform"], found["core"]["simd"], _core.tuning(), sep="\n")
    with thread_count(given.threads):
        if given.what == "choices":
            names = ["size", "dtype", "how", "choice", "value", "time", "quartiles"]
            each = ((size, dtype, how) for size in SIZES for dtype in dtypes for how in ("out=", "in place"))
            lines = [line for one in each for line in tried(*one, given.seconds)]
        else:
            names = ["size", "dtype", "how", "states", "share", "quartiles", "roof by triad", "rounds"]
            lines = [shared(case, given.seconds) for case in SHARES[given.what] if case.dtype in dtypes]
    print(*table(names, lines), sep="\n")


if __name__ == "__main__":
    main()
