"""Is an output that was observed elsewhere right, and if not, which known mistake reproduces it?

The rule of this room: no backend is run. A mistake is a right merge in plain steps with one step replaced, and it is named
only if it accounts for what is wrong and leaves right what is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from rau.arrays.numpy_ import named_dtype
from rau.layouts import FIELDS
from rau.state import AttentionState
from rau.testing.causes import SLIGHT
from rau.testing.comparison import Comparison, compare, same_bits, shares
from rau.testing.diagnosis.lse_mistakes import mistakes_with_lse
from rau.testing.diagnosis.mistakes import MISTAKES, Mistake
from rau.testing.diagnosis.steps import Steps
from rau.testing.diagnosis.vendor import vendors_merge
from rau.testing.differential.record import Record, RecordError
from rau.testing.reference.log_sum_exp import state_lse
from rau.testing.reference.oracle import Expected, oracle, widen
from rau.testing.reference.row_weights import half_ulp
from rau.testing.trial import problem_of

_MISFIT = 0.1  # so much of what is wrong is left to what else may be wrong
_ALIKE = 0.01  # a difference in misfit that another arithmetic may make
_VENDORS = (
    "It is what the vendor's operator computes (rau.testing.VendorArithmetic): rows in float32, nothing guarded, so that 0 / 0 is "
    "NaN, and element d weighted by lane d mod 8. The backend \"ascend\" repairs that."
)


@dataclass(frozen=True)
class Candidate:
    """How well one known mistake reproduces what was observed.

    Attributes
    ----------
    mistake : Mistake
    same_bits : bool
        Whether all three arrays have the same bits.
    explained : float
        The share of the wrong elements that fit the mistake: they are what it makes of them, up to rounding.
    spoiled : float
        The share of the right elements that do not fit it.
    misfit : float
        The number of elements, wrong or right, that do not fit it, divided by the number of wrong ones, which do not fit the
        truth. 0: it accounts for everything observed; 1: it does no better than no mistake at all.
    off : float
        How far the explained elements are from it at most, in shares of the bound.
    everything : bool
        Whether it accounts for the statistics as well as for attn_out.
    """

    mistake: Mistake
    same_bits: bool
    explained: float
    spoiled: float
    misfit: float
    off: float
    everything: bool

    @property
    def reproduces(self) -> bool:
        """Whether the mistake accounts for what was observed."""
        return self.same_bits or self.misfit <= _MISFIT

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
        The mistakes that fit better than none, best first; empty if the output is right.
    invisible : tuple of str
        Mistakes that make no difference on these inputs, so that nothing can be said about them.
    slight : bool
        Whether the output is wrong, but by no more than another arithmetic might be.
    missing : tuple of str
        Arrays that were not observed, and so are not judged.
    vendors : bool
        Whether a wrong attn_out is that of :class:`rau.testing.VendorArithmetic`, up to rounding.
    """

    comparison: Comparison
    candidates: tuple[Candidate, ...]
    invisible: tuple[str, ...]
    slight: bool
    missing: tuple[str, ...] = ()
    vendors: bool = False

    @property
    def right(self) -> bool:
        """Whether the output is what the contract asks for."""
        return self.comparison.passed

    @property
    def recognised(self) -> tuple[Candidate, ...]:
        """The mistakes that reproduce it equally well, best first; more than one where the inputs cannot tell."""
        good = [candidate for candidate in self.candidates if candidate.reproduces]
        return tuple(
            candidate
            for candidate in good
            if (candidate.same_bits, candidate.everything) == (good[0].same_bits, good[0].everything)
            and candidate.misfit <= good[0].misfit + _ALIKE
        )

    def __str__(self) -> str:
        lines = [str(self.comparison)]
        if self.missing:
            lines.append(f"not judged, since the file does not have it: {', '.join(self.missing)}")
        if self.vendors:
            lines.append(_VENDORS)
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
                    "  It is only slightly wrong: rows computed in float32, as in the vendors' kernels, come this far. "
                    "A backend for which this is intended declares it: Capabilities(tolerance=...)."
                )
        if self.invisible:
            lines.append(f"These inputs cannot show: {', '.join(self.invisible)}.")
        return "\n".join(lines)


def diagnose(record: Record, *, tolerance: float = 1.0) -> Diagnosis:
    """Judge an observed output, and look for the known mistake that reproduces it.

    Parameters
    ----------
    record : Record
        As `rau.testing.differential.record.read_record` reads it.
    tolerance : float, default 1.0
        How many times the bound still counts as right.

    Returns
    -------
    Diagnosis

    Raises
    ------
    RecordError
        If nothing was observed.
    ConstraintError
        If the inputs do not make a valid call.

    Examples
    --------
    >>> from rau.testing.cases import Case
    >>> case = Case(id="mine", tokens=9)
    >>> states = case.fill()
    >>> print(diagnose(Record(case, states, states[0])).recognised[0])
    prev-returned (bit for bit)
    """
    if record.observed is None:
        raise RecordError('nothing was observed: there is none of "attn_out", "softmax_max" and "softmax_sum"')
    call, case = record.case.make(record.states), record.case
    problem_of(call)
    kind = {"statistics": "lse", "lse_base": record.lse_base} if record.lse_base else {}
    order, excused = case.softmax_layout, record.unpromised
    expected = oracle(call.states, case.lengths_argument(), case.layout, softmax_layout=order, unpromised=excused, **kind)
    missing = tuple(name for name, part in zip(FIELDS, record.observed, strict=True) if part is None)
    observed = _completed(record.observed, expected)
    comparison = compare(observed, expected, tolerance=tolerance)
    comparison = replace(
        comparison,
        attn_share=np.nan if "attn_out" in missing else comparison.attn_share,
        sum_share=np.nan if "softmax_sum" in missing else comparison.sum_share,
    )
    wrong = not comparison.passed and _comparable(observed, expected)
    slight = wrong and compare(observed, expected, tolerance=SLIGHT).passed
    # Another arithmetic may be on top of a mistake: where anything is far off, what is slightly off tells nothing.
    truth = _truths(observed, expected, tolerance if slight else max(tolerance, SLIGHT)) if wrong else []
    rows = Steps(call.states, case.lengths_argument(), case.layout, case.softmax_layout)
    vendors = False
    if truth and not slight and "attn_out" not in missing and not record.lse_base and (case.states, case.lanes) == (2, 8):
        made = _numbers(vendors_merge(rows), False)[0]
        vendors = bool(truth[0].wrong.any() and _fit(_numbers(observed, False)[0], made, truth[0])[0].all())
    mistakes = MISTAKES
    if record.lse_base:
        with np.errstate(all="ignore"):
            rows, mistakes = rows.keeping_lse(record.lse_base), mistakes_with_lse()
    candidates, invisible = [], []
    for mistake in mistakes.values():
        results = [r for r in mistake.results(rows) if not compare(r, expected, tolerance=tolerance).passed]
        if not results:
            invisible.append(mistake.name)
        elif any(part.wrong.any() for part in truth):
            results = [_with(result, record.observed, observed) for result in results]
            candidates.append(min((_judge(mistake, observed, r, truth) for r in results), key=_order))
    candidates = [candidate for candidate in candidates if candidate.same_bits or candidate.misfit < 1]
    candidates.sort(key=_order)
    return Diagnosis(comparison, tuple(candidates), tuple(invisible), slight, missing, vendors)


def _completed(observed: AttentionState, expected: Expected) -> AttentionState:
    """Put what is right in the places of what was not observed: nothing then speaks for a mistake there, nor against one."""
    exact, dtypes = [getattr(expected, name) for name in FIELDS], (expected.dtype, expected.stats_dtype, expected.stats_dtype)
    with np.errstate(all="ignore"):
        right = [its.astype(named_dtype(dtype)) for its, dtype in zip(exact, dtypes, strict=True)]
    return AttentionState(*(its if part is None else part for part, its in zip(observed, right, strict=True)))


def _with(result: AttentionState, observed: AttentionState, completed: AttentionState) -> AttentionState:
    """Put the same into what a mistake makes."""
    return AttentionState(*(right if seen is None else its for its, seen, right in zip(result, observed, completed, strict=True)))


def _order(candidate: Candidate) -> tuple[bool, bool, bool, float]:
    return not candidate.same_bits, not candidate.reproduces, not candidate.everything, candidate.misfit


def _comparable(observed: AttentionState, expected: Expected) -> bool:
    dtypes = expected.dtype, expected.stats_dtype, expected.stats_dtype
    arrays = expected.attn_out, expected.softmax_max, expected.softmax_sum
    return all(
        (mine.shape, mine.dtype.name) == (its.shape, dtype)
        for mine, its, dtype in zip(observed, arrays, dtypes, strict=True)
    )


class _Truth(NamedTuple):
    """What one array should be, and where it is not."""

    exact: np.ndarray
    low: np.ndarray | float
    error: np.ndarray  # of the arithmetic
    dtype: str
    tolerance: float
    wrong: np.ndarray  # the elements that do not fit it


def _truths(observed: AttentionState, expected: Expected, tolerance: float) -> list[_Truth]:
    targets: tuple[tuple[np.ndarray, Any, Any], ...] = (
        (expected.attn_out, expected._attn_low, expected.attn_error),
        (expected.softmax_max + 0.0, 0.0, np.where(expected.free, np.inf, 0.0)),
        (expected.softmax_sum, expected._sum_low, expected.sum_bound),
    )
    if expected.lse is not None:
        targets = targets[0], (expected.lse, 0.0, expected.lse_bound)
    found = []
    numbers = _numbers(observed, expected.lse is not None)
    for seen, part, (exact, low, error) in zip(numbers, observed, targets, strict=False):
        error, dtype = np.broadcast_to(error, seen.shape), part.dtype.name
        wrong = shares(seen, exact, low, error, dtype, tolerance) > 1
        found.append(_Truth(exact, low, error, dtype, tolerance, wrong))
    return found


def _numbers(state: AttentionState, as_lse: bool) -> list[np.ndarray]:
    attn_out, maximum, total = map(widen, state)
    if as_lse:
        return [attn_out, state_lse(maximum, total)]
    return [attn_out, maximum + 0.0, total]  # a max of zero may have either sign


def _judge(mistake: Mistake, observed: AttentionState, result: AttentionState, truth: Sequence[_Truth]) -> Candidate:
    both = (_numbers(state, len(truth) == 2) for state in (observed, result))
    compared = [_fit(*numbers) for numbers in zip(*both, truth, strict=True)]
    # attn_out decides where it is wrong, whatever the statistics are: they may be kept in other ways. Where it is right a
    # mistake of the statistics has left it so.
    telling = next(i for i, part in enumerate(truth) if part.wrong.any()) + 1
    wrong = np.concatenate([part.wrong.ravel() for part in truth[:telling]])
    fits, off = (np.concatenate([part.ravel() for part in parts]) for parts in zip(*compared[:telling], strict=True))
    return Candidate(
        mistake,
        not same_bits(observed, result),
        explained=float(fits[wrong].mean()),
        spoiled=float((~fits)[~wrong].mean()) if not wrong.all() else 0.0,
        misfit=float((~fits).sum() / wrong.sum()),
        off=float(off[wrong & fits].max(initial=0.0)),
        everything=all(
            (~part).sum() <= _MISFIT * true.wrong.sum() for (part, _), true in zip(compared, truth, strict=True)
        ),
    )


def _fit(seen: np.ndarray, made: np.ndarray, truth: _Truth) -> tuple[np.ndarray, np.ndarray]:
    """Tell which elements of an array are what a mistake makes of them, and how far off they are in shares of the bound."""
    # What the mistake makes is no more exact than the truth, nor than numbers of its size are in float32. But a zero that
    # is to be kept bit for bit has its sign.
    wide = "float64" if truth.dtype == "float64" else "float32"
    error = np.maximum(truth.error, half_ulp(np.where(np.isfinite(made), np.abs(made), 0.0), wide))
    error = np.where((truth.error == 0) & (made == 0), 0.0, error)
    # Where it makes no difference it fits as well as the truth, and no better.
    without_effect = shares(made, truth.exact, truth.low, truth.error, truth.dtype) <= 1
    near = shares(seen, made, 0.0, error, truth.dtype, truth.tolerance) <= 1
    return np.where(without_effect, ~truth.wrong, near), shares(seen, made, 0.0, error, truth.dtype)
