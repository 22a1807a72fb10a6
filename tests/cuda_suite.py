"""The cuda backend's kernel under Triton's interpreter: on the CPU, and bit for bit what a GPU is to compute.

The interpreter is chosen before Triton is imported, so these tests have a process of their own. test_cuda.py starts it;
by hand: TRITON_INTERPRET=1 python -m pytest tests/cuda_suite.py
"""

import os

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import rau
from rau import registry
from rau.backends import cuda_kernel
from rau.backends.cuda_ import MAX_STATES, CudaBackend
from rau.backends.torch_ import packed_rows
from rau.constraints import Options, bind
from rau.testing.cases import Case, generated, named
from rau.testing.comparison import same_bits
from rau.testing.conformance import check_backend
from rau.testing.differential import run_differential

assert os.environ.get("TRITON_INTERPRET") == "1", "TRITON_INTERPRET=1 has to be set before Python starts"

CUDA = CudaBackend()


def affordable(case):
    """Tell whether a case takes a second at most: a program takes some 20 ms, and more for each piece of a row."""
    pieces = 1 + case.head_dim // 16
    return case.tokens * case.batch * case.heads * pieces * case.states <= 2500


def differences(cases):
    report = run_differential(["cython", CUDA], cases)
    assert report.standings["cuda"].cases, "nothing was run"
    return "" if report.passed else str(report)


GROUPS = sorted({case.id.partition("/")[0] for case in named() if affordable(case)})


@pytest.mark.parametrize("group", GROUPS)
def test_named_cases(group):
    cases = [case for case in named() if case.id.startswith(f"{group}/") and affordable(case)]
    if group == "statistics":  # the same in every dtype but one
        cases = [case for case in cases if case.dtype in ("float64", "bfloat16")]
    assert not differences(cases)


def test_generated_cases():
    assert not differences(case for case in generated(4, 50) if affordable(case))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("K", [1, 2, 3, 5, 8])
def test_number_of_states(K, dtype):
    """Each is compiled apart, and so are aligned rows and others, 8 lanes and 1."""
    common = {"tokens": 7, "heads": 3, "states": K, "dtype": dtype, "statistics": "empty", "out": "given"}
    sizes = [(16, 1), (19, 8)] if K % 2 else [(16, 8), (19, 1)]
    assert not differences(
        Case(id=f"K/{K}-{dtype}-{lanes}-{D}", head_dim=D, lanes=lanes, **common) for D, lanes in sizes
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_of_minus_zero_adds_nothing(dtype):
    """A negative sum far below: its product would be 0.0, and -0.0 the right answer."""
    near = torch.full((1, 1, 16), -0.0).to(dtype), torch.zeros(1, 1, 1, 8), torch.ones(1, 1, 1, 8)
    far = torch.full((1, 1, 16), torch.nan).to(dtype), torch.full((1, 1, 1, 8), -200.0), -torch.ones(1, 1, 1, 8)
    for states in ((near, far), (far, near)):
        merged = rau.ring_attention_update(*states[0], *states[1], backend=CUDA)
        expected = rau.ring_attention_update(*states[0], *states[1], backend="cython")
        assert merged.attn_out.signbit().all() and all(map(torch.equal, merged, expected))


def test_sums_that_add_up_beyond_float64():
    """Their shares are right all the same."""
    total = torch.full((1, 1, 1, 8), 1.5e308, dtype=torch.float64)
    state = torch.randn(1, 1, 16, dtype=torch.float64), torch.zeros_like(total), total
    merged = rau.ring_attention_update(*state, *state, profile="portable", backend=CUDA)
    assert torch.equal(merged.attn_out, state[0]) and merged.softmax_sum.isinf().all()


def test_more_states_than_the_kernel_takes():
    assert not differences([Case(id="many", tokens=5, states=MAX_STATES + 1, statistics="empty", dtype="bfloat16")])


@pytest.mark.parametrize(
    "select", ["calls/*", "autograd/*", "algebra/eight-bits-*e4m3fn", "algebra/some-tokens-bfloat16", "algebra/states-by-row-float32", "algebra/sinks-float16"]
)
def test_what_is_no_case(select):
    report = check_backend(CUDA, cases=[], select=select)
    assert report.passed and report.succeeded and not report.excluded, str(report)


def test_not_chosen_unasked():
    state = [torch.ones(2, 1, 4), torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 8)]
    with registry.provisionally(CUDA):
        assert rau.explain(*state, *state).selected == "cython"
        assert rau.explain(*state, *state, backend="cuda").selected == "cuda"


def test_the_operator_differentiates_it():
    def gradients(backend):
        generator = torch.Generator().manual_seed(1)
        parts = [torch.rand(shape, generator=generator) for shape in ((3, 1, 8), (1, 2, 3, 8), (1, 2, 3, 8)) * 2]
        parts = [part.requires_grad_() for part in parts]
        with registry.provisionally(CUDA):
            result = rau.ring_attention_update(*parts, backend=backend)
        sum((part * part).sum() for part in result).backward()
        return [part.grad for part in parts]

    assert all(map(torch.equal, gradients("cuda"), gradients("torch")))


def test_autograd_hears_of_a_result_in_place():
    state = [torch.ones(2, 1, 4), torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 8)]
    factor = torch.ones(2, 1, 4, requires_grad=True)
    product = factor * state[0]
    with torch.no_grad():
        rau.ring_attention_update(*state, *[part.clone() for part in state], out=state, backend=CUDA)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


# ---- bfloat16 by integers -----------------------------------------------------------------------------------------


@triton.jit
def convert(source, target, dtype: tl.constexpr, narrow: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    values = tl.load(source + at)
    tl.store(target + at, cuda_kernel._narrow(values, dtype, True) if narrow else cuda_kernel._widen(values, dtype))


def test_all_of_bfloat16_is_widened():
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    wide = torch.empty(1 << 16)
    convert[(1,)](every, wide, dtype=tl.float32, narrow=False, SIZE=1 << 16)
    assert torch.equal(wide.view(torch.int32), every.view(torch.int16).to(torch.int32) << 16)


def test_rounding_to_bfloat16():
    """To nearest even, subnormals and overflow included; a NaN stays one, a GPU's 0x7FFFFFFF too."""
    rng = np.random.default_rng(0)
    bits = rng.integers(-(1 << 31), 1 << 31, 1 << 16).astype(np.int32)
    bits[1::2] = bits[1::2] >> 16 << 16 | rng.choice([0x7FFF, 0x8000, 0x8001], 1 << 15)  # ties and their neighbours
    bits[:4] = [0x7FFFFFFF, -1, 0x7F7FFFFF, 0x7F800000]
    values, rounded = torch.from_numpy(bits).view(torch.float32), torch.empty(1 << 16, dtype=torch.bfloat16)
    convert[(1,)](values, rounded, dtype=tl.bfloat16, narrow=True, SIZE=1 << 16)
    expected = values.to(torch.bfloat16)
    same = rounded.view(torch.int16) == expected.view(torch.int16)
    assert (same | (rounded.isnan() & expected.isnan())).all()


# ---- lengths on a device: nobody has looked at them ---------------------------------------------------------------

TOKENS, HEADS = 12, 3
HOSTILE = [
    [0, 9, 3, 12], [5, 1 << 62, -(1 << 62), 12], [0, 0, 0, 0], [12, 12, 12, 12], [-5, -4, -3, -2], [100, 200, 300, 400],
    [(1 << 63) - 1] * 4, [-(1 << 63), (1 << 63) - 1, -(1 << 63), (1 << 63) - 1], [7], [1 << 62], [-9],
]  # fmt: skip


@triton.jit
def packed_places(places, lengths, sequences, steps, tokens, heads, ROWS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = token < tokens
    head = tl.program_id(1).to(tl.int64)
    place = cuda_kernel._packed(lengths, sequences, steps, token, tokens, head, heads, valid)
    tl.store(places + token * heads + head, place, mask=valid)


def places(lengths, around, tokens=TOKENS, heads=HEADS):
    """Where the kernel looks for the rows of packed statistics, in the order of the output's rows."""
    memory = torch.full((len(lengths) + 16,), around)
    memory[8:-8] = torch.tensor(lengths)
    result, count = torch.full((tokens * heads,), -1), len(lengths) - 1
    with np.errstate(over="ignore"):
        packed_places[(-(-tokens // 32), heads)](
            result, memory[8:-8], count, (count + 1).bit_length(), tokens, heads, ROWS=32
        )
    return result


@pytest.mark.parametrize("lengths", HOSTILE, ids=str)
def test_lengths_cannot_lead_outside(lengths):
    found = places(lengths, around=0)
    assert int(found.min()) >= 0 and int(found.max()) < TOKENS * HEADS
    assert torch.equal(found, places(lengths, around=11)), "what lies beside the lengths was read"


@pytest.mark.parametrize("sizes", [(12,), (0, 5, 0, 0, 7, 0), (1,) * 40, (33, 0, 1, 64), (0,) * 9 + (3,)], ids=str)
def test_bisection(sizes):
    lengths = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    expected = packed_rows(lengths, sum(sizes), 2, torch.device("cpu"))
    assert torch.equal(places(lengths, around=0, tokens=sum(sizes), heads=2), expected)


def packed_call(seed=0):
    rng = np.random.default_rng(seed)
    make = [(TOKENS, HEADS, 16), (TOKENS, HEADS, 8), (TOKENS, HEADS, 8)]
    return [rau.AttentionState(*(torch.from_numpy(rng.random(s, np.float32)) for s in make)) for _ in range(2)]


def merged(states, lengths, out=None):
    """Merge with lengths that the validator does not see, as those on a GPU."""
    problem, _ = bind("merge", states, lambda k, field: "", [0, 5, 12], Options("TND", "SBH", "portable", "metadata"), out)
    vars(problem)["actual_seq_qlen"] = lengths
    return CUDA.merge(problem, states, out)


INT64 = torch.tensor([0, 5, 12])


@pytest.mark.parametrize("lengths", [INT64, INT64.int(), INT64.repeat_interleave(2)[::2]], ids=["64", "32", "strided"])
def test_lengths_as_a_tensor(lengths):
    states = packed_call()
    expected = rau.ring_attention_update(*states[0], *states[1], [0, 5, 12], "TND", softmax_layout="SBH",
                                         profile="portable", backend="cython")  # fmt: skip
    assert not same_bits([part.numpy() for part in merged(states, lengths)], [part.numpy() for part in expected])


@pytest.mark.parametrize("lengths", HOSTILE, ids=str)
def test_hostile_lengths_write_nothing_elsewhere(lengths):
    states, rooms, out = packed_call(), [], []
    for part in states[0]:
        room = torch.full((part.numel() + 64,), 7.0)
        rooms.append(room)
        out.append(room[32:-32].view(part.shape))
    merged(states, torch.tensor(lengths), rau.AttentionState(*out))
    assert all((room[:32] == 7).all() and (room[-32:] == 7).all() for room in rooms)
