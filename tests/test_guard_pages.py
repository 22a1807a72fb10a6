"""The compiled core touches no byte beyond its arrays: they lie against pages that nobody may touch."""

import os
import subprocess
import sys

import pytest
from patience import LIMIT

_core = pytest.importorskip("rau._core", reason="test_packaging.py fails where it should be there")

CODE = """
import ctypes, mmap, sys
import numpy as np, rau
from rau.testing.comparison import same_bits
try:
    import ml_dtypes
    dtypes = ("float32", "float16", "bfloat16", "float64")
except ImportError:
    dtypes = ("float32", "float16", "float64")

PAGE = mmap.PAGESIZE
mprotect = ctypes.CDLL(None, use_errno=True).mprotect
keep = []

def against(array, end):
    # The same array, its memory ending (or starting) where a page of no access starts (or ends).
    size = -(-array.nbytes // PAGE) * PAGE
    pages = mmap.mmap(-1, size + PAGE)
    whole = np.frombuffer(pages, np.uint8)
    keep.append((pages, whole))
    forbidden = whole.ctypes.data + (size if end else 0)
    assert mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(PAGE), 0) == 0
    first = size - array.nbytes if end else PAGE
    placed = whole[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    placed[...] = array
    return placed

def one_lane(stats, end):
    # Lane 0 alone of rows of 8 lanes: behind the last one there may be nothing.
    lanes = np.repeat(stats, 8, -1).reshape(-1)
    return np.lib.stride_tricks.as_strided(against(lanes[: lanes.size - 7], end), stats.shape, (*(8 * s for s in stats.strides[:-1]), 4))

rng = np.random.default_rng(0)
checked = 0
for dtype in dtypes:
    for head_dim in (1, 2, 7, 22, 33, 64, 100):
        for tokens, heads in ((1, 1), (3, 5), (16, 2), (37, 3)):
            for lanes in (8, 1):
                stats_dtype = "float64" if dtype == "float64" else "float32"
                def state():
                    attn = rng.standard_normal((tokens, heads, head_dim)).astype(dtype)
                    stats = [rng.uniform(1, 9, (tokens, heads, 1)).astype(stats_dtype) for _ in range(2)]
                    return rau.AttentionState(attn, *(np.repeat(one, lanes, -1) for one in stats))
                states = [state() for _ in range(3)]
                for end in (True, False):
                    def place(state):
                        stats = [one_lane(one, end) if lanes == 1 and dtype != "float64" else against(one, end) for one in state[1:]]
                        return rau.AttentionState(against(state.attn_out, end), *stats)
                    for count in (2, 3):
                        expected = rau.merge_states(states[:count], layout="TND", backend="numpy")
                        out = place(state())
                        rau.merge_states([place(one) for one in states[:count]], layout="TND", backend="cython", out=out)
                        different = same_bits(out, expected)
                        assert not different, (dtype, head_dim, tokens, heads, lanes, end, count, different)
                        checked += 1
print(checked)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect as Linux has it")
@pytest.mark.parametrize("simd", _core.simd_versions())
def test_nothing_beyond_an_array_is_touched(simd):
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=LIMIT * 10, env={**os.environ, "RAU_SIMD": simd}
    )
    assert done.returncode == 0, f"signal or error {done.returncode}\n{done.stderr}"
    assert int(done.stdout) > 500
