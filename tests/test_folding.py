"""Merging many states by a backend that merges two: what its base class makes of it, and how the kit judges that."""

import numpy as np
import pytest
from mutants import NUMPY, Pairs

import rau
from rau import registry
from rau.backends import Capabilities
from rau.testing.cases import Case, named
from rau.testing.comparison import compare
from rau.testing.conformance import check_backend
from rau.testing.differential import run_differential
from rau.testing.reference.oracle import oracle


class PairsOfOneDtype(Pairs):
    name = "pairs-of-one-dtype"
    capabilities = Capabilities(array_types=NUMPY, mixed=False)


class PairsOfFloat16(Pairs):
    name = "pairs-of-float16"
    capabilities = Capabilities(array_types=NUMPY, dtypes=("float16",), mixed=False)


class PairsDroppedLast(Pairs):
    """Its own loop forgets nothing, its update goes wrong: on the third of three states."""

    name = "pairs-that-forget"

    def update(self, problem, prev, cur, out):
        self.calls = getattr(self, "calls", 0) + 1
        return super().update(problem, prev, cur if self.calls % 5 else prev, out)


@pytest.mark.parametrize("backend", [Pairs, PairsOfOneDtype, PairsOfFloat16], ids=lambda backend: backend.name)
def test_a_backend_with_nothing_but_an_update_is_held_to_its_updates(backend):
    report = check_backend(backend, cases=named())
    assert report.passed, str(report)
    assert "states/8-float16" in report.succeeded


def test_updates_that_go_wrong_in_a_merge_are_found():
    report = check_backend(PairsDroppedLast, select="states/8-*")
    assert report.failures


class PairsOfNumPy(Pairs):
    name = "pairs-of-numpy"

    def update(self, problem, prev, cur, out):
        return registry.get("numpy").update(problem, prev, cur, out)


def test_a_merge_made_of_updates_need_not_have_the_same_bits():
    cases = [case for case in named() if case.id.startswith(("states/", "dtype/"))]
    report = run_differential(["numpy", PairsOfNumPy], cases)
    assert report.passed, str(report)
    assert "states/" in report.pairs["numpy", "pairs-of-numpy"].first  # of more than two


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("backend", [Pairs(), PairsOfOneDtype()], ids=lambda backend: backend.name)
@pytest.mark.parametrize("out", ["fresh", "given", "prev"])
def test_a_running_state_is_kept_in_float32_and_rounded_once(backend, dtype, out):
    """64 updates of 16-bit states lose nothing worth mention; rounded at each, they are far off."""
    case = Case(id="chain", tokens=20, heads=2, head_dim=32, dtype=dtype, states=64, out=out)
    numbers = case.fill()
    expected = oracle(numbers)
    result = case.make(numbers).run(backend)
    assert result.attn_out.dtype.name == dtype
    assert compare(result, expected).attn_share <= 1
    running = numbers[0]
    for cur in numbers[1:]:
        running = rau.ring_attention_update(*running, *cur, backend=backend, profile="portable")
    assert compare(running, expected).attn_share > 2


def test_inputs_of_a_merge_made_of_updates_stay_as_they_are():
    case = Case(id="chain", states=5, dtype="bfloat16", read_only=True)
    call = case.make()
    before = [[part.copy() for part in state] for state in call.states]
    case.call(call.states, None, Pairs())
    for state, kept in zip(call.states, before, strict=True):
        assert all(np.array_equal(*pair) for pair in zip(state, kept, strict=True))
