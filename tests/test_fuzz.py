"""The fuzzer itself: it finds nothing where nothing is wrong, and each kind of fault where there is one."""

import fuzz
import numpy as np
import pytest

import rau
from rau import registry
from rau.backends.numpy_ import NumPyBackend
from rau.state import AttentionState

CALLS = range(1500)
MERGE = NumPyBackend.merge


@pytest.fixture(autouse=True)
def one_backend(monkeypatch):
    """Whatever a call asks for, NumPy's runs it: the one that is made wrong."""
    registry.refresh()
    monkeypatch.setattr(fuzz.rau.registry, "requested", lambda backend=None: ("numpy", "backend="))
    yield
    registry.refresh()


def findings():
    return filter(None, (fuzz.fuzz(number)[1] for number in CALLS))  # one at a time: the first may be enough


def test_nothing_is_found():
    outcomes = [fuzz.fuzz(number) for number in CALLS]
    assert [wrong for _, wrong in outcomes if wrong] == []
    counts = {kind: sum(outcome == kind for outcome, _ in outcomes) for kind in ("result", "judged", "error")}
    assert counts["result"] > 200 and counts["judged"] > 5 and counts["error"] > 200, counts


def wrong_sign(self, problem, states, out):
    result = MERGE(self, problem, states, out)
    result.softmax_sum[...] = -result.softmax_sum
    return result


def beside_the_output(self, problem, states, out):
    result = MERGE(self, problem, states, out)
    if out is not None and out[1].size:
        base = out[1]
        while base.base is not None:
            base = base.base
        base.view(np.uint8).reshape(-1)[0] += 1
    return result


def into_an_input(self, problem, states, out):
    result = MERGE(self, problem, states, out)
    if out is None and states[-1][0].size and states[-1][0].flags.writeable:
        states[-1][0][...] = 7
    return result


def written_and_refused(self, problem, states, out):
    if out is not None:
        out[2][...] = 7
    raise rau.ConstraintError("refused")


def another_error(self, problem, states, out):
    raise LookupError


def a_warning(self, problem, states, out):
    return AttentionState(*(part / np.zeros(1, part.dtype) for part in MERGE(self, problem, states, out)))


@pytest.mark.parametrize(
    ("mutant", "says"),
    [
        (wrong_sign, "softmax_sum"), (beside_the_output, "wrote beside"), (into_an_input, "wrote beside"),
        (written_and_refused, "changed memory"), (another_error, "LookupError"), (a_warning, "RuntimeWarning"),
    ],
)  # fmt: skip
def test_each_kind_of_fault_is_found(mutant, says, monkeypatch):
    monkeypatch.setattr(NumPyBackend, "merge", mutant)
    assert any(says in wrong for wrong in findings())
