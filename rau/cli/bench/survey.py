"""The survey of ``python -m rau bench``: backends, ways to call them, peers and the roof, in turn, size by size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias

from rau.cli.bench.peers import Peers
from rau.cli.bench.timing import Call, Roof, Spread, device_copy, interleaved, ratio
from rau.cli.bench.workload import (
    CACHED,
    HOW,
    LARGE,
    SEQUENCES,
    SMALLEST,
    Size,
    lacking,
    modes,
    states,
)
from rau.cli.console import Step
from rau.errors import RauError
from rau.state import AttentionState
from rau.testing.apart import Apart, Here, NoAnswer

Plan: TypeAlias = Sequence[tuple[Size, str, float]]  # size, dtype, seconds
Key: TypeAlias = tuple[str, str]  # who, and how

# What a few seconds are enough for: a quarter of MindSpeed's size, beyond most caches all the same.
_SHORTER = LARGE._replace(lengths=(2048,))
PLAN: Plan = (
    (_SHORTER, "float32", 1.5),
    (_SHORTER, "bfloat16", 1.5),
    (_SHORTER, "float16", 1.5),
    (SEQUENCES, "bfloat16", 1.0),
    (CACHED, "float32", 0.5),
    (SMALLEST, "float32", 0.3),
)
QUICK: Plan = ((SEQUENCES._replace(lengths=(16, 32)), "float16", 0.0), (SMALLEST, "float32", 0.0))
_LEAST_BYTES = 1 << 20  # of a state: with fewer, a call costs more than its bytes


class Row(NamedTuple):
    """One call, measured."""

    name: str  # the backend, the peer, or what the roof does
    how: str  # one of HOW; empty for the roof
    seconds: Spread
    gigabytes_per_second: float  # that it has to move, by the median time
    roof: str | None = None  # what it is held to: "triad", "in-place triad", "device copy"
    share: Spread | None = None  # that one's time by this one's, the bytes being the same
    slower: dict[str, float] | None = None  # a peer's: how many times as long it takes as each way to call the reference


class Group(NamedTuple):
    """All that was measured beside each other."""

    size: Size
    dtype: str
    bytes: int  # that an update has to move: two states read, one written
    roof: dict[str, Row]  # "copy", "triad", "in-place triad"; empty where a call costs more than its bytes
    roof_by: str
    rows: list[Row]
    peers: list[Row]
    reference: str  # the backend that peers are compared with
    not_run: dict[str, str]  # backends and peers that do not take this, and why
    lost: dict[str, str]  # backends that crash or hang, and where


def survey(
    plan: Plan, backends: Sequence[Any], peers: Peers | None, not_run: dict[str, str], step: Step, place: Here | Apart = Here()
) -> Iterator[Group]:
    """Measure one size and dtype after another; `not_run` takes those that cannot be had here.

    All calls are measured in one process, in turn. What could end it is tried in its own `place` first.
    """
    for size, dtype, seconds in plan:
        reason = lacking(dtype)
        if reason:
            not_run[f"{size}, {dtype}"] = reason
        else:  # with peers there are more calls to share the time among
            step(f"{size}, {dtype}")
            lost = {} if isinstance(place, Here) else _lost(place, size, dtype, backends)
            sound = [backend for backend in backends if backend.name not in lost]
            group = measure(size, dtype, 4 * seconds if peers else seconds, sound, peers)
            yield group._replace(lost=lost)


def _lost(place: Apart, size: Size, dtype: str, backends: Sequence[Any]) -> dict[str, str]:
    """Find the backends that crash or hang."""
    lost = {}
    for backend in backends:
        try:
            place.call(_tried, size, dtype, backend)
        except NoAnswer as error:
            lost[backend.name] = str(error)
    return lost


def _tried(size: Size, dtype: str, backend: Any) -> None:
    arrays = [AttentionState(*map(backend.asarray, state)) for state in states(size, dtype, 3)]
    for call in modes(size, backend, arrays).values():
        with suppress(RauError):  # which measure() tells
            call()


def measure(
    size: Size, dtype: str, seconds: float, backends: Sequence[Any], peers: Peers | None = None
) -> Group:
    """Measure one size and dtype, for about so many seconds."""
    host, bytes_ = states(size, dtype, 3), size.state_bytes(dtype)
    roof = Roof(bytes_) if bytes_ >= _LEAST_BYTES else None
    calls: dict[Key, Call] = {(name, ""): call for name, call in roof.calls.items()} if roof else {}
    limits: dict[Key, Key | None] = {}  # what each call of a backend or peer is held to
    not_run: dict[str, str] = {}
    for backend in backends:
        arrays = [AttentionState(*map(backend.asarray, state)) for state in host]
        devices = backend.capabilities.devices
        on_host = devices is None or "cpu" in devices
        copy = device_copy(backend, bytes_) if roof and not on_host else None
        if copy:
            calls["device copy", backend.name] = copy
        for how, call in modes(size, backend, arrays).items():
            try:
                call()
            except RauError as error:
                not_run[f"{backend.name}, {how}"] = str(error).splitlines()[0]
                continue
            calls[backend.name, how] = call
            triad = ("in-place triad" if how == "in place" else "triad", "") if roof and on_host else None
            limits[backend.name, how] = ("device copy", backend.name) if copy else triad
    reference = "cython" if ("cython", "out=") in limits else next((name for name, _ in limits), "")
    others = {(name, "fresh"): call for name, call in _peers(size, host, peers, not_run).items()}
    limits |= dict.fromkeys(others, ("triad", "") if roof else None)
    times = interleaved(calls | others, seconds, least=2)

    def row(key: Key, moved: int) -> Row:
        spread, limit = Spread.of(times[key]), limits.get(key)
        share = ratio(times[limit], times[key]) if limit else None
        return Row(*key, spread, moved / spread.median / 1e9, limit and limit[0], share)

    def slower(key: Key) -> dict[str, float]:
        ways = [(reference, how) for how in HOW if (reference, how) in limits]
        return {way[1]: ratio(times[key], times[way]).median for way in ways}

    return Group(
        size=size,
        dtype=dtype,
        bytes=3 * bytes_,
        roof={name: row((name, ""), roof.moved(name)) for name in roof.calls} if roof else {},
        roof_by=roof.origin if roof else "none: a call this small costs more than its bytes",
        rows=[row(key, 3 * bytes_) for key in limits if key not in others],
        peers=[row(key, 3 * bytes_)._replace(slower=slower(key)) for key in others],
        reference=reference,
        not_run=not_run,
        lost={},
    )


def _peers(size: Size, host: list[AttentionState], peers: Peers | None, not_run: dict[str, str]) -> dict[str, Call]:
    """The peers' calls that work."""
    if peers is None:
        return {}
    if size.softmax_layout == "SBH":
        not_run["torch composites"] = "none that runs on a CPU is known for packed statistics"
        return {}
    found = {}
    for name, call in peers.calls(size, *map(peers.tensors, host[:2])).items():
        try:
            call()
        except Exception as error:  # of a compiler that is missing, for one: whatever it is, the others count
            not_run[name] = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
        else:
            found[name] = call
    return found
