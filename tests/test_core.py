"""The compiled core: that it is there, its exponential, its floating-point mode, forks, threads, memory."""

import ctypes
import decimal
import math
import platform
import re
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from patience import LIMIT

import rau
from rau import arithmetic
from rau.arithmetic import difference, exp_nonpositive
from rau.testing.cases import Case
from rau.testing.comparison import same_bits

_core = pytest.importorskip("rau._core", reason="test_packaging.py fails where it should be there")


def python(code, **env):
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_exponential_is_as_good_as_promised():
    rng = np.random.default_rng(0)
    worst = float.fromhex("-0x1.bf1475b1bf86cp+7")  # of the Taylor polynomial that stood here before: 3.72
    x = np.concatenate([-rng.uniform(0, 708, 3000), -(10.0 ** rng.uniform(-320, 2, 1000)), [-708.0, 0.0, -0.0, worst]])
    got = exp_nonpositive(x)
    decimal.getcontext().prec = 50
    for xi, gi in zip(x.tolist(), got.tolist(), strict=True):
        exact = decimal.Decimal(xi).exp()
        assert abs(decimal.Decimal(gi) - exact) <= exact * decimal.Decimal(arithmetic.BOUND) * decimal.Decimal(2) ** -53, xi


def test_a_difference_keeps_what_it_loses():
    rng = np.random.default_rng(1)
    a, b = -(10.0 ** rng.uniform(-20, 20, (2, 1000)))
    d, lost = difference(np.minimum(a, b), np.maximum(a, b))
    for ai, bi, di, ei in zip(np.minimum(a, b).tolist(), np.maximum(a, b).tolist(), d.tolist(), lost.tolist(), strict=True):
        assert Fraction(ai) - Fraction(bi) == Fraction(di) + Fraction(ei)


def test_c_and_python_have_the_same_numbers():
    """The header is read as text: an agreement of bits shows a wrong digit only where it changes one."""
    header = Path(rau.__file__).with_name("csrc") / "weigh.h"
    if not header.exists():
        pytest.skip("an installed package has no C sources")
    body = header.read_text().partition("(exp_differences)(")[2].partition("\n}\n")[0]
    numbers = [float.fromhex(number) for number in re.findall(r"0x1[.\w]*p[+-]?\d+", body)]
    assert numbers[:12] == list(arithmetic.COEFFICIENTS)
    rest = [arithmetic.ROUND, arithmetic.LOG2_E, arithmetic.LN2_HIGH, arithmetic.LN2_LOW]
    assert numbers[12:] == rest and f"ALL({arithmetic.UNDERFLOW})" in body


def test_the_exponential_at_its_ends():
    x = np.array([0.0, -0.0, math.nextafter(-708.0, -math.inf), -1e300, -math.inf, math.nan])
    assert exp_nonpositive(x)[:5].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert math.isnan(exp_nonpositive(x)[5])


@pytest.mark.skipif(sys.platform != "linux", reason="fesetround by the number that Linux on x86-64 gives it")
def test_another_rounding_mode_changes_nothing_and_is_put_back():
    """Upward rounding, as another library may have left it: every worker sets its own mode."""
    import platform

    if platform.machine() != "x86_64":
        pytest.skip("FE_UPWARD has another number here")
    libm = ctypes.CDLL("libm.so.6")
    upward = 0x800
    case = Case(id="rounding-mode", tokens=700, heads=8, head_dim=64, out="given")
    reference = case.make().run("cython")
    call = case.make()
    assert libm.fesetround(upward) == 0
    try:
        result = call.run("cython")
        left = libm.fegetround()
    finally:
        libm.fesetround(0)
    assert left == upward
    assert not same_bits(reference, result)


def test_a_forked_child_completes_after_a_threaded_call():
    code = """
import os, rau, warnings
from rau import _core
from rau.testing.cases import Case
from rau.testing.comparison import same_bits
warnings.simplefilter("ignore", DeprecationWarning)
rau.set_num_threads(2)
case = Case(id="fork", tokens=2000, heads=8, head_dim=64)
reference = case.make().run("cython")
child = os.fork()
if child == 0:
    os._exit(0 if _core.forked() and not same_bits(reference, case.make().run("cython")) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert not _core.forked() and not same_bits(reference, case.make().run("cython"))
"""
    python(code)


def test_the_gil_is_released():
    """With switching by time turned off, another thread can run during the call only if the call lets it."""
    case = Case(id="gil", tokens=20000, heads=8, head_dim=64, out="given")
    call = case.make()
    inside, seen = threading.Event(), False

    def work():
        inside.set()
        for _ in range(5):
            call.run("cython")
        inside.clear()

    before, threads_before = sys.getswitchinterval(), rau.get_num_threads()
    rau.set_num_threads(1)  # without a parallel region, which might release it on its own account
    sys.setswitchinterval(1000.0)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        while thread.is_alive():
            seen |= inside.is_set()
            time.sleep(0)
    finally:
        sys.setswitchinterval(before)
        rau.set_num_threads(threads_before)
    thread.join()
    assert seen


def test_many_threads_may_call_at_once():
    cases = [Case(id=f"concurrent/{i}", tokens=300 + i, heads=4, head_dim=64, dtype="bfloat16") for i in range(8)]
    references = [case.make().run("numpy") for case in cases]
    wrong = []

    def work(case, reference):
        for _ in range(10):
            wrong.extend(same_bits(reference, case.make().run("cython")))

    workers = [threading.Thread(target=work, args=pair) for pair in zip(cases, references, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


MEMORY = """
import resource, numpy as np, rau
from rau import _core
rau.set_num_threads(2)
shape, stats = (8192, 1, 8 * 256), (1, 8, 8192, 8)
def state():
    wide = np.ones((8192, 2, 8 * 256), np.float32)
    return (wide[:, :1] if STRIDED else np.ones(shape, np.float32)), np.ones(stats, np.float32), np.ones(stats, np.float32)
prev, cur, out = state(), state(), state()
small = [a[:64] if a.ndim == 3 else a[:, :, :64] for a in prev]
rau.ring_attention_update(*small, *small)  # whatever is loaded on first use
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rau.ring_attention_update(*prev, *cur, out=out, backend="cython")
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
assert grown < prev[0].nbytes / 8, grown  # the output is 64 MiB
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux only")
@pytest.mark.parametrize("strided", [False, True])
def test_no_temporary_of_the_outputs_size(strided):
    python(f"STRIDED = {strided}\n{MEMORY}")


def test_an_override_of_the_simd_version_is_taken_and_a_wrong_one_told():
    code = "import rau; rau.registry.get('cython'); from rau import _core; print(_core.simd())"
    for version in _core.simd_versions():
        assert python(code, RAU_SIMD=version).strip() == version
    code += "; import os; del os.environ['RAU_SIMD']; rau.registry.refresh(); rau.registry.get('cython'); print(_core.simd())"
    assert python(code, RAU_SIMD="baseline").split() == ["baseline", _core.simd_versions()[-1]]
    code = """
import rau
try:
    rau.registry.get("cython")
except rau.BackendUnavailableError as error:
    print(error)
"""
    assert "RAU_SIMD = 'avx3': no version 'avx3'; this processor and build have baseline" in python(code, RAU_SIMD="avx3")


@pytest.mark.parametrize("which", range(3))
def test_a_block_table_of_other_numbers_is_refused(which):
    """By the core itself: it is given tables by whoever calls a backend, and follows them to addresses."""
    table = [np.zeros(2, np.int64), np.ones(2, np.int64), np.zeros((3, 2 + 3 * 9), np.int64)]
    arrays = tuple(np.zeros((1, 1, 8), np.float32) for _ in range(9))
    good = table[which]
    for wrong in (good.astype(np.int32), good.astype(float), good.astype(good.dtype.newbyteorder()), np.repeat(good, 2)[::2]):
        table[which] = wrong
        with pytest.raises(ValueError, match="a block table: expected contiguous arrays of int64"):
            _core.merge(*table, arrays, "float32", "float32", 1, 1, 8, 8, True, False, 1)


@pytest.fixture
def tuning():
    own = _core.tuning()
    yield own
    _core.tune(**own)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64", reason="Linux on x86 names what it has")
def test_the_processor_is_asked_right():
    """As the system has it, which also knows what it saves."""
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    needed = {
        "baseline": set(),
        "avx2": {"avx2", "f16c"},
        "avx512": {"avx2", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
    }
    assert _core.simd_versions() == [name for name, its in needed.items() if its <= flags]


@pytest.mark.parametrize("simd", _core.simd_versions())
@pytest.mark.parametrize("layout", ["SBH", "BNSD"])
@pytest.mark.parametrize("head_dim", [5, 32, 59, 1100])
def test_rows_around_the_cache_leave_their_neighbours_alone(head_dim, layout, simd, tuning):
    """The result stands at each distance from a vector's start, in an array with numbers before and behind."""
    case = Case(id="", layout=layout, tokens=23, heads=3, head_dim=head_dim, dtype="float32", states=3, profile="portable")
    call, best = case.make(), _core.simd()
    expected = call.case.call(call.states, None, "cython")
    try:
        _core.use_simd(simd)
        _core.tune(**tuning | {"stream_bytes": 0})
        for offset in range(17):
            around = np.full(expected.attn_out.size + 40, 7, np.float32)
            attn = around[offset:][: expected.attn_out.size].reshape(expected.attn_out.shape)
            out = rau.AttentionState(attn, *(np.empty_like(stats) for stats in expected[1:]))
            assert not same_bits(call.case.call(call.states, out, "cython"), expected)
            assert (around[:offset] == 7).all() and (around[offset + attn.size :] == 7).all()
    finally:
        _core.use_simd(best)


@pytest.mark.parametrize("simd", _core.simd_versions())
@pytest.mark.parametrize(
    "changed",
    [
        {"tile_bytes": 1}, {"tile_bytes": 4096}, {"stream_bytes": 0}, {"stream_bytes": 1 << 62}, {"rows_ahead": 5},
        {"worker_bytes": 1, "tile_bytes": 1 << 10, "stream_bytes": 0, "rows_ahead": 64},
    ],
)  # fmt: skip
def test_bits_do_not_depend_on_what_the_speed_is_tuned_by(changed, simd, tuning):
    cases = [
        Case(id=f"{dtype}{layout}{states}{head_dim}", layout=layout, tokens=77, lengths=(40, 0, 37), heads=3, head_dim=head_dim,
             dtype=dtype, states=states, profile="portable", statistics="empty", softmax_layout="SBH")
        for dtype in ("float32", "bfloat16", "float64") for layout in ("SBH", "TND") for states in (2, 5) for head_dim in (22, 40)
    ]  # fmt: skip
    calls = [case.make() for case in cases]
    best = _core.simd()

    def merged():
        return [call.case.call(call.states, None, "cython") for call in calls]

    expected = merged()
    try:
        _core.use_simd(simd)
        _core.tune(**tuning | changed)
        assert _core.tuning() == tuning | changed
        result = merged()
    finally:
        _core.use_simd(best)
    assert not [problem for mine, its in zip(result, expected, strict=True) for problem in same_bits(mine, its)]


@pytest.mark.parametrize("wrong", [{"tile_bytes": 0}, {"stream_bytes": -1}, {"worker_bytes": 0}, {"rows_ahead": 65}])
def test_what_nobody_can_tune(wrong, tuning):
    with pytest.raises(ValueError, match="tile_bytes and worker_bytes from 1"):
        _core.tune(**tuning | wrong)
    assert _core.tuning() == tuning


def test_threads_start_from_the_environment():
    assert python("import rau; print(rau.get_num_threads())", OMP_NUM_THREADS="3,1").strip() == "3"


@pytest.mark.xfail(
    _core.build()["compiler"].startswith("clang"), strict=False,
    reason="LLVM's OpenMP itself ends a program that is started so, every second time (version 14, a C program of two lines)",
)  # fmt: skip
def test_threads_where_the_environment_has_no_number_of_them():
    assert int(python("import rau; print(rau.get_num_threads())", OMP_NUM_THREADS="many")) >= 1


def test_the_number_of_threads_can_be_set():
    before = rau.get_num_threads()
    try:
        rau.set_num_threads(np.int64(5))
        assert rau.get_num_threads() == 5
    finally:
        rau.set_num_threads(before)


@pytest.mark.parametrize("states", [2, 3])
def test_more_heads_than_a_tile_holds_in_short_sequences(states):
    """Their statistics follow each other, but no tile has room for all the weights of a token."""
    differing = python(
        f"""
import numpy as np, rau
from rau.testing.comparison import same_bits

rng = np.random.default_rng(0)
heads = 40_000
def state():
    stats = (rng.uniform(1, 9, (2, heads, 1)).astype("f4") * np.ones(8, "f4") for _ in range(2))
    return rau.AttentionState(rng.standard_normal((2, heads, 1), dtype=np.float32), *stats)

states = [state() for _ in range({states})]
call = lambda backend: rau.merge_states(states, [0, 0, 1, 1, 2, 2], "TND", softmax_layout="SBH", backend=backend)
print(same_bits(call("cython"), call("numpy")))
"""
    )
    assert differing.strip() == "[]"


@pytest.mark.parametrize("version", _core.simd_versions())
@pytest.mark.parametrize("D", [40, 4], ids=["long rows", "rows shorter than a vector"])
def test_a_nan_stays_one_in_bfloat16_whatever_its_payload(version, D):
    # Rounding adds to the lower half of a number's bits: where that half of a NaN were set, it would carry into the sign.
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    payloads = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC0FFFF, 0x7F808001], np.uint32).view(np.float32)
    rows = np.array([0x7FFF, 0xFFFF, 0x7F81, 0xFFC0], np.uint16).view(bfloat16)

    def state(attn_out, total):
        return rau.AttentionState(attn_out, np.ones((1, 1, 4, 8), np.float32), np.repeat(total, 8).reshape(1, 1, 4, 8))

    plain = state(np.ones((4, 1, D), bfloat16), np.ones(4, np.float32))
    before = _core.simd()
    try:
        _core.use_simd(version)
        for other in (
            state(np.ones((4, 1, D), bfloat16), payloads),
            state(np.repeat(rows, D).reshape(4, 1, D), np.ones(4, np.float32)),
        ):
            for pair in ((plain, other), (other, plain)):
                merged = rau.merge_states(pair, backend="cython").attn_out
                assert np.isnan(merged.astype(np.float32)).all()
    finally:
        _core.use_simd(before)
