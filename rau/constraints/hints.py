"""Words of messages that lead on: what was passed, and what to pass in its place."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from rau.arrays import looks_like_array, type_names
from rau.arrays.torch_ import tensor_inside

SIGNIFICANT = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}  # bits


def described(value: object) -> str:
    """Word what somebody passed, for messages.

    Examples
    --------
    >>> described(None), described([1]), described(np.float32(1))
    ('None', 'of type list', 'of type numpy.float32')
    """
    if value is None:
        return "None"
    return f"of type {type_names(type(value))[0].replace(':', '.').removeprefix('builtins.')}"


def not_an_array(name: str, value: object) -> str:
    """Word the message about an argument that is no array."""
    hint = in_its_place(value)
    if isinstance(value, np.ma.MaskedArray):
        hint = " A mask would be lost: fill it first; an empty row has softmax_sum 0."
    return f"{name} is {described(value)}; expected an array (NumPy, or of a kind that a backend takes).{hint}"


def in_its_place(value: object) -> str:
    """Word what to pass in the place of what is no array of a kind that a backend takes; empty where nobody knows."""
    if isinstance(value, (list, tuple)):
        if value and all(map(looks_like_array, value)):
            return f" It holds {len(value)}: pass one of them, or stack them into one along the axis that is theirs."
        return " Convert it with numpy.asarray(..., dtype=...)."
    if isinstance(value, np.ma.MaskedArray):
        return " A mask would be lost: fill it first."
    if part := tensor_inside(type(value)):
        return f" Pass {part}."
    if type(value).__module__.partition(".")[0] == "cupy":
        return " Convert it with cupy.asnumpy(...)."
    if looks_like_array(value) and not isinstance(value, np.generic):
        return " Convert it with numpy.asarray(...)."  # MLX, TensorFlow
    return ""


def swapped(dtype: str) -> str:
    """Word what to do with a dtype whose bytes are in the other order; empty for any other."""
    return " Convert it to native byte order: a.astype(a.dtype.newbyteorder('='))." if "byte-swapped" in dtype else ""


def whole_numbers(name: str, kind: str, dtype: str) -> str:
    """Word how cumulative lengths, which FlashAttention has as int32, come to int64; empty if nobody knows."""
    how = {
        "numpy": f"{name}.astype(numpy.int64)",
        "torch": f"{name}.to(torch.int64)",
        "jax": f"numpy.asarray({name}).astype(numpy.int64)",  # which has int32 alone, as it comes
        "mindspore": f"{name}.astype(mindspore.int64)",
    }.get(kind)
    return f" Pass {how}." if how and "int" in dtype else ""


def another_dtype(name: str, kind: str, dtype: str, wanted: str) -> str:
    """Word how statistics, or a log-sum-exp, come to the dtype they should have, and what that costs; empty if nobody knows.

    With p significant bits the logarithm of a state's weight is off by up to d = abs(m) * 2**-p, that of a sum by 2**-p. The
    derivative of a weight w_i by the logarithms is w_i * (1 - w_i) and -w_i * w_j: 2 * w_i * (1 - w_i) <= 1/2 in all.
    """
    has, needs = SIGNIFICANT.get(dtype), SIGNIFICANT.get(wanted)
    if has is None or needs is None:
        return swapped(dtype)
    method = f"astype(numpy.{wanted})" if kind in ("numpy", "jax") else {"float32": "float()", "float64": "double()"}[wanted]
    how = f"{name}.{method}"
    if has < needs and (has >= SIGNIFICANT["float32"] or name == "sink"):  # a parameter is what it is
        return f" Pass {how}, which is exact."
    bits = min(has, needs)
    off = f"weights are off by up to {'' if name.endswith('sum') else f'abs({name}) * '}2**-{bits + 1}"
    if has > needs:
        return f" Pass {how}: {off}."
    autocast = ", with autocast off" if kind == "torch" else ""
    return f" Compute it in {wanted}{autocast}; or pass {how}, at the price of {bits} significant bits: {off}."


def meant(name: str, known: Collection[str], others: Mapping[str, tuple[str, str]]) -> str:
    """Word which of some names another library's is: by what it means, since names alike in spelling may mean other axes.

    `others` has other libraries' names, in capitals: each with the one of `known`, or "" where there is none, and what else
    has to be done. Empty where nothing is known of the name.
    """
    name = name.upper()
    ours, how = (name, "") if name in known else others.get(name, ("", ""))
    if ours in known:
        return f' Did you mean "{ours}"?{how}'
    return "" if ours else how
