"""Halves of sequences on a GPU, without one: what is compiled, and values under Triton's interpreter."""

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="triton is not installed")

import numpy as np
import torch
from running import laid_out, own, partial
from test_cuda import HERE, compile_for, python, resources  # noqa: F401 - a fixture too

import rau
from rau.constraints import Options, bind


def test_values_under_the_interpreter():
    suite = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", str(HERE / "cuda_streaming_suite.py")]
    run = python(*suite, TRITON_INTERPRET="1")
    assert run.returncode == 0 and " passed" in run.stdout and "skipped" not in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize("order", ["TND", "SBH"])
def test_halves_compile(compile_for, order):  # noqa: F811
    """Once for each half, whatever the sizes; nothing fused, no register spilled."""
    compiled, count = compile_for(90)
    backend = rau.registry.get("torch")
    for which in ("front", "back"):
        for ends in ([0, 4, 40], [0, 2, 2, 2, 64]):
            lengths = np.array(ends) // 2
            running, cur = (
                own(backend, laid_out(partial(1, tokens, 4, 64, dtype), "TND"))
                for tokens, dtype in ((ends[-1], "float32"), (ends[-1] // 2, "bfloat16"))
            )
            places = [part[: ends[-1] // 2] for part in running]
            problem, _ = bind(
                "", (places, cur), lambda k, field: "", lengths, Options("TND", order, "portable", "metadata"), places, which
            )  # fmt: skip
            kernel, _ = compiled(problem, [*running, *cur, *running], torch.tensor(lengths))
            assert "fma" not in kernel.asm["ptx"]
            registers, stack = resources(kernel)
            assert registers <= 255 and not stack
    assert count() == 2
