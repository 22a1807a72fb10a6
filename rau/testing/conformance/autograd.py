"""Autograd held to the contract: whatever a backend writes into torch tensors, torch learns of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from rau.arrays import kind_of
from rau.layouts import FIELDS
from rau.state import AttentionState
from rau.streaming import StreamingMerge
from rau.testing.conformance.report import Check
from rau.testing.trial import excluded_by, ordinary_case


def writes(backend: Any) -> Iterator[Check]:
    """List the check of a backend's writes."""
    reasons = _without_tensors(backend) or excluded_by(backend, ordinary_case(backend, "autograd", 4))
    yield Check("autograd/learns-of-writes", partial(check_writes, backend), reasons)


def _without_tensors(backend: Any) -> list[str]:
    if "torch:Tensor" not in backend.capabilities.array_types:
        return ["it takes no torch tensors"]
    kind = kind_of(backend.asarray(np.zeros(1, np.float32)))
    if kind is None or kind.name not in ("numpy", "torch"):
        return ["its asarray makes no torch tensors"]
    return [] if find_spec("torch") else ["torch is not installed"]


def check_writes(backend: Any) -> list[str]:
    """Write into tensors in every way there is, and compare their versions: by these a graph notices."""
    import torch  # asked for where there are tensors to write into

    from rau.backends.torch_ import TorchBackend

    def tensors(state: AttentionState) -> AttentionState:
        own = [backend.asarray(part) for part in state]
        return AttentionState(*(part if isinstance(part, torch.Tensor) else TorchBackend().asarray(part) for part in own))

    case = ordinary_case(backend, "autograd", 4)
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
