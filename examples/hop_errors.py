"""``python -m rau demo --hops``: what rounding at every hop costs, and a float32 running state does not."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

import rau
from rau.cli.console import Step, print_table, progress
from rau.cli.demo import ring
from rau.state import AttentionState
from rau.testing import oracle
from rau.testing.expected import widen

_SLACK = 1.01  # a float32 state is off by 2**-24 a hop: beside one rounding to 16 bits, next to nothing
_CHAIN, _STREAM, _ONCE = "16-bit chain", "StreamingMerge", "one rounding"
_LEGEND = f"""\
{_CHAIN}    ring_attention_update, its running state kept in the partials' dtype
{_STREAM}  a float32 running state, rounded once at the end
{_ONCE}    the exact merge, rounded once: no result in this dtype is closer
All are relative RMS errors of attn_out against the exact merge of the same partials.
"""


class Hop(NamedTuple):
    """Errors of one backend after so many partials, relative, root mean square."""

    backend: str
    partials: int
    chain: float
    stream: float
    once: float


def run(arguments: argparse.Namespace, backends: Sequence[Any]) -> int:
    """Measure, print and draw.

    Parameters
    ----------
    arguments : argparse.Namespace
        Those of ``python -m rau demo``, checked.
    backends : sequence of Backend

    Returns
    -------
    int
        0: StreamingMerge has the error of one rounding at every length; 1: it has not.

    Raises
    ------
    RauError, ImportError
        If a backend cannot run this; if ml_dtypes is missing.
    """
    with progress(2 * arguments.ranks + 1 + len(backends) * arguments.ranks) as step:
        work = ring.prepare(arguments, step)
        hops = [hop for backend in backends for hop in measure(work, backend, step)]
    passed = all(hop.stream <= _SLACK * hop.once for hop in hops)
    if arguments.plot:
        draw(hops, arguments)
    if arguments.json:
        options = ("tokens", "heads", "head_dim", "ranks", "dtype", "layout", "softmax_layout", "causal", "seed")
        problem = {name: getattr(arguments, name) for name in options}
        names = ("backend", "partials", "chain_error", "stream_error", "rounding_error")
        rows = [dict(zip(names, hop, strict=True)) for hop in hops]
        print(json.dumps({"problem": problem, "hops": rows, "plot": arguments.plot, "passed": passed}, indent=2))
        return 0 if passed else 1
    numbers = ["partials", _CHAIN, _STREAM, _ONCE]
    rows_ = [[hop.backend, str(hop.partials), *(f"{error:.2e}" for error in hop[2:])] for hop in hops]
    print_table(["backend", *numbers], rows_, right=numbers)
    print(_LEGEND)
    last = hops[-1]
    if not passed:
        print("WRONG: StreamingMerge is further off than one rounding.")
    elif last.chain > last.stream:
        times = f"{last.chain / last.stream:.1f} times"
        print(f"After {last.partials} partials the chain is {times} as far off; StreamingMerge has the error of one\n"
              "rounding, however many partials there are.")  # fmt: skip
    else:
        print("StreamingMerge has the error of one rounding.")
    if arguments.plot:
        print(f"Drawn into {arguments.plot}.")
    return 0 if passed else 1


def measure(work: ring.Work, backend: Any, step: Step) -> Iterator[Hop]:
    """Merge one partial after another in both ways; compare at powers of two, and at the end.

    Parameters
    ----------
    work : Work
        From :func:`rau.cli.demo.ring.prepare`.
    backend : Backend
    step : callable
        From :func:`rau.cli.console.progress`.

    Yields
    ------
    Hop
    """
    options = work.call | {"backend": backend}
    stream = rau.StreamingMerge(**options)
    chain = None
    for count, partial in enumerate(work.partials, 1):
        step(f"{backend.name}: partial {count}")
        state = AttentionState(*map(backend.asarray, partial))
        stream.update(*state)
        chain = state if chain is None else rau.ring_attention_update(*chain, *state, profile="portable", **options)
        if count > 1 and (count & (count - 1) == 0 or count == len(work.partials)):
            exact = np.asarray(oracle(work.partials[:count], **work.call).attn_out, np.float64)
            dtype = partial.attn_out.dtype
            results = chain.attn_out, stream.result(dtype).attn_out
            chain_error, stream_error = (_error(backend.to_numpy(result), exact) for result in results)
            yield Hop(backend.name, count, chain_error, stream_error, _error(exact.astype(dtype), exact))


def _error(result: np.ndarray, exact: np.ndarray) -> float:
    off = widen(result) - exact
    return float(np.sqrt(np.square(off).sum() / np.square(exact).sum()))


def draw(hops: Sequence[Hop], arguments: argparse.Namespace) -> None:
    """Draw the errors over the number of partials: of the first backend, since all have the same bits.

    Parameters
    ----------
    hops : sequence of Hop
    arguments : argparse.Namespace
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xscale="log")
    hops = [hop for hop in hops if hop.backend == hops[0].backend]
    counts = [hop.partials for hop in hops]
    for name, errors, style in (
        (_CHAIN, [hop.chain for hop in hops], "o-"),
        (_STREAM, [hop.stream for hop in hops], "s-"),
        (_ONCE, [hop.once for hop in hops], "k:"),
    ):
        axes.plot(counts, errors, style, label=name)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("partial states merged")
    axes.set_ylabel("relative RMS error of attn_out")
    axes.set_title(f"{arguments.dtype}, {arguments.tokens} tokens, {arguments.heads} heads of dimension {arguments.head_dim}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(arguments.plot)
