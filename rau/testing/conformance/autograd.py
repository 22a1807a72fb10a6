"""Autograd held to the contract: whatever a backend writes into torch tensors, torch learns of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np

from rau.arrays import kind_of
from rau.layouts import FIELDS
from rau.state import AttentionState
from rau.streaming import StreamingMerge
from rau.testing.cases import Case
from rau.testing.conformance.laws import Law
from rau.testing.trial import excluded_by


def writes(backend: Any) -> Iterator[tuple[str, Law, str, str]]:
    """List the check of a backend's writes.

    Parameters
    ----------
    backend : Backend

    Yields
    ------
    id, check, dtype : str, callable, str
        The callable takes the backend and the dtype, and returns what is wrong.
    excluded : str
        The reason why it does not apply; empty where it does.
    """
    dtypes = backend.capabilities.dtypes
    dtype = "float32" if "float32" in dtypes else dtypes[0]
    reasons = _without_tensors(backend) or excluded_by(backend, _case(backend, dtype))
    yield "autograd/learns-of-writes", check_writes, dtype, "; ".join(reasons)


def _without_tensors(backend: Any) -> list[str]:
    if "torch:Tensor" not in backend.capabilities.array_types:
        return ["it takes no torch tensors"]
    kind = kind_of(backend.asarray(np.zeros(1, np.float32)))
    if kind is None or kind.name not in ("numpy", "torch"):
        return ["its asarray makes no torch tensors"]
    return [] if find_spec("torch") else ["torch is not installed"]


def _case(backend: Any, dtype: str) -> Case:
    takes = backend.capabilities
    return Case(
        id="autograd", layout=takes.layouts[0], softmax_layout=takes.softmax_layouts[0], tokens=4, lengths=(4,), heads=4,
        head_dim=64, lanes=takes.lanes[0], dtype=dtype, profile="portable",
    )  # fmt: skip


def check_writes(backend: Any, dtype: str) -> list[str]:
    """Write into tensors in every way there is, and compare their versions: by these a graph notices.

    Parameters
    ----------
    backend : Backend
    dtype : str

    Returns
    -------
    list of str
        Each tensor that was written to and has the version it had.
    """
    import torch

    from rau.backends.torch_ import TorchBackend

    def tensors(state: AttentionState) -> AttentionState:
        own = [backend.asarray(part) for part in state]
        return AttentionState(*(part if isinstance(part, torch.Tensor) else TorchBackend().asarray(part) for part in own))

    case = _case(backend, dtype)
    prev, cur = map(tensors, case.fill())
    ring = StreamingMerge(
        case.layout, actual_seq_qlen=case.lengths_argument(), softmax_layout=case.softmax_layout, like=prev, backend=backend
    )
    assert ring.running is not None
    problems = []
    for call, out, write in (
        ("ring_attention_update", tensors(case.fill()[0]), lambda out: case.call([prev, cur], out, backend)),
        ("merge_states", tensors(case.fill()[0]), lambda out: replace(case, states=3).call([prev, cur, cur], out, backend)),
        ("StreamingMerge.update", ring.running, lambda out: ring.update(*cur)),
    ):
        before = [part._version for part in out]
        write(out)
        problems += [
            f"{call} wrote into {name}, and its version is {version}, as before"
            for name, part, version in zip(FIELDS, out, before, strict=True)
            if part._version == version
        ]
    return problems
