"""Bad calls, continued: the lengths of TND, the chip's limits, and `out`."""

import numpy as np
from wrong_calls import LIST, QLEN, Wrong, array_error, frozen, masked, replace

import rau

CHIP = 'This is a limit of the Ascend chip; profile="portable" lifts it.'
SUMS = "pass numpy.concatenate([[0], numpy.cumsum(lengths)])"
PADDED = "The buffer is longer than the last length: if the rest is padding, pass it as a sequence of its own:"
TO_T = "expected a non-decreasing sequence from 0 to T = 8."
LENGTHS = {
    "missing": Wrong(
        ("tnd-qlen-required",),
        rau.ConstraintError,
        {"actual_seq_qlen": None},
        "TND",
        says='actual_seq_qlen is None; layout "TND" expects the cumulative sequence lengths from 0 to T = 8, '
        'such as [0, 8] for a single sequence. profile="portable" takes token-major statistics without '
        "it.",
    ),
    "missing, packed": Wrong(
        ("packed-qlen-required",),
        rau.ConstraintError,
        {"actual_seq_qlen": None, "softmax_layout": "SBH", "profile": "portable"},
        "TND",
        says="actual_seq_qlen is None; packed statistics expect the cumulative sequence lengths from "
        "0 to T = 8, such as [0, 8] for a single sequence.",
    ),
    "not from 0": Wrong(
        ("tnd-qlen-cumulative",),
        rau.ConstraintError,
        {"actual_seq_qlen": [-1, 8]},
        "TND",
        says=f"actual_seq_qlen = [-1, 8]: it starts at -1; {TO_T}",
    ),
    "no leading 0": Wrong(
        ("tnd-qlen-cumulative",),
        rau.ConstraintError,
        {"actual_seq_qlen": [3, 8]},
        "TND",
        says=f"actual_seq_qlen = [3, 8]: it starts at 3; {TO_T} The leading 0 seems to be missing.",
    ),
    "not to T": Wrong(
        ("tnd-qlen-cumulative",),
        rau.ConstraintError,
        {"actual_seq_qlen": [0, 3, 7]},
        "TND",
        says=f"actual_seq_qlen = [0, 3, 7]: it ends at 7; {TO_T} {PADDED} [0, 3, 7, 8].",
    ),
    "padded, and a sum of T": Wrong(  # five reports: these are no lengths
        ("tnd-qlen-cumulative",),
        rau.ConstraintError,
        {"actual_seq_qlen": [0, 2, 6]},
        "TND",
        says=f"actual_seq_qlen = [0, 2, 6]: it ends at 6; {TO_T} {PADDED} [0, 2, 6, 8].",
    ),
    "padded, nothing but": Wrong(
        ("tnd-qlen-cumulative",),
        rau.ConstraintError,
        {"actual_seq_qlen": [0]},
        "TND",
        says=f"actual_seq_qlen = [0]: it ends at 0; {TO_T} {PADDED} [0, 8].",
    ),
    "padded, 9 entries": Wrong(
        ("tnd-qlen-cumulative",),
        rau.ConstraintError,
        {"actual_seq_qlen": [0] * 8 + [1]},
        "TND",
        says=f"actual_seq_qlen = [0, 0, 0, 0, 0, 0, 0, 0, 1]: it ends at 1; {TO_T} {PADDED} numpy.append(actual_seq_qlen, 8).",
    ),
    "decreasing": Wrong(
        ("tnd-qlen-cumulative",),
        rau.ConstraintError,
        {"actual_seq_qlen": [0, 5, 3, 8]},
        "TND",
        says=f"actual_seq_qlen = [0, 5, 3, 8]: it decreases from 5 at index 1 to 3; {TO_T}",
    ),
    "lengths": Wrong(
        ("tnd-qlen-cumulative",),
        rau.ConstraintError,
        {"actual_seq_qlen": [3, 5]},
        "TND",
        says=f"actual_seq_qlen = [3, 5]: it starts at 3; {TO_T} It looks like the lengths themselves: "
        f"{SUMS}, here [0, 3, 8].",
    ),
    "many lengths": Wrong(
        ("tnd-qlen-cumulative",),
        rau.ConstraintError,
        {"actual_seq_qlen": [1] * 8 + [0] * 8},
        "TND",
        says=f"actual_seq_qlen = [1, 1, 1, 1, 1, ..., 0, 0, 0]: it decreases from 1 at index 7 to 0; {TO_T} It looks like "
        f"the lengths themselves: {SUMS}.",
    ),
    "missing, packed, by the vendor's profile": Wrong(
        ("tnd-qlen-required",),
        rau.ConstraintError,
        {"actual_seq_qlen": None, "softmax_layout": "SBH"},
        "TND",
        says='actual_seq_qlen is None; layout "TND" expects the cumulative sequence lengths from 0 to T = 8, '
        "such as [0, 8] for a single sequence.",
    ),
    "1 instead of 0": Wrong(
        ("tnd-qlen-cumulative",),
        rau.ConstraintError,
        {"actual_seq_qlen": [1, 8]},
        "TND",
        says=f"actual_seq_qlen = [1, 8]: it starts at 1; {TO_T} The leading 0 seems to be missing.",
    ),
    "the right sum, but no lengths": Wrong(
        ("tnd-qlen-cumulative",),
        rau.ConstraintError,
        {"actual_seq_qlen": [-1, 9]},
        "TND",
        says=f"actual_seq_qlen = [-1, 9]: it starts at -1; {TO_T}",
    ),
    "8 lengths": Wrong(
        ("tnd-qlen-cumulative",),
        rau.ConstraintError,
        {"actual_seq_qlen": [1] * 8},
        "TND",
        says=f"actual_seq_qlen = [1, 1, 1, 1, 1, 1, 1, 1]: it starts at 1; {TO_T} It looks like the lengths "
        f"themselves: {SUMS}, here [0, 1, 2, 3, 4, 5, 6, 7, 8].",
    ),
    "9 lengths": Wrong(
        ("tnd-qlen-cumulative",),
        rau.ConstraintError,
        {"actual_seq_qlen": [1] * 7 + [0, 1]},
        "TND",
        says=f"actual_seq_qlen = [1, 1, 1, 1, 1, 1, 1, 0, 1]: it decreases from 1 at index 6 to 0; {TO_T} It looks "
        f"like the lengths themselves: {SUMS}.",
    ),
    "10 entries": Wrong(
        ("tnd-qlen-cumulative",),
        rau.ConstraintError,
        {"actual_seq_qlen": list(range(10))},
        "TND",
        says=f"actual_seq_qlen = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]: it ends at 9; {TO_T}",
    ),
    "11 entries": Wrong(
        ("tnd-qlen-cumulative",),
        rau.ConstraintError,
        {"actual_seq_qlen": list(range(11))},
        "TND",
        says=f"actual_seq_qlen = [0, 1, 2, 3, 4, ..., 8, 9, 10]: it ends at 10; {TO_T}",
    ),
    "int64 extremes": Wrong(
        ("tnd-qlen-cumulative",),
        rau.ConstraintError,
        {"actual_seq_qlen": np.array([0, 2**63 - 1, -(2**63), 8])},
        "TND",
        says=f"actual_seq_qlen = [0, {2**63 - 1}, {-(2**63)}, 8]: it decreases from {2**63 - 1} at "
        f"index 1 to {-(2**63)}; {TO_T}",
    ),
    "beyond int64": Wrong(
        ("qlen-dtype",),
        rau.DTypeError,
        {"actual_seq_qlen": [0, 2**63]},
        "TND",
        says="actual_seq_qlen holds a number that does not fit into int64.",
    ),
    "2-D": Wrong(
        ("qlen-rank",),
        rau.ShapeError,
        {"actual_seq_qlen": np.array([QLEN])},
        "TND",
        says="actual_seq_qlen has shape (1, 3); expected one axis with one more entry than there are sequences, "
        "so at least [0].",
    ),
    "0-d": Wrong(("qlen-rank",), rau.ShapeError, {"actual_seq_qlen": np.array(8)}, "TND"),
    "empty": Wrong(
        ("qlen-rank",),
        rau.ShapeError,
        {"actual_seq_qlen": []},
        "TND",
        says="actual_seq_qlen is empty; expected one more entry than there are sequences, so at least [0].",
    ),
    "empty array": Wrong(("qlen-rank",), rau.ShapeError, {"actual_seq_qlen": np.array([], int)}, "TND"),
    "float": Wrong(
        ("qlen-dtype",),
        rau.DTypeError,
        {"actual_seq_qlen": np.array([0.0, 8.0])},
        "TND",
        says="actual_seq_qlen has dtype float64; expected int64.",
    ),
    "float and 2-D": Wrong(("qlen-dtype", "qlen-rank"), rau.DTypeError, {"actual_seq_qlen": np.ones((2, 2))}, "TND"),
    "floats": Wrong(
        ("qlen-dtype",),
        rau.DTypeError,
        {"actual_seq_qlen": [0, 8.0]},
        "TND",
        says="actual_seq_qlen holds 8.0, of type float; expected ints.",
    ),
    "bools": Wrong(
        ("qlen-dtype",),
        rau.DTypeError,
        {"actual_seq_qlen": [False, True]},
        "TND",
        says="actual_seq_qlen holds False, of type bool; expected ints.",
    ),
    "bool array": Wrong(("qlen-dtype",), rau.DTypeError, {"actual_seq_qlen": np.array([False, True])}, "TND"),
    "int32": Wrong(
        ("qlen-dtype",),
        rau.DTypeError,
        {"actual_seq_qlen": np.array(QLEN, "int32")},
        "TND",
        says='actual_seq_qlen has dtype int32; expected int64. Pass actual_seq_qlen.astype(numpy.int64). profile="portable" takes int32 too.',
    ),
    "uint64": Wrong(("qlen-dtype",), rau.DTypeError, {"actual_seq_qlen": np.array(QLEN, "uint64")}, "TND"),
    "big-endian": Wrong(("qlen-dtype",), rau.DTypeError, {"actual_seq_qlen": np.array(QLEN, ">i8")}, "TND"),
    "masked": Wrong(("qlen-dtype",), rau.DTypeError, {"actual_seq_qlen": np.ma.array(QLEN)}, "TND"),
    "an int": Wrong(
        ("qlen-dtype",),
        rau.DTypeError,
        {"actual_seq_qlen": 8},
        "TND",
        says="actual_seq_qlen is of type int; expected an int64 array or a list of ints.",
    ),
    "a range": Wrong(("qlen-dtype",), rau.DTypeError, {"actual_seq_qlen": range(0, 9, 8)}, "TND"),
}

LIMITS = {
    "D = 63": Wrong(
        ("tnd-head-dim-64",),
        rau.ConstraintError,
        {},
        "TND",
        {"D": 63},
        says=f'the last axis of prev_attn_out is D = 63; layout "TND" takes multiples of 64. {CHIP}',
    ),
    "D = 65": Wrong(
        ("tnd-head-dim-64",),
        rau.ConstraintError,
        {},
        "TND",
        {"D": 65},
        says=f'the last axis of prev_attn_out is D = 65; layout "TND" takes multiples of 64. {CHIP}',
    ),
    "D = 65, cann-v2": Wrong(("tnd-head-dim-64",), rau.ConstraintError, {"profile": "cann-v2"}, "TND", {"D": 65}),
    "buffer": Wrong(
        ("tnd-unified-buffer",),
        rau.ConstraintError,
        {},
        "TND",
        {"N": 43, "D": 128},
        says="prev_attn_out with N = 43, D = 128, float32 needs AlignUp(N*D, 64) * (4*6 + 8) "
        f"+ AlignUp(N*8, 64) * 56 = 197632 bytes; the limit is 192*1024 = 196608. {CHIP}",
    ),
    "257 heads": Wrong(
        ("tnd-heads-256",),
        rau.ConstraintError,
        {"profile": "cann-v2"},
        "TND",
        {"N": 257},
        says=f"prev_attn_out has N = 257 heads; the limit is 256. {CHIP}",
    ),
    "D = 832": Wrong(
        ("tnd-head-dim-768",),
        rau.ConstraintError,
        {"profile": "cann-v2"},
        "TND",
        {"D": 832},
        says=f"prev_attn_out has D = 832; the limit is 768. {CHIP}",
    ),
}

TRIPLE = "expected an AttentionState or a triple (attn_out, softmax_max, softmax_sum)."
OUTPUTS = {
    "an array": Wrong(
        ("out",), rau.ShapeError, {"out": lambda out: out[0]}, says=f"out is of type numpy.ndarray; {TRIPLE}"
    ),
    "a pair": Wrong(("out",), rau.ShapeError, {"out": lambda out: out[:2]}, says=f"out has 2 items; {TRIPLE}"),
    "a generator": Wrong(("out",), rau.ShapeError, {"out": lambda out: (part for part in out)}),
    "Nones": Wrong(("array",) * 3, rau.DTypeError, {"out": (None,) * 3}),
    "a list": Wrong(
        ("array",),
        rau.DTypeError,
        {"out": replace(attn_out=np.ndarray.tolist)},
        says=array_error("out.attn_out", "of type list", LIST),
    ),
    "masked": Wrong(("array",), rau.DTypeError, {"out": replace(softmax_sum=masked)}),
    "dtype": Wrong(
        ("out-dtype",),
        rau.DTypeError,
        {"out": replace(attn_out=lambda a: a.astype("float64"))},
        says="out.attn_out has dtype float64; expected float32.",
    ),
    "shape": Wrong(
        ("out-shape",),
        rau.ShapeError,
        {"out": replace(softmax_max=lambda a: a[:1])},
        says="out.softmax_max has shape (1, 3, 4, 8); expected (2, 3, 4, 8).",
    ),
    "read-only": Wrong(
        ("out-writable",),
        rau.ShapeError,
        {"out": replace(softmax_sum=frozen)},
        says="out.softmax_sum is read-only; expected an array that may be written to.",
    ),
    "three faults": Wrong(
        ("out-dtype", "out-writable", "out-shape"),
        rau.DTypeError,
        {"out": replace(attn_out=lambda a: frozen(a[:1].astype("float16")))},
    ),
    "strided last axis": Wrong(
        ("out-strides",),
        rau.ShapeError,
        {"out": replace(attn_out=lambda a: np.repeat(a, 2, axis=-1)[..., ::2])},
        says="out.attn_out has strides (96, 48, 2) (in elements) for shape (4, 2, 24); expected a contiguous last "
        "axis. Pass such an array and assign from it.",
    ),
    "strided last axis of two": Wrong(
        ("out-strides",),
        rau.ShapeError,
        {"out": replace(attn_out=lambda a: np.repeat(a, 2, axis=-1)[..., ::2])},
        sizes={"B": 1, "N": 1, "D": 2},
    ),
    "reversed last axis": Wrong(("out-strides",), rau.ShapeError, {"out": replace(softmax_max=lambda a: a[..., ::-1])}),
    "odd byte strides": Wrong(
        ("out-strides",),
        rau.ShapeError,
        {"out": replace(attn_out=lambda a: np.zeros(a.shape, [("tag", "u1"), ("it", "f4")])["it"])},
        says="out.attn_out is not aligned to its items; expected an aligned array. "
        "Pass such an array and assign from it.",
    ),
    "misaligned": Wrong(
        ("out-strides",),
        rau.ShapeError,
        {"out": replace(softmax_sum=lambda a: np.zeros(a.nbytes + 1, "u1")[1:].view(a.dtype).reshape(a.shape))},
    ),
    "strided packed": Wrong(
        ("packed-regular",),
        rau.ShapeError,
        {"out": replace(softmax_max=lambda a: np.repeat(a, 2, axis=1)[:, :2]), "softmax_layout": "SBH"},
        "TND",
        says="out.softmax_max has strides (32, 8, 1) (in elements) for shape (8, 2, 8); packed statistics must be "
        "contiguous. Pass such an array and assign from it.",
    ),
    "over itself": Wrong(
        ("out-overlap",),
        rau.ShapeError,
        {"out": replace(attn_out=lambda a: np.lib.stride_tricks.as_strided(a, strides=(0, 96, 4)))},
        says="out.attn_out has strides (0, 24, 1) (in elements) for shape (4, 2, 24) and overlaps itself; expected "
        "separate memory for each element. Pass a copy.",
    ),
    "broadcast lanes": Wrong(
        ("out-writable",),
        rau.ShapeError,
        {"out": replace(softmax_max=lambda a: np.broadcast_to(a[..., :1], a.shape))},
        says="out.softmax_max has lanes of stride 0, as AttentionState.from_lse makes them; expected arrays that may be written "
        "to. To merge in place, use rau.merge_lse(..., out=pair) of pairs (attn_out, lse), or a rau.StreamingMerge.",
    ),
    "one array twice": Wrong(
        ("out-overlap",),
        rau.ShapeError,
        {"out": lambda out: (out[0], out[1], out[1])},
        says="out.softmax_max and out.softmax_sum share memory; expected three separate arrays.",
    ),
}
