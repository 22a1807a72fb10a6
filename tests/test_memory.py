"""Calls of every kind leave nothing behind; that what is left behind would be noticed."""

import memory
import numpy as np
import pytest

from rau import call

pytest.importorskip("rau._core", reason="test_packaging.py fails where it should be there")
CALLS = 80  # of a round: a leak of one block in each is more than the bound
FEW = 20  # where each takes long: of a state


@pytest.mark.parametrize("name", memory.KINDS)
def test_constant_memory(name):
    slow = name.startswith(("numpy", "tensors", "fresh"))
    grown = memory.measure(*memory.KINDS[name](), FEW if slow else CALLS)
    assert not memory.grew(grown), grown


@pytest.mark.parametrize(
    ("where", "leaked"),
    [
        (0, lambda states: states[0][0]),
        (1, lambda states: [states]),
        (2, lambda states: float(states[0][1][0, 0, 0, 0])),
        (3, lambda states: np.empty(64)),
    ],
    ids=memory.Grown._fields,
)
def test_a_leak_is_noticed(where, leaked, monkeypatch):
    """Of a reference, an object, a block, an array's memory, one in each call."""
    kept, checked = [], call.checked

    def leaking(name, states, *rest):
        kept.append(leaked(states))
        return checked(name, states, *rest)

    monkeypatch.setattr(call, "checked", leaking)
    grown = memory.measure(*memory.KINDS["cython, fresh"](), CALLS)
    assert grown[where] > memory.BOUNDS[where]
