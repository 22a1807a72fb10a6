"""Halves of sequences by the cuda backend's kernel, under Triton's interpreter: test_streaming_cuda.py runs this."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cuda_suite import HOSTILE
from running import Chain, half, joined, laid_out, on_host, own, partial, same

import rau
from rau.arrays.torch_ import TorchKind
from rau.backends import cuda_kernel

LENGTHS = (4, 4, 0, 6, 68, 2)
ENDS = np.cumsum([0, *LENGTHS])
N, D = 3, 16
TOKENS = 12


def ring_of(lengths, packed, dtype, like):
    order = "SBH" if packed else "TND"
    ring = rau.StreamingMerge("TND", actual_seq_qlen=lengths, softmax_layout=order, backend="cuda")
    ring.update(*own(rau.registry.get("cuda"), like))
    return ring


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("packed", [False, True], ids=["token-major", "packed"])
@pytest.mark.parametrize("where", ["host", "device"])
def test_halves_are_found(monkeypatch, where, packed, dtype):
    """In one launch each, also where nobody but the device knows the lengths."""
    backend = rau.registry.get("cuda")
    lengths = torch.tensor(ENDS)
    if where == "device":  # as for a tensor on a GPU: nobody reads it
        monkeypatch.setattr(TorchKind, "readable", lambda self, array: False)
    chains = [Chain(1, S, N, D, dtype) for S in LENGTHS]
    ring = None
    launches = []
    monkeypatch.setattr(backend, "launch", lambda *rest: (launches.append(rest[0]), type(backend).launch(backend, *rest))[1])
    for seed, tokens in enumerate([None, "back", "front"]):
        parts = []
        for index, (S, chain) in enumerate(zip(LENGTHS, chains, strict=True)):
            place = slice(None) if tokens is None else half(tokens, S)
            cur = partial(1, len(range(S)[place]), N, D, dtype, 10 * seed + index)
            chain.update(cur, place)
            parts.append(laid_out(cur, "TND", packed))
        if ring is None:
            ring = ring_of(lengths, packed, dtype, joined(parts))
        else:
            ring.update(*own(backend, joined(parts)), tokens=tokens)
    same(on_host(backend, ring.result()), joined([laid_out(chain.state, "TND", packed) for chain in chains]))
    assert [problem.half for problem in launches] == [None, "back", "front"]
    assert all((problem.blocks is None) == (where == "device") for problem in launches[1:])


@triton.jit
def places(tokens_, rows, lengths, sequences, steps, tokens, heads, HALF: tl.constexpr, PACKED: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * 32 + tl.arange(0, 32)
    valid = token < tokens
    head = tl.program_id(1).to(tl.int64)
    own, place = cuda_kernel._halves(lengths, sequences, steps, token, tokens, head, heads, valid, HALF, PACKED)
    tl.store(tokens_ + token * heads + head, own, mask=valid)
    tl.store(rows + token * heads + head, place, mask=valid)


@pytest.mark.parametrize("packed", [False, True], ids=["token-major", "packed"])
@pytest.mark.parametrize("which", ["front", "back"])
@pytest.mark.parametrize("lengths", HOSTILE, ids=str)
def test_lengths_cannot_lead_outside(lengths, which, packed):
    own, rows = torch.full((TOKENS * N,), -1), torch.full((TOKENS * N,), -1)
    count = len(lengths) - 1
    with np.errstate(over="ignore"):
        places[(1, N)](
            own, rows, torch.tensor(lengths), count, (count + 1).bit_length(), TOKENS, N, HALF=which, PACKED=packed
        )
    assert int(own.min()) >= 0 and int(own.max()) < 2 * TOKENS
    assert int(rows.min()) >= 0 and int(rows.max()) < 2 * TOKENS * (N if packed else 1)


@pytest.mark.parametrize("packed", [False, True], ids=["token-major", "packed"])
def test_nobody_waits_for_the_device(monkeypatch, packed):
    """So that a ring can be captured into a CUDA graph, from its first step to its result."""
    backend = rau.registry.get("cuda")
    lengths = torch.tensor(ENDS)
    whole, part = (
        own(backend, laid_out(partial(1, size, N, D, "bfloat16"), "TND")) for size in (int(ENDS[-1]), int(ENDS[-1]) // 2)
    )
    monkeypatch.setattr(TorchKind, "readable", lambda self, array: False)
    monkeypatch.setattr(backend, "merge", lambda problem, states, out: out)

    def waits(*arguments, **options):
        raise AssertionError("somebody waits for the device")

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    ring = rau.StreamingMerge("TND", actual_seq_qlen=lengths, softmax_layout="SBH" if packed else "TND", backend="cuda")
    ring.update(*whole)
    ring.update(*part, tokens="back")
    ring.update(*part, tokens="front")
    assert ring.result(torch.bfloat16).attn_out.dtype == torch.bfloat16
