"""A merge as a target of XLA's foreign function interface: under jit, arrays are read and written where XLA has them.

JAX's own callbacks are not used: they copy every array, and wait for that copy in a thread on which it may itself depend. Where
the devices of one host exchange data between merges, as a ring does, it was seen to stand still for that.

The structures are those of XLA's C interface (xla/ffi/api/c_api.h), as far as they are read here; their first two fields are always
the same. XLA keeps its interface stable within a major version.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, c_char_p, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import numpy as np

from rau.arrays.numpy_ import named_dtype

TARGET = "rau_merge"
_MAJOR = 0  # of the interface
_METADATA, _INTERNAL = 1, 13  # XLA_FFI_Extension_Metadata, XLA_FFI_Error_Code_INTERNAL
_DTYPES = {10: "float16", 11: "float32", 12: "float64", 16: "bfloat16"}  # XLA_FFI_DataType
_HEAD: Any = [("struct_size", c_size_t), ("extension_start", c_void_p)]


class _Version(Structure):
    _fields_ = [*_HEAD, ("major", c_int), ("minor", c_int)]


class _Metadata(Structure):
    _fields_ = [("struct_size", c_size_t), ("version", _Version)]


class _Extension(Structure):
    _fields_ = [("struct_size", c_size_t), ("type", c_int), ("next", c_void_p), ("metadata", POINTER(_Metadata))]


class _Buffer(Structure):
    _fields_ = [*_HEAD, ("dtype", c_int), ("data", c_void_p), ("rank", c_int64), ("dims", POINTER(c_int64))]


class _Buffers(Structure):
    _fields_ = [*_HEAD, ("size", c_int64), ("types", POINTER(c_int)), ("items", POINTER(POINTER(_Buffer)))]


class _Text(Structure):
    _fields_ = [("data", c_void_p), ("size", c_size_t)]


class _Attributes(Structure):
    _fields_ = [
        *_HEAD, ("size", c_int64), ("types", POINTER(c_int)), ("names", POINTER(POINTER(_Text))),
        ("items", POINTER(POINTER(_Text))),
    ]  # fmt: skip


class _NewError(Structure):
    _fields_ = [*_HEAD, ("message", c_char_p), ("code", c_int)]


class _Api(Structure):
    _fields_ = [
        *_HEAD, ("version", _Version), ("internal", c_void_p), ("error", ctypes.CFUNCTYPE(c_void_p, POINTER(_NewError))),
    ]  # fmt: skip


class _Frame(Structure):
    _fields_ = [
        *_HEAD, ("api", POINTER(_Api)), ("context", c_void_p), ("stage", c_int), ("inputs", _Buffers), ("results", _Buffers),
        ("attributes", _Attributes),
    ]  # fmt: skip


# Given what the call says of itself, its inputs and the arrays to fill, all of them NumPy's.
Merge = Callable[[Any, Sequence[np.ndarray], Sequence[np.ndarray]], None]
_registered: list[Any] = []  # XLA has its address for as long as the process lives


def register(merge: Merge) -> None:
    """Make a function known to XLA as the target; once for a process."""
    if _registered:
        return
    import jax

    @ctypes.CFUNCTYPE(c_void_p, POINTER(_Frame))
    def handle(frame: Any) -> int | None:
        call = frame.contents
        try:
            if call.extension_start:
                _introduce(call)
            else:
                merge(json.loads(_text(call.attributes.items[0].contents)), _arrays(call.inputs), _arrays(call.results))
        except BaseException as error:  # nothing may be raised into XLA
            told = _NewError(ctypes.sizeof(_NewError), None, f"{type(error).__name__}: {error}".encode(), _INTERNAL)
            made: int | None = call.api.contents.error(ctypes.byref(told))
            return made
        return None

    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(ctypes.cast(handle, c_void_p).value), platform="cpu")
    _registered.append(handle)


def call(how: Any, results: Sequence[Any], *arrays: Any) -> list[Any]:
    """Have the target called when XLA runs what is traced; `how`, plain data, is all that it is told beside the arrays.

    It goes into the program that XLA compiles as text, so that nothing of this process is needed to run that.
    """
    import jax

    called = jax.ffi.ffi_call(TARGET, results, vmap_method="sequential")(*arrays, how=json.dumps(how))
    return list(called)


def _introduce(call: Any) -> None:
    """Answer XLA, which asks for the version of the interface: that which it has, since all that is used here is old."""
    version = call.api.contents.version
    if version.major != _MAJOR:
        raise RuntimeError(f"jaxlib has version {version.major}.{version.minor} of XLA's foreign functions; expected {_MAJOR}.*")
    extension = ctypes.cast(call.extension_start, POINTER(_Extension)).contents
    if extension.type == _METADATA:
        extension.metadata.contents.version.major = version.major
        extension.metadata.contents.version.minor = version.minor


def _text(span: Any) -> bytes:
    return ctypes.string_at(span.data, span.size)


def _arrays(buffers: Any) -> list[np.ndarray]:
    """See buffers as NumPy arrays, in the same memory."""
    arrays = []
    for k in range(buffers.size):
        buffer = buffers.items[k].contents
        shape, dtype = tuple(buffer.dims[: buffer.rank]), named_dtype(_DTYPES[buffer.dtype])
        size = int(np.prod(shape)) * dtype.itemsize
        memory: Any = (ctypes.c_char * size).from_address(buffer.data or 0) if size else b""
        arrays.append(np.frombuffer(memory, dtype).reshape(shape))
    return arrays
