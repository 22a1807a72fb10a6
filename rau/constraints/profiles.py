"""The profiles: which limits hold.

"mindspore": those of the reference page of ``mindspore.ops.ring_attention_update``. "cann-v2": those of CANN's second
entry, and by the vendor's pages of 2026-07 of its first one too, so torch_npu's and MindSpeed's. "portable": none but
shapes and dtypes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from rau.arrays.numpy_ import ITEMSIZE
from rau.constraints.rules import Violations
from rau.layouts import LAYOUTS

__all__ = ["CHIP", "PROFILES", "Profile", "unified_buffer_bytes"]

UNIFIED_BUFFER = 192 * 1024

_SUPPORTED = ("float16", "bfloat16", "float32")
# How the message of every such limit ends.
CHIP = ' This is a limit of the Ascend chip; profile="portable" lifts it.'


class Profile(NamedTuple):
    """One set of limits."""

    layouts: tuple[str, ...]
    dtypes: tuple[str, ...]
    lanes: tuple[int, ...]
    vendor: bool  # actual_seq_qlen is required in TND, int64, and prev and cur have one dtype
    limits: Callable[[Violations, str, int, int, str], None]  # in TND: report, argument's name, N, D, dtype


def _align(count: int, step: int) -> int:
    return -(-count // step) * step


def unified_buffer_bytes(heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes of the chip's unified buffer that one token takes in layout TND, by the formula of the reference page.

    `itemsize` is that of attn_out; at most 192 * 1024 is accepted.

    Examples
    --------
    >>> unified_buffer_bytes(42, 128, 4), unified_buffer_bytes(43, 128, 4)
    (193536, 197632)
    """
    return _align(heads * head_dim, 64) * (itemsize * 6 + 8) + _align(heads * 8, 64) * 56


def _head_dim_64(report: Violations, name: str, head_dim: int) -> None:
    if head_dim % 64:
        report.add(
            "tnd-head-dim-64",
            f'the last axis of {name} is D = {head_dim}; layout "TND" takes multiples of 64.{CHIP}',
        )


def _mindspore_limits(report: Violations, name: str, heads: int, head_dim: int, dtype: str) -> None:
    _head_dim_64(report, name, head_dim)
    if dtype not in _SUPPORTED:
        return
    itemsize = ITEMSIZE[dtype]
    need = unified_buffer_bytes(heads, head_dim, itemsize)
    if need > UNIFIED_BUFFER:
        report.add(
            "tnd-unified-buffer",
            f"{name} with N = {heads}, D = {head_dim}, {dtype} needs AlignUp(N*D, 64) * ({itemsize}*6 + 8) "
            f"+ AlignUp(N*8, 64) * 56 = {need} bytes; the limit is 192*1024 = {UNIFIED_BUFFER}.{CHIP}",
        )


def _cann_v2_limits(report: Violations, name: str, heads: int, head_dim: int, dtype: str) -> None:
    _head_dim_64(report, name, head_dim)
    if heads > 256:
        report.add("tnd-heads-256", f"{name} has N = {heads} heads; the limit is 256.{CHIP}")
    if head_dim > 768:
        report.add("tnd-head-dim-768", f"{name} has D = {head_dim}; the limit is 768.{CHIP}")


def _no_limits(report: Violations, name: str, heads: int, head_dim: int, dtype: str) -> None:
    pass


PROFILES: dict[str, Profile] = {
    "mindspore": Profile(("SBH", "TND"), _SUPPORTED, (8,), True, _mindspore_limits),
    "cann-v2": Profile(("SBH", "TND"), _SUPPORTED, (8,), True, _cann_v2_limits),
    "portable": Profile(tuple(LAYOUTS), tuple(ITEMSIZE), (8, 1), False, _no_limits),
}
