"""rau.compat: the vendors' signatures, and the order of the statistics that each of them means."""

import inspect
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from states import NAMES, bits, sbh, tnd

import rau
from rau import AttentionState
from rau.backends.numpy_ import NumPyBackend
from rau.compat import (
    flash_attn,
    flashinfer,
    npu_ring_attention_update,
    ring_attention_update,
    ring_flash_attention,
    sglang,
    torch_,
    transformer_engine,
    vllm,
    xformers,
)
from rau.compat.words import worded

DOCS = Path(__file__).parent.parent / "docs" / "ascend.md"
LENGTHS = [0, 3, 3, 8]


def six(make=tnd, **sizes):
    return [*make(**sizes, seed=1), *make(**sizes, seed=2)]


def ours(order, arrays, **options):
    return rau.ring_attention_update(*arrays, LENGTHS, "TND", softmax_layout=order, **options)


def assert_is(result, expected):
    assert type(result) is tuple and len(result) == 3
    assert bits(result) == bits(expected)


def test_the_signatures_are_the_vendors():
    def parameters(function):
        return [(one.name, one.default) for one in inspect.signature(function).parameters.values()]

    required = [(name, inspect.Parameter.empty) for name in NAMES]
    assert parameters(ring_attention_update) == [*required, ("actual_seq_qlen", None), ("layout", "SBH")]
    assert parameters(npu_ring_attention_update) == [
        *required, ("actual_seq_qlen", None), ("layout", None), ("input_layout", None), ("input_softmax_layout", "")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "call",
    [
        lambda a: ring_attention_update(*a, LENGTHS, "TND"),
        lambda a: ring_attention_update(*a, layout="TND", actual_seq_qlen=np.array(LENGTHS)),
        lambda a: npu_ring_attention_update(*a, LENGTHS, "TND"),
        lambda a: npu_ring_attention_update(*a, actual_seq_qlen=LENGTHS, layout="TND"),
        lambda a: npu_ring_attention_update(*a, actual_seq_qlen=LENGTHS, input_layout="TND"),
        lambda a: npu_ring_attention_update(
            *a, actual_seq_qlen=LENGTHS, input_layout="TND", input_softmax_layout="SBH"
        ),
        lambda a: npu_ring_attention_update(
            **dict(zip(NAMES, a, strict=True)), actual_seq_qlen=LENGTHS, input_layout="TND"
        ),
    ],
    ids=["mindspore", "mindspore, names", "mindspeed", "mindspeed, names", "torch_npu", "torch_npu, SBH", "all names"],
)
def test_statistics_are_packed(call):
    assert_is(call(six()), ours("SBH", six()))
    assert bits(call(six()))[0] != bits(ours("TND", six()))[0]


def test_torch_npu_can_be_told_otherwise():
    result = npu_ring_attention_update(*six(), actual_seq_qlen=LENGTHS, input_layout="TND", input_softmax_layout="TND")
    assert_is(result, ours("TND", six()))


def test_the_default_layout():
    expected = rau.ring_attention_update(*six(sbh))
    for call in (ring_attention_update, npu_ring_attention_update):
        assert_is(call(*six(sbh)), expected)
    assert_is(npu_ring_attention_update(*six(sbh), input_layout="SBH"), expected)


def test_one_spelling_at_a_time():
    with pytest.raises(rau.LayoutError) as caught:
        npu_ring_attention_update(*six(), LENGTHS, "TND", input_layout="TND")
    assert str(caught.value) == (
        "npu_ring_attention_update: [layout] layout = 'TND' and input_layout = 'TND' are both given; expected one of "
        "them: the first is MindSpeed's spelling, the second torch_npu's."
    )


@pytest.mark.parametrize(
    "options", [{"layout": ""}, {"input_layout": "BSND"}, {"input_layout": "TND", "input_softmax_layout": "T"}]
)
def test_wrong_names_are_refused(options):
    with pytest.raises(rau.LayoutError):
        npu_ring_attention_update(*six(), actual_seq_qlen=LENGTHS, **options)


def op_plugins_call(lengths, **sizes):
    """As in op-plugin's own test: 5 tokens, token-major statistics."""
    return npu_ring_attention_update(
        *six(T=5, **sizes), actual_seq_qlen=lengths, input_layout="TND", input_softmax_layout="TND"
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("lengths", [np.array([2, 5]), np.array([2, 5], np.int32), [2, 5], [9, -1], []], ids=str)
def test_lengths_that_torch_npu_does_not_read_are_not_read(lengths, dtype):
    expected = rau.ring_attention_update(*six(T=5, dtype=dtype), layout="TND", profile="portable")
    assert_is(op_plugins_call(lengths, dtype=dtype), expected)


def test_lengths_that_are_not_read_are_asked_for_all_the_same():
    with pytest.raises(rau.ConstraintError) as caught:
        op_plugins_call(None)
    assert caught.value.rules == ("tnd-qlen-required",)


@pytest.mark.parametrize("order", ["", "SBH"])
def test_lengths_that_are_read_are_checked(order):
    for lengths, rule in (([2, 5], "tnd-qlen-cumulative"), (np.array([0, 5], np.int32), "qlen-dtype")):
        with pytest.raises(rau.ConstraintError) as caught:
            npu_ring_attention_update(
                *six(T=5), actual_seq_qlen=lengths, input_layout="TND", input_softmax_layout=order
            )
        assert caught.value.rules == (rule,)


def test_what_is_no_array_is_said_before_lengths_matter():
    for wrong in ([[1.0]], 1.0, np.float32(1)):
        with pytest.raises(rau.ConstraintError) as caught:
            npu_ring_attention_update(wrong, *six()[1:], actual_seq_qlen=[2, 5], input_layout="TND",
                                      input_softmax_layout="TND")  # fmt: skip
        assert "prev_attn_out" in str(caught.value) and "actual_seq_qlen" not in str(caught.value)


def test_the_limits_are_those_of_the_operator_whose_spelling_it_is():
    def mindspeed(arrays):
        return npu_ring_attention_update(*arrays, LENGTHS, "TND")

    def torch_npu(arrays):
        return npu_ring_attention_update(*arrays, actual_seq_qlen=LENGTHS, input_layout="TND")

    def mindspore(arrays):
        return ring_attention_update(*arrays, LENGTHS, "TND")

    def broken(call, arrays):
        with pytest.raises(rau.ConstraintError) as caught:
            call(arrays)
        return caught.value.rules

    many, wide, more = six(N=256, D=768), six(N=1, D=832), six(N=257, D=64)
    for call in (mindspeed, torch_npu):
        assert call(many)[0].shape == (8, 256, 768)
        assert broken(call, wide) == ("tnd-head-dim-768",)
        assert broken(call, more) == ("tnd-heads-256",)
    assert broken(mindspore, many) == ("tnd-unified-buffer",)
    assert mindspore(wide)[0].shape == (8, 1, 832)


def test_backends_are_chosen_around_it():
    with rau.use_backend("numpy"):
        assert_is(ring_attention_update(*six(), LENGTHS, "TND"), ours("SBH", six(), backend="numpy"))
    with rau.use_backend("numpy"), pytest.raises(rau.DTypeError):
        ring_attention_update(*map(list, six(sbh)))


def in_a_fresh_process(program, *arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAU_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(rau.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_it_is_reached_lazily():
    program = "import sys, rau; print('rau.compat' in sys.modules, rau.compat.__name__, 'compat' in dir(rau))"
    assert in_a_fresh_process(program).split() == ["False", "rau.compat", "True"]


def torch_or_skip():
    if "torch" in os.environ.get("RAU_TEST_BACKENDS", ""):
        import torch
    else:
        torch = pytest.importorskip("torch", reason="torch is not installed and was not asked for")
    return torch


def test_torch_tensors_with_a_gradient_and_compiled():
    torch = torch_or_skip()
    tensors = [torch.from_numpy(array) for array in six()]
    expected = ours("SBH", six())
    result = npu_ring_attention_update(*tensors, torch.tensor(LENGTHS), "TND")
    assert bits(part.numpy() for part in result) == bits(expected)

    @torch.compile(fullgraph=True, backend="eager")
    def step(*parts):
        return npu_ring_attention_update(*parts, actual_seq_qlen=torch.tensor(LENGTHS), input_layout="TND")

    leaves = [part.clone().requires_grad_() for part in tensors]
    result = step(*leaves)
    assert bits(part.detach().numpy() for part in result) == bits(expected)
    result[0].sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


def test_lengths_that_are_not_read_while_torch_traces():
    torch = torch_or_skip()

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def step(lengths, *parts):
        return npu_ring_attention_update(
            *parts, actual_seq_qlen=lengths, input_layout="TND", input_softmax_layout="TND"
        )

    for tokens in (5, 7):
        arrays = six(T=tokens)
        expected = rau.ring_attention_update(*arrays, layout="TND", profile="portable")
        result = step(torch.tensor([2, 5], dtype=torch.int32), *map(torch.from_numpy, arrays))
        assert bits(part.numpy() for part in result) == bits(expected)


def blocks(language):
    text = DOCS.read_text(encoding="utf-8")
    return [block.split("```")[0] for block in text.split(f"```{language}\n")[1:]]


def test_the_script_of_the_documentation():
    """docs/ascend.md: the training script on a laptop, and what it prints."""
    torch_or_skip()
    (script,), (printed,) = blocks("python"), blocks("text")
    assert in_a_fresh_process(script) == printed


# ------------------------------------------------------------------------------------------- errors in the caller's words

OUT, LSE = np.ones((6, 2, 8), "f4"), np.ones((6, 2), "f4")
STATE = AttentionState(*tnd(T=6, N=2))


def fixed(array):
    """A copy that may not be written to."""
    array = array.copy()
    array.flags.writeable = False
    return array


WORDS = {
    "a forgotten layout, torch_npu's": (
        lambda: npu_ring_attention_update(*STATE, *STATE),
        "npu_ring_attention_update: [rank] prev_attn_out has shape (6, 2, 64) and prev_softmax_max (6, 2, 8); layout "
        '"SBH" expects (S, B, H) and (B, N, S, 8). They fit input_layout="TND".',
    ),
    "a forgotten layout, MindSpore's": (
        lambda: ring_attention_update(*STATE, *STATE),
        "ring_attention_update: [rank] prev_attn_out has shape (6, 2, 64) and prev_softmax_max (6, 2, 8); layout "
        '"SBH" expects (S, B, H) and (B, N, S, 8). They fit layout="TND".',
    ),
    "an order of another name": (
        lambda: npu_ring_attention_update(*STATE, *STATE, [0, 6], input_layout="TND", input_softmax_layout="tnd"),
        'npu_ring_attention_update: [softmax-layout] input_softmax_layout = \'tnd\'; expected one of "SBH", "TND". '
        'Did you mean "TND"? "TND" is token-major; "SBH", or "", is packed per sequence, as npu_fusion_attention emits.',
    ),
    "an order of no name": (
        lambda: npu_ring_attention_update(*STATE, *STATE, [0, 6], input_layout="TND", input_softmax_layout="token"),
        'npu_ring_attention_update: [softmax-layout] input_softmax_layout = \'token\'; expected one of "SBH", "TND". '
        '"TND" is token-major; "SBH", or "", is packed per sequence, as npu_fusion_attention emits.',
    ),
    "a layout of rau's": (
        lambda: npu_ring_attention_update(*STATE, *STATE, input_layout="BSND"),
        'npu_ring_attention_update: [layout] input_layout = \'BSND\'; expected one of "SBH", "TND".',
    ),
    "a limit that profile= would lift": (
        lambda: ring_attention_update(*tnd(D=32), *tnd(D=32), [0, 8], "TND"),
        'ring_attention_update: [tnd-head-dim-64] the last axis of prev_attn_out is D = 32; layout "TND" takes multiples of '
        "64. This is a limit of the Ascend chip.",
    ),
    "one lane": (
        lambda: npu_ring_attention_update(*tnd(lanes=1), *tnd(lanes=1), LENGTHS, "TND"),
        "npu_ring_attention_update: [lanes] prev_softmax_max has shape (8, 2, 1); expected a last axis of 8. "
        "AttentionState.from_lse(..., lanes=8) makes 8.",
    ),
    "a swapped pair": (
        lambda: flashinfer.merge_state(OUT, LSE, LSE, OUT),
        "merge_state: [rank] v_b has shape (6, 2); expected (T, N, D). The pair seems to be swapped.",
    ),
    "in place": (
        lambda: flashinfer.merge_state_in_place(OUT, LSE, OUT, LSE[:, :1]),
        "merge_state_in_place: [shape-stats] s_other has shape (6, 1); for v_other of shape (6, 2, 8), expected (T, N) = (6, 2). "
        "Its 1 heads seem to be the key heads of grouped-query attention: pass one number for each query head.",
    ),
    "one of K": (
        lambda: flashinfer.merge_states(OUT[:, None].repeat(3, 1), LSE[:, None].repeat(3, 1).astype("f2")),
        "merge_states: 3 rules are broken:\n  [dtype-stats] s[:, 0] has dtype float16; expected one of float32, float64. Compute it "
        "in float32; or pass s[:, 0].astype(numpy.float32), at the price of 11 significant bits: weights are off by up to "
        "abs(s[:, 0]) * 2**-12.",
    ),
    "axes of log-sum-exps, which are not an option": (
        lambda: sglang.merge_state_v2(OUT, LSE, OUT, LSE.T),
        "merge_state_v2: [shape-stats] s_b has shape (2, 6); for v_b of shape (6, 2, 8), expected (T, N) = (6, 2). It looks like "
        "(N, T).",
    ),
    "an output alone": (
        lambda: vllm.merge_attn_states(OUT.copy(), OUT, LSE.T, OUT[..., 0], LSE.T),
        "merge_attn_states: [rank] suffix_output has shape (6, 2); expected (T, N, D).",
    ),
    "where to write": (
        lambda: vllm.merge_attn_states(OUT.astype("f2"), OUT, LSE.T, OUT, LSE.T),
        "merge_attn_states: [out-dtype] output has dtype float16; expected float32.",
    ),
    "a mask": (
        lambda: flashinfer.merge_state_in_place(OUT, LSE, OUT, LSE, np.ones(5)),
        "merge_state_in_place: [shape-match] mask has shape (5,); expected (T) = (6,), as v has.",
    ),
    "a swapped pair of any number a row": (
        lambda: flashinfer.variable_length_merge_states(LSE, OUT, [0, 3, 6]),
        "variable_length_merge_states: [rank] v has shape (6, 2); expected (T, N, D). The pair seems to be swapped.",
    ),
    "splits and their log-sum-exps": (
        lambda: flash_attn.flash_attn_combine([OUT], [LSE, LSE]),
        "flash_attn_combine: [states] out_partial is of 1 parts and lse_partial of 2; expected as many.",
    ),
    "no splits": (
        lambda: xformers.merge_attentions(3, [LSE]),
        "merge_attentions: [array] attn_split is of type int; expected an array, or a list of arrays, one for each part of the keys.",
    ),
    "the first block": (
        lambda: ring_flash_attention.update_out_and_lse(None, None, OUT, LSE),
        "update_out_and_lse: [shape-match] block_lse has shape (6, 2); expected (N, T) = (2, 6), as block_out has.",
    ),
    "the running block": (
        lambda: ring_flash_attention.update_out_and_lse(OUT, LSE, OUT, LSE.T),
        "update_out_and_lse: [rank] lse has shape (6, 2); expected (B, S, N, 1) or (T, N, 1).",
    ),
    "steps": (
        lambda: transformer_engine.flash_attn_fwd_second_half_softmax_lse_correction(np.ones((1, 2, 2, 3), "f4"), LSE),
        "flash_attn_fwd_second_half_softmax_lse_correction: [shape-match] softmax_lse_per_step has shape (6, 2) and dtype float32; "
        "expected those of softmax_lse, (1, 2, 3) and float32.",
    ),
    "a step's output": (
        lambda: transformer_engine.thd_out_correction(OUT.copy(), OUT, LSE.T, LSE.T.astype("f2"), np.array([0, 6]), False, True),
        "thd_out_correction: 2 rules are broken:\n  [dtype-stats] lse_per_step has dtype float16; expected one of float32, float64. "
        "Compute it in float32; or pass lse_per_step.astype(numpy.float32), at the price of 11 significant bits: weights are off "
        "by up to abs(lse_per_step) * 2**-12.",
    ),
    "an output that may not be written to": (
        lambda: flashinfer.merge_state_in_place(fixed(OUT), LSE.copy(), OUT, LSE),
        "merge_state_in_place: [out-writable] v is read-only; expected an array that may be written to.",
    ),
    "an output with a name of its own that may not be written to": (
        lambda: sglang.merge_state(OUT, LSE, OUT, LSE, fixed(OUT)),
        "merge_state: [out-writable] output is read-only; expected an array that may be written to.",
    ),
    "an output alone that may not be written to": (
        lambda: vllm.merge_attn_states(fixed(OUT), OUT, LSE.T, OUT, LSE.T),
        "merge_attn_states: [out-writable] output is read-only; expected an array that may be written to.",
    ),
    "a scale without eight bits": (
        lambda: vllm.merge_attn_states(OUT.copy(), OUT, LSE.T, OUT, LSE.T, output_scale=np.ones(1, "f4")),
        "merge_attn_states: [scale] output_scale is given, and output has dtype float32; expected float8_e4m3fn or float8_e5m2, "
        "whose range it serves.",
    ),
    "a scale of another dtype": (
        lambda: vllm.merge_attn_states(
            OUT.astype(pytest.importorskip("ml_dtypes").float8_e5m2), OUT, LSE.T, OUT, LSE.T, output_scale=np.ones(1)),
        "merge_attn_states: [scale] output_scale is a numpy array of float64; expected a numpy array of float32.",
    ),
    "a dtype": (
        lambda: xformers.merge_attentions(OUT[None, None], LSE.T[None, None], output_dtype="int8"),
        "merge_attentions: [dtype-attn] output_dtype = 'int8', for outputs of float32; expected one of float32, float16, bfloat16, "
        "float8_e4m3fn, float8_e5m2.",
    ),
    "axes that no layout here has": (
        lambda: npu_ring_attention_update(*STATE, *STATE, input_layout="BSH"),
        "npu_ring_attention_update: [layout] input_layout = 'BSH'; expected one of \"SBH\", \"TND\".",
    ),
    "a running log-sum-exp that may not be written to": (
        lambda: transformer_engine.flash_attn_fwd_softmax_lse_correction(fixed(LSE), LSE),
        "flash_attn_fwd_softmax_lse_correction: [out-writable] softmax_lse is read-only; expected an array that may be written to.",
    ),
    "running sequences that may not be written to": (
        lambda: transformer_engine.thd_second_half_lse_correction(
            fixed(LSE.T), LSE.T[:, :3], np.array([0, 6]), True),
        "thd_second_half_lse_correction: [out-writable] lse is read-only; expected an array that may be written to.",
    ),
    "a running sum that may not be written to": (
        lambda: transformer_engine.thd_out_correction(
            fixed(OUT), OUT, LSE.T, LSE.T, np.array([0, 6]), False, True),
        "thd_out_correction: [out-writable] out is read-only; expected an array that may be written to.",
    ),
    "a slice of what may not be written to": (
        lambda: ring_flash_attention.update_out_and_lse(
            fixed(OUT), LSE[..., None].copy(), OUT[:2], LSE[:2].T, slice(2)),
        "update_out_and_lse: [out-writable] out is read-only; expected an array that may be written to.",
    ),
    "a half first": (
        lambda: torch_._SDPAMerger(True, 2).step(OUT[None], LSE[None], partial=True),
        "_SDPAMerger.step: [first-update] partial is True in the first step; expected False, since that one covers all tokens.",
    ),
    "a result first": (
        lambda: torch_._SDPAMerger(True, 2).results(),
        "_SDPAMerger.results: [first-update] there is nothing merged yet; expected a step first.",
    ),
    "torch's own": (
        lambda: torch_._SDPAMerger(True, 2).step(LSE[None, None], LSE[None], partial=False),
        "_SDPAMerger.step: [shape-match] lse has shape (1, 6, 2); expected (B, N, S) = (1, 1, 6), as out has.",
    ),
}


@pytest.mark.parametrize("wrong", WORDS)
def test_errors_are_in_the_words_of_the_function_that_was_called(wrong):
    call, says = WORDS[wrong]
    with pytest.raises(rau.ConstraintError) as caught:
        call()
    assert str(caught.value).startswith(says) if says.count("\n") else str(caught.value) == says
    assert caught.value.rules


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("f: out is given; leave it out, and take what comes out of it",
         "output is given; leave it out, and take what comes out of it"),
        ("f: [out] out has 2 items; rows that nobody takes out is what this is",
         "[out] output has 2 items; rows that nobody takes out is what this is"),
        ("f: whose rows nobody takes out and puts back here",
         "whose rows nobody takes out and puts back here"),
        ("f: [scale] the scale is one of several. Leave scale=None, or give less.",
         "[scale] the scale is one of several. Leave factor=None, or give less."),
        ("f: no place for it. Leave out=None, or call under torch.no_grad().",
         "no place for it. Call under torch.no_grad()."),
        ("f: no place. Pass x.float(), or profile=\"portable\" for it.",
         "no place. Pass x.float()."),
        ("f: no place. Give lanes=1; or pass x.float(): it is exact.",
         "no place. Pass x.float(): it is exact."),
        ("f: out[0] has dtype x, as pairs[1][0] and out[1] have",
         "output has dtype x, as cur and out_lse have"),
    ],
)  # fmt: skip
def test_names_are_replaced_and_prose_is_not(text, says):
    @worded(("prev", "prev_lse"), ("cur", "cur_lse"), out="output", out_0="output", out_1="out_lse", scale="factor")
    def call(output, factor=None):
        raise rau.UnsupportedError(text)

    with pytest.raises(rau.UnsupportedError) as caught:
        call(1)
    assert str(caught.value).partition(": ")[2] == says


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        (lambda out, lse: vllm.merge_attn_states(out.detach(), out, lse.T, out, lse.T), "Call under torch.no_grad()."),
        (lambda out, lse: sglang.merge_state(out, lse, out, lse, out.detach()), "Leave output=None, or call under torch.no_grad()."),
        (lambda out, lse: flashinfer.merge_state_in_place(out, lse, out, lse), "Call under torch.no_grad()."),
    ],
)
def test_only_what_may_be_left_out_is_advised_to_be(call, advice):
    torch = torch_or_skip()
    out, lse = torch.tensor(OUT, requires_grad=True), torch.tensor(LSE)
    with pytest.raises(rau.UnsupportedError) as caught:
        call(out, lse)
    said = str(caught.value)
    assert re.search(": (output|v) is given, and an input requires grad;", said) and said.endswith(f" {advice}")


def test_a_backend_that_cannot_is_named_as_before():
    class Small(NumPyBackend):
        name, capabilities = "small", replace(NumPyBackend.capabilities, max_heads=1)

    with rau.registry.provisionally(Small()), rau.use_backend("small"), pytest.raises(rau.UnsupportedError, match="N = 2 > 1"):
        flashinfer.merge_state(OUT, LSE, OUT, LSE)
