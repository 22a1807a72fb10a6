"""Calls of every kind, again and again: what they leave behind.

    python tests/memory.py                       100,000 calls of every kind, a line for each
    python tests/memory.py --calls 500 --only "from lse"

What may not grow: the reference counts of whatever is given to a call, the objects that the garbage collector knows,
Python's blocks of memory, and the bytes that malloc has given out (where glibc can say how many). Calls are made in rounds,
the first two of which fill what is filled once; of the others the least growth counts, since a leak is in all of them.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import itertools
import sys
import time
from typing import NamedTuple

import numpy as np
from states import arguments, sbh, state, tnd
from wrong_calls import ARRAYS, OPTIONS, SHAPES
from wrong_tnd_and_out import LENGTHS, LIMITS, OUTPUTS

import rau
from rau.backends import Backend, Capabilities

try:
    import torch
except ImportError:
    torch = None

ROUNDS = 5  # of which two are not judged
KINDS = {}  # name: makes a function to call, and the objects whose references are counted


class Grown(NamedTuple):
    """What a round of calls has left behind."""

    references: int
    objects: int
    blocks: int
    bytes: int


# Of any number of calls: NumPy and malloc keep a few freed pieces of each size, and it takes hundreds of calls to that.
BOUNDS = Grown(0, 0, 64, 1 << 12)


class _Mallinfo(ctypes.Structure):
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


try:
    _mallinfo = ctypes.CDLL(None).mallinfo2
    _mallinfo.restype = _Mallinfo
except (AttributeError, OSError, TypeError):  # no glibc, or an old one
    _mallinfo = None


def _malloced():
    if _mallinfo is None:
        return 0
    found = _mallinfo()
    return found.uordblks + found.hblkhd


def measure(call, watched, calls):
    """Make rounds of so many calls; return the least that one of them left behind, of each sort."""
    watched = [one for one in watched if type(one) is not int] + [None, np.ndarray, np.dtype("f4"), rau.AttentionState]
    gc.collect()
    gc.freeze()  # what was there before is not looked through again and again
    counts = np.zeros((ROUNDS, len(watched) + 3), np.int64)  # here at once, and so no growth itself
    for kept in counts:
        for _ in range(calls):
            call()
        gc.collect()
        kept[:] = [*map(sys.getrefcount, watched), len(gc.get_objects()), sys.getallocatedblocks(), _malloced()]
    gc.unfreeze()
    *references, objects, blocks, malloced = np.diff(counts, axis=0)[1:].min(axis=0).tolist()
    return Grown(max(references), objects, blocks, malloced)


def grew(grown):
    """Tell whether that is more than nothing."""
    return any(its > bound for its, bound in zip(grown, BOUNDS, strict=True))


def kind(make):
    """Have calls of a kind: `make` is named after it, and returns the call and what is given to it."""
    KINDS[make.__name__.replace("_", " ")] = make
    return make


def fails(call, *errors):
    """Make a call of one that fails, in one of these ways."""

    def failing():
        try:
            call()
        except errors:
            return
        raise AssertionError("it did not fail")

    return failing


def _in_turn(given):
    """Make wrong calls, one after another."""
    turns = itertools.cycle([fails(functools.partial(rau.ring_attention_update, **each), rau.RauError) for each in given])
    return lambda: next(turns)(), _flat(*(value for each in given for value in each.values()))


def _flat(*values):
    return [part for value in values for part in (value, *(value if isinstance(value, (tuple, list)) else ()))]


def _add(name, states, *arguments, function="ring_attention_update", **options):
    """Have calls of a public function on some states."""
    given = [part for one in states for part in one] if function == "ring_attention_update" else [states]
    KINDS[name] = lambda: (
        functools.partial(getattr(rau, function), *given, *arguments, **options),
        _flat(*states, *arguments, *options.values()),
    )


TWO, THREE = (sbh(), sbh(seed=1)), [sbh(seed=seed) for seed in range(3)]
T_TWO, QLEN = (tnd(), tnd(seed=1)), [0, 3, 8]
for _backend in ("cython", "numpy"):
    _add(f"{_backend}, fresh", TWO, backend=_backend)
    _add(f"{_backend}, out", TWO, out=sbh(seed=2), backend=_backend)
    _add(f"{_backend}, in place", TWO, out=TWO[0], backend=_backend)
    _add(f"{_backend}, TND", T_TWO, QLEN, "TND", backend=_backend)
    _add(f"{_backend}, TND, packed", T_TWO, np.array(QLEN), "TND", softmax_layout="SBH", backend=_backend)
    _add(f"{_backend}, three states", THREE, function="merge_states", backend=_backend)
    _add(f"{_backend}, three states, out", THREE, function="merge_states", out=sbh(seed=3), backend=_backend)
    _add(f"{_backend}, the output alone", THREE, function="merge_states", statistics=False, backend=_backend)
    _add(f"{_backend}, 1 lane beside 8", [*TWO, sbh(lanes=1)], function="merge_states", backend=_backend)
    _add(f"{_backend}, bfloat16", [sbh(dtype="bfloat16", seed=seed) for seed in range(2)], backend=_backend)
    _wide = [sbh(D=16, lanes=16, seed=seed) for seed in range(2)]
    _add(f"{_backend}, strided", [rau.AttentionState(*(part[..., ::2] for part in one)) for one in _wide], backend=_backend)
_add("fresh, in threads", [sbh(512, 1, 4, 64, seed=seed) for seed in range(2)])
_add("one state", [sbh()], function="merge_states")
_add("no token", [sbh(S=0), sbh(S=0)])
for _layout, _shape in {"BSND": (2, 4, 3, 8), "BNSD": (2, 3, 4, 8)}.items():
    _add(_layout, [state(_shape, (2, 3, 4, 8), seed=seed) for seed in range(2)], layout=_layout, profile="portable")
_add("values", T_TWO, QLEN, "TND", check="values")
KINDS["explain"] = lambda: (lambda: str(rau.explain(*TWO[0], *TWO[1])), _flat(*TWO))


@kind
def from_lse():
    attn_out, lse = sbh()[0], np.ones((2, 3, 4), "f4")
    return lambda: [rau.AttentionState.from_lse(attn_out, lse, base=base).lse(base=base) for base in "e2"], [attn_out, lse]


@kind
def from_max_sum():
    attn_out, rows = sbh()[0], np.ones((2, 3, 4), "f4")
    return lambda: [rau.AttentionState.from_max_sum(attn_out, rows, rows, base=base) for base in "e2"], [attn_out, rows]


@kind
def pairs_in_place():
    pairs = [(sbh(seed=seed)[0], np.ones((2, 3, 4), "f4")) for seed in range(2)]
    return lambda: rau.merge_lse(pairs, base="e", out=pairs[0]), [part for pair in pairs for part in pair]


@kind
def reorder():
    stats, lengths = tnd()[1], np.array(QLEN)
    return lambda: rau.reorder_softmax(stats, lengths, to="SBH"), [stats, lengths]


@kind
def a_running_state():
    first, second, third = sbh(dtype="float16"), sbh(dtype="float16", seed=1), sbh(S=2, dtype="float16", seed=2)

    def call():
        ring = rau.StreamingMerge()
        ring.update(*first)
        ring.update(*second)
        ring.update(*third, tokens="back")
        ring.result("float16")

    return call, _flat(first, second, third)


@kind
def one_running_state():
    ring, partial, part = rau.StreamingMerge("TND", actual_seq_qlen=[0, 2, 8]), tnd(), tnd(4)
    ring.update(*partial)

    def call():
        ring.update(*partial)
        ring.update(*part, tokens="front")
        ring.result()

    return call, _flat(partial, part, ring.running, ring)


@kind
def a_backend_for_a_while():
    def call():
        with rau.use_backend("numpy"):
            rau.ring_attention_update(*TWO[0], *TWO[1])
        try:
            with rau.use_backend("nobody"):
                pass
        except rau.UnknownBackendError:
            pass

    return call, _flat(*TWO)


@kind
def threads():
    def call():
        before = rau.get_num_threads()
        rau.set_num_threads(before + 1)
        fails(lambda: rau.set_num_threads(0), rau.RauError)()
        rau.set_num_threads(before)

    return call, []


class Plugin(Backend):
    """Does what it was made to do."""

    name, capabilities = "plugin", Capabilities(array_types=("numpy:ndarray",))

    def __init__(self, answer):
        self.answer = answer

    def update(self, problem, prev, cur, out):
        return self.answer(problem)


def raising(problem):
    raise LookupError(problem)


for _name, (_answer, _error) in {
    "a plugin that raises": (raising, LookupError),
    "a plugin that returns nothing": (lambda problem: None, rau.RauError),
    "a plugin that returns something else": (lambda problem: TWO[0][::-1], rau.RauError),
}.items():
    KINDS[_name] = lambda answer=_answer, error=_error: (
        fails(functools.partial(rau.ring_attention_update, *TWO[0], *TWO[1], backend=Plugin(answer)), error), _flat(*TWO)
    )  # fmt: skip
for _name in ("nobody", "torch"):
    KINDS[f"backend {_name}"] = lambda name=_name: (
        fails(lambda: rau.merge_states(THREE, backend=name), rau.RauError), _flat(THREE)
    )  # fmt: skip
_WRONG = {"array": ARRAYS, "shape": SHAPES, "option": OPTIONS, "lengths": LENGTHS, "limit": LIMITS, "out": OUTPUTS}
for _table, _cases in _WRONG.items():
    KINDS[f"wrong: {_table}"] = lambda cases=_cases: _in_turn([case.arguments() for case in cases.values()])


@kind
def wrong_values():
    given = arguments()
    given["cur_softmax_sum"][1, 2, 3] = -1
    return fails(lambda: rau.ring_attention_update(**given, check="values"), rau.RauError), list(given.values())


@kind
def wrong_lse():
    attn_out, lse = sbh()[0], np.ones((2, 3, 5), "f4")
    return fails(lambda: rau.AttentionState.from_lse(attn_out, lse, base="e"), rau.RauError), [attn_out, lse]


@kind
def a_wrong_partial_state():
    ring, partial = rau.StreamingMerge(), sbh()
    ring.update(*partial)
    wrong = sbh(S=5)
    calls = [
        lambda: ring.update(*wrong), lambda: ring.update(*ring.running), lambda: ring.update(*partial, tokens="middle"),
        lambda: ring.result("int8"),
    ]  # fmt: skip
    return lambda: [fails(call, rau.RauError)() for call in calls], _flat(partial, wrong, ring.running, ring)


if torch is not None:

    def tensors(seed=0, grad=False, dtype=torch.float32):
        """Make a state of tensors."""
        made = [torch.from_numpy(part) for part in sbh(seed=seed)]
        return rau.AttentionState(made[0].to(dtype).requires_grad_(grad), *(part.requires_grad_(grad) for part in made[1:]))

    T_STATES = [tensors(seed) for seed in range(3)]
    for _backend in ("cython", "torch"):
        _add(f"tensors, {_backend}, fresh", T_STATES[:2], backend=_backend)
        _add(f"tensors, {_backend}, out", T_STATES[:2], out=tensors(3), backend=_backend)
        _add(f"tensors, {_backend}, in place", T_STATES[:2], out=T_STATES[0], backend=_backend)
        _add(f"tensors, {_backend}, three states", T_STATES, function="merge_states", backend=_backend)
        _add(f"tensors, {_backend}, bfloat16", [tensors(seed, dtype=torch.bfloat16) for seed in range(2)], backend=_backend)

    @kind
    def tensors_with_a_gradient():
        prev, cur = tensors(0, grad=True), tensors(1, grad=True)

        def call():
            merged = rau.ring_attention_update(*prev, *cur)
            torch.autograd.grad(merged.attn_out.sum() + merged.softmax_sum.sum(), [*prev, *cur])

        return call, _flat(prev, cur)

    @kind
    def tensors_with_a_gradient_and_out():
        prev, cur, out = tensors(0, grad=True), tensors(1), tensors(2)
        return fails(lambda: rau.ring_attention_update(*prev, *cur, out=out), rau.RauError), _flat(prev, cur, out)

    @kind
    def tensors_of_two_kinds():
        prev, cur = tensors(), sbh(seed=1)
        return fails(lambda: rau.ring_attention_update(*prev, *cur), rau.RauError), _flat(prev, cur)

    @kind
    def tensors_in_a_running_state():
        partial = tensors(dtype=torch.bfloat16)

        def call():
            ring = rau.StreamingMerge()
            ring.update(*partial)
            ring.update(*partial)
            ring.result(torch.bfloat16)

        return call, _flat(partial)


def main():
    """Measure: 0 where nothing grew, 1 where something did."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--calls", type=int, default=100_000, help="of each kind, in rounds")
    parser.add_argument("--only", help="the one kind with this name")
    given = parser.parse_args()
    failed = False
    for name, make in KINDS.items():
        if given.only in (None, name):
            started = time.monotonic()
            grown = measure(*make(), -(-given.calls // ROUNDS))
            failed |= grew(grown)
            print(f"{name:35} {grown}, {time.monotonic() - started:.1f} s{', GREW' * grew(grown)}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
