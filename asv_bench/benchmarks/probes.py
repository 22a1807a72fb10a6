"""What ``python -m rau bench --targets`` measures, each function in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import rau
from rau.cli.bench.peers import EAGER, Peers
from rau.cli.bench.survey import measure
from rau.cli.bench.timing import interleaved, ratio, threads
from rau.cli.bench.workload import LARGE, SMALLEST, Size, available_memory, dtypes, modes, states
from rau.state import AttentionState

_CALLS_SECONDS = 1.0


def _large_size(tokens: int) -> Size:
    return LARGE._replace(lengths=(tokens,)).fitted(available_memory() // 2)


def _quiet(what: str, weight: float = 1) -> None:
    pass


def large(number: int, tokens: int, seconds: float) -> dict[str, dict[str, float]]:
    """Shares of the roof that the compiled core reaches, by dtype and way to call it.

    Parameters
    ----------
    number : int
        Threads.
    tokens : int
    seconds : float
        For each dtype.
    """
    backend = rau.registry.get("cython", "bench")
    found = {}
    with threads(number):
        for dtype in dtypes():
            group = measure(_large_size(tokens), dtype, seconds, [backend], number, None, _quiet)
            found[dtype] = {row.how: row.share.median for row in group.rows if row.share}
    return found


def gpu(tokens: int, seconds: float) -> dict[str, dict[str, float]]:
    """Shares of a copy on the device that the cuda backend reaches, by dtype and way to call it."""
    backend = rau.registry.get("cuda", "bench")
    if backend.asarray(np.zeros(1, np.float32)).device.type == "cpu":
        raise rau.BackendUnavailableError("Triton's interpreter runs instead of a GPU (TRITON_INTERPRET)")
    found = {}
    for dtype in dtypes():
        group = measure(_large_size(tokens), dtype, seconds, [backend], 1, None, _quiet)
        found[dtype] = {row.how: row.share.median for row in group.rows if row.share}
    return found


def composites(number: int, tokens: int, seconds: float, compiled: bool) -> dict[str, dict[str, dict[str, float]]]:
    """How many times as long torch's composites take, by dtype, composite, and way to call the compiled core."""
    peers = _peers(compiled)
    backend = rau.registry.get("cython", "bench")
    found = {}
    with threads(number):
        for dtype in dtypes():
            group = measure(_large_size(tokens), dtype, 2 * seconds, [backend], number, peers, _quiet)
            found[dtype] = {row.name: row.slower or {} for row in group.peers}
    return found


def smallest(number: int, seconds: float, torch_tensors: bool) -> dict[str, float]:
    """Seconds of the smallest call with all defaults; those of the eager composite too, where the tensors are torch's."""
    prev, cur, out = states(SMALLEST, "float32", 3)
    after: dict[str, Callable[[], object]] = {}
    if torch_tensors:
        peers = _peers(False)
        prev, cur, out = map(peers.tensors, (prev, cur, out))
        after[EAGER] = lambda: peers.eager(prev, cur, SMALLEST.heads)
    calls: dict[str, Callable[[], object]] = {
        "out=": lambda: rau.ring_attention_update(*prev, *cur, out=out),
        "fresh": lambda: rau.ring_attention_update(*prev, *cur),
    }
    rau.registry.get("cython", "bench")
    with threads(number):
        # Torch's threads, once started, would get in the way of calls that take none: its composite comes after.
        times = interleaved(calls, min(seconds, _CALLS_SECONDS)) | interleaved(after, min(seconds, _CALLS_SECONDS))
    return {name: float(np.median(one)) for name, one in times.items()}


def sequences(number: int, tokens: int, seconds: float) -> dict[str, float]:
    """How many times as long as one sequence as many of one token take, packed, beside each other."""
    tokens = 10_000 if tokens >= LARGE.tokens else tokens
    one = Size("one", "TND", "SBH", (tokens,), 8, 128).fitted(available_memory() // 2)
    many = one._replace(lengths=(1,) * one.tokens)
    backend = rau.registry.get("cython", "bench")
    arrays = states(one, "float32", 3)
    with threads(number):
        times = interleaved({str(len(size.lengths)): modes(size, backend, arrays)["out="] for size in (one, many)}, seconds)
    return {"ratio": ratio(times[str(one.tokens)], times["1"]).median}


def accuracy(backend: Any = None, only: tuple[str, ...] | None = None) -> dict[str, dict[str, float]]:
    """Worst errors by their bounds, and shares of 16-bit elements that are rounded correctly, on ordinary inputs.

    Parameters
    ----------
    backend : Backend, optional
        Default: the compiled core, or NumPy without it.
    only : tuple of str, optional
        Dtypes; all that there are here.

    Returns
    -------
    dict
        "share" and "rounded", by dtype.
    """
    from rau.testing import compare, oracle
    from rau.testing.expected import widen
    from rau.testing.rows import half_ulp

    if backend is None:
        backend = rau.registry.get(next(one.name for one in rau.registry.status() if one.available), "bench")
    size = LARGE._replace(lengths=(64,))
    worst, rounded = {}, {}
    for dtype in only or dtypes():
        pair = states(size, dtype, 2)
        expected = oracle(pair)
        arrays = [backend.asarray(array) for state in pair for array in state]
        found = rau.ring_attention_update(*arrays, backend=backend)
        result = AttentionState(*map(backend.to_numpy, found))
        verdict = compare(result, expected)
        worst[dtype] = max(verdict.attn_share, verdict.sum_share)
        if dtype != "float32":
            error = np.abs(widen(result.attn_out) - expected.attn_out)
            rounded[dtype] = float(np.mean(error <= half_ulp(np.abs(expected.attn_out), dtype)))
    return {"share": worst, "rounded": rounded}


def _peers(compiled: bool) -> Peers:
    try:
        return Peers(compiled)
    except ImportError as error:
        raise ImportError("torch is not installed: pip install 'ring-attention-update[torch]'") from error
