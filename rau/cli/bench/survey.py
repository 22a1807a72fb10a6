"""The survey of ``python -m rau bench``: backends, ways to call them, peers and the roof, in turn, size by size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rau.cli.bench.peers import Peers
from rau.cli.bench.timing import Roof, Spread, device_copy, interleaved, ratio
from rau.cli.bench.workload import CACHED, HOW, LARGE, SEQUENCES, SMALLEST, Size, modes, states
from rau.cli.console import Step
from rau.errors import RauError
from rau.state import AttentionState

# What a few seconds are enough for: a quarter of MindSpeed's size, beyond most caches all the same.
_SHORTER = LARGE._replace(lengths=(2048,))
PLAN: tuple[tuple[Size, str, float], ...] = (  # size, dtype, seconds
    (_SHORTER, "float32", 1.5),
    (_SHORTER, "bfloat16", 1.5),
    (_SHORTER, "float16", 1.5),
    (SEQUENCES, "bfloat16", 1.0),
    (CACHED, "float32", 0.5),
    (SMALLEST, "float32", 0.3),
)
QUICK: tuple[tuple[Size, str, float], ...] = (
    (SEQUENCES._replace(lengths=(16, 32)), "float16", 0.0),
    (SMALLEST, "float32", 0.0),
)
_LEAST_BYTES = 1 << 20  # of a state: with fewer, a call costs more than its bytes


class Row(NamedTuple):
    """One call, measured.

    Attributes
    ----------
    name : str
        The backend, or the peer.
    how : str
        "out=", "fresh" or "in place".
    seconds : Spread
    rate : float
        Bytes that it has to move by the median time, in GB/s.
    roof : str or None
        What it is held to: "triad", "in-place triad", "device copy".
    share : Spread or None
        The roof's time by this one's, the bytes being the same; None where there is no such roof.
    slower : dict of str to float
        A peer's: how many times as long it takes as each way to call the reference.
    """

    name: str
    how: str
    seconds: Spread
    rate: float
    roof: str | None = None
    share: Spread | None = None
    slower: dict[str, float] | None = None


class Group(NamedTuple):
    """All that was measured beside each other.

    Attributes
    ----------
    size : Size
    dtype : str
    bytes : int
        That an update has to move: two states read, one written.
    roof : dict of str to Row
        "copy", "triad", "in-place triad"; empty where a call costs more than its bytes.
    origin : str
        Who measured the roof.
    rows, peers : list of Row
    reference : str
        The backend that peers are compared with.
    not_run : dict of str to str
        Backends and peers that do not take this, and why.
    """

    size: Size
    dtype: str
    bytes: int
    roof: dict[str, Row]
    origin: str
    rows: list[Row]
    peers: list[Row]
    reference: str
    not_run: dict[str, str]


def measure(
    size: Size, dtype: str, seconds: float, backends: Sequence[Any], threads: int, peers: Peers | None, step: Step
) -> Group:
    """Measure one size and dtype.

    Parameters
    ----------
    size : Size
    dtype : str
    seconds : float
        About how long.
    backends : sequence of Backend
    threads : int
        The roof's; the backends' are set already.
    peers : Peers or None
    step : callable
        From :func:`rau.cli.console.progress`.

    Returns
    -------
    Group
    """
    step(f"{size}, {dtype}")
    host = states(size, dtype, 3)
    bytes_ = size.state_bytes(dtype)
    roof = Roof(bytes_, threads) if bytes_ >= _LEAST_BYTES else None
    calls = dict(roof.calls) if roof else {}
    keys: dict[str, tuple[str, str, str | None]] = {}  # by its key in `calls`: backend, how, what it is held to
    not_run: dict[str, str] = {}
    for backend in backends:
        arrays = [AttentionState(*map(backend.asarray, state)) for state in host]
        devices = backend.capabilities.devices
        on_host = devices is None or "cpu" in devices
        copy = device_copy(backend, bytes_) if roof and not on_host else None
        if copy:
            calls[f"{backend.name}: device copy"] = copy
        for how, call in modes(size, backend, arrays).items():
            key, limit = f"{backend.name}, {how}", None
            try:
                call()
            except RauError as error:
                not_run[key] = str(error).splitlines()[0]
                continue
            if copy:
                limit = f"{backend.name}: device copy"
            elif roof and on_host:
                limit = "in-place triad" if how == "in place" else "triad"
            calls[key], keys[key] = call, (backend.name, how, limit)
    others = _peers(size, host, peers, not_run)
    times = interleaved(calls | others, seconds, least=2)
    reference = "cython" if "cython, out=" in keys else next((name for name, _, _ in keys.values()), "")
    return Group(
        size=size,
        dtype=dtype,
        bytes=3 * bytes_,
        roof={name: _row(name, "", times, name, roof.moved(name), None) for name in roof.calls} if roof else {},
        origin=roof.origin if roof else "none: such a call costs more than its bytes",
        rows=[_row(name, how, times, key, 3 * bytes_, limit) for key, (name, how, limit) in keys.items()],
        peers=[
            _row(name, "fresh", times, name, 3 * bytes_, "triad" if roof else None)._replace(
                slower={
                    how: ratio(times[name], times[f"{reference}, {how}"]).median
                    for how in HOW
                    if f"{reference}, {how}" in keys
                }
            )
            for name in others
        ],
        reference=reference,
        not_run=not_run,
    )


def plain(group: Group) -> dict[str, Any]:
    """A group as plain data.

    Parameters
    ----------
    group : Group

    Returns
    -------
    dict
    """
    return {
        "size": group.size.title,
        "layout": group.size.layout,
        "softmax_layout": group.size.softmax_layout,
        "lengths": group.size.lengths,
        "heads": group.size.heads,
        "head_dim": group.size.head_dim,
        "dtype": group.dtype,
        "bytes": group.bytes,
        "roof": {name: _plain_row(row) for name, row in group.roof.items()},
        "roof_by": group.origin,
        "rows": [_plain_row(row) for row in group.rows],
        "peers": [_plain_row(row) for row in group.peers],
        "reference": group.reference,
        "not_run": group.not_run,
    }


def _plain_row(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "how": row.how,
        "seconds": row.seconds._asdict(),
        "gigabytes_per_second": row.rate,
        "roof": row.roof,
        "share": row.share._asdict() if row.share else None,
        "slower": row.slower,
    }


def _peers(
    size: Size, host: list[AttentionState], peers: Peers | None, not_run: dict[str, str]
) -> dict[str, Callable[[], object]]:
    """The peers' calls that work."""
    if peers is None:
        return {}
    if size.softmax_layout == "SBH":
        not_run["torch composites"] = "none is known for packed statistics that runs on a CPU"
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


def _row(name: str, how: str, times: dict[str, np.ndarray], key: str, moved: int, roof: str | None) -> Row:
    seconds = Spread.of(times[key])
    share = ratio(times[roof], times[key]) if roof else None
    return Row(name, how, seconds, moved / seconds.median / 1e9, roof, share)
