"""MindSpore's tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rau.arrays.memory import Memory
from rau.arrays.numpy_ import BITS, NumPyKind, named_dtype
from rau.arrays.torch_ import TorchKind
from rau.errors import UnsupportedError

_HOST = NumPyKind()


class MindSporeKind(TorchKind):
    """MindSpore tensors, which have torch's methods for where they lie.

    They are where MindSpore computes, whatever a tensor that has not been used yet says of itself. Asking for an
    address waits for all that MindSpore has queued, so that what is there may then be read and written.
    """

    name = "mindspore"

    def signature(self, arrays: Sequence[Any], inputs: int) -> None:
        return None

    def plain(self, array: Any) -> Any:
        return array

    def fault(self, array: Any) -> str:
        return ""

    def dtype(self, array: Any) -> str:
        return str(array.dtype).lower()  # "Float32", "BFloat16"

    def device(self, array: Any) -> str:
        return sys.modules["mindspore"].get_context("device_target").lower()

    def readable(self, array: Any) -> bool:
        return self.device(array) == "cpu"

    def contiguous(self, array: Any) -> bool:
        return array.is_contiguous()

    def strides(self, array: Any) -> tuple[int, ...]:
        return tuple(array.stride())

    def writable(self, array: Any) -> bool:
        return True

    def will_write(self, out: Any) -> None:
        pass

    def regular_copy(self, array: Any) -> Any:
        return array.contiguous()

    def assign(self, array: Any, values: Any) -> None:
        raise NotImplementedError("no log-sum-exp is taken from it")

    def take(self, array: Any, rows: slice | np.ndarray, axis: int = 0) -> Any:
        raise NotImplementedError("its rows are not chosen")

    def put(self, array: Any, rows: slice | np.ndarray, values: Any, axis: int = 0) -> Any:
        raise NotImplementedError("its rows are not chosen")

    def lanes(self, stats: Any, lanes: int) -> Any:
        return stats[..., :1].broadcast_to((*stats.shape[:-1], lanes))

    def to_numpy(self, array: Any) -> np.ndarray:
        mindspore = sys.modules["mindspore"]
        name = self.dtype(array)
        if name in BITS:
            return array.astype(mindspore.float32).asnumpy().astype(named_dtype(name))
        return array.asnumpy()

    def from_numpy(self, array: np.ndarray) -> Any:
        mindspore = sys.modules["mindspore"]
        name = array.dtype.name
        if name in BITS:
            return mindspore.Tensor(array.astype("f4")).astype(getattr(mindspore, name))
        return mindspore.Tensor(array)

    def host_view(self, array: Any) -> np.ndarray:
        # Its asnumpy copies what is strided, and knows no bfloat16.
        dtype = self.dtype(array)
        return np.asarray(_Borrowed(array, self.memory(settled(array)), BITS.get(dtype, dtype)))

    def allocator(self, shape: tuple[int, ...], dtype: str) -> Callable[[], Any]:
        mindspore = sys.modules["mindspore"]
        own = getattr(mindspore, dtype)
        allocate = _HOST.allocator(shape, BITS.get(dtype, dtype))
        if dtype in BITS:
            return lambda: mindspore.Tensor.from_numpy(allocate()).view(own)
        return lambda: mindspore.Tensor.from_numpy(allocate())

    def full(self, like: Any, shape: tuple[int, ...], dtype: str, value: float) -> Any:
        mindspore = sys.modules["mindspore"]
        if self.device(like) == "cpu":
            return mindspore.Tensor.from_numpy(_HOST.full(None, shape, dtype, value))
        return mindspore.ops.full(shape, value, dtype=getattr(mindspore, dtype))

    def cast(self, array: Any, dtype: str) -> Any:
        copy = array.copy()
        return copy if self.dtype(array) == dtype else copy.astype(getattr(sys.modules["mindspore"], dtype))


class _Borrowed:
    """Memory of a tensor, for NumPy to see; it keeps the tensor."""

    def __init__(self, array: Any, memory: Memory, dtype: str) -> None:
        self.array = array
        self.__array_interface__ = {
            "version": 3,
            "typestr": np.dtype(dtype).str,
            "data": (memory.address, False),
            "shape": memory.shape,
            "strides": memory.strides,
        }


def settled(array: Any) -> Any:
    """Make sure that a MindSpore tensor has memory, and that nobody waits for a gradient through it; return it.

    Inside mindspore.grad that is an error: what MindSpore does not see would have a gradient of zero, without a word.
    """
    if getattr(array, "_requires_grad", False):
        # A tensor that was differentiated once says so for ever; whether that goes on now, the executor knows.
        if sys.modules["mindspore"].common.api._pynative_executor.requires_grad():
            raise UnsupportedError(
                "a MindSpore tensor takes part in differentiation, but the merge of MindSpore tensors has no gradient; "
                "pass mindspore.ops.stop_gradient(...) of it, or use torch tensors"
            )
    if not array.data_ptr():
        array.asnumpy()  # made with init=: it has its values from now on
    return array
