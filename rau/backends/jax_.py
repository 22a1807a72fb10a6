"""JAX: the compiled core for its arrays on the CPU, and jax.numpy for those on other devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rau.arithmetic import UNDERFLOW, merge_rows, merge_smoothly, weigh
from rau.arrays.jax_ import NAME, JaxKind, borrowed, is_tracer, with_float64
from rau.backends import AttentionState, Backend, Capabilities, Problem, jax_ffi
from rau.backends.cython_ import CythonBackend
from rau.errors import BackendUnavailableError, ran_out
from rau.install import command
from rau.layouts import LAYOUTS
from rau.lse import packed_index, reordered_by

if TYPE_CHECKING:
    from jax import Array


def _jax() -> Any:
    try:
        import jax
        import jax.numpy
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(f"JAX is missing: {command('jax')}") from error
    return jax


class _OfJax(Backend):
    """What both have in common: the arrays."""

    def update(
        self, problem: Problem, prev: AttentionState, cur: AttentionState, out: AttentionState | None
    ) -> AttentionState:
        return self.merge(problem, (prev, cur), out)

    def asarray(self, array: np.ndarray) -> Array:
        return JaxKind().from_numpy(array)

    def to_numpy(self, array: Array) -> np.ndarray:
        return JaxKind().to_numpy(array)


class JaxBackend(_OfJax):
    """The compiled core on JAX arrays in host memory, without a copy; under jit where XLA has them."""

    name = "jax"
    capabilities = Capabilities(array_types=(NAME,), out=False, differentiable=True, without_statistics=True)

    def __init__(self) -> None:
        _jax()
        self._core = CythonBackend()
        jax_ffi.register(self._merge_buffers)

    def merge(self, problem: Problem, states: Sequence[AttentionState], out: AttentionState | None) -> AttentionState:
        if any([is_tracer(array) for state in states for array in state]):
            return self._traced(problem, states)
        kind = JaxKind()
        views = [AttentionState(*map(kind.host_view, state)) for state in states]
        merged = self._core.merge(problem, views, None)
        return AttentionState(*(None if part is None else borrowed(part, states[0][0]) for part in merged))

    def _traced(self, problem: Problem, states: Sequence[AttentionState]) -> AttentionState:
        """Have the merge made when XLA runs the program."""
        lengths = problem.actual_seq_qlen
        how = {
            "lengths": None if lengths is None else lengths.tolist(), "layout": problem.layout,
            "softmax_layout": problem.softmax_layout, "profile": problem.profile, "statistics": problem.statistics,
        }  # fmt: skip
        results = states[0] if problem.statistics else states[0][:1]
        made = jax_ffi.call(how, results, *[array for state in states for array in state])
        return AttentionState(*made, *[None] * (3 - len(made)))

    def _merge_buffers(self, how: Any, inputs: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> None:
        """Make the merge that :meth:`_traced` has described."""
        states = [AttentionState(*inputs[k : k + 3]) for k in range(0, len(inputs), 3)]
        out = AttentionState(*results, *[None] * (3 - len(results)))
        lengths = None if how["lengths"] is None else np.array(how["lengths"], np.int64)
        problem = Problem.of(
            states, results, lengths, how["layout"], how["softmax_layout"], how["profile"], in_place=False,
            statistics=how["statistics"],
        )  # fmt: skip
        self._core.merge(problem, states, out)


class JaxNumpyBackend(_OfJax):
    """jax.numpy on any device: rows in float64 where the device has that, in float32 where it has not."""

    name = "jax_numpy"
    capabilities = Capabilities(
        array_types=(NAME,), devices=None, out=False, differentiable=True, without_statistics=True, tolerance=40.0,
        unpromised=("subnormal",),  # XLA makes them 0
    )  # fmt: skip

    def __init__(self) -> None:
        self._merge = _jax().jit(_merged, static_argnums=(0, 1, 2))  # one program for all calls of one kind, whatever their lengths

    def merge(self, problem: Problem, states: Sequence[AttentionState], out: AttentionState | None) -> AttentionState:
        with with_float64():
            merged: AttentionState = self._merge(problem.layout, problem.statistics, wide(), _index(problem), states)
        return merged


def _merged(layout: str, statistics: bool, wide: Any, index: Any, states: Sequence[AttentionState]) -> AttentionState:
    rows = _Rows(layout, index, states[0])
    maxima, sums = ([rows.of(state[field]) for state in states] for field in (1, 2))
    weighed = weigh(maxima, sums, wide, _exponential)
    merged = merge_rows(weighed.weights, [rows.heads(state[0]) for state in states])
    return rows.state((merged.reshape(states[0][0].shape), weighed.maximum, weighed.total), states[0], statistics)


def _index(problem: Problem) -> np.ndarray | None:
    """Where packed statistics stand; None where they are not packed."""
    return packed_index(problem.actual_seq_qlen, *problem.stats_shape[:2]) if problem.packed else None


class _Rows:
    """How the arrays of one call are seen as rows: (..., N) statistics beside (..., N, D) outputs.

    `index` tells where packed statistics stand, shape (T * N,); None where they are not packed.
    """

    def __init__(self, layout: str, index: Any, like: Sequence[Array]) -> None:
        axes = LAYOUTS[layout]
        self._order: tuple[int, ...] = axes.row_order
        self._folded, self._index = axes.attn_head is None, index
        self._heads = like[1].shape[axes.stats_head]

    def heads(self, attn_out: Array) -> Array:
        """See an output as (..., N, D)."""
        if not self._folded:
            return attn_out
        return attn_out.reshape(*attn_out.shape[:-1], self._heads, attn_out.shape[-1] // max(self._heads, 1))

    def of(self, stats: Array) -> Array:
        """See lane 0 of statistics in the order of the output's rows."""
        lane = stats[..., 0]
        return lane.transpose(self._order) if self._index is None else reordered_by(lane, self._index, "TND")

    def state(self, parts: Sequence[Array], like: Sequence[Array], statistics: bool = True) -> AttentionState:
        """Round an output and rows of statistics to what a state has, and put them where they are there."""
        attn_out = parts[0].astype(like[0].dtype)
        if not statistics:
            return AttentionState(attn_out, None, None)
        back = np.argsort(self._order)
        stats = []
        for part, its in zip(parts[1:], like[1:], strict=True):
            rows = part.astype(its.dtype)
            rows = rows.transpose(back) if self._index is None else reordered_by(rows, self._index, "SBH")
            stats.append(_jax().numpy.broadcast_to(rows[..., None], its.shape))
        return AttentionState(attn_out, *stats)


def wide() -> Any:
    """The dtype that rows are computed in: float64, if the device has it on which JAX computes by default."""
    global _wide
    if _wide is None:
        jax = _jax()
        try:
            with with_float64(), jax.ensure_compile_time_eval():
                jax.block_until_ready(jax.numpy.ones((), np.float64) + 1)
            _wide = np.float64
        except Exception as error:
            if ran_out(error):
                raise
            _wide = np.float32
    return _wide


_wide: Any = None


def _exponential(d: Array, lost: Array) -> Array:
    """exp(d + lost) as :func:`rau.arithmetic.exp_nonpositive` has it, by the device's own exponential."""
    xp = _jax().numpy
    q = xp.exp(d)
    return xp.where(d < UNDERFLOW, 0.0, q + q * lost)


def merged_smoothly(states: Sequence[Sequence[Array]], problem: Problem, keeps_lse: bool) -> AttentionState:
    """The merge as JAX can differentiate it, any number of times, on any device."""
    rows = _Rows(problem.layout, _index(problem), states[0])
    maxima, sums = ([rows.of(state[field]) for state in states] for field in (1, 2))
    lax = _jax().lax
    weighed = weigh([lax.stop_gradient(part) for part in maxima], [lax.stop_gradient(part) for part in sums], wide(), _exponential)
    attn_out, maximum, total = merge_smoothly(maxima, sums, [rows.heads(state[0]) for state in states], weighed, keeps_lse)
    return rows.state((attn_out.reshape(states[0][0].shape), maximum, total), states[0])
