"""from_lse of log-sum-exps that are padded to the longest sequence: what joining by hand gives, and no copied output."""

import itertools

import numpy as np
import pytest
from running import same

import rau
from rau import AttentionState

CU, N, D = [0, 2, 2, 7, 8], 3, 4  # four sequences, the second without a token
T = CU[-1]
TND = {"base": "e", "layout": "TND"}


def inputs(dtype="float32", further=0, empty=-np.inf):
    """An output, log-sum-exps (T, N), and the same padded with NaN, (sequences, N, longest)."""
    rng = np.random.default_rng(0)
    out, lse = rng.normal(size=(T, N, D)).astype("f4"), (rng.normal(size=(T, N)) * 9).astype(dtype)
    lse[3, 1] = empty
    padded = np.full((len(CU) - 1, N, 5 + further), np.nan, dtype)
    for i, (start, end) in enumerate(itertools.pairwise(CU)):
        for token in range(start, end):
            padded[i, :, token - start] = lse[token]
    return out, lse, padded


def axes(padded, lse_layout):
    return padded if lse_layout == "BNS" else padded.swapaxes(1, 2)


@pytest.mark.parametrize("lengths", [list, tuple, np.int32, np.int64], ids=["list", "tuple", "int32", "int64"])
@pytest.mark.parametrize("how", [{}, {"lanes": 8}, {"base": "2"}, {"inf_is_empty": True, "heads": N}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("lse_layout", ["BNS", "BSN"])
def test_it_is_what_joining_by_hand_gives(lse_layout, dtype, how, lengths):
    out, lse, padded = inputs(dtype, 3, np.inf if "inf_is_empty" in how else -np.inf)
    cu = lengths(CU) if isinstance(lengths(), (list, tuple)) else np.array(CU, lengths)
    state = AttentionState.from_lse(out, axes(padded, lse_layout), **TND | how, lse_layout=lse_layout, actual_seq_qlen=cu)
    assert state.attn_out is out
    expected = AttentionState.from_lse(out, lse, **TND | how, lse_layout="TN")
    same(state, expected)
    merged = (rau.merge_states([one, one], layout="TND") for one in (state, expected))
    same(*merged)


def test_as_torch_on_rocm_returns_it():
    cu, heads = [0, 472, 1223], 4
    out, lse = np.zeros((1223, heads, 8), "f4"), np.random.default_rng(1).normal(size=(2, heads, 751)).astype("f4")
    state = AttentionState.from_lse(out, lse, **TND, lse_layout="BNS", actual_seq_qlen=cu)
    by_hand = np.concatenate([lse[i, :, : b - a] for i, (a, b) in enumerate([(0, 472), (472, 1223)])], axis=1)
    same(state, AttentionState.from_lse(out, by_hand, **TND, lse_layout="NT"))


@pytest.mark.parametrize("cu", [[0], [0, 0, 0]], ids=str)
def test_no_tokens(cu):
    out, lse = np.zeros((0, N, D), "f4"), np.zeros((len(cu) - 1, N, 0), "f4")
    assert AttentionState.from_lse(out, lse, **TND, lse_layout="BNS", actual_seq_qlen=cu).softmax_max.shape == (0, N, 1)
    torch = pytest.importorskip("torch")
    out, lse = torch.from_numpy(out), torch.from_numpy(lse)
    assert AttentionState.from_lse(out, lse, **TND, lse_layout="BNS", actual_seq_qlen=cu).softmax_max.shape == (0, N, 1)


LONG = " or padded further."


@pytest.mark.parametrize(
    ("changed", "rules", "says"),
    [
        ({"actual_seq_qlen": None}, ("packed-qlen-required",), 'actual_seq_qlen is None; lse of lse_layout "BNS", padded to '
         "(sequences, N, longest), expects the cumulative sequence lengths from 0 to T = 8."),
        ({"actual_seq_qlen": [0, 2, 9]}, ("tnd-qlen-cumulative",), "it ends at 9; expected"),
        ({"actual_seq_qlen": [0, 2, 8]}, ("shape-stats",), "lse has shape (4, 3, 5); for attn_out of shape (8, 3, 4) and "
         '2 sequences, lse_layout "BNS" expects (sequences, N, longest) = (2, 3, 6)' + LONG),
        ({"lse": np.zeros((4, 3, 4), "f4")}, ("shape-stats",), "lse has shape (4, 3, 4)"),
        ({"lse": np.zeros((4, 2, 5), "f4")}, ("shape-stats",), "= (4, 3, 5)" + LONG),
        ({"lse": np.zeros((4, 5, 3), "f4")}, ("shape-stats",), "It looks like (sequences, longest, N): pass"),
        ({"lse_layout": "BSN"}, ("shape-stats",), "(sequences, longest, N) = (4, 5, 3)" + LONG + " It looks like "
         '(sequences, N, longest): pass lse_layout="BNS".'),
        ({"lse": np.zeros((3, 8), "f4")}, ("rank",), 'lse has shape (3, 8); lse_layout "BNS" expects (sequences, N, longest)'),
        ({"attn_out": np.zeros((8, 12), "f4")}, ("rank",), 'attn_out has shape (8, 12); layout "TND" expects (T, N, D).'),
        ({"heads": 2}, ("heads",), "attn_out has N = 3 heads (shape (8, 3, 4), in layout \"TND\"); expected heads = 2."),
        ({"lse": None, "actual_seq_qlen": None}, ("array",), "lse is None"),
        ({"lse_layout": "NT"}, ("rank",), 'lse has shape (4, 3, 5); lse_layout "NT" expects (N, T). AttentionState.from_lse '
         'takes a padded one, (sequences, N, longest), with lse_layout="BNS" and actual_seq_qlen.'),
        ({"lse_layout": "BHS"}, ("lse-layout",), 'expected one of "TN", "NT", "BNS", "BSN". Did you mean "BNS"?'),
    ],
)  # fmt: skip
def test_what_is_refused(changed, rules, says):
    out, _, padded = inputs()
    with pytest.raises(rau.ConstraintError) as caught:
        AttentionState.from_lse(**{"attn_out": out, "lse": padded, "lse_layout": "BNS", "actual_seq_qlen": CU} | TND | changed)
    assert caught.value.rules == rules
    assert says in str(caught.value)


@pytest.mark.parametrize("call", [
    lambda state, how: rau.merge_lse([(state[0], np.zeros((4, N, 5), "f4"))], **how),
    lambda state, how: state.lse(**how),
])  # fmt: skip
def test_nothing_else_takes_a_padded_one(call):
    out, lse, _ = inputs()
    state = AttentionState.from_lse(out, lse, **TND, lse_layout="TN")
    with pytest.raises(rau.OptionError, match="lse_layout = 'BNS'; expected one of \"TN\", \"NT\"."):
        call(state, {**TND, "lse_layout": "BNS"})


# ------------------------------------------------------------------------------------------------------------- torch


@pytest.mark.parametrize("lse_layout", ["BNS", "BSN"])
def test_tensors(lse_layout):
    """The bits of NumPy, compiled too; a gradient to what is no padding."""
    torch = pytest.importorskip("torch")
    out, lse, padded = inputs()
    how = {**TND, "lse_layout": lse_layout}
    given = torch.from_numpy(out), torch.from_numpy(axes(padded, lse_layout).copy())
    for cu in (CU, torch.tensor(CU, dtype=torch.int32), torch.tensor(CU)):
        state = AttentionState.from_lse(*given, **how, actual_seq_qlen=cu)
        assert state.attn_out is given[0]
        same([part.numpy() for part in state], AttentionState.from_lse(out, lse, **TND, lse_layout="TN"))

    def merged(attn_out, lse):
        state = AttentionState.from_lse(attn_out, lse, **how, actual_seq_qlen=CU)
        return rau.merge_states([state, state], layout="TND").lse(**TND, lse_layout="TN")

    upstream = torch.arange(T * N, dtype=torch.float32).reshape(T, N) + 1
    for function in (merged, torch.compile(merged, fullgraph=True, backend="eager")):
        leaf = given[1].clone().requires_grad_()
        result = function(given[0], leaf)
        (gradient,) = torch.autograd.grad(result[result.isfinite()], leaf, upstream[result.isfinite()])
        expected = torch.zeros(4, N, 5)
        for i, (start, end) in enumerate(itertools.pairwise(CU)):
            expected[i, :, : end - start] = upstream[start:end].T
        expected[2, 1, 1] = 0  # the row without keys
        torch.testing.assert_close(gradient if lse_layout == "BNS" else gradient.mT, expected)


def test_lengths_on_a_device():
    """They are not read: whatever they hold, no row is gathered from outside of the log-sum-exp."""
    torch = pytest.importorskip("torch")
    from rau.lse import joined

    out, lse, padded = (torch.from_numpy(part) for part in inputs())
    from_lse = AttentionState.from_lse
    meta = [part.to("meta") for part in (out, padded, torch.tensor(CU))]
    assert from_lse(*meta[:2], **TND, lse_layout="BNS", actual_seq_qlen=meta[2]).softmax_max.shape == (T, N, 1)
    with pytest.raises(rau.ShapeError, match=r"\(4, 3, 1\); .* expects \(sequences, N, longest\) = \(4, 3, 2\) or padded"):
        from_lse(meta[0], meta[1][..., :1], **TND, lse_layout="BNS", actual_seq_qlen=meta[2])  # too small for any
    assert torch.equal(joined(padded, "BNS", torch.tensor(CU), T), lse)
    for cu in ([0, 99, 99, 99, 99], [0, 0, 0, 0, 0], [-9, 5, 1, 3, 8]):
        assert joined(padded, "BNS", torch.tensor(cu), T).shape == (T, N)
    with pytest.raises(rau.ConstraintError, match=r"actual_seq_qlen is not on the host and lse is a NumPy array"):
        from_lse(out.numpy(), padded.numpy(), **TND, lse_layout="BNS", actual_seq_qlen=meta[2])
