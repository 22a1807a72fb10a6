"""Other projects' kernels that merge partial attention states, as backends of rau; one file a peer, and no code of theirs.

The rule here: an adapter declares what its peer documents, and hands the arrays over. It mends nothing: what a kernel does
wrong is what one wants to see.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pkgutil import resolve_name
from typing import Any, ClassVar

from rau.backends import Capabilities
from rau.backends.lse import LSEBackend
from rau.errors import BackendUnavailableError

__all__ = ["SIGMOID", "TRITON", "Peer", "takes"]

# What a Triton kernel takes. Its interpreter cuts off what bfloat16 cannot hold, where hardware rounds: that is none of a kernel's.
TRITON: dict[str, Any] = {"devices": ("cuda",)}
if os.environ.get("TRITON_INTERPRET") == "1":
    TRITON = {"devices": ("cpu",), "dtypes": ("float16", "float32")}

# What out - sigmoid(cur_lse - lse) * (out - cur_out) does not do. Where torch composes it, a row's bits depend on its place.
SIGMOID = ("one-empty", "two-empty", "payload", "small-weights")
_UNSAID = ("infinity", "nan", "signed-zero")  # nobody's documentation promises these


def takes(*unpromised: str, **more: Any) -> Capabilities:
    """Say what a kernel takes, on tensors: 16 bits and float32, all states alike, contiguous; and what it does not promise."""
    usual: dict[str, Any] = {"dtypes": ("float16", "bfloat16", "float32"), "mixed": False, "contiguous": True}
    return Capabilities(
        array_types=("torch:Tensor",), statistics="lse", unpromised=(*unpromised, *_UNSAID), **usual | more
    )


class Peer(LSEBackend):
    """A kernel of another project, or several, on torch tensors.

    Attributes
    ----------
    where : str
        "module:function", or the module where there are several; imported when the backend is first asked for.
    """

    where: ClassVar[str]

    def __init__(self) -> None:
        self._kernel = resolve_name(self.where)
        self._torch: Any = resolve_name("torch")
        wanted = self.capabilities.devices or ()
        there = [
            name for name in wanted if name == "cpu" or (hasattr(self._torch, name) and getattr(self._torch, name).is_available())
        ]
        if not there:
            raise BackendUnavailableError(f"{self.where} runs on {' or '.join(wanted)}, and torch finds no such device")
        self.capabilities = replace(self.capabilities, devices=(there[0],))  # type: ignore[misc]
