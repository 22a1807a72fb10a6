"""Ctrl-C at any moment: the process stays sound, and what became of `out=` is as docs/reliability.md says."""

import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import interrupts
import numpy as np
import pytest
from patience import LIMIT
from states import sbh, tnd

import rau
from rau import plugins, registry
from rau.backends import Backend, Capabilities, numpy_
from rau.constraints import cache

HERE = [status.name for status in registry.status() if status.available]
HOST = [name for name in ("cython", "numpy") if name in HERE]
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # those that are lost


@pytest.fixture(autouse=True)
def contexts_are_left():
    """An interrupt on the way into or out of numpy.errstate leaves it entered: that is Python's, and promised by nobody."""
    with np.errstate():
        yield


@pytest.fixture(autouse=True)
def no_lock_is_left():
    """Held by a thread that has gone on, it would stop the next one that loads a backend, for good."""
    yield
    lock, found = plugins.lock, []
    thread = threading.Thread(target=lambda: found.append(lock.acquire(timeout=LIMIT) and lock.release()))
    thread.start()
    thread.join()
    assert found == [None]


@pytest.mark.parametrize("backend", HOST)
def test_a_backend_that_is_loaded(backend):
    for _ in interrupts.at_every_place(lambda: registry.get(backend), registry.refresh):
        assert registry.get(backend).name == backend


def test_a_plugin_that_is_loaded(monkeypatch):
    def before():
        monkeypatch.setitem(plugins._entries, "elsewhere", plugins.Entry("a plugin", lambda: Elsewhere))

    registry.names()
    for _ in interrupts.at_every_place(lambda: registry.get("elsewhere"), before):
        assert registry.get("elsewhere").name == "elsewhere"


def test_a_fork():
    """What is raised while the lock is taken for a fork is printed by Python, which forks all the same."""
    for _ in interrupts.at_every_place(plugins._before_fork):
        plugins._after_in_parent()
    plugins._after_in_parent()  # of the last one, which was not interrupted


@pytest.mark.parametrize("backend", HOST)
def test_an_update(backend, monkeypatch):
    """Checked, chosen and run anew each time; `numpy` in two pieces."""
    monkeypatch.setattr(numpy_, "_ELEMENTS", 128)
    prev, cur, out = (sbh(16, 1, 2, seed=seed) for seed in range(3))
    inputs = [part.copy() for part in (*prev, *cur)]
    right, old = rau.ring_attention_update(*prev, *cur, backend=backend), [part.copy() for part in out]

    def before():
        cache._problems.clear()
        for part, values in zip(out, old, strict=True):
            part[...] = values

    found, step = Counter(), 1 if backend == "cython" else 3
    def call():
        rau.ring_attention_update(*prev, *cur, out=out, backend=backend)

    for _ in interrupts.at_every_place(call, before, step):
        assert interrupts.same((*prev, *cur), inputs)
        found["untouched" if interrupts.same(out, old) else "whole" if interrupts.same(out, right) else "mixed"] += 1
        assert interrupts.same(rau.ring_attention_update(*prev, *cur, backend=backend), right)
    if backend == "cython":
        assert found.keys() <= {"untouched", "whole"}
    else:
        assert found["mixed"]  # which is not promised, and shows that it would be seen


class Elsewhere(Backend):
    """Writes nothing in place, and takes no halves: results are copied, in several pieces."""

    name = "elsewhere"
    capabilities = Capabilities(array_types=("numpy:ndarray",), in_place=False)

    def update(self, problem, prev, cur, out):
        return registry.get("numpy").update(problem, prev, cur, None)


HALVES = {"layout": "TND", "actual_seq_qlen": [0, 2, 6, 8]}


@pytest.mark.parametrize("backend", [*HOST, Elsewhere()], ids=[*HOST, "elsewhere"])
@pytest.mark.parametrize("tokens", [None, "front"])
def test_a_running_state(backend, tokens):
    """An update that raised has merged nothing, or the state refuses to go on."""
    first, second = (sbh(), sbh(seed=1)) if tokens is None else (tnd(), tnd(4, seed=1))
    update, before, became = interrupts.running(first, second, backend, tokens, **({} if tokens is None else HALVES))
    step = 1 if backend == "cython" else 7
    found = Counter(became() for _ in interrupts.at_every_place(update, before, step))
    assert found.keys() == {"untouched", "refuses"}


def test_signals():
    """At random moments, some of them inside the core, NumPy and torch; what has become of all is judged there."""
    script = Path(interrupts.__file__)
    command = [sys.executable, "-W", "ignore", script, "--interrupts", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
