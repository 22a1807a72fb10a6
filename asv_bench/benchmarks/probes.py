"""What ``asv_bench/targets.py`` measures, each function in a process of its own; asv takes some of it too."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

import rau
from rau.cli.bench.peers import EAGER, Peers
from rau.cli.bench.survey import measure
from rau.cli.bench.timing import Call, interleaved, ratio, thread_count
from rau.cli.bench.workload import DTYPES, LARGE, SMALLEST, Size, lacking, modes, states
from rau.testing import compare, oracle
from rau.testing.reference.oracle import widen
from rau.testing.reference.row_weights import half_ulp

_CALLS_SECONDS = 1.0
PYTHON = "plain Python"


def dtypes() -> tuple[str, ...]:
    """Those that can be had here."""
    return tuple(dtype for dtype in DTYPES if not lacking(dtype))


def large(threads: int, size: Size, seconds: float) -> dict[str, dict[str, float]]:
    """Shares of the roof that the compiled core reaches, by dtype and way to call it."""
    with thread_count(threads):
        return _shares("cython", size, seconds)


def gpu(size: Size, seconds: float) -> dict[str, dict[str, float]]:
    """Shares of a copy on the device that the cuda backend reaches, by dtype and way to call it."""
    if rau.registry.get("cuda").asarray(np.zeros(1, np.float32)).device.type == "cpu":
        raise rau.BackendUnavailableError("Triton's interpreter runs instead of a GPU (TRITON_INTERPRET)")
    return _shares("cuda", size, seconds)


def _shares(name: str, size: Size, seconds: float) -> dict[str, dict[str, float]]:
    groups = {dtype: measure(size, dtype, seconds, [rau.registry.get(name)]) for dtype in dtypes()}
    return {dtype: {row.how: row.share.median for row in group.rows if row.share} for dtype, group in groups.items()}


def composites(threads: int, size: Size, seconds: float, compiled: bool) -> dict[str, dict[str, dict[str, float]]]:
    """How many times as long torch's composites take, by dtype, composite, and way to call the compiled core."""
    peers, backend = Peers(compiled), rau.registry.get("cython")
    with thread_count(threads):
        groups = {dtype: measure(size, dtype, 2 * seconds, [backend], peers) for dtype in dtypes()}
    return {dtype: {row.name: row.slower or {} for row in group.peers} for dtype, group in groups.items()}


Row = tuple[Sequence[float], float, float]  # of attn_out, softmax_max, softmax_sum


def python_rows(state: rau.AttentionState) -> list[Row]:
    """Take apart a state in SBH, all of whose lanes are alike, into Python's own numbers: a row for each head and token."""
    attn_out, softmax_max, softmax_sum = state
    batch, heads, tokens = softmax_max.shape[:3]
    heads_first = attn_out.reshape(tokens, batch, heads, -1).transpose(1, 2, 0, 3)
    vectors = heads_first.reshape(batch * heads * tokens, -1)
    statistics = (one[..., 0].ravel().tolist() for one in (softmax_max, softmax_sum))
    return list(zip(vectors.tolist(), *statistics, strict=True))


def python_update(prev: Iterable[Row], cur: Iterable[Row]) -> list[Row]:
    """Do an update as a loop of plain Python would, for ordinary statistics."""
    rows = []
    for (a, max_a, sum_a), (b, max_b, sum_b) in zip(prev, cur, strict=True):
        largest = max(max_a, max_b)
        weight_a, weight_b = sum_a * math.exp(max_a - largest), sum_b * math.exp(max_b - largest)
        total = weight_a + weight_b
        weight_a, weight_b = weight_a / total, weight_b / total
        rows.append(([weight_a * x + weight_b * y for x, y in zip(a, b, strict=True)], largest, total))
    return rows


def smallest(threads: int, seconds: float, torch_tensors: bool) -> dict[str, float]:
    """Seconds of the smallest call with all defaults, and of what it is compared with.

    That is the eager composite where the tensors are torch's, and a loop of plain Python where they are NumPy's.
    """
    prev, cur, out = states(SMALLEST, "float32", 3)
    after: dict[str, Call] = {}
    if torch_tensors:
        peers = Peers(False)
        prev, cur, out = map(peers.tensors, (prev, cur, out))
        after[EAGER] = lambda: peers.eager(prev, cur)
    else:
        lists = python_rows(prev), python_rows(cur)
        after[PYTHON] = lambda: python_update(*lists)
    calls: dict[str, Call] = {
        "out=": lambda: rau.ring_attention_update(*prev, *cur, out=out),
        "fresh": lambda: rau.ring_attention_update(*prev, *cur),
    }
    rau.registry.get("cython")
    with thread_count(threads):
        # Torch's threads, once started, would get in the way of calls that take none: its composite comes after.
        times = interleaved(calls, min(seconds, _CALLS_SECONDS)) | interleaved(after, min(seconds, _CALLS_SECONDS))
    return {name: float(np.median(one)) for name, one in times.items()}


def sequences(threads: int, tokens: int, seconds: float) -> dict[str, float]:
    """How many times as long as one sequence as many of one token take, packed, beside each other."""
    one, many = (Size("TND", lengths, 8, 128, "SBH") for lengths in ((tokens,), (1,) * tokens))
    arrays, backend = states(one, "float32", 3), rau.registry.get("cython")
    with thread_count(threads):
        times = interleaved({size: modes(size, backend, arrays)["out="] for size in (one, many)}, seconds)
    return {"ratio": ratio(times[many], times[one]).median}


def accuracy(backend: Any = None, only: tuple[str, ...] | None = None) -> dict[str, dict[str, float]]:
    """Worst errors by their bounds ("share"), and how many 16-bit elements are rounded correctly ("rounded"), by dtype.

    Of ordinary inputs; by the compiled core, or NumPy without it, if no backend is given.
    """
    if backend is None:
        backend = rau.registry.get(next(one.name for one in rau.registry.status() if one.available))
    size = LARGE._replace(lengths=(64,))
    worst, rounded = {}, {}
    for dtype in only or dtypes():
        pair = states(size, dtype, 2)
        expected = oracle(pair)
        arrays = [backend.asarray(array) for state in pair for array in state]
        result = [backend.to_numpy(array) for array in rau.ring_attention_update(*arrays, backend=backend)]
        verdict = compare(result, expected)
        worst[dtype] = max(verdict.attn_share, verdict.sum_share)
        if dtype != "float32":
            error = np.abs(widen(result[0]) - expected.attn_out)
            rounded[dtype] = float(np.mean(error <= half_ulp(np.abs(expected.attn_out), dtype)))
    return {"share": worst, "rounded": rounded}
