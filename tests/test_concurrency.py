"""Many threads, tasks and processes: the bits of one, one instance of each backend, each its own choice of it."""

import asyncio
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from patience import LIMIT
from states import sbh, state, tnd

import rau
from rau import plugins, registry
from rau.backends import Backend, Capabilities
from rau.testing import same_bits

HERE = [status.name for status in registry.status() if status.available]
THREADS = 8


def alone(*code):
    """Run code in a process of its own; what it printed."""
    command = [sys.executable, "-W", "ignore", "-c", "".join(map(textwrap.dedent, code))]
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env={**os.environ, "PYTHONPATH": path})
    return done.stdout + done.stderr


def together(*works):
    """Run each in a thread of its own, all from the same moment on; return what they returned, in order."""
    start, found = threading.Barrier(len(works)), {}

    def run(number, work):
        start.wait(LIMIT)
        found[number] = work()

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[number] for number in range(len(works))]


def calls(backend):
    """Calls of several layouts, sizes and dtypes; some are large enough for several threads."""

    def own(states):
        if backend != "torch":
            return states
        import torch

        return [rau.AttentionState(*map(torch.from_numpy, one)) for one in states]

    def update(states, *arguments, **options):
        prev, cur = own(states)
        return lambda: rau.ring_attention_update(*prev, *cur, *arguments, profile="portable", backend=backend, **options)

    def stream(states):
        def call():
            ring = rau.StreamingMerge(backend=backend)
            for one in states:
                ring.update(*one)
            return ring.result()

        return call

    def two(make, *sizes, **options):
        return [make(*sizes, seed=seed, **options) for seed in range(2)]

    lengths = np.array([0, 1, 400, 401, 900])
    bnsd = [state((2, 4, 50, 16), (2, 4, 50, 8), seed=seed) for seed in range(2)]
    many = own([sbh(300, 1, 4, 32, seed=seed) for seed in range(5)])
    return [
        update(two(sbh)),
        update(two(sbh, 3000, 1, 4, 64)),
        update(two(sbh, 700, 2, 3, 40, dtype="float16")),
        update(two(tnd, 900, 8, 64), lengths, "TND"),
        update(two(tnd, 900, 8, 64), lengths, "TND", softmax_layout="SBH"),
        update(bnsd, layout="BNSD"),
        lambda: rau.merge_states(many, backend=backend),
        stream(many),
    ]


@pytest.mark.parametrize("backend", [name for name in ("cython", "numpy", "torch") if name in HERE])
def test_eight_threads_have_the_bits_of_one(backend):
    made = calls(backend)
    right = [call() for call in made]

    def work(first):
        order = [*range(first, len(made)), *range(first)]
        return [fault for number in order for fault in same_bits(right[number], made[number]())]

    assert together(*(lambda first=first: work(first) for first in range(THREADS))) == [[]] * THREADS


@pytest.mark.skipif("cython" not in HERE, reason="no compiled core")
def test_the_number_of_threads_may_change_meanwhile():
    made, before = calls("cython"), rau.get_num_threads()
    right, running = [call() for call in made], threading.Event()
    running.set()

    def work():
        return [fault for _ in range(5) for call, its in zip(made, right, strict=True) for fault in same_bits(its, call())]

    def change():
        while running.is_set():
            for number in (1, 5, 2, 8, 3):
                rau.set_num_threads(number)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        assert together(work, work, work) == [[]] * 3
    finally:
        running.clear()
        changer.join()
        rau.set_num_threads(before)


# ----------------------------------------------------------------------------------------------------------- loading


class Slow(Backend):
    """Takes arrays of its own."""

    name, capabilities = "slow", Capabilities(array_types=("slow:Array",))
    made = 0

    def __init__(self):
        type(self).made += 1

    def update(self, problem, prev, cur, out):
        return prev


ASK = {"types": lambda: "slow:Array" in registry.array_types(), "capabilities": lambda: bool(registry.capabilities("slow"))}


@pytest.mark.parametrize("ask", ASK.values(), ids=ASK)
def test_who_comes_second_waits_for_the_class(ask, monkeypatch):
    """It used to hear that there is none, so that the plugin's arrays were no arrays."""
    loading, go, found = threading.Event(), threading.Event(), []

    def load():
        loading.set()
        go.wait(LIMIT)
        return Slow

    registry.names()
    monkeypatch.setitem(plugins._entries, "slow", plugins.Entry("a plugin", load))
    first = threading.Thread(target=registry.standings)
    first.start()
    loading.wait(LIMIT)
    second = threading.Thread(target=lambda: found.append(ask()))
    second.start()
    second.join(0.2)  # time enough for the wrong answer; the right one comes when it comes
    go.set()
    second.join()
    first.join()
    assert found == [True]


def test_eight_threads_load_a_backend_once(monkeypatch):
    """Nobody sees what is loaded beside the note that it is still being loaded: calls would go elsewhere."""
    notes = []

    class Entry(plugins.Entry):
        def __setattr__(self, name, value):
            if name in ("cls", "instance") and value is not None:
                notes.append(self.failure)
            super().__setattr__(name, value)

    registry.names()
    monkeypatch.setattr(Slow, "made", 0)
    monkeypatch.setitem(plugins._entries, "slow", Entry("a plugin", lambda: Slow))
    found = together(*[lambda: registry.get("slow")] * THREADS)
    assert len(set(map(id, found))) == Slow.made == 1
    assert notes == [None, None]


# ---------------------------------------------------------------------------------------------------------- contexts


def test_tasks_and_threads_choose_for_themselves():
    """A task and asyncio.to_thread have the choice of whoever starts them; a thread where Python hands it contexts on."""
    seen, inherits = {}, getattr(sys.flags, "thread_inherit_context", 0)  # free-threaded Python 3.14 does

    async def see(name, backend=None):
        if backend is None:
            await asyncio.sleep(0)
            seen[name] = registry.requested()[0]
            return
        with rau.use_backend(backend):
            for _ in range(3):
                await asyncio.sleep(0)  # the others' turn
                assert registry.requested()[0] == backend
            inner = asyncio.create_task(see(f"{name}, a task"))
            seen[f"{name}, to_thread"] = (await asyncio.to_thread(registry.requested))[0]
            thread = threading.Thread(target=lambda: seen.update({f"{name}, a thread": registry.requested()[0]}))
            thread.start()
            thread.join()
        await inner
        seen[f"{name}, after"] = registry.requested()[0]

    async def main():
        await asyncio.gather(see("a", "numpy"), see("b", "cython"), see("c"))

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAU_BACKEND", raising=False)
        asyncio.run(main())
    assert seen == {
        "c": None,
        "a, to_thread": "numpy", "a, a task": "numpy", "a, a thread": "numpy" if inherits else None, "a, after": None,
        "b, to_thread": "cython", "b, a task": "cython", "b, a thread": "cython" if inherits else None, "b, after": None,
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------- processes


def test_spawned_processes_after_calls_in_threads():
    prev, cur = sbh(3000, 1, 4, 64), sbh(3000, 1, 4, 64, seed=1)
    right = together(*[lambda: rau.ring_attention_update(*prev, *cur)] * 2)[0]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(rau.ring_attention_update, *prev, *cur) for _ in range(4)]:
            assert same_bits(right, future.result(LIMIT)) == []


FORK = """
    import os, signal, sys, threading
    import numpy as np, rau
    from rau import problem
    from rau.testing import same_bits
    from patience import LIMIT
    from states import sbh, tnd
    def call(seed=0):
        prev, cur = sbh(3000, 1, 4, 64, seed=seed), sbh(3000, 1, 4, 64, seed=1)
        return rau.ring_attention_update(*prev, *cur)
    def in_child(work):
        child = os.fork()
        if child == 0:
            signal.alarm(int(LIMIT))  # ends a child that hangs
            os._exit(0 if work() else 1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    rau.set_num_threads(2)
    right = call()
    good = lambda: same_bits(right, call()) == []
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forks_after_and_during_calls_in_threads():
    """Of a child, of a thread, and while others call."""
    code = """
        found = [in_child(lambda: good() and in_child(good))]
        thread = threading.Thread(target=lambda: found.append(good() and in_child(good)))
        thread.start(); thread.join()
        running = True
        def work():
            while running:
                found[0] &= good()
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads: thread.start()
        found += [in_child(good) for _ in range(10)]
        running = False
        for thread in threads: thread.join()
        print(len(found), all(found), good())
    """
    assert alone(FORK, code) == "12 True True\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_while_another_thread_describes_its_call():
    """functools.cached_property had its lock by then, and the child waited for it."""
    code = """
        inside, leave, block_terms = threading.Event(), threading.Event(), problem.block_terms
        def slowly(*arguments):
            if threading.current_thread() is thread:
                inside.set(); leave.wait(LIMIT)
            return block_terms(*arguments)
        problem.block_terms = slowly
        thread = threading.Thread(target=call)
        rau.constraints.cache._problems.clear()
        thread.start(); inside.wait(LIMIT)
        found = in_child(lambda: good())
        leave.set(); thread.join()
        print(found)
    """
    assert alone(FORK, code) == "True\n"


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc for the libraries that are loaded")
@pytest.mark.parametrize("first", ["ours", "another's"])
def test_beside_another_openmp_runtime(first, tmp_path):
    """As torch's wheels bring one: ours runs within the other's threads, and within Python's that start some of them."""
    pytest.importorskip("rau._core", reason="test_packaging.py fails where it should be there")
    libraries = """
        def loaded():
            return {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line.rpartition("/")[2]}
    """
    own = alone(libraries, "import rau; rau.registry.get('cython'); print(*loaded())").split()
    if len(own) != 1:
        pytest.skip(f"the core was not built with gcc's OpenMP alone: {own}")
    name = b"libgomp.so.1\0"  # under another name than its own, which would be taken for the one that is there
    another = tmp_path / "another-libgomp.so"
    another.write_bytes(Path(own[0]).read_bytes().replace(name, b"another.so.1".ljust(len(name), b"\0")))
    code = f"""
        import ctypes, threading
        def ours():
            import rau
            rau.registry.get("cython")
        def others():
            global lib
            lib = ctypes.CDLL({str(another)!r})
        for load in (ours, others) if {first!r} == "ours" else (others, ours):
            load()
        import numpy as np, rau
        from states import sbh
        states = sbh(4000, 1, 4, 64), sbh(4000, 1, 4, 64, seed=1)
        rau.set_num_threads(2)
        expected, seen = rau.merge_states(states, backend="cython"), []
        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def merge(_):
            merged = rau.merge_states(states, backend="cython")
            seen.append((lib.omp_get_thread_num(), all(map(np.array_equal, merged, expected))))
        def parallel():
            for _ in range(5):
                lib.GOMP_parallel(merge, None, 3, 0)
        threads = [threading.Thread(target=parallel) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(len(loaded()), len(seen), {{number for number, _ in seen}}, all(same for _, same in seen))
    """
    assert alone(libraries, code).strip() == "2 45 {0, 1, 2} True"
