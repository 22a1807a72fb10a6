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


def test_the_limits_are_those_of_the_operator_whose_spelling_it_is():
    many = six(N=256, D=768)  # CANN's second entry takes it
    assert npu_ring_attention_update(*many, actual_seq_qlen=LENGTHS, input_layout="TND")[0].shape == (8, 256, 768)
    for call in (npu_ring_attention_update, ring_attention_update):
        with pytest.raises(rau.ConstraintError) as caught:
            call(*many, LENGTHS, "TND")
        assert caught.value.rules == ("tnd-unified-buffer",)
    wide = six(N=1, D=832)  # and the first one this
    assert npu_ring_attention_update(*wide, LENGTHS, "TND")[0].shape == (8, 1, 832)
    with pytest.raises(rau.ConstraintError) as caught:
        npu_ring_attention_update(*wide, actual_seq_qlen=LENGTHS, input_layout="TND")
    assert caught.value.rules == ("tnd-head-dim-768",)


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


def blocks(language):
    text = DOCS.read_text(encoding="utf-8")
    return [block.split("```")[0] for block in text.split(f"```{language}\n")[1:]]


def test_the_script_of_the_documentation():
    """docs/ascend.md: the training script on a laptop, and what it prints."""
    torch_or_skip()
    (script,), (printed,) = blocks("python"), blocks("text")
    assert in_a_fresh_process(script) == printed
