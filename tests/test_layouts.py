"""The block table against the address of every row, found by plain indexing in loops."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from patience import LIMIT
from states import state

import rau
import rau.rows
from rau.constraints import Options, bind
from rau.layouts import (
    ATTN,
    HEADS,
    LAYOUTS,
    MAX,
    SUM,
    TOKENS,
    block_terms,
    column,
    contiguous_strides,
    packed_row_stride,
    row_index,
)


def address(array, *index):
    from_there_on = array[(*index[:-1], slice(index[-1], None))]  # not a scalar, which would be elsewhere
    return from_there_on.__array_interface__["data"][0]


def rows_by_hand(layout, arrays, qlen, packed):
    """For each token and head of each sequence, the addresses of its rows: attn_out, max, sum, state after state."""
    found = []
    for attn, *stats in arrays:
        mine = []
        if layout == "TND" and packed:
            heads = attn.shape[1]
            for first, end in itertools.pairwise(qlen):
                for t in range(first, end):
                    for n in range(heads):
                        # (N, S_i) rows from row N * first on; (T, N) only names the flat order of rows.
                        flat = heads * first + n * (end - first) + (t - first)
                        place = divmod(flat, heads)
                        mine.append((address(attn, t, n, 0), *(address(part, *place, 0) for part in stats)))
        elif layout == "TND":
            for t, n in np.ndindex(attn.shape[:2]):
                mine.append((address(attn, t, n, 0), *(address(part, t, n, 0) for part in stats)))
        else:
            b_, n_, s_ = stats[0].shape[:3]
            for b in range(b_):
                for s in range(s_):
                    for n in range(n_):
                        if layout == "SBH":
                            row = address(attn, s, b, n * (attn.shape[2] // n_))
                        else:
                            row = address(attn, b, s, n, 0) if layout == "BSND" else address(attn, b, n, s, 0)
                        mine.append((row, *(address(part, b, n, s, 0) for part in stats)))
        found.append(mine)
    return found


def rows_of_table(table, arrays):
    """The same, read off the table as a kernel would."""
    found = []
    for operand, parts in enumerate(arrays):
        mine = []
        for line in table.tolist():
            for t in range(line[TOKENS]):
                for n in range(line[HEADS]):
                    row = []
                    for part, array in zip((ATTN, MAX, SUM), parts, strict=True):
                        offset, token, head = line[column(operand, part) :][:3]
                        base = array.__array_interface__["data"][0]
                        row.append(base + array.itemsize * (offset + t * token + n * head))
                    mine.append(tuple(row))
        found.append(mine)
    return found


@st.composite
def calls(draw):
    """Three operands of one layout: contiguous, with gaps, transposed or reversed, whatever may be streamed."""
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    packed = layout == "TND" and draw(st.booleans())
    b, n, d = (draw(st.integers(1, 3)) for _ in range(3))
    lengths = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    s = draw(st.integers(1, 4))
    qlen = np.concatenate([[0], np.cumsum(lengths)])
    tokens = int(qlen[-1])
    shape, stats = {
        "SBH": ((s, b, n * d), (b, n, s, 8)),
        "TND": ((tokens, n, d), (tokens, n, 8)),
        "BSND": ((b, s, n, d), (b, n, s, 8)),
        "BNSD": ((b, n, s, d), (b, n, s, 8)),
    }[layout]

    def strided(array, lasts):
        """A view with gaps on some axes, some of them reversed, in another order in memory."""
        if not draw(st.booleans()):
            return array
        axes = [*draw(st.permutations(range(array.ndim - 1))), array.ndim - 1]
        steps = [draw(st.sampled_from([1, 2, -1])) for _ in axes[:-1]] + [lasts]
        larger = np.zeros([array.shape[axis] * 2 + 1 for axis in axes], array.dtype)
        view = larger[tuple(slice(None, None, step) for step in steps)].transpose(np.argsort(axes))
        return view[tuple(slice(0, length) for length in array.shape)]

    def operand(out):
        parts = []
        for part, array in enumerate(state(shape, stats)):
            if part and packed:  # evenly spaced rows only
                wide = draw(st.sampled_from([8, 11]))
                parts.append(np.zeros((*array.shape[:2], wide), "f4")[..., :8][:: draw(st.sampled_from([1, -1]))])
                if packed_row_stride(parts[-1].shape, [step // 4 for step in parts[-1].strides]) is None:
                    parts[-1] = array
            else:
                parts.append(strided(array, 2 if part and not out and draw(st.booleans()) else 1))
        return parts

    return layout, packed, qlen, [operand(False), operand(False)], operand(True)


@given(calls())
def test_the_table_says_where_every_row_is(call):
    layout, packed, qlen, states, out = call
    problem, regular = bind(
        "", states, lambda k, field: "", qlen, Options(layout, "SBH" if packed else "TND", "portable", "metadata"), out
    )
    assert all(
        mine is its for old, new in zip(states, regular, strict=True) for mine, its in zip(old, new, strict=True)
    )
    arrays = [*states, out]
    table = problem.blocks
    assert table.dtype == np.int64
    assert table.shape == (len(table), 2 + 9 * 3)
    assert len(table) == (len(qlen) - 1 if packed else 1 if layout == "TND" else problem.B)
    expected = rows_by_hand(layout, arrays, qlen.tolist(), packed)
    assert rows_of_table(table, arrays) == expected
    # The same as one index, in the same order.
    for operand, parts in enumerate(arrays):
        for part, array in zip((ATTN, MAX, SUM), parts, strict=True):
            base = array.__array_interface__["data"][0]
            index = row_index(table, operand, part)
            assert (base + array.itemsize * index).tolist() == [row[part // 3] for row in expected[operand]]


@given(calls())
def test_a_fresh_result_is_contiguous(call):
    layout, packed, qlen, states, _ = call
    problem, _ = bind(
        "", states, lambda k, field: "", qlen, Options(layout, "SBH" if packed else "TND", "portable", "metadata"), None
    )
    fresh = [np.zeros(problem.shape, "f4"), np.zeros(problem.stats_shape, "f4"), np.zeros(problem.stats_shape, "f4")]
    expected = rows_by_hand(layout, [*states, fresh], qlen.tolist(), packed)
    assert rows_of_table(problem.blocks, [*states, fresh]) == expected
    if problem.T:
        assert problem.strides[6:] == tuple(tuple(step // 4 for step in part.strides) for part in fresh)


def test_a_table_written_out():
    """Packed, two heads, sequences of 2, 0 and 1 tokens, D = 5, as design and contract have it."""
    strides = [(10, 5, 1), (16, 8, 1), (16, 8, 1)] * 2
    table = block_terms("TND", True, (3, 3, 2, 5), np.array([0, 2, 2, 3]), strides).table()
    assert table.tolist() == [
        [2, 2, *[0, 10, 5, 0, 8, 16, 0, 8, 16] * 2],
        [0, 2, *[20, 10, 5, 32, 8, 0, 32, 8, 0] * 2],
        [1, 2, *[20, 10, 5, 32, 8, 8, 32, 8, 8] * 2],
    ]
    table = block_terms("SBH", False, (2, 3, 2, 5), None, [(20, 10, 1), (48, 24, 8, 1), (48, 24, 8, 1)] * 2).table()
    assert table.tolist() == [
        [3, 2, *[0, 20, 5, 0, 8, 24, 0, 8, 24] * 2],
        [3, 2, *[10, 20, 5, 48, 8, 24, 48, 8, 24] * 2],
    ]


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_no_rows_at_all(layout):
    rank = 3 if layout in ("SBH", "TND") else 4
    strides = [(0,) * rank, (0,) * (3 if layout == "TND" else 4), (0,) * (3 if layout == "TND" else 4)] * 2
    for lengths in ((0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4)):
        if layout == "TND" and lengths[0] != 2:
            continue
        assert row_index(block_terms(layout, False, lengths, None, strides).table(), 0, ATTN).tolist() == []
    if layout == "TND":
        assert len(block_terms("TND", True, (0, 0, 2, 4), np.array([0]), strides).table()) == 0


class NarrowIntegers:
    """NumPy as it is where its default integer has 32 bits: on 32-bit processors, and on Windows before NumPy 2."""

    intp = np.int32

    def __getattr__(self, name):
        return getattr(np, name)

    def arange(self, *bounds, dtype="i4"):
        return np.arange(*bounds, dtype=dtype)

    def array(self, values, dtype=None, **options):
        made = np.array(values, dtype, **options)
        return made.astype("i4") if dtype is None and made.dtype == np.int64 and not isinstance(values, np.ndarray) else made

    def flatnonzero(self, values):
        return np.flatnonzero(values).astype("i4")

    def repeat(self, values, counts, axis=None):
        assert np.can_cast(getattr(counts, "dtype", "i4"), "i4"), "to no integer that counts memory there"
        return np.repeat(values, counts, axis)


@pytest.mark.parametrize(
    "backend",
    [name for name in ("cython", "numpy") if name in {status.name for status in rau.registry.status() if status.available}],
)
def test_integers_of_32_bits_by_default(monkeypatch, backend):
    """Whatever NumPy makes of integers that nobody gave a type, the block table is int64."""
    calls = {
        "SBH": {}, "BSND": {}, "BNSD": {}, "TND": {"actual_seq_qlen": [0, 2, 6]},
        "packed": {"actual_seq_qlen": [0, 2, 6], "softmax_layout": "SBH"}, "mask": {"tokens": np.array([1, 0, 0, 1, 1, 0], bool)},
        "numbers": {"tokens": [5, 1]}, "slice": {"tokens": slice(0, 6, 2)}, "run": {"tokens": slice(2, 4)},
        "padded": {"actual_seq_qlen": [0, 1, 3], "cu_seqlens_padded": [0, 4, 6]},
    }  # fmt: skip
    results = []
    for narrow in (False, True):
        if narrow:
            for module in (
                rau.layouts,
                rau.lse,
                rau.rows,
                rau.problem,
                rau.constraints,
                rau.constraints.rows,
                rau.constraints.lengths,
            ):
                monkeypatch.setattr(module, "np", NarrowIntegers(), raising=False)
            rau.registry.refresh()  # and with it what is known of signatures
        for name, how in calls.items():
            layout = name if name in LAYOUTS else "TND"
            shapes = {"SBH": ((6, 2, 16), (2, 2, 6, 1)), "BSND": ((2, 6, 2, 8), (2, 2, 6, 1)), "BNSD": ((2, 2, 6, 8), (2, 2, 6, 1))}
            states = [state(*shapes.get(layout, ((6, 2, 8), (6, 2, 1))), "float32", seed) for seed in (1, 2)]
            results.append(rau.merge_states(states, layout=layout, backend=backend, **how))
    for wide, narrow in zip(results[: len(calls)], results[len(calls) :], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(wide, narrow, strict=True))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_contiguous_strides_are_those_of_numpy(shape):
    assert contiguous_strides(shape) == tuple(step // 4 for step in np.zeros(shape, "f4").strides)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(-20, 20), st.integers(-20, 20))
def test_packed_row_stride(tokens, heads, token, head):
    places = [t * token + n * head for t in range(tokens) for n in range(heads)]
    steps = {second - first for first, second in itertools.pairwise(places)}
    found = packed_row_stride((tokens, heads, 8), (token, head, 1))
    if len(steps) > 1:
        assert found is None
    elif steps:
        assert found == steps.pop()
    else:
        assert found is not None  # one row: any number will do


NEW = '''
import importlib.util, sys
import numpy as np

spec = importlib.util.spec_from_file_location("rau.layouts", sys.argv[1])
layouts = sys.modules["rau.layouts"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(layouts)
layouts.LAYOUTS["SBND"] = layouts.Layout("(S, B, N, D)", "(B, N, S, {lanes})", 1, 0, 2, 0, 2, 1)  # the entry
import rau
from rau.backends import Capabilities
from rau.backends.lse import LSEBackend

class Kernel(LSEBackend):
    name = "kernel"
    capabilities = Capabilities(array_types=("numpy:ndarray",), statistics="lse", unpromised=("two-empty", "payload"))

    def merge_lse(self, prev_out, prev_lse, cur_out, cur_lse):
        lse = np.logaddexp(prev_lse, cur_lse)
        prev, cur = np.exp(prev_lse - lse)[..., None], np.exp(cur_lse - lse)[..., None]
        return prev * prev_out + cur * cur_out, lse

S, B, N, D = 6, 2, 3, 8
rng = np.random.default_rng(0)
pairs = [(rng.standard_normal((S, B, N, D), "f4"), rng.standard_normal((B, N, S), "f4")) for _ in range(3)]
flat = [(out.reshape(S, B, N * D), lse) for out, lse in pairs]

def both(call):
    """The same call in the new layout and in SBH, whose rows lie alike."""
    found = []
    for layout, its in (("SBND", pairs), ("SBH", flat)):
        states = [rau.AttentionState.from_lse(*pair, base="e", layout=layout) for pair in its]
        found.append([np.asarray(part).ravel() for part in call(layout, states)])
    assert found[0] and all(np.array_equal(new, known) for new, known in zip(*found, strict=True))

def stream(layout, states):
    running = rau.StreamingMerge(layout, backend="numpy")
    running.update(*states[0])
    running.update(states[1].attn_out[3:], *(part[:, :, 3:] for part in states[1][1:]), tokens="back")
    return running.result()

for backend in (*sys.argv[2:], Kernel()):
    both(lambda layout, states: rau.merge_states(states, layout=layout, backend=backend))
both(stream)
both(lambda layout, states: [rau.merge_states(states, layout=layout, backend="numpy").lse(base="2", layout=layout)])
print("as SBH has it")
'''


def test_a_new_layout_is_a_new_entry():
    """docs/architecture.md: nothing else is needed for calls of it, by any kind of backend."""
    backends = [name for name in ("cython", "numpy") if name in {status.name for status in rau.registry.status() if status.available}]
    done = subprocess.run([sys.executable, "-c", NEW, rau.layouts.__file__, *backends], capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stdout) == (0, "as SBH has it\n"), done.stderr
