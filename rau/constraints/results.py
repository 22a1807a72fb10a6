"""What a result is rounded to: its dtype, and the scale of one of eight bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from rau.arrays import kind_of, plain
from rau.arrays.numpy_ import EIGHT_BITS, ITEMSIZE, NARROW
from rau.constraints.hints import described
from rau.constraints.rules import Violations
from rau.errors import shown


def dtype_name(dtype: Any) -> str:
    """Name a dtype: torch's and MindSpore's end in their name, NumPy's and ml_dtypes' types have one."""
    try:
        name = str(dtype).rpartition(".")[2].lower()
        return name if name in ITEMSIZE or name in EIGHT_BITS else np.dtype(dtype).name
    except Exception:  # NumPy's, or its own
        return ""


def result_dtype(report: Violations, dtype: Any, own: str) -> str:
    """Check the dtype that is asked of an output, and name it: `own`, which is computed, if none is."""
    if dtype is None:
        return own
    known = ("float64",) if own == "float64" else ("float32", *NARROW, *EIGHT_BITS)
    wanted = dtype_name(dtype)
    if wanted not in known:
        report.add("dtype-attn", f"dtype = {shown(dtype)}, for outputs of {own}; expected one of {', '.join(known)}.")
    return wanted or own


def bind_scale(report: Violations, scale: Any, dtype: str, heads: int, like: Any) -> Any:
    """Check the factor of an output of eight bits: a number, or a float32 array of one element or one for each head."""
    if scale is None:
        return None
    expected = f"expected a number, or a float32 array of shape () or ({heads},), one for each head"
    if dtype not in EIGHT_BITS:
        report.add("scale", f"scale is given for an output of {dtype}; expected dtype={' or '.join(map(shown, EIGHT_BITS))}, "
                   "whose range it serves.")  # fmt: skip
    elif isinstance(scale, (int, float, np.floating)) and not isinstance(scale, bool):
        try:
            with np.errstate(over="ignore"):
                return float(np.float32(scale))
        except OverflowError:
            report.add("scale", f"scale = {shown(scale)}; {expected}.")
    else:
        scale, own = plain(scale), kind_of(like)
        kind = kind_of(scale)
        if kind is None or own is None or kind.name != own.name or kind.dtype(scale) != "float32":
            got = described(scale) if kind is None else f"a {kind.name} array of {kind.dtype(scale)}"
            report.add("scale", f"scale is {got}; {expected}, of the kind of the outputs.")
        elif tuple(scale.shape) not in ((), (1,), (heads,)):
            report.add("scale", f"scale has shape {tuple(scale.shape)}; {expected}.")
        elif kind.device(scale) != kind.device(like):
            report.add("array-device", f"scale is on {kind.device(scale)} and the outputs on {kind.device(like)}; expected one "
                       "device for all. Move one of them first.")  # fmt: skip
        else:
            return scale
    return None
