"""Autograd held to the contract: torch learns of whatever a backend writes, and gradients go to the rows that were merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from rau.arrays import kind_of
from rau.layouts import FIELDS
from rau.sink import add_sink
from rau.state import AttentionState
from rau.streaming import StreamingMerge
from rau.testing.cases import Case
from rau.testing.conformance.report import Check
from rau.testing.reference.gradients import gradients_of_rows
from rau.testing.trial import excluded_by, ordinary_case
from rau.update import merge_states


def autograd(backend: Any) -> Iterator[Check]:
    """List the checks of a backend's tensors."""
    for name, check, case in (
        ("learns-of-writes", check_writes, ordinary_case(backend, "autograd", 4)),
        ("rows-and-sinks", check_gradients, _of_rows(backend)),
    ):
        yield Check(f"autograd/{name}", partial(check, backend), _without_tensors(backend) or excluded_by(backend, case))


def _without_tensors(backend: Any) -> list[str]:
    if "torch:Tensor" not in backend.capabilities.array_types:
        return ["it takes no torch tensors"]
    kind = kind_of(backend.asarray(np.zeros(1, np.float32)))
    if kind is None or kind.name not in ("numpy", "torch"):
        return ["its asarray makes no torch tensors"]
    return [] if find_spec("torch") else ["torch is not installed"]


def _tensors(backend: Any, state: Sequence[Any]) -> AttentionState:
    """Make tensors of NumPy arrays, where the backend has its own."""
    import torch  # asked for where there are tensors to make

    from rau.backends.torch_ import TorchBackend

    own = [backend.asarray(part) for part in state]
    return AttentionState(*(part if isinstance(part, torch.Tensor) else TorchBackend().asarray(part) for part in own))


def check_writes(backend: Any) -> list[str]:
    """Write into tensors in every way there is, and compare their versions: by these a graph notices."""
    tensors = partial(_tensors, backend)
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


def _of_rows(backend: Any) -> Case:
    return replace(ordinary_case(backend, "autograd", 9), layout="TND", softmax_layout="TND", lengths=(4, 5), qlen="array")


MASK = np.array([1, 1, 0, 0, 1, 0, 1, 1, 0], bool)  # of nine tokens


def ways_of_rows(name: str) -> dict[str, tuple[Callable[..., AttentionState], Sequence[Sequence[tuple[int, int]]]]]:
    """Merges of two states and a sink by a backend in which rows matter, and the (state, row)s that each merged row is made of.

    They merge some tokens, all but padding, as many states as each row has, and a sink, which is a state of one row.
    """
    mask, merge = MASK, partial(merge_states, layout="TND", backend=name)
    padding = {"cu_seqlens_padded": [0, 4, 6, 9], "actual_seq_qlen": [0, 2, 3, 5]}
    of_two = [[(0, row), (1, row)] for row in range(9)]
    return {
        "tokens": (lambda one, other, _: merge([one, other], tokens=mask), [of_two[t][: 1 + mask[t]] for t in range(9)]),
        "padding": (lambda one, other, _: merge([one, other], **padding), [of_two[t][: 2 * mask[t]] for t in range(9)]),
        "indptr": (
            lambda one, *_: merge(one, indptr=[0, 2, 2, 5, 9]),
            [[(0, row) for row in range(*ends)] for ends in ((0, 2), (2, 2), (2, 5), (5, 9))],
        ),
        "a sink": (lambda one, _, sink: add_sink(one, sink, "TND", backend=name), [[(0, t), (2, 0)] for t in range(9)]),
    }


def check_gradients(backend: Any) -> list[str]:
    """Compare the gradients of rows that are merged with those of a softmax."""
    return [f"{how}: {problem}" for how, way in ways_of_rows(backend.name).items() for problem in _gradients(backend, *way)]


def _gradients(backend: Any, merge: Callable[..., AttentionState], made: Sequence[Sequence[tuple[int, int]]]) -> list[str]:
    """Compare the gradients of a merge, whose row t is made of the (state, row) in made[t], with the reference's.

    An element of (o_i - o) g takes three roundings in o, one each in the difference, in the product, in its weight and in the
    result; a sink's gradient is added up over nine rows: sixteen in all, of a size without signs.
    """
    import torch

    case = _of_rows(backend)
    first, second = case.fill()
    for part, empty in zip(second, (np.nan, -np.inf, 0), strict=True):
        part[~MASK] = np.nan  # not to be read
        if "one-empty" not in backend.capabilities.unpromised:
            part[0] = empty
    logits = np.array([0.5, -1, 2, -3], first.softmax_max.dtype)
    sink = np.zeros_like(first.attn_out[:1]), logits.reshape(1, 4, 1), np.ones((1, 4, 1))
    leaves = [*_tensors(backend, first), *_tensors(backend, second), _tensors(backend, first._replace(softmax_max=logits))[1]]
    rng = np.random.default_rng(3)
    g, h = (rng.integers(-16, 17, (len(made), 4, *more)) / 8 for more in ((case.head_dim,), ()))
    wanted = gradients_of_rows([first, second, sink], made, g, h)

    one, other, its_sink = leaves[:3], leaves[3:6], leaves[6]
    for leaf in leaves:
        leaf.requires_grad_()
    # On the host, since not every device has float64.
    attn_out, *stats = (part.cpu().double() for part in merge(AttentionState(*one), AttentionState(*other), its_sink))
    alive = torch.tensor([t for t, parts in enumerate(made) if parts])  # the others have no log-sum-exp
    maximum, total = (part[alive, :, 0] for part in stats)
    loss = (attn_out * torch.from_numpy(g)).sum() + ((maximum + total.log()) * torch.from_numpy(h)[alive]).sum()
    found = torch.autograd.grad(loss, leaves, materialize_grads=True)

    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(case.dtype, 2.0**-24)
    names = [f"{field} of the {state} state" for state in ("first", "second") for field in FIELDS] + ["the sink"]
    problems = []
    for name, gradient, (expected, size) in zip(names, found, [*wanted[0], *wanted[1], wanted[2][1]], strict=True):
        its = gradient.double().cpu().numpy()
        if name == "the sink":
            its = its[None]
        elif "attn_out" not in name:
            its = its.sum(-1)
        off = np.abs(its - expected) / np.where(size == 0, 1e-300, 16 * unit * size)
        if not (off <= 1).all():
            at = tuple(map(int, np.argwhere(~(off <= 1))[0]))
            problems.append(f"the gradient of {name} is {its[at]:.9g} at {at}; expected {expected[at]:.9g}")
    return problems
