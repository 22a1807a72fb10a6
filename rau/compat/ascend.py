"""The vendors' own signatures: change one import line, and rau does the merge of a training script, on any device.

======================================================================  =========================================
in the script                                                           replace with
======================================================================  =========================================
``from torch_npu import npu_ring_attention_update``                     ``from rau.compat import npu_ring_...``
``from mindspeed.ops.npu_ring_attention_update import npu_ring_...``    ``from rau.compat import npu_ring_...``
``from mindspore.ops import ring_attention_update``                     ``from rau.compat import ring_attention_...``
======================================================================  =========================================

As with the vendors, statistics in layout "TND" are packed per sequence unless a call says otherwise (the default of
:func:`rau.ring_attention_update` is the other order), the vendor's limits hold, and the result is a plain tuple. Which
backend runs a call is chosen by :func:`rau.use_backend`, ``RAU_BACKEND``, or the tensors' device.
"""

from __future__ import annotations

from typing import Any

from rau.compat.words import worded
from rau.constraints.profiles import PROFILES
from rau.constraints.rules import Violations
from rau.errors import shown
from rau.layouts import OTHER_LAYOUTS
from rau.update import ring_attention_update as _update

__all__ = ["npu_ring_attention_update", "ring_attention_update"]

Triple = tuple[Any, Any, Any]


@worded(softmax_layout="input_softmax_layout", **{"layout=": "input_layout="})
def npu_ring_attention_update(
    prev_attn_out: Any,
    prev_softmax_max: Any,
    prev_softmax_sum: Any,
    cur_attn_out: Any,
    cur_softmax_max: Any,
    cur_softmax_sum: Any,
    actual_seq_qlen: Any = None,
    layout: str | None = None,
    *,
    input_layout: str | None = None,
    input_softmax_layout: str = "",
) -> Triple:
    """Merge two partial attention states, with the signature of torch_npu's operator or of MindSpeed's.

    Parameters
    ----------
    prev_attn_out, prev_softmax_max, prev_softmax_sum, cur_attn_out, cur_softmax_max, cur_softmax_sum : array
        As :func:`rau.ring_attention_update` takes them.
    actual_seq_qlen : array of int64, shape (sequences + 1,), or list of int, optional
        Cumulative sequence lengths, from 0 to T; required in layout "TND". Keyword-only in torch_npu, whose operator
        does not read them where statistics are token-major: there they may be anything but None.
    layout : {"SBH", "TND"}, optional
        The layout, under MindSpeed's name.
    input_layout : {"SBH", "TND"}, optional
        The layout, under torch_npu's name. "SBH" if neither is given.
    input_softmax_layout : {"", "SBH", "TND"}, default ""
        Order of the statistics in layout "TND", which only torch_npu lets you choose: packed per sequence ("" and
        "SBH"), or token-major ("TND").

    Returns
    -------
    attn_out, softmax_max, softmax_sum : array

    Raises
    ------
    ConstraintError
        If the call breaks a rule; it is a RuntimeError. In layout "TND" the limits are those of the vendor's newer pages
        for both operators, profile "cann-v2".

    Examples
    --------
    >>> import numpy as np
    >>> out, stats = np.ones((2, 1, 4), np.float32), np.ones((1, 1, 2, 8), np.float32)
    >>> attn_out, softmax_max, softmax_sum = npu_ring_attention_update(out, stats, stats, out, stats, stats)
    >>> softmax_sum[0, 0, :, 0]
    array([2., 2.], dtype=float32)
    """
    report = Violations("npu_ring_attention_update")
    if layout is not None and input_layout is not None:
        report.add("layout", f"layout = {shown(layout)} and input_layout = {shown(input_layout)} are both given; expected one of "
                   "them: the first is MindSpeed's spelling, the second torch_npu's.")  # fmt: skip
    name, named = ("layout", layout) if input_layout is None else ("input_layout", input_layout)
    if named is not None:
        report.choice("layout", name, named, PROFILES["cann-v2"].layouts, "", OTHER_LAYOUTS)
    if not (isinstance(input_softmax_layout, str) and input_softmax_layout == ""):
        note = ' "TND" is token-major; "SBH", or "", is packed per sequence, as npu_fusion_attention emits.'
        report.choice("softmax-layout", "input_softmax_layout", input_softmax_layout, ("SBH", "TND"), note, {})
    report.raise_if_broken()
    if input_softmax_layout == "TND" and actual_seq_qlen is not None:
        # Not read, hence not checked: one sequence of all tokens stands for it. What has no shape is refused further on.
        actual_seq_qlen = [0, *getattr(prev_attn_out, "shape", ())[:1]]
    return tuple(
        _update(
            prev_attn_out, prev_softmax_max, prev_softmax_sum, cur_attn_out, cur_softmax_max, cur_softmax_sum,
            actual_seq_qlen, "SBH" if named is None else named, softmax_layout=input_softmax_layout or "SBH",
            profile="cann-v2",
        )
    )  # fmt: skip


@worded()
def ring_attention_update(
    prev_attn_out: Any,
    prev_softmax_max: Any,
    prev_softmax_sum: Any,
    cur_attn_out: Any,
    cur_softmax_max: Any,
    cur_softmax_sum: Any,
    actual_seq_qlen: Any = None,
    layout: str = "SBH",
) -> Triple:
    """Merge two partial attention states, with the signature of ``mindspore.ops.ring_attention_update``.

    Parameters
    ----------
    prev_attn_out, prev_softmax_max, prev_softmax_sum, cur_attn_out, cur_softmax_max, cur_softmax_sum : array
        As :func:`rau.ring_attention_update` takes them.
    actual_seq_qlen : array of int64, shape (sequences + 1,), or list of int, optional
        Cumulative sequence lengths, from 0 to T; required in layout "TND".
    layout : {"SBH", "TND"}, default "SBH"

    Returns
    -------
    attn_out, softmax_max, softmax_sum : array

    Raises
    ------
    ConstraintError
        If the call breaks a rule, including the reference page's limits; it is a RuntimeError.

    Notes
    -----
    In layout "TND" statistics are packed per sequence, as MindSpore's operator reads them on an Ascend chip. (The shape
    on its reference page and its test reference are token-major: that is :func:`rau.ring_attention_update`.)

    Examples
    --------
    >>> import numpy as np
    >>> out, stats = np.ones((2, 1, 64), np.float32), np.ones((2, 1, 8), np.float32)
    >>> attn_out, _, _ = ring_attention_update(out, stats, stats, out, stats, stats, [0, 2], "TND")
    >>> attn_out.shape
    (2, 1, 64)
    """
    return tuple(
        _update(
            prev_attn_out, prev_softmax_max, prev_softmax_sum, cur_attn_out, cur_softmax_max, cur_softmax_sum,
            actual_seq_qlen, layout, softmax_layout="SBH",
        )
    )  # fmt: skip
