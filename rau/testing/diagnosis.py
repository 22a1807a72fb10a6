"""Is an output that was observed elsewhere right, and if not, which known mistake reproduces it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rau.constraints import FIELDS
from rau.state import AttentionState
from rau.testing.bits import same_bits
from rau.testing.checks import expected_of, problem_of
from rau.testing.comparison import Comparison, compare, shares
from rau.testing.expected import Expected, widen
from rau.testing.mistakes import MISTAKES, Mistake
from rau.testing.plain import Rows
from rau.testing.record import Record, RecordError
from rau.testing.rows import half_ulp

_EXPLAINED = 0.9  # of the wrong elements: the rest is left to what else may be wrong
_SPOILED = 0.01  # of the right ones
_NEARER = 8  # an element is explained by a mistake that it is so many times nearer to than to the truth
_SLIGHT = 64.0  # times the bound: about what rows computed in float32 come to


@dataclass(frozen=True)
class Candidate:
    """How well one known mistake reproduces what was observed.

    Attributes
    ----------
    mistake : Mistake
    same_bits : bool
        All three arrays have the same bits.
    explained : float
        Of the elements that are wrong, the share that the mistake explains: they are exactly, or eight times nearer to,
        what it makes of them.
    spoiled : float
        Of the elements that are right, the share that the mistake would have made wrong.
    off : float
        How far the explained elements are from it at most, in shares of the bound.
    everything : bool
        It explains the statistics as well as attn_out.
    """

    mistake: Mistake
    same_bits: bool
    explained: float
    spoiled: float
    off: float
    everything: bool

    @property
    def reproduces(self) -> bool:
        """Whether the mistake accounts for what was observed."""
        return self.same_bits or (self.explained >= _EXPLAINED and self.spoiled <= _SPOILED)

    def __str__(self) -> str:
        if self.same_bits:
            how = "bit for bit"
        else:
            how = f"{self.explained:.1%} of the wrong elements, to within {self.off:.2g} of the bound"
            how += f"; {self.spoiled:.1%} of the right ones speak against it" if self.spoiled else ""
            how += "" if self.everything else "; not the statistics"
        return f"{self.mistake.name} ({how})"


@dataclass(frozen=True)
class Diagnosis:
    """The verdict on what was observed.

    Attributes
    ----------
    comparison : Comparison
        What the oracle says.
    candidates : tuple of Candidate
        The mistakes that account for at least some of it, best first; empty where it is right.
    invisible : tuple of str
        Mistakes that make no difference on these inputs, so that nothing can be said about them.
    slight : bool
        It is wrong, by no more than another arithmetic might be.
    """

    comparison: Comparison
    candidates: tuple[Candidate, ...]
    invisible: tuple[str, ...]
    slight: bool

    @property
    def right(self) -> bool:
        """Whether it is what the contract asks for."""
        return self.comparison.passed

    @property
    def recognised(self) -> tuple[Candidate, ...]:
        """The mistakes that reproduce it equally well, best first; more than one where the inputs cannot tell."""
        good = [candidate for candidate in self.candidates if candidate.reproduces]
        return tuple(candidate for candidate in good if candidate.same_bits or not good[0].same_bits)

    def __str__(self) -> str:
        lines = [str(self.comparison)]
        for candidate in self.recognised:
            lines += [f"known mistake: {candidate}", f"  {candidate.mistake.wrong}", f"  {candidate.mistake.change}"]
        if len(self.recognised) > 1:
            lines.append("These inputs do not tell these apart; larger ones would.")
        if not self.right and not self.recognised:
            lines.append("No known mistake reproduces it.")
            nearest = self.candidates[:3]
            if nearest:
                lines.append(f"  Nearest: {'; '.join(map(str, nearest))}.")
            if self.slight:
                lines.append(
                    "  It is wrong by little: rows computed in float32, as the vendors' kernels do, come this far. "
                    "A backend that means it declares it: Capabilities(tolerance=...)."
                )
        if self.invisible:
            lines.append(f"These inputs cannot show: {', '.join(self.invisible)}.")
        return "\n".join(lines)


def diagnose(record: Record, *, tolerance: float = 1.0) -> Diagnosis:
    """Judge an observed output, and look for the known mistake that reproduces it.

    Parameters
    ----------
    record : Record
        As :func:`rau.testing.record.load` reads it.
    tolerance : float, default 1.0
        How many times the bound is still right.

    Returns
    -------
    Diagnosis

    Raises
    ------
    RecordError
        If nothing was observed.
    ConstraintError
        If the inputs are no valid call.

    Examples
    --------
    >>> from rau.testing.cases import Case
    >>> case = Case(id="mine", tokens=9)
    >>> states = case.fill()
    >>> print(diagnose(Record(case, states, states[0])).recognised[0])
    prev-returned (bit for bit)
    """
    if record.observed is None:
        raise RecordError('nothing was observed: "attn_out", "softmax_max" and "softmax_sum" are missing')
    call = record.case.make(record.states)
    problem_of(call)
    expected = expected_of(call)
    comparison = compare(record.observed, expected, tolerance=tolerance)
    wrong = not comparison.passed and _comparable(record.observed, expected)
    truth = _truths(record.observed, expected, tolerance) if wrong else []
    rows = Rows(call.states, record.case.lengths_argument(), record.case.layout, record.case.softmax_layout)
    candidates, invisible = [], []
    for mistake in MISTAKES.values():
        result = mistake(rows)
        if result is None or compare(result, expected, tolerance=tolerance).passed:
            invisible.append(mistake.name)
        elif truth:
            candidates.append(_judge(mistake, record.observed, result, truth))
    candidates = [candidate for candidate in candidates if candidate.same_bits or candidate.explained > 0]
    candidates.sort(key=lambda c: (c.same_bits, c.reproduces, c.everything, c.explained - c.spoiled), reverse=True)
    largest = max(comparison.attn_share, comparison.sum_share)
    slight = wrong and largest <= _SLIGHT and bool(truth[1].right.all())  # [1] is softmax_max
    return Diagnosis(comparison, tuple(candidates), tuple(invisible), slight)


def _comparable(observed: AttentionState, expected: Expected) -> bool:
    dtypes = expected.dtype, expected.stats_dtype, expected.stats_dtype
    arrays = expected.attn_out, expected.softmax_max, expected.softmax_sum
    return all(
        (mine.shape, mine.dtype.name) == (its.shape, dtype)
        for mine, its, dtype in zip(observed, arrays, dtypes, strict=True)
    )


def _judge(mistake: Mistake, observed: AttentionState, result: AttentionState, truth: Sequence[_Truth]) -> Candidate:
    parts = [
        _explain(widen(seen), widen(made), true) for seen, made, true in zip(observed, result, truth, strict=True)
    ]
    # attn_out decides wherever it is wrong: the statistics may be kept in other ways.
    deciding = parts[next((i for i, true in enumerate(truth) if true.telling.any()), 0)]
    everything = all(part.explained >= _EXPLAINED and part.spoiled <= _SPOILED for part in parts)
    return Candidate(mistake, not same_bits(observed, result), *deciding, everything)


class _Part(NamedTuple):
    """What a mistake explains of one array, as `Candidate` has it."""

    explained: float
    spoiled: float
    off: float


class _Truth(NamedTuple):
    """What one array should be, and where it is not."""

    exact: np.ndarray
    grain: np.ndarray  # the bound, as far as there is one
    dtype: str
    telling: np.ndarray  # the elements that are wrong by so much that a mistake must explain them
    right: np.ndarray


def _truths(observed: AttentionState, expected: Expected, tolerance: float) -> list[_Truth]:
    targets = (
        (expected.attn_out, expected._attn_low, expected.attn_error),
        (expected.softmax_max, 0.0, np.zeros(())),
        (expected.softmax_sum, expected._sum_low, expected.sum_bound),
    )
    found, off = [], []
    for name, seen, (exact, low, bound) in zip(FIELDS, observed, targets, strict=True):
        x, bound = widen(seen), np.broadcast_to(bound, seen.shape)
        if name == "softmax_max":  # a zero of either sign is right
            x, exact = x + 0.0, exact + 0.0
        off.append(shares(x, exact, low, bound, seen.dtype.name))
        found.append((exact, np.where(bound < np.inf, bound, 0.0), seen.dtype.name))
    # Another arithmetic may be on top of a mistake: where anything is far off, what is slightly off tells nothing.
    limit = _SLIGHT if any((share > _SLIGHT).any() for share in off) else tolerance
    return [
        _Truth(*parts, share > max(limit, tolerance), share <= tolerance)
        for parts, share in zip(found, off, strict=True)
    ]


def _explain(seen: np.ndarray, made: np.ndarray, truth: _Truth) -> _Part:
    with np.errstate(all="ignore"):
        grain = truth.grain + half_ulp(np.where(np.isfinite(made), np.abs(made), 0.0), truth.dtype)
        off = _apart(seen, made) / grain
        explained = (off == 0) | ((off < np.inf) & (off * _NEARER <= _apart(seen, truth.exact) / grain))
    return _Part(
        float(explained[truth.telling].mean()) if truth.telling.any() else 1.0,
        # What is right may be so by another arithmetic; it speaks against a mistake that would have moved it well away.
        float((off > 2)[truth.right].mean()) if truth.right.any() else 0.0,
        float(off[truth.telling & explained].max(initial=0.0)),
    )


def _apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the distance: 0 where both are NaN, or the same infinity; infinite where one alone is."""
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    apart = np.abs(one - other)
    return np.where(same, 0.0, np.where(np.isnan(apart), np.inf, apart))
