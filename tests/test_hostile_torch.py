"""Tensors that are no memory, or answer for themselves: refused by name, or seen as what they are."""

import logging
import os

import numpy as np
import pytest
from states import sbh, tnd

import rau
from rau.testing import same_bits

if "torch" in os.environ.get("RAU_TEST_BACKENDS", ""):
    import torch  # asked for: its absence is a failure
else:
    torch = pytest.importorskip("torch", reason="torch is not installed and was not asked for")

from torch.fx.experimental.proxy_tensor import make_fx

HERE = [name for name in ("cython", "numpy", "torch") if name in [s.name for s in rau.registry.status() if s.available]]
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR tensor support")


def tensors(make=sbh, seed=0):
    return [torch.from_numpy(part) for part in make(seed=seed)]


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("left", [0, 4])
@pytest.mark.parametrize("role", ["prev", "out"])
def test_freed_storage(backend, left, role):
    """As frameworks that shard parameters free it; its shape stays."""
    prev, cur, out = (tensors(seed=seed) for seed in range(3))
    calls = [(prev, out), (prev, out)]  # the second would be recognised
    rau.ring_attention_update(*prev, *cur, out=out, backend=backend)
    gone = {"prev": prev, "out": out}[role]
    gone[0] = gone[0].clone()
    gone[0].untyped_storage().resize_(left)
    name = {"prev": "prev_attn_out", "out": "out.attn_out"}[role]
    for _ in calls:
        with pytest.raises(rau.DTypeError, match=rf"\[array\] {name} has no memory, or less than its shape and strides take"):
            rau.ring_attention_update(*prev, *cur, out=out, backend=backend)


def test_zeros_that_are_not_stored():
    prev, cur = tensors(), tensors(seed=1)
    prev[0] = torch._efficientzerotensor(prev[0].shape)
    with pytest.raises(rau.DTypeError, match="prev_attn_out has no memory"):
        rau.ring_attention_update(*prev, *cur)


def test_methods_that_are_hidden():
    prev, cur = tensors(), tensors(seed=1)
    right = [part.numpy() for part in rau.ring_attention_update(*prev, *cur)]
    given = tensors()
    for name in ("data_ptr", "is_contiguous", "is_neg", "stride", "untyped_storage"):
        setattr(given[0], name, lambda *_: 0x1000)
    for backend in HERE:
        found = rau.ring_attention_update(*given, *cur, backend=backend)
        assert same_bits([part.numpy() for part in found], right) == []
    mine = type("Mine", (torch.Tensor,), {"data_ptr": lambda self: 0x1000, "is_contiguous": lambda self: True})
    found = rau.ring_attention_update(*(part.as_subclass(mine) for part in (*prev, *cur)))
    assert same_bits([part.as_subclass(torch.Tensor).numpy() for part in found], right) == []


def test_a_class_that_bears_the_name():
    cls = type("Tensor", (), {
        "__module__": "torch", "dtype": torch.float32, "device": torch.device("cpu"), "requires_grad": False,
        "is_contiguous": lambda self: True, "is_neg": lambda self: False, "data_ptr": lambda self: 0x1000,
    })  # fmt: skip

    def fake(shape):
        made = cls()
        made.shape = shape
        return made

    given = [fake(part.shape) for part in sbh()]
    with pytest.raises(rau.DTypeError, match=r"\[array\] prev_attn_out is of type torch.Tensor; expected an array"):
        rau.ring_attention_update(*given, *given)


BAD = {
    "coo": (lambda part: part.to_sparse(), "has layout torch.sparse_coo; expected a strided tensor. Pass .to_dense() of it."),
    "csr": (lambda part: part.reshape(part.shape[0], -1).to_sparse_csr(), "has layout torch.sparse_csr"),
    "mkldnn": (lambda part: part.to_mkldnn(), "has layout torch._mkldnn"),
    "nested": (lambda part: torch.nested.nested_tensor([part]), "is a nested tensor; expected a tensor of numbers"),
}


@pytest.mark.parametrize("kind", BAD)
def test_tensors_that_are_not_strided(kind):
    make, says = BAD[kind]
    ring = rau.StreamingMerge("TND")
    for place in range(3):
        given = tensors(tnd)
        given[place] = make(given[place])
        calls = [
            lambda given=given: rau.ring_attention_update(*given, *tensors(tnd, 1), layout="TND", profile="portable"),
            lambda given=given: rau.merge_states([tensors(tnd), given], layout="TND"),
            lambda given=given: ring.update(*given),
            lambda given=given: rau.ring_attention_update(
                *tensors(tnd), *tensors(tnd, 1), layout="TND", profile="portable", out=given
            ),
        ]
        how = {"base": "e", "layout": "TND", "lse_layout": "TN"}
        if place == 0:
            calls.append(lambda given=given: rau.AttentionState.from_lse(given[0], torch.zeros(8, 2), **how))
        if place == 1:
            calls.append(lambda given=given: rau.AttentionState(*given).lse(**how))
            calls.append(lambda given=given: rau.reorder_softmax(given[1], [0, 8], to="TND"))
        for call in calls:
            with pytest.raises(rau.DTypeError) as caught:
                call()
            assert "[array]" in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize("lengths", [[None, 8], object(), {0, 8}, [[0, 8], [1]]])
def test_lengths_that_torch_cannot_read(lengths):
    """Where a gradient is asked for, they would become a tensor before anybody has looked at them."""
    given = [part.requires_grad_() for part in (*tensors(tnd), *tensors(tnd, 1))]
    with pytest.raises(rau.DTypeError, match=r"\[qlen-dtype\]"):
        rau.ring_attention_update(*given, lengths, "TND", profile="portable")


def test_lengths_on_a_device_for_tensors_on_the_host():
    prev, cur = tensors(tnd), tensors(tnd, 1)
    lengths = torch.tensor([0, 3, 8], device="meta")
    for given in ((*prev, *cur), (*tnd(), *tnd(seed=1))):
        with pytest.raises(rau.ConstraintError) as caught:
            rau.ring_attention_update(*given, lengths, "TND", softmax_layout="SBH", profile="portable")
        assert str(caught.value) == (
            "ring_attention_update: [array-device] actual_seq_qlen is on meta and prev_attn_out on cpu, where nobody can read it; "
            "expected one device for all. Pass actual_seq_qlen.cpu()."
        )


def test_tensors_that_are_not_aligned_to_their_items():
    prev, cur = sbh(), sbh(seed=1)
    right = rau.ring_attention_update(*prev, *cur)

    def odd(part):
        return torch.frombuffer(bytearray(b"." + part.tobytes()), dtype=torch.float32, offset=1).reshape(part.shape)

    given = [odd(part) for part in (*prev, *cur)]
    assert all(part.data_ptr() % 4 for part in given)
    for backend in HERE:
        found = rau.ring_attention_update(*given, backend=backend)
        assert same_bits([part.numpy() for part in found], right) == []
        assert all(np.array_equal(part.numpy(), its) for part, its in zip(given, (*prev, *cur), strict=True))
    with pytest.raises(rau.ShapeError, match="out.attn_out is not aligned to its items"):
        rau.ring_attention_update(*given, out=given[:3])


@pytest.mark.skipif("cython" not in HERE, reason="no compiled core")
@pytest.mark.parametrize("shrink", [
    lambda part: part.set_(torch.zeros(1)), lambda part: part.resize_(1), lambda part: part.untyped_storage().resize_(0),
])  # fmt: skip
def test_a_tensor_that_shrinks_after_it_was_checked(shrink):
    """By a log handler, as in test_hostile; nothing is read then, so that no process of its own is needed."""
    prev, cur = ([part.clone() for part in tensors(seed=seed)] for seed in range(2))  # of torch's memory, which it resizes

    class Shrinks(logging.Handler):
        def emit(self, record):
            shrink(prev[0])

    logger, handler = logging.getLogger("rau"), Shrinks()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        with pytest.raises(ValueError, match="lost its memory after it was checked"):
            rau.ring_attention_update(*prev, *cur, backend="cython")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


CALLS = {
    "update": lambda *parts: rau.ring_attention_update(*parts),
    "states": lambda *parts: rau.merge_states([parts[:3], parts[3:]]),
    "pairs": lambda *parts: rau.merge_lse([(parts[0], parts[1][..., 0]), (parts[3], parts[4][..., 0])], base="e"),
    "sink": lambda *parts: rau.add_sink(parts[:3], parts[4][0, :, 0, 0]),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("how", ["torch.jit.trace", "make_fx real", "make_fx symbolic"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracers(name, how):
    """A graph of the calls, by tracers whose shapes are tensors or symbols, and one whose tensors are as real as any."""
    call, parts, others = CALLS[name], (*tensors(), *tensors(seed=1)), (*tensors(seed=2), *tensors(seed=3))
    if how == "torch.jit.trace":
        graph = torch.jit.trace(lambda *parts: tuple(call(*parts)), parts, check_trace=False)
    else:
        graph = make_fx(lambda *parts: tuple(call(*parts)), tracing_mode=how.split()[1])(*parts)
    for found, expected in zip(graph(*others), call(*others), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", [{"tokens": [0, 1]}, {"dtype": "float16"}, {"out": tensors(tnd)}])
def test_what_has_no_place_in_a_traced_graph(how):
    states = [tensors(tnd), tensors(tnd, seed=1)]
    with pytest.raises(rau.UnsupportedError, match="outside of the graph"):
        torch.jit.trace(
            lambda one: tuple(rau.merge_states([(one, *states[0][1:]), states[1]], layout="TND", **how)), states[0][0],
            check_trace=False,
        )  # fmt: skip


@pytest.mark.parametrize("backend", HERE)
def test_inference_tensors_outside_of_inference_mode(backend):
    """They are written into all the same, and a ring that began in inference mode goes on."""
    with torch.inference_mode():
        prev, cur = ([part.clone() for part in tensors(seed=seed)] for seed in range(2))
        ring = rau.StreamingMerge(backend=backend)
        ring.update(*prev)
    right = [part.numpy() for part in rau.ring_attention_update(*tensors(), *tensors(seed=1))]
    ring.update(*cur)
    assert same_bits([part.numpy() for part in ring.result()], right) == []
    alone = prev[0].clone()
    rau.merge_states([prev, cur], out=alone, statistics=False, backend=backend)
    assert np.array_equal(alone.numpy(), right[0])
    rau.ring_attention_update(*prev, *cur, out=prev, backend=backend)
    assert same_bits([part.numpy() for part in prev], right) == []


def test_small_results_can_be_freed_and_regrown():
    result = rau.ring_attention_update(*tensors(), *tensors(seed=1), backend=HERE[0]).attn_out
    size = result.untyped_storage().nbytes()
    result.untyped_storage().resize_(0)
    result.untyped_storage().resize_(size)
    assert result.shape == sbh().attn_out.shape and np.prod(result.shape) * 4 == size
