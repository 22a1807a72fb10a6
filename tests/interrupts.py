"""Ctrl-C at any moment: what it leaves behind.

    python tests/interrupts.py                  50 signals for each sort of call, at random moments; a line for each

`at_every_place` is the other way: it stops a call at each place where Python looks for signals, one after another.
"""

from __future__ import annotations

import argparse
import collections
import random
import signal
import sys
import threading
import time
import traceback

import numpy as np
from patience import LIMIT
from states import sbh

import rau
from rau import plugins

try:
    import torch
except ImportError:
    torch = None


def at_every_place(call, before=lambda: None, step=1):
    """Make a call again and again, each time interrupted some places later; yields after each interrupt.

    Python looks for signals where a function starts and where one of C's has returned (and in loops, where one of the two
    is never far). A profiling function is called there too. Not within Python's own import: between taking its lock and the
    `try` after that, an interrupt leaves the lock taken for good, and the next thread that imports waits for ever.
    """
    number, stopped = 0, True
    while stopped:
        before()
        number, stopped, left, raised = number + step, False, number, False

        def look(frame, event, argument):
            nonlocal left, stopped
            ours = not frame.f_code.co_filename.startswith("<frozen importlib")
            if ours and event in ("call", "c_return", "c_exception"):
                left -= 1
                if left < 0:
                    stopped = True
                    sys.setprofile(None)
                    raise KeyboardInterrupt

        try:
            sys.setprofile(look)
            call()
        except KeyboardInterrupt:
            raised = True
        finally:
            sys.setprofile(None)
        if raised:  # in a destructor or the end of a generator it is lost
            yield number


def by_signals(call, count, before=lambda: None):
    """Make a call again and again, each time interrupted by a signal at a random moment; yields after each interrupt."""
    armed = False

    def interrupt(*_):
        nonlocal armed
        if armed:  # else the call has ended
            armed = False
            raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    before()
    started = time.perf_counter()
    call()
    took = time.perf_counter() - started
    while count:
        before()
        stopped = False
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, took))
            call()
            armed = False
        except KeyboardInterrupt as error:
            # Inside: there are frames between the call's own function here and the handler's. Else it had returned by then.
            stopped = sum(1 for _ in traceback.walk_tb(error.__traceback__)) > 3
        signal.setitimer(signal.ITIMER_REAL, 0)
        if stopped:
            count -= 1
            yield count


def sound(call, right):
    """Check that a later call, and one of another thread, are right, and that nobody holds the lock."""
    found = [call()]

    def elsewhere():
        if plugins.lock.acquire(timeout=LIMIT):
            plugins.lock.release()
            found.append(call())

    other = threading.Thread(target=elsewhere)
    other.start()
    other.join()
    return len(found) == 2 and all(same(result, right) for result in found)


def same(a, b):
    return all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(a, b, strict=True))


def kinds(S=4000):
    """Sorts of calls: the name, a call, what is done before each, and what became of it."""
    for backend in ("cython", "numpy", "torch"):
        if backend == "torch" and torch is None:
            continue
        prev, cur, inputs = (sbh(S, 1, 8, 8, seed=seed) for seed in (0, 1, 0))
        inputs += sbh(S, 1, 8, 8, seed=1)
        out = rau.AttentionState(*map(np.empty_like, prev))
        if backend == "torch":
            prev, cur, out = (rau.AttentionState(*map(torch.from_numpy, state)) for state in (prev, cur, out))

        def fresh(prev=prev, cur=cur, backend=backend):
            return rau.ring_attention_update(*prev, *cur, backend=backend)

        def into(prev=prev, cur=cur, out=out, backend=backend):
            rau.ring_attention_update(*prev, *cur, out=out, backend=backend)

        def before(out=out):
            for part in out:
                part[...] = 7

        right = fresh()

        def became(prev=prev, cur=cur, out=out, inputs=inputs, right=right, fresh=fresh):
            if not same((*prev, *cur), inputs):
                return "the inputs have changed"
            if not sound(fresh, right):
                return "a later call is wrong"
            if same(out, right):
                return "whole"
            return "untouched" if all(bool((part == 7).all()) for part in out) else "mixed"

        yield f"{backend}, out", into, before, became
        yield f"{backend}, a running state", *running(prev, cur, backend)


def running(first, second, backend, tokens=None, **options):
    """Updates of a running state: the call, what is done before each, and what became of it."""
    merges = [rau.StreamingMerge(backend=backend, **options) for _ in range(2)]
    for ring in merges:
        ring.update(*first)
    merges[1].update(*second, tokens=tokens)
    old, new = (ring.result() for ring in merges)
    ring = None

    def before():
        nonlocal ring
        ring = rau.StreamingMerge(backend=backend, **options)
        ring.update(*first)

    def became():
        try:
            result = ring.result()
        except rau.UnsupportedError:
            return "refuses"
        return "untouched" if same(result, old) else "whole" if same(result, new) else "mixed"

    return lambda: ring.update(*second, tokens=tokens), before, became


def main():
    """Interrupt: 0 where everything was as promised, 1 where it was not."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--interrupts", type=int, default=50, help="of each sort of call")
    given = parser.parse_args()
    failed = False
    for name, call, before, became in kinds():
        found = collections.Counter(became() for _ in by_signals(call, given.interrupts, before))
        allowed = {"untouched", "refuses" if "running" in name else "whole"}
        if name in ("numpy, out", "torch, out"):
            allowed.add("mixed")
        failed |= not found.keys() <= allowed
        print(f"{name:25} {dict(found)}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
