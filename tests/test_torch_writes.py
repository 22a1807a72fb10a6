"""What is written into torch tensors, autograd learns of: a graph that kept one of them raises, whoever wrote."""

import os
from dataclasses import replace

import numpy as np
import pytest

import rau
from rau.backends import Backend
from rau.backends.numpy_ import NumPyBackend
from rau.testing.conformance import check_backend

if "torch" in os.environ.get("RAU_TEST_BACKENDS", ""):
    import torch  # asked for: its absence is a failure
else:
    torch = pytest.importorskip("torch", reason="torch is not installed and was not asked for")

from rau.arrays import torch_ as frameworks

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Silent(NumPyBackend):
    """A third party's: it writes by NumPy, which torch does not see. It takes no halves: calls are adapted to it."""

    name = "silent"
    capabilities = replace(NumPyBackend.capabilities, halves=False)


class OneByOne(Silent):
    """It has no merge of its own."""

    name = "one-by-one"
    merge = Backend.merge

    def update(self, problem, prev, cur, out):
        return NumPyBackend.merge(self, problem, (prev, cur), out)

    def asarray(self, array):
        return torch.from_numpy(array)


class NotInPlace(Silent):
    name = "not-in-place"
    capabilities = replace(NumPyBackend.capabilities, halves=False, in_place=False, mixed=False)


class Fails(NumPyBackend):
    """It writes the output, and fails before the statistics."""

    name = "fails"

    def merge(self, problem, states, out):
        out.attn_out.numpy()[:] = 3
        raise ZeroDivisionError("half way")


WRITERS = {"cython": "cython", "numpy": "numpy", "torch": "torch"}
WRITERS |= {backend.name: backend for backend in (Silent(), OneByOne(), NotInPlace())}


def state(tokens=4, seed=0, dtype=torch.float32):
    """In layout TND: 2 heads of 8."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(tokens, 2, 8, generator=generator).to(dtype)
    maximum = torch.randn(tokens, 2, 1, generator=generator)
    return rau.AttentionState(out, maximum, torch.rand(tokens, 2, 1, generator=generator) + 1)


def keeps(*tensors):
    """Graphs that have kept these, and a call that tells which of them notice a write."""
    weights = [torch.ones_like(part, requires_grad=True) for part in tensors]
    losses = [(part.detach() * weight).sum() for part, weight in zip(tensors, weights, strict=True)]

    def noticed():
        found = []
        for loss, weight in zip(losses, weights, strict=True):
            try:
                torch.autograd.grad(loss, weight)
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
                found.append(True)
            else:
                found.append(False)
        return found

    return noticed


def options(**others):
    return {"layout": "TND", "profile": "portable", **others}


@pytest.mark.parametrize("backend", WRITERS)
@pytest.mark.parametrize("states", [2, 3])
def test_out(backend, states):
    parts, out = [state(seed=seed) for seed in range(states)], state(seed=9)
    of_out, of_inputs = keeps(*out), keeps(*(part for each in parts for part in each))
    if states == 2:
        rau.ring_attention_update(*parts[0], *parts[1], **options(out=out, backend=WRITERS[backend]))
    else:
        rau.merge_states(parts, **options(out=tuple(out), backend=WRITERS[backend]))
    assert of_out() == [True] * 3
    assert not any(of_inputs())


@pytest.mark.parametrize("backend", ["cython", "numpy", "torch", "silent", "one-by-one"])
def test_in_place_under_no_grad(backend):
    """Where the running tensors require grad themselves, too: to write under no_grad is torch's way to update a leaf."""
    running, cur = state(), state(seed=1)
    for part in running:
        part.requires_grad_()
    noticed = keeps(*running)
    merged = rau.ring_attention_update(*running, *cur, **options())  # which keeps its inputs
    with torch.no_grad():
        rau.ring_attention_update(*running, *cur, **options(out=running, backend=WRITERS[backend]))
    assert noticed() == [True] * 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        merged.attn_out.sum().backward()


def test_views_and_what_they_are_views_of():
    whole = [torch.zeros(3, *part.shape) for part in state()]
    out, others = ([part[k] for part in whole] for k in (1, 2))
    again = [part.view(-1)[3:] for part in out]
    noticed = keeps(*whole, *again, *others)
    rau.ring_attention_update(*state(), *state(seed=1), **options(out=out))
    assert noticed() == [True] * 9  # a view has the counter of its base: torch does not tell parts of a tensor apart


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [None, "front", "back"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", WRITERS)
def test_a_running_state_that_was_handed_out(backend, dtype, tokens, packed):
    lengths = {"actual_seq_qlen": [0, 4, 4, 10], "softmax_layout": "SBH" if packed else "TND"}
    ring = rau.StreamingMerge("TND", backend=WRITERS[backend], **lengths)
    ring.update(*state(10, dtype=dtype))
    copy, views = ring.result(), [part[1:] for part in ring.running]
    of_running, of_copy = keeps(*ring.running, *views), keeps(*copy)
    ring.update(*state(10 if tokens is None else 5, seed=1, dtype=dtype), tokens=tokens)
    assert of_running() == [True] * 6
    assert not any(of_copy())


@pytest.mark.parametrize("tokens", [slice(1, 3), slice(0, None, 2), "back"])
def test_a_running_state_written_at_some_tokens(tokens):
    generator = torch.Generator().manual_seed(0)

    def sbh(S):
        shapes = (S, 1, 16), (1, 2, S, 1), (1, 2, S, 1)
        return [torch.rand(shape, generator=generator) for shape in shapes]

    ring = rau.StreamingMerge()
    ring.update(*sbh(4))
    noticed = keeps(*ring.running)
    ring.update(*sbh(2), tokens=tokens)
    assert noticed() == [True] * 3


def test_the_write_counts_before_a_backend_fails():
    out = state()
    noticed = keeps(*out)
    with pytest.raises(ZeroDivisionError):
        rau.ring_attention_update(*state(), *state(seed=1), **options(out=out, backend=Fails()))
    assert (out.attn_out == 3).all() and noticed() == [True] * 3


def test_a_call_that_is_refused_is_no_write():
    out = state()
    noticed = keeps(*out)
    with pytest.raises(rau.ShapeError):
        rau.ring_attention_update(*state(), *state(3), **options(out=out))
    with pytest.raises(rau.UnsupportedError, match="it does not write over its inputs"):
        rau.ring_attention_update(*out, *state(seed=1), **options(out=out, backend=NotInPlace()))
    assert not any(noticed())


@pytest.mark.parametrize("backend", ["cython", "numpy"])
def test_inference_tensors_are_written_inside_and_outside_of_inference_mode(backend):
    """They have no counter, and no graph may keep them."""
    expected = rau.ring_attention_update(*state(), *state(seed=1), **options())
    with torch.inference_mode():
        out, normal = state(), state()
        assert all(part.is_inference() for part in out)
    mixed = [state().attn_out, *out[1:]]
    noticed = keeps(mixed[0])
    for target in (out, mixed):
        rau.ring_attention_update(*state(), *state(seed=1), **options(out=target, backend=backend))
        assert all(map(torch.equal, target, expected))
    assert noticed() == [True]
    normal = state()
    noticed = keeps(*normal)
    with torch.inference_mode():
        rau.ring_attention_update(*state(), *state(seed=1), **options(out=out, backend=backend))
        rau.ring_attention_update(*state(), *state(seed=1), **options(out=normal, backend=backend))
    assert noticed() == [True] * 3


@pytest.mark.parametrize("field", range(3))
@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("states", [2, 3])
def test_an_out_that_requires_grad_is_refused_while_grad_mode_is_on(states, leaf, field):
    parts, out = [state(seed=seed) for seed in range(states)], list(state(seed=9))
    kept = [part.clone() for part in out]
    out[field] = out[field].requires_grad_() if leaf else out[field].requires_grad_() * 1
    versions = [part._version for part in out]

    def call():
        if states == 2:
            return rau.ring_attention_update(*parts[0], *parts[1], **options(out=out))
        return rau.merge_states(parts, **options(out=out))

    with pytest.raises(rau.UnsupportedError) as caught:
        call()
    assert str(caught.value) == (
        f"{rau.AttentionState._fields[field]} of the arrays to write into requires grad, and grad mode is on; a graph that "
        "continues from it would have the gradient of what it held before. Leave out=None, or give tensors that do not "
        "require grad: a leaf's .detach() is the same memory."
    )
    assert all(map(torch.equal, out, kept)) and [part._version for part in out] == versions
    # As advised, and as torch's own functions do under no_grad.
    noticed = keeps(out[field])
    expected = rau.merge_states(parts, **options())
    out[field] = out[field].detach()
    call()
    assert all(map(torch.equal, out, expected)) and noticed() == [True]
    out[field].requires_grad_()
    with torch.no_grad():
        call()


def test_a_running_state_that_requires_grad_is_not_written_while_grad_mode_is_on():
    ring = rau.StreamingMerge("TND")
    ring.update(*state())
    ring.running.softmax_sum.requires_grad_()
    before = ring.result()
    with pytest.raises(rau.UnsupportedError, match="softmax_sum of the arrays to write into requires grad"):
        ring.update(*state(seed=1))
    assert all(map(torch.equal, ring.result(), before))
    with torch.no_grad():
        ring.update(*state(seed=1))


def test_numpy_arrays_that_share_memory_are_torchs_own_blind_spot():
    """As docs/interop.md says: here rau is given no tensor, and torch is told nothing, by anybody."""
    out = state()
    noticed = keeps(*out)
    numbers = [[part.numpy() for part in each] for each in (state(), state(seed=1), out)]
    rau.ring_attention_update(*numbers[0], *numbers[1], **options(out=numbers[2]))
    assert not any(noticed())
    assert np.array_equal(numbers[2][0], rau.ring_attention_update(*state(), *state(seed=1), **options()).attn_out.numpy())


@pytest.mark.parametrize("backend", ["cython", "torch", Silent], ids=str)
def test_the_kit_notices(backend, monkeypatch):
    select = "autograd/learns-of-writes"
    assert check_backend(backend, select=select).succeeded == [select]
    monkeypatch.setattr(frameworks.TorchKind, "will_write", lambda self, out: None)
    report = check_backend(backend, select=select)
    if backend == "torch":  # whose operations are torch's, and tell it themselves
        assert report.passed
    else:
        wrote = [f"{call} wrote into {field}" for call in ("ring_attention_update", "merge_states", "StreamingMerge.update")
                 for field in rau.AttentionState._fields]  # fmt: skip
        (failure,) = report.failures
        assert [message.partition(",")[0] for message in failure.message.split("; ")] == wrote
