"""JAX's arrays, and its tracers, which stand for arrays while it traces. Nothing here imports JAX before there is one of either."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from rau.arrays.memory import Memory, aligned
from rau.arrays.numpy_ import BITS, NumPyKind, named_dtype
from rau.errors import UnsupportedError

_HOST = NumPyKind()
# Its classes by the names that they have had, and what both are called here: jax.Array, the type that JAX documents.
CLASSES = ("jaxlib._jax:ArrayImpl", "jax._src.core:Tracer")
NAME = "jax:Array"


def is_tracer(array: Any) -> bool:
    """Tell whether something stands for an array while JAX traces (jit, grad, vmap, shard_map): it has no values yet."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(array, jax.core.Tracer)


def with_float64() -> AbstractContextManager[Any]:
    """Let JAX have float64 in a ``with`` block, whatever the program has set: it would make float32 of it otherwise."""
    enabled: AbstractContextManager[Any] = sys.modules["jax"].enable_x64(True)
    return enabled


def borrowed(array: np.ndarray, like: Any) -> Any:
    """Make JAX's own of an array that nobody else will write to, where `like` is; on the CPU no copy, if aligned to 64 bytes."""
    jax = sys.modules["jax"]
    with with_float64():
        return jax.device_put(array, like.device if like.committed else None, may_alias=True)


class JaxKind:
    """JAX arrays, on one device, and tracers, of which shape and dtype are all that is known.

    They cannot be written into: what writes elsewhere returns a new array here. A tracer is taken to be where JAX computes by
    default.
    """

    name = "jax"

    def plain(self, array: Any) -> Any:
        return array

    def fault(self, array: Any) -> str:
        if is_tracer(array):
            return ""
        if array.is_deleted():
            return "has been deleted or donated; expected an array that has its values. Donate it to no call before this one."
        if len(array.devices()) > 1:
            return (f"is spread over {len(array.devices())} devices; expected one. Call rau inside of jax.shard_map, where each "
                    "device has its part, or move it: jax.device_put(array, device).")  # fmt: skip
        return ""

    def dtype(self, array: Any) -> str:
        return str(array.dtype)

    def device(self, array: Any) -> str:
        if is_tracer(array):
            platform: str = sys.modules["jax"].default_backend()
            return platform
        devices = sorted(array.devices(), key=lambda device: device.id)
        device = devices[0]
        return f"{device.platform}:{device.id}" if device.id else str(device.platform)

    def readable(self, array: Any) -> bool:
        return True  # wherever it is: rows are found by lengths on the host. Of a tracer, `to_numpy` says that it is not

    def contiguous(self, array: Any) -> bool:
        return True  # for whoever sees it; how it lies is XLA's own business

    def strides(self, array: Any) -> None:
        return None

    def writable(self, array: Any) -> bool:
        return False

    def will_write(self, out: Any) -> None:
        raise UnsupportedError("JAX arrays cannot be written into; expected out=None. Take what is returned.")

    def extent(self, array: Any) -> tuple[int, int]:
        return 0, 0  # nobody writes into them, so that it does not matter which of them share memory

    def memory(self, array: Any) -> Memory:
        raise NotImplementedError("its extent is empty, so nobody asks")

    def regular_copy(self, array: Any) -> Any:
        return array

    def assign(self, array: Any, values: Any) -> None:
        self.will_write(array)

    def take(self, array: Any, rows: slice | np.ndarray, axis: int = 0) -> Any:
        return array[(slice(None),) * axis + (rows,)]

    def put(self, array: Any, rows: slice | np.ndarray, values: Any, axis: int = 0) -> Any:
        return array.at[(slice(None),) * axis + (rows,)].set(values)

    def lanes(self, stats: Any, lanes: int) -> Any:
        return sys.modules["jax"].numpy.broadcast_to(stats[..., :1], (*stats.shape[:-1], lanes))

    def to_numpy(self, array: Any) -> np.ndarray:
        if is_tracer(array):
            raise UnsupportedError(
                "an array's values are to be read while JAX traces the call (jit, grad, vmap, shard_map), when it has none. Leave "
                'check at "metadata", and pass lengths, tokens and indptr as lists or NumPy arrays, which are known by then.'
            )
        return np.asarray(array)

    def from_numpy(self, array: np.ndarray) -> Any:
        import jax

        with with_float64():
            return jax.numpy.array(array)  # a copy: the caller may go on to write to his own

    def host_view(self, array: Any) -> np.ndarray:
        view = np.ascontiguousarray(np.asarray(array))
        bits = BITS.get(view.dtype.name)
        return view if bits is None else view.view(bits)

    def signature(self, arrays: Sequence[Any], inputs: int) -> None:
        return None

    def allocator(self, shape: tuple[int, ...], dtype: str) -> Callable[[], np.ndarray]:
        """Return what allocates NumPy arrays that :func:`borrowed` makes JAX's of, once they are written."""
        own = named_dtype(dtype)
        return lambda: aligned(shape, own)

    def full(self, like: Any, shape: tuple[int, ...], dtype: str, value: float) -> Any:
        with with_float64():
            return sys.modules["jax"].numpy.full_like(like, value, dtype=named_dtype(dtype), shape=shape)

    def cast(self, array: Any, dtype: str) -> Any:
        if is_tracer(array):
            with with_float64():
                return array.astype(named_dtype(dtype))
        return borrowed(_HOST.cast(np.asarray(array), dtype), array)  # JAX would flush subnormal numbers to 0
