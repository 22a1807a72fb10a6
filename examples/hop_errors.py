"""What rounding at every hop of a ring costs, and a float32 running state does not: how the error grows from 2 partials on.

    python examples/hop_errors.py                      64 partials in bfloat16, a table
    python examples/hop_errors.py --plot errors.png    and a chart of it; pip install -e '.[bench]'

Exit status: 0 StreamingMerge has the error of one rounding at every length, 1 it has not, 2 wrong usage.
"""

import argparse
import sys
from typing import NamedTuple

import numpy as np

import rau
from rau.cli import demo, session
from rau.cli.console import progress, table
from rau.cli.demo import ring
from rau.install import command
from rau.testing import oracle
from rau.testing.reference.oracle import widen

SLACK = 1.01  # a float32 state is off by 2**-24 a hop: beside one rounding to 16 bits, next to nothing
CHAIN, STREAM, ONCE = "16-bit chain", "StreamingMerge", "one rounding"
LEGEND = f"""\
{CHAIN}    ring_attention_update, its running state kept in the partials' dtype
{STREAM}  a float32 running state, rounded once at the end
{ONCE}    the exact merge, rounded once: no result in this dtype is closer
All are relative RMS errors of attn_out against the exact merge of the same partials.
"""


class Hop(NamedTuple):
    """Errors of one backend after so many partials, relative, root mean square."""

    backend: str
    partials: int
    chain_error: float
    stream_error: float
    rounding_error: float


def measure(work, backend, step):
    """Merge one partial after another in both ways; compare at powers of two, and at the end."""
    options = work.call | {"backend": backend}
    stream = rau.StreamingMerge(**options)
    chain = None
    for count, partial in enumerate(work.partials, 1):
        step(f"{backend.name}: partial {count}")
        state = rau.AttentionState(*map(backend.asarray, partial))
        stream.update(*state)
        chain = state if chain is None else rau.ring_attention_update(*chain, *state, profile="portable", **options)
        if count > 1 and (count & (count - 1) == 0 or count == len(work.partials)):
            exact = np.asarray(oracle(work.partials[:count], **work.call).attn_out, np.float64)
            dtype = partial.attn_out.dtype
            results = (backend.to_numpy(result.attn_out) for result in (chain, stream.result(dtype)))
            yield Hop(backend.name, count, *(error(result, exact) for result in (*results, exact.astype(dtype))))


def error(result, exact):
    """Relative root mean square of the difference."""
    off = widen(result) - exact
    return float(np.sqrt(np.square(off).sum() / np.square(exact).sum()))


def draw(hops, title, file):
    """Draw the errors over the number of partials: of the first backend, since all have the same bits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xscale="log")
    hops = [hop for hop in hops if hop.backend == hops[0].backend]
    counts = [hop.partials for hop in hops]
    for name, field, style in ((CHAIN, "chain", "o-"), (STREAM, "stream", "s-"), (ONCE, "rounding", "k:")):
        axes.plot(counts, [getattr(hop, f"{field}_error") for hop in hops], style, label=name)
    axes.set_xticks(counts, list(map(str, counts)))
    axes.minorticks_off()
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("partial states merged")
    axes.set_ylabel("relative RMS error of attn_out")
    axes.set_title(title + (f", by {hops[0].backend}" if hops else ""))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)


def main():
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__.splitlines()[-1])
    demo.add_problem(parser, 512, 64, ("bfloat16", "float16"))
    session.add_backends(parser)
    parser.add_argument("--plot", metavar="FILE", help="draw a chart into a file (.png, .svg, .pdf); needs matplotlib")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else")
    options = parser.parse_args()
    if options.ranks == 1:
        parser.error("argument --ranks: got 1; expected 2 or more, since the errors are shown from 2 partials on")
    title = f"{options.dtype}, {options.tokens} tokens, {options.heads} heads of dimension {options.head_dim}"
    if options.plot:
        try:
            draw([], title, options.plot)  # what stands against it is told before anything takes time
        except ImportError:
            parser.error(f"argument --plot: needs matplotlib: {command('bench')}")
        except (OSError, ValueError) as wrong:
            parser.error(f"argument --plot: {wrong}")
    try:
        problem = demo.problem(options)
        backends = session.choose(options.backends)[0]
        others = "" if options.backends else ", since all give the same bits; --backends names others"
        backends = backends if options.backends else backends[:1]
        by = f"Merged by {', '.join(backend.name for backend in backends)}{others}."
        if not options.json:
            print(demo.heading(options), by, sep="\n", flush=True)
        with progress(2 * options.ranks + 1 + len(backends) * options.ranks, quiet=options.json) as step:
            work = ring.prepare(options, step)
            hops = [hop for backend in backends for hop in measure(work, backend, step)]
    except (rau.RauError, ImportError) as wrong:  # ImportError: bfloat16 without ml_dtypes
        parser.error(str(wrong))
    if options.plot:
        draw(hops, title, options.plot)
    passed = all(hop.stream_error <= SLACK * hop.rounding_error for hop in hops)
    if options.json:
        session.print_json({"problem": problem, "hops": hops, "plot": options.plot, "passed": passed})
        return 0 if passed else 1
    numbers = ["partials", CHAIN, STREAM, ONCE]
    rows = [[hop.backend, str(hop.partials), *(f"{error:.2e}" for error in hop[2:])] for hop in hops]
    print("", *table(["backend", *numbers], rows, right=numbers), "", LEGEND, sep="\n")
    last = hops[-1]
    if not passed:
        print("WRONG: StreamingMerge is further off than one rounding.")
    elif last.chain_error > last.stream_error:
        times = f"{last.chain_error / last.stream_error:.1f} times"
        print(f"After {last.partials} partials the chain is {times} as far off; StreamingMerge has the error of one\n"
              "rounding, however many partials there are.")  # fmt: skip
    else:
        print("StreamingMerge has the error of one rounding.")
    if options.plot:
        print(f"Drawn into {options.plot}.")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
