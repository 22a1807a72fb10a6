"""docs/interop.md: every code block is run, by the library that it is about or by a stand-in with its documented shapes."""

import importlib.machinery
import importlib.util
import itertools
import math
import os
import re
import sys
import types

import numpy as np
import pytest
from interop_recipes import DTYPES, RECIPES, check_recipe
from pages import DOCS, blocks
from states import tnd

import rau
from rau.testing import partial_attention

PAGE = (DOCS / "interop.md").read_text()
BLOCKS = blocks("interop.md")
RUN = []  # the blocks that the tests below run

if "torch" in os.environ.get("RAU_TEST_BACKENDS", ""):
    import torch  # asked for: its absence is a failure
else:
    try:
        import torch
    except ImportError:
        torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed and was not asked for")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

B, N, S, D, KEYS = 2, 3, 6, 8, 20
CUTS = [7, 7, 16]  # four parts of the keys; the second has none


def recipe(name):
    """Mark a test as the one that runs a block."""
    RUN.append(name)
    return name


SDPA, FLEX = recipe("torch: scaled_dot_product_attention 0"), recipe("torch: flex attention 0")
FLASH, VARLEN = recipe("FlashAttention 0"), recipe("FlashAttention, variable lengths 0")
PADDED, STACKED = recipe("FlashAttention, variable lengths 1"), recipe("Stacked splits, heads in groups 0")
FLASHINFER, VLLM = recipe("FlashInfer 0"), recipe("vLLM 0")
NPU, NPU_TND = recipe("npu_fusion_attention 0"), recipe("npu_fusion_attention 1")
ROWS_LSE, ROWS_SUM = recipe("Rows without keys 0"), recipe("Rows without keys 1")
SINKS = recipe("Attention sinks 0")
TOKENS, SLOTS, RAGGED, EIGHT = (recipe(f"Some tokens, padded sequences, another dtype {k}") for k in range(4))
OWN, PAIRS = recipe("A maximum and a sum of one's own 0"), recipe("A pair in, a pair out 0")
JAX = recipe("JAX 0")
ALONE, GRADIENTS = recipe("One lane or eight 0"), recipe("Gradients 0")


def test_every_block_is_run():
    assert sorted(BLOCKS) == sorted(RUN)


@pytest.mark.skipif(not importlib.util.find_spec("jax"), reason="JAX is not installed")
def test_jax():
    import jax.numpy as jnp

    q, k, v = map(jnp.asarray, inputs(B, N))
    names = run(JAX, q=q, parts=[(k[:, :, :7], v[:, :, :7]), (k[:, :, 7:], v[:, :, 7:])])
    close(np.asarray(names["merged"](q, names["parts"])), exact(q, k, v)[0], atol=1e-5)
    whole = names["jax"].grad(lambda q: names["attend"](q, k, v)[0].sum())(q)
    close(np.asarray(names["gradient"]), np.asarray(whole), atol=1e-5)


def run(name, **names):
    exec(compile(BLOCKS[name], f"interop.md, {name}", "exec"), names)
    return names


def exact(q, k, v, mask=None):
    """One softmax over all the keys in float64: (..., S, D) and (..., keys, D) to output and log-sum-exp."""
    q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    with np.errstate(all="ignore"):
        p = np.exp(scores - scores.max(-1, keepdims=True, initial=-1e300))
        lse = scores.max(-1, initial=-1e300) + np.log(p.sum(-1))
        return np.where(p.sum(-1, keepdims=True) == 0, 0, p @ v / p.sum(-1, keepdims=True)), lse


def inputs(*shape, keys=KEYS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((*shape, length, D)).astype(np.float32) for length in (S, keys, keys)]


def split(k, v, axis):
    return list(zip(np.split(k, CUTS, axis), np.split(v, CUTS, axis), strict=True))


def tensors(*arrays, dtype="float32"):
    return [torch.from_numpy(np.array(array)).to(getattr(torch, dtype)) for array in arrays]


def close(got, expected, atol):
    got = got.double().numpy() if not isinstance(got, np.ndarray) else got
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


# A kernel of 16 bits rounds each part's output, and the merge its result: half a unit in the last place each.
BFLOAT16 = 2 * 2.0**-9 * 5


@pytest.fixture
def installed(monkeypatch):
    """Make modules with stand-ins importable."""

    def install(path, **functions):
        for name in itertools.accumulate(path.split("."), "{}.{}".format):
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)
        vars(module).update(functions)

    return install


# ------------------------------------------------------------------------------------------------------------- torch


@needs_torch
def test_torch_sdpa():
    q, k, v = inputs(B, N)
    parts = [tensors(*part) for part in split(k, v, 2) if part[0].size]
    merged = run(SDPA, q=tensors(q)[0], parts=parts)["merged"]
    out, lse = exact(q, k, v)
    close(merged.attn_out, out, 2e-6)
    close(merged.lse(base="e", layout="BNSD"), lse, 2e-6)


@needs_torch
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention():
    q, k, v = inputs(B, N)
    parts = [tensors(*part) for part in split(k, v, 2) if part[0].size]
    names = run(FLEX, q=tensors(q)[0], parts=parts)
    out, lse = exact(q, k, v)
    close(names["merged"].attn_out, out, 2e-6)
    close(names["merged"].lse(base="e", layout="BNSD"), lse, 2e-6)
    assert names["states"][-1].softmax_max.data_ptr() == names["aux"].lse.data_ptr()


@needs_torch
def test_what_the_page_says_of_torch():
    """The shapes of operators that run on CUDA alone, from torch's own shape functions."""
    q = torch.zeros(B, N, S, D, device="meta", dtype=torch.bfloat16)
    aten = torch.ops.aten
    assert aten._scaled_dot_product_flash_attention(q, q, q)[1].shape == (B, N, S)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, q, q, None, True)
    assert (out.shape, lse.shape, lse.dtype) == ((B, N, S, D), (B, N, 32), torch.float32)
    rau.AttentionState.from_lse(out, lse[..., :S], base="e", layout="BNSD")
    with pytest.raises(rau.ShapeError, match=r"Some kernels pad it: pass lse\[..., :6\]"):
        rau.AttentionState.from_lse(out, lse, base="e", layout="BNSD")
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, q, q, None, True)
    assert lse.shape == (B, N, S, 1)
    with pytest.raises(rau.ShapeError, match=r"Drop its last axis: lse\[..., 0\]"):
        rau.AttentionState.from_lse(out, lse, base="e", layout="BNSD")
    t, lengths = q[0].mT.reshape(-1, N, D), torch.zeros(3, dtype=torch.int32, device="meta")
    out, lse, *_ = aten._flash_attention_forward(t, t, t, lengths, lengths, S, S, 0.0, False, False)
    assert lse.shape == (N, len(t))
    rau.AttentionState.from_lse(out, lse, base="e", layout="TND", lse_layout="NT")

    q, k, v = (part.requires_grad_() for part in tensors(*inputs(B, N)))
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    assert out.requires_grad and not lse.requires_grad
    blind = torch.full((S, KEYS), -torch.inf)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=blind)
    assert not lse.any() and not out.any()  # 0 weighs as much as a key of score 0


# ----------------------------------------------------------------------------------------------------- FlashAttention


def flash_attention(results, empty):
    """Stand in for flash_attn_func: (B, S, N, D) in bfloat16; lse (B, N, S) in float32."""

    def flash_attn_func(q, k, v, return_attn_probs=False):
        assert q.dtype == torch.bfloat16 and return_attn_probs
        out, lse = exact(*(part.transpose(1, 2).double().numpy() for part in (q, k, v)))
        lse = torch.from_numpy(np.where(np.isneginf(lse), empty, lse).astype(np.float32))
        return torch.from_numpy(out).transpose(1, 2).contiguous().to(q.dtype), lse, *[None] * (results - 2)

    return flash_attn_func


@needs_torch
@pytest.mark.parametrize(("results", "empty"), [(3, math.inf), (2, -math.inf)], ids=["2", "3"])
def test_flash_attention(installed, results, empty):
    q, k, v = (part.swapaxes(1, 2) for part in inputs(B, N))
    q, k, v = (part.float().numpy() for part in tensors(q, k, v, dtype="bfloat16"))
    installed("flash_attn", flash_attn_func=flash_attention(results, empty))
    parts = [tensors(*part, dtype="bfloat16") for part in split(k, v, 1)]
    merged = run(FLASH, q=tensors(q, dtype="bfloat16")[0], parts=parts)["merged"]
    out, lse = exact(*(part.swapaxes(1, 2) for part in (q, k, v)))
    close(merged.attn_out, out.swapaxes(1, 2), BFLOAT16)
    close(merged.lse(base="e", layout="BSND"), lse, 2e-6)


def sequences(*lengths):
    ends = np.cumsum(lengths)
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def varlen(q, k, v, q_lengths, k_lengths):
    """Attention within sequences: (T, N, D) to output and (T, N)."""
    out, lse = np.zeros(q.shape), np.zeros(q.shape[:2])
    for rows, keys in zip(sequences(*q_lengths), sequences(*k_lengths), strict=True):
        part = exact(q[rows].swapaxes(0, 1), k[keys].swapaxes(0, 1), v[keys].swapaxes(0, 1))
        out[rows], lse[rows] = part[0].swapaxes(0, 1), part[1].T
    return out, lse


@needs_torch
def test_padded_log_sum_exps():
    rng = np.random.default_rng(3)
    q = rng.standard_normal((9, N, D))
    parts = [(rng.standard_normal((2, sum(lengths), N, D)), lengths) for lengths in ([5, 0, 6], [1, 2, 0])]
    pairs, cu = [], [0, 2, 5, 9]
    for (k, v), lengths in parts:
        out, lse = varlen(q, k, v, np.diff(cu), lengths)
        padded = np.full((3, N, 4), np.nan)
        for i, (start, end) in enumerate(itertools.pairwise(cu)):
            padded[i, :, : end - start] = np.where(np.isneginf(lse), np.inf, lse)[start:end].T
        pairs.append(tensors(out, padded))
    merged = run(PADDED, pairs=pairs, cu_seqlens_q=torch.tensor(cu, dtype=torch.int32))["merged"]
    each = [(part, sequences(*lengths)[i]) for i in range(3) for part, lengths in parts]
    whole = [np.concatenate([part[axis][rows] for part, rows in each]) for axis in (0, 1)]
    out, lse = varlen(q, *whole, np.diff(cu), [6, 2, 6])
    close(merged.attn_out, out, 2e-6)
    close(merged.lse(base="e", layout="TND", lse_layout="TN"), lse, 2e-6)


@needs_torch
def test_stacked_splits_of_heads_in_groups():
    q, k, v = inputs(B, 2, N)  # (B, G, H, S or keys, D)
    pairs = [exact(q, *part) for part in split(k, v, 3) if part[0].size]
    outs, lses = tensors(np.stack([out.transpose(0, 3, 1, 2, 4) for out, _ in pairs]), np.stack([lse for _, lse in pairs]))
    names = run(STACKED, outs=outs, lses=lses)
    out, lse = exact(q, k, v)
    close(names["out"], out.transpose(0, 3, 1, 2, 4).reshape(B, S, 2 * N, D), 2e-6)
    close(names["lse"], lse.reshape(B, 2 * N, S), 2e-6)
    assert names["pairs"][1][1].data_ptr() == lses[1].data_ptr() and names["pairs"][1][0].data_ptr() == outs[1].data_ptr()


@needs_torch
@pytest.mark.parametrize("empty", [math.inf, -math.inf], ids=["2", "3"])
def test_flash_attention_varlen(installed, empty):
    q_lengths, k_lengths, parts = [2, 3, 4], [5, 0, 6], 3
    rng = np.random.default_rng(3)
    q = rng.standard_normal((9, N, D))
    keys, values = rng.standard_normal((2, parts, 11, N, D))
    q, keys, values = tensors(q, keys, values, dtype="bfloat16")

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, return_attn_probs=False
    ):
        arrays = (part.double().numpy() for part in (q, k, v))
        out, lse = varlen(*arrays, np.diff(cu_seqlens_q), np.diff(cu_seqlens_k))
        lse = np.where(np.isneginf(lse), empty, lse).astype(np.float32)
        return torch.from_numpy(out).to(q.dtype), torch.from_numpy(np.ascontiguousarray(lse.T)), None

    installed("flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)
    lengths = {
        "cu_seqlens_q": torch.tensor([0, *np.cumsum(q_lengths)], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, *np.cumsum(k_lengths)], dtype=torch.int32),
        "max_seqlen_q": max(q_lengths), "max_seqlen_k": max(k_lengths),
    }  # fmt: skip
    merged = run(VARLEN, q=q, parts=list(zip(keys, values, strict=True)), **lengths)["merged"]
    whole = [
        np.concatenate([part[rows] for rows in sequences(*k_lengths) for part in parts_.double().numpy()])
        for parts_ in (keys, values)
    ]
    out, lse = varlen(q.double().numpy(), *whole, q_lengths, [parts * length for length in k_lengths])
    close(merged.attn_out, out, BFLOAT16)
    assert not merged.attn_out[2:5].any()  # the sequence without keys
    close(merged.lse(base="e", layout="TND", lse_layout="TN"), lse, 2e-6)


# ------------------------------------------------------------------------------------------------- FlashInfer and vLLM


@needs_torch
def test_flashinfer(installed):
    def single_prefill_with_kv_cache(q, k, v, return_lse=False):
        """(S, N, D) in bfloat16; lse (S, N) in float32, to base 2."""
        assert return_lse
        out, lse = exact(*(part.transpose(0, 1).double().numpy() for part in (q, k, v)))
        lse = torch.from_numpy((lse.T / math.log(2)).astype(np.float32))
        return torch.from_numpy(out).transpose(0, 1).contiguous().to(q.dtype), lse.contiguous()

    installed("flashinfer", single_prefill_with_kv_cache=single_prefill_with_kv_cache)
    q, k, v = (part.swapaxes(0, 1) for part in inputs(N))
    q, k, v = (part.float().numpy() for part in tensors(q, k, v, dtype="bfloat16"))
    parts = [tensors(*part, dtype="bfloat16") for part in split(k, v, 0)]
    names = run(FLASHINFER, q=tensors(q, dtype="bfloat16")[0], parts=parts)
    out, lse = exact(*(part.swapaxes(0, 1) for part in (q, k, v)))
    close(names["merged"].attn_out, out.swapaxes(0, 1), BFLOAT16)
    close(names["s"], lse.T / math.log(2), 3e-6)


@needs_torch
def test_vllm():
    q, k, v = inputs(N)
    halves = []
    for part, nothing in ((slice(8), [0, 4]), (slice(8, None), [1, 4])):  # tokens without keys, 4 on either side
        mask = np.ones((S, k[:, part].shape[1]), bool)
        mask[nothing] = False
        out, lse = exact(q, k[:, part], v[:, part], mask)
        halves.append((mask, *tensors(out.swapaxes(0, 1)), *tensors(np.where(np.isneginf(lse), np.inf, lse))))
    (one, *prefix), (other, *suffix) = halves
    names = dict(zip(("prefix_output", "prefix_lse", "suffix_output", "suffix_lse"), (*prefix, *suffix), strict=True))
    names = run(VLLM, **names)
    output, output_lse = names["output"], names["output_lse"]
    out, lse = exact(q, k, v, np.concatenate([one, other], 1))
    close(output, out.swapaxes(0, 1), 2e-6)
    close(output_lse, lse, 2e-6)
    assert not output[4].any() and torch.isneginf(output_lse[:, 4]).all()


# ----------------------------------------------------------------------------------------------- npu_fusion_attention


def npu_fusion_attention(query, key, value, head_num, input_layout, *, scale, actual_seq_qlen=None, actual_seq_kvlen=None):
    """Stand in for torch_npu's: 8 lanes; in TND packed statistics, and lengths without a leading 0."""
    assert scale == D**-0.5
    if input_layout == "SBH":
        query, key, value = (part.reshape(*part.shape[:2], head_num, D) for part in (query, key, value))
        state = partial_attention(query, key, value)
    else:
        lengths = {"actual_seq_qlen": [0, *actual_seq_qlen], "actual_seq_kvlen": [0, *actual_seq_kvlen]}
        state = partial_attention(query, key, value, layout="TND", softmax_layout="SBH", **lengths)
    return *state, np.zeros(0, np.float32), 0, 0, 0


def test_npu_fusion_attention(installed):
    installed("torch_npu", npu_fusion_attention=npu_fusion_attention)
    q, k, v = inputs(B, N)
    in_sbh = [part.transpose(2, 0, 1, 3).reshape(-1, B, N * D) for part in (q, k, v)]
    names = run(NPU, q=in_sbh[0], parts=split(*in_sbh[1:], 0), heads=N, scale=D**-0.5)
    out, lse = exact(q, k, v)
    close(names["merged"].attn_out, out.transpose(2, 0, 1, 3).reshape(S, B, N * D), 2e-6)
    close(names["merged"].lse(base="e"), lse, 2e-6)


def test_npu_fusion_attention_tnd(installed):
    installed("torch_npu", npu_fusion_attention=npu_fusion_attention)
    q_lengths, k_lengths, parts = [2, 3, 4], [5, 0, 6], 3
    rng = np.random.default_rng(4)
    q = rng.standard_normal((9, N, D)).astype(np.float32)
    keys, values = rng.standard_normal((2, parts, 11, N, D)).astype(np.float32)
    names = run(
        NPU_TND, q=q, parts=list(zip(keys, values, strict=True)), heads=N, scale=D**-0.5,
        q_ends=np.cumsum(q_lengths).tolist(), kv_ends=np.cumsum(k_lengths).tolist(),
    )  # fmt: skip
    whole = [
        np.concatenate([part[rows] for rows in sequences(*k_lengths) for part in array]) for array in (keys, values)
    ]
    out, lse = varlen(q, *whole, q_lengths, [parts * length for length in k_lengths])
    close(names["merged"].attn_out, out, 2e-6)
    close(names["lse"], lse, 2e-6)


# -------------------------------------------------------------------------------------------------- rows without keys


def masked():
    """Row 0 sees nothing of the first part, row 5 nothing at all."""
    mask = np.random.default_rng(5).random((S, KEYS)) < 0.6
    mask[0, : CUTS[0]] = False
    mask[5] = False
    return mask, [part for part in np.split(mask, CUTS, 1) if part.size]


@needs_torch
def test_rows_without_keys_with_a_log_sum_exp():
    q, k, v = inputs(B, N)
    mask, masks = masked()
    parts = [tensors(*part) for part in split(k, v, 2) if part[0].size]
    call = {"q": tensors(q)[0], "parts": parts, "masks": [torch.from_numpy(part) for part in masks]}
    merged = run(ROWS_LSE, **call)["merged"]
    out, lse = exact(q, k, v, mask)
    close(merged.attn_out, out, 2e-6)
    close(merged.lse(base="e", layout="BNSD"), lse, 2e-6)
    without = BLOCKS[ROWS_LSE].replace("lse = lse.masked_fill", "lse.masked_fill")
    names = dict(call)
    exec(without, names)
    assert (names["merged"].attn_out[:, :, 0] - torch.from_numpy(out[:, :, 0])).abs().max() > 0.01, "what it is for"


def test_rows_without_keys_with_a_sum():
    q, k, v = inputs(B, N)
    mask, masks = masked()
    states = []
    for (key, value), seen in zip([part for part in split(k, v, 2) if part[0].size], masks, strict=True):
        out, lse = exact(q, key, value, seen)
        hidden = ~seen.any(1)
        out[:, :, hidden], lse[:, :, hidden] = 7, 0  # finite garbage
        stats = [np.repeat(part[..., None], 8, -1).astype(np.float32) for part in (lse, np.ones_like(lse))]
        out = out.transpose(2, 0, 1, 3).reshape(S, B, N * D).astype(np.float32)
        states.append(rau.AttentionState(out, *stats))
    merged = run(ROWS_SUM, states=states, masks=masks)["merged"]
    out, lse = exact(q, k, v, mask)
    close(merged.attn_out, out.transpose(2, 0, 1, 3).reshape(S, B, N * D), 2e-6)
    close(merged.lse(base="e"), lse, 2e-6)


def test_some_tokens_padding_and_another_dtype():
    pytest.importorskip("ml_dtypes")
    prev, cur = (tnd(16, 2, 8, lanes=1, seed=seed) for seed in (0, 1))
    mask = np.arange(16) % 3 == 0
    whole, kept = rau.merge_states([prev, cur], layout="TND"), prev.attn_out.copy()
    merged = run(TOKENS, rau=rau, prev=prev, cur=cur, mask=mask)["merged"]
    np.testing.assert_array_equal(merged.attn_out, np.where(mask[:, None, None], whole.attn_out, kept))
    np.testing.assert_array_equal(prev.attn_out, merged.attn_out)
    prev = tnd(16, 2, 8, lanes=1, seed=0)
    padded = run(SLOTS, rau=rau, prev=prev, cur=cur)["padded"].attn_out
    real = np.isin(np.arange(16), [0, 1, 2, 3, 4, 8, 9])
    np.testing.assert_array_equal(padded, np.where(real[:, None, None], whole.attn_out, 0))
    ragged = run(RAGGED, rau=rau, pool=prev)["ragged"].attn_out
    one_by_one = [[part[k : k + 1] for part in prev] for k in range(16)]
    np.testing.assert_array_equal(ragged[2:], rau.merge_states(one_by_one[2:], layout="TND").attn_out)
    assert not ragged[1].any()
    eight = run(EIGHT, rau=rau, prev=prev, cur=cur)["eight"].astype("f4")
    np.testing.assert_allclose(eight, whole.attn_out / 2, rtol=2**-4, atol=2**-10)


def test_attention_sinks():
    q, k, v = (part.swapaxes(1, 2) for part in inputs(B, N))
    states = [partial_attention(q, *part, layout="BSND") for part in split(k, v, 1) if part[0].size]
    sink = np.array([0.5, -math.inf, 2.0], "f4")
    merged = run(SINKS, states=states, sink=sink)["merged"]
    scores = np.einsum("bsnd,bknd->bnsk", q, k, dtype="f8") / math.sqrt(D)
    p = np.exp(np.concatenate([scores, np.broadcast_to(sink[:, None, None], (B, N, S, 1))], -1))
    out = np.einsum("bnsk,bknd->bsnd", p[..., :-1], v) / p.sum(-1).swapaxes(1, 2)[..., None]
    close(merged.attn_out, out, 2e-6)
    close(merged.lse(base="e", layout="BSND"), np.log(p.sum(-1)), 2e-6)


def test_a_maximum_and_a_sum_to_base_2():
    q, k, v = (array[0] for array in inputs(1, N))
    parts = []
    for key, value in (part for part in split(k, v, 1) if part[0].size):
        two = q @ key.swapaxes(-1, -2) / math.sqrt(D) * math.log2(math.e)
        m = two.max(-1, keepdims=True)
        p = np.exp2(two - m)
        out = p @ value / p.sum(-1, keepdims=True)
        parts.append([array.swapaxes(0, 1).astype("f4") for array in (out, m[..., 0], p.sum(-1))])
    close(run(OWN, parts=parts)["merged"].attn_out, exact(q, k, v)[0].swapaxes(0, 1), 4e-6)


def test_a_running_pair():
    q, k, v = (array[0] for array in inputs(1, N))
    parts = []
    for part in split(k, v, 1):
        if part[0].size:
            out, lse = exact(q, *part)
            parts.append((np.ascontiguousarray(out.swapaxes(0, 1).astype("f4")), lse.astype("f4")))
    out, lse = run(PAIRS, parts=parts)["running"]
    expected, its_lse = exact(q, k, v)
    assert out is parts[0][0]
    close(out, expected.swapaxes(0, 1), 4e-6)
    close(lse, its_lse, 2e-6)


def test_the_output_alone_and_the_bytes_that_the_page_counts():
    q, k, v = inputs(B, N)
    parts = [exact(q, *part) for part in split(k, v, 2) if part[0].size]
    how = {"base": "e", "layout": "BNSD"}
    states = [rau.AttentionState.from_lse(out.astype("f4"), lse.astype("f4"), **how) for out, lse in parts]
    close(run(ALONE, states=states)["out"], exact(q, k, v)[0], 2e-6)

    def bytes_a_row(D, lanes, statistics=True):
        return 3 * 2 * D + 2 * 4 * (3 * lanes if statistics else 2 * lanes)

    said = PAGE[PAGE.index("## One lane or eight") : PAGE.index("## Gradients")]
    moved = [bytes_a_row(D, lanes) for D in (128, 64) for lanes in (1, 8)]
    assert [int(number) for number in re.findall(r"\b\d{3}\b", said) if number != "128"] == [
        *moved, bytes_a_row(128, 1, False), bytes_a_row(64, 1, False)
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- gradients


@needs_torch
def test_gradients_of_the_parts():
    q, k, v = (part.requires_grad_() for part in tensors(*inputs(B, N), dtype="float64"))
    grad_out = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = [(k[:, :, keys], v[:, :, keys]) for keys in (slice(7), slice(7, 16), slice(16, None))]
    names = run(GRADIENTS, q=q, parts=parts, grad_out=grad_out)
    whole = [part.detach().clone().requires_grad_() for part in (q, k, v)]
    out = torch.softmax(whole[0] @ whole[1].mT / math.sqrt(D), -1) @ whole[2]
    close(names["out"].detach(), out.detach().numpy(), 1e-14)
    for mine, expected in zip((q, k, v), torch.autograd.grad(out, whole, grad_out), strict=True):
        close(mine.grad, expected.numpy(), 1e-13)


# -------------------------------------------------------------------------------------------- every backend takes them all


def test_the_recipes_cover_the_table():
    """Each (layout, lse_layout, base) of the page's table is a recipe."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")]
    rows = [row for row in rows[2:] if row[4]]  # npu_fusion_attention has none: the kit's own cases are its states
    (padded,) = (row for row in rows if "actual_seq_qlen" in row[4])  # of which test_padded_lse.py says what it equals
    rows.remove(padded)
    assert len(rows) == 9
    recipes = {(r.layout, r.lse_layout, r.base) for r in RECIPES.values()}
    for _, _, layout, _, lse_layout, base, _ in rows:
        assert tuple(re.search(r'"(\w+)"', cell)[1] for cell in (layout, lse_layout, base)) in recipes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RECIPES)
def test_every_backend_merges_what_they_hand_out(name, dtype, any_backend):
    assert not check_recipe(rau.registry.get(any_backend), RECIPES[name], dtype)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("mutant", ["base", "inf", "order"])
def test_they_find_what_goes_wrong(name, mutant, monkeypatch):
    """A from_lse that takes every base for e, that leaves +inf, or that reads the heads in another order."""
    import rau.state as home

    statistics, from_lse, its = home.statistics, rau.AttentionState.from_lse, RECIPES[name]

    def wrong(maximum, total, dtype, base, lanes):
        if mutant == "order":
            return tuple(part[..., ::-1, :, :] for part in statistics(maximum, total, dtype, base, lanes))
        return statistics(maximum, total, dtype, "e" if mutant == "base" else base, lanes)

    monkeypatch.setattr(home, "statistics", wrong)
    if mutant == "inf":
        monkeypatch.setattr(rau.AttentionState, "from_lse", lambda *pair, **how: from_lse(*pair, **how | {"inf_is_empty": False}))
    wrongs = {"base": its.base == "2", "inf": its.inf_is_empty, "order": True}
    problems = check_recipe(rau.registry.get("numpy"), its, "float32")
    assert bool(problems) == wrongs[mutant], problems
