"""A device "npu" without a chip, for torch's real dispatcher, and the vendors' operator on it.

Importing this renames torch's PrivateUse1 device, once for the whole process: do it in a process of its own.
"""

from __future__ import annotations

import sys
import types

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

SCHEMA = (
    "npu_ring_attention_update(Tensor prev_attn_out, Tensor prev_softmax_max, Tensor prev_softmax_sum, "
    "Tensor cur_attn_out, Tensor cur_softmax_max, Tensor cur_softmax_sum, *, Tensor? actual_seq_qlen=None, "
    'str input_layout="SBH", str input_softmax_layout="") -> (Tensor, Tensor, Tensor)'
)


class DeviceModule:
    """What torch.npu has to have."""

    def is_available(self):
        return True

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        pass

    def synchronize(self):
        pass


class NPUTensor(torch.Tensor):
    """A tensor that is on "npu:0" for all that torch knows; what it holds is a CPU tensor."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device="npu:0",
        )  # fmt: skip

    def __init__(self, held):
        self.held = held

    def data_ptr(self):
        return self.held.data_ptr()

    def __repr__(self):
        return f"NPUTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return on_npu(func, *args, **(kwargs or {}))


CALLS = []  # (operation, elements of its largest new result); "to the host" for what waits for the device


def tensors(values):
    """The CPU tensors in a structure, those that stand-ins hold included."""
    leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return [leaf.held if isinstance(leaf, NPUTensor) else leaf for leaf in leaves]


def on_npu(func, *args, **kwargs):
    """Run one operation on what the tensors hold; results are on the device again, unless asked for elsewhere."""
    if func.namespace == "rau":  # on a real device its kernel sees the device's tensors
        from rau import torch_op

        return {"ring_attention_update": torch_op._update, "merge_states": torch_op._merge}[
            func._opname
        ]._init_fn(*args, **kwargs)
    wrappers = {}

    def unwrap(value):
        if isinstance(value, NPUTensor):
            wrappers[id(value.held)] = value
            return value.held
        return torch.device("cpu") if isinstance(value, torch.device) else value

    device = kwargs.get("device")
    to_host = device is not None and device.type == "cpu"
    to_host |= func._opname == "copy_" and not isinstance(args[0], NPUTensor)
    memory = {part.untyped_storage().data_ptr() for part in tensors((args, kwargs))}
    result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    to_host |= any(not isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result))  # .item()
    fresh = [part.numel() for part in tensors(result) if part.untyped_storage().data_ptr() not in memory]
    CALLS.append(("to the host" if to_host else str(func), max(fresh, default=0)))

    def wrap(value):
        if not isinstance(value, torch.Tensor) or to_host:
            return value
        known = wrappers.get(id(value))
        return NPUTensor(value) if known is None else known

    return tree_map(wrap, result)


def kernel(prev_out, prev_max, prev_sum, cur_out, cur_max, cur_sum, lengths, layout, order):
    """The vendor's kernel on CPU tensors: float32 rows, no guards, element d of a row times lane d mod 8.

    Returns
    -------
    triple of Tensor
    """
    maximum = torch.maximum(prev_max, cur_max)
    a, b = prev_sum * torch.exp(prev_max - maximum), cur_sum * torch.exp(cur_max - maximum)
    total = a + b
    shape = prev_out.shape
    heads = prev_max.shape[1]
    if layout == "SBH":
        prev_out, cur_out = (part.reshape(*shape[:2], heads, shape[2] // heads) for part in (prev_out, cur_out))
    lanes = torch.arange(prev_out.shape[-1]) % 8
    terms = [
        part.float() * in_rows(weight, lengths, layout, order)[..., lanes]
        for weight, part in ((a / total, prev_out), (b / total, cur_out))
    ]
    return (terms[0] + terms[1]).to(prev_out.dtype).reshape(shape), maximum, total


def in_rows(stats, lengths, layout, order):
    """Bring statistics into the order of the output's rows."""
    if layout == "SBH":
        return stats.permute(2, 0, 1, 3)
    if order == "TND":
        return stats
    heads = stats.shape[1]
    flat, rows = stats.reshape(-1, 8), torch.full_like(stats, torch.nan)
    for start, end in zip(lengths[:-1].tolist(), lengths[1:].tolist(), strict=True):
        rows[start:end] = flat[start * heads : end * heads].view(heads, end - start, 8).transpose(0, 1)
    return rows


def check(six, lengths, layout):
    """Refuse what the vendor's host code refuses."""
    assert all(part.is_contiguous() for part in six)
    if layout == "TND":
        _, heads, head_dim = six[0].shape
        assert lengths.dtype == torch.int64 and lengths.dim() == 1
        if heads > 256 or head_dim > 768 or head_dim % 64:
            raise RuntimeError("Input conflicts with TND constraints! Please check your input.")
    if 0 in six[0].shape:
        raise RuntimeError("Division by zero is not supported")


def mindspeed_operator(
    prev_attn_out, prev_softmax_max, prev_softmax_sum, cur_attn_out, cur_softmax_max, cur_softmax_sum,
    actual_seq_qlen=None, layout="SBH",
):  # fmt: skip
    """MindSpeed's, a C++ extension outside the dispatcher: NPU tensors in, a list of NPU tensors out."""
    CALLS.append(("mindspeed", prev_attn_out.numel()))
    parts = (prev_attn_out, prev_softmax_max, prev_softmax_sum, cur_attn_out, cur_softmax_max, cur_softmax_sum)
    six = [part.held for part in parts]
    lengths = None if actual_seq_qlen is None else actual_seq_qlen.held
    check(six, lengths, layout)
    return [NPUTensor(part) for part in kernel(*six, lengths, layout, "SBH")]


ORDERS = []  # what torch_npu's operator was told of the statistics


def _torch_npu_operator(*six, actual_seq_qlen=None, input_layout="SBH", input_softmax_layout=""):
    check(six, actual_seq_qlen, input_layout)
    assert input_softmax_layout in ("", "SBH", "TND")
    ORDERS.append(input_softmax_layout)
    return kernel(*six, actual_seq_qlen, input_layout, input_softmax_layout)


def install():
    """Make the device, and torch_npu's operator.

    Returns
    -------
    dict of str to dict of str to module
        "torch_npu": the modules of a newer torch_npu; "mindspeed": those of an older one beside MindSpeed.
    """
    _setup_privateuseone_for_python_backend("npu", backend_module=DeviceModule())
    library = torch.library.Library("npu", "FRAGMENT")
    library.define(SCHEMA)
    library.impl("npu_ring_attention_update", _torch_npu_operator, "CPU")
    fallback = torch.library.Library("_", "IMPL")
    fallback.fallback(on_npu, "PrivateUse1")
    install.kept = library, fallback

    newer, older = types.ModuleType("torch_npu"), types.ModuleType("torch_npu")
    newer.npu = older.npu = torch.npu
    newer.npu_ring_attention_update = torch.ops.npu.npu_ring_attention_update
    names = ("mindspeed", "mindspeed.ops", "mindspeed.ops.npu_ring_attention_update")
    packages = {name: types.ModuleType(name) for name in names}
    packages[names[-1]].npu_ring_attention_update = mindspeed_operator
    return {"torch_npu": {"torch_npu": newer}, "mindspeed": {"torch_npu": older, **packages}}


MODULES = install()


def use(which):
    """Make one of the two the one that is imported from now on."""
    for modules in MODULES.values():
        for name in modules:
            sys.modules.pop(name, None)
    sys.modules.update(MODULES[which])
