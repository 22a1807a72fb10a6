"""What from_lse, lse and reorder_softmax refuse, and their words."""

import ml_dtypes
import numpy as np
import pytest
from states import sbh, tnd
from wrong_calls import SWAP

import rau
from rau import AttentionState, reorder_softmax

OUT, LSE = np.zeros((2, 1, 4), "f4"), np.zeros((1, 1, 2), "f4")
TND = {"layout": "TND", "lse_layout": "TN"}
TND_OUT = np.zeros((3, 2, 4), "f4")
BASES = 'expected one of "e", "2". Natural logarithms: FlashAttention, PyTorch, vLLM. Base 2: FlashInfer.'
NO_ARRAY = "expected an array (NumPy, or of a kind that a backend takes)."


def from_lse(attn_out=OUT, lse=LSE, base="e", **options):
    return lambda: AttentionState.from_lse(attn_out, lse, base=base, **options)


def lse_of(state, base="e", **options):
    return lambda: state.lse(base=base, **options)


def reorder(stats, qlen, to="TND"):
    return lambda: reorder_softmax(stats, qlen, to=to)


CASES = [
    (from_lse(base="10"), rau.OptionError, ["base"], f"base = '10'; {BASES}"),
    (from_lse(base=2), rau.OptionError, ["base"], f"base = 2; {BASES}"),
    (from_lse(base=None), rau.OptionError, ["base"], f"base = None; {BASES}"),
    (from_lse(base=np.zeros(2)), rau.OptionError, ["base"], None),
    (from_lse([1], None, "x", layout=[], lse_layout=5), rau.OptionError,
     ["base", "layout", "lse-layout", "array", "array"], None),
    (from_lse(lse=None), rau.DTypeError, ["array"], f"lse is None; {NO_ARRAY}"),
    (from_lse(np.ma.zeros((2, 1, 4), "f4")), rau.DTypeError, ["array"], None),
    (from_lse(lse=LSE.astype("f2")), rau.DTypeError, ["dtype-stats"],
     "lse has dtype float16; expected one of float32, float64. Compute it in float32; or pass lse.astype(numpy.float32), at the "
     "price of 11 significant bits: weights are off by up to abs(lse) * 2**-12."),
    (from_lse(OUT.astype(ml_dtypes.bfloat16), LSE.astype(ml_dtypes.bfloat16)), rau.DTypeError, ["dtype-stats"],
     "lse has dtype bfloat16; expected one of float32, float64. Compute it in float32; or pass lse.astype(numpy.float32), at "
     "the price of 8 significant bits: weights are off by up to abs(lse) * 2**-9."),
    (from_lse(lse=LSE.astype("i4")), rau.DTypeError, ["dtype-stats"],
     "lse has dtype int32; expected one of float32, float64."),
    (from_lse(lse=LSE.astype(">f4")), rau.DTypeError, ["dtype-stats"],
     f"lse has dtype float32 (byte-swapped); expected one of float32, float64.{SWAP}"),
    (from_lse(OUT.astype("f8")), rau.DTypeError, ["dtype-stats"],
     "lse has dtype float32; expected float64. Pass lse.astype(numpy.float64), which is exact."),
    (from_lse(OUT.astype("i4"), LSE.astype("f2")), rau.DTypeError, ["dtype-attn", "dtype-stats"], None),
    (from_lse(OUT.astype(">f4")), rau.DTypeError, ["dtype-attn"],
     f"attn_out has dtype float32 (byte-swapped); expected one of float16, bfloat16, float32, float64.{SWAP}"),
    (from_lse(layout="BSH"), rau.LayoutError, ["layout"], None),
    (from_lse(layout="BSH", lse_layout="TN"), rau.LayoutError, ["layout"], None),
    (from_lse(lse_layout="NT"), rau.OptionError, ["lse-layout"],
     "lse_layout = 'NT'; expected one of \"BNS\", \"BSN\". With layout \"SBH\" lse is (B, N, S) or (B, S, N)."),
    (from_lse(TND_OUT, LSE[0], layout="TND", lse_layout="NTD"), rau.OptionError, ["lse-layout"],
     "lse_layout = 'NTD'; expected one of \"TN\", \"NT\", \"BNS\", \"BSN\". With layout \"TND\" lse is (T, N) or (N, T). "
     "Padded, (sequences, N, longest) or (sequences, longest, N), it needs actual_seq_qlen."),
    (from_lse(TND_OUT, LSE[0], layout="TND", lse_layout=np.zeros(2)), rau.OptionError, ["lse-layout"], None),
    (from_lse(TND_OUT, LSE[0], base="10", layout="TND"), rau.OptionError, ["base", "lse-layout"], None),
    (from_lse(OUT[0]), rau.ShapeError, ["rank"], 'attn_out has shape (1, 4); layout "SBH" expects (S, B, H).'),
    (from_lse(lse=LSE[0]), rau.ShapeError, ["rank"], 'lse has shape (1, 2); lse_layout "BNS" expects (B, N, S). They fit layout="TND", lse_layout="NT".'),
    (from_lse(lse=LSE[0, 0, 0]), rau.DTypeError, ["array"], f"lse is of type numpy.float32; {NO_ARRAY}"),
    (from_lse(lse=np.zeros((1, 3, 2), "f4")), rau.ShapeError, ["heads-divide-hidden"],
     "attn_out has H = 4 and lse N = 3 heads (shape (1, 3, 2), read as (B, N, S)); expected H = N * D."),
    (from_lse(np.zeros((3, 1, 4), "f4"), np.zeros((1, 3, 2), "f4")), rau.ShapeError, ["heads-divide-hidden"],
     "attn_out has H = 4 and lse N = 3 heads (shape (1, 3, 2), read as (B, N, S)); expected H = N * D."
     ' It looks like (B, S, N): pass lse_layout="BSN".'),
    (from_lse(np.zeros((1, 3, 2, 4), "f4"), np.zeros((1, 3, 2), "f4"), layout="BSND"), rau.ShapeError, ["shape-stats"],
     'lse has shape (1, 3, 2); for attn_out of shape (1, 3, 2, 4), layout "BSND" expects (B, N, S) = (1, 2, 3).'
     ' It looks like (B, S, N): pass lse_layout="BSN".'),
    (from_lse(np.zeros((1, 3, 2, 4), "f4"), np.zeros((1, 2, 3), "f4"), layout="BSND", lse_layout="BSN"), rau.ShapeError,
     ["shape-stats"],
     'lse has shape (1, 2, 3); for attn_out of shape (1, 3, 2, 4), layout "BSND" expects (B, S, N) = (1, 3, 2).'
     ' It looks like (B, N, S): pass lse_layout="BNS".'),
    (from_lse(lse=LSE[..., None]), rau.ShapeError, ["rank"],
     'lse has shape (1, 1, 2, 1); lse_layout "BNS" expects (B, N, S). Drop its last axis: lse[..., 0].'),
    (from_lse(lse=np.zeros((1, 1, 3), "f4")), rau.ShapeError, ["shape-stats"],
     'lse has shape (1, 1, 3); for attn_out of shape (2, 1, 4), layout "SBH" expects (B, N, S) = (1, 1, 2).'
     " Some kernels pad it: pass lse[..., :2]."),
    (from_lse(TND_OUT, np.zeros((2, 3), "f4"), **TND), rau.ShapeError, ["shape-stats"],
     'lse has shape (2, 3); for attn_out of shape (3, 2, 4), layout "TND" expects (T, N) = (3, 2). '
     'It looks like (N, T): pass lse_layout="NT".'),
    (from_lse(TND_OUT, np.zeros((3, 2), "f4"), layout="TND", lse_layout="NT"), rau.ShapeError, ["shape-stats"],
     'lse has shape (3, 2); for attn_out of shape (3, 2, 4), layout "TND" expects (N, T) = (2, 3). '
     'It looks like (T, N): pass lse_layout="TN".'),
    (from_lse(TND_OUT, np.zeros((2, 2, 2), "f4"), **TND), rau.ShapeError, ["rank"],
     'lse has shape (2, 2, 2); lse_layout "TN" expects (T, N). AttentionState.from_lse takes a padded '
     'one, (sequences, N, longest), with lse_layout="BNS" and actual_seq_qlen.'),
    (from_lse(heads="2"), rau.ShapeError, ["heads"], "heads = '2'; expected the number N of query heads, an int."),
    (from_lse(heads=True), rau.ShapeError, ["heads"], None),
    (from_lse(heads=-1), rau.ShapeError, ["heads"], None),
    (from_lse(heads=np.timedelta64(1, "s")), rau.ShapeError, ["heads"], None),
    (from_lse(np.zeros((2, 1, 8), "f4"), heads=4), rau.ShapeError, ["shape-stats"],
     'lse has shape (1, 1, 2); for attn_out of shape (2, 1, 8) and heads = 4, layout "SBH" expects (B, N, S) = (1, 4, 2). Its 1 '
     "heads seem to be the key heads of grouped-query attention: pass one number for each query head."),
    (from_lse(heads=3), rau.ShapeError, ["heads-divide-hidden"], "attn_out has H = 4 and heads = 3; expected H = N * D."),
    (from_lse(lse=np.zeros((1, 2, 2), "f4"), heads=1), rau.ShapeError, ["shape-stats"],
     'lse has shape (1, 2, 2); for attn_out of shape (2, 1, 4) and heads = 1, layout "SBH" expects (B, N, S) = (1, 1, 2).'),
    (from_lse(np.zeros((3, 1, 8), "f4"), np.zeros((1, 3, 2), "f4"), heads=2), rau.ShapeError, ["shape-stats"],
     'lse has shape (1, 3, 2); for attn_out of shape (3, 1, 8) and heads = 2, layout "SBH" expects (B, N, S) = (1, 2, 3).'
     ' It looks like (B, S, N): pass lse_layout="BSN".'),
    (from_lse(TND_OUT, np.zeros((3, 2), "f4"), **TND, heads=4), rau.ShapeError, ["heads"],
     'attn_out has N = 2 heads (shape (3, 2, 4), in layout "TND"); expected heads = 4.'),
    (from_lse(np.zeros((3, 4, 4), "f4"), np.zeros((3, 2), "f4"), **TND), rau.ShapeError, ["shape-stats"],
     'lse has shape (3, 2); for attn_out of shape (3, 4, 4), layout "TND" expects (T, N) = (3, 4). Its 2 heads seem to be the key '
     "heads of grouped-query attention: pass one number for each query head."),
    (from_lse(heads=[]), rau.ShapeError, ["heads"], None),
    (lse_of(sbh(), "ln"), rau.OptionError, ["base"], f"base = 'ln'; {BASES}"),
    (lse_of(sbh(), lse_layout="TN"), rau.OptionError, ["lse-layout"],
     "lse_layout = 'TN'; expected one of \"BNS\", \"BSN\". With layout \"SBH\" lse is (B, N, S) or (B, S, N)."),
    (lse_of(tnd(), layout="TND", lse_layout="BNS"), rau.OptionError, ["lse-layout"], None),
    (lse_of(sbh(), "x", layout=[], softmax_layout=np.zeros(2)), rau.OptionError,
     ["base", "layout", "softmax-layout"], None),
    (lse_of(AttentionState(None, None, [1])), rau.DTypeError, ["array", "array"], None),
    (lse_of(sbh()._replace(softmax_max=np.zeros((2, 3, 4, 8), "f2"))), rau.DTypeError, ["dtype-stats"],
     "softmax_max has dtype float16; expected one of float32, float64. Compute it in float32; or pass softmax_max.astype("
     "numpy.float32), at the price of 11 significant bits: weights are off by up to abs(softmax_max) * 2**-12."),
    (lse_of(sbh(), **TND), rau.ShapeError, ["rank", "rank"], None),
    (lse_of(sbh()._replace(softmax_max=np.zeros((), "f4"))), rau.ShapeError, ["rank", "shape-match"], None),
    (lse_of(sbh()._replace(softmax_max=np.zeros((), "f4")), **TND, softmax_layout="SBH"), rau.ShapeError,
     ["rank", "rank", "shape-match", "packed-qlen-required"], None),
    (lse_of(sbh(lanes=0)), rau.ShapeError, ["rank", "rank"], None),
    (lse_of(sbh()._replace(softmax_sum=sbh(S=5)[2])), rau.ShapeError, ["shape-match"],
     "softmax_sum has shape (2, 3, 5, 8); expected that of softmax_max, (2, 3, 4, 8)."),
    (lse_of(tnd(), **TND, softmax_layout="SBH"), rau.ConstraintError, ["packed-qlen-required"],
     "actual_seq_qlen is None; packed statistics expect the cumulative sequence lengths from 0 to T = 8, such as [0, 8]"
     " for a single sequence."),
    (lse_of(tnd(), **TND, softmax_layout="SBH", actual_seq_qlen=[0, 7]), rau.ConstraintError,
     ["tnd-qlen-cumulative"], None),
    (reorder(tnd()[1], [0, 8], "packed"), rau.OptionError, ["to"],
     "to = 'packed'; expected one of \"TND\", \"SBH\". \"TND\" is token-major; \"SBH\" is packed per sequence, as the "
     "vendor's kernels emit."),
    (from_lse(TND_OUT, LSE[0], layout="TND", lse_layout="HT"), rau.OptionError, ["lse-layout"],
     "lse_layout = 'HT'; expected one of \"TN\", \"NT\", \"BNS\", \"BSN\". Did you mean \"NT\"? With layout \"TND\" lse is "
     "(T, N) or (N, T). Padded, (sequences, N, longest) or (sequences, longest, N), it needs actual_seq_qlen."),
    (from_lse(lse_layout="TH"), rau.OptionError, ["lse-layout"],
     "lse_layout = 'TH'; expected one of \"BNS\", \"BSN\". With layout \"SBH\" lse is (B, N, S) or (B, S, N)."),
    (reorder(tnd()[1], [3, 5]), rau.ConstraintError, ["tnd-qlen-cumulative"], None),
    (reorder(tnd()[1], None), rau.ConstraintError, ["packed-qlen-required"], None),
    (reorder(np.zeros(8), [0, 8]), rau.ShapeError, ["rank"],
     "stats has shape (8,); expected (T, N, lanes) or (T, N)."),
    (reorder(None, None, None), rau.OptionError, ["to", "array", "packed-qlen-required"], None),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "rules", "says"), CASES, ids=range(len(CASES)))
def test_refused(call, error, rules, says):
    with pytest.raises(rau.ConstraintError) as caught:
        call()
    assert (type(caught.value), list(caught.value.rules)) == (error, rules)
    name = call.__qualname__.partition(".")[0]
    name = {"from_lse": "AttentionState.from_lse", "lse_of": "AttentionState.lse", "reorder": "reorder_softmax"}[name]
    assert str(caught.value).startswith(f"{name}: ")
    if says:
        assert str(caught.value) == f"{name}: [{rules[0]}] {says}"


def test_the_base_has_no_default():
    with pytest.raises(rau.OptionError, match="base is missing"):
        AttentionState.from_lse(OUT, LSE)
    with pytest.raises(rau.OptionError, match="base is missing"):
        sbh().lse()
