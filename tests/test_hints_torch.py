"""Refusals of tensors, and devices, that would fail from inside: by every public call, and their advice followed."""

import os

import numpy as np
import pytest
from states import tnd
from test_hints import lengths_are_converted_as_said, refusal

import rau
from rau import AttentionState
from rau.arrays import torch_ as frameworks

if "torch" in os.environ.get("RAU_TEST_BACKENDS", ""):
    import torch  # asked for: its absence is a failure
else:
    torch = pytest.importorskip("torch", reason="torch is not installed and was not asked for")

from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TND = {"layout": "TND", "lse_layout": "TN"}
PORTABLE = {"layout": "TND", "profile": "portable"}


def tensors(seed=0, **options):
    return AttentionState(*map(torch.from_numpy, tnd(seed=seed, **options)))


def streamed(*states, **options):
    ring = rau.StreamingMerge("TND")
    for state in states:
        ring.update(*state, **options)
    return ring.result()


def calls(state):
    """Every public call, with one state."""
    return {
        "merge_states": lambda: rau.merge_states([state, state], layout="TND"),
        "ring_attention_update": lambda: rau.ring_attention_update(*state, *state, **PORTABLE),
        "explain": lambda: rau.explain(*state, *state, **PORTABLE),
        "StreamingMerge": lambda: rau.StreamingMerge("TND", like=state),
        "StreamingMerge.update": lambda: streamed(state),
        "AttentionState.from_lse": lambda: AttentionState.from_lse(state[0], state[1][..., 0], base="e", **TND),
        "AttentionState.lse": lambda: AttentionState(*state).lse(base="e", **TND),
        "reorder_softmax": lambda: rau.reorder_softmax(state[1], [0, len(state[1])], to="TND"),
    }


# ---------------------------------------------------------------------------------------------------- without float64


WIDE = torch.ones(8, 2, dtype=torch.float64)


class NoDouble(TorchDispatchMode):
    """Imitate a device without float64: every attempt to make something of that dtype fails, as Apple's mps does."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (kwargs or {}).get("dtype") == torch.float64:
            raise TypeError("this device has no float64")
        self.ran.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda state: rau.merge_states([state] * 2, layout="TND", backend="torch"), "each tensor"),
        (lambda state: rau.ring_attention_update(*state, *state, **PORTABLE, backend="torch"), "each tensor"),
        (lambda state: rau.StreamingMerge("TND", like=state, backend="torch"), "each tensor"),
        (lambda state: state.lse(base="e", **TND), "softmax_max"),
        (lambda state: AttentionState.from_lse(state[0], state[1][..., 0], base="2", **TND), "lse"),
        (lambda state: AttentionState.from_lse(state[0], WIDE, base="e", **TND), "lse"),
    ],
)
def test_a_device_without_float64_is_refused_before_anything_runs(call, name):
    state = tensors()
    call(state)
    with NoDouble() as mode:
        text = refusal(lambda: call(state))
    assert "has no float64, in which" in text
    assert "cpu()" in text and name in text
    # What asks the device, makes the call's arguments and StreamingMerge's empty state.
    asked = {"aten.ones", "aten.add_", "aten.select", "aten.slice", "aten.lift_fresh"}
    assert {str(func.overloadpacket) for func in mode.ran} <= asked


def test_where_no_backend_computes_unasked(monkeypatch):
    """The message names every backend with its reason, this one among them."""
    monkeypatch.setattr("rau.backends.has_float64", lambda device: False)
    state = AttentionState(*(part.to("meta") for part in tensors()))
    text = refusal(lambda: rau.merge_states([state] * 2, layout="TND"))
    assert "torch: device meta has no float64, in which it computes rows: pass .cpu() of each tensor" in text


def test_a_device_is_asked_once_and_one_that_is_not_here_is_not_judged(monkeypatch):
    asked = []
    monkeypatch.setattr(frameworks, "_FLOAT64", {})
    monkeypatch.setattr(frameworks, "_computes", lambda torch, dtype, device: asked.append(dtype) or dtype != torch.float64)
    assert not frameworks.has_float64("mps:0")
    assert not frameworks.has_float64(torch.device("mps:0"))
    assert asked == [torch.float64, torch.float32]
    monkeypatch.undo()
    monkeypatch.setattr(frameworks, "_FLOAT64", {})
    absent = "xpu:7"  # fails in either dtype
    assert frameworks.has_float64(absent)
    assert frameworks.has_float64("cpu")


# -------------------------------------------------------------------------------------------- tensors that hold others


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('gloo') / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("call", calls(tensors()))
def test_a_distributed_tensor(mesh, call, grad):
    from torch.distributed.tensor import DTensor, Shard

    local = tensors()
    state = AttentionState(*(DTensor.from_local(part, mesh, [Shard(1)]) for part in local))
    # Among plain tensors too, some of which want a gradient.
    among = AttentionState(local[0].clone().requires_grad_(grad), state[1], local[2])
    for given in (state, among):
        text = refusal(calls(given)[call])
        assert text.startswith(f"{call}: ")
        assert "torch.distributed.tensor.DTensor; expected an array" in text
        assert "Pass this rank's part of it, its .to_local()." in text
    followed = AttentionState(*(part.to_local() for part in state))
    if not call.startswith("Streaming"):
        calls(followed)[call]()
    assert torch.equal(streamed(followed, followed)[0], streamed(tensors(), tensors())[0])


def test_a_nested_tensor():
    """Sequences of their own lengths, as torch's jagged layout holds them."""
    state, lengths = tensors(), [3, 5]
    nested = [torch.nested.nested_tensor(list(part.split(lengths)), layout=torch.jagged) for part in state]
    text = refusal(lambda: rau.merge_states([nested, nested], layout="TND"))
    assert 'states[0..1].attn_out is of type torch.nested._internal.nested_tensor.NestedTensor; expected' in text
    assert 'Pass its .values(), in layout "TND".' in text
    values = [part.values() for part in nested]
    assert torch.equal(rau.merge_states([values] * 2, layout="TND")[0], rau.merge_states([state] * 2, layout="TND")[0])


# ------------------------------------------------------------------------------------------------------- without values


def test_on_the_meta_device_there_are_shapes():
    state = AttentionState(*(part.to("meta") for part in tensors()))
    half = AttentionState(*(part[:4] for part in state))
    ring = rau.StreamingMerge("TND", actual_seq_qlen=[0, 2, 8])
    for tokens in (None, "front", "back"):
        ring.update(*(half if tokens else state), tokens=tokens)
    out = AttentionState(*map(torch.empty_like, state))
    for result in (
        rau.merge_states([state, state], layout="TND"),
        rau.merge_states([state, state], layout="TND", out=out),
        rau.merge_states([state, state], [0, 8], "TND", softmax_layout="SBH"),
        rau.ring_attention_update(*state, *state, **PORTABLE, out=state),
        ring.result(),
    ):
        assert [(part.device.type, part.shape, part.dtype) for part in result] == [
            ("meta", part.shape, part.dtype) for part in state
        ]
    assert ring.result(torch.bfloat16).attn_out.dtype == torch.bfloat16


@pytest.mark.parametrize("check", ["values", "document"])
def test_on_the_meta_device_there_are_no_values_to_check(check):
    state = AttentionState(*(part.to("meta") for part in tensors()))
    for call, options in (
        (lambda: rau.merge_states([state, state], layout="TND", check=check), "merge_states: [array-device] states[0].attn_out"),
        (lambda: rau.StreamingMerge("TND", check=check).update(*state), "StreamingMerge.update: [array-device] attn_out"),
    ):
        assert refusal(call) == (
            f'{options} is on meta, where tensors have no values; check = "{check}" expects a device that has them. Leave check '
            'at "metadata".'
        )


# ------------------------------------------------------------------------------------------------------------- lengths


def test_a_list_of_tensors_is_no_list_of_ints():
    cumulative = torch.tensor([0, 3, 8])
    state = tensors()
    text = refusal(lambda: rau.merge_states([state] * 2, list(cumulative), "TND", softmax_layout="SBH"))
    assert text == (
        "merge_states: [qlen-dtype] actual_seq_qlen holds tensor(0), of type torch.Tensor; expected ints. Pass the whole "
        "tensor's .tolist(), not a list of its elements."
    )
    followed = rau.merge_states([state] * 2, cumulative.tolist(), "TND", softmax_layout="SBH")
    assert torch.equal(followed[0], rau.merge_states([state] * 2, np.array([0, 3, 8]), "TND", softmax_layout="SBH")[0])


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8])
def test_lengths_of_another_integer_type(dtype):
    state = tensors()
    lengths_are_converted_as_said(state, (state[0], state[1][..., 0]), lambda n: torch.tensor(n, dtype=dtype), {"torch": torch})


def test_lengths_of_int32_where_the_vendor_has_int64():
    state, lengths = tensors(), torch.tensor([0, 3, 8], dtype=torch.int32)
    text = refusal(lambda: rau.ring_attention_update(*state, *state, lengths, "TND"))
    assert text.endswith('expected int64. Pass actual_seq_qlen.to(torch.int64). profile="portable" takes int32 too.')


def test_lengths_whose_memory_is_gone_are_not_read():
    state, lengths = tensors(), torch.tensor([0, 3, 8])
    lengths.untyped_storage().resize_(0)
    for given in (lengths, torch._efficientzerotensor((3,), dtype=torch.int64)):
        text = refusal(lambda given=given: rau.reorder_softmax(state[1], given, to="TND"))
        assert "[array] actual_seq_qlen has no memory" in text


def test_lazily_negated_numbers_are_read():
    state = tensors()
    lengths = torch._neg_view(torch.tensor([0, -3, -8]))
    expected = rau.merge_states([state] * 2, [0, 3, 8], "TND", softmax_layout="SBH")
    assert torch.equal(rau.merge_states([state] * 2, lengths, "TND", softmax_layout="SBH")[0], expected[0])
    negated = AttentionState(state[0], torch._neg_view(-state[1]), torch._neg_view(-state[2]))
    same = rau.merge_states([negated, tensors()], layout="TND", check="values")
    assert torch.equal(same[0], rau.merge_states([state] * 2, layout="TND")[0])
