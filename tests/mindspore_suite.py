"""MindSpore's tensors: on a CPU by the core, and the ascend backend on a stand-in for the operator.

An optional job: MindSpore takes 2.8 GB. docs/ascend.md says when this was last run, and on what.
"""

import os
import warnings

import numpy as np
import pytest
from states import NAMES, arguments, tnd

import rau
from rau import registry
from rau.testing.cases import Case, generated, named
from rau.testing.comparison import same_bits

with warnings.catch_warnings():  # of its own modules
    warnings.simplefilter("ignore")
    if "mindspore" in os.environ.get("RAU_TEST_BACKENDS", ""):
        import mindspore
    else:
        mindspore = pytest.importorskip("mindspore", reason="MindSpore is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
if np.lib.NumpyVersion(np.__version__) >= "2.0.0" and mindspore.__version__.startswith("2.10"):
    pytest.skip("MindSpore 2.10 was built against NumPy 1 and does not work beside NumPy 2", allow_module_level=True)


def tensor(array):
    array = np.array(array, order="C")
    if array.dtype.name == "bfloat16":
        return mindspore.Tensor.from_numpy(array.view(np.uint16)).view(mindspore.bfloat16)
    return mindspore.Tensor.from_numpy(array)


def array(tensor):
    if tensor.dtype == mindspore.bfloat16:
        import ml_dtypes

        return tensor.view(mindspore.uint16).asnumpy().view(ml_dtypes.bfloat16)
    return tensor.asnumpy()


def six(make, **sizes):
    return [tensor(part) for part in arguments(make, **sizes).values()]


@pytest.mark.parametrize("backend", ["cython", "numpy", None])
def test_the_same_bits_as_numpy_arrays(backend):
    for case in [*generated(5, 200), *(case for case in named() if case.tokens < 100)]:
        reference = case.make().run("numpy")
        call = case.make()
        converted = {}

        def own(part, converted=converted):
            return converted.setdefault(id(part), tensor(part))

        states = [rau.AttentionState(*map(own, each)) for each in call.states]
        out = None if call.out is None else tuple(own(placed.view) for placed in call.out)
        result = case.call(states, out, backend)
        assert all(type(part) is mindspore.Tensor for part in result), case
        if out is not None:
            assert all(part is target for part, target in zip(result, out, strict=True)), case
        assert not same_bits(reference, [array(part) for part in result]), case


def test_they_run_on_the_core_unasked_without_a_copy():
    tensors = six(tnd, dtype="bfloat16")
    explanation = rau.explain(*tensors, [0, 8], "TND")
    assert (explanation.selected, explanation.origin) == ("cython", "automatic")
    assert (explanation.problem.kind, explanation.problem.device) == ("mindspore", "cpu")
    addresses = [part.data_ptr() for part in tensors]
    result = rau.ring_attention_update(*tensors, [0, 8], "TND", out=tensors[:3])
    assert [part.data_ptr() for part in tensors] == addresses
    assert all(part is given for part, given in zip(result, tensors[:3], strict=True))
    expected = rau.ring_attention_update(*arguments(tnd, dtype="bfloat16").values(), [0, 8], "TND")
    assert not same_bits(expected, [array(part) for part in tensors[:3]])


@pytest.mark.parametrize("backend", ["cython", "numpy"])
def test_strided_views(backend):
    given = arguments(tnd, T=12, N=4)
    padded = {name: np.repeat(np.repeat(part, 2, axis=0), 3, axis=1) for name, part in given.items()}
    views = [tensor(part)[::2, 1::3] for part in padded.values()]
    assert not any(view.is_contiguous() for view in views)
    expected = rau.ring_attention_update(*given.values(), [0, 12], "TND")
    result = rau.ring_attention_update(*views, [0, 12], "TND", backend=backend)
    assert not same_bits(expected, [array(part) for part in result])
    result = rau.ring_attention_update(*views, [0, 12], "TND", backend=backend, out=views[:3])
    assert not same_bits(expected, [array(part.contiguous()) for part in result])


def test_fresh_results_own_their_memory():
    kept = rau.ring_attention_update(*six(tnd, dtype="bfloat16"), [0, 8], "TND")
    before = [array(part).copy() for part in kept]
    for seed in range(20):
        rau.ring_attention_update(*six(tnd, dtype="bfloat16"), [0, 8], "TND", backend=("cython", "numpy")[seed % 2])
    assert not same_bits(before, [array(part) for part in kept])


def test_lengths_of_every_kind():
    tensors = six(tnd)
    expected = rau.ring_attention_update(*arguments(tnd).values(), [0, 3, 8], "TND", softmax_layout="SBH")
    for lengths in ([0, 3, 8], mindspore.Tensor([0, 3, 8], mindspore.int64), np.array([0, 3, 8])):
        result = rau.compat.ring_attention_update(*tensors, lengths, "TND")
        assert type(result) is tuple and not same_bits(expected, [array(part) for part in result])
    with pytest.raises(rau.ConstraintError, match=r"actual_seq_qlen = \[0, 9, 8\]: it decreases"):
        rau.compat.ring_attention_update(*tensors, mindspore.Tensor([0, 9, 8], mindspore.int64), "TND")


def test_mixed_kinds_are_refused():
    tensors = six(tnd)
    with pytest.raises(rau.DTypeError, match="cur_attn_out is a numpy array and prev_attn_out a mindspore one"):
        rau.ring_attention_update(*tensors[:3], array(tensors[3]), *tensors[4:], [0, 8], "TND")


def test_a_tensor_that_is_only_described():
    ones = mindspore.Tensor(shape=(8, 2, 64), dtype=mindspore.float32, init=mindspore.common.initializer.One())
    tensors = [ones if name.endswith("attn_out") else part for name, part in zip(NAMES, six(tnd), strict=True)]
    assert not ones.data_ptr()
    assert np.allclose(rau.ring_attention_update(*tensors, [0, 8], "TND").attn_out.asnumpy(), 1)


def test_what_is_still_being_computed_is_waited_for():
    large = tensor(np.full((1500, 1500), 1e-3, np.float32))
    pending = large
    for _ in range(4):
        pending = mindspore.ops.matmul(pending, large)
    stats = six(tnd, T=1500, N=1)[1:3]
    values = mindspore.ops.reshape(pending[:, :64], (1500, 1, 64)) * 1.0
    result = rau.ring_attention_update(values, *stats, values, *stats, [0, 1500], "TND")
    assert np.allclose(result.attn_out.asnumpy(), values.asnumpy()) and values.asnumpy().all()
    # And what is queued to read an array sees it as it was before the call wrote into it.
    before = values.asnumpy().copy()
    for _ in range(4):
        pending = mindspore.ops.matmul(pending, large)
    seen = values + 0.0
    out = (values, *six(tnd, T=1500, N=1)[1:3])
    rau.ring_attention_update(values, *stats, values * 3.0, *stats, [0, 1500], "TND", out=out)
    assert np.array_equal(seen.asnumpy(), before) and not np.array_equal(values.asnumpy(), before)


def test_a_gradient_is_refused_rather_than_lost():
    prev, *rest = six(tnd)

    def loss(out):
        return rau.ring_attention_update(out, *rest, [0, 8], "TND").attn_out.sum()

    def detached(out):
        return (rau.ring_attention_update(mindspore.ops.stop_gradient(out), *rest, [0, 8], "TND").attn_out * out).sum()

    expected = rau.ring_attention_update(prev, *rest, [0, 8], "TND").attn_out
    assert np.allclose(mindspore.grad(detached)(prev).asnumpy(), expected.asnumpy())

    with pytest.raises(rau.UnsupportedError, match=r"has no gradient; pass mindspore\.ops\.stop_gradient"):
        mindspore.grad(loss)(prev)


# ---- Ascend: MindSpore's own tensors and operations, on the CPU, with a stand-in for the operator --------------------


def kernel(*arguments):
    """The vendor's kernel: packed statistics, float32 rows, element d of a row times lane d mod 8, no guards."""
    *parts, lengths, layout = arguments
    prev_out, prev_max, prev_sum, cur_out, cur_max, cur_sum = (part.asnumpy() for part in parts)
    with np.errstate(all="ignore"):
        maximum = np.maximum(prev_max, cur_max)
        a, b = prev_sum * np.exp(prev_max - maximum), cur_sum * np.exp(cur_max - maximum)
        total = a + b
        heads = maximum.shape[1]
        shape = (*prev_out.shape[:2], heads, -1) if layout == "SBH" else prev_out.shape
        terms = []
        for weight, out in ((a / total, prev_out), (b / total, cur_out)):
            if layout == "SBH":
                rows = weight.transpose(2, 0, 1, 3)
            else:
                rows, ends = np.empty_like(weight), lengths.asnumpy().tolist()
                for start, end in zip(ends, ends[1:], strict=False):
                    own = weight.reshape(-1, 8)[start * heads : end * heads].reshape(heads, end - start, 8)
                    rows[start:end] = own.swapaxes(0, 1)
            out = out.reshape(shape).astype("f4")
            terms.append(out * rows[..., np.arange(out.shape[-1]) % 8])
        merged = (terms[0] + terms[1]).astype(prev_out.dtype).reshape(prev_out.shape)
    return tuple(map(mindspore.Tensor, (merged, maximum, total)))

def test_a_running_state_of_whole_updates():
    states = [Case(id=f"hop/{hop}", tokens=5, heads=3, head_dim=16, dtype="float16").fill()[0] for hop in range(3)]
    ring, reference = rau.StreamingMerge(), rau.StreamingMerge()
    for state in states:
        ring.update(*map(tensor, state))
        reference.update(*state)
    result = ring.result("float16")
    assert not same_bits(reference.result("float16"), [array(part) for part in result])
    with pytest.raises(rau.UnsupportedError, match="MindSpore tensors, whose slices may be copies"):
        ring.update(*map(tensor, states[0]), tokens="back")



@pytest.fixture
def ascend(monkeypatch):
    """MindSpore that says its target is Ascend, and has the operator there."""
    from rau.backends.ascend_ import AscendBackend

    real = mindspore.get_context
    monkeypatch.setattr(
        mindspore, "get_context", lambda name: "Ascend" if name == "device_target" else real(name)
    )
    monkeypatch.setattr(mindspore.ops, "ring_attention_update", kernel)
    registry.refresh()
    backend = AscendBackend()
    with registry.provisionally(backend):
        yield backend
    monkeypatch.undo()
    registry.refresh()


def test_conformance_on_a_stand_in_for_the_operator(ascend):
    from rau.testing import check_backend

    def computes(case):  # on a CPU, MindSpore selects no bfloat16
        return "bfloat16" not in (case.dtype, case.cur_dtype) and not (case.dtype == "float16" and case.states > 2)

    groups = ("tnd/", "layout/", "statistics/", "outputs/", "states/3", "lanes/", "none/")
    cases = [case for case in named() if case.id.startswith(groups) and computes(case) and case.tokens < 1000]
    known = {
        "streaming/*": "a StreamingMerge takes no `tokens` of MindSpore tensors",
        "states/stacked-bfloat16": "on a CPU, MindSpore selects no bfloat16",
    }
    report = check_backend(ascend, known, cases=cases, select="[!ac]*")  # algebra/ and calls/ want bfloat16
    assert report.passed, "\n".join(f"{failure.id}: {failure.message}" for failure in report.failures)
    assert len(report.succeeded) > 40


def test_lengths_on_the_device(ascend):
    case = Case(id="lengths", layout="TND", softmax_layout="SBH", tokens=12, lengths=(5, 0, 7), head_dim=64, heads=3)
    numbers = case.fill()
    states = [rau.AttentionState(*map(tensor, state)) for state in numbers]
    for dtype in (mindspore.int64, mindspore.int32):
        lengths = mindspore.Tensor([0, 5, 5, 12], dtype)
        call = {"layout": "TND", "softmax_layout": "SBH", "profile": "portable"}
        result = rau.ring_attention_update(*states[0], *states[1], lengths, **call)
        expected = rau.ring_attention_update(*numbers[0], *numbers[1], [0, 5, 5, 12], "TND", softmax_layout="SBH")
        assert np.allclose(result.attn_out.asnumpy(), expected.attn_out, rtol=1e-5, atol=1e-6)
    explanation = rau.explain(*states[0], *states[1], lengths, **call)
    assert (explanation.selected, explanation.problem.device) == ("ascend", "ascend")
