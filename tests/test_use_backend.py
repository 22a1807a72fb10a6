"""use_backend: nested, as a decorator, in threads and in asyncio tasks."""

import asyncio
import threading

import pytest
from patience import LIMIT

import rau
from rau import registry


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("RAU_BACKEND", raising=False)


def test_use_backend_nests_and_ends():
    with rau.use_backend("numpy"):
        with rau.use_backend("cython"):
            assert registry.requested() == ("cython", "use_backend")
        assert registry.requested() == ("numpy", "use_backend")
        with pytest.raises(ZeroDivisionError), rau.use_backend("cython"):
            _ = 1 / 0
        assert registry.requested() == ("numpy", "use_backend")
        with pytest.raises(rau.UnknownBackendError), rau.use_backend("nobody"):
            pass
        assert registry.requested() == ("numpy", "use_backend")
    assert registry.requested() == (None, "automatic")


def test_use_backend_decorates():
    @rau.use_backend("numpy")
    def depth(n):
        """Count."""
        found = [registry.requested()]
        return found + depth(n - 1) if n else found

    assert depth(2) == [("numpy", "use_backend")] * 3
    assert depth.__doc__ == "Count."
    assert registry.requested() == (None, "automatic")


def test_use_backend_decorates_coroutines():
    @rau.use_backend("numpy")
    async def ask():
        await asyncio.sleep(0)
        return registry.requested()

    async def both():
        inside, outside = await asyncio.gather(ask(), other())
        return inside, outside, registry.requested()

    async def other():
        await asyncio.sleep(0)
        return registry.requested()

    assert asyncio.run(both()) == (("numpy", "use_backend"), (None, "automatic"), (None, "automatic"))


def test_use_backend_refuses_generators():
    with pytest.raises(TypeError, match=r"use a with block inside .*items"):

        @rau.use_backend("numpy")
        def items():
            yield 1

    with pytest.raises(TypeError, match=r"use a with block inside .*later"):

        @rau.use_backend("numpy")
        async def later():
            yield 1


def test_threads_and_tasks_have_their_own():
    """One object, entered by several threads at once, in an order that no stack would survive."""
    shared = rau.use_backend("numpy")
    inside, leave = threading.Barrier(3), threading.Event()
    found = []

    def first():
        with shared:
            inside.wait(LIMIT)
            leave.wait(LIMIT)
            found.append(registry.requested())
        found.append(registry.requested())

    def second():
        with rau.use_backend("cython"):
            with shared:
                inside.wait(LIMIT)
            found.append(registry.requested())
            leave.set()

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    inside.wait(LIMIT)
    assert registry.requested() == (None, "automatic")
    for thread in threads:
        thread.join(LIMIT)
    assert found == [("cython", "use_backend"), ("numpy", "use_backend"), (None, "automatic")]
