"""The cuda backend without a GPU: selection, what is compiled for which call, and values under Triton's interpreter."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import numpy as np
import pytest

import rau
from rau import registry
from rau.constraints import bind

if "cuda" in os.environ.get("RAU_TEST_BACKENDS", ""):  # asked for: an absence is a failure
    import torch
    import triton
else:
    torch = pytest.importorskip("torch", reason="torch is not installed and cuda was not asked for")
    triton = pytest.importorskip("triton", reason="triton is not installed and cuda was not asked for")
from rau.backends import cuda_kernel
from rau.backends.cuda_ import COMPILE, MAX_STATES, CudaBackend, row_axes

HERE = Path(__file__).parent


def python(*arguments, **variables):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAU_", "TRITON_INTERPRET"))}
    command, env = [sys.executable, *arguments], kept | variables
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=HERE.parent)


def without_a_device():
    """An instance as it would be on a machine with a GPU."""
    backend = CudaBackend.__new__(CudaBackend)
    backend._torch, backend._kernel, backend._alone = torch, cuda_kernel, nullcontext
    backend._rows, backend._by_integers, backend._plans, backend._compiled = 32, False, WeakKeyDictionary(), {}
    return backend


# ---- values -------------------------------------------------------------------------------------------------------


def test_values_under_the_interpreter():
    """Bit for bit cython's, and the oracle's within the bound: cuda_suite.py, in a process of its own."""
    suite = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", str(HERE / "cuda_suite.py")]
    run = python(*suite, TRITON_INTERPRET="1")
    assert run.returncode == 0 and " passed" in run.stdout and "skipped" not in run.stdout, run.stdout + run.stderr


def test_one_script_whose_backend_alone_changes():
    """examples/same_bits.py, as its docstring runs it; on a GPU --device changes too."""
    script = str(HERE.parent / "examples" / "same_bits.py")
    runs = {
        "unasked": python(script), "cython": python(script, "--backend", "cython"),
        "torch": python(script, "--backend", "torch"),
        "cuda": python(script, "--backend", "cuda", TRITON_INTERPRET="1"),
    }  # fmt: skip
    for name, run in runs.items():
        assert run.returncode == 0, name + run.stderr
        assert run.stdout == runs["cython"].stdout and len(set(run.stdout.split("\n"))) == 10, name + run.stdout


# ---- selection ----------------------------------------------------------------------------------------------------

STATUS = "import rau; print({status.name: status.reason for status in rau.registry.status()}['cuda'])"
REGISTER = (
    "import rau; from rau.backends.cuda_ import CudaBackend\n"
    "if 'cuda' not in rau.registry.names(): rau.registry.register(CudaBackend)\n"
)


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("sys.modules['torch'] = None", r"torch is missing: pip install 'ring-attention-update\[cuda\]'"),
        ("sys.modules['triton'] = None", r"triton is missing .* pip install 'ring-attention-update\[cuda\]'"),
        ("import triton; triton.__version__ = '3.3.1'", r"triton 3\.3\.1 does not compile the kernel; expected 3\.4 or newer"),
        ("import triton; triton.__version__ = '3.4.0+git1'", r"torch \S+ finds no CUDA device"),
        ("", r"torch \S+ finds no CUDA device: (check the driver|it was built for CPUs only)"),
    ],
    ids=["torch", "triton", "old-triton", "triton-3.4", "device"],
)
def test_what_is_missing(before, expected):
    run = python("-c", f"import sys; {before}\n{REGISTER}{STATUS}", CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 0 and re.search(expected, run.stdout), run.stdout + run.stderr


def on_a_gpu(**options):
    """Explain a call of tensors that say they are on a GPU, and have no values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        state = [torch.empty(shape, device="cuda") for shape in ((4, 2, 24), (2, 3, 4, 8), (2, 3, 4, 8))]
        return rau.explain(*state, *state, **options)


def test_tensors_on_a_gpu_choose_it():
    with registry.provisionally(without_a_device()):
        found = on_a_gpu()
        assert (found.selected, found.origin) == ("cuda", "automatic")
        assert on_a_gpu(backend="torch").selected == "torch"
        assert "device cuda:0 is not one of cpu" in on_a_gpu(backend="cython").failure


def test_without_it_they_choose_torch():
    code = f"{REGISTER}from test_cuda import on_a_gpu; print(on_a_gpu())"
    run = python("-c", code, PYTHONPATH=str(HERE), RAU_BLOCK="cuda")
    assert "runs on torch (automatic)" in run.stdout, run.stdout + run.stderr
    assert re.search(r"cuda: .*takes these arrays; not available|cuda: not available", run.stdout), run.stdout


def test_lengths_on_the_host_cannot_be_part_of_a_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    problem = SimpleNamespace(actual_seq_qlen=np.array([0, 4]), device="cuda:0")
    with pytest.raises(rau.UnsupportedError, match="as a tensor of int64 on cuda:0"):
        without_a_device()._lengths(problem)


# ---- what is compiled ---------------------------------------------------------------------------------------------


@pytest.fixture
def compile_for(monkeypatch):
    """Compile as a launch would, for a device that is not there."""

    def prepare(architecture):
        target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
        stub = SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: architecture,  # each has a cache of its own
            get_current_stream=lambda device: 0,
        )
        monkeypatch.setattr(triton.runtime.driver, "_active", stub)
        cache = cuda_kernel.merge.device_caches
        cache.pop(architecture, None)

        def compiled(problem, arrays, lengths=None):
            plan, aligned, arguments = without_a_device().launch(problem, arrays, lengths)
            return cuda_kernel.merge.warmup(*arguments, grid=plan.grid, **plan.constants[aligned], **COMPILE)

        return compiled, lambda: len(cache[architecture][0])

    return prepare


def call(layout="SBH", B=2, S=40, N=3, D=64, dtype="float32", cur_dtype="", K=2, lanes=8, qlen=None, make=torch.zeros):
    """Describe a call on arrays that `make` makes, of a shape and a dtype."""
    shape, stats = {
        "SBH": ((S, B, N * D), (B, N, S, lanes)), "TND": ((S, N, D), (S, N, lanes)),
        "BSND": ((B, S, N, D), (B, N, S, lanes)), "BNSD": ((B, N, S, D), (B, N, S, lanes)),
    }[layout]  # fmt: skip
    wide = torch.float64 if dtype == "float64" else torch.float32
    states = []
    for k in range(K + 1):
        narrow = getattr(torch, dtype if k in (0, K) else cur_dtype or dtype)
        states.append([make(shape, dtype=narrow), *(make(stats, dtype=wide) for _ in "ml")])
    order = "SBH" if qlen else "TND"
    into = states[K] if states[K][0].device.type == "cpu" else None
    problem, _ = bind("call", states[:K], lambda k, field: "", qlen, layout, order, into, "portable", "metadata")
    lengths = torch.tensor(qlen) if qlen else None
    return problem, [array for state in states for array in state], lengths


def resources(kernel, folder):
    """Registers and bytes of stack, where spilled ones go."""
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", folder / "kernel.cubin"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", shown)[1]) for name in ("REG", "STACK"))


MIXED = [("float32", "bfloat16"), ("float32", "float16")]
ALONE = [(dtype, "") for dtype in ("float32", "float16", "bfloat16", "float64")]
OPERATION = re.compile(r"^\s+(?:@!?%p\d+ )?((?:fma|mad|add|sub|mul|div|rcp|ex2)\.\S*f(?:32|32x2|64))\s", re.MULTILINE)


@pytest.mark.parametrize(
    ("architecture", "dtype", "cur_dtype"),
    [*((90, *dtypes) for dtypes in ALONE + MIXED), *((arch, *dtypes) for arch in (80, 100) for dtypes in ALONE[::2])],
)
def test_arithmetic_and_registers(compile_for, tmp_path, architecture, dtype, cur_dtype):
    """Nothing fused, IEEE divisions, subnormals kept, no register spilled, loads of 16 bytes where rows allow them."""
    compiled, _ = compile_for(architecture)
    for K, D in [(2, 128), (MAX_STATES, 128), (2, 19), (MAX_STATES, 19)] if architecture == 90 else [(2, 128)]:
        kernel = compiled(*call(dtype=dtype, cur_dtype=cur_dtype, D=D, K=K))
        code = kernel.asm["ptx"]
        operations = set(OPERATION.findall(code))
        kinds = {operation.removesuffix("x2") for operation in operations}
        wide = "f64" if dtype == "float64" else "f32"
        assert {f"mul.rn.{wide}", f"add.rn.{wide}", "div.rn.f64"} <= kinds, operations
        assert all(re.fullmatch(r"(add|sub|mul|div)\.rn\.f(32|64)", kind) for kind in kinds), operations
        assert "fma" not in code and ".ftz" not in code
        registers, stack = resources(kernel, tmp_path)
        assert registers <= COMPILE["maxnreg"] and not stack, (K, D, registers, stack)
        assert bool(re.search(r"ld\.global\.v[24]\.", code)) == (D == 128)


def test_packed_statistics_compile(compile_for, tmp_path):
    compiled, _ = compile_for(90)
    kernel = compiled(*call("TND", D=64, dtype="bfloat16", qlen=[0, 13, 40]))
    assert not resources(kernel, tmp_path)[1]


def test_no_size_and_no_stride_is_compiled_in(compile_for):
    compiled, count = compile_for(90)
    sizes = [
        {"S": 1, "B": 1, "N": 1}, {"S": 16}, {"S": 17, "N": 16}, {"B": 1}, {"D": 40}, {"D": 56}, {"S": 2, "N": 64}, {"layout": "TND"}, {"layout": "BSND"}, {"layout": "BNSD", "S": 33}, {"S": 4096},
    ]  # fmt: skip
    for size in sizes:
        compiled(*call(**size))
    compiled(*call(make=lambda shape, dtype: torch.zeros(2 * shape[0], *shape[1:], dtype=dtype)[::2]))
    compiled(*call(make=lambda shape, dtype: torch.zeros(shape[0], 3, *shape[1:], dtype=dtype)[:, 1]))
    compiled(*call(S=1 << 32, make=lambda shape, dtype: torch.empty(shape, dtype=dtype, device="meta")))
    assert count() == 1
    for D in (72, 128, 1024):
        compiled(*call(D=D))
    assert count() == 2, "one more for each power of 2 that holds a row, up to 512 bytes"
    compiled(*call(D=39))
    compiled(*call(D=41, S=7))
    assert count() == 3, "one more where rows are not aligned to 16 bytes"
    for lengths in ([0, 40], [0, 1, 2, 40], [0, 16, 16, 40]):
        compiled(*call("TND", qlen=lengths))
    assert count() == 4, "one more for packed statistics"


def test_axes():
    """The longest runs that all arrays share, and programs that are full."""

    def lengths(**sizes):
        return [length for length, _ in row_axes(call(**sizes)[0], 32)]

    assert lengths() == [1, 6, 40]  # SBH: batch and heads are one axis
    assert lengths(layout="TND") == [1, 1, 120]
    assert lengths(layout="BNSD") == [1, 1, 240]
    assert lengths(layout="BSND") == [2, 3, 40]
    assert lengths(layout="BSND", S=1, B=5) == [1, 1, 15]
    assert lengths(S=4, N=50) == [1, 4, 100]
    assert lengths(layout="TND", qlen=[0, 40]) == [1, 3, 40]
    assert lengths(S=1, B=1, N=1) == [1, 1, 1]


def test_words():
    """Every number is odd and takes 64 bits, so that Triton sees a type and nothing else; the kernel undoes that."""
    for number in (0, 1, 16, (1 << 31) - 1, 1 << 31, 1 << 57):
        word = cuda_kernel.word(number)
        assert word % 2 and 1 << 62 <= word < 1 << 63
        assert (word & cuda_kernel.WORD.value) >> 1 == number
