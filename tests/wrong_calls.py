"""Bad calls of ring_attention_update: what is changed in a valid one, and what the error says."""

from dataclasses import dataclass, field

import numpy as np
from states import NAMES, arguments, sbh, tnd

import rau

QLEN = [0, 3, 8]
NO_ARRAY = "expected an array (NumPy, or of a kind that a backend takes)."


@dataclass
class Wrong:
    """A valid call, and what is changed in it; a function changes an argument, anything else stands for it."""

    rules: tuple
    error: type
    edits: dict = field(default_factory=dict)
    layout: str = "SBH"
    sizes: dict = field(default_factory=dict)
    says: str = ""  # the whole message, without the call's name and the rule's

    def arguments(self):
        made = arguments(sbh if self.layout == "SBH" else tnd, **self.sizes)
        if self.layout != "SBH":
            made.update(layout="TND", actual_seq_qlen=QLEN)
        made["out"] = rau.AttentionState(*(np.full_like(made[name], 7) for name in NAMES[:3]))
        for name, edit in self.edits.items():
            made[name] = edit(made.get(name)) if callable(edit) else edit
        return made


def array_error(name, got, hint=""):
    return f"{name} is {got}; {NO_ARRAY}{hint}"


def big_endian(array):
    return array.astype(array.dtype.newbyteorder(">"))


def objects(array):
    return array.astype(object)


def masked(array):
    return np.ma.masked_array(array)


def frozen(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def replace(**parts):
    """Replace arrays of `out`."""
    return lambda out: out._replace(**{name: change(getattr(out, name)) for name, change in parts.items()})


SWAP = " Convert it to native byte order: a.astype(a.dtype.newbyteorder('='))."
LIST = " Convert it with numpy.asarray(..., dtype=...)."
LETTERS = " The letters are the axes of attn_out: B batch, S or T tokens, N heads, D head dimension, H = N * D."
LAYOUTS = 'expected one of "SBH", "TND", "BSND", "BNSD".'

ARRAYS = {
    "list": Wrong(
        ("array",),
        rau.DTypeError,
        {"prev_attn_out": np.ndarray.tolist},
        says=array_error("prev_attn_out", "of type list", LIST),
    ),
    "None": Wrong(("array",), rau.DTypeError, {"cur_softmax_max": None}, says=array_error("cur_softmax_max", "None")),
    "scalar": Wrong(
        ("array",),
        rau.DTypeError,
        {"cur_attn_out": np.float32(3)},
        says=array_error("cur_attn_out", "of type numpy.float32"),
    ),
    "masked": Wrong(
        ("array",),
        rau.DTypeError,
        {"prev_attn_out": masked},
        says=array_error(
            "prev_attn_out",
            f"of type {np.ma.MaskedArray.__module__}.MaskedArray",  # moved with NumPy 2
            " A mask would be lost: fill it first; an empty row has softmax_sum 0.",
        ),
    ),
    "memoryview": Wrong(("array",), rau.DTypeError, {"prev_softmax_sum": memoryview}),
    "six Nones": Wrong(("array",) * 6, rau.DTypeError, dict.fromkeys(NAMES)),
    "object": Wrong(
        ("dtype-match",),
        rau.DTypeError,
        {"cur_attn_out": objects},
        says="cur_attn_out has dtype object and prev_attn_out float32; expected the same dtype.",
    ),
    "object statistics": Wrong(
        ("dtype-stats",),
        rau.DTypeError,
        {"prev_softmax_sum": objects},
        says="prev_softmax_sum has dtype object; expected float32.",
    ),
    "both integers": Wrong(
        ("dtype-attn",),
        rau.DTypeError,
        {name: lambda a: a.astype("int32") for name in (NAMES[0], NAMES[3])} | {"out": None},
        says="prev_attn_out has dtype int32; expected one of float16, bfloat16, float32.",
    ),
    "both float64": Wrong(
        ("dtype-attn",),
        rau.DTypeError,
        {name: lambda a: a.astype("float64") for name in (NAMES[0], NAMES[3])} | {"out": None},
        says="prev_attn_out has dtype float64; expected one of float16, bfloat16, float32. "
        'profile="portable" takes float64.',
    ),
    "all big-endian": Wrong(
        ("dtype-attn", *["dtype-stats"] * 4), rau.DTypeError, dict.fromkeys(NAMES, big_endian) | {"out": None}
    ),
    "big-endian statistics": Wrong(
        ("dtype-stats",),
        rau.DTypeError,
        {"cur_softmax_sum": big_endian},
        says=f"cur_softmax_sum has dtype float32 (byte-swapped); expected float32.{SWAP}",
    ),
    "unequal dtypes": Wrong(
        ("dtype-match",),
        rau.DTypeError,
        {"cur_attn_out": lambda a: a.astype("float16")},
        says="cur_attn_out has dtype float16 and prev_attn_out float32; expected the same dtype. "
        'profile="portable" merges a 16-bit state into a float32 one.',
    ),
    "float32 into float16": Wrong(
        ("dtype-match",),
        rau.DTypeError,
        {"prev_attn_out": lambda a: a.astype("float16"), "out": None, "profile": "portable"},
        says="cur_attn_out has dtype float32 and prev_attn_out float16; expected the same dtype.",
    ),
    "float64 statistics": Wrong(
        ("dtype-stats",),
        rau.DTypeError,
        {"prev_softmax_max": lambda a: a.astype("float64")},
        says="prev_softmax_max has dtype float64; expected float32. Pass softmax_max.astype(numpy.float32): weights are off "
        "by up to abs(softmax_max) * 2**-25.",
    ),
    "float16 statistics": Wrong(
        ("dtype-stats",),
        rau.DTypeError,
        {"cur_softmax_sum": lambda a: a.astype("float16")},
        says="cur_softmax_sum has dtype float16; expected float32. Compute it in float32; or pass softmax_sum.astype("
        "numpy.float32), at the price of 11 significant bits: weights are off by up to 2**-12.",
    ),
    "float32 statistics of float64": Wrong(
        ("dtype-stats",) * 4,
        rau.DTypeError,
        {name: lambda a: a.astype("float64") for name in (NAMES[0], NAMES[3])} | {"out": None, "profile": "portable"},
    ),
    "one of float32 with float64": Wrong(
        ("dtype-stats",),
        rau.DTypeError,
        {name: lambda a: a.astype("float64") for name in NAMES[:5]} | {"out": None, "profile": "portable"},
        says="cur_softmax_sum has dtype float32; expected float64, since prev_attn_out is float64. Pass softmax_sum.astype("
        "numpy.float64), which is exact.",
    ),
}

SHAPES = {
    "rank": Wrong(
        ("rank",),
        rau.ShapeError,
        {"prev_attn_out": lambda a: a[None]},
        says='prev_attn_out has shape (1, 4, 2, 24), 4 axes; layout "SBH" expects 3: (S, B, H).',
    ),
    "0-d": Wrong(
        ("rank",),
        rau.ShapeError,
        {"cur_softmax_sum": np.zeros((), "float32")},
        says='cur_softmax_sum has shape (), 0 axes; layout "SBH" expects 4: (B, N, S, 8).',
    ),
    "no lanes": Wrong(
        ("rank",),
        rau.ShapeError,
        {"prev_softmax_max": lambda a: a[..., 0]},
        says='prev_softmax_max has shape (2, 3, 4), 3 axes; layout "SBH" expects 4: (B, N, S, 8). The last '
        "axis holds one number, written 8 times: numpy.repeat(x[..., None], 8, axis=-1).",
    ),
    "matrix": Wrong(("rank",), rau.ShapeError, {"cur_attn_out": lambda a: a[0].view(np.matrix)}),
    "unequal shapes": Wrong(
        ("shape-match",),
        rau.ShapeError,
        {"cur_attn_out": lambda a: a[:-1]},
        says="cur_attn_out has shape (3, 2, 24); expected that of prev_attn_out, (4, 2, 24).",
    ),
    "H not divisible by N": Wrong(
        ("heads-divide-hidden",),
        rau.ShapeError,
        {name: lambda a: a[..., 1:].copy() for name in (NAMES[0], NAMES[3])} | {"out": None},
        says="prev_attn_out has H = 23 and prev_softmax_max N = 3 heads (shapes (4, 2, 23) and "
        "(2, 3, 4, 8)); expected H = N * D.",
    ),
    "H of no heads": Wrong(
        ("heads-divide-hidden",),
        rau.ShapeError,
        {name: lambda a: a[:, :0] for name in NAMES if "softmax" in name} | {"out": None},
    ),
    "statistics of other tokens": Wrong(
        ("shape-stats",),
        rau.ShapeError,
        {"prev_softmax_sum": lambda a: a[:, :, :-1]},
        says="prev_softmax_sum has shape (2, 3, 3, 8); for prev_attn_out of shape (4, 2, 24) and N = 3 heads (read off "
        'prev_softmax_max), layout "SBH" expects (B, N, S, 8) = (2, 3, 4, 8).',
    ),
    "statistics of other heads, TND": Wrong(
        ("shape-stats",),
        rau.ShapeError,
        {"prev_softmax_max": lambda a: a[:, :-1]},
        "TND",
        says="prev_softmax_max has shape (8, 1, 8); for prev_attn_out of shape (8, 2, 64) and N = 2 heads, "
        'layout "TND" expects (T, N, 8) = (8, 2, 8).',
    ),
    "7 lanes": Wrong(
        ("lanes",),
        rau.ShapeError,
        {"prev_softmax_max": lambda a: a[..., :7]},
        says="prev_softmax_max has shape (2, 3, 4, 7); expected a last axis of 8. "
        "The lanes hold one number, written 8 times.",
    ),
    "1 lane": Wrong(
        ("lanes",),
        rau.ShapeError,
        {name: lambda a: a[..., :1] for name in NAMES if "softmax" in name} | {"out": None},
        says='prev_softmax_max has shape (2, 3, 4, 1); expected a last axis of 8. '
        'profile="portable" takes 1 lane as well, and AttentionState.from_lse(..., lanes=8) makes 8.',
    ),
    "1 lane in one array": Wrong(
        ("shape-stats",),
        rau.ShapeError,
        {"cur_softmax_sum": lambda a: a[..., :1], "out": None},
        says="cur_softmax_sum has shape (2, 3, 4, 1); for prev_attn_out of shape (4, 2, 24) and N = 3 heads "
        '(read off prev_softmax_max), layout "SBH" expects (B, N, S, 8) = (2, 3, 4, 8). '
        'profile="portable" takes 1 lane as well, and AttentionState.from_lse(..., lanes=8) makes 8.',
    ),
    "2 lanes, portable": Wrong(
        ("lanes",),
        rau.ShapeError,
        {name: lambda a: a[..., :2] for name in NAMES if "softmax" in name} | {"out": None, "profile": "portable"},
    ),
    "1 lane with 8": Wrong(
        ("shape-stats",), rau.ShapeError, {"cur_softmax_sum": lambda a: a[..., :1], "profile": "portable"}
    ),
    "no lane at all": Wrong(("lanes",), rau.ShapeError, {"prev_softmax_max": lambda a: a[..., :0]}),
    "strided statistics of one axis, packed": Wrong(
        ("rank",),
        rau.ShapeError,
        {"cur_softmax_sum": lambda a: a[:, 0, 0], "softmax_layout": "SBH"},
        "TND",
    ),
    "strided packed statistics": Wrong(
        ("packed-regular",),
        rau.ShapeError,
        {"prev_softmax_max": lambda a: np.repeat(a, 2, axis=1)[:, :2], "softmax_layout": "SBH"},
        "TND",
        says="prev_softmax_max has strides (32, 8, 1) (in elements) for shape (8, 2, 8); packed statistics must be "
        "contiguous, since (T, N) is only a label for their flat order. Slice them in token-major order: "
        'rau.reorder_softmax(..., to="TND").',
    ),
}

OPTIONS = {
    "layout BSH": Wrong(
        ("layout",), rau.LayoutError, {"layout": "BSH"},
        says=f"layout = 'BSH'; {LAYOUTS} Did you mean \"BSND\"? Pass attn_out.reshape(B, S, N, D).{LETTERS}",
    ),
    "layout in small letters": Wrong(
        ("layout",), rau.LayoutError, {"layout": "tnd"}, says=f"layout = 'tnd'; {LAYOUTS} Did you mean \"TND\"?{LETTERS}"
    ),
    "layout of letters in another order": Wrong(  # alike in spelling, and other axes
        ("layout",), rau.LayoutError, {"layout": "BSDN"}, says=f"layout = 'BSDN'; {LAYOUTS}{LETTERS}"
    ),
    "layout that rau lacks": Wrong(
        ("layout",), rau.LayoutError, {"layout": "HND"},
        says=f"layout = 'HND'; {LAYOUTS} rau has no layout (N, T, D): pass attn_out.swapaxes(0, 1) as \"TND\", with "
        f"statistics (T, N, 8).{LETTERS}",
    ),
    "layout None": Wrong(
        ("layout",), rau.LayoutError, {"layout": None}, says=f"layout = None; {LAYOUTS}{LETTERS}"
    ),
    "layout a list": Wrong(
        ("layout",), rau.LayoutError, {"layout": []}, says=f"layout = []; {LAYOUTS}{LETTERS}"
    ),
    "layout an array": Wrong(("layout",), rau.LayoutError, {"layout": np.zeros(2)}),
    "layout not in the profile": Wrong(("layout-profile", "rank"), rau.LayoutError, {"layout": "BSND"}),
    "softmax_layout": Wrong(
        ("softmax-layout",),
        rau.LayoutError,
        {"softmax_layout": "NTD"},  # head-major within a sequence, perhaps: "TND", alike in spelling, is what it is not
        says='softmax_layout = \'NTD\'; expected one of "TND", "SBH". '
        '"TND" is token-major; "SBH" is packed per sequence, as the vendor\'s kernels emit.',
    ),
    "softmax_layout an array": Wrong(("softmax-layout",), rau.LayoutError, {"softmax_layout": np.zeros(2)}),
    "profile": Wrong(
        ("profile",),
        rau.OptionError,
        {"profile": "Portable"},
        says='profile = \'Portable\'; expected one of "mindspore", "cann-v2", "portable". Did you mean "portable"?',
    ),
    "profile a dict": Wrong(("profile",), rau.OptionError, {"profile": {}}),
    "check": Wrong(
        ("check",),
        rau.OptionError,
        {"check": "value"},
        says='check = \'value\'; expected one of "metadata", "values", "document". Did you mean "values"?',
    ),
    "check an array": Wrong(("check",), rau.OptionError, {"check": np.zeros(2)}),
}
