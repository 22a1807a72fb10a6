"""rau.compat, a module a peer: their own cases, by the shapes they document, against a softmax in float64 written out here.

On NumPy arrays and torch tensors, with every backend under test. No peer is needed, and none is imported. docs/migration.md is run here too.
"""

import importlib
import inspect
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import BACKENDS
from pages import blocks

import rau
from rau.compat import (
    flash_attn,
    flashinfer,
    ring_flash_attention,
    sglang,
    torch_,
    transformer_engine,
    vllm,
    xformers,
)

if "torch" in os.environ.get("RAU_TEST_BACKENDS", ""):
    import torch  # asked for: its absence is a failure
else:
    try:
        import torch
    except ImportError:
        torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed and was not asked for")

PEERS = ["flash_attn", "flashinfer", "ring_flash_attention", "sglang", "torch_", "transformer_engine", "vllm", "xformers"]
INF, NAN = np.inf, np.nan
# Half a unit in the last place of a rounded output; the weights carry the rounding of log-sum-exps to float32.
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
NOISE = 4e-6


class Way:
    """Arrays of a library, and the backend that merges them."""

    def __init__(self, backend, library):
        self._backend = rau.registry.get("torch" if library == "torch" else backend)

    def __call__(self, array, dtype="float32"):
        return self._backend.asarray(np.array(array, getattr(ml_dtypes, dtype, dtype), order="C"))

    def host(self, array):
        return np.array(self._backend.to_numpy(array))

    def bits(self, *arrays):
        return [self.host(array).tobytes() for array in arrays]


# Backends are given arrays of their own, and those that take NumPy's are given tensors as well.
# Not those that write into no array, as some of the peers' calls do.
WAYS = [(name, "own") for name in BACKENDS if rau.registry.capabilities(name).out]
WAYS += [(name, "torch") for name in BACKENDS if torch is not None and name in ("cython", "numpy")]


@pytest.fixture(params=WAYS, ids="-".join)
def way(request):
    with rau.use_backend(request.param[0]):
        yield Way(*request.param)


def parts(*shape, count=2, dtype="float32"):
    """Outputs and log-sum-exps with a row for each of `shape` but its last axis, rounded to `dtype`.

    Some rows of each part see no key, row 0 in none of them. There its output is NaN, which nobody may read.
    """
    rng = np.random.default_rng(0)
    outs = rng.standard_normal((count, *shape)).astype(getattr(ml_dtypes, dtype, dtype)).astype("f8")
    lses = (3 * rng.standard_normal((count, *shape[:-1]))).astype("f4").astype("f8")
    blind = rng.random(lses.shape) < 0.15
    blind.reshape(count, -1)[:, 0] = True
    outs[blind], lses[blind] = NAN, -INF
    return outs, lses


def softmax(outs, lses, base="e"):
    """The attention over all the keys, in float64; rows without any are 0 and -inf."""
    natural = lses * np.log(2) if base == "2" else lses
    top = natural.max(0)
    top = np.where(top == -INF, 0, top)
    weights = np.exp(natural - top)
    total = weights.sum(0)
    out = np.where(weights[..., None] > 0, outs * weights[..., None], 0).sum(0) / np.where(total == 0, 1, total)[..., None]
    with np.errstate(divide="ignore"):
        lse = top + np.log(total)
    return out, lse / np.log(2) if base == "2" else lse


def close(got, expected, dtype="float32"):
    assert got.dtype.name == dtype
    assert got.shape == expected.shape
    np.testing.assert_allclose(got.astype("f8"), expected, rtol=ROUNDING[dtype], atol=NOISE)


# -------------------------------------------------------------------------------------------------------------- the modules


SIGNATURES = {
    flashinfer.merge_state: "(v_a, s_a, v_b, s_b)",
    flashinfer.merge_state_in_place: "(v, s, v_other, s_other, mask=None)",
    flashinfer.merge_states: "(v, s)",
    flashinfer.variable_length_merge_states: "(v, s, indptr)",
    vllm.merge_attn_states: "(output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse=None, "
    "prefill_tokens_with_context=None, output_scale=None)",
    sglang.merge_state: "(prefix_output, prefix_lse, suffix_output, suffix_lse, output=None, output_lse=None)",
    sglang.merge_state_v2: "(v_a, s_a, v_b, s_b, v_merged=None, s_merged=None)",
    ring_flash_attention.update_out_and_lse: "(out, lse, block_out, block_lse, slice_=None)",
    ring_flash_attention.flatten_varlen_lse: "(lse, cu_seqlens)",
    ring_flash_attention.unflatten_varlen_lse: "(lse, cu_seqlens, max_seqlen)",
    transformer_engine.flash_attn_fwd_out_correction_init: "(out_init_step, softmax_lse, softmax_lse_init_step, seq_dim)",
    transformer_engine.flash_attn_fwd_out_correction: "(out, out_per_step, softmax_lse, softmax_lse_per_step, seq_dim)",
    transformer_engine.flash_attn_fwd_second_half_out_correction:
        "(out, out_per_step, softmax_lse, softmax_lse_per_step, seq_dim)",
    transformer_engine.flash_attn_fwd_softmax_lse_correction: "(softmax_lse, softmax_lse_per_step)",
    transformer_engine.flash_attn_fwd_second_half_softmax_lse_correction: "(softmax_lse, softmax_lse_per_step)",
    transformer_engine.thd_second_half_lse_correction: "(lse, lse_per_step, cu_seqlens, lse_packed)",
    transformer_engine.thd_out_correction:
        "(out, out_per_step, lse, lse_per_step, cu_seqlens, only_second_half, lse_packed)",
    xformers.merge_attentions: "(attn_split, lse_split, write_lse=True, output_dtype=None)",
    flash_attn.flash_attn_combine: "(out_partial, lse_partial, out=None, out_dtype=None, *, return_lse=True)",
    torch_._SDPAMerger: "(convert_to_f32, seq_dim)",
    torch_._SDPAMerger.step: "(self, out, lse, partial)",
    torch_._SDPAMerger.results: "(self)",
}  # fmt: skip


def test_the_signatures_are_the_peers():
    for function, expected in SIGNATURES.items():
        signature = inspect.signature(function)
        bare = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
        assert str(inspect.Signature(bare)) == expected, function
    named = {name for peer in PEERS for name in importlib.import_module(f"rau.compat.{peer}").__all__}
    assert named == {function.__name__ for function in SIGNATURES} - {"step", "results"}


LSE, OUT = np.zeros((4, 2), "f4"), np.ones((4, 2, 8), "f4")
BATCH, ROWS = OUT[None], LSE.T[None]  # BSND, BNS
GIVEN = {  # arguments that fit
    flashinfer.merge_state: (OUT, LSE, OUT, LSE),
    flashinfer.merge_state_in_place: (OUT, LSE, OUT, LSE, np.ones(4, bool)),
    flashinfer.merge_states: (OUT[:, None], LSE[:, None]),
    flashinfer.variable_length_merge_states: (OUT, LSE, np.array([0, 1, 4])),
    vllm.merge_attn_states: (OUT, OUT, LSE.T, OUT, LSE.T, LSE.T),
    sglang.merge_state_v2: (OUT, LSE, OUT, LSE),
    ring_flash_attention.update_out_and_lse: (OUT, LSE[..., None], OUT, LSE.T),
    ring_flash_attention.flatten_varlen_lse: (ROWS, np.array([0, 4])),
    ring_flash_attention.unflatten_varlen_lse: (LSE[..., None], np.array([0, 4]), 4),
    transformer_engine.flash_attn_fwd_out_correction_init: (BATCH, ROWS, ROWS, 1),
    transformer_engine.flash_attn_fwd_out_correction: (BATCH, BATCH, ROWS, ROWS, 1),
    transformer_engine.flash_attn_fwd_second_half_out_correction: (
        BATCH.reshape(1, 2, 2, 2, 8), BATCH[:, :2], ROWS, ROWS[..., :2], 1
    ),
    transformer_engine.flash_attn_fwd_softmax_lse_correction: (ROWS, ROWS),
    transformer_engine.flash_attn_fwd_second_half_softmax_lse_correction: (ROWS.reshape(1, 2, 2, 2), ROWS[..., :2]),
    transformer_engine.thd_second_half_lse_correction: (LSE.T, LSE.T[:, :2], np.array([0, 4]), True),
    transformer_engine.thd_out_correction: (OUT, OUT[:2], LSE.T, LSE.T[:, :2], np.array([0, 4]), True, True),
    xformers.merge_attentions: ([BATCH], [ROWS]),
    flash_attn.flash_attn_combine: (OUT[None], LSE[None]),
}  # fmt: skip


def fresh(values):
    return [np.array(value) if isinstance(value, np.ndarray) else value for value in values]


@pytest.mark.parametrize("function", GIVEN, ids=lambda function: f"{function.__module__.rpartition('.')[2]}.{function.__name__}")
def test_what_does_not_fit_is_named_and_nothing_is_written(function):
    function(*fresh(GIVEN[function]))
    for at, argument in enumerate(GIVEN[function]):
        name = list(inspect.signature(function).parameters)[at]
        wrong = {
            np.ndarray: [None, 7, "no", [[1.0, 2.0]], np.float32(1)], list: [None, 7, [], [None], np.ones(3, "f4")],
        }.get(type(argument), [])  # fmt: skip
        if isinstance(argument, np.ndarray):
            wrong += [argument[..., None], argument[:0], argument[:-1] if len(argument) > 1 else np.concatenate([argument] * 2)]
        for value in wrong:
            if value is None and list(inspect.signature(function).parameters.values())[at].default is None:
                continue  # which leaves it out
            if function is ring_flash_attention.update_out_and_lse and value is None and name in ("out", "lse"):
                continue
            if name == "cu_seqlens" and np.array_equal(value, [0]) and function is not ring_flash_attention.flatten_varlen_lse:
                continue  # tokens behind the last sequence are nobody's
            given = fresh(GIVEN[function])
            given[at] = value
            kept = [np.array(each) if isinstance(each, np.ndarray) else None for each in given]
            try:
                result = function(*given)
            except rau.RauError as error:
                assert len(str(error).splitlines()[0]) < 400, error
                for each, its in zip(given, kept, strict=True):
                    assert its is None or np.array_equal(each, its, equal_nan=True), (name, value)
            else:
                raise AssertionError((name, value, result))


def test_importing_them_imports_no_peer_and_no_framework():
    """Nor does rau import them."""
    program = (
        "import json, sys, rau; before = [name for name in sys.modules if name.startswith('rau.compat')]; "
        f"[__import__('rau.compat.' + name) for name in {PEERS}]; print(json.dumps([before, sorted(sys.modules)]))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAU_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(rau.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    before, modules = json.loads(done.stdout)
    assert before == []
    assert not {"torch", "sgl_kernel", "ring_flash_attn", "mslk", *PEERS} & set(modules)
    assert {f"rau.compat.{name}" for name in PEERS} <= set(modules)


# --------------------------------------------------------------------------------------------------------------- FlashInfer


@pytest.mark.parametrize(("shape", "dtype"), [((6, 4, 128), "float16"), ((17, 2, 64), "bfloat16"), ((3, 5, 24), "float32")])
def test_flashinfer_merge_state(way, shape, dtype):
    outs, lses = parts(*shape, dtype=dtype)
    arrays = [way(outs[0], dtype), way(lses[0]), way(outs[1], dtype), way(lses[1])]
    before = way.bits(*arrays)
    merged = flashinfer.merge_state(*arrays)
    out, lse = softmax(outs, lses, "2")
    close(way.host(merged[0]), out, dtype)
    close(way.host(merged[1]), lse)
    assert way.bits(*arrays) == before

    assert flashinfer.merge_state_in_place(*arrays) is None
    assert way.bits(*arrays) == [*way.bits(*merged), *before[2:]]


def test_flashinfer_merge_states(way):
    outs, lses = parts(2, 3, 64, count=100, dtype="float16")
    merged = flashinfer.merge_states(way(outs.swapaxes(0, 1), "float16"), way(lses.swapaxes(0, 1)))
    out, lse = softmax(outs, lses, "2")
    close(way.host(merged[0]), out, "float16")
    close(way.host(merged[1]), lse)


@pytest.mark.parametrize("dtype", ["bool", "uint8"])
def test_flashinfer_mask(way, dtype):
    """The kernel reads a mask as bytes; what it does not choose is neither read nor written."""
    outs, lses = parts(6, 2, 16, dtype="float16")
    mask = np.array([1, 0, 1, 1, 0, 0], dtype)
    lses[1, mask == 0] = NAN
    arrays = [way(outs[0], "float16"), way(lses[0]), way(outs[1], "float16"), way(lses[1])]
    assert flashinfer.merge_state_in_place(*arrays, way(mask, dtype)) is None
    lses[1, mask == 0] = -INF
    out, lse = softmax(outs, lses, "2")
    out[mask == 0] = outs[0, mask == 0]  # also what stands behind a row without keys
    close(way.host(arrays[0]), out, "float16")
    close(way.host(arrays[1]), lse)
    assert np.array_equal(way.host(arrays[1])[mask == 0], lses[0, mask == 0])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_flashinfer_variable_length_merge_states(way, dtype):
    outs, lses = parts(9, 3, 32, count=1, dtype=dtype)
    indptr = [0, 2, 2, 3, 3, 7, 9]
    merged = flashinfer.variable_length_merge_states(way(outs[0], dtype), way(lses[0]), way(indptr, "int32"))
    expected = [softmax(outs[0, a:b], lses[0, a:b], "2") if a < b else (np.zeros((3, 32)), np.full(3, -INF))
                for a, b in pairwise(indptr)]  # fmt: skip
    for mine, its, name in zip(merged, zip(*expected, strict=True), (dtype, "float32"), strict=True):
        close(way.host(mine), np.stack(its), name)


# ------------------------------------------------------------------------------------------------------------- vLLM, SGLang


def two(way, shape, dtype):
    """Two parts as vLLM has them, empty rows marked by -inf or +inf in turn; and the softmax over both."""
    outs, lses = parts(*shape, dtype=dtype)
    marked = np.where((lses == -INF) & (np.arange(lses[0].size).reshape(lses[0].shape) % 2 == 1), INF, lses)
    return outs, lses, [way(out, dtype) for out in outs], marked


@pytest.mark.parametrize("with_lse", [True, False], ids=["lse", "no lse"])
@pytest.mark.parametrize("context", [None, 0, 8, 13])
@pytest.mark.parametrize(("heads", "D", "dtype"), [(4, 48, "float16"), (3, 32, "bfloat16"), (5, 256, "float32")])
def test_vllm(way, heads, D, dtype, context, with_lse):
    outs, lses, (prefix, suffix), marked = two(way, (13, heads, D), dtype)
    if context is not None:
        lses[0, context:] = -INF  # no prefix there, whatever its log-sum-exp says
    (prefix_lse, suffix_lse), nothing = (way(lse.T) for lse in marked), np.full(outs[0].shape, 7)
    output, output_lse = way(nothing, dtype), way(nothing[..., 0].T) if with_lse else None
    given = {} if context is None else {"prefill_tokens_with_context": context}
    assert vllm.merge_attn_states(output, prefix, prefix_lse, suffix, suffix_lse, output_lse, **given) is None
    out, lse = softmax(outs, lses)
    close(way.host(output), out, dtype)
    if with_lse:
        close(way.host(output_lse), lse.T)
        if context is not None:  # copied
            assert np.array_equal(way.host(output_lse)[:, context:], lses[1, context:].T)


@pytest.mark.parametrize("with_lse", [True, False], ids=["lse", "no lse"])
@pytest.mark.parametrize(
    ("eight", "mantissa", "least", "largest"), [("float8_e4m3fn", 3, -6, 448), ("float8_e5m2", 2, -14, 57344)]
)
@pytest.mark.parametrize(("dtype", "context"), [("bfloat16", None), ("float32", 8)])
def test_vllm_in_eight_bits(way, dtype, context, eight, mantissa, least, largest, with_lse):
    """Divided by the scale, limited to the format's range, and within half a step of it."""
    outs, lses, (prefix, suffix), marked = two(way, (13, 3, 48), dtype)
    scale = np.float32(0.7 / largest)  # what is beyond 0.7 does not fit
    if context is not None:
        lses[0, context:] = -INF
    prefix_lse, suffix_lse = (way(lse.T) for lse in marked)
    output, output_lse = way(np.ones((13, 3, 48)), eight), suffix_lse if with_lse else None
    result = vllm.merge_attn_states(output, prefix, prefix_lse, suffix, suffix_lse, output_lse, context, way([scale]))
    assert result is None
    out, lse = softmax(outs, lses)
    exact, got = out / np.float64(scale), way.host(output)
    assert got.dtype.name == eight
    got = got.astype("f8")
    step = 2.0 ** (np.maximum(np.frexp(exact)[1] - 1, least) - mantissa)
    noise = NOISE / scale
    wrong = np.abs(got - np.clip(exact, -largest, largest))
    assert (wrong <= step / 2 + noise).all()
    beyond = np.abs(exact) > largest + noise
    assert 0.2 < beyond.mean() < 0.8
    assert np.array_equal(got[beyond], np.copysign(largest, exact[beyond]))
    if with_lse:
        close(way.host(suffix_lse), lse.T)  # in place


@pytest.mark.parametrize("tokens", [-1, 3, "2", 1.0, np.ones(1)], ids=repr)
def test_vllm_refuses_a_number_of_tokens_that_there_are_not(way, tokens):
    v, s = way(np.ones((2, 1, 8))), way(np.zeros((1, 2)))
    before = way.bits(v, s)
    with pytest.raises(rau.RauError, match=r"prefill_tokens_with_context is .*; expected a number of tokens, from 0 to T = 2\."):
        vllm.merge_attn_states(v, v, s, v, s, s, tokens)
    assert way.bits(v, s) == before


def test_vllm_writes_no_output_whose_log_sum_exp_it_cannot_write(way):
    pytest.importorskip("ml_dtypes")
    v, s, output = way(np.ones((2, 1, 8))), way(np.zeros((1, 2))), way(np.ones((2, 1, 8)), "float8_e5m2")
    before = way.bits(output)
    for wrong in (way(np.zeros((2, 2))), way(np.zeros((1, 2)), "float16"), [1.0]):
        with pytest.raises(rau.RauError, match="output_lse (has|is)"):
            vllm.merge_attn_states(output, v, s, v, s, wrong, 1, way([2.0]))
    assert way.bits(output) == before


def test_vllm_refuses_a_scale_without_eight_bits(way):
    v, s = way(np.ones((2, 1, 8))), way(np.zeros((1, 2)))
    before = way.bits(v, s)
    with pytest.raises(rau.OptionError, match="output_scale is given, and output has dtype float32"):
        vllm.merge_attn_states(v, v, s, v, s, s, output_scale=way([1.0]))
    assert way.bits(v, s) == before


def test_vllm_strides_and_in_place(way):
    """Outputs of which only some heads are used, token-major log-sum-exps, and the suffix's place for the result."""
    outs, lses, wide, marked = two(way, (6, 4, 16), "float32")
    prefix, suffix = (array[:, 1:3] for array in wide)
    prefix_lse, suffix_lse = (way(lse)[:, 1:3].swapaxes(0, 1) for lse in marked)
    around = way.bits(wide[1][:, :1], wide[1][:, 3:])
    vllm.merge_attn_states(suffix, prefix, prefix_lse, suffix, suffix_lse, suffix_lse, 4)
    lses[0, 4:] = -INF
    out, lse = softmax(outs[:, :, 1:3], lses[:, :, 1:3])
    close(way.host(suffix), out)
    close(way.host(suffix_lse), lse.T)
    assert way.bits(wide[1][:, :1], wide[1][:, 3:]) == around


@pytest.mark.parametrize(("shape", "dtype"), [((13, 4, 64), "float16"), ((7, 8, 96), "bfloat16"), ((5, 3, 20), "float32")])
def test_sglang(way, shape, dtype):
    outs, lses, (prefix, suffix), marked = two(way, shape, dtype)
    arrays = [prefix, way(marked[0]), suffix, way(marked[1])]
    merged = sglang.merge_state(*arrays)
    out, lse = softmax(outs, lses)
    close(way.host(merged[0]), out, dtype)
    close(way.host(merged[1]), lse)
    for mine in ({"v_merged"}, {"s_merged"}, {"v_merged", "s_merged"}):
        into = {"v_merged": way(np.ones(shape), dtype), "s_merged": way(np.ones(shape[:-1]))}
        result = sglang.merge_state_v2(*arrays, **{name: into[name] for name in mine})
        assert way.bits(*result) == way.bits(*merged)
        assert {name for name, array in zip(into, result, strict=True) if array is into[name]} == mine
    assert sglang.merge_state(*arrays, *arrays[:2])[1] is arrays[1]  # in place
    assert way.bits(*arrays[:2]) == way.bits(*merged)


# ----------------------------------------------------------------------------------------------------- ring-flash-attention


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [(2,), ()], ids=["batch", "varlen"])
def test_ring_flash_attention(way, batch, dtype):
    """Three blocks, of which the last is of the second half; both kinds of indices that zig-zag rings use."""
    outs, lses = parts(*batch, 6, 3, 16, count=3, dtype=dtype)
    lses[2, ..., :3, :] = -INF
    blocks = [(way(out, dtype), way(lse.swapaxes(-1, -2))) for out, lse in zip(outs, lses, strict=True)]
    out = lse = None
    for block in blocks[:2]:
        out, lse = ring_flash_attention.update_out_and_lse(out, lse, *block)
    first = ring_flash_attention.update_out_and_lse(None, None, *blocks[0])
    seen = np.isfinite(lses[0])
    assert way.host(first[0])[seen].tobytes() == outs[0][seen].astype("f4").tobytes()
    assert np.array_equal(way.host(first[1])[..., 0], lses[0])

    half = blocks[2][0][..., 3:, :, :], blocks[2][1][..., 3:]
    results = []
    for index in (slice(3, None), way(np.arange(6) >= 3, "bool")):
        running = [way(way.host(array)) for array in (out, lse)]
        where = (slice(None), index) if batch else index
        result = ring_flash_attention.update_out_and_lse(*running, *half, slice_=where)
        assert all(mine is its for mine, its in zip(result, running, strict=True))
        results.append(way.bits(*result))
    assert results[0] == results[1]
    expected, its_lse = softmax(outs, lses)
    close(way.host(result[0]), expected)
    close(way.host(result[1]), its_lse[..., None])


def test_ring_flash_attention_wants_a_whole_first_block(way):
    block = way(np.ones((1, 2, 1, 8))), way(np.ones((1, 1, 2)))
    with pytest.raises(RuntimeError, match="slice_ is given, and out is None"):
        ring_flash_attention.update_out_and_lse(None, None, *block, slice_=slice(1))


def test_ring_flash_attention_varlen_lse(way):
    lengths, longest = [3, 0, 5], 6
    flat = np.arange(16.0).reshape(2, 8)
    padded = np.full((3, 2, longest), -INF)
    padded[0, :, :3], padded[2, :, :5] = flat[:, :3], flat[:, 3:]
    bounds = way([0, *np.cumsum(lengths)], "int32")
    close(way.host(ring_flash_attention.flatten_varlen_lse(way(padded), bounds)), flat)
    back = ring_flash_attention.unflatten_varlen_lse(way(flat.T[..., None]), bounds, longest)
    close(way.host(back), padded)


# -------------------------------------------------------------------------------------------------------- TransformerEngine


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("seq_dim", [0, 1], ids=["sbhd", "bshd"])
def test_transformer_engine(way, seq_dim, dtype):
    """Three steps of context parallelism, the last of which sees the second half of the tokens."""
    B, S, N, D = 2, 6, 3, 8
    outs, lses = parts(B, S, N, D, count=3, dtype=dtype)
    lses[2, :, :3] = -INF
    to = (lambda array: array.swapaxes(0, 1)) if seq_dim == 0 else (lambda array: array)
    steps = [(way(to(out), dtype), way(lse.swapaxes(1, 2))) for out, lse in zip(outs, lses, strict=True)]
    second = steps[2][0][3:] if seq_dim == 0 else steps[2][0][:, 3:], way(lses[2, :, 3:].swapaxes(1, 2))

    lse = way(way.host(steps[0][1]))
    assert transformer_engine.flash_attn_fwd_softmax_lse_correction(lse, steps[1][1]) is None
    halves = lse.reshape(B, N, 2, 3)
    assert transformer_engine.flash_attn_fwd_second_half_softmax_lse_correction(halves, second[1]) is None
    expected, its_lse = softmax(outs, lses)
    close(way.host(lse), its_lse.swapaxes(1, 2))

    out = transformer_engine.flash_attn_fwd_out_correction_init(steps[0][0], lse, steps[0][1], seq_dim)
    assert way.host(out).dtype == dtype
    assert transformer_engine.flash_attn_fwd_out_correction(out, *steps[1][:1], lse, steps[1][1], seq_dim) is None
    halved = out.reshape((2, 3, B, N, D) if seq_dim == 0 else (B, 2, 3, N, D))
    assert transformer_engine.flash_attn_fwd_second_half_out_correction(halved, second[0], lse, second[1], seq_dim) is None
    assert way.host(out).shape == to(expected).shape
    # Every step rounds the sum.
    np.testing.assert_allclose(way.host(out).astype("f8"), to(expected), rtol=0, atol=NOISE + 3 * 4 * ROUNDING[dtype])


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_transformer_engine_thd(way, packed):
    lengths, N, D, longest = [8, 0, 4], 4, 8, 10
    bounds = [0, *np.cumsum(lengths)]
    outs, lses = parts(12, N, D, count=3)
    halves = np.concatenate([np.arange((a + b) // 2, b) for a, b in pairwise(bounds)])
    lses[2, np.setdiff1d(np.arange(12), halves)] = -INF

    def rows(lse, bounds, longest):
        """A log-sum-exp of shape (T, N) as the library has it; what pads it must not be read."""
        if packed:
            return way(lse.T)
        padded = np.full((3, N, longest), NAN)
        for i, (start, end) in enumerate(pairwise(bounds)):
            padded[i, :, : end - start] = lse[start:end].T
        return way(padded)

    cu_seqlens = way(bounds, "int32")
    every = [rows(lse, bounds, longest) for lse in lses]
    half = rows(lses[2, halves], [bound // 2 for bound in bounds], longest // 2)
    lse = way(way.host(every[0]))
    if packed:
        transformer_engine.flash_attn_fwd_softmax_lse_correction(lse, every[1])
    else:
        lse = rows(softmax(outs[:2], lses[:2])[1], bounds, longest)
    transformer_engine.thd_second_half_lse_correction(lse, half, cu_seqlens, packed)
    expected, its_lse = softmax(outs, lses)
    close(way.host(lse), way.host(rows(its_lse, bounds, longest)))

    out = way(np.zeros((12, N, D)))
    for step in range(2):
        transformer_engine.thd_out_correction(out, way(outs[step]), lse, every[step], cu_seqlens, False, packed)
    transformer_engine.thd_out_correction(out, way(outs[2, halves]), lse, half, cu_seqlens, True, packed)
    close(way.host(out), expected)


def test_transformer_engine_adds_by_the_weight_it_is_given(way):
    """Not by one that would make the weights add up to 1: the sum is of steps so far."""
    out, part = np.full((1, 2, 1, 8), 3.0), np.full((1, 2, 1, 8), 8.0)
    lse, its_lse = np.zeros((1, 1, 2)), np.log(np.array([[[0.25, 1e-20]]]))
    mine = way(out)
    transformer_engine.flash_attn_fwd_out_correction(mine, way(part), way(lse), way(its_lse), 1)
    close(way.host(mine), np.array([5.0, 3.0])[None, :, None, None] * np.ones(8))


# ----------------------------------------------------------------------------------------------------------------- xformers


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
@pytest.mark.parametrize("groups", [(), (2,)], ids=["BMHK", "BMGHK"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_xformers(way, dtype, groups, stacked):
    outs, lses = parts(2, 7, *groups, 3, 32, count=16, dtype=dtype)
    attn_split, lse_split = way(outs, dtype), way(np.moveaxis(lses, 2, -1))
    if not stacked:
        attn_split, lse_split = list(attn_split), list(lse_split)
    out, lse = xformers.merge_attentions(attn_split, lse_split)
    expected, its_lse = softmax(outs, lses)
    close(way.host(out), expected, dtype)
    close(way.host(lse), np.moveaxis(its_lse, 1, -1))
    alone, none = xformers.merge_attentions(attn_split, lse_split, write_lse=False, output_dtype=attn_split[0].dtype)
    assert none is None
    assert way.bits(alone) == way.bits(out)
    for name in ("float16", "float32"):
        for write_lse in (True, False):
            other, its = xformers.merge_attentions(attn_split, lse_split, write_lse, way([], name).dtype)
            close(way.host(other), expected, name)
            assert its is None if not write_lse else way.bits(its) == way.bits(lse)


@pytest.mark.parametrize("write_lse", [True, False])
def test_xformers_own_dtype_can_be_traced(way, write_lse, monkeypatch):
    """Another one cannot."""

    def refuse(call):
        raise rau.UnsupportedError("traced")

    monkeypatch.setattr("rau.rows.refuse_tracing", refuse)
    outs, lses = way(np.ones((2, 1, 3, 2, 8)), "bfloat16"), way(np.zeros((2, 1, 2, 3)))
    out, _ = xformers.merge_attentions(outs, lses, write_lse, outs.dtype)
    assert way.bits(out) == way.bits(outs[0])
    with pytest.raises(rau.UnsupportedError, match="traced"):
        xformers.merge_attentions(outs, lses, write_lse, "float32")


@needs_torch
def test_xformers_gradients_through_another_dtype():
    rng = torch.Generator().manual_seed(0)
    outs, lses = (torch.randn(*shape, generator=rng).to(dtype).requires_grad_()
                  for shape, dtype in (((2, 1, 3, 2, 8), torch.bfloat16), ((2, 1, 2, 3), torch.float32)))  # fmt: skip
    out, lse = xformers.merge_attentions(outs, lses, output_dtype=torch.float32)
    got = torch.autograd.grad([out.sum(), lse.sum()], [outs, lses])
    weights = torch.softmax(lses, 0).movedim(-1, 2)[..., None]
    expected = torch.autograd.grad([(weights * outs.float()).sum(), torch.logsumexp(lses, 0).sum()], [outs, lses])
    for mine, its in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=2.0**-8 if mine.dtype == torch.bfloat16 else 0, atol=2e-5)


@needs_torch
def test_xformers_gradients():
    rng = torch.Generator().manual_seed(0)
    outs, grad = (torch.randn(*shape, 3, 2, 4, 8, generator=rng, dtype=torch.float64) for shape in ((5, 2), (2,)))
    lses, lse_grad = (torch.randn(*shape, 2, 4, 3, generator=rng, dtype=torch.float64) for shape in ((5, 2), (2,)))
    leaves = [array.requires_grad_() for array in (outs, lses)]
    got = torch.autograd.grad(xformers.merge_attentions(outs, lses), leaves, [grad, lse_grad])
    weights = torch.softmax(lses, 0).movedim(-1, 2)[..., None]
    expected = torch.autograd.grad([(weights * outs).sum(0), torch.logsumexp(lses, 0)], leaves, [grad, lse_grad])
    for mine, its in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- FlashAttention


@pytest.mark.parametrize("varlen", [False, True], ids=["batch", "varlen"])
@pytest.mark.parametrize(
    ("splits", "S", "D", "dtype"), [(1, 3, 64, "float32"), (5, 1, 96, "float16"), (17, 2, 40, "float32")]
)
def test_flash_attention(way, splits, S, D, dtype, varlen):
    """Partial results that are not contiguous, and splits without keys for a third of the batch."""
    outs, lses = parts(3, S, 4, D, count=splits, dtype=dtype)
    lses[splits // 2 :, 0] = -INF
    out_partial = way(np.concatenate([outs, outs]).swapaxes(2, 3), dtype).swapaxes(2, 3)[:splits]
    lse_partial = way(np.concatenate([lses, lses], 3).swapaxes(2, 3)).swapaxes(2, 3)[..., :4]
    if varlen:
        out_partial, lse_partial, outs, lses = out_partial[:, 1], lse_partial[:, 1], outs[:, 1], lses[:, 1]
    out, lse = flash_attn.flash_attn_combine(out_partial, lse_partial, out_dtype=out_partial.dtype)
    expected, its_lse = softmax(outs, lses)
    close(way.host(out), expected, dtype)
    close(way.host(lse), its_lse)
    mine = way(np.ones(expected.shape), dtype)
    for return_lse in (True, False):
        again = flash_attn.flash_attn_combine(out_partial, lse_partial, mine, return_lse=return_lse)
        assert again[0] is mine
        assert way.bits(mine) == way.bits(out)
    assert again[1] is None
    for name in ("bfloat16", "float16", "float32"):
        mine = way(np.ones(expected.shape), name)
        for given in ({"out_dtype": mine.dtype}, {"out": mine}):
            other, its = flash_attn.flash_attn_combine(out_partial, lse_partial, **given)
            close(way.host(other), expected, name)
            assert way.bits(its) == way.bits(lse)
        assert other is mine


# ------------------------------------------------------------------------------------------------------------------ PyTorch


@pytest.mark.parametrize("axis", [True, False], ids=["cuDNN", "flash"])
@pytest.mark.parametrize(("seq_dim", "dtype"), [(2, "float32"), (2, "bfloat16"), (1, "float16")])
def test_torch(way, seq_dim, dtype, axis):
    """Three steps, the last of which covers the second half of the tokens; 16 bits are rounded once."""
    shape = (2, 3, 6, 16) if seq_dim == 2 else (2, 6, 3, 16)
    outs, lses = parts(*shape, count=3, dtype=dtype)
    first, second = ((slice(None),) * seq_dim + (half,) for half in (slice(3), slice(3, None)))
    lses[2][first] = -INF
    merger = torch_._SDPAMerger(convert_to_f32=False, seq_dim=seq_dim)
    for number, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        partial = number == 2
        out, lse = (out[second], lse[second]) if partial else (out, lse)
        assert merger.step(way(out, dtype), way(lse[..., None] if axis else lse), partial) is None
    out, lse = merger.results()
    expected, its_lse = softmax(outs, lses)
    close(way.host(out), expected, dtype)
    close(way.host(lse), its_lse[..., None] if axis else its_lse)


@pytest.mark.parametrize("seq_dim", [0, 3, "2"])
def test_torch_axes(seq_dim):
    with pytest.raises(rau.LayoutError, match=rf"_SDPAMerger: \[layout\] seq_dim = {seq_dim!r}; expected 2 for"):
        torch_._SDPAMerger(True, seq_dim)


# ------------------------------------------------------------------------------------------------------ docs/migration.md


def test_the_code_of_the_page(way):
    """Every block of it, each on two or three parts as its project has them."""
    B, S, N, D = 2, 6, 3, 8
    outs, lses = parts(B, S, N, D, count=3)
    out, lse = softmax(outs, lses)
    tokens, rows = outs[:, 0], lses[:, 0]  # of layout TND, of one sequence
    two_out, two_lse = softmax(tokens[:2], rows[:2])
    outputs = [way(part) for part in outs]
    by_head = [way(part.swapaxes(1, 2)) for part in lses]
    v_a, v_b, v = way(tokens[0]), way(tokens[1]), way(tokens.swapaxes(0, 1))
    s_a, s_b, s = way(rows[0]), way(rows[1]), way(rows.swapaxes(0, 1))
    page = blocks("migration.md")

    def names_after(title, **names):
        exec(compile(page.pop(f"{title} 0"), f"migration.md, {title}", "exec"), names)
        return names

    mask = np.arange(S) != 2
    got = names_after("FlashInfer", v_a=way(tokens[0]), s_a=way(rows[0]), v_b=v_b, s_b=s_b, v=v, s=s, mask=way(mask, "bool"),
                      indptr=way([0, 2, 5, 6], "int32"))  # fmt: skip
    to_base_2 = [softmax(tokens[:2], rows[:2], "2"), softmax(tokens, rows, "2")]
    for mine, its in zip([got["merged"], got["lse"], got["of_many"], got["lse_of_many"]], sum(to_base_2, ()), strict=True):
        close(way.host(mine), its)
    for mine, new, old in (("v_a", "merged", tokens[0]), ("s_a", "lse", rows[0])):
        expected = way.host(got[new])
        expected[2] = old[2]
        np.testing.assert_array_equal(way.host(got[mine]), expected)
    of_any = [softmax(tokens[1, a:b], rows[1, a:b], "2") for a, b in ((0, 2), (2, 5), (5, 6))]
    for mine, its in zip([got["of_any"], got["lse_of_any"]], zip(*of_any, strict=True), strict=True):
        close(way.host(mine), np.stack(its))

    output, output_lse = way(np.ones(two_out.shape)), way(np.ones(two_lse.T.shape))
    output_fp8 = way(np.ones(two_out.shape), "float8_e4m3fn")
    names_after("vLLM", output=output, prefix_output=v_a, prefix_lse=way(rows[0].T), suffix_output=v_b, suffix_lse=way(rows[1].T),
                output_lse=output_lse, output_fp8=output_fp8, output_scale=way([0.5]))  # fmt: skip
    without = rows[:2].copy()
    without[0, 4:] = -INF
    expected = softmax(tokens[:2], without)
    close(way.host(output), expected[0])
    close(way.host(output_lse), expected[1].T)
    np.testing.assert_allclose(way.host(output_fp8).astype("f8"), 2 * two_out, rtol=2.0**-4, atol=2.0**-10)

    names = {"prefix_output": v_a, "prefix_lse": s_a, "suffix_output": v_b, "suffix_lse": s_b}
    got = names_after("SGLang", **names, v_a=v_a, s_a=s_a, v_b=v_b, s_b=s_b, v_merged=way(two_out), s_merged=way(two_lse))
    close(way.host(got["merged"]), two_out)
    close(way.host(got["lse"]), two_lse)
    assert way.bits(got["v_merged"], got["s_merged"]) == way.bits(got["merged"], got["lse"])

    got = names_after("ring-flash-attention", blocks=list(zip(outputs, by_head, strict=True)))
    close(way.host(got["out"]), out)
    close(way.host(got["lse"]), lse[..., None])

    got = names_after("TransformerEngine", softmax_lse=way(way.host(by_head[0])), out_per_step=outputs, lse_per_step=by_head)
    close(way.host(got["out"]), out)
    close(way.host(got["softmax_lse"]), lse.swapaxes(1, 2))

    got = names_after("xformers", attn_split=outputs, lse_split=by_head, lower=way([], "float16").dtype)
    close(way.host(got["out"]), out)
    close(way.host(got["lse"]), lse.swapaxes(1, 2))
    assert way.bits(got["alone"]) == way.bits(got["out"])
    close(way.host(got["narrow"]), out, "float16")

    got = names_after("FlashAttention", out_partial=way(outs), lse_partial=way(lses), lower=way([], "float16").dtype)
    close(way.host(got["out"]), out)
    close(way.host(got["narrow"]), out, "float16")
    close(way.host(got["lse"]), lse)

    steps = [(way(part.swapaxes(1, 2)), its) for part, its in zip(outs, by_head, strict=True)]
    got = names_after("PyTorch", steps=steps)
    close(way.host(got["merged"]), out.swapaxes(1, 2))
    close(way.host(got["lse"]), lse.swapaxes(1, 2))
    assert not page
