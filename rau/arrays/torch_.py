"""Torch's tensors, on any device. Nothing here imports torch before there is one of its tensors."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np

from rau.arrays.memory import Memory
from rau.arrays.numpy_ import BITS, LARGE, NumPyKind, named_dtype
from rau.errors import UnsupportedError

try:
    from rau._core import tensor_signature
except ImportError:  # not compiled: every call takes the validator

    def tensor_signature(arrays: Sequence[Any], inputs: int, plain: type) -> list[Any] | None:
        """Describe no call."""
        return None


_HOST = NumPyKind()
_DTYPES: dict[Any, str] = {}
_DEVICES: dict[Any, str] = {}
_FLOAT64: dict[Any, bool] = {}


_HOLDERS = {
    "DTensor": "this rank's part of it, its .to_local()",
    "NestedTensor": 'its .values(), in layout "TND"',
}


def tensor_inside(cls: type) -> str:
    """Word what is to be passed of a torch tensor that holds others; empty for any other type."""
    return _HOLDERS.get(cls.__name__, "") if cls.__module__.startswith("torch.") else ""


def has_float64(device: Any) -> bool:
    """Tell whether torch computes in float64 on a device: Apple's mps does not, nor do some of Intel's GPUs.

    True as well where nobody can tell: while torch traces, and for a device that is not here.
    """
    torch = sys.modules["torch"]
    if torch.compiler.is_compiling():
        return True
    device = torch.device(device)
    answer = _FLOAT64.get(device)
    if answer is None:
        answer = _computes(torch, torch.float64, device) or not _computes(torch, torch.float32, device)
        if device.type != "cpu":  # where it takes no time, and a test may imitate another device
            _FLOAT64[device] = answer
    return answer


def _computes(torch: Any, dtype: Any, device: Any) -> bool:
    try:
        torch.ones((), dtype=dtype, device=device).add_(1)  # memory alone is had for a dtype that no kernel takes
    except Exception:
        return False
    return True


def _has_memory(array: Any) -> bool:
    """Whether all that a strided tensor on the CPU reaches lies within its storage."""
    if array._is_zerotensor():
        return False
    reach = sum((length - 1) * step for length, step in zip(array.shape, array.stride(), strict=True))
    storage = array.untyped_storage()
    end = array.data_ptr() + (reach + 1) * array.itemsize
    within = storage.data_ptr() <= array.data_ptr() and end <= storage.data_ptr() + storage.nbytes()
    return within or not array.numel()


def _aligned(array: Any) -> bool:
    """Whether a tensor in host memory stands at a multiple of its items' size."""
    return type(array) is not sys.modules["torch"].Tensor or not array.is_cpu or array.data_ptr() % array.itemsize == 0


class TorchKind:
    """Torch tensors, on any device."""

    name = "torch"

    def plain(self, array: Any) -> Any:
        torch = sys.modules["torch"]
        if type(array) is torch.Tensor and not array.__dict__:  # where a method may be hidden
            return array
        with torch._C.DisableTorchFunctionSubclass():
            own = torch.Tensor.as_subclass(array, torch.Tensor)
        return own if type(own) is torch.Tensor else array

    def fault(self, array: Any) -> str:
        torch = sys.modules["torch"]
        cls = type(array)
        traced = cls.__module__.startswith("torch._subclasses")  # a compiler's, which has no memory to look at
        if array.is_cpu and cls.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ and not traced:
            return f"computes by a dispatch of its own ({cls.__qualname__}); expected a plain tensor. Pass the one inside it."
        if array.is_nested:
            return f'is a nested tensor; expected a tensor of numbers. Pass {_HOLDERS["NestedTensor"]}.'
        if array.layout is not torch.strided:
            return f"has layout {array.layout}; expected a strided tensor. Pass .to_dense() of it."
        if array.is_cpu and cls is torch.Tensor and not _has_memory(array):
            return ("has no memory, or less than its shape and strides take (storage freed or shrunk, or zeros that are not "
                    "stored); expected a tensor with memory of its own. Pass .clone() of one that has its values.")  # fmt: skip
        return ""

    def dtype(self, array: Any) -> str:
        name = _DTYPES.get(array.dtype)
        if name is None:
            name = _DTYPES[array.dtype] = str(array.dtype).removeprefix("torch.")
        return name

    def device(self, array: Any) -> str:
        name = _DEVICES.get(array.device)
        if name is None:
            name = _DEVICES[array.device] = str(array.device)
        return name

    def readable(self, array: Any) -> bool:
        # A fake tensor of a compiler says that it is on the CPU, and has no values.
        return array.device.type == "cpu" and type(array) is sys.modules["torch"].Tensor

    def contiguous(self, array: Any) -> bool:
        # A lazily negated view has the numbers with the other sign; bytes may be taken for numbers wherever they stand.
        return array.is_contiguous() and not array.is_neg() and _aligned(array)

    def strides(self, array: Any) -> tuple[int, ...] | None:
        return None if array.is_neg() or not _aligned(array) else array.stride()

    def writable(self, array: Any) -> bool:
        return not array.is_neg()

    def will_write(self, out: Any) -> None:
        torch = sys.modules["torch"]
        written = out if out[1] is not None else out[:1]
        if any([array.requires_grad for array in written]) and torch.is_grad_enabled():
            field = next(name for name, array in zip(out._fields, written) if array.requires_grad)
            raise UnsupportedError(
                f"{field} of the arrays to write into requires grad, and grad mode is on; a graph that continues from it "
                "would have the gradient of what it held before. Leave out=None, or give tensors that do not require grad: "
                "a leaf's .detach() is the same memory."
            )
        # A graph that has kept one, or a view of one, is to notice. Inference tensors have no version, and are passed over.
        torch.autograd.graph.increment_version(written)

    def extent(self, array: Any) -> tuple[int, int]:
        if getattr(array, "is_meta", False):  # which MindSpore's have not
            return 0, 0
        if array.is_contiguous():
            low = array.data_ptr()
            return low, low + array.nbytes
        return self.memory(array).extent()

    def memory(self, array: Any) -> Memory:
        itemsize = array.itemsize
        strides = tuple(step * itemsize for step in array.stride())
        return Memory(array.data_ptr(), tuple(array.shape), strides, itemsize)

    def regular_copy(self, array: Any) -> Any:
        copy = array.resolve_neg().contiguous()
        return copy if _aligned(copy) else copy.clone()

    def take(self, array: Any, rows: slice | np.ndarray, axis: int = 0) -> Any:
        if isinstance(rows, slice):
            return array[(slice(None),) * axis + (rows,)]
        return array.index_select(axis, sys.modules["torch"].from_numpy(rows).to(array.device))

    def put(self, array: Any, rows: slice | np.ndarray, values: Any, axis: int = 0) -> Any:
        whole = array
        torch = sys.modules["torch"]
        with torch.inference_mode() if array.is_inference() else nullcontext():  # which else would turn gradients on
            if array.itemsize == 1:  # of which no gradient is wanted, and torch copies no rows
                array, values = array.view(torch.uint8), values.view(torch.uint8)
            if isinstance(rows, slice):
                array[(slice(None),) * axis + (rows,)] = values
            else:
                array.index_copy_(axis, torch.from_numpy(rows).to(array.device), values)
        return whole

    def assign(self, array: Any, values: Any) -> None:
        torch = sys.modules["torch"]
        with torch.inference_mode() if array.is_inference() else torch.no_grad():  # which alone lets one write to such a tensor
            array.copy_(values)

    def lanes(self, stats: Any, lanes: int) -> Any:
        return stats[..., :1].expand(*stats.shape[:-1], lanes)

    def to_numpy(self, array: Any) -> np.ndarray:
        array = array.detach().cpu().resolve_neg()
        name = self.dtype(array)
        return self.host_view(array).view(named_dtype(name)) if name in BITS else array.numpy()

    def from_numpy(self, array: np.ndarray) -> Any:
        import torch  # nobody need have done that: this may be the first tensor of a process

        if not array.flags.writeable or any(step < 0 for step in array.strides):
            array = array.copy()  # torch knows neither
        name = array.dtype.name
        if name in BITS:
            return torch.from_numpy(array.view(BITS[name])).view(getattr(torch, name))
        return torch.from_numpy(array)

    def host_view(self, array: Any) -> np.ndarray:
        torch = sys.modules["torch"]
        array, bits = array.detach(), BITS.get(self.dtype(array))
        return (array if bits is None else array.view(getattr(torch, bits))).numpy()

    def signature(self, arrays: Sequence[Any], inputs: int) -> Hashable | None:
        try:
            described = tensor_signature(arrays, inputs, sys.modules["torch"].Tensor)
        except RuntimeError:  # sparse, and so on: the validator says it
            return None
        return None if described is None else tuple(described)

    def allocator(self, shape: tuple[int, ...], dtype: str) -> Callable[[], Any]:
        torch = sys.modules["torch"]
        own = getattr(torch, dtype)
        if math.prod(shape) <= LARGE:
            # Twice as fast as torch.empty, and the default device of torch has no say.
            return partial(torch.empty_like, torch.empty((1,) * len(shape), dtype=own, device="cpu").expand(shape))
        # NumPy asks the system for huge pages, and torch does not: that decides what a large fresh output costs. Such a tensor's
        # storage cannot be resized.
        allocate = _HOST.allocator(shape, BITS.get(dtype, dtype))
        if dtype in BITS:
            return lambda: torch.from_numpy(allocate()).view(own)
        return lambda: torch.from_numpy(allocate())

    def full(self, like: Any, shape: tuple[int, ...], dtype: str, value: float) -> Any:
        torch = sys.modules["torch"]
        if like.device.type == "cpu" and dtype not in BITS:
            return torch.from_numpy(_HOST.full(None, shape, dtype, value))
        return torch.full(shape, value, dtype=getattr(torch, dtype), device=like.device)

    def cast(self, array: Any, dtype: str) -> Any:
        torch = sys.modules["torch"]
        return array.to(getattr(torch, dtype), memory_format=torch.contiguous_format, copy=True)


def packed_rows(actual_seq_qlen: Any, tokens: int, heads: int, device: Any) -> Any:
    """Where the statistic of each token and head stands among packed rows: an int64 tensor of shape (T * N,), by tokens.

    Computed on the device, without waiting for it, from cumulative lengths of shape (sequences + 1,); inside bounds whatever
    they contain.
    """
    import torch

    cumulative, sequence, place = places_in_sequences(actual_seq_qlen, tokens, device)
    start = cumulative[sequence]
    length = cumulative[(sequence + 1).clamp_(max=len(cumulative) - 1)] - start
    rows = (start * heads + place).unsqueeze(-1) + torch.arange(heads, device=device) * length.unsqueeze(-1)
    return rows.clamp_(0, max(tokens * heads - 1, 0)).view(-1)


def places_in_sequences(actual_seq_qlen: Any, tokens: int, device: Any) -> tuple[Any, Any, Any]:
    """The cumulative lengths on a device, and of each token its sequence and its place in that: int64 tensors.

    Computed as :func:`packed_rows` is. A place is right for lengths that are; a sequence is one of theirs in any case.
    """
    import torch

    cumulative = torch.as_tensor(actual_seq_qlen, device=device).to(torch.int64)
    token = torch.arange(tokens, device=device)
    sequence = torch.searchsorted(cumulative, token, right=True).sub_(1).clamp_(0, max(len(cumulative) - 2, 0))
    return cumulative, sequence, token - cumulative[sequence]
