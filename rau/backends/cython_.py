"""The Cython backend: arrays in host memory into the compiled core, nothing else."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rau.arrays import HOST_ARRAYS
from rau.arrays.mindspore_ import settled
from rau.backends import AttentionState, Backend, Capabilities, Problem
from rau.errors import BackendUnavailableError
from rau.install import command
from rau.threads import get_num_threads


def missing(error: ImportError) -> str:
    """Say what is missing without the compiled core, and how one gets it."""
    again = command().replace("pip install", "pip install --force-reinstall --no-deps", 1)
    return (
        "the compiled core rau._core is missing: the package was installed without a working C compiler. Install one (gcc or "
        f"clang and Python's headers), then: {again} [{error}]"
    )


class CythonBackend(Backend):
    """The fast backend on every CPU: one streaming pass over the states, in threads."""

    name = "cython"
    capabilities = Capabilities(array_types=HOST_ARRAYS, halves=True, runs=True, without_statistics=True)

    def __init__(self) -> None:
        try:
            from rau._core import merge, simd_versions, use_simd
        except ImportError as error:
            raise BackendUnavailableError(missing(error)) from error
        version = os.environ.get("RAU_SIMD", "")
        try:
            use_simd(version or simd_versions()[-1])
        except ValueError as error:
            raise BackendUnavailableError(f"RAU_SIMD = {version!r}: {error}") from error
        self._merge = merge

    def update(
        self, problem: Problem, prev: AttentionState, cur: AttentionState, out: AttentionState | None
    ) -> AttentionState:
        return self.merge(problem, (prev, cur), out)

    def merge(self, problem: Problem, states: Sequence[AttentionState], out: AttentionState | None) -> AttentionState:
        if out is None:
            out = AttentionState(*problem.result())
        arrays = tuple([array for state in (*states, out) for array in state])
        if problem.kind == "mindspore":
            arrays = tuple(map(settled, arrays))
        blocks = problem.block_terms
        assert blocks is not None  # host arrays have their lengths on the host
        self._merge(*blocks, arrays, problem.dtype, problem.cur_dtype, problem.T, problem.N, problem.D, problem.lanes,
                    problem.statistics, problem.in_place, get_num_threads())  # fmt: skip
        return out
