"""Backends that are wrong, each in its own way, by name: what the conformance kit must catch. And two that it must not.

Those made of `rau.testing.diagnosis.mistakes` compute wrong numbers. The others compute the right ones, most by
`rau.testing.diagnosis.steps`, and do something wrong around them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import as_strided

import rau
from rau.backends import AttentionState, Backend, Capabilities, Problem
from rau.backends.numpy_ import NumPyBackend
from rau.testing.diagnosis.lse_mistakes import mistakes_with_lse
from rau.testing.diagnosis.mistakes import MISTAKES, Mistake
from rau.testing.diagnosis.steps import Steps

NUMPY = ("numpy:ndarray",)


class Plain(Backend):
    """Right, and slow: the base of all mutants."""

    name = "plain"
    capabilities = Capabilities(array_types=NUMPY)

    def update(
        self, problem: Problem, prev: AttentionState, cur: AttentionState, out: AttentionState | None
    ) -> AttentionState:
        return self.merge(problem, (prev, cur), out)

    def merge(self, problem: Problem, states: Sequence[AttentionState], out: AttentionState | None) -> AttentionState:
        with np.errstate(all="ignore"):
            result = self.compute(rows_of(problem, states))
        if out is None:
            return result
        for target, part in zip(out, result, strict=True):
            target[...] = part
        return out

    def compute(self, rows: Steps) -> AttentionState:
        return rows.merge()


def rows_of(problem: Problem, states: Sequence[AttentionState]) -> Steps:
    return Steps(states, problem.actual_seq_qlen, problem.layout, problem.softmax_layout)


class Pairs(Plain):
    """It has an update, and leaves merge to its base class."""

    name = "pairs"
    merge = Backend.merge

    def update(self, problem, prev, cur, out):
        return Plain.merge(self, problem, (prev, cur), out)


class PlainLSE(Plain):
    """Right, with a log-sum-exp in place of maximum and sum: the base of their twins."""

    name = "lse-plain"
    capabilities = Capabilities(array_types=NUMPY, statistics="lse")

    def compute(self, rows: Steps) -> AttentionState:
        return rows.keeping_lse("e").merge()


def _of(mistake: Mistake, base: type[Plain], name: str) -> type[Plain]:
    def compute(self: Plain, rows: Steps) -> AttentionState:
        made = mistake(rows.keeping_lse("e") if base is PlainLSE else rows)
        return base.compute(self, rows) if made is None else made

    return type(f"Mutant{name.title().replace('-', '')}", (base,), {"name": name, "compute": compute})


class Overwriting(Plain):
    """In place, it stores the statistics first, and then reads them for the weights of the output."""

    name = "in-place-reads-what-it-overwrote"

    def merge(self, problem: Problem, states: Sequence[AttentionState], out: AttentionState | None) -> AttentionState:
        if out is None:
            return super().merge(problem, states, out)
        with np.errstate(all="ignore"):
            for part in (1, 2):
                out[part][...] = self.compute(rows_of(problem, states))[part]
            out[0][...] = self.compute(rows_of(problem, states))[0]
        return out


class Wrapped(Plain):
    """Its offsets have too few bits: 20 here, so that a case of some megabytes does what gigabytes do to 32."""

    name = "wrapped-offset"
    elements = 2**20

    def compute(self, rows: Steps) -> AttentionState:
        size = rows.outputs[0].size
        if size > self.elements:
            offset = np.arange(size)
            offset = (offset + self.elements // 2) % self.elements - self.elements // 2  # as a signed number wraps
            rows.outputs = [output.ravel()[offset].reshape(output.shape) for output in rows.outputs]
        return rows.merge()


class Offsets32(NumPyBackend):
    """Its offsets are 32-bit integers."""

    name = "offsets-in-32-bits"

    def merge(self, problem: Problem, states: Sequence[AttentionState], out: AttentionState | None) -> AttentionState:
        problem._blocks = None if problem.blocks is None else problem.blocks.astype(np.int32).astype(np.int64)
        return super().merge(problem, states, out)


class ThreadDependent(Plain):
    """With more than one thread it adds up otherwise: right within the bound, but not the same bits."""

    name = "depends-on-threads"

    def compute(self, rows: Steps) -> AttentionState:
        if rau.get_num_threads() == 1:
            return rows.merge()
        return in_float64(rows)


class ChangesInput(Plain):
    """It uses cur's sums as scratch."""

    name = "input-changed"

    def merge(self, problem: Problem, states: Sequence[AttentionState], out: AttentionState | None) -> AttentionState:
        result = super().merge(problem, states, out)
        scratch = states[-1].softmax_sum
        if scratch.flags.writeable and not (out is not None and any(scratch is part for part in out)):
            scratch[...] = result.softmax_sum
        return result


class OneLane(Plain):
    """Lane 3 of the new sum holds what lane 3 of prev held."""

    name = "lane-3-differs"

    def compute(self, rows: Steps) -> AttentionState:
        result = rows.merge()
        result.softmax_sum[..., 3:4] = rows.states[0].softmax_sum[..., 3:4]
        return result


class IgnoresOut(Plain):
    """It returns fresh arrays, also where it was given some."""

    name = "out-ignored"

    def merge(self, problem: Problem, states: Sequence[AttentionState], out: AttentionState | None) -> AttentionState:
        return super().merge(problem, states, None)


class NotWritten(Plain):
    """It returns the arrays that it was given, and leaves them as they were."""

    name = "out-not-written"

    def merge(self, problem: Problem, states: Sequence[AttentionState], out: AttentionState | None) -> AttentionState:
        return super().merge(problem, states, out) if out is None else out


class WrongDtype(Plain):
    """16-bit outputs come back in float32."""

    name = "dtype-of-the-output"

    def compute(self, rows: Steps) -> AttentionState:
        result = rows.merge()
        if rows.dtype.itemsize == 2:
            return result._replace(attn_out=result.attn_out.astype(np.float32))
        return result


class WritesBeside(Plain):
    """It writes one element more than there is in the last row of a strided output."""

    name = "writes-beside-a-strided-output"

    def merge(self, problem: Problem, states: Sequence[AttentionState], out: AttentionState | None) -> AttentionState:
        result = super().merge(problem, states, out)
        if out is not None and out.attn_out.size and not out.attn_out.flags.c_contiguous:
            row = out.attn_out[tuple(n - 1 for n in out.attn_out.shape[:-1])]
            beside = as_strided(row, (row.size + 1,), row.strides)[-1:]
            memory = out.attn_out
            while isinstance(memory.base, np.ndarray):
                memory = memory.base
            if _address(beside) + beside.nbytes <= _address(memory) + memory.nbytes:  # not beyond what was allocated
                beside[...] = 1
        return result


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


class ReturnsInput(Plain):
    """Where nothing is to be done, it returns its input's own arrays."""

    name = "input-returned"

    def merge(self, problem: Problem, states: Sequence[AttentionState], out: AttentionState | None) -> AttentionState:
        result = super().merge(problem, states, out)
        if out is None and np.array_equal(result.softmax_max, states[0].softmax_max):
            return result._replace(softmax_max=states[0].softmax_max)
        return result


def in_float64(rows: Steps) -> AttentionState:
    """The elements in float64, rounded once."""
    factors = rows.factors()
    weights = rows.weights(factors).astype(np.float64)
    rows.outputs = [output.astype(np.float64) for output in rows.outputs]
    return rows.store(rows.combine(weights), rows.maximum, rows.total(factors))


class RowsInFloat32(Plain):
    """Its rows are float32 throughout, as on a device without float64. Right, as far as it declares."""

    # With u = 2**-24, a row of K states, sums from 1 to 100 and a gap d = m_i - m:
    # - d is rounded, which exp turns into abs(d) u; exp itself takes 5 u (NumPy's: 2.5 units in the last place), the
    #   product with l_i one, the K - 1 additions one each, the division one: a weight is off by (abs(d) + K + 6) u.
    # - A weight that is not subnormal has abs(d) <= ln(100 * 2**126) = 92, so that an element is off by at most
    #   (92 + K + 6) u on top of the K + 1 roundings that the bound counts: for K = 2, (100 + 3) / 3 = 34.3 times it.
    # - l is off by the mean of abs(d_i) weighted by a_i / l, below 3 where sums differ by 100 times, and K + 5
    #   roundings; against half a unit in the last place, u / 2 at least: 2 * (3 + 9 + 5) = 34 times it for K = 9. (133
    #   states would come to 282, did all 132 roundings have one sign.)
    name = "rows-in-float32"
    capabilities = Capabilities(array_types=NUMPY, dtypes=("float16", "bfloat16", "float32"), tolerance=35.0)

    def compute(self, rows: Steps) -> AttentionState:
        narrow = rows.having(rows.maxima.astype(np.float32), rows.sums.astype(np.float32))
        return narrow.merge(np.exp)


class Fused(Plain):
    """It adds with fused multiply-add: fewer roundings than rau's, other bits, and prev and cur do not commute."""

    # The first product and each of the K - 1 sums are rounded, the weights too: K + 1 roundings, as the bound counts
    # them. By way of float64, which stands for the exact sum here, a rounding comes to (1 + 2**-29) of itself.
    name = "fused"
    capabilities = Capabilities(array_types=NUMPY, dtypes=("float16", "bfloat16", "float32"), tolerance=1.001)

    def compute(self, rows: Steps) -> AttentionState:
        factors = rows.factors()
        result = np.zeros_like(rows.outputs[0])
        started = np.zeros(result.shape, bool)
        for weight, output in zip(rows.weights(factors), rows.outputs, strict=True):
            term, used = weight.astype(np.float64) * output, np.broadcast_to(weight != 0, result.shape)
            result = np.where(used, np.where(started, result + term, term), result).astype(np.float32)
            started = started | used
        return rows.store(result, rows.maximum, rows.total(factors))


class RowsInFloat32Undeclared(RowsInFloat32):
    """The same, under a name and a tolerance that promise more."""

    name = "rows-in-float32-undeclared"
    capabilities = Capabilities(array_types=NUMPY, dtypes=("float16", "bfloat16", "float32"))


class FusedUndeclared(Fused):
    """The same, promising the same bits as everybody."""

    name = "fused-undeclared"
    capabilities = Capabilities(array_types=NUMPY, dtypes=("float16", "bfloat16", "float32"))


class FiveBits(Plain):
    """It keeps five bits of a 16-bit result, to nearest, and declares what rows in float32 do."""

    name = "five-bits-at-tolerance-40"
    capabilities = Capabilities(array_types=NUMPY, tolerance=40.0)

    def compute(self, rows: Steps) -> AttentionState:
        result = rows.merge()
        if rows.dtype.itemsize > 2:
            return result
        fraction, exponent = np.frexp(result.attn_out.astype(np.float32))
        return result._replace(attn_out=np.ldexp(np.rint(fraction * 32) / 32, exponent).astype(rows.dtype))


class Truncated(Plain):
    """It cuts a 16-bit result off, and declares what rows in float32 do."""

    name = "truncated-at-tolerance-40"
    capabilities = Capabilities(array_types=NUMPY, tolerance=40.0)

    def compute(self, rows: Steps) -> AttentionState:
        return MISTAKES["truncated"](rows) or rows.merge()


OF_MISTAKES: dict[str, type[Plain]] = {name: _of(mistake, Plain, name) for name, mistake in MISTAKES.items()}
LSE_TWINS: dict[str, type[Plain]] = {
    f"lse-{name}": _of(mistake, PlainLSE, f"lse-{name}") for name, mistake in mistakes_with_lse().items()
}
OTHERS: dict[str, type[Backend]] = {
    mutant.name: mutant
    for mutant in (
        Overwriting, Wrapped, Offsets32, ThreadDependent, ChangesInput, OneLane, IgnoresOut, NotWritten, WrongDtype,
        WritesBeside, ReturnsInput, RowsInFloat32Undeclared, FusedUndeclared, FiveBits, Truncated,
    )
}  # fmt: skip
MUTANTS: dict[str, type[Backend]] = {**OF_MISTAKES, **LSE_TWINS, **OTHERS}
WITHIN_THEIR_TOLERANCE = (RowsInFloat32, Fused)
