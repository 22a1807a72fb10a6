"""rau.compat: the vendors' signatures, and the order of the statistics that each of them means."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from states import NAMES, bits, sbh, tnd

import rau
from rau.compat import npu_ring_attention_update, ring_attention_update

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
