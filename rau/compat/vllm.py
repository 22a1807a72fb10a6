"""vLLM's merge: ``from vllm.v1.attention.ops.merge_attn_states import merge_attn_states``."""

from __future__ import annotations

import math
from typing import Any

from rau.arithmetic import library
from rau.arrays import kind_of, plain
from rau.arrays.numpy_ import EIGHT_BITS
from rau.compat.pairs import check, merged
from rau.compat.words import worded
from rau.constraints.options import whole_number
from rau.constraints.rules import Violations
from rau.errors import shown

__all__ = ["merge_attn_states"]

_SIDES = ("prefix_output", "prefix_lse"), ("suffix_output", "suffix_lse")
_HOW = {"base": "e", "layout": "TND", "lse_layout": "NT", "inf_is_empty": True}


@worded(*_SIDES, out_0="output", out_1="output_lse", out="output", scale="output_scale")
def merge_attn_states(
    output: Any,
    prefix_output: Any,
    prefix_lse: Any,
    suffix_output: Any,
    suffix_lse: Any,
    output_lse: Any = None,
    prefill_tokens_with_context: int | None = None,
    output_scale: Any = None,
) -> None:
    """Merge attention over the cached prefix with attention over the new tokens, into `output`.

    Parameters
    ----------
    output : array, shape (T, N, D), dtype of `prefix_output`
        Is written to. It may be one of the two outputs itself. With `output_scale` of eight bits: float8_e4m3fn or
        float8_e5m2.
    prefix_output, suffix_output : array, float16, bfloat16 or float32, shape (T, N, D)
    prefix_lse, suffix_lse : array, float32, shape (N, T)
        Natural logarithms; +inf is read as -inf, a row without keys.
    output_lse : array, float32, shape (N, T), optional
        Is written to: the log-sum-exp of the merge, -inf for a row without keys.
    prefill_tokens_with_context : int, optional
        Tokens from this one on have no prefix: theirs is the suffix's. All tokens have one by default.
    output_scale : array, float32, shape () or (1,), optional
        What an output of eight bits is divided by. As in vLLM's kernels, it is multiplied by the reciprocal, which is
        rounded to float32, and limited to the range of the format.

    Raises
    ------
    ConstraintError, UnsupportedError
        As :func:`rau.merge_lse`.

    Examples
    --------
    >>> import numpy as np
    >>> out, lse = np.ones((3, 2, 8), np.float32), np.zeros((2, 3), np.float32)
    >>> output = np.empty_like(out)
    >>> merge_attn_states(output, 2 * out, lse, 4 * out, lse, prefill_tokens_with_context=2)
    >>> output[:, 0, 0].tolist()
    [3.0, 3.0, 4.0]
    """
    n, outputs, rows = prefill_tokens_with_context, "(T, N, D)", "(N, T)"
    given = {"output": (output, outputs), "prefix_output": (prefix_output, outputs), "prefix_lse": (prefix_lse, rows),
             "suffix_output": (suffix_output, outputs), "suffix_lse": (suffix_lse, rows)}  # fmt: skip
    check("merge_attn_states", given | ({} if output_scale is None else {"output_scale": (output_scale, "(1) or ()")}))
    report, kind = Violations("merge_attn_states"), kind_of(plain(output))
    assert kind is not None  # as was checked
    if output_scale is None and kind.dtype(output) in EIGHT_BITS:
        report.add("scale", f"output has dtype {kind.dtype(output)}, and output_scale is None; expected what it is divided by, a "
                   f"{kind.name} array of float32.")  # fmt: skip
    elif output_scale is not None:
        its = kind_of(plain(output_scale))
        assert its is not None
        if kind.dtype(output) not in EIGHT_BITS:
            report.add("scale", f"output_scale is given, and output has dtype {kind.dtype(output)}; expected "
                       f"{' or '.join(EIGHT_BITS)}, whose range it serves.")  # fmt: skip
        elif (its.name, its.dtype(output_scale)) != (kind.name, "float32"):
            report.add("scale", f"output_scale is a {its.name} array of {its.dtype(output_scale)}; expected a {kind.name} array of "
                       "float32.")  # fmt: skip
    report.raise_if_broken()
    if n is not None:
        number = whole_number(n)
        if number is None or not 0 <= number <= output.shape[0]:
            report.add(
                "tokens",
                f"prefill_tokens_with_context is {shown(n)}; expected a number of tokens, from 0 to T = {output.shape[0]}.",
            )
            raise report.error()
        prefix_lse = library(prefix_lse).concatenate(
            [prefix_lse[:, :number], library(prefix_lse).full_like(prefix_lse[:, number:], -math.inf)], 1
        )
    asked = {} if output_scale is None else {"dtype": output.dtype, "scale": 1 / output_scale}
    pairs = [(prefix_output, prefix_lse), (suffix_output, suffix_lse)]
    merged(pairs, _HOW, output, output_lse, with_lse=output_lse is not None, **asked)
