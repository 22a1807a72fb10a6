"""Capabilities(contiguous=True): what is not contiguous is copied for such a backend, and what it writes is copied back."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from states import bits, sbh, tnd

import rau
from rau.backends.numpy_ import NumPyBackend


class Strict(NumPyBackend):
    """Refuses what a kernel that is given pointers would take for something else; keeps what it was given."""

    name = "strict"
    capabilities = replace(NumPyBackend.capabilities, contiguous=True, halves=False, runs=False)

    def update(self, problem, prev, cur, out):
        return self.merge(problem, [prev, cur], out)

    def merge(self, problem, states, out):
        self.in_place = problem.in_place
        self.seen = [array for state in [*states, *([] if out is None else [out])] for array in state if array is not None]
        assert all(array.flags.c_contiguous for array in self.seen)
        for array, strides in zip((array for state in states for array in state), problem.strides, strict=False):
            steps = zip(array.shape, array.strides, strides, strict=True)
            assert all(its == array.itemsize * told for length, its, told in steps if length > 1)
        return super().merge(problem, states, out)


def every_other(state):
    """The same values, in every other token of larger arrays."""
    wide = [np.repeat(part, 2, axis) for part, axis in zip(state, (0, 2, 2), strict=True)]
    return rau.AttentionState(wide[0][::2], wide[1][:, :, ::2], wide[2][:, :, ::2])


@pytest.mark.parametrize("how", ["fresh", "out", "in place", "no statistics"])
def test_what_is_not_contiguous_is_copied(how, caplog):
    prev, cur = sbh(seed=1), sbh(seed=2)
    expected = rau.ring_attention_update(*prev, *cur, backend="numpy")
    mine, its = every_other(prev), every_other(cur)
    its = its._replace(attn_out=cur.attn_out[::-1].copy()[::-1])
    backend = Strict()
    with caplog.at_level(logging.DEBUG, "rau"):
        if how == "no statistics":
            out = every_other(sbh(seed=3)).attn_out
            result = rau.merge_states([mine, its], statistics=False, out=out, backend=backend)
            assert result is out and bits([out]) == bits(expected[:1])
        else:
            out = {"fresh": None, "out": every_other(sbh(seed=3)), "in place": mine}[how]
            result = rau.ring_attention_update(*mine, *its, out=out, backend=backend)
            assert bits(result) == bits(expected) and (out is None or all(a is b for a, b in zip(result, out, strict=True)))
    assert "backend strict takes contiguous arrays: " in caplog.text
    assert backend.in_place == (how == "in place")
    assert bits(its) == bits(cur) and (how == "in place" or bits(mine) == bits(prev))


def test_what_is_contiguous_is_not(caplog):
    prev, cur = sbh(seed=1), sbh(seed=2)
    prev.attn_out.flags.writeable = False
    backend = Strict()
    with caplog.at_level(logging.DEBUG, "rau"):
        out = rau.ring_attention_update(*prev, *cur, out=sbh(seed=3), backend=backend)
    assert all(seen is given for seen, given in zip(backend.seen, [*prev, *cur, *out], strict=True))
    assert "contiguous" not in caplog.text


def test_parts_of_larger_arrays_and_other_objects_of_one_view():
    """Whatever else it declares: neither runs nor halves reach it, and in place is what stands on one array."""
    backend = Strict()
    backend.capabilities = replace(NumPyBackend.capabilities, contiguous=True)
    assert not backend.capabilities.runs and not backend.capabilities.halves
    states = [tnd(6, 2, 16, seed=seed) for seed in (1, 2)]
    wide = [state._replace(attn_out=state.attn_out[..., ::2][..., :8]) for state in states]
    expected = rau.merge_states(wide, layout="TND", tokens=[0, 1, 4], backend="numpy")
    assert bits(rau.merge_states(wide, layout="TND", tokens=[0, 1, 4], backend=backend)) == bits(expected)

    class Reads(Strict):
        def update(self, problem, prev, cur, out):
            assert not problem.in_place or any(np.shares_memory(one, other) for one in out for other in (*prev, *cur))
            return super().update(problem, prev, cur, out)

    expected = rau.merge_states(states, layout="TND", backend="numpy")
    rows = np.concatenate([states[0].attn_out, states[0].attn_out], -1)
    prev = states[0]._replace(attn_out=rows[..., :16])
    out = states[0]._replace(attn_out=rows[..., :16])
    assert bits(rau.ring_attention_update(*prev, *states[1], [0, 6], "TND", out=out, profile="portable", backend=Reads())) == bits(
        expected
    )


def test_streams_of_parts():
    """A running state of which some tokens are merged, in place within larger arrays."""
    rings = [rau.StreamingMerge("BSND", backend=backend) for backend in (Strict(), "numpy")]
    rng = np.random.default_rng(0)
    for tokens, S in ((None, 8), ("back", 4), (slice(1, 7, 2), 3)):
        out, lse = rng.normal(size=(2, S, 3, 4)).astype("f4"), rng.normal(size=(2, 3, S)).astype("f4")
        for ring in rings:
            ring.update(*rau.AttentionState.from_lse(out, lse, base="e", layout="BSND"), tokens=tokens)
    mine, its = (ring.result() for ring in rings)
    assert bits(mine) == bits(its)
