"""A fuzzer of the public functions: any object, shape, stride, dtype, alignment, aliasing, content and option.

    python tests/fuzz.py --calls 100000               from 0 on, in every process that there is a CPU for
    python tests/fuzz.py --first 4711 --calls 1       a finding again: call number 4711 is the same everywhere

What may happen: a result, which a sample of is held against the oracle; or a RauError. In both cases no input
may have changed, nor any byte around any array, and after an error not even `out`. Everything else is a finding: another
exception, a warning, a crash, a call that does not end. A call is made of its number alone (and of whether `--torch` is given), so
that a finding can be replayed.
"""

from __future__ import annotations

import argparse
import faulthandler
import mmap
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import warnings

import ml_dtypes
import numpy as np
from patience import LIMIT

import rau
from rau import compat
from rau.errors import RauError
from rau.layouts import LAYOUTS, shapes
from rau.testing import compare, oracle

DTYPES = ["f4", "f2", "f8", ml_dtypes.bfloat16]
torch = None
GUARD = 0xA5
BESIDE = 64  # bytes of it before and after each array
ORACLE_EVERY = 4  # of the updates and merges: more than a tenth of the results


class Buffers:
    """Where the arrays of one call lie: each in the middle of bytes of its own, all of them known."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.all, self.before = rng, [], []
        self.tensors = 0.95 if torch is not None and rng.random() < 0.7 else 0.02  # most of a call's arrays, or few

    def array(self, shape, dtype):
        """Make an array of random strides, alignment and content."""
        rng, dtype = self.rng, np.dtype(dtype)
        item, kind = dtype.itemsize, rng.random()
        strides, step = [], item
        for length in reversed(shape):
            strides.append(step)
            step *= max(length, 1)
        strides.reverse()
        if kind < 0.25 and shape:  # gaps, transposed, reversed, broadcast, overlapping, odd
            axis = rng.randrange(len(shape))
            strides[axis] = rng.choice([0, -strides[axis], strides[axis] * 2, strides[axis] + item, strides[axis] + 1, item, -item])
        elif kind < 0.32 and len(shape) > 1:
            a, b = rng.sample(range(len(shape)), 2)
            strides[a], strides[b] = strides[b], strides[a]
        reach = [(n - 1) * s for n, s in zip(shape, strides, strict=True) if n]
        low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + item
        odd = rng.choice([1, 2, 3]) if rng.random() < 0.06 else 0
        memory = np.full(BESIDE + high - low + odd + BESIDE, GUARD, np.uint8)  # aligned to 8 bytes by NumPy
        start = BESIDE - low + odd
        view = np.ndarray(shape, dtype, memory, start, tuple(strides))
        values = np.random.default_rng(rng.getrandbits(32))
        with np.errstate(all="ignore"):
            filled = values.standard_normal(shape)
            if rng.random() < 0.3 and view.size:
                strange = values.random(shape) < 0.2
                filled[strange] = values.choice([0.0, -0.0, np.nan, np.inf, -np.inf, 1e38, -1e38, 1e-45, 1e300], int(strange.sum()))
            if view.dtype.kind in "fV" and view.dtype.names is None:
                try:
                    view[...] = filled
                except (TypeError, ValueError):
                    pass
        self.all.append(memory)
        if rng.random() < 0.05:
            view.flags.writeable = False
        if torch is not None and rng.random() < self.tensors:
            view = self.tensor(view)
        return view

    def tensor(self, array):
        """See it as a torch tensor, where torch can."""
        try:
            if array.dtype.name == "bfloat16":
                return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
            return torch.from_numpy(array)
        except (TypeError, ValueError, Warning):  # negative strides, odd ones, read-only memory
            return array

    def remember(self):
        self.before = [memory.copy() for memory in self.all]

    def changed(self):
        return [k for k, (now, then) in enumerate(zip(self.all, self.before, strict=True)) if not np.array_equal(now, then)]


def anything(rng, buffers):
    """An object that does not belong there."""
    return rng.choice([
        lambda: None, lambda: rng.randrange(-3, 9), lambda: 1.5, lambda: "SBH", lambda: b"x", list, lambda: [1, 2], dict,
        lambda: object(), lambda: np.float32(1), lambda: np.ma.ones((2, 2)), lambda: np.zeros((), "f4"), lambda: int, lambda: ...,
        lambda: np.zeros(3, [("a", "f4")]), lambda: np.zeros(3, ">f4"), lambda: np.zeros(2, object), lambda: np.zeros(2, "U3"),
        lambda: buffers.array(tuple(rng.randrange(4) for _ in range(rng.randrange(6))), rng.choice([*DTYPES, "i8", "?", "c8"])),
        lambda: 2**70, lambda: -(2**63), lambda: float("nan"), lambda: "x" * 1000, lambda: slice(0, 1), lambda: np.zeros((0, 3), "f4"),
    ])()  # fmt: skip


def call(number):
    """Make a call of its number: what to call, the buffers, those that may be written, and a check of the result."""
    rng = random.Random(number)
    buffers = Buffers(rng)
    layout = rng.choice(sorted(LAYOUTS))
    B, S, N, D = (rng.choice([0, 1, 1, 2, 3, 5]) for _ in range(4))
    D = rng.choice([D, D, 8, 17, 64])
    if layout == "TND":
        B = 1
    lanes = rng.choice([8, 8, 1, 1, 2])
    attn, stats = shapes(layout, B, S, N, D, lanes)
    dtype = rng.choice(DTYPES)
    stats_dtype = "f8" if np.dtype(dtype) == np.float64 else "f4"

    def state():
        own = stats if rng.random() > 0.1 else (*stats[:-1], rng.choice([1, 8]))
        parts = [buffers.array(attn, dtype), buffers.array(own, stats_dtype), buffers.array(own, stats_dtype)]
        return [part if rng.random() > 0.02 else anything(rng, buffers) for part in parts]

    lengths = sorted(rng.randrange(S + 1) for _ in range(rng.randrange(3)))
    lengths = rng.choice(
        [[0, *lengths, S], np.array([0, *lengths, S]), None, None, np.array([0, *lengths, S], "i4"), [S, 0], [0, S + 1]]
    )
    if rng.random() < 0.05:
        lengths = anything(rng, buffers)
    options = {
        "layout": layout,
        "softmax_layout": rng.choice(["TND", "TND", "SBH"]),
        "profile": rng.choice(["portable"] * 4 + ["cann-v2"]),
    }
    options["check"] = rng.choice(["metadata"] * 4 + ["values", "document"])
    backends = [None, None, "cython", "numpy"] + (["torch"] if torch is not None else [])
    options["backend"] = rng.choice(backends)
    for name in list(options):
        if rng.random() < 0.02:
            options[name] = anything(rng, buffers)
    kind = rng.choice(
        ["update"] * 4 + ["merge"] * 3 + ["stream", "pairs"] * 2
        + ["from_lse", "from_max_sum", "lse", "reorder", "explain", "compat", "threads", "sink"]
    )  # fmt: skip
    states = [state() for _ in range(2 if kind != "merge" else rng.choice([1, 2, 3, 4, 9]))]
    if rng.random() < 0.05:  # aliasing
        states[-1][rng.randrange(3)] = states[0][rng.randrange(3)]
    out, writes = None, []
    if rng.random() < 0.4:
        out = rng.choice([state, state, lambda: states[0], lambda: states[-1], lambda: anything(rng, buffers)])()
        writes = list(out) if isinstance(out, (list, tuple)) else []
    judge, asked = None, {}
    if kind in ("update", "merge", "pairs") and rng.random() < 0.4:
        numbers = [rng.randrange(S + 1) for _ in range(rng.randrange(4))]
        tokens = [numbers, np.array(numbers, rng.choice(["i8", "i4", "u1"])), [rng.random() < 0.5 for _ in range(S)], slice(0, 2),
                  slice(None, None, 2), buffers.array((S,), "?"), buffers.array((rng.randrange(6),), "i8"), anything(rng, buffers)]  # fmt: skip
        slots = [[0, S], [0, *sorted(numbers), S], np.array([0, S // 2, S]), buffers.array((3,), "i8"), anything(rng, buffers)]
        asked[rng.choice(["tokens", "tokens", "cu_seqlens_padded"])] = None
        asked = {name: rng.choice(tokens if name == "tokens" else slots) for name in asked}
        if kind == "merge":
            dtypes = [None, "float32", "float16", "float8_e4m3fn", "float8_e5m2", "bfloat16", np.float64, anything(rng, buffers)]
            asked["dtype"] = rng.choice(dtypes)
            asked["scale"] = rng.choice(
                [None, None, 2.0, buffers.array((N,), "f4"), buffers.array((), "f4"), anything(rng, buffers)]
            )
            asked["indptr"] = rng.choice([None] * 6 + [slots[1], anything(rng, buffers)])
    if kind == "update":
        def make():
            return rau.ring_attention_update(*states[0], *states[1], lengths, out=out, **options, **asked)
    elif kind == "merge":
        given = rng.choice([states, states, tuple(states), anything(rng, buffers)])
        if asked.get("indptr") is not None:
            given = rng.choice([states[0], tuple(states[0]), given])
        statistics = rng.choice([True, True, True, False, False, anything(rng, buffers)])
        if statistics is False and writes:
            out = writes[0]
            del writes[1:]
        def make():
            return rau.merge_states(given, lengths, out=out, statistics=statistics, **options, **asked)
    elif kind == "pairs":
        axes = rng.choice([None, "BNS", "BSN", "TN", "NT"])
        turned = (lambda shape: (*shape[:-2], shape[-1], shape[-2])) if axes in ("BSN", "NT") else lambda shape: shape
        pairs = [(part[0], buffers.array(turned(stats[:-1]), stats_dtype)) for part in states]
        if out is not None:
            out = rng.choice([pairs[0], pairs[-1], (writes or [None])[0], (buffers.array(attn, dtype), pairs[0][1])])
            writes = list(out) if isinstance(out, tuple) else []
        how = {name: options[name] for name in ("layout", "backend")}
        how |= {
            "base": rng.choice(["e", "2"]),
            "lse_layout": axes,
            "inf_is_empty": rng.random() < 0.3,
            "heads": rng.choice([None, N, 3]),
        }

        def make():
            return rau.merge_lse(pairs, actual_seq_qlen=lengths, out=out, **how, **asked)
        if not asked and rng.randrange(ORACLE_EVERY) == 0 and all(is_array(part) for pair in pairs for part in pair):
            copied = [tuple(np.array(host(part)) for part in pair) for pair in pairs]
            def judge(result):
                named = {name: value for name, value in how.items() if name != "backend"}
                made = [rau.AttentionState.from_lse(*pair, **named) for pair in copied]
                whole = rau.merge_states(made, layout=layout, backend="numpy")
                problems = compare([host(result[0]), *whole[1:]], oracle(made, None, layout)).problems
                lse = whole.lse(base=how["base"], layout=layout, lse_layout=axes)
                if not np.allclose(host(result[1]), lse, rtol=1e-6, atol=1e-6, equal_nan=True):
                    problems = (*problems, f"lse {host(result[1])}, not {lse}")
                return "; ".join(problems)
    elif kind == "from_max_sum":
        own = rng.choice([stats, stats[:-1], stats[:-1][::-1]])
        rows = [buffers.array(own, stats_dtype) for _ in range(2)]
        how = {
            "base": rng.choice(["e", "2", anything(rng, buffers)]),
            "layout": options["layout"],
            "heads": rng.choice([None, N, 3]),
        }
        how |= {"stats_layout": rng.choice([None, "BNS", "BSN", "TN", "NT"]), "lanes": rng.choice([1, 8, anything(rng, buffers)])}
        def make():
            return rau.AttentionState.from_max_sum(states[0][0], *rows, **how)
    elif kind == "stream":
        wanted = rng.choice([None, "float16", "float32", np.float64, "float8_e5m2", anything(rng, buffers)])
        tokens = rng.choice([None, None, "front", "back", slice(0, 1), slice(None, None, 2), slice(1, None, -1), [0], [1, 0],
                             buffers.array((S,), "?"), anything(rng, buffers)])
        padded = rng.choice([None] * 4 + [[0, S], [0, S // 2, S], anything(rng, buffers)])
        def make():
            ring = rau.StreamingMerge(
                actual_seq_qlen=lengths,
                cu_seqlens_padded=padded,
                **{name: options[name] for name in ("layout", "softmax_layout", "profile", "check", "backend")},
            )
            ring.update(*states[0])
            ring.update(*states[1], tokens=tokens)
            return ring.result(wanted)
        writes = []
    elif kind == "from_lse":
        lse = buffers.array(rng.choice([stats[:-1], stats[:-1][::-1], (S, N), attn, (2, N, S)]), stats_dtype)
        how = {"base": rng.choice(["e", "2", anything(rng, buffers)]), "layout": options["layout"]}
        how |= {
            "lse_layout": rng.choice([None, "BNS", "BSN", "TN", "NT"]),
            "inf_is_empty": rng.random() < 0.5,
            "heads": rng.choice([None, N, 3]),
        }
        how["actual_seq_qlen"] = rng.choice([None, lengths])
        def make():
            return rau.AttentionState.from_lse(states[0][0], lse, **how)
    elif kind == "lse":
        how = {name: options[name] for name in ("layout", "softmax_layout")}
        how |= {
            "base": rng.choice(["e", "2"]),
            "lse_layout": rng.choice([None, "BNS", "BSN", "TN", "NT"]),
            "actual_seq_qlen": lengths,
        }

        def make():
            return rau.AttentionState(*states[0]).lse(**how)
    elif kind == "sink":
        sink = rng.choice([buffers.array((N,), stats_dtype), buffers.array((rng.randrange(4),), "f4"), anything(rng, buffers)])
        named = {name: options[name] for name in ("layout", "softmax_layout", "check", "backend")}
        def make():
            return rau.add_sink(states[0], sink, actual_seq_qlen=lengths, **named)
        writes = []
    elif kind == "reorder":
        to = rng.choice(["TND", "SBH", anything(rng, buffers)])
        def make():
            return rau.reorder_softmax(states[0][1], lengths, to=to)
    elif kind == "explain":
        def make():
            return str(rau.explain(*states[0], *states[1], lengths, out=out, **options))
        writes = []
    elif kind == "compat":
        named = rng.choice([layout, "SBH", "TND"])
        def make():
            return compat.npu_ring_attention_update(*states[0], *states[1], lengths, named)
        writes = []
    else:
        wanted = rng.choice([1, 2, 3, 0, -1, anything(rng, buffers)])
        def make():
            before = rau.get_num_threads()
            try:
                rau.set_num_threads(wanted)
            finally:
                rau.set_num_threads(before)
        writes = []
    if kind in ("update", "merge") and not asked and rng.randrange(ORACLE_EVERY) == 0:
        copies = [[np.array(host(part)) for part in state] if all(map(is_array, state)) else None for state in states]
        def judge(result):
            if any(copy is None for copy in copies) or (kind == "merge" and given is not states and given != tuple(states)):
                return ""
            # The result has the lanes of `out`, where that is given; lane 0 is what counts.
            copies[0][1:] = [
                np.repeat(part[..., :1], result[1].shape[-1] if isinstance(result, tuple) else 1, -1) for part in copies[0][1:]
            ]
            where = None if lengths is None else np.asarray(host(lengths)), layout
            if not isinstance(result, tuple):  # the output alone: what it is judged with is judged where it is a result
                result = result, *rau.merge_states(copies, *where, softmax_layout=options["softmax_layout"], backend="numpy")[1:]
            comparison = compare([host(part) for part in result], oracle(copies, *where, softmax_layout=options["softmax_layout"]))
            return "; ".join(comparison.problems)

    return (
        make,
        buffers,
        writes,
        judge,
        f"{kind}, {layout}, B {B}, S {S}, N {N}, D {D}, {np.dtype(dtype).name}, {lanes} lanes, {options}",
    )


def is_array(value):
    return isinstance(value, np.ndarray) or (torch is not None and isinstance(value, torch.Tensor))


def host(array):
    """See it as NumPy's."""
    if torch is not None and isinstance(array, torch.Tensor):
        array = array.detach()
        return array.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if array.dtype == torch.bfloat16 else array.numpy()
    return array


def span(array):
    """The bytes between the lowest and the highest element."""
    low, high = (np.lib.array_utils if hasattr(np.lib, "array_utils") else np).byte_bounds(host(array))
    return low, high


def fuzz(number):
    """Make one call; return what happened ("result", one that was "judged", or "error"), and what was wrong with that."""
    make, buffers, writes, judge, words = call(number)
    buffers.remember()
    try:
        result = make()
    except RauError:
        changed = buffers.changed()
        return "error", f"{words}: changed memory, and then raised an error" if changed else ""
    except Exception as error:
        return "error", f"{words}: {type(error).__name__}: {str(error)[:200]}"
    for k in buffers.changed():  # only what was to be written may have changed
        memory = buffers.all[k]
        base = memory.ctypes.data
        touched = np.flatnonzero(memory != buffers.before[k]) + base
        allowed = np.zeros(len(touched), bool)
        for array in filter(is_array, writes):
            elements = host(array)
            if elements.size:
                low, high = span(elements)
                allowed |= (touched >= low) & (touched < high)
        if not allowed.all():
            return "result", f"{words}: wrote beside `out`"
    if judge is None:
        return "result", ""
    wrong = judge(result)
    return "judged", f"{words}: {wrong}" if wrong else ""


def work(first, count, step, threads, place):
    """Make calls, in this process; findings go to stdout."""
    warnings.simplefilter("error")
    faulthandler.enable()
    tally, lock = {"result": 0, "judged": 0, "error": 0, "finding": 0}, threading.Lock()
    numbers = iter(range(first, first + count * step, step))

    def run():
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            place[:8] = number.to_bytes(8, "little")
            started = time.monotonic()
            try:
                outcome, wrong = fuzz(number)
            except BaseException as error:  # of the fuzzer itself, or an interrupt
                outcome, wrong = "error", f"{type(error).__name__}: {error}"
            if time.monotonic() - started > LIMIT:
                wrong = wrong or f"took more than {LIMIT:g} s"
            with lock:
                tally[outcome] += 1
                if wrong:
                    tally["finding"] += 1
                    print(f"FINDING {number}: {wrong}", flush=True)

    runners = [threading.Thread(target=run) for _ in range(threads)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    print("TALLY", *tally.values(), flush=True)


def main():
    """Fuzz: 0 without a finding, 1 with one."""
    global BESIDE, torch
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--threads", type=int, default=1, help="that make calls at once, in each process")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    parser.add_argument("--torch", action="store_true", help="tensors too")
    parser.add_argument("--beside", type=int, default=BESIDE, help="known bytes around each array; a sanitizer wants 0")
    parser.add_argument("--worker", nargs=2, metavar=("STEP", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    BESIDE = given.beside
    if given.torch:
        import torch
    if given.worker:
        with open(given.worker[1], "r+b") as file, mmap.mmap(file.fileno(), 8) as place:
            work(given.first, given.calls, int(given.worker[0]), given.threads, place)
        return 0
    started, total, failed = time.monotonic(), [0, 0, 0, 0], False
    count = min(given.processes, given.calls)
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for k in range(count):
            file = os.path.join(folder, str(k))
            with open(file, "wb") as new:
                new.write(bytes(8))
            command = [sys.executable, __file__, "--first", str(given.first + k), "--calls", str(len(range(k, given.calls, count)))]
            command += ["--threads", str(given.threads), "--beside", str(BESIDE), "--worker", str(count), file]
            command += ["--torch"] * given.torch
            workers.append((subprocess.Popen(command, stdout=subprocess.PIPE, text=True), file))
        for worker, file in workers:
            for line in worker.stdout:
                if line.startswith("TALLY"):
                    total = [a + int(b) for a, b in zip(total, line.split()[1:], strict=True)]
                else:
                    print(line, end="", flush=True)
                    failed = True
            if worker.wait():
                with open(file, "rb") as place:
                    at = int.from_bytes(place.read(8), "little")
                print(f"FINDING {at}, or a call beside it: the process ended with status {worker.returncode}")
                failed = True
    results, judged, errors, findings = total
    print(f"{results + judged + errors:,} calls from {given.first} on: {results + judged:,} results, {judged:,} of them held against "
          f"the oracle, {errors:,} errors, {findings} findings, {time.monotonic() - started:.0f} s")  # fmt: skip
    return 1 if failed or findings or results + judged + errors != given.calls else 0


if __name__ == "__main__":
    sys.exit(main())
