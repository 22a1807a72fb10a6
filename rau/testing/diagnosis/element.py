"""One element of an output, step by step: the numbers that a merge goes through, and where the observed one stands."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from rau.testing.comparison import shares
from rau.testing.diagnosis.steps import Steps
from rau.testing.differential.record import Record, RecordError
from rau.testing.reference.oracle import once_stored, oracle


class Side(NamedTuple):
    """What one state brings."""

    maximum: float
    sum: float
    factor: float  # a = sum * exp(maximum - m)
    weight: float  # a / l, as it is rounded
    output: float
    term: float  # weight * output


class Element(NamedTuple):
    """The merge of one element of attn_out.

    Attributes
    ----------
    where : str
        Its index in attn_out.
    sides : list of Side
    maximum, sum : float
        m and l of its row.
    exact, bound : float
        What it should be, and how far from that it may be; 0: bit for bit.
    observed : float or None
    share : float or None
        How far off it is, as a share of the bound.
    """

    where: str
    sides: list[Side]
    maximum: float
    sum: float
    exact: float
    bound: float
    observed: float | None
    share: float | None


def element(record: Record, index: tuple[int, ...]) -> Element:
    """Go through the merge of one element.

    Parameters
    ----------
    record : Record
    index : tuple of int
        Token, head and place in the head; a batch entry before them, 0 if it is left out.

    Raises
    ------
    RecordError
        If there is no such element.

    Examples
    --------
    >>> from rau.testing.cases import Case
    >>> case = Case(id="mine", tokens=9)
    >>> states = case.fill()
    >>> found = element(Record(case, states, states[0]), (3, 0, 2))
    >>> found.where, len(found.sides), found.bound > 0
    ('attn_out[3, 0, 2]', 2, True)
    """
    case = record.case
    call = case.make(record.states)
    rows = Steps(call.states, case.lengths_argument(), case.layout, case.softmax_layout)
    numbers = rows.row_of()
    *batch, t, h, d = index
    shape = (*numbers.shape, rows.outputs[0].shape[1])
    place = (*(batch or [0]), t, h, d)
    if len(place) != 4 or any(not 0 <= i < n for i, n in zip(place, shape, strict=True)):
        raise RecordError(f"there is no element {','.join(map(str, index))}; expected token, head and place in the head below "
                          f"{shape[1:]}" + f", and a batch entry below {shape[0]} before them" * (shape[0] > 1))  # fmt: skip
    row = int(numbers[place[:3]])
    with np.errstate(all="ignore"):
        factors = rows.factors()
        weights = rows.weights(factors)
        sides = [
            Side(*(float(x) for x in (m[row, 0], l[row, 0], a[row, 0], w[row, 0], o[row, d], w[row, 0] * o[row, d])))
            for m, l, a, w, o in zip(rows.maxima, rows.sums, factors, weights, rows.outputs, strict=True)
        ]
        maximum, total = float(rows.maximum[row, 0]), float(rows.total(factors)[row, 0])
    kind: dict[str, Any] = {"statistics": "lse", "lse_base": record.lse_base} if record.lse_base else {}
    expected = oracle(
        call.states, case.lengths_argument(), case.layout, softmax_layout=case.softmax_layout, unpromised=record.unpromised, **kind
    )
    flat = row * shape[-1] + d
    exact, error = (np.asarray(part).reshape(-1)[flat : flat + 1] for part in (expected.attn_out, expected.attn_error))
    low = np.broadcast_to(expected._attn_low, expected.attn_out.shape).reshape(-1)[flat : flat + 1]
    observed = share = None
    if record.observed is not None and record.observed.attn_out is not None:
        if record.observed.attn_out.shape != expected.attn_out.shape:
            raise RecordError(f"attn_out has shape {record.observed.attn_out.shape}; expected {expected.attn_out.shape}")
        seen = record.observed.attn_out.reshape(-1)[flat : flat + 1].astype(np.float64)
        observed, share = float(seen[0]), float(shares(seen, exact, low, error, expected.dtype)[0])
    where = ", ".join(map(str, (int(i) for i in np.unravel_index(flat, expected.attn_out.shape))))
    bound = float(once_stored(error, exact, expected.dtype)[0])
    return Element(f"attn_out[{where}]", sides, maximum, total, float(exact[0]), bound, observed, share)
