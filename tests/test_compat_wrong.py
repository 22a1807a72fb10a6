"""Peers' calls that are wrong in what their arrays are for: refused by name, and nothing is written before."""

import ml_dtypes
import numpy as np
import pytest

import rau
from rau.compat import flashinfer, vllm
from rau.compat import ring_flash_attention as ring_flash
from rau.compat import transformer_engine as te

B, S, N, D, T = 1, 4, 2, 8, 6


def ones(*shape):
    return np.ones(shape, np.float32)


def read_only(*shape):
    array = ones(*shape)
    array.flags.writeable = False
    return array


HALVES, ODD = np.array([0, 2, 6]), np.array([0, 3, 6])
CALLS = {  # what is called, what it is given, what it says
    "slice of nothing": (
        ring_flash.update_out_and_lse, [ones(B, S, N, D), ones(B, S, N, 1), ones(B, S, N, D), ones(B, N, S), "half"],
        "slice_ is 'half', and out, of shape (1, 4, 2, 8), has no such rows",
    ),
    "slice, read-only lse": (
        ring_flash.update_out_and_lse,
        [ones(B, S, N, D), read_only(B, S, N, 1), ones(B, S, N, D), ones(B, N, S), (slice(None), slice(None))],
        "lse is read-only; expected an array that may be written to",
    ),
    "max_seqlen too small": (ring_flash.unflatten_varlen_lse, [ones(T, N, 1), HALVES, 3], "max_seqlen is 3; expected an int, at least 4"),
    "max_seqlen no number": (ring_flash.unflatten_varlen_lse, [ones(T, N, 1), HALVES, 4.0], "max_seqlen is 4.0; expected an int"),
    "read-only running lse": (
        te.flash_attn_fwd_softmax_lse_correction, [read_only(B, N, S), ones(B, N, S)], "softmax_lse is read-only",
    ),
    "read-only output": (
        te.flash_attn_fwd_out_correction, [read_only(B, S, N, D), ones(B, S, N, D), ones(B, N, S), ones(B, N, S), 1], "out is read-only",
    ),
    "seq_dim": (
        te.flash_attn_fwd_out_correction, [ones(B, S, N, D), ones(B, S, N, D), ones(B, N, S), ones(B, N, S), 2],
        "seq_dim = 2; expected 0 for (S, B, N, D), or 1 for (B, S, N, D)",
    ),
    "seq_dim of halves": (
        te.flash_attn_fwd_second_half_out_correction, [ones(B, 2, S, N, D), ones(B, S, N, D), ones(B, N, 2 * S), ones(B, N, S), None],
        "seq_dim = None; expected 0 for (2, S, B, N, D), or 1 for (B, 2, S, N, D)",
    ),
    "read-only thd lse": (
        te.thd_second_half_lse_correction, [read_only(N, T), ones(N, T // 2), HALVES, True], "lse is read-only",
    ),
    "too few tokens": (
        te.thd_out_correction, [ones(T - 1, N, D), ones(T - 1, N, D), ones(2, N, 4), ones(2, N, 4), HALVES, False, False],
        "out has shape (5, 2, 8); expected room for 6 tokens",
    ),
    "too few tokens of a step": (
        te.thd_out_correction, [ones(T, N, D), ones(2, N, D), ones(2, N, 4), ones(2, N, 2), HALVES, True, False],
        "out_per_step has shape (2, 2, 8); expected room for 3 tokens",
    ),
    "halves of odd sequences, log-sum-exps": (
        te.thd_second_half_lse_correction, [ones(N, T), ones(N, T // 2), ODD, True], "cu_seqlens holds 3; expected multiples of 2",
    ),
    "halves of odd sequences": (
        te.thd_out_correction, [ones(T, N, D), ones(T // 2, N, D), ones(N, T), ones(N, T // 2), ODD, True, True],
        "cu_seqlens holds 3; expected multiples of 2",
    ),
    "tokens with context": (
        vllm.merge_attn_states, [ones(T, N, D), ones(T, N, D), ones(N, T), ones(T, N, D), ones(N, T), None, np.int64(T + 1)],
        f"prefill_tokens_with_context is {np.int64(T + 1)!r}; expected a number of tokens, from 0 to T = 6",
    ),
    "eight bits without a scale": (
        vllm.merge_attn_states, [ones(T, N, D).astype(ml_dtypes.float8_e4m3fn), ones(T, N, D), ones(N, T), ones(T, N, D), ones(N, T)],
        "output has dtype float8_e4m3fn, and output_scale is None; expected what it is divided by, a numpy array of float32.",
    ),
    "lists of outputs": (
        flashinfer.merge_states, [[ones(T, N, D)] * 2, ones(T, 2, N)],
        "v is of type list; expected an array (NumPy, or of a kind that a backend takes). It holds 2: pass one of them, or stack",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call, given, said", CALLS.values(), ids=CALLS)
def test_it_is_named_and_nothing_is_written(call, given, said):
    with pytest.raises(rau.ConstraintError) as error:
        call(*given)
    message = str(error.value)
    assert message.startswith(f"{call.__name__}: [") and said in message, message
    kept = [each for each in given if isinstance(each, (np.ndarray, list)) and each is not HALVES and each is not ODD]
    assert all((np.asarray(each) == 1).all() for each in kept)


def test_what_fits_is_taken():
    output, lse = ones(T, N, D), np.zeros((N, T), np.float32)
    vllm.merge_attn_states(output, 2 * output, lse, 4 * output, lse, None, np.int64(2))
    assert output[:, 0, 0].tolist() == [3, 3, 4, 4, 4, 4]
    padded = ring_flash.unflatten_varlen_lse(ones(T, N, 1), HALVES, np.int32(5))
    assert padded.shape == (2, N, 5) and np.isneginf(padded[0, 0]).tolist() == [False, False, True, True, True]
    assert ring_flash.unflatten_varlen_lse(ones(0, N, 1), np.array([0]), 0).shape == (0, N, 0)
