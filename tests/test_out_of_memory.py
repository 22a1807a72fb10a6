"""What runs out, memory first: MemoryError, nothing half written, nothing kept, and the process goes on.

Not for `numpy`: some of NumPy's own functions crash where a small allocation of Python's fails.
"""

import errno
import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import textwrap

import pytest
from patience import LIMIT
from states import sbh

import rau
from rau import plugins, registry

pytest.importorskip("rau._core", reason="test_packaging.py fails where it should be there")


def alone(*code):
    """Run code in a process of its own; what it printed."""
    command = [sys.executable, "-W", "ignore", "-c", "".join(map(textwrap.dedent, code))]
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env={**os.environ, "PYTHONPATH": path})
    return done.stdout + done.stderr


EACH = """
    import sys, _testcapi
    import numpy as np, rau
    from rau import _core
    from rau.constraints import cache
    from states import sbh, tnd
    def each(call, check, before=lambda: None):
        '''Let one allocation of Python's after another fail, until none is left; how many did.'''
        number, last = 0, -1
        while number - last < 50:
            before()
            error = None
            _testcapi.set_nomemory(number, number + 1)
            try:
                call()
            except MemoryError as caught:
                error = caught
            finally:
                _testcapi.remove_mem_hooks()
            assert check(error), (number, error)
            if error:
                last = number
            number += 1
        return last
    def same(a, b):
        return all(map(np.array_equal, a, b))
    prev, cur, out = (sbh(seed=seed) for seed in range(3))
    old, right = [part.copy() for part in out], rau.ring_attention_update(*prev, *cur, backend="cython")
    def written(error):
        found = same(out, old if error else right)
        for part, values in zip(out, old):
            part[...] = values
        return found and same(rau.ring_attention_update(*prev, *cur, backend="cython"), right)
"""


@pytest.mark.skipif(
    sysconfig.get_config_var("Py_GIL_DISABLED") == 1, reason="PyList_New frees a list that it has not set up (cpython gh-152125)"
)
@pytest.mark.xfail(
    sys.version_info[:2] in ((3, 12), (3, 13)), strict=False,
    reason="Python 3.12.1 and 3.13.0 themselves end by SIGSEGV where an allocation fails in a comprehension: without rau or NumPy, too",
)  # fmt: skip
def test_each_allocation_of_pythons():
    """Of a call that is known, of one that is new, and of an update of a running state."""
    pytest.importorskip("_testcapi")
    code = """
        def call():
            rau.ring_attention_update(*prev, *cur, out=out, backend="cython")
        call()
        assert written(None)
        print(each(call, written) > 10, each(call, written, cache._problems.clear) > 100)

        def before():
            global ring
            ring = rau.StreamingMerge(backend="cython")
            ring.update(*prev)
        def became(error):
            try:
                return same(ring.result(), (state if error else merged))
            except rau.UnsupportedError:
                return error
        before()
        state = ring.result()
        ring.update(*cur)
        merged = ring.result()
        print(each(lambda: ring.update(*cur), became, before) > 20)
    """
    assert alone(EACH, code).split() == ["True"] * 3


def test_each_allocation_of_the_core():
    pytest.importorskip("_testcapi")
    code = """
        arrays = (*prev, *cur, *out)
        seen = []
        class Core:
            name, capabilities = "core", rau.registry.get("cython").capabilities
            def update(self, problem, prev, cur, out):
                sizes = problem.T, problem.N, problem.D, problem.lanes
                seen[:] = *problem.block_terms, arrays, "float32", "float32", *sizes, True, False, 2
                return out
        rau.ring_attention_update(*prev, *cur, out=out, backend=Core())
        before = [sys.getrefcount(one) for one in (*arrays, *seen[:4])]
        each(lambda: _core.merge(*seen), written)  # which allocates nothing of Python's where no argument is boxed
        print(each(lambda: _core.signature(arrays, 6), lambda error: True) >= 0)
        print([sys.getrefcount(one) for one in (*arrays, *seen[:4])] == before)
    """
    assert alone(EACH, code).split() == ["True"] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on addresses, and glibc's malloc")
def test_no_memory_for_the_core():
    """Neither for a result nor for the core's own; what was had is given back, and with memory the call is right again."""
    code = """
        import ctypes, resource
        import numpy as np, rau
        from memory import _malloced
        from rau.testing import same_bits
        from states import sbh
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: larger pieces are the system's
        prev, cur, out = (sbh(2000, 1, 8, 64, seed=seed) for seed in range(3))
        right = rau.ring_attention_update(*prev, *cur, backend="cython")
        def call(**options):
            return rau.ring_attention_update(*prev, *cur, backend="cython", **options)
        def fails(call):
            try:
                call()
            except MemoryError as error:
                return str(error).startswith("rau: no memory for the scratch")
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        for threads in (1, 4):
            rau.set_num_threads(threads)
            call()
            for part in out:
                part[...] = 7
            size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size, hard))
            while libc.malloc(1 << 16):  # what is left of the heap
                pass
            before = _malloced()
            found = {fails(lambda: call(out=out)) for _ in range(200)}
            print(found, _malloced() - before < 1 << 12, fails(call))  # a result is NumPy's to have memory for
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
            print(all((part == 7).all() for part in out), same_bits(right, call(out=out)))
    """
    assert alone(code) == 2 * "{True} True False\nTrue []\n"


def caused_by(error):
    failure = rau.BackendUnavailableError("it does not load")
    failure.__cause__ = error
    return failure


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(), RecursionError(), *(OSError(number, "none left") for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)),
        caused_by(RecursionError()),
    ],
    ids=repr,
)  # fmt: skip
def test_a_backend_for_which_something_had_run_out(monkeypatch, error):
    """It is tried again: there may be some by then."""
    had = iter([False, False, True, True])

    def load():
        if not next(had):
            raise error
        return type(registry.get("cython"))

    registry.names()
    monkeypatch.setitem(plugins._entries, "late", plugins.Entry("a plugin", load))
    for _ in range(2):
        with pytest.raises(rau.BackendUnavailableError) as caught:
            rau.merge_states([sbh()], backend="late")
        assert caught.value.__cause__ is error
    rau.merge_states([sbh()], backend="late")


@pytest.mark.parametrize("error", [MemoryError(), RecursionError(), OSError(errno.EMFILE, "none left")], ids=repr)
def test_metadata_that_could_not_be_read_are_read_again(monkeypatch, error):
    def unreadable(distribution, name):
        raise error

    registry.refresh()
    with monkeypatch.context() as patched:
        patched.setattr(importlib.metadata.PathDistribution, "read_text", unreadable)
        with pytest.raises(type(error)):
            registry.names()
    assert "torch" in registry.names()


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on descriptors")
@pytest.mark.parametrize("first", ["cython", "numpy", "torch"])
@pytest.mark.parametrize("before", ["", "import importlib.metadata, rau.backends, rau.install"])
def test_a_first_call_without_a_file_descriptor(first, before):
    """Nothing of it is kept, neither here nor in what Python remembers of its folders."""
    code = f"""
        import os, resource
        import rau
        from states import sbh
        state = sbh()
        {before}
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        held = []
        try:
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
        try:
            rau.merge_states([state, state], backend={first!r})
        except (OSError, rau.BackendUnavailableError) as error:
            print("Errno 24" in str(error))
        for one in held:
            os.close(one)
        print({first!r} in rau.registry.names(), rau.explain(*state, *state).selected)
    """
    assert alone(code) in ("True\nTrue cython\n", "True cython\n")


@pytest.mark.parametrize("backend", ["cython", "numpy"])
def test_a_first_call_near_the_limit_of_recursion(backend):
    code = f"""
        import sys, rau
        from states import sbh
        state = sbh()
        def call(depth):
            if depth:
                return call(depth - 1)
            rau.merge_states([state, state], backend={backend!r})
        failures = 0
        for depth in range(sys.getrecursionlimit(), 0, -1):
            try:
                call(depth)
                break
            except (RecursionError, rau.BackendUnavailableError):
                failures += 1
        print(failures > 20, "tried again, and right" if depth > 1 else "never again")
    """
    assert alone(code) == "True tried again, and right\n"
