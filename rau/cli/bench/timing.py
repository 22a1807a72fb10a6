"""Measuring: calls in turn, their medians and shares, and the memory's roof beside them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from rau.arrays.memory import aligned
from rau.threads import get_num_threads, set_num_threads

Call: TypeAlias = Callable[[], object]
Key = TypeVar("Key")

_TURN = 5e-4  # seconds: a shorter call is repeated within its turn
_PAUSE = 2e-3  # the threads of another library's OpenMP spin for about so long after their work, on our CPUs
_MOST = 500  # rounds
# An array beyond this is written around the cache by the kernels (_core.pyx), and by the roof that they are held to.
_AROUND = 1 << 23


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Any) -> Spread:
        """Summarise some numbers."""
        low, median, high = np.percentile(values, (25, 50, 75))
        return cls(float(median), float(low), float(high))


def on_host(call: Call, repeats: int) -> float:
    """Seconds that some calls take, by the clock on the wall."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start


def interleaved(
    calls: Mapping[Key, Call], seconds: float, *, least: int = 3, clock: Callable[[Call, int], float] = on_host
) -> dict[Key, np.ndarray]:
    """Time calls in turn, A B C A B C, so that whatever disturbs the machine disturbs all of them.

    A turn starts with a call that is not timed: each then finds in the caches what it leaves there itself, and not what the
    one before it has left, such as arrays of its own or lines that are still to be written.

    A call that has had its equal part of `seconds` drops out, after `least` rounds; `clock` takes a call and how often to
    repeat it. Of each call come the seconds it takes, one number a round; the rounds of different calls correspond.
    """
    repeats, times, spent = {}, {name: list[float]() for name in calls}, dict.fromkeys(calls, 0.0)
    for name, call in calls.items():
        call()  # touches its memory, loads and compiles what is loaded and compiled at first use
        once = clock(call, 1)
        if once < 100 * _TURN:  # the least of some, since others may have had the CPU meanwhile
            once = min(clock(call, 1) for _ in range(5))
        repeats[name] = max(1, round(_TURN / max(once, 1e-9)))
    left = list(calls)
    while left:
        for name in left:
            time.sleep(_PAUSE)
            first, turn = clock(calls[name], 1), clock(calls[name], repeats[name])
            spent[name] += _PAUSE + first + turn
            times[name].append(turn / repeats[name])
        done = {name for name in left if spent[name] >= seconds / len(calls) or len(times[name]) >= _MOST}
        left = [name for name in left if name not in done or len(times[name]) < least]
    return {name: np.array(one) for name, one in times.items()}


def ratio(of: np.ndarray, to: np.ndarray) -> Spread:
    """How many times as long the first takes, by the rounds that both took part in."""
    rounds = min(len(of), len(to))
    return Spread.of(of[:rounds] / to[:rounds])


@contextmanager
def thread_count(number: int | None) -> Iterator[int]:
    """Let rau, and torch where it is loaded, use the same number of threads, and give them back what they had.

    None: as many as rau has.
    """
    torch = sys.modules.get("torch")
    before, torch_before = get_num_threads(), torch.get_num_threads() if torch else 0
    try:
        if number is not None:
            set_num_threads(number)
        if torch:
            torch.set_num_threads(get_num_threads())
        yield get_num_threads()
    finally:
        if number is not None:
            set_num_threads(before)
        if torch:
            torch.set_num_threads(torch_before)


class Roof:
    """Copy and triads over three arrays of a state's size: what they take is the least that an update could.

    An update reads two states and writes one, as a triad (to = a + b / 2) does with its arrays: over as many bytes, the
    triad's time by the update's is the update's share of the roof. `calls` has "copy", "triad" and "in-place triad",
    `origin` says who runs them.
    """

    def __init__(self, bytes_: int) -> None:
        self.bytes = bytes_ // 4 * 4
        a, b, to = (_ones(self.bytes) for _ in range(3))
        try:
            from rau._core import roof
        except ImportError:
            self.origin = "NumPy's copyto and add, in one thread: the compiled core is missing"
            self.calls: dict[str, Call] = {
                "copy": lambda: np.copyto(to, a),
                "triad": lambda: np.add(a, b, out=to),
                "in-place triad": lambda: np.add(a, b, out=a),
            }
            return
        threads, around = get_num_threads(), self.bytes > _AROUND
        stores = "around the cache (non-temporal)" if around else "into the cache"
        self.origin = f"the compiled core, threads: {threads}, stores {stores}, in place always into the cache"
        self.calls = {
            "copy": lambda: roof(to, (a,), around, threads),
            "triad": lambda: roof(to, (a, b), around, threads),
            "in-place triad": lambda: roof(a, (a, b), False, threads),
        }

    def moved(self, name: str) -> int:
        """Bytes that a call reads and writes."""
        return (2 if name == "copy" else 3) * self.bytes


def device_copy(backend: Any, bytes_: int) -> Call | None:
    """A copy on a backend's own device that moves as many bytes as a triad over arrays of `bytes_` does.

    None where the backend's arrays have no ``copy_``.
    """
    source, to = (backend.asarray(np.zeros(bytes_ * 3 // 8, np.float32)) for _ in range(2))
    if not hasattr(to, "copy_"):
        return None

    def copy() -> None:
        to.copy_(source)
        backend.synchronize()

    return copy


def _ones(bytes_: int) -> np.ndarray:
    """Float32 ones in one run, aligned to 64 bytes, every page touched; on huge pages where NumPy gets them."""
    array = aligned((1, bytes_ // 4), np.float32)
    array[:] = 1
    return array
