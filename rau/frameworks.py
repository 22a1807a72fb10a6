"""Array kinds of the deep-learning frameworks. Nothing here imports one: an array brings its own methods along."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from rau.arrays import Memory

_DTYPES: dict[Any, str] = {}
_DEVICES: dict[Any, str] = {}


class TorchKind:
    """Torch tensors, on any device."""

    name = "torch"

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
        return array.is_contiguous()

    def strides(self, array: Any) -> tuple[int, ...]:
        return array.stride()

    def writable(self, array: Any) -> bool:
        return True

    def extent(self, array: Any) -> tuple[int, int]:
        if array.is_contiguous():
            low = array.data_ptr()
            return low, low + array.nbytes
        return self.memory(array).extent()

    def memory(self, array: Any) -> Memory:
        itemsize = array.itemsize
        strides = tuple(step * itemsize for step in array.stride())
        return Memory(array.data_ptr(), tuple(array.shape), strides, itemsize)

    def regular_copy(self, array: Any) -> Any:
        return array.contiguous()

    def to_numpy(self, array: Any) -> np.ndarray:
        return array.detach().cpu().numpy()


class MindSporeKind(TorchKind):
    """MindSpore tensors, which have torch's methods for where they lie.

    They are where MindSpore computes, whatever a tensor that has not been used yet says of itself. Asking for an
    address waits for all that MindSpore has queued, so that what is there may then be read and written.
    """

    name = "mindspore"

    def dtype(self, array: Any) -> str:
        return str(array.dtype).lower()  # "Float32", "BFloat16"

    def device(self, array: Any) -> str:
        return sys.modules["mindspore"].get_context("device_target").lower()

    def readable(self, array: Any) -> bool:
        return self.device(array) == "cpu"

    def strides(self, array: Any) -> tuple[int, ...]:
        return tuple(array.stride())

    def to_numpy(self, array: Any) -> np.ndarray:
        return array.asnumpy()
