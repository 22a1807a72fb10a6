"""The ascend backend: the vendor's own operator, and what has to be done around it so that the contract holds.

Read it from the bottom: the backend, then what it mends, then its limits. The two frameworks that have the operator
are in :mod:`rau.backends.ascend_operators`. None of this has run on an Ascend chip: docs/ascend.md says what it was
tested with.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from rau.arrays import kind_of
from rau.backends import AttentionState, Backend, Capabilities, Problem
from rau.backends.ascend_operators import FRAMEWORKS, OnMindSpore, OnTorch
from rau.constraints.profiles import CHIP, PROFILES
from rau.constraints.rules import Violations
from rau.errors import BackendUnavailableError

if TYPE_CHECKING:
    import numpy as np


def chip_limits(problem: Problem) -> list[str]:
    """Limits of the operator that would run a problem, each with the computed value. Layout SBH has none but on D = 0."""
    reasons = []
    if not problem.D and problem.T and problem.N:
        reasons.append("D = 0: the operator does not take an empty output")
    if problem.layout == "TND":
        report = Violations("ascend")
        PROFILES[_entry(problem)].limits(report, "attn_out", problem.N, problem.D, problem.dtype)
        reasons += [message.removesuffix(CHIP).removesuffix(".") for _, message in report.broken]
    return reasons


def _entry(problem: Problem) -> str:
    """The profile with the limits of the operator that would run it: MindSpore's, or torch_npu's and MindSpeed's."""
    if problem.kind == "mindspore":
        return "mindspore"
    # Where there is neither, on a laptop, the call itself says which one it is written for.
    return "cann-v2" if sys.modules.get("torch_npu") or problem.profile == "cann-v2" else "mindspore"


def mended(framework: Any, problem: Problem, prev: AttentionState, cur: AttentionState, result: Any) -> AttentionState:
    """Give rows with a side that is not to be read what the contract says: the vendor's operator has no guards.

    It computes 0 / 0 where both sides are empty, and 0 times whatever stands behind an empty one, or behind one whose
    weight is 0. Which rows to mend is decided on the device, without waiting for it; the price is three more passes
    over the output. On torch the operator's result is written over.
    """
    (m_prev, l_prev), (m_cur, l_cur) = ((state[1][..., :1], state[2][..., :1]) for state in (prev, cur))
    no_prev, no_cur = ((l == 0) | (m == -math.inf) for m, l in ((m_prev, l_prev), (m_cur, l_cur)))
    neither = no_prev & no_cur

    def mend(part: Any, of_prev: Any, of_cur: Any, masks: tuple[Any, Any, Any], nothing: float) -> Any:
        part = framework.select(masks[0], of_cur, part)
        part = framework.select(masks[1], of_prev, part)
        return framework.fill(part, masks[2], nothing)

    maximum = mend(result[1], m_prev, m_cur, (no_prev, no_cur, neither), -math.inf)
    total = mend(result[2], l_prev, l_cur, (no_prev, no_cur, neither), 0.0)

    def unread(m: Any, l: Any) -> Any:
        # A sum that is infinite makes the other side's weight 0, and the output NaN all the same.
        weight = l * (m - maximum[..., :1]).exp() / total[..., :1]
        return (weight == 0) & (total[..., :1].abs() < math.inf)

    def rows(mask: Any) -> Any:  # (..., N, 1), in the order of the output's rows
        if problem.layout == "SBH":
            return mask.permute(2, 0, 1, 3)
        if not problem.packed:
            return mask
        return mask.reshape(-1)[framework.packed_rows(problem, mask)].reshape(mask.shape)

    def heads(attn_out: Any) -> Any:  # (..., N, D), without a copy
        return attn_out.reshape(*attn_out.shape[:-1], problem.N, problem.D) if problem.layout == "SBH" else attn_out

    masks = rows(no_prev | unread(m_prev, l_prev)), rows(no_cur | unread(m_cur, l_cur)), rows(neither)
    attn_out = mend(heads(result[0]), heads(prev.attn_out), heads(cur.attn_out), masks, 0.0)
    return AttentionState(attn_out.reshape(problem.shape), maximum, total)


def _filled(like: Any, value: float) -> Any:
    """Make an array like another one, on its device, every element of it `value`."""
    kind = kind_of(like)
    assert kind is not None
    return kind.full(like, tuple(like.shape), kind.dtype(like), value)


class AscendBackend(Backend):
    """Huawei's operator on Ascend NPUs, for torch and MindSpore tensors."""

    name = "ascend"
    # The vendor's rows are float32. With u = 2**-24, a gap d = m_i - m is rounded, which the exponential turns into
    # abs(d) u, and a weight that is not subnormal has abs(d) <= ln(100 * 2**126) = 92 where sums differ by 100 times.
    # The exponential (5 u in NumPy's float32), its product with l_i, the sum l and the division come to 8 u: so an
    # element is off by (92 + 8) u beside the 3 roundings that the contract's bound counts, 103 / 3 = 34.3 times it. How
    # good the chip's exponential and division are is not published: 40 leaves them 17 u more.
    # The sum's bound is half a unit in the last place: 40 times that covers sums that differ by up to 2**24 times.
    # The one rounding to 16 bits is in none of this: the operator rounds to nearest even, as everybody.
    capabilities = Capabilities(
        array_types=("torch:Tensor", "mindspore.common.tensor:Tensor"),
        devices=("npu", "ascend"),
        dtypes=("float16", "bfloat16", "float32"),
        mixed=False,
        layouts=("SBH", "TND"),
        lanes=(8,),
        limits=chip_limits,
        tolerance=40.0,
    )

    def __init__(self) -> None:
        failures = []
        for framework in FRAMEWORKS.values():
            try:
                self._first: OnTorch | OnMindSpore = framework()
                return
            except BackendUnavailableError as error:
                failures.append(error)
        raise BackendUnavailableError("; ".join(map(str, failures))) from failures[0]

    def _framework(self, kind: str) -> OnTorch | OnMindSpore:
        return self._first if kind == self._first.kind else FRAMEWORKS[kind]()

    def update(
        self, problem: Problem, prev: AttentionState, cur: AttentionState, out: AttentionState | None
    ) -> AttentionState:
        framework = self._framework(problem.kind)
        # The operator reads all 8 lanes, element d of a row lane d % 8; the contract says that lane 0 counts.
        prev, cur = (
            AttentionState(state[0].contiguous(), *(part[..., :1].expand_as(part).contiguous() for part in state[1:]))
            for state in (prev, cur)
        )
        if problem.T and problem.N:
            result = mended(framework, problem, prev, cur, framework.run(problem, prev, cur))
        else:  # the operator refuses to do nothing
            result = AttentionState(*(_filled(part, 0.0) for part in prev))
        if out is None:
            return result
        for target, part in zip(out, result, strict=True):  # the operator writes into no array of ours
            target.copy_(part)
        return out

    def _cast(self, state: AttentionState, dtype: str) -> AttentionState:
        kind = kind_of(state.attn_out)
        assert kind is not None
        return state._replace(attn_out=kind.cast(state.attn_out, dtype))

    def _neutral(self, problem: Problem, like: AttentionState) -> AttentionState:
        return AttentionState(like.attn_out, _filled(like.softmax_max, -math.inf), _filled(like.softmax_sum, 0.0))

    def asarray(self, array: np.ndarray) -> Any:
        return self._first.asarray(array)

    def to_numpy(self, array: Any) -> np.ndarray:
        kind = kind_of(array)
        assert kind is not None
        return kind.to_numpy(array)

    def synchronize(self) -> None:
        self._first.synchronize()
