"""The conformance kit's checks of streaming catch what may go wrong in it: in a backend, and in StreamingMerge itself."""

import numpy as np
import pytest
from mutants import NUMPY, Plain

import rau
from rau import streaming
from rau.arrays.numpy_ import NumPyKind
from rau.backends import Capabilities
from rau.backends.numpy_ import NumPyBackend
from rau.layouts import ATTN, MAX, SUM, column
from rau.problem import Problem
from rau.streaming import tokens as parts
from rau.testing.conformance import check_backend

TND = "streaming/TND-*"


def caught(backend, select="streaming/*"):
    """The ids of the checks that fail."""
    report = check_backend(backend, select=select)
    assert report.succeeded or report.failures
    return {failure.id for failure in report.failures}


def test_what_is_right_passes():
    """One that takes halves, one that implements nothing but `update`; and so do both orders of the statistics."""
    assert not caught("numpy")
    assert not caught(Plain)


class Halves(NumPyBackend):
    """It takes halves, and looks for them where `table` says."""

    def merge(self, problem, states, out):
        if problem.half is not None:
            problem.blocks[:] = self.table(problem)
        return super().merge(problem, states, out)


class AlwaysFront(Halves):
    def table(self, problem):
        lengths, strides = (problem.B, problem.T, problem.N, problem.D), problem.strides
        return parts_table(problem, lengths, strides, "front")


class Swapped(Halves):
    def table(self, problem):
        other = {"front": "back", "back": "front"}[problem.half]
        return parts_table(problem, (problem.B, problem.T, problem.N, problem.D), problem.strides, other)


class PartialsHeadStride(Halves):
    """Packed: it walks the heads of the running state as those of the partial state."""

    def table(self, problem):
        table = problem.blocks.copy()
        if problem.packed:
            for part in (MAX, SUM):
                for operand in (0, 2):
                    table[:, column(operand, part) + 2] = table[:, column(1, part) + 2]
        return table


class PartialsOffsets(Halves):
    """It looks for each sequence where it is in the partial state."""

    def table(self, problem):
        table = problem.blocks.copy()
        for part in (ATTN, MAX, SUM):
            table[:, column(0, part)] = table[:, column(2, part)] = table[:, column(1, part)]
        return table


def parts_table(problem, lengths, strides, half):
    from rau.layouts import block_terms

    return block_terms(problem.layout, problem.packed, lengths, problem.actual_seq_qlen, strides, half).table()


@pytest.mark.parametrize("mutant", [AlwaysFront, Swapped, PartialsHeadStride, PartialsOffsets])
def test_a_backend_that_takes_halves_and_finds_them_wrong(mutant):
    assert not caught("numpy", TND)
    found = caught(mutant, TND)
    assert any("packed" in id for id in found)
    assert any("token-major" in id for id in found) or mutant is PartialsHeadStride


class SixteenBits(Plain):
    """It rounds what it merges into a float32 state to the dtype of the partial state."""

    def merge(self, problem, states, out):
        result = super().merge(problem, states, out)
        result.attn_out[...] = result.attn_out.astype(states[1].attn_out.dtype)
        return result


def test_a_backend_that_rounds_a_running_state():
    assert {"streaming/SBH-bfloat16", "streaming/SBH-float16"} <= caught(SixteenBits)


class WritesThePartial(Plain):
    def merge(self, problem, states, out):
        states[-1].softmax_sum[...] += 1
        return super().merge(problem, states, out)


def test_a_backend_that_writes_into_the_partial_state():
    assert "streaming/SBH-float32" in caught(WritesThePartial)


def test_halves_that_are_swapped(monkeypatch):
    found = parts.part_of

    def swapped(call, tokens, *arguments):
        other = {"front": "back", "back": "front"}[tokens] if isinstance(tokens, str) else tokens
        return found(call, other, *arguments)

    monkeypatch.setattr(streaming, "part_of", swapped)
    assert {"streaming/SBH-float32", "streaming/TND-packed-float32", "streaming/TND-token-major-float32"} <= caught("numpy")


def test_halves_of_the_wrong_sequences(monkeypatch):
    """For a backend that is given views: the first sequence of each run, again and again."""
    batch = parts._batch
    monkeypatch.setattr(parts, "_batch", lambda state, first, *rest: batch(state, 0, *rest))
    assert {"streaming/TND-packed-float32", "streaming/TND-token-major-float32"} <= caught(Plain, TND)


def test_packed_halves_taken_for_token_major_ones(monkeypatch):
    batch = parts._batch
    monkeypatch.setattr(parts, "_batch", lambda *arguments: batch(*arguments[:-1], not arguments[-1]))
    assert {"streaming/TND-packed-float32", "streaming/TND-token-major-float32"} <= caught(Plain, TND)


def test_a_running_state_in_sixteen_bits(monkeypatch):
    full = NumPyKind.full

    def narrow(self, like, shape, dtype, value):
        return full(self, like, shape, like.dtype if len(shape) == 3 and like.ndim == 3 and value == 0 else dtype, value)

    monkeypatch.setattr(NumPyKind, "full", narrow)
    assert "streaming/SBH-bfloat16" in caught("numpy", "streaming/SBH-*")


def test_a_result_that_is_rounded_twice(monkeypatch):
    cast = NumPyKind.cast

    def twice(self, array, dtype):
        return cast(self, cast(self, array, "float16") if dtype == "bfloat16" else array, dtype)

    monkeypatch.setattr(NumPyKind, "cast", twice)
    assert "streaming/SBH-bfloat16" in caught("numpy", "streaming/SBH-*")


def test_a_result_that_is_cut_off(monkeypatch):
    cast = NumPyKind.cast

    def cut_off(self, array, dtype):
        if dtype == "bfloat16":
            array = (array.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        return cast(self, array, dtype)

    monkeypatch.setattr(NumPyKind, "cast", cut_off)
    assert "streaming/SBH-bfloat16" in caught("numpy", "streaming/SBH-*")


def test_a_slice_that_loses_its_step(monkeypatch):
    found = streaming.part
    monkeypatch.setattr(streaming, "part", lambda state, layout, tokens: found(state, layout, slice(tokens.start, tokens.stop)))
    assert "streaming/SBH-float32" in caught("numpy")


def test_a_wrong_stack_is_caught(monkeypatch):
    from rau import update

    taken = update.as_states

    def backwards(states, layout):
        return taken(states, layout)[:: -1 if isinstance(states, rau.AttentionState) else 1]

    monkeypatch.setattr(update, "as_states", backwards)
    assert "states/stacked-float32" in caught("numpy", "states/stacked-*")


def test_a_backend_without_a_batch_is_excused():
    class Alone(Plain):
        name = "alone"
        capabilities = Capabilities(array_types=NUMPY, layouts=("TND",))

    report = check_backend(Alone, select="streaming/*")
    assert not report.failures
    reasons = {excluded.id: excluded.message for excluded in report.excluded}
    assert "neither halves of TND sequences nor" in reasons["streaming/TND-packed-float32"]
    assert "layout SBH is not one of TND" in reasons["streaming/SBH-float32"]


def test_halves_are_a_matter_of_the_blocks():
    assert "half" in Problem.__annotations__
    assert rau.registry.capabilities("numpy").halves
    assert not Capabilities(array_types=NUMPY).halves
