"""One tensor of more than 2**31 elements and more than 4 GiB, merged into in place: every row against that of a small call.

    python tests/large.py                        7 GiB of memory, some minutes; the suite does not run it
    python tests/large.py --backend numpy
    python tests/large.py --torch                as torch tensors; with --backend torch 28 GiB

The other side is one row, seen again and again (stride 0), and all that differs from row to row repeats itself after a few
hundred tokens: so a call on these alone says what each row has to be, bit for bit, on both sides of element 2**31.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np

import rau

PERIOD, HEADS, HEAD_DIM = 509, 2, 2048
REPEATS = (2**31 + 2**24) // (PERIOD * HEADS * HEAD_DIM) + 1
CALLS = {"SBH": {}, "TND": {}, "TND, packed": {"softmax_layout": "SBH"}, "TND, one sequence": {"softmax_layout": "SBH"}}


def states(name, repeats):
    """Two states of so many periods; the later one's outputs are one row."""
    rng, tokens = np.random.default_rng(0), repeats * PERIOD
    attn = (tokens, 1, HEADS * HEAD_DIM) if name == "SBH" else (tokens, HEADS, HEAD_DIM)
    made = []
    for _ in range(2):
        row = np.broadcast_to(rng.standard_normal(HEAD_DIM).astype("f2"), (HEADS, HEAD_DIM)).reshape(1, *attn[1:])
        numbers = rng.standard_normal((HEADS, PERIOD, 1)), rng.uniform(1, 9, (HEADS, PERIOD, 1))
        stats = [part.astype("f4") for part in numbers]
        if name == "TND":  # by token
            stats = [np.tile(part.swapaxes(0, 1), (repeats, 1, 8)) for part in stats]
        elif name == "TND, packed":  # one period is one sequence
            stats = [np.tile(part.reshape(PERIOD, HEADS, 1), (repeats, 1, 8)) for part in stats]
        else:  # by head
            stats = [np.tile(part, (1, repeats, 8)) for part in stats]
            stats = [part[None] if name == "SBH" else part.reshape(tokens, HEADS, 8) for part in stats]
        made.append([np.broadcast_to(row, attn), *stats])
    made[0][0] = np.empty(attn, "f2")
    tile = rng.standard_normal((PERIOD, *attn[1:])).astype("f2")
    for start in range(0, tokens, PERIOD):
        made[0][0][start : start + PERIOD] = tile
    lengths = np.arange(0, tokens + 1, PERIOD) if name == "TND, packed" else np.array([0, tokens])
    return *made, lengths


def by_token(name, state):
    """See a state's statistics as (tokens, heads, lanes)."""
    attn_out, *stats = state
    if name == "SBH":
        stats = [part[0].swapaxes(0, 1) for part in stats]
    elif name == "TND, packed":
        stats = [part.reshape(-1, HEADS, PERIOD, 8).swapaxes(1, 2).reshape(-1, HEADS, 8) for part in stats]
    elif name == "TND, one sequence":
        stats = [part.reshape(HEADS, -1, 8).swapaxes(0, 1) for part in stats]
    return attn_out, *stats


def tensor(array):
    """See an array as a torch tensor; one row seen again and again, which NumPy has read-only, as the same of torch's."""
    from torch import from_numpy

    return from_numpy(array) if array.flags.writeable else from_numpy(array[:1].copy()).expand(array.shape)


def main():
    """Merge and compare: 0 where every row is right."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--backend", default="cython")
    parser.add_argument("--torch", action="store_true", help="give torch tensors")
    parser.add_argument("--only", choices=CALLS)
    given, failed = parser.parse_args(), False
    for name, options in CALLS.items():
        if given.only not in (None, name):
            continue
        merged = []
        for repeats in (1, REPEATS):
            prev, cur, lengths = states(name, repeats)
            old, new = ([tensor(part) if given.torch else part for part in state] for state in (prev, cur))  # the same memory
            started = time.monotonic()
            rau.ring_attention_update(*old, *new, lengths, name[:3], out=old, backend=given.backend, profile="portable", **options)
            took = time.monotonic() - started
            merged.append(by_token(name, prev))
        wrong = [
            start
            for start in range(0, REPEATS * PERIOD, PERIOD)
            if any(small.tobytes() != part[start : start + PERIOD].tobytes() for small, part in zip(*merged, strict=True))
        ]
        attn_out = merged[1][0]
        failed |= bool(wrong)
        where = f", the first at token {wrong[0]}" if wrong else ""
        print(f"{name:18} {given.backend}: {attn_out.size:,} elements, {attn_out.nbytes / 2**30:.2f} GiB, {took:.1f} s, "
              f"{len(wrong)} of {REPEATS} periods differ{where}", flush=True)  # fmt: skip
        del prev, cur, old, new, merged, attn_out
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
